"""qprobe: which linear layers of a vision-language model must stay in 16-bit when the rest goes to 4-bit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. It is imported on first use, so that `import qprobe` costs no torch. No module
# of the package may have one of these names: importing it would put the module in the function's place.
_HOMES = {
    "Audit": "qprobe.checkpoint.auditing.found",
    "Manifest": "qprobe.manifest.records",
    "QprobeError": "qprobe.errors",
    "Run": "qprobe.scanning.run",
    "answer_collator": "qprobe.inputs.encoding",
    "audit": "qprobe.checkpoint.auditing.audit",
    "compare": "qprobe.checkpoint.comparing.compare",
    "doctor": "qprobe.loading.doctor",
    "export_manifest": "qprobe.exports",
    "finetune": "qprobe.training.finetune",
    "import_list": "qprobe.checkpoint.import_list",
    "join": "qprobe.scanning.join",
    "layer_table": "qprobe.runs.folder",
    "load_dynamic_4bit": "qprobe.checkpoint.load",
    "load_image": "qprobe.data.images",
    "load_finetuned": "qprobe.training.origin",
    "load_standard_4bit": "qprobe.checkpoint.load",
    "lora_targets": "qprobe.checkpoint.ready",
    "merge": "qprobe.training.merging.merge",
    "open_run": "qprobe.scanning.run",
    "plan": "qprobe.checkpoint.plan",
    "plan_scan": "qprobe.scanning.planning.plan",
    "quantize": "qprobe.checkpoint.quantize",
    "rank_table": "qprobe.runs.layers.table",
    "read_manifest": "qprobe.manifest.read",
    "scan": "qprobe.scanning.scan",
    "select": "qprobe.selection.select",
    "verify": "qprobe.checkpoint.verify",
    "write_manifest": "qprobe.manifest.write",
    "write_report": "qprobe.report.write",
}

if TYPE_CHECKING:
    from qprobe.checkpoint.auditing.audit import audit
    from qprobe.checkpoint.auditing.found import Audit
    from qprobe.checkpoint.comparing.compare import compare
    from qprobe.checkpoint.import_list import import_list
    from qprobe.checkpoint.load import load_dynamic_4bit, load_standard_4bit
    from qprobe.checkpoint.plan import plan
    from qprobe.checkpoint.quantize import quantize
    from qprobe.checkpoint.ready import lora_targets
    from qprobe.checkpoint.verify import verify
    from qprobe.data.images import load_image
    from qprobe.errors import QprobeError
    from qprobe.exports import export_manifest
    from qprobe.inputs.encoding import answer_collator
    from qprobe.loading.doctor import doctor
    from qprobe.manifest.read import read_manifest
    from qprobe.manifest.records import Manifest
    from qprobe.manifest.write import write_manifest
    from qprobe.report.write import write_report
    from qprobe.runs.folder import layer_table
    from qprobe.runs.layers.table import rank_table
    from qprobe.scanning.join import join
    from qprobe.scanning.planning.plan import plan_scan
    from qprobe.scanning.run import Run, open_run
    from qprobe.scanning.scan import scan
    from qprobe.selection.select import select
    from qprobe.training.finetune import finetune
    from qprobe.training.merging.merge import merge
    from qprobe.training.origin import load_finetuned

__all__ = [
    "Audit",
    "Manifest",
    "QprobeError",
    "Run",
    "__version__",
    "answer_collator",
    "audit",
    "compare",
    "doctor",
    "export_manifest",
    "finetune",
    "import_list",
    "join",
    "layer_table",
    "load_dynamic_4bit",
    "load_finetuned",
    "load_image",
    "load_standard_4bit",
    "lora_targets",
    "merge",
    "open_run",
    "plan",
    "plan_scan",
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
