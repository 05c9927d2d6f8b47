"""Whether a phased evaluation will fit, as foreseen in its first steps: on one rank and on several."""

from dataclasses import replace

import numpy as np
import pytest
from ranks import one_thread, run_ranks
from test_evaluation_phased import model, small

from niblick.evaluation import clock as clock_module
from niblick.evaluation import phased
from niblick.evaluation.chunk_step import ChunkStep
from niblick.evaluation.clock import Clock, OverBudget
from niblick.evaluation.global_sgd import COST, sgd_cost
from niblick.evaluation.phased import PHASED, phased_score
from niblick.evaluation.phased_plan import plan
from niblick.evaluation.validation import ValidationSet

__all__ = ["one_thread"]

LONG, PHASES = 1e-3, {"phases": 3, "prefix": 30, "documents": 4, "suspicious": 1e9}
"""Seconds that a token of a step takes here, and settings with phases that cost some."""


def test_who_waits_for_whom() -> None:
    assert plan([5, 1, 1], [], 1) == (7, [])
    assert plan([5, 1, 1, 1], [], 2) == (5, [])
    # The second rank waits until the first batch is done; then a phase of 2; then three batches for two ranks.
    assert plan([5, 1, 1, 1, 4], [(2, 2)], 2) == (12, [7])
    assert plan([5, 1, 1], [(1, 2), (1, 3)], 2) == (11, [7, 10])
    assert plan([5], [], 8) == (5, [])


def test_the_cost_of_a_phase() -> None:
    config = replace(PHASED["pr1855"], sgd_chunk=32_768, sgd_row=4096, sgd_epochs=2)
    assert sgd_cost(32_769, config, 1) == 0, "its one chunk is left out"
    assert sgd_cost(3 * 32_768, config, 1) == 5 * (COST * 32_768 + 4096)
    assert sgd_cost(3 * 32_768, config, 3) == 5 * (COST * 3 * 4096 + 4096)


class Slow(Clock):
    """One that does not end by itself."""

    def stop(self) -> str:
        return ""


def documents() -> ValidationSet:
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 25, 60)  # of at most 8 chunks: from there on some are looked at twice
    tokens = np.concatenate([[1, *generator.integers(2, 10, n - 1)] for n in lengths] + [[1]]).astype(np.uint16)
    return ValidationSet(tokens, np.ones(len(tokens), np.int16))


def slow_down(monkeypatch) -> list[float]:
    """A wall clock by which steps take what they are said to cost; nothing else takes any time."""
    wall, step = [0.0], ChunkStep.__call__

    def slow_step(self, chunk, shape):
        wall[0] += LONG * shape.cost
        return step(self, chunk, shape)

    def slow_phase(model, text, config) -> str:
        wall[0] += LONG * sgd_cost(len(text), config, 1)
        return ""

    monkeypatch.setattr(clock_module, "perf_counter", lambda: wall[0])
    monkeypatch.setattr(ChunkStep, "__call__", slow_step)
    monkeypatch.setattr(phased, "sgd_phase", slow_phase)
    return wall


@pytest.mark.parametrize("phases", [0, 3])
@pytest.mark.parametrize("order", ["longest-first", "corpus"])
def test_one_rank_foresees_its_end_within_its_first_batch(phases: int, order: str, monkeypatch) -> None:
    wall, data = slow_down(monkeypatch), documents()
    config = small("pr1855", order=order, sgd_chunk=16, **PHASES | {"phases": phases})
    phased_score(model(), data, config)
    whole, wall[0] = wall[0], 0.0
    assert not phased_score(model(), data, config, clock=Slow(1.01 * whole, "refuse")).partial
    wall[0] = 0.0
    with pytest.raises(OverBudget, match="at the rate found"):
        phased_score(model(), data, config, clock=Slow(0.99 * whole, "refuse"))
    assert wall[0] < 0.1 * whole


def _foreseen(rank: int, factor: float) -> str:
    """Of two ranks, each with a clock of its own, whichever batches it gets."""
    with pytest.MonkeyPatch.context() as patch:
        slow_down(patch)
        config = small("pr1530", documents=4, suspicious=1e9)
        length = LONG * phased._Run(model(), documents(), config, None, None, None, Clock()).plan.length
        return phased_score(model(), documents(), config, clock=Slow(factor * length, "refuse")).partial


def test_several_ranks_together_fit_where_one_would_not() -> None:
    assert run_ranks(_foreseen, 2, 1.01) == ["", ""]
