"""Skip-list keys that keep exactly the wanted modules in 16-bit under the running transformers.

transformers reads the entries of `llm_int8_skip_modules` as regular expressions and also as bare
endings of a module name, and the rule changed between versions: "fc1" may match hundreds of modules.
So the keys are tried on the model without weights, by transformers' own conversion, before anything loads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from qprobe.errors import VerificationError
from qprobe.loading.inventory import converted_modules
from qprobe.manifest.records import Manifest
from qprobe.system.wording import counted


def skip_keys(model: nn.Module, four_bit: Iterable[str]) -> list[str]:
    """Keys for `llm_int8_skip_modules` under which exactly the modules `four_bit` become 4-bit.

    model: the 16-bit model, also on the meta device. The keys are the plain module names where those
    match nothing else, which other tools can read too, else anchored regular expressions.
    Raises VerificationError if the running transformers cannot be told so, naming the modules.
    """
    convertible = converted_modules(model)
    modules = [name for name, _ in model.named_modules() if name in convertible]
    wanted = frozenset(four_bit)
    skipped = [name for name in modules if name not in wanted]
    anchored = [f"{re.escape(name)}$" for name in skipped]
    wrong: list[str] = []
    for keys in (skipped, anchored):
        wrong = sorted(converted_modules(model, keys) ^ wanted)
        if not wrong:
            return keys
    always = sorted(getattr(model, "_keep_in_fp32_modules", None) or ())
    raise VerificationError(
        f"This transformers cannot load the wanted layers in 4-bit: {len(wrong)} of {len(modules)} would get "
        f"the other precision, first {', '.join(wrong[:3])}."
        + (f" Its class keeps {', '.join(always)} in 16-bit whatever the list says." if always else "")
        + " Choose those layers the other way, or use the transformers version of the scan."
    )


def check_keys(model: nn.Module, keys: Iterable[str], manifest: Manifest) -> None:
    """Raises VerificationError unless, under `keys`, the running transformers converts what `manifest` says.

    model: the 16-bit model, also on the meta device. Weights of experts are no linears.
    """
    linears = {x.name for x in manifest.layers if x.is_four_bit and not x.is_experts}
    wrong = sorted(converted_modules(model, keys) ^ linears)
    if wrong:
        raise VerificationError(
            f"Under this transformers the list would load {counted(len(wrong), 'layer')} in the other "
            f"precision, first {wrong[0]}. Use the transformers version of the scan."
        )
