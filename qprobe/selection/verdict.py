"""The verdict of a scan in one sentence, from what was measured on held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from qprobe.manifest.records import NEAREST, NOTHING
from qprobe.registry.precisions import precision
from qprobe.runs.key import ANSWERS, DAMAGE
from qprobe.runs.scored import Scored
from qprobe.selection.decide import Candidate, difference
from qprobe.system.wording import counted

MOST_RESIDUAL = 0.05  # of the damage; dense models stay below 0.3 %, mixtures of experts reach 4 to 10 %
FEW = 7  # held-out samples below which chance exceeds twice the error in over 10 % of cases (Student's t)
SIXTEEN_BIT, DYNAMIC = "16-bit", "dynamic"  # models whose answers are scored, beside the 4-bit format


def verdict(
    standard: Candidate,
    chosen: Candidate,
    standard_bytes: int,
    max_kl: float | None = None,
    nearest: Candidate | None = None,
    readout: str = ANSWERS,
) -> str:
    """What standard 4-bit costs, what the chosen list costs in bytes and brings in KL, each with its error.

    max_kl: the bound that was asked for, and that the chosen list is within. nearest: where the codes of
    `standard` were chosen on samples, standard 4-bit. readout: what damage was measured on.
    """
    what = "Standard" if nearest is None else "Calibrated"
    damage = DAMAGE[readout]
    cost = f"{what} 4-bit costs {damage.what} of {with_error(standard.kl, standard.kl_se)} {damage.unit}"
    if nearest is not None:
        cost += f" (standard 4-bit {with_error(nearest.kl, nearest.kl_se)})"
    if 1 < len(standard.measured) < FEW:
        cost += f", on {len(standard.measured)} held-out samples, too few to trust these errors"
    within = "" if max_kl is None else f", within the {max_kl} asked for"
    if not chosen.kept:
        reason = "no list within the budget measured better than keeping nothing, within the error"
        return f"{cost}{within}; {reason if max_kl is None else 'nothing is kept'}."
    extra = chosen.total_bytes - standard_bytes
    layers = counted(len(chosen.kept), "layer")  # beyond those that standard 4-bit keeps as well
    gain, error = difference(standard, chosen)
    share = f"{extra / standard_bytes:+.1%}"
    unsure = isfinite(error) and abs(gain) <= 2 * error
    sure = ", a difference within twice its error" if unsure else ""
    return (
        f"{cost}; keeping {layers} in 16-bit ({share}, {extra / 2**20:,.2f} MiB) leaves "
        f"{with_error(chosen.kl, chosen.kl_se)}{within}, {with_error(gain, error)} less{sure}."
    )


def calibration_verdict(calibrated: Candidate, nearest: Candidate, stored: str) -> str:
    """What is said where calibrated weights measure no better than standard 4-bit; empty where they do.

    calibrated, nearest: with nothing kept, so of equal bytes. stored: the format that rounds to nearest.
    """
    if calibrated.kl < nearest.kl:
        return ""
    more, error = difference(calibrated, nearest)
    unsure = ", a difference within twice its error" if isfinite(error) and more <= 2 * error else ""
    return (
        f"Calibration does not pay here: on the held-out samples it leaves {with_error(more, error)} more "
        f"than rounding to nearest at equal bytes{unsure}. Scan with --format {stored}, or calibrate on more "
        "samples."
    )


def others_verdict(data: str, compared: Sequence[Candidate], readout: str = ANSWERS) -> str:
    """What 4-bit costs on samples of another kind, those of the file `data`.

    compared: standard 4-bit, named `NEAREST` or `NOTHING`, the calibrated form with nothing kept, and the
    list, those that there are.
    """
    named = {NEAREST: "standard 4-bit costs", NOTHING: "standard 4-bit costs", DYNAMIC: "this list leaves"}
    if any(c.name == NEAREST for c in compared):
        named[NOTHING] = "calibrated 4-bit"
    said = [f"{named[c.name]} {with_error(c.kl, c.kl_se)}" for c in compared]
    *first, last = said
    text = f"{', '.join(first)} and {last}" if first else last
    samples = counted(len(compared[0].measured), "sample")
    return f"On {samples} of another kind ({data}) {text} {DAMAGE[readout].unit}."


def residual_verdict(residual: float) -> str:
    """How well the sensitivities add up to the damage; residual: see `attribution_residual`."""
    if not is_bent(residual):
        return f"The sensitivities add up to the damage within {abs(residual):.1%}."
    return (
        f"The sensitivities miss the damage by {residual:+.1%}, as where blocks share weights, a router "
        "changes its mind or 16-bit rounding adds to a small damage: their ranking is rough. Isolated KL and "
        "measured candidates chose the list."
    )


def is_bent(residual: float | None) -> bool:
    """True if sensitivities miss the damage by more than they may to choose a list."""
    return residual is not None and abs(residual) > MOST_RESIDUAL


def metric_verdict(scored: Scored) -> str:
    """What the answers to held-out samples score, by the models of a scan: 16-bit, nothing kept, the list."""
    models = list(scored.means)
    what = "calibrated" if precision(models[1]).is_calibrated else "standard"
    names = {SIXTEEN_BIT: SIXTEEN_BIT, models[1]: f"{what} 4-bit", DYNAMIC: "this list"}
    said = [f"{names[m]} {mean_text(mean.value, scored.is_share)}" for m, mean in scored.means.items()]
    against = [*reversed(models[:-1])]  # of the last one, to what it improves on first
    differences = [
        f"{difference_text(x.value, x.se, scored.is_share, x.is_found)} against {names[x.against]}"
        for x in (scored.difference(models[-1], other) for other in against)
    ]
    count = counted(scored.samples, "held-out sample")
    return f"By {scored.name} on {count}: {', '.join(said)}; {names[models[-1]]} {' and '.join(differences)}."


def fewer_measured(measured: int, silent: int, asked: int | None) -> tuple[str, ...]:
    """A sentence where fewer samples were measured than asked for.

    silent: how many more there were that the model answers nothing to; asked: None for as many as there are.
    """
    if asked is None or measured >= asked:
        return ()
    verb = "was" if measured == 1 else "were"
    why = [f"{silent:,} got no answer"] if silent else []
    why += ["no other was usable"] if measured + silent < asked else []
    return (f"Of the {counted(asked, 'sample')} asked for, {measured:,} {verb} measured: {', '.join(why)}.",)


def difference_text(value: float | None, se: float | None, is_share: bool, is_found: bool | None) -> str:
    """The difference of a metric with its error: "+4.2 ± 1.1 points"; said where none was found."""
    if value is None:
        return "not measured"
    factor, unit = (100, " points") if is_share else (1, "")
    sign = "+" if value > 0 else ""
    if se is None:
        return f"{sign}{factor * value:.3g}{unit} (error unknown)"
    unsure = "" if is_found else " (no difference found)"
    if is_share:
        return f"{sign}{100 * value:.1f} ± {100 * se:.1f} points{unsure}"
    return f"{sign}{with_error(value, se)}{unsure}"


def mean_text(value: float | None, is_share: bool) -> str:
    """The mean of a metric: "98.2 %", "3.25", a dash where no sample counts."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if is_share else f"{value:.4g}"


def with_error(value: float, error: float) -> str:
    """A value with its standard error, to the digits that the error leaves: "0.0063 ± 0.0004".

    error: NaN where it is unknown; of 0, as where all samples agree, it is said.
    """
    if not isfinite(error):
        return f"{value:.4g} (error unknown)"
    if error == 0:
        return f"{value:.4g} ± 0"
    digits = max(0, 1 - _exponent(error))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _exponent(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])
