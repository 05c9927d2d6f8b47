"""The three loaders: what they read, in which order, and that any cursor resumes them exactly."""

import json
import threading
import time
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from niblick.data import loaders, shards
from niblick.data.errors import DataError
from niblick.data.prefetch import Prefetcher

one_line = r"[^\n]*\Z"
BOS = 1


def write(folder, *streams):
    paths = []
    for index, tokens in enumerate(streams):
        paths.append(folder / f"x_train_{index:06d}.bin")
        shards.write_shard(paths[-1], np.asarray(tokens, np.int64))
    return paths


def numbered(length, start=10, every=7):
    """Distinct ids, so that a position is read off its token, with a BOS at every 7th."""
    tokens = np.arange(start, start + length)
    tokens[::every] = BOS
    return tokens


def take(loader, count):
    with loader:
        return list(islice(loader, count))


def same(a, b):
    tensors = all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("ids", "targets", "cu_seqlens"))
    return tensors and a.cursor == b.cursor


# --- segments ---


def segments_by_hand(ids, max_document):
    starts, begin = [], 0
    for i, token in enumerate(ids):
        if i == 0 or token == BOS:
            begin = i
        if (i - begin) % max_document == 0:
            starts.append(i)
    return [*starts, len(ids)]


@given(st.lists(st.sampled_from([BOS, 5, 6, 7]), min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 16))
@settings(max_examples=200, deadline=None)
def test_document_starts(ids, max_document, bucket):
    expected = segments_by_hand(ids, max_document)
    for given_ids in (np.array(ids, np.uint16), torch.tensor(ids)):
        cu_seqlens = loaders.document_starts(given_ids, BOS, max_document, bucket)
        assert cu_seqlens.dtype == torch.int32 and len(cu_seqlens) % bucket == 0
        assert cu_seqlens[: len(expected)].tolist() == expected
        assert len(cu_seqlens) - len(expected) < bucket and (cu_seqlens[len(expected) :] == len(ids)).all()


def test_row_starts():
    assert loaders.row_starts(12, 4).tolist() == [0, 4, 8, 12]
    assert loaders.row_starts(12, 4, bucket=3).tolist() == [0, 4, 8, 12, 12, 12]


# --- packed documents ---


def packed_by_hand(streams, n, world_size, micro_steps):
    """(rank, ids, targets) of every batch in order, straight from the rule."""
    out, index = [], 0
    while len(out) < micro_steps * world_size:
        tokens = streams[index % len(streams)]
        at = int(np.flatnonzero(tokens == BOS)[0])
        while at + world_size * (n + 1) <= len(tokens):
            for rank in range(world_size):
                span = tokens[at + rank * (n + 1) : at + (rank + 1) * (n + 1)].tolist()
                out.append((rank, span[:-1], span[1:]))
            at += world_size * (n + 1)
        index += 1
    return out[: micro_steps * world_size]


@given(
    lengths=st.lists(st.integers(30, 120), min_size=1, max_size=3),
    lead=st.integers(0, 5),
    n=st.integers(1, 12),
    world_size=st.integers(1, 2),
)
@settings(max_examples=40, deadline=None)
def test_packing_reads_what_the_rule_says(tmp_path_factory, lengths, lead, n, world_size):
    streams = [np.concatenate([np.full(lead, 2), numbered(length)]) for length in lengths]
    paths = write(tmp_path_factory.mktemp("packed"), *streams)
    ranks = [
        take(loaders.DocumentLoader(paths, n, rank=r, world_size=world_size, max_document=4, prefetch=r), 12)
        for r in range(world_size)
    ]
    expected = packed_by_hand(streams, n, world_size, 12)
    for step, batches in enumerate(zip(*ranks, strict=True)):
        assert [b.cursor for b in batches] == [batches[0].cursor] * world_size
        for rank, batch in enumerate(batches):
            assert (rank, batch.ids.tolist(), batch.targets.tolist()) == expected[step * world_size + rank]
            assert batch.ids.dtype == batch.targets.dtype == torch.int64
            assert torch.equal(batch.cu_seqlens, loaders.document_starts(batch.ids, BOS, 4, 64))


def test_packing_consumes_each_shard_once_in_order_and_drops_the_tail(tmp_path):
    paths = write(tmp_path, numbered(50, 100, 1000), numbered(9, 200, 1000), numbered(45, 300, 1000))
    streams = [shards.read_shard(path).tolist() for path in paths]
    loader = loaders.DocumentLoader(paths, 9)
    spans = [[*b.ids.tolist(), int(b.targets[-1])] for b in take(loader, 10)]
    assert [*chain(*spans[:5])] == streams[0]
    assert [*chain(*spans[5:9])] == streams[2][:40]  # the second shard is too short for a span: all of it is tail
    assert spans[9] == spans[0]


def loader_kinds(paths, cursor=None, prefetch=2):
    options = {"cursor": cursor, "prefetch": prefetch}
    return {
        "document": lambda: loaders.DocumentLoader(paths, 8, **options),
        "sequence": lambda: loaders.SequenceLoader(paths, 8, sequence_length=4, **options),
        "stream": lambda: loaders.StreamLoader(paths, 8, sequence_length=4, **options),
    }


@pytest.mark.parametrize("kind", ["document", "sequence", "stream"])
def test_any_cursor_resumes_exactly_and_prefetch_changes_nothing(tmp_path, kind):
    paths = write(tmp_path, numbered(60), numbered(41, 100), numbered(77, 300))
    whole = take(loader_kinds(paths, prefetch=0)[kind](), 60)  # several passes
    for depth in (1, 3):
        assert all(map(same, whole, take(loader_kinds(paths, prefetch=depth)[kind](), 60)))
    for at in (0, 5, 7, 19, 20, 21, 44):
        cursor = json.loads(json.dumps(whole[at].cursor))
        resumed = take(loader_kinds(paths, cursor)[kind](), 60 - at - 1)
        assert all(map(same, whole[at + 1 :], resumed)), at
    assert not all(map(same, whole, whole[1:]))


@pytest.mark.parametrize("kind", ["document", "sequence", "stream"])
def test_foreign_cursor(tmp_path, kind):
    paths = write(tmp_path, numbered(60))
    with pytest.raises(DataError, match=rf"cursor: expected the keys \[.*\], found \['x'\]{one_line}"):
        loader_kinds(paths, {"x": 1})[kind]()


def test_cursor_of_a_shard_that_is_not_there(tmp_path):
    paths = write(tmp_path, numbered(60))
    cursor = {"shard": "y.bin", "position": 3}
    with pytest.raises(DataError, match=rf"cursor: expected one of 1 shards .*found 'y.bin'{one_line}"):
        take(loaders.DocumentLoader(paths, 8, cursor=cursor), 1)


def test_packing_refuses(tmp_path):
    paths = write(tmp_path, numbered(61), np.full(60, 5))
    with pytest.raises(DataError, match=rf"x_train_000001.bin: expected a document start \(BOS, id 1\){one_line}"):
        loaders.DocumentLoader(paths, 8)
    message = rf"expected a shard with 62 tokens .*\(2 ranks of 30 \+ 1\), found at most 61{one_line}"
    with pytest.raises(DataError, match=message):
        loaders.DocumentLoader(paths[:1], 30, world_size=2)
    assert len(take(loaders.DocumentLoader(paths[:1], 29, world_size=2), 2)) == 2
    with pytest.raises(DataError, match="expected at least one shard"):
        loaders.DocumentLoader([], 8)
    with pytest.raises(DataError, match="expected 0 <= rank < world size"):
        loaders.DocumentLoader(paths[:1], 8, rank=1)


# --- rows ---


@pytest.mark.parametrize("kind", ["document", "sequence", "stream"])
def test_id_beyond_the_vocabulary_is_named_where_it_lies(tmp_path, kind):
    paths = write(tmp_path, [BOS, *range(2, 32), 90, *range(33, 60)])
    cls = {
        "document": loaders.DocumentLoader,
        "sequence": loaders.SequenceLoader,
        "stream": loaders.StreamLoader,
    }[kind]
    options = {} if kind == "document" else {"sequence_length": 4}
    message = rf"x_train_000000.bin: token 31: expected an id below the vocabulary size 60, found 90{one_line}"
    with pytest.raises(DataError, match=message):
        take(cls(paths, 8, vocab_size=60, **options), 10)
    assert len(take(cls(paths, 8, vocab_size=91, **options), 10)) == 10


def rows_of(batches, length):
    ids = torch.cat([b.ids for b in batches]).view(-1, length)
    targets = torch.cat([b.targets for b in batches]).view(-1, length)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    return torch.cat([ids, targets[:, -1:]], dim=1)


def test_shuffled_rows_cover_each_shard_once_a_pass(tmp_path):
    length, per_shard = 5, 11
    # (per_shard + 1) rows of tokens hold per_shard rows and their targets, whatever the phase.
    paths = write(tmp_path, *[100 * k + np.arange((per_shard + 1) * length) for k in range(4)])
    orders = []
    for rank in range(2):
        loader = loaders.SequenceLoader(paths, length, sequence_length=length, rank=rank, world_size=2)
        rows = rows_of(take(loader, 4 * per_shard), length)
        assert ((rows[:, 1:] - rows[:, :-1]) == 1).all()  # T + 1 neighbours each
        for firsts in rows[:, 0].view(2, -1).tolist():  # two passes over two shards
            for shard in (rank, rank + 2):
                own = sorted(first - 100 * shard for first in firsts if first // 100 == shard)
                assert own[0] < length and own == list(range(own[0], own[0] + length * per_shard, length))
            orders.append(firsts)
    assert all(order != sorted(order) for order in orders)
    assert orders[0] != orders[1]


def test_shuffled_rows_draw_as_the_records_do(tmp_path):
    """The draws of PR #1394, spelled out once for a rank: phases and permutations first, then weighted choices."""
    length, counts = 4, [30, 50]
    paths = write(tmp_path, *[np.arange(100 * k, 100 * k + c) for k, c in enumerate([9, counts[0], 9, counts[1]])])
    rng = np.random.Generator(np.random.PCG64(1))
    left = []
    for count in counts:
        phase = int(rng.integers(min(length - 1, count - length - 1) + 1))
        order = rng.permutation((count - 1 - phase) // length)
        left.append([phase + length * int(k) for k in order])
    expected = []
    for _ in range(10):
        sizes = np.array([len(starts) for starts in left])
        shard = int(rng.choice(2, p=sizes / sizes.sum()))
        expected.append(100 * (2 * shard + 1) + left[shard].pop())
    loader = loaders.SequenceLoader(paths, 2 * length, sequence_length=length, rank=1, world_size=2)
    batches = take(loader, 5)
    assert rows_of(batches, length)[:, 0].tolist() == expected
    assert batches[0].cu_seqlens.tolist() == [0, 4] + [8] * 62


def test_rows_refuse(tmp_path):
    paths = write(tmp_path, numbered(60), numbered(4), [])
    with pytest.raises(DataError, match=rf"expected at least one shard per rank \(4\), found 3{one_line}"):
        loaders.SequenceLoader(paths, 8, sequence_length=4, world_size=4)
    with pytest.raises(DataError, match=rf"a shard of at least 5 tokens for rank 1, found at most 4{one_line}"):
        loaders.SequenceLoader(paths, 8, sequence_length=4, rank=1, world_size=3)
    with pytest.raises(DataError, match=rf"a multiple of the 4-token row, found 10{one_line}"):
        loaders.StreamLoader(paths, 10, sequence_length=4)
    with pytest.raises(DataError, match="expected tokens in the shards, found none"):
        loaders.StreamLoader(paths[2:], 8, sequence_length=4)


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4), world_size=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_stream_crosses_shards(tmp_path_factory, lengths, world_size):
    lengths[0] += 1
    paths = write(tmp_path_factory.mktemp("stream"), *[numbered(n, 100 * k) for k, n in enumerate(lengths)])
    stream = np.concatenate([shards.read_shard(path) for path in paths])
    ranks = [
        take(loaders.StreamLoader(paths, 8, sequence_length=4, rank=r, world_size=world_size, prefetch=0), 6)
        for r in range(world_size)
    ]
    spans = [torch.cat([b.ids, b.targets[-1:]]) for step in zip(*ranks, strict=True) for b in step]
    assert torch.cat(spans).tolist() == np.resize(stream, 6 * 9 * world_size).tolist()
    assert torch.equal(ranks[0][0].targets[:-1], ranks[0][0].ids[1:])
    assert ranks[0][0].cu_seqlens.tolist() == [0, 4] + [8] * 62


# --- the thread ---


def threads():
    return [t for t in threading.enumerate() if t.name == "niblick-prefetch"]


def test_close_ends_the_thread(tmp_path):
    paths = write(tmp_path, numbered(60))
    assert not threads()
    loader = loaders.DocumentLoader(paths, 8)
    next(loader)
    assert len(threads()) == 1
    loader.close()
    loader.close()
    assert not threads() and list(loader) == []


def test_prefetch_runs_ahead_by_its_depth_and_no_further():
    computed = []
    reached = threading.Event()

    def items():
        for i in range(100):
            computed.append(i)
            if i == 3:  # the third is being put into a full queue of two before this one is asked for
                reached.set()
            yield i

    ahead = Prefetcher(items(), 2)
    assert next(ahead) == 0 and reached.wait(5)
    time.sleep(0.05)  # long enough for a thread that does not wait
    assert computed == [0, 1, 2, 3]
    ahead.close()


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_exceptions_come_at_their_place(depth):
    def items():
        yield 1
        yield 2
        raise DataError("third")

    ahead = Prefetcher(items(), depth)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(DataError, match="third"):
        next(ahead)
    assert list(ahead) == [] and list(Prefetcher(iter("ab"), depth)) == ["a", "b"]
