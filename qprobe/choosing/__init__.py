"""From finished units to the layer table, and from the table and a budget to a manifest; no torch."""

from qprobe.choosing.selection import select

__all__ = ["select"]
