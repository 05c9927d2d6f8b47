"""Token shards: a header of 256 little-endian int32 (20240520, version, token count, zeros), then the token ids.

Version 1 is the challenge's (and modded-nanogpt's) format: uint16 ids, so a vocabulary of at most 65,536. Version 2 is
our extension for larger vocabularies (up to 131,072 in practice): the same header, uint32 ids. The count is an int32,
so a shard holds fewer than 2^31 tokens. The file's size must equal the header plus the ids exactly.
"""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from niblick.data.errors import DataError
from niblick.data.files import write_atomically

MAGIC = 20240520
HEADER_BYTES = 1024
DTYPES = {1: np.dtype("<u2"), 2: np.dtype("<u4")}
MAX_TOKENS = 2**31 - 1
NOTE_BYTES = HEADER_BYTES - 12
BLOCK = 1 << 24  # tokens looked at in one go: bounds the memory of whole-shard scans


def write_shard(path: str | Path, tokens: np.ndarray, note: bytes = b"") -> None:
    """Writes 1-D integer `tokens` as uint16 (version 1) where they fit, else as uint32 (version 2).

    note: at most NOTE_BYTES, which stand in the header in the place of its first zeros.
    DataError for negative ids, ids of 2^32 and more, and 2^31 tokens or more: cut longer streams into several shards.
    """
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise DataError(f"{path}: expected a 1-D integer array of tokens, found {tokens.ndim}-D {tokens.dtype}")
    if len(tokens) > MAX_TOKENS:
        raise DataError(f"{path}: a shard holds at most {MAX_TOKENS} tokens (int32 count), found {len(tokens)}")
    low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    if low < 0 or high >= 2**32:
        raise DataError(f"{path}: expected ids in [0, 2^32), found {low if low < 0 else high}")
    version = 1 if high < 2**16 else 2
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = MAGIC, version, len(tokens)
    header.view("u1")[12 : 12 + len(note)] = np.frombuffer(note, "u1")

    def write(file):
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, DTYPES[version]).data)

    write_atomically(path, write)


def read_header(path: str | Path) -> tuple[int, int]:
    """(version, token count) of a shard, checked against the file's size; DataError names path, expected and found."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), "u1")
    except OSError as error:
        raise DataError(f"{path}: cannot read the shard: {error.strerror}") from error
    if len(header) < HEADER_BYTES:
        raise DataError(f"{path}: truncated shard: expected a header of {HEADER_BYTES} bytes, found {size} bytes")
    magic, version, count = (int(x) for x in header.view("<i4")[:3])
    if magic != MAGIC:
        raise DataError(f"{path}: not a token shard: expected magic {MAGIC}, found {magic}")
    if version not in DTYPES:
        raise DataError(f"{path}: expected shard version {' or '.join(map(str, DTYPES))}, found {version}")
    if count < 0:
        raise DataError(f"{path}: expected a token count in [0, 2^31), found {count}")
    expected = HEADER_BYTES + DTYPES[version].itemsize * count
    if size != expected:
        raise DataError(f"{path}: expected {expected} bytes for the header's {count} tokens, found {size} bytes")
    return version, count


def read_note(path: str | Path, size: int) -> bytes:
    """The `size` bytes that follow the count in a shard's header: zeros where it holds no note."""
    with open(path, "rb") as file:
        return file.read(12 + size)[12:]


def read_shard(path: str | Path) -> np.ndarray:
    """The shard's tokens, uint16 or uint32 (count,), memory-mapped read-only. DataError as `read_header`."""
    version, count = read_header(path)
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, DTYPES[version])
    return np.memmap(path, DTYPES[version], mode="r", offset=HEADER_BYTES, shape=(count,))


def find_shards(where: str | Path, split: str) -> list[Path]:
    """Token shards sorted by name: the files `*_{split}_*.bin` of a folder, or those that a glob pattern matches.

    Names containing `_bytes_` are left out: they are per-token byte counts kept beside the tokens, and the usual
    globs match them too. DataError where nothing is left.
    """
    folder = Path(where)
    wanted = f"*_{split}_*.bin"
    found = folder.glob(wanted) if folder.is_dir() else map(Path, glob.glob(str(where)))
    shards = sorted((p for p in found if "_bytes_" not in p.name), key=lambda p: p.name)
    if not shards:
        expected = f"files {wanted}" if folder.is_dir() else "a folder or a pattern that matches shards"
        raise DataError(f"{where}: no {split} shards: expected {expected}, found none")
    return shards


def check_ids(tokens: np.ndarray, vocab_size: int, path: str | Path, offset: int = 0) -> None:
    """DataError naming the first of `tokens` not below `vocab_size`; `offset` is the index of tokens[0] in `path`."""
    for start in range(0, len(tokens), BLOCK):
        block = tokens[start : start + BLOCK]
        if block.max() >= vocab_size:
            index = int(np.argmax(block >= vocab_size))
            where = f"{path}: token {offset + start + index}"
            raise DataError(f"{where}: expected an id below the vocabulary size {vocab_size}, found {block[index]}")


def first_bos(tokens: np.ndarray, bos_id: int, path: str | Path) -> int:
    """Index of the first `bos_id`; DataError for a shard without one."""
    for start in range(0, len(tokens), BLOCK // 64):  # usually within the first document: small blocks
        hits = np.flatnonzero(tokens[start : start + BLOCK // 64] == bos_id)
        if len(hits):
            return start + int(hits[0])
    raise DataError(f"{path}: expected a document start (BOS, id {bos_id}), found none in {len(tokens)} tokens")


def first_tokens(paths: Iterable[str | Path], vocab_size: int, most: int) -> Iterator[np.ndarray]:
    """The first `most` tokens of the shards, end to end, in pieces. DataError for an id beyond the vocabulary."""
    for path in paths:
        tokens = read_shard(path)[: max(0, most)]
        most -= len(tokens)
        for start in range(0, len(tokens), BLOCK):
            check_ids(tokens[start : start + BLOCK], vocab_size, path, offset=start)
            yield tokens[start : start + BLOCK]


def count_tokens(paths: Iterable[str | Path], vocab_size: int, most: int) -> np.ndarray:
    """How often each id occurs in the first `most` tokens of the shards: int64 (vocab_size,).

    An id beyond the vocabulary counts for none: refusing it is the reader's part (`check_ids`).
    """
    counts = np.zeros(vocab_size, np.int64)
    for path in paths:
        tokens = read_shard(path)[: max(0, most)]
        most -= len(tokens)
        for start in range(0, len(tokens), BLOCK):
            counts += np.bincount(tokens[start : start + BLOCK], minlength=vocab_size)[:vocab_size]
    return counts
