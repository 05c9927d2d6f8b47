"""Hints equal sequential tables that follow the definitions word by word, bit for bit."""

from itertools import pairwise

import numpy as np
import pytest

from niblick.evaluation import hints as module
from niblick.evaluation.hints import VERSIONS, Hints, token_hints
from niblick.model.config import ConfigError

BOS = 1
M = [
    36313, 27191, 51647, 81929, 131071, 196613, 262147, 393241,
    524309, 655373, 786433, 917521, 1048583, 1179653, 1310729, 1441801, 1572869,
]  # fmt: skip
GATES_OF_A = {8: (0.7, 3), 10: (0.7, 3), 12: (0.6, 2), 14: (0.5, 2), 16: (0.5, 2)}


class SequentialTable:
    """Order of events as published: for each target look up, then update. Dictionaries never fill up."""

    def __init__(self, version: str) -> None:
        self.version, self.total, self.best, self.pairs = version, {}, {}, {}

    def look_up(self, key: int) -> tuple[int, int, int] | None:
        return (*self.best[key], self.total[key]) if key in self.total else None

    def update(self, key: int, pair: int, token: int) -> None:
        self.pairs[pair] = self.pairs.get(pair, 0) + 1
        if key not in self.total:
            self.total[key], self.best[key] = 1, (token, 1 if self.version == "A" else self.pairs[pair])
            return
        self.total[key] += 1
        best, count = self.best[key]
        if self.version == "A" and token == best:
            self.best[key] = (best, count + 1)
        elif self.pairs[pair] > count:
            self.best[key] = (token, self.pairs[pair])


def key_and_pair(multipliers: list[int], context: list[int], last: int, target: int) -> tuple[int, int]:
    key = 0
    for multiplier, token in zip(multipliers, context, strict=True):
        key ^= multiplier * token % 2**64
    return key, (key * module.PAIR_MULTIPLIER % 2**64) ^ (last * target % 2**64)


def sequential_b(tokens: np.ndarray, threshold: float = 0.8) -> Hints:
    table, ring = SequentialTable("B"), [int(token) for token in tokens[1:2]]
    out, betas = np.full(len(tokens), -1, np.int32), np.full(len(tokens), 2.625, np.float32)
    for position in range(1, len(tokens)):
        target = int(tokens[position])
        if len(ring) == 15:
            key, pair = key_and_pair(M[:15], ring, M[15], target)  # oldest first
            seen = table.look_up(key)
            if seen and np.float32(seen[1]) / np.float32(seen[2]) >= np.float32(threshold):
                out[position] = seen[0]
            table.update(key, pair, target)
        ring = [*ring, target][-15:]
    return Hints(out, betas)


def sequential_a(tokens: np.ndarray) -> Hints:
    tables, stream = {n: SequentialTable("A") for n in GATES_OF_A}, tokens.tolist()
    out, betas = np.full(len(tokens), -1, np.int32), np.full(len(tokens), 2, np.float32)
    for p in range(1, len(stream)):
        places = {n: key_and_pair(M[:n], stream[p - n : p][::-1], M[n], stream[p]) for n in GATES_OF_A if p >= n}
        for n in sorted(places, reverse=True):
            seen, (threshold, least) = tables[n].look_up(places[n][0]), GATES_OF_A[n]
            if seen and seen[1] / seen[2] >= threshold and seen[2] >= least:
                out[p], betas[p] = seen[0], 2.0 * (seen[1] / seen[2])
                break
        for n, (key, pair) in places.items():
            tables[n].update(key, pair, stream[p])
    return Hints(out, betas)


SEQUENTIAL = {"A": sequential_a, "B": sequential_b}


def stream(kind: str, n: int = 2500, seed: int = 3) -> np.ndarray:
    """Streams in which contexts recur: few symbols, a passage again and again with changes, or both."""
    generator = np.random.default_rng(seed)
    if kind == "random":
        return generator.integers(0, 8192, n).astype(np.uint16)
    if kind == "constant":
        return np.full(n, 65535, np.uint16)
    if kind == "two symbols":
        return generator.choice(2, n, p=[0.1, 0.9]).astype(np.uint16)
    if kind == "incumbents change":  # one context, its successors in blocks that overtake one another
        successors = np.repeat(np.tile(np.arange(2, 7), n), np.arange(1, 5 * n + 1) // 5 + 1)[: n // 20]
        return np.concatenate([[*range(10, 29), token] for token in successors]).astype(np.uint16)
    passage = generator.integers(0, 8192, 97)
    tokens = np.resize(passage, n)
    changed = generator.random(n) < (0.03 if kind == "passage and symbols" else 0.01)
    tokens[changed] = generator.integers(0, 5 if kind == "passage and symbols" else 8192, changed.sum())
    if kind == "documents":  # of the passage's beginning, many of them of one token or none
        lengths = generator.choice([0, 1, 1, 2, 9, 40], n)
        tokens = np.concatenate([[BOS, *tokens[:length]] for length in lengths])[:n]
    return tokens.astype(np.uint16)


def assert_equal(found: Hints, expected: Hints) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("version", ["A", "B"])
@pytest.mark.parametrize(
    "kind",
    ["random", "constant", "two symbols", "incumbents change", "passage", "passage and symbols", "documents"],
)
def test_equal_to_the_sequential_table(kind, version, monkeypatch):
    tokens = stream(kind)
    expected = SEQUENTIAL[version](tokens)
    assert kind == "random" or (expected.tokens >= 0).sum() > 100, "a stream without hints tests nothing"
    assert_equal(token_hints(tokens, version), expected)
    monkeypatch.setattr(module, "CHUNK", 64)
    monkeypatch.setattr(module, "ROW", 8)
    assert_equal(token_hints(tokens, version), expected)


@pytest.mark.parametrize("threshold", [0.9, 0.5, 0.0])
def test_equal_at_other_thresholds(threshold):
    """Nine in ten are sure at 0.9: both are rounded to float32, which takes 0.9 down."""
    tokens, b = stream("two symbols", seed=4), VERSIONS["B"]
    version = b._replace(orders=(b.orders[0]._replace(threshold=threshold),))
    assert_equal(token_hints(tokens, version), sequential_b(tokens, threshold))


@pytest.mark.parametrize("version", ["A", "B"])
@pytest.mark.parametrize("pair_multiplier", [1, 3, 2**20])
def test_equal_when_many_pairs_share_a_key(pair_multiplier, version, monkeypatch):
    """Then counts of different contexts mix, a new entry may begin above one, and A's best token counts by itself."""
    monkeypatch.setattr(module, "PAIR_MULTIPLIER", pair_multiplier)
    collide(monkeypatch, module.MULTIPLIERS, 16)
    tokens = np.concatenate([stream("two symbols", seed=5), stream("passage and symbols", 1500)]).astype(np.uint16) % 7
    for chunk in (module.CHUNK, 64):
        monkeypatch.setattr(module, "CHUNK", chunk)
        assert_equal(token_hints(tokens, version), SEQUENTIAL[version](tokens))


def collide(monkeypatch, multipliers: tuple[int, ...], modulus: int) -> None:
    """Small multipliers, in the definition and the module: contexts collide, and with a small factor pairs do too."""
    small = [multiplier % modulus + 1 for multiplier in multipliers]
    monkeypatch.setattr("test_evaluation_hints.M", small)
    b = VERSIONS["B"]._replace(multipliers=(*small[14::-1], small[15]))
    monkeypatch.setitem(VERSIONS, "A", VERSIONS["A"]._replace(multipliers=tuple(small)))
    monkeypatch.setitem(VERSIONS, "B", b)


def colliding_pairs(length: int, multipliers: list[int]) -> list[list[int]]:
    """Two contexts with a target each, whose pair keys are equal though their keys differ; multipliers newest first."""
    generator, last = np.random.default_rng(0), multipliers[length]
    contexts = generator.integers(0, 65536, (1 << 16, length))
    keys = np.bitwise_xor.reduce(contexts * np.array(multipliers[:length]), axis=1)
    order = np.argsort(keys)
    bases = keys * 1000003
    ids = np.arange(65536)
    for i, j in pairwise(order):
        difference = int(bases[i] ^ bases[j])
        if difference < 2**36:
            others, remainders = np.divmod(difference ^ (ids * last), last)
            found = ((remainders == 0) & (others < 65536)).nonzero()[0]
            if len(found):
                x = found[0]
                return [[*contexts[i][::-1].tolist(), int(x)], [*contexts[j][::-1].tolist(), int(others[x])]]
    raise AssertionError("no collision found")


@pytest.mark.parametrize(
    ("version", "length", "multipliers"), [("A", 8, M), ("A", 12, M), ("A", 16, M), ("B", 15, [*M[14::-1], M[15]])]
)
def test_equal_where_pair_keys_collide_by_themselves(version, length, multipliers, monkeypatch):
    """With the published multipliers, and even if a chunk is no longer than a neighbourhood of keys."""
    pairs = colliding_pairs(length, multipliers)
    keys = [key_and_pair(multipliers[:length], pair[-2::-1], multipliers[length], pair[-1]) for pair in pairs]
    assert keys[0][0] != keys[1][0] and keys[0][1] == keys[1][1]
    replays = []
    replay = module._replay
    monkeypatch.setattr(module, "_replay", lambda *columns: (replays.append(len(columns[3])), replay(*columns)))
    passages = np.array([*pairs, [*pairs[0][:-1], 7], [*pairs[1][:-1], 7]])
    tokens = passages[np.random.default_rng(1).integers(0, 4, 150)].reshape(-1)
    expected = SEQUENTIAL[version](tokens)
    for chunk in (module.CHUNK, 1):
        monkeypatch.setattr(module, "CHUNK", chunk)
        assert_equal(token_hints(tokens, version), expected)
    assert any(replays) == (version == "A")


@pytest.mark.parametrize("version", ["A", "B"])
def test_a_hint_does_not_depend_on_its_target_or_later_tokens(version):
    tokens = stream("passage", 1000, seed=1)
    before = token_hints(tokens, version)
    for cut in (16, 200, 517, 999):
        changed = tokens.copy()
        changed[cut:] = (changed[cut:] + 1) % 8192
        after = token_hints(changed, version)
        np.testing.assert_array_equal(after.tokens[: cut + 1], before.tokens[: cut + 1])
        np.testing.assert_array_equal(after.betas[: cut + 1], before.betas[: cut + 1])


@pytest.mark.parametrize("version", ["A", "B"])
@pytest.mark.parametrize("n", [0, 1, 2, 8, 9, 15, 16, 17])
def test_short_streams_have_no_hints(n, version):
    hints = token_hints(np.arange(n, dtype=np.uint16), version)
    np.testing.assert_array_equal(hints.tokens, np.full(n, -1))
    assert len(hints.betas) == n


@pytest.mark.parametrize("version", ["A", "B"])
def test_documents_of_one_token(version):
    tokens = np.full(60, BOS, np.uint16)
    assert_equal(token_hints(tokens, version), SEQUENTIAL[version](tokens))


def test_the_stream_is_left_alone():
    tokens = stream("two symbols").astype(np.int64)
    before = tokens.copy()
    for version in VERSIONS:
        token_hints(tokens, version)
    np.testing.assert_array_equal(tokens, before)


@pytest.mark.parametrize(
    ("tokens", "version", "message"),
    [
        (np.zeros(20, np.uint16), "C", "expected version A or B, found 'C'"),
        (np.zeros((2, 20), np.uint16), "B", r"expected a stream \(N,\) of integers, found uint16 \(2, 20\)"),
        (np.zeros(20), "B", r"expected a stream \(N,\) of integers, found float64 \(20,\)"),
        (np.array([3, -1]), "A", r"expected ids in \[0, 65536\), found -1 .. 3"),
        (np.array([3, 65536]), "A", r"expected ids in \[0, 65536\), found 3 .. 65536"),
        (np.broadcast_to(np.uint16(0), 2**26 + 1), "A", "expected at most 67,108,864 tokens, found 67,108,865"),
    ],
)
def test_what_has_no_hints_is_refused(tokens, version, message):
    with pytest.raises(ConfigError, match=message):
        token_hints(tokens, version)


@pytest.mark.gpu
@pytest.mark.parametrize("version", ["A", "B"])
@pytest.mark.parametrize("kind", ["two symbols", "passage and symbols"])
def test_the_same_bits_on_a_gpu(kind, version, monkeypatch):
    tokens = stream(kind, 100_000)
    monkeypatch.setattr(module, "CHUNK", 1 << 12)
    assert_equal(token_hints(tokens, version, device="cuda"), token_hints(tokens, version))
