"""How long a phased evaluation takes, counted in the work of one rank: by who waits for whom, not by what all do."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Plan(NamedTuple):
    """length: until the last rank is done. ends: of each phase, when it is over."""

    length: float
    ends: list[float]


def plan(batches: Sequence[float], phases: Sequence[tuple[int, float]], n_ranks: int) -> Plan:
    """batches: what each costs the rank that has it, in the order in which they are claimed. phases: (place, cost) of
    each, ascending: it comes before the batch of that place, takes all ranks, and begins when all earlier batches are
    done."""
    free, due, ends = [0.0] * n_ranks, list(phases), []
    for place, cost in enumerate(batches):
        while due and due[0][0] == place:
            ends.append(max(free) + due.pop(0)[1])
            free = [ends[-1]] * n_ranks
        heapq.heapreplace(free, free[0] + cost)
    return Plan(max(free), ends)
