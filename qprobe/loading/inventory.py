"""Every linear of a loaded model (on any device, also meta), and the bytes around them."""

from __future__ import annotations

import dis
import hashlib
import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from types import FunctionType
from typing import Any

from torch import nn

from qprobe.errors import ModelError
from qprobe.formats.library import import_bitsandbytes
from qprobe.loading.experts.weights import ExpertWeight, Layer, expert_weights
from qprobe.loading.names import checkpoint_names
from qprobe.models.family import VISION
from qprobe.models.towers import group_of, reads_vision, tower_of
from qprobe.records import FormatSpec, Inventory, Linear, Uncovered
from qprobe.registry.precisions import sixteen_bit_bytes
from qprobe.system.log_filters import Remark, without_remarks

WHY_SUBCLASS = "a subclass of nn.Linear; transformers converts exact nn.Linear modules only"
WHY_ATTENTION = "inside nn.MultiheadAttention, which reads its weights directly"
WHY_CONV = "a convolution; bitsandbytes converts nn.Linear only"
WHY_CONV1D = "a Conv1D of transformers, whose weight lies transposed; it is kept as it is"
FLOAT32 = "kept in float32 by transformers"
READ_DIRECTLY = "its module reads the weight itself"
WHY_FUSED = "a fused weight outside any nn.Linear (for example stacked experts)"

_NOTHING = Remark(
    "transformers.integrations.bitsandbytes", "no linear modules were found", "said where it is asked for"
)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the model's class name and of every parameter's name, shape and dtype.

    Values do not enter it; a model on the meta device has the fingerprint of its loaded twin.
    """
    sha = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
        sha.update(f"\n{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
    return sha.hexdigest()


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The modules that 4-bit loading can convert, by name, in module order."""
    inside_attention = {
        id(child) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for child in m.children()
    }
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and id(module) not in inside_attention
    }


def measured_layers(model: nn.Module) -> dict[str, Layer]:
    """The linears and the fused weights of experts by name, in module order."""
    linears, experts = linear_modules(model), expert_weights(model)
    found: dict[str, Layer] = {}
    for name, module in model.named_modules():
        if name in linears:
            found[name] = linears[name]
        for parameter in module._parameters:
            weight = experts.get(f"{name}.{parameter}")
            if weight is not None:
                found[f"{name}.{parameter}"] = weight
    return found


def list_layers(model: nn.Module, spec: FormatSpec) -> Inventory:
    """The inventory of `model` under `spec`, in module order: linears, and fused weights of experts.

    The output embedding ("lm_head"), weights that share storage with another parameter ("tied") and what
    transformers never converts (FLOAT32) are fixed, and so are those whose weight is used without them
    (`read_directly`), and experts where `spec` says so. Every parameter is assumed to be stored in its own
    dtype; weights of layers in 16-bit, but for FLOAT32. Of layers that share one weight the first has its
    bytes, the others have none.
    """
    layers = measured_layers(model)
    names = frozenset(layers)
    linears = frozenset(name for name, layer in layers.items() if isinstance(layer, nn.Linear))
    converting = {id(router.classifier) for router in converting_routers(model)}
    unconverted = linears - converted_modules(model) | {x for x in linears if id(layers[x]) in converting}
    read = read_directly(model, linears)
    in_files = checkpoint_names(model, tuple(x for x in layers if x in linears))
    architecture = type(model).__name__
    has_vision = any(tower_of(n, architecture, True) == VISION for n in names)
    shared = _shared_storage(model)
    head = _output_embedding(model)
    found, listed = [], set[int]()
    for name, layer in layers.items():
        shape = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else layer.shape
        tower = tower_of(name, architecture, has_vision)
        fixed = FLOAT32 if name in unconverted else None
        if name in read:
            fixed = fixed or READ_DIRECTLY
        if layer is head or id(layer.weight) in shared:
            fixed = "tied" if id(layer.weight) in shared else "lm_head"
        is_counted = id(layer.weight) in listed
        listed.add(id(layer.weight))
        found.append(
            Linear(
                name=name,
                checkpoint_name=in_files.get(name, name),
                tower=tower,
                group=group_of(name, names, architecture, tower),
                shape=shape,
                bytes_4bit=0 if is_counted else spec.nbytes(shape),
                bytes_16bit=0 if is_counted else _bytes_kept(layer, shape, name in unconverted),
                fixed=fixed,
                reads="vision" if reads_vision(name, architecture, tower) else "text",
                transposed=isinstance(layer, ExpertWeight) and layer.transposed,
            )
        )
    weights = {id(m.weight) for m in layers.values()}
    inventory = Inventory(tuple(found), _uncovered(model, layers), _other_bytes(model, weights))
    return inventory.with_experts_kept if spec.experts == "16-bit" else inventory


def _bytes_kept(layer: Layer, shape: tuple[int, ...], is_unconverted: bool) -> int:
    return layer.weight.nbytes if is_unconverted else sixteen_bit_bytes(shape)


class _Asked:
    """`model` for the conversion of transformers to look at: what it would replace is noted, not replaced."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: list[str] = []
        # Patterns that transformers adds to every skip-list. What they name it keeps in float32 where the
        # rest of the model is in fp16; in bf16 it is in bf16 as well, but still never in 4-bit.
        self._keep_in_fp32_modules = getattr(model, "_keep_in_fp32_modules", None)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return self.model.named_modules()

    def set_submodule(self, name: str, module: nn.Module) -> None:
        self.names.append(name)


def converted_modules(model: nn.Module, skip_list: Iterable[str] = ()) -> frozenset[str]:
    """Names of the modules that the running transformers, asked itself, turns into 4-bit under `skip_list`.

    model: the 16-bit model, on any device, also the meta device; it stays as it is.
    """
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    import_bitsandbytes()
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=list(skip_list))
    asked: Any = _Asked(model)
    with without_remarks(_NOTHING):
        quantizer = Bnb4BitHfQuantizer(config, pre_quantized=False)
        quantizer._process_model_before_weight_loading(asked, device_map=None)
    return frozenset(asked.names)


# Routers that turn their classifier into their own dtype in their first forward (transformers 5.23).
_CONVERTING = ("SwitchTransformersTop1Router", "NllbMoeTop2Router")


# Models that change their own weights in their first forward (transformers 5.23): those of a checkpoint that
# is saved behind it are other ones.
_REWRITING = ("RwkvModel",)


def refuse_rewriting(model: nn.Module) -> None:
    """Raises ModelError for a model that changes its own weights when it runs."""
    if any(type(m).__name__ in _REWRITING for m in model.modules()):
        raise ModelError(
            f"{type(model).__name__} rescales its own weights when it first runs, so what runs is not what "
            "was measured, and a checkpoint of it would be rescaled twice. It stays in 16-bit as it is."
        )


def separate_experts(model: nn.Module) -> str | None:
    """The name of a list of experts that are modules with layers of their own; None if there is none."""
    return next(
        (
            name
            for name, m in model.named_modules()
            if name.rpartition(".")[2] == "experts"
            and isinstance(m, nn.ModuleList | nn.ModuleDict)
            and any(isinstance(x, nn.Linear) for x in m.modules())
        ),
        None,
    )


def converting_routers(model: nn.Module) -> list[Any]:
    """The routers of `model` that convert their classifier once they run."""
    return [m for m in model.modules() if type(m).__name__ in _CONVERTING]


def settle(model: nn.Module) -> None:
    """Convert the classifiers of `converting_routers` now, so that running the model changes none."""
    for router in converting_routers(model):
        router.classifier.to(router.dtype)


def read_directly(model: nn.Module, names: frozenset[str]) -> frozenset[str]:
    """Those of the linears `names` whose weight their parent uses without them, as Mamba's `dt_proj`.

    Packed codes in its place would be taken for numbers, or fail in the first forward.
    """
    parents = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    return frozenset(
        n for n, parent in parents.items() if n.rpartition(".")[2] in _weights_read(type(parent))
    )


@cache
def _weights_read(cls: type) -> frozenset[str]:
    """Names x with whose `self.x.weight` a method of `cls` computes; asking for its dtype does not count.

    But turning inputs into that dtype does: that of packed codes is uint8, as in LongT5's `wo`, or where
    SigLIP 2 and ColPali give it a name first.
    """
    found = set()
    methods = [x for base in cls.__mro__ for x in vars(base).values() if isinstance(x, FunctionType)]
    for method in map(inspect.unwrap, methods):
        if "weight" not in method.__code__.co_names:
            continue
        steps = [x for x in dis.get_instructions(method) if x.opname not in ("CACHE", "EXTENDED_ARG")]
        for before, at, after, then in zip(steps, steps[1:], steps[2:], steps[3:], strict=False):
            is_weight = before.opname == at.opname == "LOAD_ATTR" and at.argval == "weight"
            # `.weight.dtype`, and `isinstance(self.x.weight, torch.Tensor)` where T5 looks for its dtype
            is_asked = (after.opname == "LOAD_ATTR" and after.argval in _ASKED) or after.argval == "torch"
            is_given = after.argval == "dtype" and _is_handed_on(then, steps)
            if is_weight and (is_given or not is_asked) and isinstance(before.argval, str):
                found.add(before.argval)
    return frozenset(found)


def _is_handed_on(then: dis.Instruction, steps: list[dis.Instruction]) -> bool:
    """True if the value ahead of `then` is the last argument of a call, at once or by a local variable."""
    if not then.opname.startswith("STORE_FAST"):
        return _is_call(then)
    (name, *_) = _variables(then)
    return any(
        name in _variables(a) and _is_call(b)
        for a, b in pairwise(steps)
        if a.opname.startswith(("LOAD_FAST", "STORE_FAST_LOAD_FAST"))
    )


def _variables(step: dis.Instruction) -> tuple[str, ...]:
    """The local variables of `step`, which are two from Python 3.13 on."""
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)


def _is_call(step: dis.Instruction) -> bool:
    """True if `step` begins a call whose arguments are there; from Python 3.13 on names of keywords are a
    constant.
    """
    is_naming = step.opname == "LOAD_CONST" and isinstance(step.argval, tuple)
    return step.opname in ("PRECALL", "CALL", "KW_NAMES") or is_naming


_ASKED = ("dtype", "device", "shape", "size", "numel", "ndim", "requires_grad", "data_ptr")


def parameter_name(name: str, layer: Layer) -> str:
    """The full name of the parameter of the layer `name`: that of experts is called as the layer."""
    return f"{name}.weight" if isinstance(layer, nn.Linear) else name


def _shared_storage(model: nn.Module) -> set[int]:
    """Ids of parameters that several names reach."""
    seen: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, times in seen.items() if times > 1}


def _other_bytes(model: nn.Module, weights: set[int]) -> int:
    """Bytes of parameters that are no weight of a listed linear, and of persistent buffers."""
    parameters = {id(p): p for p in model.parameters() if id(p) not in weights}
    names = set(model.state_dict(keep_vars=True))
    buffers = {id(b): b for n, b in model.named_buffers() if n in names}
    return sum(t.numel() * t.element_size() for t in (*parameters.values(), *buffers.values()))


def _uncovered(model: nn.Module, covered: dict[str, Layer]) -> tuple[Uncovered, ...]:
    found = []
    owners = {parameter_name(name, layer) for name, layer in covered.items()}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name in owners:
            continue
        parent_name, _, _ = name.rpartition(".")
        why = why_uncovered(model, parent_name)
        if why is not None:
            found.append(Uncovered(name, parameter.numel() * parameter.element_size(), why))
    return tuple(found)


def why_uncovered(model: nn.Module, parent_name: str) -> str | None:
    """Why the matrix of this module stays in 16-bit; None for tables that multiply nothing."""
    parent = model.get_submodule(parent_name)
    grandparent = model.get_submodule(parent_name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention) or isinstance(grandparent, nn.MultiheadAttention):
        return WHY_ATTENTION
    if isinstance(parent, nn.Linear):
        return WHY_SUBCLASS
    if isinstance(parent, nn.modules.conv._ConvNd):
        return WHY_CONV
    if type(parent).__name__ == "Conv1D":
        return WHY_CONV1D
    is_table = isinstance(parent, nn.Embedding) or "embed" in type(parent).__name__.lower()
    return None if is_table or "norm" in type(parent).__name__.lower() else WHY_FUSED


def has_language_head(model: nn.Module) -> bool:
    """True if the model turns hidden states into token logits."""
    return _output_embedding(model) is not None


def _output_embedding(model: Any) -> nn.Module | None:
    """The layer that turns hidden states into token logits; None for a model without one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head if isinstance(head, nn.Module) else None
