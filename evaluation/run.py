"""One evaluation: a model, held-out tokens, a method, and the score."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from niblick.data import tokenizer as tokenizers
from niblick.data.errors import DataError
from niblick.data.shards import check_ids, first_bos, read_shard
from niblick.evaluation.hints import token_hints
from niblick.evaluation.score import Score, score
from niblick.evaluation.windows import Window, plain_windows, rows_kept, sliding_windows
from niblick.model.config import EvalConfig
from niblick.model.gpt import GPT


@dataclass(frozen=True)
class ValidationSet:
    """The held-out stream: tokens (N,), and byte_counts int16 (N,), the bytes of text each stands for (0 for the first,
    which is never a target)."""

    tokens: np.ndarray
    byte_counts: np.ndarray

    @classmethod
    def load(
        cls, shards: Sequence[Path], tokenizer: str | Path, *, vocab_size: int, bos_id: int = 1, max_tokens: int = 0
    ) -> "ValidationSet":
        """Shards end to end, cut after max_tokens where that is given. DataError for a shard or tokenizer that is not
        sound, another vocabulary, no document start, or fewer than two tokens."""
        if max_tokens < 0:
            raise DataError(f"expected a number of held-out tokens, or 0 for all: found {max_tokens}")
        table = tokenizers.ByteTable.of(tokenizers.load(tokenizer, vocab_size))
        parts = []
        for path in shards:
            parts.append(read_shard(path))
            check_ids(parts[-1], vocab_size, path)
        first_bos(parts[0], bos_id, shards[0])
        tokens = np.concatenate(parts)[: max_tokens or None]
        if len(tokens) < 2:
            raise DataError(f"{shards[0].parent}: expected at least 2 held-out tokens, found {len(tokens)}")
        counts = np.zeros(len(tokens), np.int16)
        counts[1:] = table.bytes(tokens[:-1], tokens[1:])
        return cls(tokens, counts)


def evaluate_model(
    model: GPT,
    data: ValidationSet,
    config: EvalConfig,
    *,
    tilt: bool = False,
    progress: Callable[[int, int], None] | None = None,
    record: Callable[[np.ndarray, np.ndarray], object] | None = None,
) -> Score:
    """Score every target once; the seconds are those of everything done here, the hints of `tilt` included.

    `progress` and `record` are called as in `score`. ConfigError for sizes that leave no target.
    """
    began = time.perf_counter()
    windows = windows_of(config, len(data.tokens))
    result = score(
        model,
        data.tokens,
        data.byte_counts,
        windows,
        tokens_per_batch=config.tokens_per_batch,
        hints=token_hints(data.tokens) if tilt else None,
        progress=progress,
        record=record,
    )
    return dataclasses.replace(result, seconds=time.perf_counter() - began)


def windows_of(config: EvalConfig, n_tokens: int) -> list[Window]:
    """The method's windows for a stream of n_tokens."""
    n_rows = rows_kept(n_tokens, config.sequence_length, config.tail)
    if config.method == "plain":
        return plain_windows(n_rows, config.sequence_length)
    return sliding_windows(n_rows, config.sequence_length, config.stride)
