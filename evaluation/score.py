"""The score of a model on a token stream: the negative log-likelihood of every target, in the context of its window.

Windows are laid end to end in one flat stream per forward, and attention is cut at each window's start. Within a
window it is cut as in training: at every BOS and every `max_segment` tokens (`attention_span` documents) or every
`max_segment` tokens of the window (rows).

The smear gate alone looks across those cuts, one token back. So a window is preceded by its true predecessor, as a
segment of its own whose row is not scored: the gate reads what it would in the corpus, and never another window. The
score of a target is therefore that of the whole stream up to it in one forward, with attention cut at the window's
start, however windows are batched.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from niblick.data.bits_per_byte import bits_per_byte
from niblick.data.loaders import document_starts, row_starts
from niblick.evaluation.clock import Clock
from niblick.evaluation.hints import Hints
from niblick.evaluation.ranks import own_share, sum_over_ranks
from niblick.evaluation.windows import Window
from niblick.kernels.ngram_tilt import MAX_EXPONENT, ngram_tilt
from niblick.kernels.softcapped_ce import softcapped_ce
from niblick.model.config import ConfigError, GPTConfig
from niblick.model.gpt import GPT

Progress = Callable[[int, int], object]
"""Called with the targets scored so far and all of them."""
Record = Callable[[np.ndarray, np.ndarray], object]
"""Called with targets (n,) and their losses (n,), final then. Where it has a method `updated`, that is called with the
targets (n,) of each step that an adaptation makes, after the step."""

LOGITS_BYTES = 1 << 28
"""Logits are made for so many rows at a time: 256 MiB are 16,384 rows of 8192 in bf16."""


@dataclass(frozen=True)
class Score:
    """nll in nats, summed over n_targets targets that stand for n_bytes bytes of text; seconds of wall clock. Of no
    target, as where scoring ended before the first one, what is per byte or token is not a number."""

    nll: float
    n_targets: int
    n_bytes: int
    seconds: float
    partial: str = ""
    """Why the scoring ended before its last target, or nothing."""
    notes: tuple[str, ...] = ()
    """What a reader of the score must know besides, a line each."""

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.nll, self.n_bytes) if self.n_targets else math.nan

    @property
    def nats_per_token(self) -> float:
        return self.nll / self.n_targets if self.n_targets else math.nan

    def plus(self, more: "Score") -> "Score":
        """The score of the targets of both, `more` being of later ones."""
        sums = (getattr(self, name) + getattr(more, name) for name in ("nll", "n_targets", "n_bytes", "seconds"))
        return Score(*sums, partial=self.partial or more.partial, notes=self.notes + more.notes)


class Packed(NamedTuple):
    """The windows of one forward. ids int64 (N,), cu_seqlens int32, rows and targets int64 (M,): which of the N rows
    are scored, and the place in the whole stream of the token that each predicts."""

    ids: Tensor
    cu_seqlens: Tensor
    rows: Tensor
    targets: np.ndarray


def score(
    model: GPT,
    tokens: np.ndarray,
    byte_counts: np.ndarray,
    windows: Sequence[Window],
    *,
    tokens_per_batch: int,
    hints: Hints | None = None,
    progress: Progress | None = None,
    record: Record | None = None,
    clock: Clock | None = None,
    foresee: bool = True,
) -> Score:
    """Score the targets of `windows` with the looped model, in eval mode.

    tokens (N,) of an integer type and byte_counts (N,): bytes that each token stands for. A forward takes as many
    windows as fit in tokens_per_batch, at least one. `progress` is called with the targets scored so far and all of
    them, `record` with the targets of each forward, int64, and their losses, float32. Sums are in float64, on the
    device. Where `clock` says stop, what was scored by then is the result, marked as partial; foresee: it is also
    asked whether the rest will fit (OverBudget).

    Of several ranks each scores its share of the windows; `progress` and `record` tell of it, the result of all.

    ConfigError for no window, or hints for a model with two softcaps or an n-gram bias.
    """
    require_targets(windows, len(tokens))
    if hints is not None:
        check_tilt(model.config)
        if model.ngram_bias is not None:
            raise ConfigError("score: the n-gram tilt expected a model without an n-gram bias, found one with tables")
    began, was_training, windows, everything = time.perf_counter(), model.training, own_share(windows), windows
    nll = torch.zeros((), dtype=torch.float64, device=model.embedding.device)
    n_targets, n_bytes, total = 0, 0, _count_targets(windows)
    n_rows, all_rows, stopped = 0, sum(w.end - w.start for w in windows), ""
    model.eval()
    try:
        for batch in batches(windows, tokens_per_batch):
            packed = pack(tokens, batch, model.config)
            losses = token_nll(model, packed, tokens, hints)
            nll += losses.double().sum()
            n_targets += len(packed.targets)
            n_bytes += int(byte_counts[packed.targets].sum(dtype=np.int64))
            n_rows += sum(w.end - w.start for w in batch)
            if progress:
                progress(n_targets, total)
            if record:
                record(packed.targets, losses.cpu().numpy())
            if clock and foresee:
                clock.foresee(n_rows / all_rows)
            if clock and (stopped := clock.stop()):
                break
    finally:
        model.train(was_training)
    sums = torch.stack([nll, *(nll.new_tensor(count) for count in (n_targets, n_bytes))])
    sum_over_ranks([sums])
    nll, n_targets, n_bytes = (kind(x) for kind, x in zip((float, int, int), sums.tolist(), strict=True))
    partial = "" if n_targets == _count_targets(everything) else stopped or "another rank stopped"
    return Score(nll, n_targets, n_bytes, time.perf_counter() - began, partial)


def require_targets(windows: Sequence[Window], n_tokens: int) -> None:
    if not windows:
        raise ConfigError(f"score: expected at least one target, found none in {n_tokens} tokens")


def _count_targets(windows: Sequence[Window]) -> int:
    return sum(window.end - window.first_scored for window in windows)


def check_tilt(config: GPTConfig) -> None:
    if config.asymmetric_softcap:
        raise ConfigError("score: the n-gram tilt expected one softcap, found model.asymmetric_softcap")
    largest = (MAX_EXPONENT - math.log(config.vocab_size)) / 2
    if config.softcap > largest:
        raise ConfigError(f"score: the n-gram tilt expected a softcap of at most {largest:.4g}: got {config.softcap}")


@torch.no_grad()
def token_nll(model: GPT, packed: Packed, tokens: np.ndarray, hints: Hints | None = None) -> Tensor:
    """Negative log-likelihood of each scored target, nats, (M,) float32 on the model's device."""
    device = model.embedding.device
    ids, cu_seqlens, rows = (x.to(device) for x in packed[:3])
    hidden = model.hidden(ids, cu_seqlens, looping=True)[rows]
    targets = _on(device, tokens[packed.targets], torch.int64)
    columns = [hidden, targets]
    if hints is not None:
        columns.append(_on(device, hints.tokens[packed.targets], torch.int64))
        columns.append(_on(device, hints.betas[packed.targets], torch.float32))
    if model.ngram_bias is not None:
        columns += [x[rows] for x in model.ngram_bias(ids, cu_seqlens)]
    n_rows = max(1, LOGITS_BYTES // (model.config.vocab_size * hidden.element_size()))
    chunks = zip(*(x.split(n_rows) for x in columns), strict=True)
    return torch.cat([row_nll(model, *chunk) for chunk in chunks])


def row_nll(model: GPT, hidden: Tensor, targets: Tensor, *ngram: Tensor) -> Tensor:
    """Negative log-likelihood (n,) of targets (n,) given hidden states (n, D).

    ngram: the rows and factors (n, K) of the model's bias if it has one, else hints and betas (n,), else nothing.
    """
    logits = model.head(hidden)
    if model.ngram_bias is not None:
        return model.ngram_bias.loss(logits, targets, *ngram, model.config.softcap, reduction="none")
    if ngram:
        return ngram_tilt(logits, targets, *ngram, model.config.softcap)
    return softcapped_ce(logits, targets, *model.softcaps, reduction="none")


def _on(device: torch.device, values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, dtype)


def pack(tokens: np.ndarray, windows: Sequence[Window], config: GPTConfig) -> Packed:
    """Lay windows end to end, each after its predecessor where the smear gate will look for it."""
    ids, starts, rows, targets, length = [], [], [], [], 0
    for window in windows:
        lead = int(config.smear == "window" and window.start > 0)
        ids.append(tokens[window.start - lead : window.end])
        starts += [[length]] if lead else []
        starts.append(length + lead + _segment_starts(ids[-1][lead:], config))
        rows.append(np.arange(window.first_scored, window.end) + (length + lead - window.start))
        targets.append(np.arange(window.first_scored + 1, window.end + 1))
        length += len(ids[-1])
    return Packed(
        ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        cu_seqlens=torch.from_numpy(np.concatenate([*starts, [length]]).astype(np.int32)),
        rows=torch.from_numpy(np.concatenate(rows)),
        targets=np.concatenate(targets),
    )


def _segment_starts(ids: np.ndarray, config: GPTConfig) -> np.ndarray:
    if config.attention_span == "rows":
        return row_starts(len(ids), config.max_segment).numpy()[:-1]
    return document_starts(ids, config.bos_id, config.max_segment).numpy()[:-1]


def batches(windows: Sequence[Window], tokens_per_batch: int) -> Iterator[list[Window]]:
    """As many windows together as come to at most tokens_per_batch tokens, at least one."""
    batch, size = [], 0
    for window in windows:
        length = window.end - window.start
        if batch and size + length > tokens_per_batch:
            yield batch
            batch, size = [], 0
        batch.append(window)
        size += length
    if batch:
        yield batch
