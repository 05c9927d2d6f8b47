"""The held-out stream that an evaluation scores."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from niblick.data import sidecar
from niblick.data import tokenizer as tokenizers
from niblick.data.errors import DataError
from niblick.data.shards import check_ids, first_bos, read_shard

LOOKED_AT = 20_000
"""Tokens; their tokenizer gives all of them back, another of the same size and on like text some 95 %."""


@dataclass(frozen=True)
class ValidationSet:
    """The held-out stream: tokens (N,), and byte_counts (N,), the bytes of text that each stands for: int16 from the
    tokenizer's table, or what lies beside the shards (the first is never a target)."""

    tokens: np.ndarray
    byte_counts: np.ndarray

    @classmethod
    def load(
        cls, shards: Sequence[Path], tokenizer: str | Path, *, vocab_size: int, bos_id: int = 1, max_tokens: int = 0
    ) -> "ValidationSet":
        """Shards end to end, cut after max_tokens where that is given. Where byte counts lie beside the shards, they
        are the bytes; a tokenizer with case operators needs them. DataError for a shard or tokenizer that is not sound,
        byte counts that are not those of the shard and tokenizer, another vocabulary, no document start, or fewer than
        two tokens."""
        if max_tokens < 0:
            raise DataError(f"expected a number of held-out tokens, or 0 for all: found {max_tokens}")
        processor = tokenizers.load(tokenizer, vocab_size)
        parts = []
        for path in shards:
            parts.append(read_shard(path))
            check_ids(parts[-1], vocab_size, path)
        first_bos(parts[0], bos_id, shards[0])
        tokens = np.concatenate(parts)[: max_tokens or None]
        if len(tokens) < 2:
            raise DataError(f"{shards[0].parent}: expected at least 2 held-out tokens, found {len(tokens)}")
        beside = sidecar.read_all(shards, tokenizer, processor)
        if beside is not None:
            return cls(tokens, np.concatenate(beside)[: len(tokens)])
        counts = np.zeros(len(tokens), np.int16)
        counts[1:] = tokenizers.ByteTable.of(processor).bytes(tokens[:-1], tokens[1:])
        return cls(tokens, counts)


def require_own_tokens(tokens: np.ndarray, tokenizer: str | Path, bos_id: int, where: str | Path) -> None:
    """DataError unless the tokens are of this tokenizer: text decoded from them must be encoded to them again.

    The first whole documents are looked at. One in fifty tokens may differ, and ten besides, as text that is decoded is
    normalised text.
    """
    processor, expected, found = tokenizers.load(tokenizer), Counter(), Counter()
    starts = np.flatnonzero(tokens[:LOOKED_AT] == bos_id)
    for start, end in pairwise(starts.tolist()):
        ids = tokens[start + 1 : end].tolist()
        expected.update(ids)
        found.update(processor.encode(processor.decode(ids)))
    n, different = expected.total(), (expected - found).total()
    if different > 10 + n // 50:
        raise DataError(
            f"{where}: expected shards of the tokenizer {tokenizer}: of their first {n} tokens, decoded and encoded"
            f" again by it, {different} do not come back"
        )
