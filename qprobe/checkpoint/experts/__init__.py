"""Fused weights of experts in 4-bit: loaded by transformers, read from files, and replaced."""
