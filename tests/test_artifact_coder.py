"""The entropy coder and the trellis: what is coded is decoded, in few bytes, and the same bytes everywhere."""

import hashlib
import itertools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from niblick.artifact import coder
from niblick.artifact.coder import decode_integers, encode_integers
from niblick.artifact.errors import ArtifactError
from niblick.artifact.ledger import entropy_bytes
from niblick.artifact.trellis import RUN, advance, next_states, parities
from niblick.artifact.viterbi import FRACTION, viterbi

RNG = np.random.default_rng(0)


def gaussian(*shape: int, sigma: float = 2.4) -> np.ndarray:
    return np.clip(np.round(RNG.normal(0, sigma, shape)), -31, 31).astype(np.int8)


def searched(targets: np.ndarray, states: int, largest: int = 31) -> np.ndarray:
    """(n, R, C) targets in steps -> the trellis's integers, searched as the quantiser does."""
    n, R, C = targets.shape
    z = np.empty(targets.shape, np.int8)
    for start in range(0, R, RUN):
        fixed = np.round(targets[:, start : start + RUN] * 2**FRACTION).astype(np.int32)
        length = fixed.shape[1]
        lanes = fixed.transpose(1, 0, 2).reshape(length, n * C)
        z[:, start : start + RUN] = viterbi(lanes, largest, states).reshape(length, n, C).transpose(1, 0, 2)
    return z


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (1, 700, 4), (3, 1030, 2), (1, 1, 300), (0, 4, 4), (2, 0, 3)])
@pytest.mark.parametrize("states", [0, 8, 32])
def test_every_shape_comes_back(shape, states):
    targets = RNG.normal(0, 4, shape)
    q = searched(targets, states) if states else np.round(targets).astype(np.int8)
    assert np.array_equal(decode_integers(encode_integers(q, states), shape, states), q)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-511, 511), min_size=1, max_size=120), st.integers(1, 4))
def test_any_integers_come_back(values, width):
    q = np.resize(np.array(values, np.int16), (1, -(-len(values) // width), width))
    assert np.array_equal(decode_integers(encode_integers(q), q.shape), q)


def test_size_is_near_the_entropy_and_below_it_where_columns_differ():
    q = gaussian(4, 256, 256)
    assert len(encode_integers(q)) < 1.003 * entropy_bytes(q)
    q = np.round(RNG.normal(0, 2.4, (4, 256, 256)) * np.exp(RNG.normal(0, 0.3, (4, 1, 256)))).astype(np.int8)
    assert len(encode_integers(q)) < 0.98 * entropy_bytes(q)
    q = np.round(RNG.normal(0, 2.4, (4, 256, 256)) * np.exp(RNG.normal(0, 0.4, (4, 256, 1)))).astype(np.int8)
    assert len(encode_integers(q)) < 0.98 * entropy_bytes(q)
    q = np.round(RNG.standard_t(3, (4, 256, 256)) * 1.5).clip(-120, 120).astype(np.int8)
    assert len(encode_integers(q)) < 1.01 * entropy_bytes(q), "heavy tails are learned"


def test_the_bytes_are_the_same_everywhere():
    """Integers from integers, so that neither a library's random numbers nor its rounding take part."""
    x = np.arange(3 * 600 * 20, dtype=np.uint64)
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = np.unpackbits((x ^ x >> np.uint64(32)).view(np.uint8).reshape(-1, 8), axis=1)
    q = (bits[:, :48].sum(1).astype(np.int16) - 24).reshape(3, 600, 20)
    coded = {0: encode_integers(q), 8: encode_integers(searched(q * 1.25, 8), 8)}
    found = {states: hashlib.sha256(data).hexdigest()[:16] for states, data in coded.items()}
    assert found == GOLDEN


GOLDEN = {0: "7602e1a99f1c4c8d", 8: "21c6013ef8a92c66"}


def test_frequencies_are_whole_numbers_that_the_library_takes_as_they_are():
    """One symbol each, right at the ends of its interval of the 2^24: an encoder off by one would not come back."""
    counts = np.array([1, 3, 1 << 30, 7, 1, 12345], np.int64)
    free = (1 << 24) - len(counts)
    frequencies = counts * free // counts.sum() + 1
    frequencies[2] += (1 << 24) - frequencies.sum()
    ends = frequencies.cumsum()
    for symbol, (first, last) in enumerate(zip(ends - frequencies, ends - 1, strict=True)):
        for quantile in (first, last):  # the range coder's first interval is 2^64 wide: its top 24 bits are a quantile
            word = np.array([int(quantile) << 8, 1 << 31], np.uint32)
            decoder = coder._stream.queue.RangeDecoder(word)
            assert decoder.decode(coder._model(counts), 1)[0] == symbol


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected at least 10 bytes, found 0"),
        (struct.pack("<hhHI", 3, 2, 40, 0), "expected integers within -511..511, found 3..2"),
        (struct.pack("<hhHI", -600, 2, 40, 0), "found -600..2"),
        (struct.pack("<hhHI", -1, 2, 4000, 0), "expected a level below 104, found 4000"),
        (struct.pack("<hhHI", -1, 2, 40, 2**32 - 1), "expected 4294967295 bytes of row levels, found 0"),
        (struct.pack("<hhHI", -1, 2, 40, 0) + b"abc", "expected whole words of four bytes, found 3 bytes"),
        (struct.pack("<hhHI", -1, 2, 40, 0) + bytes(400), "expected the integers to use up their stream, found more"),
        (struct.pack("<hhHI", -1, 2, 40, 10) + struct.pack("<hhHI", -99, 99, 40, 0), "expected row levels up to 32"),
        (struct.pack("<hhHI", -1, 2, 40, 20) + 2 * struct.pack("<hhHI", -9, 9, 40, 10), "expected no row levels"),
    ],
)
def test_what_no_encoder_wrote_is_refused(data, message):
    with pytest.raises(ArtifactError, match=message):
        decode_integers(data, (2, 8, 4))


# ---- the trellis -----------------------------------------------------------------------------------------------------


def test_the_codes_are_ungerboecks():
    assert next_states(8).tolist() == [[0, 2], [5, 7], [1, 3], [4, 6], [2, 0], [7, 5], [3, 1], [6, 4]]
    for states in (8, 32):
        assert sorted(next_states(states).ravel()) == sorted([*range(states)] * 2), "two ways into every state"


@pytest.mark.parametrize("states", [8, 32])
def test_the_search_finds_the_best_path(states):
    """Against all allowed sequences of six integers from -3 to 3."""
    targets = np.round(RNG.normal(0, 2.0, (6, 20)).clip(-6, 6) * 2**FRACTION).astype(np.int32)
    found = viterbi(targets, 3, states).astype(np.int32)
    paths = np.array([path for path in itertools.product(range(-3, 4), repeat=6) if allowed(path, states)])
    cost = ((targets.T[:, None] - (paths << FRACTION)) ** 2).sum(-1)
    assert np.array_equal(((targets - (found << FRACTION)) ** 2).sum(0), cost.min(1))
    assert all(allowed(path, states) for path in found.T)


def allowed(path, states: int) -> bool:
    state = 0
    for z in path:
        if (z ^ state) & 1:
            return False
        state = int(advance(np.array(state), np.array(z), states))
    return True


@pytest.mark.parametrize(("states", "step", "gain"), [(8, 0.5635, 1.0), (32, 0.571, 1.1)])
def test_less_error_at_equal_entropy(states, step, gain):
    """At the steps of `FINER` the error is that of rounding, and the entropy lower by what gain dB are worth."""
    x = RNG.normal(0, 2.4, (1, RUN, 1000))
    z = searched(x / step, states, 127)
    assert (((z * step - x) ** 2).mean() / (1 / 12)) < 1.03
    odd = parities(z, states)
    assert np.array_equal(odd, z % 2 == 1)
    entropy = sum(entropy_bytes(z[odd == parity]) for parity in (False, True))
    assert 8 * (entropy_bytes(np.round(x).astype(np.int8)) - entropy) / x.size > gain / 6.02


def test_targets_beyond_the_range_are_clipped_along_the_trellis():
    z = searched(np.full((1, 50, 3), 30.0), 8, largest=7)
    assert abs(z).max() <= 7 and np.array_equal(parities(z, 8), z % 2 == 1)
