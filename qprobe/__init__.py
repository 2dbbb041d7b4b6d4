"""qprobe: which linear layers of a vision-language model must stay in 16-bit when the rest goes to 4-bit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. It is imported on first use, so that `import qprobe` costs no torch. No module
# of the package may have one of these names: importing it would put the module in the function's place.
_HOMES = {
    "Audit": "qprobe.build.audit",
    "CompareOptions": "qprobe.options",
    "FinetuneOptions": "qprobe.options",
    "Manifest": "qprobe.manifest",
    "QprobeError": "qprobe.errors",
    "ScanOptions": "qprobe.options",
    "answer_collator": "qprobe.training.encoding",
    "audit": "qprobe.build.audit",
    "compare": "qprobe.build.compare",
    "doctor": "qprobe.diagnosis",
    "export_manifest": "qprobe.exports",
    "finetune": "qprobe.training.finetune",
    "import_list": "qprobe.build.imports",
    "layer_table": "qprobe.choosing.table",
    "load_dynamic_4bit": "qprobe.build.load",
    "load_finetuned": "qprobe.training.bases",
    "load_standard_4bit": "qprobe.build.load",
    "lora_targets": "qprobe.build.ready",
    "merge": "qprobe.merging",
    "plan": "qprobe.build.plan",
    "quantize": "qprobe.build.quantize",
    "rank_table": "qprobe.choosing.table",
    "read_manifest": "qprobe.manifest",
    "scan": "qprobe.scanning",
    "select": "qprobe.choosing.selection",
    "verify": "qprobe.build.verify",
    "write_manifest": "qprobe.manifest",
    "write_report": "qprobe.report.write",
}

if TYPE_CHECKING:
    from qprobe.build.audit import Audit, audit
    from qprobe.build.compare import compare
    from qprobe.build.imports import import_list
    from qprobe.build.load import load_dynamic_4bit, load_standard_4bit
    from qprobe.build.plan import plan
    from qprobe.build.quantize import quantize
    from qprobe.build.ready import lora_targets
    from qprobe.build.verify import verify
    from qprobe.choosing.selection import select
    from qprobe.choosing.table import layer_table, rank_table
    from qprobe.diagnosis import doctor
    from qprobe.errors import QprobeError
    from qprobe.exports import export_manifest
    from qprobe.manifest import Manifest, read_manifest, write_manifest
    from qprobe.merging import merge
    from qprobe.options import CompareOptions, FinetuneOptions, ScanOptions
    from qprobe.report.write import write_report
    from qprobe.scanning import scan
    from qprobe.training.bases import load_finetuned
    from qprobe.training.encoding import answer_collator
    from qprobe.training.finetune import finetune

__all__ = [
    "Audit",
    "CompareOptions",
    "FinetuneOptions",
    "Manifest",
    "QprobeError",
    "ScanOptions",
    "__version__",
    "answer_collator",
    "audit",
    "compare",
    "doctor",
    "export_manifest",
    "finetune",
    "import_list",
    "layer_table",
    "load_dynamic_4bit",
    "load_finetuned",
    "load_standard_4bit",
    "lora_targets",
    "merge",
    "plan",
    "quantize",
    "rank_table",
    "read_manifest",
    "scan",
    "select",
    "verify",
    "write_manifest",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qprobe' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
