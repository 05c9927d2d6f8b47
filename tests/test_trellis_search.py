"""Edge cases of kernels/trellis_search.py, and the faults its contract must reject."""

import numpy as np
import pytest
import torch

from niblick.artifact.trellis import POLYNOMIALS, advance
from niblick.artifact.viterbi import viterbi
from niblick.kernels import trellis_search as module
from niblick.kernels.trellis_search import trellis_search, trellis_search_inputs, trellis_search_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAULTS = [  # each makes the Triton code, or what surrounds it, wrong
    ("total = tl.where(state == 0, 0, UNREACHED)", "total = tl.where(state >= 0, 0, UNREACHED)"),  # any start
    ("cost1 = tl.gather(total, before1, axis=0)", "cost1 = tl.gather(total, before0, axis=0)"),
    ("total = tl.minimum(cost0, cost1)", "total = cost0"),
    ("tl.where(cost1 < cost0, 1, 0)", "tl.where(cost1 <= cost0, 1, 0)"),  # the other of two equal ways
    ("distance1 = t - (_nearest_in_coset(t, z0 + 2,", "distance1 = t - (_nearest_in_coset(t, z0 + 1,"),
    ("low = -LARGEST + (coset + LARGEST) % 4", "low = -LARGEST"),  # another coset at the lower end
    ("high = LARGEST - (5 * LARGEST - coset + 4) % 4", "high = LARGEST"),
    ("+ (2 << FRACTION)) >> (FRACTION + 2))\n    low = -L", ") >> (FRACTION + 2))\n    low = -L"),  # rounds down
    ("        t = tl.minimum(tl.maximum(t, -LIMIT), LIMIT)\n", ""),  # far targets weigh more than they should
    ("turn = T - 1 - back", "turn = T - 1 - back + (back == 1)"),
    ("(tl.load(ways_ptr + first + turn) >> place) & 1", "tl.load(ways_ptr + first + turn) & 1"),
    ("tl.where(total == best, state, STATES)", "tl.where(total == best, 0, STATES)"),  # always ends in state 0
    ("before1 = ((state ^ (H0 >> 1) * z0 ^ (H1 >> 1))", "before1 = ((state ^ (H0 >> 1) * z0 ^ H1)"),
    ("place = ((place ^ (H0 >> 1) * parity", "place = ((place ^ H0 * parity"),
    ("first = tl.program_id(0).to(tl.int64) * T", "first = tl.program_id(0).to(tl.int64) * 0"),
    ("return targets.new_empty(targets.shape, dtype=torch.int8)", "return targets.new_empty(targets.shape)"),
]  # fmt: skip


def test_the_code_is_the_containers() -> None:
    assert module.POLYNOMIALS == POLYNOMIALS


@pytest.mark.parametrize("size", [(4, 30, 31, 8), (2, 20, 63, 32), (1, 1, 2, 8)])
def test_every_implementation_gives_the_same_integers(size: tuple[int, ...]) -> None:
    inputs = trellis_search_inputs(size, torch.float32, DEVICE, seed=3)
    z = trellis_search(**inputs)
    assert torch.equal(z, trellis_search_ref(**inputs))
    found = viterbi(inputs["targets"].cpu().numpy().T, inputs["largest"], inputs["states"]).T
    assert np.array_equal(z.cpu().numpy(), found)


@pytest.mark.parametrize("states", [8, 32])
def test_the_path_obeys_the_trellis_and_the_range(states: int) -> None:
    z = trellis_search(**trellis_search_inputs((3, 30, 7, states), torch.float32, DEVICE)).cpu().numpy()
    state = np.zeros(3, np.uint8)
    for integers in z.T:
        assert np.array_equal(integers & 1, state & 1)
        state = advance(state, integers, states)
    assert abs(z).max() <= 7


def test_no_rows_and_no_targets() -> None:
    for shape in ((0, 5), (3, 0)):
        assert trellis_search(torch.zeros(shape, dtype=torch.int32, device=DEVICE)).shape == shape


GOOD = torch.zeros(2, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ((GOOD.long(),), TypeError, "targets must be torch.int32, got torch.int64"),
        (([1],), TypeError, "targets must be a tensor"),
        ((GOOD[0],), ValueError, r"targets must be \(n_rows, T\) with T <= 512, got \(3,\)"),
        ((torch.zeros(1, 513, dtype=torch.int32),), ValueError, r".*T <= 512, got \(1, 513\)"),
        ((GOOD.T,), ValueError, "targets must be contiguous"),
        ((GOOD, 1), ValueError, r"largest must be in \[2, 127\], got 1"),
        ((GOOD, 2.0), TypeError, "largest must be an integer, got 2.0"),
        ((GOOD, 31, 16), ValueError, r"states must be one of \[8, 32\], got 16"),
        ((GOOD, 31, True), TypeError, "states must be an integer, got True"),
    ],
)
def test_what_is_refused(words: tuple, error: type, message: str) -> None:
    with pytest.raises(error, match=f"trellis_search: {message}"):
        trellis_search(*words)
