"""Weights of experts, fused as transformers 5 keeps them: one parameter with three dimensions per product.

Which dimension is read and which is written is the module's own declaration: transformers sets
`is_transposed` on every module whose forward its kernels can take over, and those kernels go by it. A class
that declares nothing is known here by name, or its weights stay in 16-bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Form = Literal["routed", "given"]
"""How a module is called: "routed" with (tokens, experts of each token, their weights), "given" with rows for
each expert one after the other, as many for each as there are tokens."""

# Declares nothing: transposed, and called with the tokens that its caller made ready for each expert.
_GIVEN = "Llama4TextExperts"


@dataclass(frozen=True, eq=False)
class ExpertWeight:
    """One fused parameter: the matrices of all experts of `module` for one of its products.

    parameter: its name in the module. transposed: stored as (experts, in, out), not (experts, out, in).
    """

    module: nn.Module
    parameter: str
    transposed: bool

    @property
    def weight(self) -> nn.Parameter:
        """As it is stored, (experts, out, in) or, where it is transposed, (experts, in, out)."""
        return getattr(self.module, self.parameter)

    @property
    def bias(self) -> Tensor | None:
        """(experts, out_features), if there is one."""
        return getattr(self.module, f"{self.parameter}_bias", None)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, out_features, in_features), however it is stored."""
        experts, first, second = self.weight.shape
        return (experts, second, first) if self.transposed else (experts, first, second)

    @property
    def out_features(self) -> int:
        return self.shape[1]

    @property
    def in_features(self) -> int:
        return self.shape[2]


Layer = nn.Linear | ExpertWeight
"""What holds a weight that can be in 4-bit."""


def expert_weights(model: nn.Module) -> dict[str, ExpertWeight]:
    """The fused weights of experts in `model` by the names of their parameters, in module order."""
    return {
        f"{name}.{parameter}": expert_weight(module, parameter)
        for name, module in model.named_modules()
        if form_of(module) is not None
        for parameter in (first_parameter(module), "down_proj")
        if isinstance(held := module._parameters.get(parameter), nn.Parameter) and held.dim() == 3
    }


def expert_weight(module: nn.Module, parameter: str) -> ExpertWeight:
    """The weight that `module`, one of experts, holds as `parameter`."""
    form = form_of(module)
    assert form is not None, type(module)
    return ExpertWeight(module, parameter, form == "given" or bool(module.is_transposed))


def first_parameter(module: nn.Module) -> str:
    """The parameter that reads a module's tokens; "down_proj" reads what comes of it."""
    return "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"


def form_of(module: nn.Module) -> Form | None:
    """How this module of experts is called; None for one that is none, or declares nothing."""
    # torch calls the class of a module with a parametrization Parametrized...
    if type(module).__name__.removeprefix("Parametrized") == _GIVEN:
        return "given"
    # Set by transformers' decorator `use_experts_implementation` together.
    declares = all(hasattr(module, x) for x in ("is_transposed", "has_gate", "has_bias", "_apply_gate"))
    return "routed" if declares else None
