"""Products of fused experts: which rows each expert reads, and the errors of each."""
