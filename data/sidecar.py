"""Bytes of text per token, kept in a file beside a validation shard: what bits per byte divide by under CaseOps.

`x_val_000000.bin` has `x_val_bytes_000000.bin`, the challenge's name and format: a shard whose entries are bytes, one
for each token, 0 for BOS. Counts beyond uint16 make it version 2 (one piece covers a whole run of spaces). Our header
also holds the SHA-256 of the shard and of the tokenizer that the counts belong to; in published files zeros stand
there, and only what the tokens themselves tell can be checked (`check`).

These are the bytes of the original text; a plain tokenizer's table (`ByteTable`) counts the decoded text, which has one
space where there was more white space. On text broken into lines that is less (1.55 MB of technical prose: by 3.3 %),
so scores of the two kinds of tokenizer compare only where both totals agree. FineWeb's published ones do, to 3e-5.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from niblick.data import caseops, shards
from niblick.data import tokenizer as tokenizers
from niblick.data.errors import DataError
from niblick.data.tokenizer import BOS, FIRST_OPERATOR

DIGEST = hashlib.sha256().digest_size
ESCAPE_ID = FIRST_OPERATOR + caseops.OPERATORS.index(caseops.ESCAPE)
FIRST_BYTE = FIRST_OPERATOR + len(caseops.OPERATORS)  # the pieces of single bytes follow the operators


def count_bytes(processor: sentencepiece.SentencePieceProcessor, text: str) -> tuple[np.ndarray, np.ndarray]:
    """A document's ids, those of `encode_document`, and the bytes of the original text that each covers: int64 (n,).

    A piece covers a slice of the text before normalisation. BOS covers none; of a character spelled in bytes, or one
    that normalisation makes several pieces of, the last piece covers all; one space covers all the white space that it
    replaces; what is dropped at the edges is nobody's. The counts add up to the UTF-8 bytes of the text between them.

    DataError for a tokenizer without case operators, and a release of sentencepiece without offsets.
    """
    if not tokenizers.has_case_operators(processor):
        raise DataError("bytes per token: expected a tokenizer with case operators, found one of plain text")
    if not hasattr(processor, "encode_as_offset_mapping"):
        found = sentencepiece.__version__
        raise DataError(f"bytes per token: expected a sentencepiece with offset mappings (0.2.3 has), found {found}")
    stream = tokenizers.as_read(processor, text)
    mapping = processor.encode_as_offset_mapping(stream)
    before = np.concatenate([[0], np.cumsum(caseops.byte_weights(stream))])
    begins, ends = np.array(mapping["offsets"], np.int64).reshape(-1, 2).T
    ids = np.array([BOS, *mapping["ids"]], tokenizers.id_dtype(processor))
    return ids, np.concatenate([[0], before[ends] - before[begins]])


def path_beside(shard: str | Path) -> Path:
    """Where a shard's byte counts lie: `x_val_000000.bin` -> `x_val_bytes_000000.bin`."""
    name, separator, number = Path(shard).name.rpartition("_")
    return Path(shard).with_name(f"{name}{separator}bytes_{number}")


def write(shard: str | Path, counts: np.ndarray, tokenizer: str | Path) -> Path:
    """Writes the byte counts (n,) of a shard that lies there already; the file appears whole or not at all."""
    path, n_tokens = path_beside(shard), shards.read_header(shard)[1]
    if len(counts) != n_tokens:
        raise DataError(f"{path}: expected byte counts for the shard's {n_tokens} tokens, found {len(counts)}")
    shards.write_shard(path, counts, note=_sha256(shard) + _sha256(tokenizer))
    return path


def read(shard: str | Path, tokenizer: str | Path) -> np.ndarray:
    """The byte counts of a shard's tokens, uint16 or uint32 (n,), memory-mapped.

    DataError where they are absent, not sound, of another length, of another shard or tokenizer, or impossible for
    these tokens (`check`).
    """
    path, tokens = path_beside(shard), shards.read_shard(shard)
    if not path.exists():
        raise DataError(f"{path}: expected the byte counts of {Path(shard).name}, found no such file")
    counts = shards.read_shard(path)
    if len(counts) != len(tokens):
        raise DataError(f"{path}: expected byte counts for the shard's {len(tokens)} tokens, found {len(counts)}")
    note = shards.read_note(path, 2 * DIGEST)
    if any(note):
        for kind, file, found in (("shard", shard, note[:DIGEST]), ("tokenizer", tokenizer, note[DIGEST:])):
            expected = _sha256(file)
            if found != expected:
                hashes = f"expected SHA-256 {expected.hex()[:12]}…, found {found.hex()[:12]}…"
                raise DataError(f"{path}: byte counts of another {kind} than {file}: {hashes}")
    check(tokens, counts, tokenizers.load(tokenizer), path)
    return counts


def read_all(
    paths: Sequence[Path], tokenizer: str | Path, processor: sentencepiece.SentencePieceProcessor
) -> list[np.ndarray] | None:
    """The byte counts of each validation shard; None for a plain tokenizer whose shards have none, for which a table
    (`ByteTable`) serves. DataError as `read`, and where only some shards have theirs."""
    if not tokenizers.has_case_operators(processor) and not any(path_beside(path).exists() for path in paths):
        return None
    return [read(path, tokenizer) for path in paths]


def check(
    tokens: np.ndarray, counts: np.ndarray, processor: sentencepiece.SentencePieceProcessor, path: str | Path
) -> None:
    """DataError naming the first token whose bytes in `counts` (n,) no text can have; `path` is the counts' file.

    BOS has 0 bytes, a single byte that another follows within one character 0, an operator 0, and an escaped one 3.
    Counts of other tokens are free: normalisation makes pieces of longer and of shorter text.
    """
    demanded = np.full(len(tokens), -1, np.int8)
    demanded[tokens == BOS] = 0
    first_byte = FIRST_OPERATOR
    if tokenizers.has_case_operators(processor):
        first_byte = FIRST_BYTE
        is_operator = (tokens >= FIRST_OPERATOR) & (tokens < FIRST_BYTE)
        demanded[is_operator] = 0
        literal = escaped(tokens)
        demanded[literal[is_operator[literal]]] = 3
        demanded[: int(np.argmin(is_operator))] = -1  # whether the shard before ended with ESCAPE is not known here
    is_byte = (tokens >= first_byte) & (tokens < first_byte + 256)
    continues = (tokens >= first_byte + 0x80) & (tokens < first_byte + 0xC0)
    demanded[:-1][is_byte[:-1] & continues[1:]] = 0
    wrong = np.flatnonzero((demanded >= 0) & (counts != demanded))
    if len(wrong):
        i = int(wrong[0])
        piece = processor.id_to_piece(int(tokens[i]))
        raise DataError(
            f"{path}: not the byte counts of these tokens: expected {demanded[i]} for token {i} ({piece!a}),"
            f" found {counts[i]} ({len(wrong)} such tokens)"
        )


def escaped(tokens: np.ndarray) -> np.ndarray:
    """Indices of the tokens that stand for a character of the text because ESCAPE is before them."""
    found: list[int] = []
    for i in np.flatnonzero(tokens[:-1] == ESCAPE_ID).tolist():
        if not found or found[-1] != i:  # an ESCAPE that is escaped itself escapes nothing
            found.append(i + 1)
    return np.array(found, np.int64)


def _sha256(path: str | Path) -> bytes:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.digest()
    except OSError as error:
        raise DataError(f"{path}: cannot read it for its checksum: {error.strerror}") from error
