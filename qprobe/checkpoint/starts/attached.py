"""peft's adapters on exactly the modules that they are asked for, and where they begin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe.checkpoint.ready import adapted_linears
from qprobe.checkpoint.starts.corrected import correction_of, start_corrected
from qprobe.errors import MachineError, QprobeError
from qprobe.exports.keys import one_pattern
from qprobe.inputs.decoder import layout_of
from qprobe.manifest.records import Manifest, ManifestLayer
from qprobe.models.adapting import Adapted, adapted_layers
from qprobe.options import DEFAULT_ADAPT, Start

_REWRITES = "convert_peft_config_for_transformers"


@dataclass(frozen=True)
class AskedAdapter:
    """What adapter a model gets. rank: of what is trained; a correction's is beside it, and alpha is the sum.
    adapt, for_tool: as of `lora_targets`.
    """

    start: Start
    rank: int = 16
    adapt: str = DEFAULT_ADAPT
    for_tool: str | None = None


def check_asked(asked: AskedAdapter, manifest: Manifest, folder: Path) -> None:
    """Raises QprobeError for an adapter that the model of `manifest`, lying in `folder`, cannot get.

    MachineError without peft, ManifestError for a corrected start without corrections.
    """
    if asked.start not in ("zero", "corrected"):
        raise QprobeError(f"{asked.start!r} is no start of an adapter. Pass zero or corrected.")
    if asked.rank < 1:
        raise QprobeError(f"--rank {asked.rank} makes no adapter. Pass 1 or more.")
    # Some models have linears of one or a few outputs (gates), so the smallest side would refuse too much.
    most = max(min(x.shape) for x in _adapted(asked, manifest))
    if asked.rank > most:
        raise QprobeError(
            f"--rank {asked.rank:,} is higher than that of any layer of {manifest.model.id}, which is "
            f"{most:,} at most. Pass less; 8 to 64 is usual."
        )
    if asked.start == "corrected":
        with correction_of(manifest, folder):
            pass
        if not has_four_bit(asked, manifest):
            raise QprobeError(
                f"A corrected start repairs 4-bit weights, and all layers that adapt {asked.adapt!r} names "
                "stay in 16-bit. Begin at zero, or adapt others."
            )
    peft_library()


def has_four_bit(asked: AskedAdapter, manifest: Manifest) -> bool:
    """True if the adapter goes on a layer in 4-bit: in 16-bit there is nothing to correct."""
    return any(x.is_four_bit for x in _adapted(asked, manifest))


def _adapted(asked: AskedAdapter, manifest: Manifest) -> list[ManifestLayer]:
    names = set(adapted_layers(manifest, asked.adapt, asked.for_tool).names)
    return [x for x in manifest.layers if x.name in names]


def with_adapter(model: Any, asked: AskedAdapter, manifest: Manifest, folder: Path) -> tuple[Any, Adapted]:
    """(peft model at its start, the linears that it adapts and those that have to do without).

    model: of `manifest`, which lies in `folder`, ready for training. torch's generator draws lora_A. Before
    the first step a correction has to be held (`qprobe.checkpoint.starts.held`).
    """
    peft = peft_library()
    targets = adapted_linears(model, asked.adapt, asked.for_tool)
    with ExitStack() as stack:
        is_corrected = asked.start == "corrected"
        factors = stack.enter_context(correction_of(manifest, folder)) if is_corrected else None
        rank = asked.rank + (0 if factors is None else factors.rank)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            lora_dropout=0.0,
            target_modules=one_pattern(targets.names),
            task_type=None if layout_of(model).decoder is None else "SEQ_2_SEQ_LM",
        )
        with names_as_written():
            tuned = peft.get_peft_model(model, config)
        if factors is not None:
            start_corrected(tuned, factors, asked.rank)
    return tuned, targets


def save_adapter(tuned: Any, folder: Path, base: str) -> None:
    """Write the adapter of `tuned` to `folder` as peft reads it. base: what it loads on, a name or folder."""
    tuned.peft_config["default"].base_model_name_or_path = base
    # Else peft would look the name up on the hub to see whether the vocabulary grew, which it cannot have.
    tuned.save_pretrained(folder, save_embedding_layers=False)


def peft_library() -> Any:
    """The module peft. Raises MachineError, saying how to get it, if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise MachineError(
            f"Adapters need peft, which cannot be imported ({error}). Install it with "
            f"`pip install 'qprobe[train]'`."
        ) from error
    return peft


@contextmanager
def names_as_written() -> Iterator[None]:
    """While open, peft takes the names in a config as they stand.

    For mixtures whose experts were linears in transformers 4, peft 0.21 rewrites them otherwise: it keeps the
    last parts of what a pattern matches, and takes gate_proj, up_proj and down_proj for fused experts. Layers
    that the pattern leaves out would get adapters then, and shared experts none. Can go with a peft that
    tells configs for transformers 4 from others.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # peft before 0.19 rewrites nothing
        conversion = None
    before = getattr(conversion, _REWRITES, None)
    if before is None:
        yield
        return
    setattr(conversion, _REWRITES, lambda *_args, **_options: None)
    try:
        yield
    finally:
        setattr(conversion, _REWRITES, before)
