"""N-gram hints: what followed this context before, and how surely. Only earlier tokens decide a hint.

A hash table per order n reads the stream once. With m_j the multipliers, the context and the pair at target p are

    K_p = XOR_j m_j x_{p-1-j}, j = 0 .. n-1              Q_p = (1000003 K_p) XOR (m_n x_p)

and for each p in turn, documents running into one another, it is first asked and then told. It keeps how often K came
(total) and which token it takes for the best, with a count; and how often each Q came, p included (c_p):

    new context: best = x_p        x_p counted higher than the best: best = x_p, with the count c_p

A: orders 8, 10, 12, 14, 16; a best token that comes again adds one to its count, a new one starts at 1. The highest
   order that is sure hints, with beta = 2 best / total (PR #1420, #1437 and #1514 of the challenge, token hints only).
B: one order of 15 with the multipliers oldest token first, x_1 in place of x_0, as published; a best token that comes
   again takes the count c_p. beta = 2.625 (PR #1145, #2018, #2140). Confidence in float32, that of A in float64.

Tables here never fill up and counts are not capped at 65,535, as those of A's publication are.

All positions are computed at once, by sorting (K, p): equal keys become neighbours, in order of time. A best token
changes only when a count exceeds the maximum so far, so the state after p is the largest c in the group up to p, and
the first token that reached it: a running maximum of (group << 32 | c), which carries nothing over from the group
before. For A that holds where no two pairs share a Q. Q differs from 1000003 K in the low bits only, so pairs that
share one are near in order of K: chunks cut between such neighbourhoods need to know nothing of each other. A chunk
with fewer distinct Q than pairs is counted by Q, and A's contexts whose counts that changes are replayed one by one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from niblick.model.config import ConfigError, TiltVersion

MULTIPLIERS = (
    36313, 27191, 51647, 81929, 131071, 196613, 262147, 393241,
    524309, 655373, 786433, 917521, 1048583, 1179653, 1310729, 1441801, 1572869,
)  # fmt: skip
PAIR_MULTIPLIER = 1000003
# Below these, key and position fit 63 bits: multipliers have 21. So do, in a chunk, group (21), token and place.
POSITION_BITS, TOKEN_BITS = 26, 16
CHUNK = 1 << 21
"""Sorted positions looked at together, 16 MiB an array; more where pairs that may share a Q lie on both sides."""
ROW = 1024
"""Elements that a running maximum scans in one piece."""


class Hints(NamedTuple):
    """For each token of a stream, as a target: the hinted token int32 (N,), -1 for none, and its strength float32 (N,),
    nats."""

    tokens: np.ndarray
    betas: np.ndarray


class Order(NamedTuple):
    """A table of contexts of `length` tokens. It hints where best / total >= threshold and total >= least_total."""

    length: int
    threshold: float
    least_total: int


class Version(NamedTuple):
    """Orders by rising length: a later one overrides. multipliers: newest token first, and that of the target after the
    last. beta: of a hint, or with `scaled` of a hint that never failed. own_count: the best token is counted alone, not
    by its pair key."""

    orders: tuple[Order, ...]
    multipliers: tuple[int, ...]
    confidence: torch.dtype
    beta: float
    scaled: bool
    own_count: bool
    first_replaced: bool


VERSIONS: dict[TiltVersion, Version] = {
    "A": Version(
        orders=(Order(8, 0.7, 3), Order(10, 0.7, 3), Order(12, 0.6, 2), Order(14, 0.5, 2), Order(16, 0.5, 2)),
        multipliers=MULTIPLIERS,
        confidence=torch.float64,
        beta=2.0,
        scaled=True,
        own_count=True,
        first_replaced=False,
    ),
    "B": Version(
        orders=(Order(15, 0.8, 1),),
        multipliers=(*MULTIPLIERS[14::-1], MULTIPLIERS[15]),
        confidence=torch.float32,
        beta=2.625,
        scaled=False,
        own_count=False,
        first_replaced=True,
    ),
}


class Known(NamedTuple):
    """Targets whose context came before: position, best token and its count, total; int64 (M,)."""

    positions: Tensor
    tokens: Tensor
    counts: Tensor
    totals: Tensor


def token_hints(
    tokens: np.ndarray, version: TiltVersion | Version = "B", *, device: torch.device | str = "cpu"
) -> Hints:
    """Hints for a stream (N,) of ids, computed on `device`; the same bits on any.

    ConfigError for more than 2^26 tokens, ids outside [0, 65536), another shape or dtype, or an unknown version.
    """
    if isinstance(version, str):
        if version not in VERSIONS:
            raise ConfigError(f"hints: expected version {' or '.join(VERSIONS)}, found {version!r}")
        version = VERSIONS[version]
    _check(tokens)
    history = torch.from_numpy(tokens.astype(np.int64)).to(device)
    if version.first_replaced and len(history) > 1:
        history[0] = history[1]
    hints = torch.full(history.shape, -1, dtype=torch.int32, device=device)
    betas = torch.full(history.shape, version.beta, dtype=torch.float32, device=device)
    for order, keys in _keys(history, version):
        for known in _chunks(keys, history, order, version):
            share = known.counts.to(version.confidence) / known.totals.to(version.confidence)
            # torch rounds the threshold to the dtype of the shares.
            sure = (share >= order.threshold) & (known.totals >= order.least_total)
            at = known.positions[sure]
            hints[at] = known.tokens[sure].int()
            if version.scaled:
                betas[at] = (version.beta * share[sure]).float()
    return Hints(hints.cpu().numpy(), betas.cpu().numpy())


def _check(tokens: np.ndarray) -> None:
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ConfigError(f"hints: expected a stream (N,) of integers, found {tokens.dtype} {tokens.shape}")
    if len(tokens) > 1 << POSITION_BITS:
        raise ConfigError(f"hints: expected at most {1 << POSITION_BITS:,} tokens, found {len(tokens):,}")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < 1 << TOKEN_BITS:
        raise ConfigError(f"hints: expected ids in [0, {1 << TOKEN_BITS}), found {tokens.min()} .. {tokens.max()}")


def _keys(history: Tensor, version: Version) -> Iterator[tuple[Order, Tensor]]:
    """For each order with a whole context in the stream: K of all targets, int64 (N,), sound from `length` on."""
    keys, done = torch.zeros_like(history), 0
    for order in version.orders:
        if order.length >= len(history):
            return
        for j in range(done, order.length):
            keys[j + 1 :] ^= history[: -1 - j] * version.multipliers[j]
        done = order.length
        yield order, keys


def _chunks(keys: Tensor, history: Tensor, order: Order, version: Version) -> Iterator[Known]:
    """What the table of one order knows, in chunks by key."""
    places = keys[order.length :] << POSITION_BITS
    places |= torch.arange(order.length, len(keys), device=keys.device)
    places = _sort(places)
    pair = version.multipliers[order.length]
    low_bits = (int(history.max()) * pair).bit_length()
    start = 0
    while start < len(places):
        end = start + CHUNK
        if end < len(places):
            neighbourhood = (int(places[end - 1] >> POSITION_BITS) * PAIR_MULTIPLIER) >> low_bits
            next_key = -(-((neighbourhood + 1) << low_bits) // PAIR_MULTIPLIER)
            # Beyond every key there is none, and the shift might leave 63 bits.
            end = len(places) if next_key >> 37 else int(torch.searchsorted(places, next_key << POSITION_BITS))
        yield _look_up(places[start:end], history, pair, version.own_count)
        start = end


def _look_up(places: Tensor, history: Tensor, pair: int, own_count: bool) -> Known:
    """The table's state at each target that it knows the context of; `places` are all those of their contexts."""
    keys, positions = places >> POSITION_BITS, places & ((1 << POSITION_BITS) - 1)
    targets, starts = history[positions], _starts(keys)
    pair_keys = (keys * PAIR_MULTIPLIER) ^ (targets * pair)
    n_pair_keys = int(_starts(_sort(pair_keys.clone())).sum())
    repeated = (~(starts & starts.roll(-1))).nonzero()[:, 0]  # a context that came once has nothing to tell
    n_single = len(places) - len(repeated)

    at, targets, starts = positions[repeated], targets[repeated], starts[repeated]
    group = starts.cumsum(0) - 1
    counts, n_pairs = _pair_counts(group, targets)
    shared = n_pair_keys != n_pairs + n_single
    own, counts = counts, _pair_key_counts(pair_keys, positions)[repeated] if shared else counts
    best_tokens, best_counts = _best(group, targets, counts)
    if shared and own_count:
        _replay(group, targets, counts, group[own != counts].unique(), best_tokens, best_counts)

    known = (~starts).nonzero()[:, 0]  # these know the state that the one before left
    return Known(at[known], best_tokens[known - 1], best_counts[known - 1], _ranks(starts)[known])


def _best(group: Tensor, targets: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """After each element: the token that first had the largest count of the group so far, and that count."""
    running = _running_max((group << 32) | counts)
    index = torch.arange(len(running), device=running.device)
    holder = _running_max(torch.where(_starts(running), index, 0))
    return targets[holder], running & 0xFFFFFFFF


def _pair_counts(group: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """How often each element's (group, target) came, itself included; and how many there are."""
    index = torch.arange(len(group), device=group.device)
    places = _sort((((group << TOKEN_BITS) | targets) << POSITION_BITS) | index)
    starts = _starts(places >> POSITION_BITS)
    counts = torch.empty_like(group)
    counts[places & ((1 << POSITION_BITS) - 1)] = _ranks(starts) + 1
    return counts, int(starts.sum())


def _pair_key_counts(pair_keys: Tensor, positions: Tensor) -> Tensor:
    """How often each element's pair key came, itself included, whichever pairs it stands for."""
    by_time = positions.argsort()
    order = by_time[pair_keys[by_time].argsort(stable=True)]
    counts = torch.empty_like(order)
    counts[order] = _ranks(_starts(pair_keys[order])) + 1
    return counts


def _replay(
    group: Tensor, targets: Tensor, counts: Tensor, wrong: Tensor, best_tokens: Tensor, best_counts: Tensor
) -> None:
    """Overwrite what is best after each element of the groups `wrong`, with what A's table would hold."""
    rows = torch.isin(group, wrong).nonzero()[:, 0]
    tokens, numbers, last, best, count = [], [], -1, -1, 0
    for g, token, n in zip(*(column[rows].tolist() for column in (group, targets, counts)), strict=True):
        if g != last:
            last, best, count = g, token, 1
        elif token == best:
            count += 1
        elif n > count:
            best, count = token, n
        tokens.append(best)
        numbers.append(count)
    best_tokens[rows] = torch.tensor(tokens, dtype=torch.int64, device=group.device)
    best_counts[rows] = torch.tensor(numbers, dtype=torch.int64, device=group.device)


def _starts(ordered: Tensor) -> Tensor:
    """Where a run of equal values begins, bool (n,)."""
    starts = torch.ones(len(ordered), dtype=torch.bool, device=ordered.device)
    starts[1:] = ordered[1:] != ordered[:-1]
    return starts


def _ranks(starts: Tensor) -> Tensor:
    """Of each element, how many of its run are before it."""
    index = torch.arange(len(starts), device=starts.device)
    return index - _running_max(torch.where(starts, index, 0))


def _running_max(values: Tensor) -> Tensor:
    """Of int64 >= 0, in two levels: torch gives a row that it scans on a GPU to a single block of threads."""
    rows = torch.nn.functional.pad(values, (0, -len(values) % ROW)).view(-1, ROW).cummax(1).values
    rows[1:] = rows[1:].maximum(rows[:-1, -1].cummax(0).values[:, None])
    return rows.view(-1)[: len(values)]


def _sort(values: Tensor) -> Tensor:
    """Ascending; the argument is used up. On the CPU numpy's sort, as torch's also makes the indices: 8 million int64
    take 0.05 s instead of 0.38 s (one core of a server with AVX-512)."""
    if values.device.type != "cpu":
        return values.sort().values
    values.numpy().sort()
    return values
