"""Several processes on one job: which of how many this one is.

The variables are those that torchrun sets, and any scheduler can: RANK of WORLD_SIZE processes takes the
units `units[RANK::WORLD_SIZE]`, LOCAL_RANK says which GPU of its machine is its own, and LOCAL_WORLD_SIZE how
many processes share the machine.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from qprobe.errors import MachineError


@dataclass(frozen=True)
class Shard:
    """One of `world` processes that share a scan.

    local: its number on its machine, on which there are local_world; None if not said.
    """

    rank: int = 0
    world: int = 1
    local: int | None = None
    local_world: int | None = None

    @property
    def is_alone(self) -> bool:
        return self.world == 1

    def own(self, units: Sequence[int]) -> list[int]:
        """Those of `units` that are this process's, by number, so that what is finished moves none."""
        return [unit for unit in units if unit % self.world == self.rank]

    def rotated(self, units: Sequence[int]) -> list[int]:
        """All of `units`, from another one on in each process."""
        first = self.rank * len(units) // self.world
        return [*units[first:], *units[:first]]


def even_runs(costs: Sequence[int], world: int) -> list[range]:
    """The numbers of `costs` in `world` runs, one after the other, that cost about as much.

    Some are empty where there are fewer than `world`.
    """
    until = list(accumulate(costs, initial=0))
    cuts = [bisect_left(until, until[-1] * part / world) for part in range(world)]
    return [range(*ends) for ends in pairwise([*cuts, len(costs)])]


def shard_from(environment: Mapping[str, str]) -> Shard:
    """The shard that the variables in `environment` name (see above); alone without them.

    Raises MachineError if they are no numbers, one of the first two is missing, or they do not fit together.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: environment[name].strip() for name in names if environment.get(name, "").strip()}
    rank, world, local, locals_ = (int(given[n]) if given.get(n, "").isdecimal() else None for n in names)
    if not given.keys() & {"RANK", "WORLD_SIZE"}:
        return Shard()
    is_local_right = ("LOCAL_RANK" not in given or local is not None) and (
        "LOCAL_WORLD_SIZE" not in given or (locals_ is not None and (local or 0) < locals_)
    )
    if rank is None or world is None or not rank < world or not is_local_right:
        shown = ", ".join(f"{name}={environment.get(name, '(not set)')}" for name in names)
        raise MachineError(
            f"{shown} do not say which of how many processes this is. Set RANK from 0 to WORLD_SIZE - 1, as "
            "torchrun does, or unset them."
        )
    return Shard(rank, world, local, locals_)
