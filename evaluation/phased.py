"""Phased test-time training: each document is scored chunk by chunk, by a model that has learnt from its earlier chunks.

A batch of documents is scored side by side, each with low-rank adapters of its own (`lora`). A chunk is scored by one
forward; only then its losses give the adapters one step; after a document's last chunk there is none. Between batches,
phases of steps on all weights (`global_sgd`) learn from documents whose scores are final. No score is computed twice, and
none is by a state that has used its target (PR #1530, #1610, #1626 of the challenge; variants in `PHASED`).

The published order, longest document first, is a permutation of the corpus made from lengths, that is from places of BOS
tokens that lie ahead. What a token is scored with then depends on where its document ends, and weights used for a
document may have seen later ones; with n-gram hints, which read the corpus left to right, dependencies become circular.
In `corpus` order none of it holds (see PhasedConfig).

A document of n chunks is n steps one after another, and nothing of a window's forward can be kept for the next, since the
adapters change between. So the batch of the longest documents (up to 97,114 tokens, 2,024 steps) decides how long other
ranks wait at the first phase. What is done about it: it is the first in the queue, the other ranks go on with theirs
meanwhile, and documents that have ended leave the batch, so that most of those steps are of one or two rows; the
published scripts compute all 16 rows to the end.

Losses are fetched while the next chunk is computed. Where they show that an adaptation has diverged, that next chunk is
computed again without adapters, as are all further ones of the batch. What decides it was scored before.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple, Protocol

import numpy as np
import torch

from niblick.evaluation.chunk_step import LAUNCHED, ChunkStep, Fetched, Shape
from niblick.evaluation.documents import Batch, Chunk, Documents, chunk_of, chunks_of, queue_of, rows_for, width_for
from niblick.evaluation.global_sgd import sgd_phase
from niblick.evaluation.hints import Hints
from niblick.evaluation.lora import LoRA
from niblick.evaluation.phased_config import PHASED, PhasedConfig
from niblick.evaluation.claims import Ranks
from niblick.evaluation.run import ValidationSet
from niblick.evaluation.score import Score, _check_tilt
from niblick.model.config import ConfigError
from niblick.model.gpt import GPT

__all__ = ["PHASED", "PhasedConfig", "phased_score"]

COMMON = 64
"""Shapes that are captured before the first document."""

Event = tuple[str, np.ndarray, np.ndarray | None]
"""("scored", targets, losses) or ("stepped", targets, None) of one document."""


class Journal(Protocol):
    """Told what was done, for an audit."""

    def document(self, row: int, inherits: bool, events: list[Event]) -> None:
        """One document, with the adapters of `row`; inherits: its matrices A come from the row's last document."""

    def phase(self, targets: np.ndarray) -> None:
        """Steps on all weights used these targets."""


def phased_score(
    model: GPT,
    data: ValidationSet,
    config: PhasedConfig,
    *,
    hints: Hints | None = None,
    progress: Callable[[int, int], None] | None = None,
    record: Callable[[np.ndarray, np.ndarray], object] | None = None,
    clock: object | None = None,
    journal: Journal | None = None,
) -> Score:
    """Score every target of the stream once; the model's weights are afterwards as they were.

    data: a stream that begins with a document. hints: of the whole stream; the score is tilted, the steps are not.
    progress: called with the targets scored so far, by all ranks, and all of them. record: called after each batch with
    the targets of each of its documents, int64, and their losses, float32; on several ranks with those of this rank.
    clock: `clock.part(name)` is entered for "precompute", "compile" (what is launched on random ids, and the capture of
    graphs), "score" (documents; their scores and steps come from one pass) and "adapt" (steps on all weights).

    A batch whose adaptation diverges goes on without; a phase that diverges is undone; each is a warning. ConfigError for
    packed weights, a stream that does not begin with a document, or hints for a model with two softcaps.
    """
    began = time.perf_counter()
    run = _Run(model, data, config, hints, progress, record, clock, journal)
    nll, n_targets, n_bytes = run.everything()
    return Score(nll, n_targets, n_bytes, time.perf_counter() - began)


class _Launched(NamedTuple):
    """Chunk `number` of a batch's last documents, their windows, and the losses (rows, columns) under way."""

    number: int
    chunk: Chunk
    losses: Fetched


class _Run:
    def __init__(self, model, data, config, hints, progress, record, clock, journal) -> None:
        self.model, self.data, self.config, self.hints = model, data, config, hints
        self.progress, self.record, self.journal = progress, record, journal
        self.part = clock.part if clock else lambda name: nullcontext()
        self.ranks = Ranks()
        _check(model, data, hints)
        with self.part("precompute"):
            self.documents = Documents.of(data.tokens, model.config.bos_id)
            self.queue = queue_of(self.documents, config)
            sizes = [len(batch.documents) for batch in self.queue]
            self.before = np.cumsum([0, *sizes])
            """Documents that were claimed before each batch of the queue."""
        self.sums, self.n_scored = np.zeros(3), 0  # nll, targets, bytes
        self.rows: np.ndarray | None = None
        """Whose A each row of the adapters holds, by place in the queue; None where the next batch draws new ones."""
        self.n_phases, self.n_rows = 0, 0

    # ---- the whole stream ---------------------------------------------------------------------------------------

    def everything(self) -> tuple[float, int, int]:
        """Sums over all ranks: nats, targets, bytes."""
        model = self.model
        before = {name: p.detach().clone() for name, p in model.named_parameters()} if self.config.phases else {}
        was_training, wanted = model.training, [p.requires_grad for p in model.parameters()]
        model.eval().requires_grad_(False)
        try:
            self._prepare()
            self._work_through()
        finally:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(before.get(name, p))
            for p, kept in zip(model.parameters(), wanted, strict=True):
                p.requires_grad_(kept)
            model.train(was_training)
        sums = torch.from_numpy(self.sums).to(model.embedding.device)
        nll, n_targets, n_bytes = self.ranks.sum(sums).tolist()
        return nll, int(n_targets), int(n_bytes)

    def _prepare(self) -> None:
        with self.part("compile"):
            self.lora = LoRA(self.model, self.config)
            self.step = ChunkStep(self.model, self.lora, len(self.data.tokens), hints=self.hints is not None)
            if self.model.embedding.is_cuda:
                self.step.warm_up(self._common_shapes())
                self.lora.step(len(self.lora.master))
        with self.part("precompute"):
            self.step.load(self.data.tokens, self.hints)

    def _common_shapes(self) -> list[Shape]:
        """Those of most steps; others are captured when they recur."""
        found: Counter[Shape] = Counter()
        for batch in self.queue:
            m = chunks_of(self.documents, batch)
            found.update(self._shape(batch, number, m) for number in range(int(m.max()) - 1))
        return [shape for shape, times in found.most_common(COMMON) if times > LAUNCHED]

    def _shape(self, batch: Batch, number: int, m: np.ndarray) -> Shape:
        """Of a chunk after which a document goes on, of a batch whose documents have m chunks each, ascending."""
        active = len(m) - int(np.searchsorted(m, number, side="right"))
        width = width_for(number, batch.chunk, self.config.window)
        return Shape(rows_for(active, self.config.documents), width, batch.chunk, True)

    def _work_through(self) -> None:
        """Batches as they are claimed. A batch waits for every phase whose documents were all claimed before it: so it
        does not depend on the race between ranks which weights score it, nor which documents a phase learns from."""
        due = [b for b in self.config.boundaries if b <= self.before[len(self.queue) - 1]]
        while True:
            place = self.ranks.claim()
            while due and (place >= len(self.queue) or due[0] <= self.before[place]):
                self._phase(due.pop(0))
            if place >= len(self.queue):
                return
            with self.part("score"):
                self._score(self.queue[place])

    # ---- a phase --------------------------------------------------------------------------------------------------

    def _phase(self, boundary: int) -> None:
        """Steps on all weights with the first `boundary` of the scored documents, by batch index, then place in it: in
        the published order these are the shortest of those scored so far."""
        self.ranks.barrier()  # until the last of their scores is final
        with self.part("adapt"):
            claimed = self.queue[: int(np.searchsorted(self.before, boundary))]
            chosen = [np.sort(batch.documents) if self.config.order == "corpus" else batch.documents
                      for batch in sorted(claimed, key=lambda batch: batch.index)]  # fmt: skip
            chosen = np.concatenate(chosen)[:boundary]
            places = [
                np.arange(start, start + n + 1)
                for start, n in zip(*(x[chosen] for x in self.documents), strict=True)
            ]
            places = np.concatenate(places)
            if sgd_phase(self.model, self.data.tokens[places], self.config, self.ranks) and self.journal:
                self.journal.phase(places[places > 0])
            self.lora.refresh()
            self.rows = None
            self.n_phases += 1

    # ---- a batch ----------------------------------------------------------------------------------------------------

    def _score(self, batch: Batch) -> None:
        m, inherits = chunks_of(self.documents, batch), self._begin(batch)
        self.alive, self.means, self.events = True, [], []
        self.losses: list[list[np.ndarray]] = [[] for _ in batch.documents]
        self.n_steps, previous = np.zeros(self.config.documents, int), None
        for number in range(int(m.max())):
            launched = self._chunk(batch, number, m)
            if previous and not self._settle(batch, previous, m):
                launched = self._chunk(batch, number, m)
            previous = launched
        self._settle(batch, previous, m)
        # Rows that took no part in a step miss its decay; so it makes no difference how many did.
        missed = self.n_steps.max() - self.n_steps
        self.idle = (1 - self.config.lr * self.config.weight_decay) ** missed
        self._report(batch, inherits)

    def _begin(self, batch: Batch) -> bool:
        """Adapters for new documents: whether their A come from others.

        Rows of the adapters are sorted by the documents' lengths, but who inherits whose A is decided by places in the
        queue: in corpus order a length must not decide it.
        """
        config, n = self.config, len(batch.documents)
        rows = np.concatenate([np.setdiff1d(np.arange(config.documents), batch.rows), batch.rows])
        changed = config.order == "longest-first" and self.rows is not None and n != self.n_rows
        inherits = config.a_at_reset == "kept" and self.rows is not None and not changed
        if not inherits:
            # The same whichever rank takes the batch.
            number = batch.index if config.a_at_reset == "redrawn" else self.n_phases
            self.lora.draw(config.seed * 1_000_003 + number)
            self.rows, self.idle = np.arange(config.documents), np.ones(config.documents)
        source = np.argsort(self.rows)[rows]
        device = self.lora.master.device
        self.lora.rearrange(
            torch.from_numpy(source).to(device), torch.from_numpy(self.idle[source]).to(self.lora.master)
        )
        self.lora.reset()
        self.rows, self.n_rows = rows, n
        return inherits

    def _chunk(self, batch: Batch, number: int, m: np.ndarray) -> _Launched:
        """Score a chunk; then, where any document goes on, a step with what was scored."""
        going = self.alive and number + 1 < int(m.max())
        shape = self._shape(batch, number, m)._replace(steps=going)
        still = batch._replace(documents=batch.documents[m > number])
        chunk = chunk_of(self.documents, still, number, shape.width, self.config)
        self.events = [event for event in self.events if event[1] != number]  # of a launch that was given up
        launched = _Launched(number, chunk, self._scored(number, chunk, shape))
        if going:
            self._stepped(number, shape.rows)
        return launched

    def _scored(self, number: int, chunk: Chunk, shape: Shape) -> Fetched:
        self.events.append(("scored", number))
        return self.step(chunk, shape)

    def _stepped(self, number: int, rows: int) -> None:
        self.events.append(("stepped", number))
        self.lora.step(rows)
        self.n_steps[-rows:] += 1

    def _settle(self, batch: Batch, launched: _Launched, m: np.ndarray) -> bool:
        """Takes in the losses of a chunk. False where they show divergence: the adapters are then silent, and losses
        that are no numbers are those of the model without them."""
        losses = _losses_of(launched)
        fell = self.alive and self._diverged(np.concatenate(losses))
        if fell:
            warnings.warn(
                f"the adaptation of batch {batch.index} of documents diverged in chunk {launched.number} "
                f"({self.means[-1]:.4g} nats a token, {self.means[0]:.4g} in the first): it goes on without",
                stacklevel=2,
            )
            self.alive, self.rows = False, None
            self.lora.silence()
            if not np.isfinite(self.means[-1]):
                losses = _losses_of(self._chunk(batch, launched.number, m))
        for kept, new in zip(self.losses[len(self.losses) - len(losses) :], losses, strict=True):
            kept.append(new)
        return not fell

    def _diverged(self, losses: np.ndarray) -> bool:
        self.means.append(float(losses.mean(dtype=np.float64)))
        recent = np.mean(self.means[-self.config.patience :])
        return not recent <= self.config.diverged * self.means[0]

    def _report(self, batch: Batch, inherits: bool) -> None:
        """The batch's documents, as they lie in the corpus: they know nothing of each other."""
        for i in np.argsort(batch.documents):
            start, n = (int(x[batch.documents[i]]) for x in self.documents)
            targets, losses = np.arange(start + 1, start + n + 1), np.concatenate(self.losses[i])
            n_bytes = int(self.data.byte_counts[targets].sum(dtype=np.int64))
            self.sums += losses.sum(dtype=np.float64), n, n_bytes
            if self.record:
                self.record(targets, losses)
            if self.journal:
                self.journal.document(int(batch.rows[i]), inherits, self._events(batch.chunk, targets, losses))
        done = self.ranks.done(int(self.documents.targets[batch.documents].sum()))
        if self.progress:
            self.progress(done, len(self.data.tokens) - 1)

    def _events(self, size: int, targets: np.ndarray, losses: np.ndarray) -> list[Event]:
        """Of one document, in the order in which they happened."""
        events: list[Event] = []
        for what, number in self.events:
            chunk = slice(number * size, (number + 1) * size)
            if what == "scored" and chunk.start < len(targets):
                events.append((what, targets[chunk], losses[chunk]))
            if what == "stepped" and chunk.stop < len(targets):
                events.append((what, targets[chunk], None))
        return events


def _losses_of(launched: _Launched) -> list[np.ndarray]:
    """Of each document of the chunk, its losses."""
    chunk = launched.chunk
    rows = launched.losses.get()[-len(chunk.start) :]
    places = zip(rows, chunk.scored - chunk.first, chunk.length - chunk.first, strict=True)
    return [row[first:end] for row, first, end in places]


def _check(model: GPT, data: ValidationSet, hints: Hints | None) -> None:
    if len(data.tokens) < 2 or data.tokens[0] != model.config.bos_id:
        raise ConfigError(
            f"test-time training expected a stream of at least 2 tokens that begins with a document (id "
            f"{model.config.bos_id}), found {len(data.tokens)} that begin with {data.tokens[:1].tolist()}"
        )
    if hints is not None:
        _check_tilt(model.config)
