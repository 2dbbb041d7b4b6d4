"""Making a loaded model ready for adapters, without the float32 copies that peft's preparation makes."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from qprobe.checkpoint.experts.four_bit import four_bit_experts
from qprobe.exports.keys import one_pattern
from qprobe.loading.experts.weights import expert_weights
from qprobe.loading.inventory import linear_modules
from qprobe.models.adapting import Adapted, adapted, refuse_experts
from qprobe.options import DEFAULT_ADAPT


def ready_for_training(model: Any) -> Any:
    """`model` (16-bit or 4-bit), frozen and ready for adapters: every weight in its dtype, blocks recomputed
    where the model can, see `kept_whole`.

    Differs from `peft.prepare_model_for_kbit_training` in what costs memory and brings nothing:
    - nothing in 16-bit becomes float32. Norms compute in float32 anyway, and in float32 they would hand
      float32 to the 16-bit linears behind them, which refuse it.
    - gradients are asked for at the text embeddings only, not at the vision tower's, whose activations a
      backward pass would otherwise keep for no adapter to use. `model.enable_input_require_grads`, which
      trainers call, does the same from now on.
    Blocks are checkpointed without re-entry, so adapters train in the vision tower as well. Key-value
    caching is off.
    """
    model.requires_grad_(False)
    model.enable_input_require_grads = MethodType(_text_gradients, model)
    if kept_whole(model) is None:
        # transformers 5.17 knows it by its old name only; can go with the first release required that has
        # both.
        old = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False
    return model


def kept_whole(model: Any) -> str | None:
    """That the activations of all blocks stay in memory, where transformers cannot recompute those of
    `model`; None where it can.
    """
    if model.supports_gradient_checkpointing:
        return None
    return (
        f"transformers cannot recompute the blocks of {type(model).__name__} in the backward pass, so the "
        "activations of a whole batch stay in memory. Smaller batches or lines need less."
    )


def lora_targets(model: nn.Module, adapt: str = DEFAULT_ADAPT, for_tool: str | None = None) -> str:
    """One regular expression for `LoraConfig(target_modules=...)`: linears of `model`, 4-bit or 16-bit.

    adapt: language, projector, vision, all, or names of modules, with commas between them. for_tool: "vllm"
    leaves out what it serves no adapters on. Output heads, weights tied to an embedding, and what peft
    forbids are left out. A string is matched to whole names, where peft would read a list as endings and miss
    or hit others. For some mixtures of experts peft 0.21 reads a string that way too; `qprobe.finetune` keeps
    it from that. Raises QprobeError if nothing is left, or a word names nothing, or fused experts.
    """
    return one_pattern(adapted_linears(model, adapt, for_tool).names)


def adapted_linears(model: nn.Module, adapt: str, for_tool: str | None) -> Adapted:
    """The linears that `lora_targets` matches, and those that it leaves out."""
    experts = list(dict.fromkeys([*expert_weights(model), *four_bit_experts(model)]))
    refuse_experts(adapt, experts)
    linears = {**linear_modules(model), **_four_bit_modules(model)}
    names = [name for name, _ in model.named_modules() if name in linears]
    shared, head = _shared(model), _head(model)
    fixed = frozenset(x for x in names if id(linears[x].weight) in shared or linears[x] is head)
    return adapted(names, fixed, type(model).__name__, adapt, for_tool, experts)


def is_four_bit(module: nn.Module) -> bool:
    """True for a linear that bitsandbytes holds in 4-bit."""
    from bitsandbytes.nn.modules import Linear4bit

    return isinstance(module, Linear4bit)


def _four_bit_modules(model: Any) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if is_four_bit(module)}


def _head(model: Any) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _shared(model: nn.Module) -> set[int]:
    """Ids of the parameters that more than one name reaches."""
    seen: set[int] = set()
    ids = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    return {x for x in ids if x in seen or seen.add(x)}


def _text_gradients(model: Any) -> None:
    """In place of transformers' method of this name, which asks for gradients at every tower's embeddings."""
    embeddings = model.get_input_embeddings()
    if getattr(model, "_require_grads_hooks", None):
        return
    model._require_grads_hooks = [embeddings.register_forward_hook(_require_gradient)]
    model._require_grads_hook = model._require_grads_hooks[0]


def _require_gradient(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    # A copy, since models such as GIT add positions in place, which a leaf that asks for gradients refuses.
    return output.requires_grad_(True).clone()
