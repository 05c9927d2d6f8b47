"""The search of the trellis: integers that the trellis allows, with the least sum of squared distances to the targets.

On a GPU it is a kernel (`kernels.trellis_search`), on a CPU the same in numpy, lanes side by side; both in integers, so
that every machine finds the same path: targets are in 1/128 of a step, which adds 2e-5 to the least error there is.

The rate has no part in the search. To minimise (t - z)^2 + lam bits(z) is to shrink a column's targets, by 1 % at the
lam = 0.3 that theory has best: a twentieth of a decibel is gained, and weights come out that much smaller. Those errors
are of one sign and add up through the layers: on a trained `pr1855` at equal weighted error the divergence from the
unquantised model was 7 % larger, at equal bytes 5 % (bench/NOTES.md).
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from niblick.artifact.gptq import Choose
from niblick.artifact.trellis import RUN, next_states
from niblick.kernels.trellis_search import FRACTION, MARGIN, UNREACHED, trellis_search


def along_rows(largest: int, states: int) -> Choose:
    """For `gptq`: the trellis along the rows of a column, in runs of RUN."""

    def choose(targets: Tensor) -> Tensor:
        n, R = targets.shape
        run, far = min(RUN, R), 2.0**20  # beyond any range, and within int32
        fixed = (targets * 2**FRACTION).round().clamp(-far, far).to(torch.int32)
        rows = F.pad(fixed, (0, -R % run)).view(-1, run)
        if rows.is_cuda:
            z = trellis_search(rows, largest, states)
        else:
            z = torch.from_numpy(viterbi(rows.numpy().T, largest, states).T)
        return z.reshape(n, -1)[:, :R].to(targets.dtype)

    return choose


@cache
def _edges(states: int) -> tuple[np.ndarray, np.ndarray]:
    """(2, states) twice: the predecessor of every state for z1 = 0 and 1, and the coset z mod 4 on the way from it."""
    after = next_states(states)
    before = np.array([[np.flatnonzero(after[:, z1] == state)[0] for state in range(states)] for z1 in (0, 1)])
    return before, before % 2 + np.array([[0], [2]])


def viterbi(targets: np.ndarray, largest: int, states: int) -> np.ndarray:
    """int8 (T, lanes): for fixed-point targets int32 (T, lanes), T <= RUN, the best path of every lane from state 0.

    |z| <= largest. The same integers as `kernels.trellis_search`, whose docstring says which of equal paths is taken.
    """
    T, lanes = targets.shape
    limit = (largest + MARGIN) << FRACTION
    targets = targets.clip(-limit, limit)
    before, coset = _edges(states)
    z, cost = _nearest_in_cosets(targets, largest)
    total = np.full((states, lanes), UNREACHED, np.int32)
    total[0] = 0
    second = np.empty((T, states, lanes), bool)
    candidates = np.empty((2, states, lanes), np.int32)
    branches = cost[:, coset]
    for row in range(T):
        total.take(before, axis=0, out=candidates, mode="clip")
        np.add(candidates, branches[row], out=candidates)
        np.less(candidates[1], candidates[0], out=second[row])
        np.minimum(candidates[0], candidates[1], out=total)
    return _trace_back(total.argmin(0), second, z, before, coset)


def _nearest_in_cosets(targets: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """(T, 4, lanes) int32 twice: the nearest z = c mod 4 with |z| <= largest for c = 0..3, and its squared distance.

    For targets beyond the range by at most MARGIN steps: a distance is at most 8, a square 2^20, a run's sum 2^29.
    """
    c = np.arange(4, dtype=np.int32)[:, None]
    targets = targets[:, None]
    z = c + 4 * ((targets - (c << FRACTION) + (2 << FRACTION)) >> FRACTION + 2)
    z = np.clip(z, -largest + (c + largest) % 4, largest - (largest - c) % 4)
    return z, (targets - (z << FRACTION)) ** 2


def _trace_back(
    state: np.ndarray, second: np.ndarray, z: np.ndarray, before: np.ndarray, coset: np.ndarray
) -> np.ndarray:
    T, _, lanes = second.shape
    path, lane = np.empty((T, lanes), np.int8), np.arange(lanes)
    for row in range(T - 1, -1, -1):
        which = second[row, state, lane].astype(np.intp)
        path[row] = z[row, coset[which, state], lane]
        state = before[which, state]
    return path
