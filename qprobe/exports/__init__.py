"""Skip-lists for other tools, made from a manifest and held against each tool's own rule; no torch."""

from qprobe.exports.targets import TOOLS, Export, export_manifest

__all__ = ["TOOLS", "Export", "export_manifest"]
