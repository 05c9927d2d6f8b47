"""Which logit rows are scored in which context. Row i reads token i and predicts token i + 1; T rows score T targets.

Windows come in order and their scored rows follow on one another, so that every target is scored exactly once.
"""

from typing import NamedTuple

from niblick.model.config import ConfigError, Tail


class Window(NamedTuple):
    """Rows start .. end - 1 are computed, rows first_scored .. end - 1 are scored."""

    start: int
    end: int
    first_scored: int


def rows_kept(n_tokens: int, length: int, tail: Tail) -> int:
    """T for a stream of n_tokens: all n_tokens - 1, or with `drop`, the challenge's convention, whole windows only."""
    n_rows = max(0, n_tokens - 1)
    return n_rows if tail == "keep" else n_rows // length * length


def plain_windows(n_rows: int, length: int) -> list[Window]:
    """Consecutive windows of `length` rows, all scored; the last one may be shorter."""
    _require_positive("sequence length", length)
    return [Window(start, min(start + length, n_rows), start) for start in range(0, n_rows, length)]


def sliding_windows(n_rows: int, length: int, stride: int) -> list[Window]:
    """A window starts every `stride` rows; the first scores all its rows, each later one the rows that are new.

    ConfigError unless 1 <= stride <= length. No window is kept for rows that an earlier one has scored.
    """
    _require_positive("sequence length", length)
    _require_positive("stride", stride)
    if stride > length:
        raise ConfigError(f"stride: expected at most the sequence length {length}, found {stride}")
    first = [Window(0, min(length, n_rows), 0)] if n_rows else []
    starts = range(stride, n_rows - length + stride, stride)
    return first + [Window(start, min(start + length, n_rows), start + length - stride) for start in starts]


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}: expected at least 1, found {value}")
