"""Loaders: token shards to training batches, prefetched, in an order that a small cursor resumes exactly.

Three orders, one `Batch`: packed documents (`DocumentLoader`), shuffled rows (`SequenceLoader`), the plain stream cut
into rows (`StreamLoader`). All read memory-mapped shards, so the ranks of a host share one copy in the page cache.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from niblick.data.errors import DataError
from niblick.data.prefetch import Prefetcher
from niblick.data.shards import check_ids, first_bos, read_shard

Cursor = dict[str, int | str]


@dataclass(frozen=True)
class Batch:
    """One rank's tokens of one micro-step, on the CPU (pinned where the loader was asked to)."""

    ids: Tensor  # int64 (n,)
    targets: Tensor  # int64 (n,): the token that follows each id
    cu_seqlens: Tensor  # int32 (k,): where segments start, then n, repeated up to a multiple of the bucket
    cursor: Cursor  # JSON-able: a loader given it yields what follows this batch; the same on every rank


def document_starts(ids: Tensor | np.ndarray, bos_id: int = 1, max_document: int = 2048, bucket: int = 1) -> Tensor:
    """cu_seqlens int32 of the documents packed in `ids` (n,): 0, every BOS, every `max_document` tokens within a
    document counted from its start here, then n, repeated up to a multiple of `bucket` entries (empty segments; so a
    compiled graph sees few lengths). Attention must not cross these borders (PR #1530)."""
    tokens = np.asarray(ids)
    starts = np.flatnonzero(tokens == bos_id)
    if len(starts) == 0 or starts[0] != 0:
        starts = np.concatenate([[0], starts])
    lengths = np.diff(starts, append=len(tokens))
    pieces = -(-lengths // max_document)
    first_piece = np.cumsum(pieces) - pieces
    within = np.arange(pieces.sum()) - np.repeat(first_piece, pieces)
    return _padded(np.repeat(starts, pieces) + max_document * within, len(tokens), bucket)


def row_starts(n_tokens: int, sequence_length: int, bucket: int = 1) -> Tensor:
    """cu_seqlens int32 of `n_tokens` tokens in rows of `sequence_length`, ended and padded as `document_starts`."""
    return _padded(np.arange(0, n_tokens, sequence_length), n_tokens, bucket)


def _padded(starts: np.ndarray, n_tokens: int, bucket: int) -> Tensor:
    size = -(-(len(starts) + 1) // bucket) * bucket
    out = np.full(size, n_tokens, np.int32)
    out[: len(starts)] = starts
    return torch.from_numpy(out)


class _Loader:
    """What the loaders share: the shards, the checks, the thread, the way a Batch is made. An endless iterator, and a
    context manager that ends the thread.

    rank, world_size: this process's place among R. bucket: see `document_starts`. prefetch: batches computed ahead.
    pin_memory: tensors in page-locked memory, for non-blocking copies. vocab_size: where given, every id read is
    checked against it. cursor: where to go on, from an earlier batch.
    """

    max_seqlen: int  # no segment is longer
    _cursor_keys: frozenset[str]

    def __init__(
        self,
        shards: list[Path] | tuple[Path, ...],
        tokens_per_rank: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        bucket: int = 64,
        prefetch: int = 2,
        pin_memory: bool = False,
        vocab_size: int | None = None,
        cursor: Cursor | None = None,
    ):
        if not shards:
            raise DataError("loader: expected at least one shard, found none")
        if not (0 <= rank < world_size and tokens_per_rank > 0):
            raise DataError(
                f"loader: expected 0 <= rank < world size and tokens, found {rank}, {world_size}, {tokens_per_rank}"
            )
        self.paths = [Path(path) for path in shards]
        self.tokens_per_rank, self.rank, self.world_size = tokens_per_rank, rank, world_size
        self._bucket, self._vocab_size = bucket, vocab_size
        # The thread's current device would be card 0, and pinning there would open a context on it in every rank.
        self._device = torch.cuda.current_device() if pin_memory else None
        self._open()
        if cursor is not None and set(cursor) != self._cursor_keys:
            expected, found = sorted(self._cursor_keys), sorted(cursor)
            raise DataError(f"cursor: expected the keys {expected}, found {found}: was it of another loader?")
        self._batches = Prefetcher(self._run(cursor), prefetch)

    def _open(self) -> None:
        """Checks the shards, once, before the clock starts."""
        raise NotImplementedError

    def _run(self, cursor: Cursor | None) -> Iterator[Batch]:
        """The batches from the cursor on; runs in the prefetch thread."""
        raise NotImplementedError

    def _read(self, path: Path, tokens: np.ndarray, start: int, length: int) -> np.ndarray:
        span = tokens[start : start + length]
        if self._vocab_size is not None:
            check_ids(span, self._vocab_size, path, offset=start)
        return span

    def _starts(self, ids: np.ndarray) -> Tensor:
        """cu_seqlens of a batch."""
        raise NotImplementedError

    def _batch(self, ids: np.ndarray, targets: np.ndarray, cursor: Cursor) -> Batch:
        ids64, targets64 = (torch.from_numpy(x.astype(np.int64)) for x in (ids, targets))
        tensors = [ids64, targets64, self._starts(ids)]
        if self._device is not None:
            torch.cuda.set_device(self._device)
            tensors = [tensor.pin_memory() for tensor in tensors]
        return Batch(*tensors, cursor)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        """Ends the prefetch thread."""
        self._batches.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class DocumentLoader(_Loader):
    """Packed documents (PR #1530 and after), in corpus order whatever the seed.

    A micro-step takes R spans of n + 1 tokens (R ranks, n = tokens_per_rank), rank r the r-th: ids are its first n,
    targets its last n. A shard is entered at its first BOS and left when the R spans no longer fit, so its tail is
    dropped; after the last shard comes the first. Segments are documents, cut every `max_document` tokens.
    DataError for a shard without BOS, and where no shard holds R spans.
    """

    _cursor_keys = frozenset({"shard", "position"})

    def __init__(self, shards, tokens_per_rank: int, *, bos_id: int = 1, max_document: int = 2048, **options):
        self._bos_id, self.max_seqlen = bos_id, max_document
        super().__init__(shards, tokens_per_rank, **options)

    def _open(self) -> None:
        needed, largest = self.world_size * (self.tokens_per_rank + 1), 0
        for path in self.paths:
            tokens = read_shard(path)
            largest = max(largest, len(tokens) - first_bos(tokens, self._bos_id, path))
        if largest < needed:
            raise DataError(
                f"{self.paths[0].parent}: expected a shard with {needed} tokens from its first BOS on"
                f" ({self.world_size} ranks of {self.tokens_per_rank} + 1), found at most {largest}"
            )

    def _run(self, cursor: Cursor | None) -> Iterator[Batch]:
        index, position = 0, None
        if cursor is not None:
            index, position = _index_of(self.paths, cursor["shard"]), cursor["position"]
        span = self.tokens_per_rank + 1
        while True:
            path = self.paths[index]
            tokens = read_shard(path)
            _read_ahead(self.paths[(index + 1) % len(self.paths)])
            if position is None:
                position = first_bos(tokens, self._bos_id, path)
            while position + self.world_size * span <= len(tokens):
                mine = self._read(path, tokens, position + self.rank * span, span)
                position += self.world_size * span
                yield self._batch(mine[:-1], mine[1:], {"shard": path.name, "position": position})
            index, position = (index + 1) % len(self.paths), None

    def _starts(self, ids: np.ndarray) -> Tensor:
        return document_starts(ids, self._bos_id, self.max_seqlen, self._bucket)


class _RowLoader(_Loader):
    """Batches of tokens_per_rank / sequence_length rows; segments are rows, documents are not told apart."""

    def __init__(self, shards, tokens_per_rank: int, *, sequence_length: int = 2048, **options):
        if tokens_per_rank % sequence_length:
            raise DataError(
                f"loader: expected tokens per rank to be a multiple of the {sequence_length}-token row,"
                f" found {tokens_per_rank}"
            )
        self.max_seqlen = sequence_length
        super().__init__(shards, tokens_per_rank, **options)

    def _starts(self, ids: np.ndarray) -> Tensor:
        return row_starts(len(ids), self.max_seqlen, self._bucket)


class SequenceLoader(_RowLoader):
    """Shuffled rows (PR #1394 and after). Rank r owns shards r, r + R, ... and a PCG64 generator seeded with r.

    Each pass cuts every shard into rows of T = sequence_length tokens from a random phase and permutes them; each row
    is drawn from a shard with probability proportional to the rows it has left. When all are used up, a new pass.
    The cursor is the number of rows drawn: resuming draws them again without reading them.
    DataError for fewer shards than ranks, and where a rank's shards hold no row of T + 1 tokens.
    """

    _cursor_keys = frozenset({"rows"})

    def _open(self) -> None:
        if len(self.paths) < self.world_size:
            raise DataError(
                f"{self.paths[0].parent}: expected at least one shard per rank ({self.world_size}),"
                f" found {len(self.paths)}"
            )
        self.paths = self.paths[self.rank :: self.world_size]
        self._counts = [len(read_shard(path)) for path in self.paths]
        if max(self._counts) < self.max_seqlen + 1:
            raise DataError(
                f"{self.paths[0].parent}: expected a shard of at least {self.max_seqlen + 1} tokens"
                f" for rank {self.rank}, found at most {max(self._counts)}"
            )

    def _run(self, cursor: Cursor | None) -> Iterator[Batch]:
        drawn, rows = 0, self._rows()
        if cursor is not None:
            drawn = cursor["rows"]
            deque(islice(rows, drawn), maxlen=0)  # draws them and keeps none
        shards = [read_shard(path) for path in self.paths]
        per_batch = self.tokens_per_rank // self.max_seqlen
        while True:
            chosen = [next(rows) for _ in range(per_batch)]
            spans = [self._read(self.paths[s], shards[s], start, self.max_seqlen + 1) for s, start in chosen]
            drawn += per_batch
            tokens = np.stack(spans)  # (rows, T + 1)
            yield self._batch(tokens[:, :-1].ravel(), tokens[:, 1:].ravel(), {"rows": drawn})

    def _rows(self) -> Iterator[tuple[int, int]]:
        """Endless (shard, first token) pairs."""
        generator = np.random.Generator(np.random.PCG64(self.rank))
        while True:
            starts = [self._permuted(generator, count) for count in self._counts]
            left = np.array([len(s) for s in starts])
            while left.sum() > 0:
                shard = int(generator.choice(len(left), p=left / left.sum()))
                left[shard] -= 1
                yield shard, int(starts[shard][left[shard]])

    def _permuted(self, generator: np.random.Generator, count: int) -> np.ndarray:
        phase = int(generator.integers(min(self.max_seqlen - 1, max(0, count - self.max_seqlen - 1)) + 1))
        return phase + self.max_seqlen * generator.permutation(max(0, count - 1 - phase) // self.max_seqlen)


class StreamLoader(_RowLoader):
    """The plain stream (PR #1423): the shards end to end, and again from the start; per micro-step R spans of n + 1
    tokens, rank r takes the r-th, its first n tokens are the ids, its last n the targets, both cut into rows."""

    _cursor_keys = frozenset({"position"})

    def _open(self) -> None:
        self._counts = [len(read_shard(path)) for path in self.paths]
        if sum(self._counts) == 0:
            raise DataError(f"{self.paths[0].parent}: expected tokens in the shards, found none")

    def _run(self, cursor: Cursor | None) -> Iterator[Batch]:
        shards = [read_shard(path) for path in self.paths]
        ends = np.cumsum(self._counts)
        position = 0 if cursor is None else cursor["position"]
        span = self.tokens_per_rank + 1
        while True:
            mine = self._gather(shards, ends, position + self.rank * span, span)
            position = (position + self.world_size * span) % int(ends[-1])
            yield self._batch(mine[:-1], mine[1:], {"position": position})

    def _gather(self, shards: list[np.ndarray], ends: np.ndarray, position: int, length: int) -> np.ndarray:
        parts = []
        while length > 0:
            position %= int(ends[-1])
            index = int(np.searchsorted(ends, position, side="right"))
            start = position - (int(ends[index]) - len(shards[index]))
            part = self._read(self.paths[index], shards[index], start, length)
            parts.append(part)
            position += len(part)
            length -= len(part)
        return np.concatenate(parts)


def open_loader(
    kind: str, paths: Sequence[Path], n_tokens: int, *, bos_id: int, max_segment: int, **options: object
) -> _Loader:
    """The loader that `data.loader` names: documents, sequences or stream; a context manager over its batches."""
    if kind == "documents":
        return DocumentLoader(paths, n_tokens, bos_id=bos_id, max_document=max_segment, **options)
    rows = {"sequences": SequenceLoader, "stream": StreamLoader}[kind]
    return rows(paths, n_tokens, sequence_length=max_segment, **options)


def _index_of(paths: list[Path], name: int | str) -> int:
    names = [path.name for path in paths]
    if name not in names:
        raise DataError(f"cursor: expected one of {len(names)} shards from {names[0]} on, found {name!r}")
    return names.index(name)


def _read_ahead(path: Path) -> None:
    """Asks the system to read the next shard into its page cache while this one is used."""
    if hasattr(os, "posix_fadvise"):  # Linux; elsewhere its pages are read when they are needed
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
