"""N-gram hints: what followed this context before, and how surely. Only earlier tokens decide a hint.

One order of 16 (PR #1145 and #2018 of the challenge): the context of a target is the 15 tokens before it, across
document borders. Of the token stream x_0, x_1, ... the targets are x_1, x_2, ...; the first context holds x_1 in place
of x_0, as published. With m_j the multipliers below and all arithmetic modulo 2^64,

    K_p = XOR_j m_j x_{p-15+j}, j = 0 .. 14        Q_p = (1000003 K_p) XOR (m_15 x_p)

and for target p, with G the earlier targets s of the same key, K_s = K_p,

    total = |G|,    c_s = how many targets up to s have Q = Q_s,    best = max over G of c_s, s* the first to reach it

the hint is x_{s*} where best / total, in float32, is at least the threshold. In words: the most frequent successor.

All positions are computed at once. Equal keys are made neighbours by a stable sort, so that a group is a run in order
of time; a running maximum of (group << 32 | c) never carries a count over from the previous group. That this equals
the sequential hash table is because an incumbent changes only when a count exceeds the maximum so far, and a prefix
maximum that keeps its first attainer does the same.
"""

from typing import NamedTuple

import numpy as np

CONTEXT = 15
MULTIPLIERS = (
    36313, 27191, 51647, 81929, 131071, 196613, 262147, 393241,
    524309, 655373, 786433, 917521, 1048583, 1179653, 1310729, 1441801,
)  # fmt: skip
PAIR_MULTIPLIER = 1000003


class Hints(NamedTuple):
    """For each token of a stream, as a target: the hinted token int64 (N,), -1 for none, and its strength (N,)."""

    tokens: np.ndarray
    betas: np.ndarray


def token_hints(tokens: np.ndarray, *, threshold: float = 0.8, beta: float = 2.625) -> Hints:
    """Hints for a stream (N,) of ids below 2^32; betas float32, nats."""
    n = len(tokens)
    hints, betas = np.full(n, -1, np.int64), np.full(n, beta, np.float32)
    if n > CONTEXT:
        best_token, best, total = _predict(*_keys(tokens), tokens[CONTEXT:])
        with np.errstate(divide="ignore", invalid="ignore"):  # no earlier target: 0 / 0, which passes no threshold
            sure = best.astype(np.float32) / total.astype(np.float32) >= np.float32(threshold)
        hints[CONTEXT:][sure] = best_token[sure]
    return Hints(hints, betas)


def _keys(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """K and Q of the targets 15 .. N - 1, uint64 (N - 15,)."""
    history = tokens.astype(np.uint64)
    history[0] = history[1]
    n_targets = len(history) - CONTEXT
    keys = np.zeros(n_targets, np.uint64)
    for j in range(CONTEXT):
        keys ^= np.uint64(MULTIPLIERS[j]) * history[j : j + n_targets]
    return keys, (keys * np.uint64(PAIR_MULTIPLIER)) ^ (history[CONTEXT:] * np.uint64(MULTIPLIERS[CONTEXT]))


def _predict(keys: np.ndarray, pair_keys: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each target, from earlier ones: best token, best count, total; 0 / 0 where the context is new."""
    by_pair, pair_rank, _ = _group(pair_keys)
    counts = np.empty_like(pair_rank)
    counts[by_pair] = pair_rank + 1  # inclusive: the target itself

    order, rank, group = _group(keys)
    running = np.maximum.accumulate((group << 32) | counts[order])
    changed = np.ones(len(running), bool)
    changed[1:] = running[1:] > running[:-1]
    holder = np.maximum.accumulate(np.where(changed, np.arange(len(running)), 0))

    best_token, best, total = (np.zeros(len(keys), np.int64) for _ in range(3))
    known = np.flatnonzero(rank)  # the first of a group knows nothing; the others know the state after the one before
    best_token[order[known]] = targets[order[holder[known - 1]]]
    best[order[known]] = running[known - 1] & 0xFFFFFFFF
    total[order[known]] = rank[known]
    return best_token, best, total


def _group(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stable order by key; in that order each element's rank within its group, and the group's number; int64 (n,)."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    start = np.ones(len(keys), bool)
    start[1:] = ordered[1:] != ordered[:-1]
    index = np.arange(len(keys))
    rank = index - np.maximum.accumulate(np.where(start, index, 0))
    return order, rank, np.cumsum(start)
