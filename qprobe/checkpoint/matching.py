"""Skip-list keys that keep exactly the wanted modules in 16-bit under the running transformers.

transformers reads the entries of `llm_int8_skip_modules` as regular expressions and also as bare
endings of a module name, and the rule changed between versions: "fc1" may match hundreds of modules.
So the keys are tried on every module of the model, by transformers' own function, before anything loads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from qprobe.errors import MachineError, VerificationError
from qprobe.system.wording import counted


def convertible_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules of a 16-bit model that transformers turns into 4-bit unless a key stops it."""
    from transformers.pytorch_utils import Conv1D

    return tuple(
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    )


def skip_keys(model: nn.Module, four_bit: Iterable[str]) -> list[str]:
    """Keys for `llm_int8_skip_modules` under which exactly the modules `four_bit` become 4-bit.

    model: the 16-bit model, also on the meta device. The keys are the plain module names where those
    match nothing else, which other tools can read too, else anchored regular expressions.
    Raises VerificationError if the running transformers cannot be told so, naming the modules.
    """
    modules = convertible_modules(model)
    wanted = frozenset(four_bit)
    skipped = [name for name in modules if name not in wanted]
    # transformers adds these patterns of the model's class to every skip-list.
    always = sorted(getattr(model, "_keep_in_fp32_modules", None) or ())
    anchored = [f"{re.escape(name)}$" for name in skipped]
    for keys in (skipped, anchored):
        if _converted(modules, [*keys, *always]) == wanted:
            return keys
    wrong = sorted(_converted(modules, [*anchored, *always]) ^ wanted)
    raise VerificationError(
        f"This transformers cannot load the wanted layers in 4-bit: {len(wrong)} of {len(modules)} would get "
        f"the other precision, first {', '.join(wrong[:3])}."
        + (f" Its class keeps {', '.join(always)} in 16-bit whatever the list says." if always else "")
        + " Choose those layers the other way, or use the transformers version of the scan."
    )


def check_keys(
    model: nn.Module, keys: Sequence[str], four_bit: Iterable[str], in_16bit: Iterable[str]
) -> None:
    """Raises VerificationError unless, under `keys`, the running transformers splits the linears like this.

    model: for the patterns of its class, which transformers adds to every list.
    """
    wanted = frozenset(four_bit)
    always = sorted(getattr(model, "_keep_in_fp32_modules", None) or ())
    wrong = sorted(_converted((*wanted, *in_16bit), [*keys, *always]) ^ wanted)
    if wrong:
        raise VerificationError(
            f"Under this transformers the list would load {counted(len(wrong), 'layer')} in the other "
            f"precision, first {wrong[0]}. Use the transformers version of the scan."
        )


def _converted(modules: Sequence[str], keys: list[str]) -> frozenset[str]:
    """The modules that the running transformers converts under `keys`, by its own matcher."""
    try:
        from transformers.quantizers.quantizers_utils import should_convert_module
    except ImportError as error:
        import transformers

        raise MachineError(
            f"transformers {transformers.__version__} does not say which modules it converts, so a skip-list "
            f"cannot be checked before loading. Install transformers 5.17 or newer, below 6."
        ) from error
    return frozenset(name for name in modules if should_convert_module(name, keys))
