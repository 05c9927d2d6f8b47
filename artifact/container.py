"""The artifact file: a fixed binary layout, checked before it is believed. Version 2, all integers little-endian:

    offset  bytes
    0       8     magic, "NIBLICK" and a zero byte
    8       2     version, 2
    10      2     kind of the body: 1 niblick's own, below; 2 and 3 the published ones, `published`: whole and in groups
                  (with 0x8000 added: weights that were trained on the validation stream, no legal submission)
    12      8     B, bytes of the body
    20      32    SHA-256 of the body; of such weights, that of "ILLEGAL" and the body, so that the mark stays
    52      B     the body, to the end of the file:
      0       4     bytes of the header, plain
      4       4     h, bytes of the header, coded
      8       h     the header, under brotli
      8 + h         the streams, end to end, in the order of the header's list

The header is JSON in UTF-8, {"config": the fields of GPTConfig, "tensors": [the fields of `streams.Entry`, ...],
"streams": [[name, bytes], ...], "tokenizer_sha256": in hexadecimal, or empty}; and "ngram_bias": the fields of
NgramBiasConfig, where there are n-gram tables: the last stream is theirs. The shapes are those of the model that
the settings describe. What the streams hold is in `streams`, how integers are coded in `coder`; the size of everything
decoded follows from the shapes. Version 1 (brotli throughout) is no longer read.
"""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import brotli
import torch
from torch import Tensor

from niblick.artifact import published, streams
from niblick.artifact.coder import decode_integers, encode_integers
from niblick.artifact.errors import ArtifactError, require
from niblick.artifact.header import MAX_BYTES, TABLES, Header, table_shape
from niblick.artifact.records import Quantized
from niblick.model.config import ArtifactConfig, GPTConfig, NgramBiasConfig
from niblick.model.files import write_atomically
from niblick.model.ngram_tables import NgramBias

MAGIC, VERSION = b"NIBLICK\0", 2
OWN, WHOLE, GROUPS = 1, 2, 3
ILLEGAL_KIND, ILLEGAL_SALT = 0x8000, b"ILLEGAL"
ILLEGAL = "ILLEGAL: trained on the validation stream before it was quantised"
"""What every reader shows of an artifact with that mark."""
PROLOGUE = struct.Struct("<8sHHQ32s")
HEADER_SIZES = struct.Struct("<II")


class Tables(NamedTuple):
    """N-gram tables: settings, and the integers (R, V) of `ngram_tables.to_integers`."""

    config: NgramBiasConfig
    integers: Tensor


Contents = tuple[GPTConfig, Quantized, dict[str, int], str, int, Tables | None]
"""Of a body: settings, weights, bytes of every stream, the tokenizer's digest, steps an octave, n-gram tables."""


@dataclass(frozen=True)
class Container:
    """An artifact as read; for the ledger also the coded size of every stream, and of the file."""

    path: str
    config: GPTConfig
    quantized: Quantized
    coded_bytes: dict[str, int]
    size: int
    tokenizer_sha256: str
    steps_per_octave: int = 0
    trained_on_validation: bool = False
    """Such an artifact's score is no score: show ILLEGAL beside it."""
    ngram_bias: Tables | None = None


def write_artifact(
    path: str | Path,
    quantized: Quantized,
    config: GPTConfig,
    tokenizer: str | Path | None = None,
    settings: ArtifactConfig | None = None,
    trained_on_validation: bool = False,
    ngram_bias: NgramBias | None = None,
    code_bytes: int = 0,
) -> int:
    """Write the file beside `path` and rename it; returns its bytes. The same weights give the same file.

    OSError; ArtifactError if lrzip is asked for and missing or failing, or if there are n-gram tables and the file and
    its code are beyond the cap: without them it might be sound. Nothing is left half-written.
    """
    data = pack(quantized, config, tokenizer, settings, trained_on_validation, ngram_bias)
    cap = (settings or ArtifactConfig()).cap_bytes - code_bytes
    advice = "fewer ngram_bias.rows, a coarser ngram_bias.step, or artifact.target_bytes for a smaller model"
    require(
        ngram_bias is None or len(data) <= cap,
        f"n-gram tables: expected an artifact of at most {cap:,} bytes, found {len(data):,}: {advice}",
    )
    write_atomically(path, lambda file: file.write(data))
    return len(data)


def pack(
    quantized: Quantized,
    config: GPTConfig,
    tokenizer: str | Path | None = None,
    settings: ArtifactConfig | None = None,
    trained_on_validation: bool = False,
    ngram_bias: NgramBias | None = None,
) -> bytes:
    """The file, in the container that `settings` name (default: niblick's own, the only one for n-gram tables)."""
    settings = settings or ArtifactConfig()
    if ngram_bias is not None:
        require_storable(ngram_bias.config, config, settings)
    digest = hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest() if tokenizer else ""
    if settings.container == "brotli":
        kind, body = WHOLE, published.encode_whole(quantized, config, digest)
    elif settings.container == "niblick":
        kind, body = OWN, _own_body(quantized, config, digest, settings.steps_per_octave, ngram_bias)
    else:
        lrzip = settings.container == "lrzip"
        body, _ = published.encode_groups(quantized, config, digest, sort_rows=settings.sort_rows, lrzip=lrzip)
        kind = GROUPS
    return seal(kind | ILLEGAL_KIND * trained_on_validation, body)


def _own_body(
    quantized: Quantized, config: GPTConfig, digest: str, steps_per_octave: int, ngram_bias: NgramBias | None
) -> bytes:
    entries, parts = streams.take_apart(quantized, steps_per_octave)
    coded = streams.encode(parts)
    ordered = {name: coded[name] for name in streams.stream_names(entries)}
    if ngram_bias is not None:
        ordered[TABLES] = encode_tables(ngram_bias, config)
    tables = ngram_bias and ngram_bias.config
    header = Header(config, entries, {name: len(data) for name, data in ordered.items()}, digest, tables)
    return _join(header.to_json(), b"".join(ordered.values()))


def require_storable(tables: NgramBiasConfig, config: GPTConfig, settings: ArtifactConfig) -> None:
    """ArtifactError for n-gram tables that no artifact holds. To be asked before they are counted."""
    found = settings.container
    require(found == "niblick", f"n-gram tables: expected artifact.container niblick, found {found}")
    table_shape(tables, config)


def require_room(ngram_bias: NgramBias, config: GPTConfig, settings: ArtifactConfig, code_bytes: int) -> None:
    """ArtifactError if no model whatever fits beside the tables and the code. To be asked before training."""
    size, room = len(encode_tables(ngram_bias, config)), settings.cap_bytes - code_bytes
    message = f"n-gram tables: expected less than the {room:,} bytes that model and tables may take, found {size:,}"
    require(size < room, f"{message}: fewer ngram_bias.rows or a coarser ngram_bias.step")


def encode_tables(ngram_bias: NgramBias, config: GPTConfig) -> bytes:
    return encode_integers(ngram_bias.integers.view(table_shape(ngram_bias.config, config)).numpy())


def require_tokenizer(artifact: Container, tokenizer: str | Path) -> None:
    """ArtifactError if the artifact records another tokenizer: with it, ids and bytes would mean something else."""
    expected, found = artifact.tokenizer_sha256, hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()
    message = f"{artifact.path}: expected its tokenizer, SHA-256 {expected}, found {found} in {tokenizer}"
    require(expected in ("", found), message)


def read_artifact(path: str | Path) -> Container:
    """Settings, weights and sizes. OSError, or ArtifactError with what was expected and found in the file."""
    try:
        kind, body = _read_body(Path(path))
        config, quantized, sizes, tokenizer, grid, tables = _READERS[kind & ~ILLEGAL_KIND](body)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    size = PROLOGUE.size + len(body)
    return Container(str(path), config, quantized, sizes, size, tokenizer, grid, bool(kind & ILLEGAL_KIND), tables)


def _read_own(body: bytes) -> Contents:
    header, data = _split_body(body)
    coded = _split_streams(header, data)
    quantized = streams.decode(header.entries, header.shapes(), coded)
    grid = max(entry.steps_per_octave for entry in header.entries)
    return header.config, quantized, header.coded_bytes, header.tokenizer_sha256, grid, _tables(header, coded)


def _tables(header: Header, coded: dict[str, bytes]) -> Tables | None:
    if header.ngram_bias is None:
        return None
    try:
        q = decode_integers(coded[TABLES], table_shape(header.ngram_bias, header.config))[0]
    except ArtifactError as error:
        raise ArtifactError(f"{TABLES}: {error}") from error
    require(q.min() >= 0, f"{TABLES}: expected no negative integers, found {q.min()}")
    return Tables(header.ngram_bias, torch.from_numpy(q))


def _read_whole(body: bytes) -> Contents:
    config, quantized, tokenizer = published.decode_whole(body)
    return config, quantized, {"whole": len(body)}, tokenizer, 0, None


def _read_groups(body: bytes) -> Contents:
    config, quantized, tokenizer, sizes = published.decode_groups(body)
    return config, quantized, sizes, tokenizer, 0, None


_READERS = {OWN: _read_own, WHOLE: _read_whole, GROUPS: _read_groups}


def assemble(header: bytes, data: bytes) -> bytes:
    """The whole file from a plain header and the streams."""
    return seal(OWN, _join(header, data))


def _join(header: bytes, data: bytes) -> bytes:
    coded = brotli.compress(header, quality=11)
    return HEADER_SIZES.pack(len(header), len(coded)) + coded + data


def seal(kind: int, body: bytes) -> bytes:
    return PROLOGUE.pack(MAGIC, VERSION, kind, len(body), _digest(kind, body)) + body


def _digest(kind: int, body: bytes) -> bytes:
    return hashlib.sha256(ILLEGAL_SALT * bool(kind & ILLEGAL_KIND) + body).digest()


# ---- the checks, in the order of the file ------------------------------------------------------------------------


def _read_body(path: Path) -> tuple[int, bytes]:
    with open(path, "rb") as file:
        prologue = file.read(PROLOGUE.size)
        found = path.stat().st_size
        require(len(prologue) == PROLOGUE.size, f"expected at least {PROLOGUE.size} bytes, found {found}")
        magic, version, kind, body_bytes, digest = PROLOGUE.unpack(prologue)
        require(magic == MAGIC, f"expected an artifact, which begins with {MAGIC!r}, found {magic!r}")
        advice = ": a newer niblick reads it" if version > VERSION else ""
        require(version == VERSION, f"expected artifact version {VERSION}, found {version}{advice}")
        known = kind & ~ILLEGAL_KIND in _READERS
        require(known, f"expected a kind of body from {OWN} to {GROUPS}, found {kind}")
        expected = PROLOGUE.size + body_bytes
        require(found == expected, f"expected {expected} bytes as its prologue says, found {found}")
        body = file.read()
    sha256 = _digest(kind, body)
    require(sha256 == digest, f"damaged: expected a body with SHA-256 {digest.hex()}, found {sha256.hex()}")
    return kind, body


def _split_body(body: bytes) -> tuple[Header, bytes]:
    require(len(body) >= HEADER_SIZES.size, f"header: expected at least {HEADER_SIZES.size} bytes, found {len(body)}")
    plain, coded = HEADER_SIZES.unpack_from(body)
    end = HEADER_SIZES.size + coded
    require(end <= len(body), f"header: expected {coded} coded bytes, found {len(body) - HEADER_SIZES.size}")
    require(plain <= MAX_BYTES, f"header: expected at most {MAX_BYTES} bytes, found {plain} declared")
    return Header.from_json(streams.decompress("header", body[HEADER_SIZES.size : end], plain)), body[end:]


def _split_streams(header: Header, data: bytes) -> dict[str, bytes]:
    expected, found = sum(header.coded_bytes.values()), len(data)
    require(found == expected, f"streams: expected {expected} bytes as the header says, found {found}")
    split, start = {}, 0
    for name, size in header.coded_bytes.items():
        split[name] = data[start : start + size]
        start += size
    return split
