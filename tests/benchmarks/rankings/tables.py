"""What the ranking benchmark prints: completeness, rank correlations, and KL by ranking and budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum

import pandas as pd
from scipy.stats import spearmanr

from qprobe.measure.attribution import Attribution
from qprobe.selection.decide import Candidate, difference
from qprobe.selection.search.damage import Damage
from tests.benchmarks.rankings import additive
from tests.benchmarks.rankings.additive import Scores
from tests.benchmarks.rankings.cost import Cost
from tests.benchmarks.rankings.lists import Chooser, Lists, Row
from tests.benchmarks.rankings.measured import NOTHING, Measured

SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)  # of the bytes that NF4 saves
DEFAULT = "**isolated KL and path, two nodes (default)**"
ORACLE = "brute force"


def completeness(attributions: Sequence[Attribution]) -> str:
    """How well the attributions sum to the measured KL, over all samples and sample by sample."""
    rows = additive.path_rows(attributions)
    by_sample = rows.groupby("sample", sort=False)["kl_sum"].sum()
    measured = pd.Series([k.kl for a in attributions for k in a.kl if k.tokens])
    tokens = sum(k.tokens for a in attributions for k in a.kl)
    sums = pd.Series(by_sample.to_numpy())
    nodes = ", ".join(str(n) for n in sorted({a.nodes for a in attributions}))
    residual = fsum(sums) / fsum(measured) - 1
    return (
        f"Path attribution sums to {fsum(sums) / tokens:.5g} against a measured "
        f"{fsum(measured) / tokens:.5g} on the calibration samples "
        f"(residual {residual:+.2%}; sums by sample correlate {sums.corr(measured):.5f}; "
        f"nodes used: {nodes}).\n"
    )


def correlations(found: Mapping[str, Scores]) -> str:
    """Rank correlation over layers of each score with brute force."""
    oracle = found[ORACLE]
    names = sorted(oracle)
    pairs = [
        f"{title.strip('*')} {spearmanr([one[n] for n in names], [oracle[n] for n in names])[0]:.2f}"
        for title, one in found.items()
        if title != ORACLE and "x bytes" not in title
    ]
    return f"Rank correlation with brute force over layers: {'; '.join(pairs)}.\n"


@dataclass(frozen=True)
class Tables:
    """Prints rows against the default on held-out samples. bare: seconds of the unit of cost."""

    held_out: Measured
    bare: float
    default: Damage

    def of(self, title: str, chooser: Chooser, rows: Sequence[Row]) -> str:
        """One Markdown table: KL of the default with its error, of others the paired difference too."""
        columns = [f"+{share:.0%}".replace("%", " %") for share in SHARES]
        baseline = {
            share: candidate
            for share in SHARES
            if (candidate := self._candidate(share, (chooser.damage_lists(self.default),)))
        }
        share_left = ", ".join(
            f"{baseline[s].kl / self.held_out.kl(NOTHING):.0%}".replace("%", " %") for s in SHARES
        )
        lines = [
            f"### {title}\n",
            f"| ranking by | {' | '.join(columns)} | passes | seconds | bare forwards |",
            f"|---|{'---|' * (len(columns) + 3)}",
            *(self._line(row, baseline) for row in rows if row.name != DEFAULT),
            self._default_line(rows, baseline),
            f"\nThe default leaves {share_left} of the all-4-bit KL.\n",
        ]
        return "\n".join(lines)

    def _default_line(self, rows: Sequence[Row], baseline: dict[float, Candidate]) -> str:
        cells = [f"**{c.kl:.4g}** ± {c.kl_se:.2g}" for c in baseline.values()]
        cost = next((row.cost for row in rows if row.name == DEFAULT), None)
        return f"| {DEFAULT} | {' | '.join(cells)} | {self._cost(cost)} |"

    def _line(self, row: Row, baseline: dict[float, Candidate]) -> str:
        cells = []
        for share, default in baseline.items():
            candidate = self._candidate(share, row.lists)
            if candidate is None:
                cells.append("")
                continue
            gap, error = difference(candidate, default)
            cells.append(
                f"{candidate.kl:.4g} ({gap:+.2g} ± {error:.1g})" if gap else f"{candidate.kl:.4g} (=)"
            )
        return f"| {row.name} | {' | '.join(cells)} | {self._cost(row.cost)} |"

    def _candidate(self, share: float, lists: Sequence[Lists]) -> Candidate | None:
        """The list of a row, or what several measure on average, sample by sample; None if it has no list."""
        kept = [found for choose in lists if (found := choose(share)) is not None]
        if not kept:
            return None
        frames = [self.held_out.frame(one) for one in kept]
        mean = frames[0].assign(kl_sum=sum(f["kl_sum"].to_numpy() for f in frames) / len(frames))
        return Candidate("", NOTHING, 0, mean)

    def _cost(self, cost: Cost | None) -> str:
        if cost is None:
            return " | |"
        passes = [f"{cost.forwards:.4g} f"] * (cost.forwards > 0) + [f"{cost.gradients:.3g} g"] * (
            cost.gradients > 0
        )
        return f"{' + '.join(passes)} | {cost.seconds:.0f} | {cost.seconds / self.bare:.1f}"
