"""The entropy coder: integer matrices to words of a range coder and back, the same on every machine.

Rows are standardised by their step, columns are not: how widely a column spreads is learned from the rows already
coded, and is the context of the next. In a stack q (n, R, C) the rows r, r + RUN, r + 2 RUN, ... of all matrices are
coded together, for r = 0 .. RUN-1: thousands of symbols, which share the contexts that the rows before them left. For
each symbol

    v = (PRIOR_ROWS v0 + sum of squares so far in the column) / (PRIOR_ROWS + rows so far)
    context = (level of v, in quarters of an octave, plus the level of its row;  the parity that the trellis forces)

and each context has a histogram, which starts as a Gaussian of that level and counts what it has seen; so the shape is
learned too. With a trellis, floor(z / 2) is coded. A row's level is sent beforehand where rows differ in spread (not
with SDClip, which makes them alike).

All is integer arithmetic: the histograms become frequencies that add up to 2^24, which `constriction` takes as they
are (`_model`). Nothing a decoder decides hangs on floating point; the Gaussians are made with `decimal`, whose exp is
correctly rounded everywhere.
"""

import decimal
import struct
from collections.abc import Iterator
from functools import cache

import constriction
import numpy as np

from niblick.artifact.errors import ArtifactError, require
from niblick.artifact.trellis import RUN, advance

PRIOR_ROWS = 24
PRIOR_COUNT = 32
"""What the Gaussian a histogram starts from weighs, in symbols."""
LEVELS_PER_OCTAVE = 4
FIXED = 8
"""Bits behind the point of a mean square; level 0 is 2^-FIXED."""
N_LEVELS = LEVELS_PER_OCTAVE * (FIXED + 18)
MAX_ROW_LEVEL = 32
FREQUENCY_BITS = 24  # constriction's own
HEAD = struct.Struct("<hhHI")  # smallest and largest integer, level of all, bytes of the row levels that follow
MAX_INTEGER = 511

_stream = constriction.stream


def encode_integers(q: np.ndarray, states: int = 0, *, row_levels: bool = True) -> bytes:
    """A stack (n, R, C) of integers, |q| <= MAX_INTEGER, to bytes. states: of the trellis behind them, or 0."""
    if q.size == 0:
        return b""
    q = q.astype(np.int16)
    low, high = int(q.min()), int(q.max())
    overall = _level_of((q.astype(np.int64) ** 2).sum() << FIXED, q.size)
    rows = _row_levels(q, overall) if row_levels else None
    before = b"" if rows is None else encode_integers(rows[None], row_levels=False)
    encoder = _stream.queue.RangeEncoder()
    contexts = _Contexts(q.shape, low, high, overall, rows, states)
    for slab in contexts.slabs():
        symbols = contexts.symbols(q[:, slab]).ravel()[contexts.order].astype(np.int32)
        for model, start, end in contexts.models():
            encoder.encode(symbols[start:end], model)
        contexts.learn(q[:, slab])
    words = encoder.get_compressed().astype("<u4").tobytes()
    return HEAD.pack(low, high, overall, len(before)) + before + words


def decode_integers(
    data: bytes, shape: tuple[int, int, int], states: int = 0, *, row_levels: bool = True
) -> np.ndarray:
    """int16 of the shape given. ArtifactError for bytes that no stack of that shape has."""
    q = np.zeros(shape, np.int16)
    if q.size == 0:
        require(not data, f"expected no bytes for no integers, found {len(data)}")
        return q
    require(len(data) >= HEAD.size, f"expected at least {HEAD.size} bytes, found {len(data)}")
    low, high, overall, before = HEAD.unpack_from(data)
    words = data[HEAD.size + before :]
    require(
        -MAX_INTEGER <= low <= high <= MAX_INTEGER,
        f"expected integers within {-MAX_INTEGER}..{MAX_INTEGER}, found {low}..{high}",
    )
    require(overall < N_LEVELS, f"expected a level below {N_LEVELS}, found {overall}")
    require(before == 0 or row_levels, f"expected no row levels, found {before} bytes of them")
    require(before <= len(data) - HEAD.size, f"expected {before} bytes of row levels, found {len(data) - HEAD.size}")
    require(len(words) % 4 == 0, f"expected whole words of four bytes, found {len(words)} bytes")
    rows = None
    if before:
        rows = decode_integers(data[HEAD.size : HEAD.size + before], (1, *shape[:2]), row_levels=False)[0]
        require(abs(rows).max() <= MAX_ROW_LEVEL, f"expected row levels up to {MAX_ROW_LEVEL}, found others")
    decoder = _stream.queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
    contexts = _Contexts(shape, low, high, overall, rows, states)
    for slab in contexts.slabs():
        symbols = np.empty(contexts.order.size, np.int16)
        found = [_decode(decoder, model, end - start) for model, start, end in contexts.models()]
        symbols[contexts.order] = np.concatenate(found)
        q[:, slab] = contexts.integers(symbols.reshape(q[:, slab].shape))
        contexts.learn(q[:, slab])
    require(decoder.maybe_exhausted(), "expected the integers to use up their stream, found more")
    return q


class _Contexts:
    """What encoder and decoder know alike: the statistics of the columns, the trellis's states, the histograms."""

    def __init__(self, shape, low: int, high: int, overall: int, rows: np.ndarray | None, states: int) -> None:
        n, R, C = shape
        self.shape, self.states, self.rows = shape, states, rows
        self.parts = 2 if states else 1
        self.low, high = (low >> 1, high >> 1) if states else (low, high)
        self.size = max(high - self.low + 1, 2)  # constriction has no alphabet of one
        self.squares = np.zeros((n, C), np.int64)  # 2^FIXED squares
        self.prior = PRIOR_ROWS * int(_thresholds()[overall])
        self.seen = 0
        self.state = np.zeros((n, -(-R // RUN), C), np.uint8)
        self.counts = np.concatenate([_gaussians(self.low, self.size, self.parts, p) for p in range(self.parts)])

    def slabs(self) -> Iterator[slice]:
        """Which rows of every matrix are coded together; this object is then set up for them."""
        R = self.shape[1]
        for row in range(min(RUN, R)):
            slab = slice(row, None, RUN)
            self._group(slab, -(-(R - row) // RUN))
            yield slab

    def _group(self, slab: slice, runs: int) -> None:
        n, _, C = self.shape
        level = _levels((self.squares + self.prior) // (self.seen + PRIOR_ROWS))[:, None, :]
        self.weights = None
        if self.rows is not None:
            self.weights = self.rows[:, slab, None].astype(np.int64)
            level = np.clip(level + self.weights, 0, N_LEVELS - 1)
        context = np.broadcast_to(level, (n, runs, C)).astype(np.uint8)
        if self.states:
            self.state = self.state[:, :runs]
            context = context + N_LEVELS * (self.state & 1)
        self.context = context.ravel()
        self.order = self.context.argsort(kind="stable")
        self.used = np.bincount(self.context, minlength=N_LEVELS * self.parts)

    def models(self) -> Iterator[tuple[object, int, int]]:
        """(model, start, end) of every context in use: what it codes of the symbols in `order`."""
        start = 0
        for context in self.used.nonzero()[0]:
            end = start + int(self.used[context])
            yield _model(self.counts[context]), start, end
            start = end

    def symbols(self, z: np.ndarray) -> np.ndarray:
        """What is coded of integers (n, runs, C): numbers from 0."""
        return (z >> 1 if self.states else z) - self.low

    def integers(self, symbols: np.ndarray) -> np.ndarray:
        """The inverse of `symbols`."""
        return 2 * (symbols + self.low) + (self.state & 1) if self.states else symbols + self.low

    def learn(self, z: np.ndarray) -> None:
        """Count the integers (n, runs, C) that were coded."""
        symbols = self.symbols(z).ravel().astype(np.int64)
        seen = np.bincount(self.context * np.int64(self.size) + symbols, minlength=self.counts.size)
        self.counts += seen.reshape(self.counts.shape) << FIXED
        squares = z.astype(np.int64) ** 2 << FIXED
        if self.weights is not None:  # as if the row were of level 0
            squares = (squares << FIXED) // _thresholds()[self.weights + LEVELS_PER_OCTAVE * FIXED]
        self.squares += squares.sum(1)
        self.seen += z.shape[1]
        if self.states:
            self.state = advance(self.state, z, self.states)


def _model(counts: np.ndarray) -> object:
    """constriction's model with frequencies in proportion to counts (size,), whole numbers that add up to 2^24.

    It is given each frequency less one. Those sum to 2^24 - size, its own scale for what remains after one for every
    symbol; so it scales by exactly 1, and its cumulative sums, in float64, are exact integers.
    """
    free = (1 << FREQUENCY_BITS) - len(counts)
    frequencies = counts * free // counts.sum()
    frequencies[counts.argmax()] += free - frequencies.sum()
    return _stream.model.Categorical(frequencies.astype(np.float64), perfect=False)


def _decode(decoder: object, model: object, count: int) -> np.ndarray:
    try:
        return decoder.decode(model, count)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ArtifactError("expected a stream of the range coder, found other bytes") from error


@cache
def _thresholds() -> np.ndarray:
    """int64 (N_LEVELS,): the least mean square of each level, 2^(level / LEVELS_PER_OCTAVE), rounded down."""
    context = decimal.Context(prec=30)
    exponents = (context.divide(decimal.Decimal(i), LEVELS_PER_OCTAVE) for i in range(N_LEVELS))
    return np.array([int(context.power(2, exponent)) for exponent in exponents], np.int64)


def _levels(mean_squares: np.ndarray) -> np.ndarray:
    return _thresholds().searchsorted(np.maximum(mean_squares, 1), side="right") - 1


def _level_of(total: int, count: int) -> int:
    return int(_levels(np.asarray(total // count)))


@cache
def _gaussians(low: int, size: int, parts: int, parity: int) -> np.ndarray:
    """int64 (N_LEVELS, size): counts of `parts` k + parity to start from, for k = low .. low + size - 1; none is 0."""
    context = decimal.Context(prec=20)
    half_octave = decimal.Decimal("0.5")
    table = np.empty((N_LEVELS, size), np.int64)
    for level in range(N_LEVELS):
        exponent = context.divide(level + half_octave, LEVELS_PER_OCTAVE) - FIXED
        twice = 2 * context.power(2, exponent)
        exponents = (context.divide(-((parts * (low + k) + parity) ** 2), twice) for k in range(size))
        density = np.array([int(context.exp(e).scaleb(9)) if e > -30 else 0 for e in exponents], np.int64)
        table[level] = (PRIOR_COUNT << FIXED) * density // max(int(density.sum()), 1) + 1
    return table


def _row_levels(q: np.ndarray, overall: int) -> np.ndarray | None:
    """int16 (n, R) relative to the level of all, or None where rows differ by less than they would by chance."""
    squares = (q.astype(np.int64) ** 2).sum(-1) << FIXED
    levels = _levels(squares // q.shape[2]) - overall
    if q.shape[0] * q.shape[1] < 2 or q.shape[2] < 64 or levels.std() < 1:
        return None
    return np.clip(levels, -MAX_ROW_LEVEL, MAX_ROW_LEVEL).astype(np.int16)
