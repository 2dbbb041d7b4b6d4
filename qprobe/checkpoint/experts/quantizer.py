"""A quantizer of transformers: its own for 4-bit of bitsandbytes, and fused weights of experts beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qprobe.checkpoint.experts.four_bit import METHOD, put_state, quantized
from qprobe.errors import ModelError
from qprobe.system.log_filters import Remark, without_remarks
from qprobe.system.wording import named

_NO_LINEARS = Remark(
    "transformers.integrations.bitsandbytes",
    "no linear modules were found",
    "linears may all stay in 16-bit where experts are in 4-bit",
)


@register_quantization_config(METHOD)
class ExpertsConfig(BitsAndBytesConfig):
    """What `Experts4Bit` is told. experts: full names of the parameters that it puts in 4-bit."""

    def __init__(self, experts: Sequence[str] = (), **options: Any) -> None:
        super().__init__(**{**options, "load_in_4bit": True})
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.experts = tuple(experts)


@register_quantizer(METHOD)
class Experts4Bit(Bnb4BitHfQuantizer):
    """Quantizes experts while a 16-bit checkpoint is read; of a quantized one it reads their codes alone.

    Raises ModelError, once all is read, for experts with NaN or infinity: 4-bit would spoil their blocks, in
    silence. (What `convert` raises, transformers turns into a report.)
    """

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.experts: tuple[str, ...] = quantization_config.experts
        self.packed: dict[str, dict[str, Any]] = {}
        self.nonfinite: dict[str, list[int]] = {}

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        return param_name in self.experts or super().param_needs_quantization(model, param_name, **options)

    def get_quantize_ops(self) -> Any:
        return _Quantize(self, super().get_quantize_ops())

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **options: Any) -> None:
        with without_remarks(*((_NO_LINEARS,) if self.experts else ())):
            super()._process_model_before_weight_loading(model, device_map, **options)
        for name in self.experts if self.pre_quantized else ():
            parent, _, leaf = name.rpartition(".")  # files hold codes, which are taken as they are
            codes = torch.empty(0, dtype=torch.uint8, device="meta")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(codes, requires_grad=False))

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Those of linears alone where experts are packed: all is stored under the model's own names then.

        model: not passed by transformers 5.17.
        """
        if self.pre_quantized and self.experts:
            return self.get_weight_conversions()
        more: Any = {} if model is None else {"model": model}
        return super().update_weight_conversions(weight_conversions, **more)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        for name, experts in self.nonfinite.items():
            which = "expert" if len(experts) == 1 else "experts"
            raise ModelError(
                f"{name} has NaN or infinity in {which} {named([str(x) for x in experts])}, which 4-bit "
                "cannot hold. Repair the checkpoint, or keep this layer in 16-bit."
            )
        for name, state in self.packed.items():
            put_state(model, name, state)
        self.packed.clear()
        return super()._process_model_after_weight_loading(model, **options)


class _Quantize(ConversionOps):
    """Rounds a weight as it is read; `other` does so for linears."""

    def __init__(self, quantizer: Any, other: ConversionOps) -> None:
        self.quantizer, self.other = quantizer, other

    def convert(self, input_dict: dict[str, Any], *args: Any, **options: Any) -> dict[str, Any]:
        """`input_dict` with 4-bit codes in place of experts' weights, and what `other` makes of the rest."""
        config = self.quantizer.quantization_config
        result, rest = {}, {}
        for name, value in input_dict.items():
            if name not in self.quantizer.experts:
                rest[name] = value
                continue
            weight: Tensor = value[0] if isinstance(value, list) else value
            if not bool(torch.isfinite(weight.sum())) and (hurt := _nonfinite(weight)):
                self.quantizer.nonfinite[name] = hurt
            codes, self.quantizer.packed[name] = quantized(
                weight, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant
            )
            result[name] = nn.Parameter(codes, requires_grad=False)
        return result | (self.other.convert(rest, *args, **options) if rest else {})


def _nonfinite(weight: Tensor) -> list[int]:
    """The experts of `weight` that have NaN or infinity, from 0."""
    return [i for i, one in enumerate(weight) if not bool(torch.isfinite(one).all())]
