"""Measuring a model on samples; `store` keeps what was measured and needs no torch."""
