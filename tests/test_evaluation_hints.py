"""Hints equal a sequential table that follows the definition word by word, bit for bit."""

import numpy as np
import pytest

from niblick.evaluation import hints as module
from niblick.evaluation.hints import Hints, token_hints


class SequentialTable:
    """Published order of events: for each target look up, emit, update. Dictionaries never fill up."""

    def __init__(self) -> None:
        self.total, self.best, self.pairs = {}, {}, {}

    def look_up(self, key: int) -> tuple[int, np.float32] | None:
        if key not in self.total:
            return None
        token, count = self.best[key]
        return token, np.float32(count) / np.float32(self.total[key])

    def update(self, key: int, pair: int, token: int) -> None:
        self.pairs[pair] = self.pairs.get(pair, 0) + 1
        if key not in self.total:
            self.total[key], self.best[key] = 1, (token, self.pairs[pair])
            return
        self.total[key] += 1
        if self.pairs[pair] > self.best[key][1]:
            self.best[key] = (token, self.pairs[pair])


def sequential_hints(tokens: np.ndarray, threshold: float, beta: float) -> Hints:
    m = [36313, 27191, 51647, 81929, 131071, 196613, 262147, 393241, 524309, 655373, 786433, 917521, 1048583, 1179653,
         1310729, 1441801]  # fmt: skip
    table, ring = SequentialTable(), [int(tokens[1])]
    out, betas = np.full(len(tokens), -1, np.int64), np.full(len(tokens), beta, np.float32)
    for position in range(1, len(tokens)):
        target = int(tokens[position])
        if len(ring) == 15:
            key = 0
            for multiplier, token in zip(m, ring, strict=False):  # oldest first
                key ^= multiplier * token % 2**64
            pair = (key * 1000003 % 2**64) ^ (m[15] * target % 2**64)
            seen = table.look_up(key)
            if seen and seen[1] >= np.float32(threshold):
                out[position] = seen[0]
            table.update(key, pair, target)
        ring = [*ring, target][-15:]
    return Hints(out, betas)


def stream(kind: str, n: int, seed: int) -> np.ndarray:
    """Streams in which contexts recur: few symbols, a passage again and again with changes, or both."""
    generator = np.random.default_rng(seed)
    if kind == "two symbols":
        return generator.choice(2, n, p=[0.1, 0.9]).astype(np.uint16)
    passage = generator.integers(0, 8192, 97)
    tokens = np.resize(passage, n)
    changed = generator.random(n) < (0.01 if kind == "passage" else 0.03)
    tokens[changed] = generator.integers(0, 8192 if kind == "passage" else 5, changed.sum())
    return tokens.astype(np.uint16)


@pytest.mark.parametrize("kind", ["two symbols", "passage", "passage and symbols"])
@pytest.mark.parametrize("threshold", [0.8, 0.5, 0.0])
def test_equal_to_the_sequential_table(kind, threshold):
    tokens = stream(kind, 4000, seed=3)
    expected = sequential_hints(tokens, threshold, 2.625)
    found = token_hints(tokens, threshold=threshold)
    assert (expected.tokens >= 0).sum() > 100, "a stream without hints tests nothing"
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.betas, expected.betas)


def test_equal_when_pair_keys_collide(monkeypatch):
    """Then counts of different contexts mix, and a new entry may begin above one."""
    keys = module._keys
    monkeypatch.setattr(module, "_keys", lambda tokens: tuple(k & np.uint64(0xFF) for k in keys(tokens)))
    tokens = stream("passage and symbols", 3000, seed=5)
    k, q = keys(tokens)
    table, expected = SequentialTable(), np.full(len(tokens), -1, np.int64)
    for position, key, pair in zip(range(15, len(tokens)), k.tolist(), q.tolist(), strict=True):
        seen = table.look_up(key & 0xFF)
        if seen and seen[1] >= np.float32(0.5):
            expected[position] = seen[0]
        table.update(key & 0xFF, pair & 0xFF, int(tokens[position]))
    assert (expected >= 0).sum() > 100
    np.testing.assert_array_equal(token_hints(tokens, threshold=0.5).tokens, expected)


def test_a_hint_does_not_depend_on_its_target_or_later_tokens():
    tokens = stream("passage", 1000, seed=1)
    before = token_hints(tokens).tokens
    for cut in (16, 200, 517, 999):
        changed = tokens.copy()
        changed[cut:] = (changed[cut:] + 1) % 8192
        np.testing.assert_array_equal(token_hints(changed).tokens[: cut + 1], before[: cut + 1])


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16])
def test_short_streams_have_no_hints(n):
    hints = token_hints(np.arange(n, dtype=np.uint16))
    np.testing.assert_array_equal(hints.tokens, np.full(n, -1))
