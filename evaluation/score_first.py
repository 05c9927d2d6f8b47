"""Score-first SGD: a stretch of the stream is scored, then trained on, then the next is scored.

The T rows to score are cut into M chunks of C. A sliding window belongs to the chunk that its first scored row lies
in. For each chunk c = 0 .. M - 1: its windows are scored; then, except after the last chunk, SGD with momentum runs
over its fl(C / L) consecutive sequences of L rows, all of them in one step an epoch, at the rate

    (learning_rate / 2) (1 + cos(pi c / (M - 1)))

with the gradient clipped to a norm, and momentum living on from chunk to chunk. Every token is scored by parameters
that have seen tokens of earlier chunks only. (#461, #549, #1413, #1477, #1514 of the challenge, whose chunk is 16
sequences: there, too, one step an epoch.)

The guard. On a looped, quantised model the same loop has been seen to diverge. So a few windows of every chunk, its
probe, are also scored by the parameters of the start, after they have counted: first by how much the adapted ones, new
to the text, did worse (the mean over the last chunks), then again when they have trained on it. Beyond `stop_above` in
either, and for a loss or a gradient that is not finite, the parameters of the start go back, what is left is scored
without adaptation, and the result says so. Nothing that has counted changes.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from niblick.evaluation.adaptation import (
    clip_gradients,
    copy_parameters,
    freeze_first_blocks,
    half_cosine,
    mean_gradients,
    parameters_kept,
    require_dense,
    set_parameters,
)
from niblick.evaluation.clock import Clock
from niblick.evaluation.hints import Hints
from niblick.evaluation.score import Progress, Record, Score, require_targets, score
from niblick.evaluation.validation import ValidationSet
from niblick.evaluation.windows import Window, rows_kept, sliding_windows
from niblick.model.config import ConfigError, EvalConfig
from niblick.model.gpt import GPT

RECENT = 8
"""Chunks whose probes the guard averages: 256 targets each differ by about 0.01 nats by chance."""


@dataclass(frozen=True)
class ScoreFirstConfig:
    """stop_above: nats a token by which the adapted model may be worse than that of the start, on the probe, the first
    windows of a chunk. frozen_blocks: so many first blocks are not trained."""

    learning_rate: float = 0.005
    momentum: float = 0.9
    clip: float = 1.0
    epochs: int = 3
    chunk_rows: int = 32_768
    frozen_blocks: int = 0
    stop_above: float = 0.05
    probe_windows: int = 4

    def __post_init__(self) -> None:
        for name, low, high in (
            ("learning_rate", 0, 1e6), ("momentum", 0, 1 - 1e-9), ("clip", 1e-30, 1e30), ("epochs", 1, 1000),
            ("chunk_rows", 1, 1e9), ("frozen_blocks", 0, 1e6), ("stop_above", 0, 1e30), ("probe_windows", 1, 1e6),
        ):  # fmt: skip
            if not low <= (value := getattr(self, name)) <= high:
                raise ConfigError(f"score-first: {name} must be in {low:g}..{high:g}: got {value}")


PR1413 = ScoreFirstConfig()
PR549 = replace(PR1413, learning_rate=0.002)
SCORE_FIRST = {
    "pr1413": PR1413,
    "pr1477": PR1413,
    "pr1514": PR1413,
    "pr549": PR549,
    "pr461": replace(PR549, frozen_blocks=2),
}
"""The published settings, the default first. (The rate of #461 is the one that #549 inherited.)"""


def score_first(
    model: GPT,
    data: ValidationSet,
    config: EvalConfig,
    settings: ScoreFirstConfig,
    *,
    hints: Hints | None = None,
    progress: Progress | None = None,
    record: Record | None = None,
    clock: Clock | None = None,
) -> Score:
    """The score; afterwards the model is what it was. Windows, tail and batches are those of `config`.

    hints tilt what is scored, never what is trained on. The rest is as in `score`; ConfigError also for packed weights.
    """
    require_dense(model, "score-first")
    clock = clock or Clock()
    n_rows = rows_kept(len(data.tokens), config.sequence_length, config.tail)
    windows = sliding_windows(n_rows, config.sequence_length, config.stride)
    require_targets(windows, len(data.tokens))
    chunks = chunks_of(windows, n_rows, settings.chunk_rows)
    with parameters_kept(model) as start:
        adaptation = _Adaptation(model, data, config, settings, hints, start, len(chunks), record)
        total = Score(0.0, 0, 0, 0.0)
        for chunk, windows in enumerate(chunks):
            probe, rest = windows[: settings.probe_windows], windows[settings.probe_windows :]
            with clock.part("score"):
                first = adaptation.score(probe, total.n_targets, progress, record=record, clock=clock)
                total = total.plus(first)
                left = () if total.partial else rest
                second = adaptation.score(left, total.n_targets, progress, record=record, clock=clock)
                total = total.plus(second)
            if total.partial:
                break
            if chunk < len(chunks) - 1:
                with clock.part("adapt"):
                    adaptation.go_on(chunk, probe, first, second)
            clock.foresee((chunk + 1) / len(chunks))
    return replace(total, notes=(adaptation.said(),))


def chunks_of(windows: Sequence[Window], n_rows: int, chunk_rows: int) -> list[list[Window]]:
    """The windows of each chunk; none for one whose rows a window that began before scores."""
    chunks: list[list[Window]] = [[] for _ in range(-(-n_rows // chunk_rows))]
    for window in windows:
        chunks[window.first_scored // chunk_rows].append(window)
    return chunks


def training_windows(chunk: int, chunk_rows: int, length: int) -> list[Window]:
    """The sequences of a chunk that is not the last; their targets are all scored when its windows are."""
    first = chunk * chunk_rows
    return [Window(row, row + length, row) for row in range(first, first + chunk_rows // length * length, length)]


class _Adaptation:
    """The optimizer, the guard, and why they stopped."""

    def __init__(
        self,
        model: GPT,
        data: ValidationSet,
        config: EvalConfig,
        settings: ScoreFirstConfig,
        hints: Hints | None,
        start: list[Tensor],
        n_chunks: int,
        record: Record | None,
    ) -> None:
        self.model, self.data, self.config, self.settings, self.hints = model, data, config, settings, hints
        self.start, self.n_chunks, self.trained, self.stopped = start, n_chunks, 0, ""
        self.worse: deque[float] = deque(maxlen=RECENT)
        self.optimizer = torch.optim.SGD(model.parameters(), settings.learning_rate, settings.momentum, foreach=True)
        self.n_rows = rows_kept(len(data.tokens), config.sequence_length, config.tail)
        self.updated = getattr(record, "updated", lambda targets: None)

    def score(
        self, windows: Sequence[Window], before: int = 0, progress: Progress | None = None, **options: object
    ) -> Score:
        """before: targets that were scored already, to which `progress` adds."""
        if not windows:
            return Score(0.0, 0, 0, 0.0)
        return score(
            self.model,
            self.data.tokens,
            self.data.byte_counts,
            windows,
            tokens_per_batch=self.config.tokens_per_batch,
            hints=self.hints,
            progress=progress and (lambda done, _: progress(before + done, self.n_rows)),
            foresee=False,
            **options,
        )

    def go_on(self, chunk: int, probe: Sequence[Window], first: Score, rest: Score) -> None:
        """After a chunk was scored, its probe and its rest: train on it, unless the guard has stopped or stops now."""
        if self.stopped:
            return
        nll = first.nll + rest.nll
        reason = f"its loss is {nll}" if not math.isfinite(nll) else ""
        frozen = self._of_the_start(probe) if self.trained and probe and not reason else first
        if probe and not reason:
            self.worse.append(first.nats_per_token - frozen.nats_per_token)
            reason = self._beyond(sum(self.worse) / len(self.worse), "on text new to it")
        reason = reason or self._train(chunk)
        if probe and not reason:
            worse = self.score(probe).nats_per_token - frozen.nats_per_token
            reason = self._beyond(worse, "on text that it was trained on")
        if reason:
            set_parameters(self.model, self.start)
            self.stopped = f"stopped at chunk {chunk} of {self.n_chunks}: {reason}; from there on scored without it"

    def _beyond(self, worse: float, where: str) -> str:
        if worse <= self.settings.stop_above:
            return ""
        return f"the adapted model is {worse:.3g} nats a token worse than without, {where}"

    def _of_the_start(self, probe: Sequence[Window]) -> Score:
        adapted = copy_parameters(self.model)
        set_parameters(self.model, self.start)
        frozen = self.score(probe)
        set_parameters(self.model, adapted)
        return frozen

    def _train(self, chunk: int) -> str:
        """The epochs of one chunk; why they ended early, or nothing."""
        settings = self.settings
        windows = training_windows(chunk, settings.chunk_rows, self.config.sequence_length)
        if not windows:
            return ""
        rate = settings.learning_rate * half_cosine(chunk / (self.n_chunks - 1))
        self.optimizer.param_groups[0]["lr"] = rate
        targets = np.arange(windows[0].start + 1, windows[-1].end + 1)
        self.model.train()
        for _ in range(settings.epochs):
            mean_gradients(self.model, self.data.tokens, windows, self.config.tokens_per_batch)
            freeze_first_blocks(self.model, settings.frozen_blocks)
            norm = clip_gradients(self.model, settings.clip)
            if not math.isfinite(norm):
                return f"its gradient's norm is {norm}"
            self.optimizer.step()
            self.updated(targets)
        self.trained += 1
        return ""

    def said(self) -> str:
        done = f"adaptation: {self.trained} of {self.n_chunks} chunks trained on, the last one never is"
        return f"adaptation: {self.stopped}" if self.stopped else done
