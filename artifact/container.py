"""The artifact file: a fixed binary layout, checked before it is believed. Version 1, all integers little-endian:

    offset  bytes
    0       8     magic, "NIBLICK" and a zero byte
    8       2     version, 1
    10      2     codec, 1: header and streams are coded with brotli (quality 11)
    12      8     B, bytes of the body
    20      32    SHA-256 of the body
    52      B     the body, to the end of the file:
      0       4     bytes of the header, plain
      4       4     h, bytes of the header, coded
      8       h     the header, coded
      8 + h         the streams, coded, end to end, in the order of the header's list

The header is JSON in UTF-8, {"config": the fields of GPTConfig, "tensors": [[name, bits, shape], ...], "streams":
[[name, coded bytes], ...], "tokenizer_sha256": in hexadecimal, or empty}. bits 0 is a float16 tensor, other bits are
rows of integers (`quantize`). The streams are

    one for each tensor of integers, of its name, in the tensors' order: a byte each, two's complement, row by row
    "scales":   the steps of all rows in that order, float16, byte-shuffled (all low bytes, then all high bytes)
    "float16":  all float16 tensors in the tensors' order, byte-shuffled likewise

The size of every stream follows from the shapes, so nothing is decompressed beyond what the header declares.
"""

import hashlib
import math
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import brotli
import numpy as np
import torch
from torch import Tensor

from niblick.artifact.errors import ArtifactError
from niblick.artifact.header import MAX_BYTES, Entry, Header, require
from niblick.artifact.quantize import Quantized, RowIntegers, largest_integer
from niblick.model.config import GPTConfig
from niblick.model.files import write_atomically

MAGIC, VERSION, BROTLI = b"NIBLICK\0", 1, 1
PROLOGUE = struct.Struct("<8sHHQ32s")
HEADER_SIZES = struct.Struct("<II")


@dataclass(frozen=True)
class Container:
    """An artifact as read; for the ledger also every stream before coding, and its coded size."""

    config: GPTConfig
    quantized: Quantized
    raw: dict[str, bytes]
    coded_bytes: dict[str, int]
    size: int


def write_artifact(
    path: str | Path, quantized: Quantized, config: GPTConfig, tokenizer: str | Path | None = None
) -> int:
    """Write the file beside `path` and rename it; returns its bytes. The same weights give the same file. OSError."""
    raw = _raw_streams(quantized)
    with ThreadPoolExecutor() as pool:  # brotli lets go of the interpreter, so streams are coded side by side
        coded = dict(zip(raw, pool.map(lambda data: brotli.compress(data, quality=11), raw.values()), strict=True))
    entries = [
        Entry(name, 0, tuple(t.shape)) if isinstance(t, Tensor) else Entry(name, t.bits, tuple(t.q.shape))
        for name, t in quantized.items()
    ]
    digest = hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest() if tokenizer else ""
    header = Header(config, entries, {name: len(data) for name, data in coded.items()}, digest)
    data = assemble(header.to_json(), b"".join(coded.values()))
    write_atomically(path, lambda file: file.write(data))
    return len(data)


def read_artifact(path: str | Path) -> tuple[GPTConfig, Quantized]:
    """The configuration and the weights. OSError, or ArtifactError with what was expected and found in the file."""
    container = read_container(path)
    return container.config, container.quantized


def require_tokenizer(path: str | Path, tokenizer: str | Path) -> None:
    """ArtifactError if the artifact records another tokenizer: with it, ids and bytes would mean something else."""
    try:
        expected = _split_body(_read_body(Path(path)))[0].tokenizer_sha256
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    found = hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()
    require(
        expected in ("", found), f"{path}: expected its tokenizer, SHA-256 {expected}, found {found} in {tokenizer}"
    )


def read_container(path: str | Path) -> Container:
    """As `read_artifact`, with the streams."""
    try:
        body = _read_body(Path(path))
        header, streams = _split_body(body)
        raw = _decode_streams(header, streams)
        quantized = _tensors(header.entries, raw)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    return Container(header.config, quantized, raw, header.coded_bytes, PROLOGUE.size + len(body))


def assemble(header: bytes, streams: bytes) -> bytes:
    """The whole file from a plain header and the coded streams."""
    coded = brotli.compress(header, quality=11)
    body = HEADER_SIZES.pack(len(header), len(coded)) + coded + streams
    return PROLOGUE.pack(MAGIC, VERSION, BROTLI, len(body), hashlib.sha256(body).digest()) + body


# ---- tensors <-> streams -----------------------------------------------------------------------------------------


def _raw_streams(quantized: Quantized) -> dict[str, bytes]:
    rows = {name: t for name, t in quantized.items() if isinstance(t, RowIntegers)}
    halves = [t for t in quantized.values() if isinstance(t, Tensor)]
    streams = {name: t.q.numpy().tobytes() for name, t in rows.items()}
    return streams | {"scales": _shuffle([t.scale for t in rows.values()]), "float16": _shuffle(halves)}


def _tensors(entries: list[Entry], raw: dict[str, bytes]) -> Quantized:
    scales = iter(_unshuffle(raw["scales"], [e.shape[:-1] for e in entries if e.bits]))
    halves = iter(_unshuffle(raw["float16"], [e.shape for e in entries if not e.bits]))
    return {
        e.name: RowIntegers(_integers(e, raw[e.name]), next(scales), e.bits) if e.bits else next(halves)
        for e in entries
    }


def _integers(entry: Entry, data: bytes) -> Tensor:
    q = np.frombuffer(data, "i1").reshape(entry.shape).copy()
    Q, low, high = largest_integer(entry.bits), q.min(), q.max()
    require(-Q <= low and high <= Q, f"{entry.name}: expected integers in [-{Q}, {Q}], found {low} to {high}")
    return torch.from_numpy(q)


def _shuffle(tensors: list[Tensor]) -> bytes:
    values = np.concatenate([np.zeros(0, "<f2"), *(t.numpy().astype("<f2").ravel() for t in tensors)])
    return values.view("u1").reshape(-1, 2).T.tobytes()


def _unshuffle(data: bytes, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    values = np.frombuffer(data, "u1").reshape(2, -1).T.copy().view("<f2").ravel().astype(np.float16)
    require(bool(np.isfinite(values).all()), "scales and float16 tensors: expected finite values, found others")
    ends = accumulate(math.prod(shape) for shape in shapes)
    return [
        torch.from_numpy(values[end - math.prod(shape) : end].reshape(shape))
        for shape, end in zip(shapes, ends, strict=True)
    ]


# ---- the checks, in the order of the file ------------------------------------------------------------------------


def _read_body(path: Path) -> bytes:
    with open(path, "rb") as file:
        prologue = file.read(PROLOGUE.size)
        found = path.stat().st_size
        require(len(prologue) == PROLOGUE.size, f"expected at least {PROLOGUE.size} bytes, found {found}")
        magic, version, codec, body_bytes, digest = PROLOGUE.unpack(prologue)
        require(magic == MAGIC, f"expected an artifact, which begins with {MAGIC!r}, found {magic!r}")
        require(version == VERSION, f"expected artifact version {VERSION}, found {version}")
        require(codec == BROTLI, f"expected codec {BROTLI} (brotli), found {codec}")
        expected = PROLOGUE.size + body_bytes
        require(found == expected, f"expected {expected} bytes as its prologue says, found {found}")
        body = file.read()
    sha256 = hashlib.sha256(body).digest()
    require(sha256 == digest, f"damaged: expected a body with SHA-256 {digest.hex()}, found {sha256.hex()}")
    return body


def _split_body(body: bytes) -> tuple[Header, bytes]:
    require(len(body) >= HEADER_SIZES.size, f"header: expected at least {HEADER_SIZES.size} bytes, found {len(body)}")
    plain, coded = HEADER_SIZES.unpack_from(body)
    end = HEADER_SIZES.size + coded
    require(end <= len(body), f"header: expected {coded} coded bytes, found {len(body) - HEADER_SIZES.size}")
    require(plain <= MAX_BYTES, f"header: expected at most {MAX_BYTES} bytes, found {plain} declared")
    return Header.from_json(_decompress("header", body[HEADER_SIZES.size : end], plain)), body[end:]


def _decode_streams(header: Header, streams: bytes) -> dict[str, bytes]:
    expected, found = sum(header.coded_bytes.values()), len(streams)
    require(found == expected, f"streams: expected {expected} bytes as the header says, found {found}")
    raw, start = {}, 0
    for name, size in header.raw_bytes().items():
        end = start + header.coded_bytes[name]
        raw[name] = _decompress(name, streams[start:end], size)
        start = end
    return raw


def _decompress(name: str, coded: bytes, expected: int) -> bytes:
    """Exactly `expected` bytes. The decoder stops soon after one more, whatever the stream would expand to."""
    decoder = brotli.Decompressor()
    try:
        data = decoder.process(coded, output_buffer_limit=expected + 1)
    except brotli.error as error:
        raise ArtifactError(f"{name}: expected one brotli stream, found something else") from error
    whole = decoder.is_finished()
    found = f"{len(data)}" if whole else f"at least {len(data)}, unfinished"
    require(whole and len(data) == expected, f"{name}: expected {expected} bytes decoded, found {found}")
    return data
