"""Text to tokens: a tokenizer trained on the training documents, and token shards of both sides, in one folder.

The folder's `manifest.json`, written last, holds a fingerprint of everything that decides the contents: where it
matches, nothing is done again. The token stream is held in memory; for corpora beyond it, use ready shards.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from niblick.data import corpus, shards, sidecar
from niblick.data import tokenizer as tokenizers
from niblick.data.errors import DataError
from niblick.data.files import write_atomically
from niblick.data.tokenizer import BOS

FORMAT = 1  # of the folder; a higher number makes older folders be prepared anew
MANIFEST, MODEL = "manifest.json", "tokenizer.model"
ORDERS = ("name", "compressible_first", "compressible_last")


@dataclass(frozen=True)
class Prepared:
    """Data ready for a run: the tokenizer, and the token shards of both sides."""

    tokenizer: Path
    train: tuple[Path, ...]  # in the order in which to read them
    val: tuple[Path, ...]
    vocab_size: int
    train_tokens: int
    val_tokens: int


@dataclass(frozen=True)
class _Settings:
    vocab_size: int
    shard_tokens: int
    held_out: float
    max_val_tokens: int | None
    caseops: bool


@dataclass(frozen=True)
class _Stream:
    """One side: tokens (n,), and of CaseOps validation text the bytes of each, (n,)."""

    tokens: np.ndarray
    counts: np.ndarray | None


class DataSettings(Protocol):
    """What decides a run's data; the model's DataConfig has it."""

    source: str
    tokenizer: str
    caseops: bool
    order: str
    held_out: float
    max_val_tokens: int
    shard_tokens: int
    cache: str


def prepare_cached(data: DataSettings, vocab_size: int) -> Prepared:
    """`prepare` into the folder of `data.cache` that belongs to these settings: one for training and for the bench."""
    settings = (data.source, data.tokenizer, data.held_out, data.shard_tokens, data.max_val_tokens, data.caseops)
    key = hashlib.sha256(repr((*settings, vocab_size)).encode()).hexdigest()[:8]
    return prepare(
        data.source,
        Path(data.cache) / f"{Path(data.source).name.split('.')[0]}-{key}",
        vocab_size=vocab_size,
        tokenizer=data.tokenizer or None,
        shard_tokens=data.shard_tokens,
        held_out=data.held_out,
        order=data.order,
        max_val_tokens=data.max_val_tokens or None,
        caseops=data.caseops,
    )


def prepare(
    source: str | Path,
    out_dir: str | Path,
    *,
    vocab_size: int,
    tokenizer: str | Path | None = None,
    shard_tokens: int = 10_000_000,
    held_out: float = 0.05,
    max_val_tokens: int | None = None,
    order: str = "name",
    caseops: bool = False,
) -> Prepared:
    """Turns a source into tokenizer and shards in `out_dir`, or finds them there.

    source: "stdlib", a folder of text files, a JSON-lines file (`corpus.documents`), or a folder of ready shards, which
    is used as it lies (`ready`). tokenizer: a SentencePiece model to use instead of training one. held_out: the
    fraction of documents that go to validation, by the hash of their names; max_val_tokens cuts that stream. Documents
    are shuffled by the hash of their names, each starts with BOS, and shards are cut every `shard_tokens` tokens
    wherever that falls (see `_cut`). order: see `order_shards`. caseops: the tokenizer is one with case operators
    (`niblick.data.caseops`), and byte counts lie beside the validation shards. A tokenizer that is given, or found with
    ready shards, decides that by itself.

    DataError for no text, no training or held-out document, a tokenizer of another size than `vocab_size`, and with
    `caseops` a plain one; the folder then keeps what it held. With several ranks, call it on one while the others wait.
    """
    _check_order(order)
    if Path(source).is_dir() and any(Path(source).glob("*_train_*.bin")):
        return ready(source, tokenizer, vocab_size=vocab_size, order=order, caseops=caseops)
    corpus.documents(source)  # refuses what is no source, before anything is touched
    out = Path(out_dir)
    settings = _Settings(vocab_size, shard_tokens, held_out, max_val_tokens, caseops)
    if not (
        vocab_size > 0 and shard_tokens > 0 and 0 < held_out < 1 and (max_val_tokens is None or max_val_tokens > 1)
    ):
        raise DataError(f"prepare: expected positive sizes and a held-out fraction in (0, 1), found {settings}")
    fingerprint = _fingerprint(source, tokenizer, settings)
    with _alone_in(out):
        if not _matches(out, fingerprint):
            _build(source, out, tokenizer, settings)
            manifest = {"fingerprint": fingerprint, "source": str(source), **asdict(settings), "files": _sizes(out)}
            write_atomically(out / MANIFEST, lambda file: file.write(json.dumps(manifest, indent=1).encode()))
    return ready(out, out / MODEL, vocab_size=vocab_size, order=order, caseops=caseops)


def ready(
    folder: str | Path,
    tokenizer: str | Path | None = None,
    *,
    vocab_size: int | None = None,
    order: str = "name",
    caseops: bool = False,
) -> Prepared:
    """Uses a folder of shards (`*_train_*.bin`, `*_val_*.bin`) as it lies; without `tokenizer`, its one `*.model`.

    Every shard's header and first BOS are checked, and the validation ids and their byte counts where they have some
    or, under CaseOps, must; training ids are checked as they are read.
    """
    _check_order(order)
    model = Path(tokenizer) if tokenizer else tokenizers.find(folder)
    processor = _load(model, vocab_size, caseops)
    vocab_size = processor.vocab_size()
    train, val = shards.find_shards(folder, "train"), shards.find_shards(folder, "val")
    counts = {}
    for path in train + val:
        tokens = shards.read_shard(path)
        counts[path] = len(tokens)
        if path in train or path == val[0]:  # one long document may fill a later validation shard
            shards.first_bos(tokens, BOS, path)
        if path in val:
            shards.check_ids(tokens, vocab_size, path)
    sidecar.read_all(val, model, processor)
    train_tokens, val_tokens = (sum(counts[path] for path in paths) for paths in (train, val))
    return Prepared(model, order_shards(train, order), tuple(val), vocab_size, train_tokens, val_tokens)


def _load(path: str | Path, vocab_size: int | None, caseops: bool) -> sentencepiece.SentencePieceProcessor:
    processor = tokenizers.load(path, vocab_size)
    if caseops and not tokenizers.has_case_operators(processor):
        raise DataError(f"{path}: expected a tokenizer with case operators (caseops), found one of plain text")
    return processor


def compressibility(path: str | Path) -> float:
    """Compressed over plain size, by zlib level 1, of the 1 MiB that follows the shard's header."""
    with open(path, "rb") as file:
        file.seek(shards.HEADER_BYTES)
        sample = file.read(1 << 20)
    return len(zlib.compress(sample, 1)) / max(1, len(sample))


def order_shards(paths: list[Path], order: str) -> tuple[Path, ...]:
    """The shards by "name", or by compressibility: easy text first ("compressible_first") or last."""
    _check_order(order)
    by_name = sorted(paths, key=lambda path: path.name)
    if order == "name":
        return tuple(by_name)
    return tuple(sorted(by_name, key=compressibility, reverse=order == "compressible_last"))


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise DataError(f"shard order: expected one of {', '.join(ORDERS)}, found {order!r}")


def _fingerprint(source: str | Path, tokenizer: str | Path | None, settings: _Settings) -> str:
    """Hash of all that decides the output. Files count by path, size and time of change, not by content."""
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in corpus.source_files(source)]
    given = None
    if tokenizer is not None:
        _load(tokenizer, settings.vocab_size, settings.caseops)
        given = hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()
    versions = (FORMAT, platform.python_version(), sentencepiece.__version__)
    description = json.dumps([str(source), files, given, asdict(settings), versions])
    return hashlib.sha256(description.encode()).hexdigest()


def _outputs(out: Path) -> list[Path]:
    return sorted([*out.glob("niblick_*_*.bin"), *out.glob(MODEL)])


def _sizes(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in _outputs(out)}


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Another run that wants the same folder waits here, and then finds it done. The lock ends with its process."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _matches(out: Path, fingerprint: str) -> bool:
    try:
        manifest = json.loads((out / MANIFEST).read_bytes())
        files = manifest["files"]
        return manifest["fingerprint"] == fingerprint and MODEL in files and files == _sizes(out)
    except (OSError, ValueError, KeyError, TypeError):  # absent or not ours: prepare anew
        return False


def _build(source: str | Path, out: Path, tokenizer: str | Path | None, settings: _Settings) -> None:
    """Writes everything but the manifest: into a folder within, then in place of what was there."""
    building = out / ".building"
    shutil.rmtree(building, ignore_errors=True)  # of a run that was killed
    building.mkdir(parents=True)
    try:
        _write_model(source, building / MODEL, tokenizer, settings)
        for split, stream in _streams(source, building / MODEL, settings).items():
            _write_shards(building, split, stream, settings.shard_tokens)
        (out / MANIFEST).unlink(missing_ok=True)  # first: from here on it would not be true
        for path in _outputs(out):
            path.unlink()
        for path in _outputs(building):
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_shards(folder: Path, split: str, stream: _Stream, size: int) -> None:
    start = 0
    for index, part in enumerate(_cut(stream.tokens, size)):
        path = folder / f"niblick_{split}_{index:06d}.bin"
        shards.write_shard(path, part)
        if stream.counts is not None:
            sidecar.write(path, stream.counts[start : start + len(part)], folder / MODEL)
        start += len(part)


def _cut(stream: np.ndarray, size: int) -> list[np.ndarray]:
    """Parts of `size` tokens; one in which no document starts (loaders enter a shard at a BOS) joins the one before."""
    starts = [start for start in range(size, len(stream), size) if (stream[start : start + size] == BOS).any()]
    return np.split(stream, starts)


def _write_model(source: str | Path, model: Path, tokenizer: str | Path | None, settings: _Settings) -> None:
    if tokenizer is not None:
        write_atomically(model, lambda file: file.write(Path(tokenizer).read_bytes()))
        return
    documents = corpus.documents(source)
    texts = (text for name, text in documents if not corpus.is_held_out(name, settings.held_out))
    tokenizers.train(texts, settings.vocab_size, model, settings.caseops)


def _streams(source: str | Path, model: Path, settings: _Settings) -> dict[str, _Stream]:
    """The shuffled stream of each side, "train" and "val"."""
    processor = tokenizers.load(model, settings.vocab_size)
    counted = tokenizers.has_case_operators(processor)
    encoded: dict[str, list[tuple[bytes, np.ndarray, np.ndarray | None]]] = {"train": [], "val": []}
    for name, text in corpus.documents(source):
        if not tokenizers.clean(text):
            continue
        split = "val" if corpus.is_held_out(name, settings.held_out) else "train"
        if counted and split == "val":
            ids, counts = sidecar.count_bytes(processor, text)
        else:
            ids, counts = tokenizers.encode_document(processor, text), None
        encoded[split].append((corpus.hash_key(name), ids, counts))
    for split, words in (("val", "held-out"), ("train", "training")):
        if not encoded[split]:
            raise DataError(
                f"{source}: no {words} text: expected at least one document on that side of the held-out fraction"
                f" {settings.held_out}, found none among {sum(map(len, encoded.values()))} documents"
            )
    most = settings.max_val_tokens
    return {"train": _shuffled(encoded["train"], None), "val": _shuffled(encoded["val"], most)}


def _shuffled(items: list[tuple[bytes, np.ndarray, np.ndarray | None]], most: int | None) -> _Stream:
    """The documents (key, ids, counts) end to end in the order of their keys, cut after `most` tokens."""
    _, ids, counts = zip(*sorted(items, key=lambda item: item[0]), strict=True)
    return _Stream(np.concatenate(ids)[:most], None if counts[0] is None else np.concatenate(counts)[:most])
