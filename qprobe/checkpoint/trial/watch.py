"""Which 4-bit weights a forward reads by their layers, and which by something else, as bare codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qprobe.checkpoint.trial.sample import trial_batch
from qprobe.errors import VerificationError, is_out_of_memory
from qprobe.measure.outputs import run_model
from qprobe.system.wording import counted, named


@dataclass
class Reads:
    """ran: 4-bit layers that computed. beside: those whose weight something else computed with."""

    ran: set[str] = field(default_factory=set)
    beside: set[str] = field(default_factory=set)


class _Watch(TorchFunctionMode):
    """Notes in `reads` each operation on a weight of `layers`, by its id, that its own layer does not do."""

    def __init__(self, layers: dict[str, Any], reads: Reads) -> None:
        super().__init__()
        self.names = {id(x.weight): name for name, x in layers.items()}
        self.reads = reads
        self.depth = 0  # of 4-bit layers that are computing

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [*args, *(kwargs or {}).values()]
        used = [] if self.depth else [n for x in given if (n := self.names.get(id(x))) is not None]
        try:
            found = func(*args, **(kwargs or {}))
        except Exception as error:
            if not is_out_of_memory(error):
                self.reads.beside.update(used)  # packed codes do not have the shape of the weight
            raise
        if isinstance(found, Tensor):  # anything else, such as a dtype or a size, is asked for and not read
            self.reads.beside.update(used)
        return found


@contextmanager
def watching(model: nn.Module) -> Iterator[Reads]:
    """What the 4-bit layers of `model` and others read of their weights while the block lasts."""
    from bitsandbytes.nn.modules import Linear4bit

    layers = {name: x for name, x in model.named_modules() if isinstance(x, Linear4bit)}
    reads = Reads()
    with ExitStack() as stack:
        watch = stack.enter_context(_Watch(layers, reads))

        def begin(name: str) -> Callable[..., None]:
            def note(*_: object) -> None:
                reads.ran.add(name)
                watch.depth += 1

            return note

        def end(*_: object) -> None:
            watch.depth -= 1

        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(begin(name)).remove)
            stack.callback(layer.register_forward_hook(end, always_call=True).remove)
        yield reads


def prove_read(model: Any, processor: Any) -> Reads:
    """What one forward of `model` on a small sample reads; see `trial_batch` for the sample.

    Raises VerificationError if a 4-bit weight is used by anything but its layer, which takes packed codes for
    numbers, and if the forward of a sample of the processor fails. Where memory does not suffice for it, or
    bare tokens are not what the model takes, nothing more is known than before.
    """
    batch = trial_batch(model, processor)
    if batch is None:
        return Reads()
    failed: Exception | None = None
    with torch.inference_mode(), watching(model) as reads:
        try:
            run_model(model, batch)
        except Exception as error:  # a model can fail in as many ways as there are classes
            if is_out_of_memory(error):
                return reads
            failed = error
    if reads.beside:
        raise VerificationError(
            f"{counted(len(reads.beside), 'layer')} in 4-bit cannot be: {named(sorted(reads.beside))}. "
            f"{type(model).__name__} reads the weight without the layer, and would take packed codes for "
            "numbers. Keep it in 16-bit."
        )
    if failed is not None and batch.samples[0].id != "tokens":
        said = (str(failed).strip() or type(failed).__name__).partition("\n")[0].rstrip(".")
        raise VerificationError(
            f"The model holds what is listed, but does not run: {said}. Report this with the versions that "
            "`qprobe doctor` prints."
        )
    return reads
