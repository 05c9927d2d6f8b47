"""Every target is scored exactly once, whatever the sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niblick.evaluation.windows import Window, plain_windows, rows_kept, sliding_windows
from niblick.model.config import ConfigError

SIZES = st.integers(1, 40)


def scored(windows: list[Window]) -> list[int]:
    return [row for window in windows for row in range(window.first_scored, window.end)]


@given(st.integers(0, 300), SIZES)
def test_plain_windows_score_every_row_once_in_order(n_rows, length):
    windows = plain_windows(n_rows, length)
    assert scored(windows) == list(range(n_rows))
    assert all(w.end - w.start <= length and w.first_scored == w.start for w in windows)


@given(st.integers(0, 300), SIZES, SIZES)
def test_sliding_windows_score_every_row_once_in_order(n_rows, length, stride):
    stride = min(stride, length)
    windows = sliding_windows(n_rows, length, stride)
    assert scored(windows) == list(range(n_rows))
    assert [w.start for w in windows] == [stride * i for i in range(len(windows))]
    for window in windows:
        assert window.end - window.start <= length
        # Rows before the first scored one are its context: all that there are, or length - stride.
        assert window.first_scored - window.start == (0 if window.start == 0 else length - stride)


@given(st.integers(0, 300), SIZES)
def test_dropping_the_tail_keeps_whole_windows(n_tokens, length):
    kept = rows_kept(n_tokens, length, "drop")
    assert kept % length == 0 and 0 <= max(0, n_tokens - 1) - kept < length
    assert rows_kept(n_tokens, length, "keep") == max(0, n_tokens - 1)


def test_published_number_of_sliding_windows():
    """633,409 windows of 2048 for the 40,540,160 targets of the plain 8192-piece validation stream."""
    assert len(sliding_windows(40_540_160, 2048, 64)) == 633_409


@pytest.mark.parametrize(("length", "stride"), [(0, 1), (8, 0), (8, 9), (-1, -1)])
def test_sizes_that_would_skip_rows_are_refused(length, stride):
    with pytest.raises(ConfigError, match=f"found {stride if length > 0 else length}"):
        sliding_windows(100, length, stride)
