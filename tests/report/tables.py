"""Layer tables, made up, with the columns of layers.csv."""

from __future__ import annotations

import numpy as np
import pandas as pd

VISION_LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.fc1")
TEXT_LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj")
MEASURES = ("weight_nmse", "activation_nmse", "activation_peak", "propagated_nmse", "sensitivity_kl")


def layer_names(count: int) -> list[tuple[str, str]]:
    """(name, tower) of `count` layers: a vision tower, a projector, text with cross-attention in between."""
    rows: list[tuple[str, str]] = []
    for i in range(count):
        name = f"model.vision_model.transformer.layers.{i // 5}.{VISION_LEAVES[i % 5]}"
        rows.append((name, "vision"))
        if len(rows) == count // 3:
            break
    rows.append(("model.multi_modal_projector", "projector"))
    for i in range(count - len(rows) - 1):
        kind, tower = ("cross_attn", "cross_attention") if i // 4 % 5 == 3 else ("self_attn", "language")
        rows.append((f"model.language_model.layers.{i // 4}.{kind}.{TEXT_LEAVES[i % 4]}", tower))
    return [*rows, ("lm_head", "language")][-count:]


def layer_table(count: int, spikes: dict[int, float] | None = None) -> pd.DataFrame:
    """A table of `count` layers with flat, slightly noisy errors, and `spikes` (index -> factor)."""
    rng = np.random.default_rng(count)
    table = pd.DataFrame(layer_names(count), columns=["layer", "tower"])
    table["group"] = table["layer"]
    table["in_features"], table["out_features"] = 64, 64
    table["bytes_4bit"], table["bytes_16bit"] = 2_116, 8_192
    factor = np.ones(count)
    for index, times in (spikes or {}).items():
        factor[index] = times
    for column, level in zip(MEASURES, (8e-3, 6e-3, 0.3, 1e-2, 1e-4), strict=True):
        table[column] = level * factor * np.exp(0.05 * rng.normal(size=count))
    table["weight_sqnr_db"] = -10 * np.log10(table["weight_nmse"])
    table["activation_sqnr_db"] = -10 * np.log10(table["activation_nmse"])
    table["weight_peak"] = 0.01
    table["sensitivity_kl_se"] = 0.1 * table["sensitivity_kl"]
    table["samples"], table["tokens"] = 24, 2_400
    table["experts"], table["rounding"] = pd.NA, ""
    table["isolated_kl"], table["isolated_kl_se"] = np.nan, np.nan
    return table
