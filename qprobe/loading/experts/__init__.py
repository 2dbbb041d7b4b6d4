"""Fused weights of experts: which there are, and how they are loaded in 4-bit."""
