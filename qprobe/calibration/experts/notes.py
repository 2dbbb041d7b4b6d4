"""What a reader is told of experts that calibration leaves to rounding to nearest."""

from __future__ import annotations

from qprobe.calibration.experts.rounding import FEWEST_TOKENS
from qprobe.registry.measures import CALIBRATION
from qprobe.runs.folder import RunFolder
from qprobe.system.wording import counted


def experts_note(run: RunFolder) -> str:
    """How many experts of calibrated weights are rounded to nearest, in a sentence; empty if none are."""
    rows = run.units(CALIBRATION.name)
    rows = rows.loc[(rows["why"] == "") & (rows["nearest"].fillna(0) > 0)]
    if rows.empty:
        return ""
    sizes = {x.name: x.experts or 0 for x in run.key.inventory.layers}
    nearest, among = int(rows["nearest"].sum()), sum(sizes[name] for name in rows["layer"])
    return (
        f"{nearest:,} of {among:,} experts in {counted(len(rows), 'calibrated layer')} are rounded to "
        f"nearest: they read fewer than {FEWEST_TOKENS} tokens, or calibration does not lessen their error."
    )
