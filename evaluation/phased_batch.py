"""A batch of documents side by side, chunk by chunk: score, then one step of the adapters with what was scored.

Losses are fetched while the next chunk is computed. Where the adaptation has diverged, that next chunk is computed
again without adapters, as are all further ones of the batch: what decides it was scored before. Divergence is a chunk
that costs more than without adapters; whether it does is looked at where the losses have grown, and now and then.
Losses that are no numbers are so because the logits are none, whatever the target; the model without adapters stands
in for them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from niblick.evaluation.chunk_step import ChunkStep, Fetched, Shape
from niblick.evaluation.documents import Batch, Chunk, Documents, chunk_counts, chunk_of, rows_for, width_for
from niblick.evaluation.lora import LoRA
from niblick.evaluation.phased_config import PhasedConfig

Event = tuple[str, np.ndarray, np.ndarray] | tuple[str, np.ndarray]
"""("scored", targets, losses) or ("stepped", targets) of one document."""


class _Launched(NamedTuple):
    """Chunk `number` of a batch's last documents, their windows, and the losses (rows, columns) under way."""

    number: int
    chunk: Chunk
    losses: Fetched


@dataclass
class BatchScores:
    """losses: of each document, of all its targets unless the batch was stopped. events: ("scored" or "stepped",
    chunk), as they happened. gave_up: why it went on without adapters, or nothing."""

    batch: Batch
    losses: list[np.ndarray]
    events: list[tuple[str, int]]
    gave_up: str = ""

    def of_document(self, i: int, targets: np.ndarray) -> list[Event]:
        """The events of document i of the batch, whose targets these are."""
        events: list[Event] = []
        for what, number in self.events:
            chunk = slice(number * self.batch.chunk, (number + 1) * self.batch.chunk)
            if what == "scored" and chunk.start < len(targets):
                events.append((what, targets[chunk], self.losses[i][chunk]))
            if what == "stepped" and chunk.stop < len(targets):
                events.append((what, targets[chunk]))
        return events


def shape_of(batch: Batch, number: int, m: np.ndarray, config: PhasedConfig) -> Shape:
    """Of a step with chunk `number` of a batch whose documents have m chunks each, ascending."""
    active = len(m) - int(np.searchsorted(m, number, side="right"))
    width = width_for(number, batch.chunk, config.window)
    return Shape(rows_for(active, config.documents), width, batch.chunk, True)


class BatchScorer:
    """One rank's adapters, from batch to batch."""

    def __init__(self, documents: Documents, config: PhasedConfig, lora: LoRA, step: ChunkStep) -> None:
        self.documents, self.config, self.lora, self.step = documents, config, lora, step
        self._n_phases = -1
        self.renew()

    def renew(self) -> None:
        """The model's weights are others: so are the adapters."""
        self.lora.refresh()
        self._decay: np.ndarray | None = None
        """Factors that the A of each row have yet to be given; None where they are not to be handed on."""
        self._n_phases += 1

    def score(self, batch: Batch, stop: Callable[[int], object]) -> BatchScores:
        """`stop` is asked before each chunk, with its number, whether to end here."""
        m = chunk_counts(self.documents, batch)
        self._batch, self._m, self._means, self._level = batch, m, [], 0.0
        self._losses: list[list[np.ndarray]] = [[] for _ in m]
        self._begin(batch)
        self._scores = BatchScores(batch, [], [])
        self._n_steps, previous = np.zeros(self.config.documents, int), None
        for number in range(int(m.max())):
            if stop(number):
                break
            launched = self._chunk(number)
            if previous and not self._settle(previous):
                launched = self._chunk(number)
            previous = launched
        if previous:
            self._settle(previous)
        # Rows that took no part in a step miss its decay; so it makes no difference how many did.
        missed = self._n_steps.max() - self._n_steps
        if not self._scores.gave_up:
            self._decay = (1 - self.config.lr * self.config.weight_decay) ** missed
        self._scores.losses = [np.concatenate([np.empty(0, np.float32), *losses]) for losses in self._losses]
        return self._scores

    def _begin(self, batch: Batch) -> None:
        """Adapters for new documents.

        In corpus order no A is handed on, but the same ones serve every batch where they are kept: a batch would else
        depend on those that the same rank had before. And there a document has a claim to the A of its place in the
        queue: rows are sorted by length, which must not decide it.
        """
        config, n = self.config, len(batch.documents)
        kept, source = config.a_at_reset == "kept", np.arange(config.documents)
        factors = self._decay
        if not kept or config.order == "corpus" or factors is None or n != self._n_documents:
            self.lora.draw(config.seed * 1_000_003 + (self._n_phases if kept else batch.index))
            source, factors = np.concatenate([np.setdiff1d(source, batch.rows), batch.rows]), np.ones(len(source))
        if (source != np.arange(config.documents)).any() or (factors != 1).any():
            device, dtype = self.lora.master.device, self.lora.master.dtype
            self.lora.rearrange(torch.from_numpy(source).to(device), torch.from_numpy(factors).to(device, dtype))
        self.lora.reset()
        self._n_documents = n

    def _chunk(self, number: int) -> _Launched:
        """Score a chunk; then, where any document goes on, a step with what was scored."""
        scores, batch, m = self._scores, self._batch, self._m
        goes_on = not scores.gave_up and number + 1 < int(m.max())
        shape = shape_of(batch, number, m, self.config)._replace(steps=goes_on)
        still = batch._replace(documents=batch.documents[m > number])
        chunk = chunk_of(self.documents, still, number, shape.width, self.config)
        launched = _Launched(number, chunk, self._score(number, chunk, shape))
        if goes_on:
            self._step(number, shape.rows)
        return launched

    def _score(self, number: int, chunk: Chunk, shape: Shape) -> Fetched:
        self._scores.events.append(("scored", number))
        return self.step(chunk, shape)

    def _step(self, number: int, rows: int) -> None:
        self._scores.events.append(("stepped", number))
        self.lora.step(rows)
        self._n_steps[-rows:] += 1

    def _settle(self, launched: _Launched) -> bool:
        """Takes in the losses of a chunk. False where they show divergence: the adapters are then silent."""
        losses = _losses_of(launched)
        reason = "" if self._scores.gave_up else self._divergence(launched, float(np.concatenate(losses).mean()))
        if reason:
            self._scores.gave_up = f"batch {self._batch.index}, chunk {launched.number}: {reason}"
            self._decay = None
            self.lora.silence()
            finite = np.isfinite(self._means[-1])
            end = launched.number + (1 if finite else 0)  # what came after it counts for nothing
            self._scores.events = [event for event in self._scores.events if event[1] < end]
            if not finite:
                losses = _losses_of(self._chunk(launched.number))
        for kept, new in zip(self._losses[len(self._losses) - len(losses) :], losses, strict=True):
            kept.append(new)
        return not reason

    def _divergence(self, launched: _Launched, mean: float) -> str:
        """What shows it, or nothing. mean: of the chunk's losses."""
        config, number = self.config, launched.number
        self._means.append(mean)
        if not np.isfinite(mean):
            return f"{mean} nats a token"
        recent = float(np.mean(self._means[-config.patience :]))
        at_times = number >= 8 and number & (number - 1) == 0
        if not number or (recent <= config.suspicious * self._level and not at_times):
            self._level = self._level or recent
            return ""
        self._level = max(self._level, recent)
        shape = shape_of(self._batch, number, self._m, config)._replace(steps=False, adapted=False)
        without = launched._replace(losses=self.step(launched.chunk, shape))
        plain = float(np.concatenate(_losses_of(without)).mean())
        return "" if mean <= plain + config.diverged else f"{mean:.4g} nats a token, {plain:.4g} without it"


def _losses_of(launched: _Launched) -> list[np.ndarray]:
    """Of each document of the chunk, its losses."""
    chunk = launched.chunk
    rows = launched.losses.get()[-len(chunk.start) :]
    places = zip(rows, chunk.scored - chunk.first, chunk.length - chunk.first, strict=True)
    return [row[first:end].copy() for row, first, end in places]
