"""A finished run folder, made up, without torch."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from qprobe.manifest.write import write_manifest
from qprobe.records import FormatSpec, Inventory, Linear, ModelIdentity
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import VERSION, Key, Measures, Spec
from qprobe.selection.select import select
from tests.report.tables import layer_table

COLUMNS = (
    "layer tower group in_features out_features experts bytes_4bit bytes_16bit weight_nmse weight_sqnr_db "
    "weight_peak activation_nmse activation_sqnr_db activation_peak propagated_nmse sensitivity_kl "
    "sensitivity_kl_se isolated_kl isolated_kl_se rounding samples tokens"
).split()


def write_run(folder: Path, layers: int = 30, spikes: dict[int, float] | None = None) -> pd.DataFrame:
    """The layer table of a run written to `folder`: scan.json, layers.csv and skiplist.json for +10 %."""
    table = layer_table(layers, spikes)[COLUMNS]
    linears = tuple(
        Linear(
            name=row.layer,
            checkpoint_name=row.layer,
            tower=row.tower,
            group=row.group,
            shape=(row.out_features, row.in_features),
            bytes_4bit=row.bytes_4bit,
            bytes_16bit=row.bytes_16bit,
            fixed="lm_head" if row.layer == "lm_head" else None,
        )
        for row in table.itertuples()
    )
    model = ModelIdentity("owner/model", None, "MllamaForConditionalGeneration", "f" * 64)
    spec = Spec("weights", "cpu", Measures(False, False), seed=0)
    RunFolder(folder).open(Key(VERSION, model, FormatSpec(), Inventory(linears, (), 100_000), spec))
    table.to_csv(folder / "layers.csv", index=False)
    write_manifest(folder / "skiplist.json", select(folder, "+10%"))
    return table
