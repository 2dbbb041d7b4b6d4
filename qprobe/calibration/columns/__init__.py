"""Rounding a few columns of a weight to NF4: the grid, and loops over columns, compiled and fused as well."""
