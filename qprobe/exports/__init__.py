"""Skip-lists for other tools and from them, held against each tool's own rule; no torch."""

from qprobe.exports.export import Export, export_manifest, export_targets

__all__ = ["Export", "export_manifest", "export_targets"]
