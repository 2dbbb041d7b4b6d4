"""What a user asks a skip-list to be: parsed once, where the words come in."""

from __future__ import annotations

from dataclasses import dataclass

from qprobe.errors import BudgetError, QprobeError
from qprobe.options import DEFAULT_BUDGET, FOR, KeptExperts
from qprobe.selection.bound import SCORE, Bound, parse_bound
from qprobe.selection.budget import AskedBudget, parse_budget


@dataclass(frozen=True)
class ListRequest:
    """What a skip-list is asked to be.

    limit: what it may cost, or the KL that it must reach. by: the score column that chooses; None for the
    best one measured. for_tool: whose fused groups it keeps whole, one of FOR; None for no tool. experts:
    "16-bit" keeps all fused weights of experts so; None for what the scan's format says.
    """

    limit: AskedBudget | Bound
    by: str | None = None
    for_tool: str | None = None
    experts: KeptExperts | None = None

    @property
    def words(self) -> list[str]:
        """The options that ask for the same on a command line."""
        limit = self.limit
        asked = {
            "--budget": None if isinstance(limit, Bound) else limit.requested,
            "--max-kl": str(limit.max_kl) if isinstance(limit, Bound) else None,
            "--by": self.by,
            "--for": self.for_tool,
            "--experts": self.experts,
        }
        return [word for name, value in asked.items() if value for word in (name, value)]


def parse_request(
    budget: str | None = None,
    max_kl: float | None = None,
    by: str | None = None,
    for_tool: str | None = None,
    experts: KeptExperts | None = None,
) -> ListRequest:
    """The skip-list that is asked for: within a budget (None for the default), or within a bound on KL.

    Raises BudgetError if both are asked for, or either makes no sense, QprobeError for a `by` that is no KL
    beside a bound, for a tool whose groups are not known, and for experts in anything but 16-bit.
    """
    if for_tool is not None and for_tool not in FOR:
        raise QprobeError(
            f"--for {for_tool!r} is no tool whose groups are known. Pass one of {', '.join(FOR)}."
        )
    if experts not in (None, "16-bit"):
        raise QprobeError(f"--experts {experts!r} is no way to keep them. Pass 16-bit, or leave it out.")
    if max_kl is None:
        asked = parse_budget(DEFAULT_BUDGET if budget is None else budget)
        return ListRequest(asked, by, for_tool, experts)
    if budget is not None:
        raise BudgetError(
            f"Both a budget ({budget}) and a bound on KL ({max_kl}) are given. Pass one of them."
        )
    if by not in (None, SCORE):
        raise QprobeError(f"{by} predicts no KL, so it cannot choose for --max-kl. Leave out --by.")
    return ListRequest(parse_bound(max_kl), by, for_tool, experts)
