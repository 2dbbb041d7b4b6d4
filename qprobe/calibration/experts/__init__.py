"""Calibration of fused experts: each by the tokens that are routed to it."""
