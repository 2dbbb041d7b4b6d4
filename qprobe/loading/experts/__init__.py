"""Fused weights of experts: which there are, and where they lie in a checkpoint."""
