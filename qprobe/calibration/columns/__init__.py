"""Rounding a few columns of a weight to NF4: the grid, loops over columns, and fused kernels for a GPU."""
