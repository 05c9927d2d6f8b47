"""Phased test-time training: a document is scored chunk by chunk, by a model that has learnt from its earlier chunks.

A batch of documents is scored side by side, each with low-rank adapters of its own (`lora`). A chunk is scored by one
forward; only then its losses give the adapters one step; after a document's last chunk there is none. Between batches,
phases of steps on all weights (`global_sgd`) learn from documents whose scores are final. No score is computed twice,
and none is by a state that has used its target (PR #1530, #1610, #1626 of the challenge; variants in `PHASED`).

The published order, longest document first, is a permutation of the corpus made from lengths, that is from places of
BOS tokens that lie ahead. What a token is scored with then depends on where its document ends, and weights used for a
document may have seen later ones; with n-gram hints, which read the corpus left to right, dependencies become circular.
In `corpus` order none of it holds (see PhasedConfig).

A document of n chunks is n steps one after another, and nothing of a window's forward can be kept for the next, since
the adapters change between. So the batch of the longest documents (up to 97,114 tokens, 2,024 steps) decides how long
other ranks wait at the first phase. What is done about it: it is the first in the queue, the other ranks go on with
theirs meanwhile, and documents that have ended leave the batch, so that most of those steps are of one or two rows; the
published scripts compute all 16 rows to the end.
"""

import time
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from niblick.evaluation import ranks
from niblick.evaluation.adaptation import parameters_kept, require_dense
from niblick.evaluation.chunk_step import OFTEN, ChunkStep, Shape
from niblick.evaluation.claims import Claims
from niblick.evaluation.clock import Clock
from niblick.evaluation.documents import Batch, Documents, chunk_counts, queue_of
from niblick.evaluation.global_sgd import sgd_cost, sgd_phase
from niblick.evaluation.hints import Hints
from niblick.evaluation.lora import LoRA
from niblick.evaluation.phased_batch import BatchScorer, BatchScores, shape_of
from niblick.evaluation.phased_config import PHASED, PhasedConfig, check
from niblick.evaluation.phased_plan import Plan, plan
from niblick.evaluation.score import Progress, Record, Score, check_tilt
from niblick.evaluation.validation import ValidationSet
from niblick.model.config import ConfigError
from niblick.model.gpt import GPT
from niblick.model.rehearsal import alongside

__all__ = ["PHASED", "PhasedConfig", "phased_score"]

COMMON = 40
"""Shapes of steps that are captured before the first document."""


def phased_score(
    model: GPT,
    data: ValidationSet,
    config: PhasedConfig,
    *,
    hints: Hints | None = None,
    progress: Progress | None = None,
    record: Record | None = None,
    clock: Clock | None = None,
) -> Score:
    """Score every target of the stream once; the model is afterwards what it was.

    data: a stream that begins with a document. hints: of the whole stream; the score is tilted, the steps are not.
    progress: called with the targets scored so far, by all ranks, and all of them. record: called with the targets of
    each chunk of each document, int64, and their losses, float32, and `record.updated`, if there is one, with the
    targets that a step used; on several ranks with what this rank did. A batch's documents are told of one after
    another when all are done, as they lie in the corpus: they know nothing of each other.
    clock: its parts are "precompute", "compile" (what is launched on random ids, and the capture of graphs), "score"
    (documents; their scores and steps come from one pass) and "adapt" (steps on all weights). Where it says stop, what
    was scored by then is the result, marked as partial; it is also asked whether the rest will fit (OverBudget).

    A batch whose adaptation diverges goes on without, a phase that diverges is undone; the score's notes say so.
    ConfigError for packed weights, a stream that does not begin with a document, or hints for a model with two caps.
    """
    began = time.perf_counter()
    _check(model, data, config, hints)
    with parameters_kept(model):
        model.eval().requires_grad_(False)
        score = _Run(model, data, config, hints, progress, record, clock or Clock()).everything()
    return replace(score, seconds=time.perf_counter() - began)


def _check(model: GPT, data: ValidationSet, config: PhasedConfig, hints: Hints | None) -> None:
    require_dense(model, "phased")
    check(model.config, config)
    if len(data.tokens) < 2 or data.tokens[0] != model.config.bos_id:
        raise ConfigError(
            f"phased: expected a stream of at least 2 tokens that begins with a document (id {model.config.bos_id}),"
            f" found {len(data.tokens)} that begin with {data.tokens[:1].tolist()}"
        )
    if hints is not None:
        check_tilt(model.config)
    if model.ngram_bias is not None:
        raise ConfigError("phased: expected a model without n-gram tables, which its adapters' logits would lack")


class _Run:
    def __init__(self, model, data, config, hints, progress, record, clock) -> None:
        self.model, self.data, self.config, self.hints = model, data, config, hints
        self.progress, self.clock = progress, clock
        self.record = record or (lambda targets, losses: None)
        self.updated = getattr(record, "updated", lambda targets: None)
        self.claims, self.stopped = Claims(), ""
        self.sums, self.gave_up, self.undone = np.zeros(4), [], []
        """Nats, targets, bytes, batches that gave up their adaptation."""
        with clock.part("precompute"):
            self.documents = Documents.of(data.tokens, model.config.bos_id)
            self.queue = queue_of(self.documents, config)
            self.before = np.cumsum([0, *(len(batch.documents) for batch in self.queue)])
            """Documents that were claimed before each batch of the queue."""
            self.shapes = [self._shapes(batch) for batch in self.queue]
            self.due = [b for b in config.boundaries if b <= self.before[len(self.queue) - 1]]
            self.plan, self.way = self._plan(), 0.0
            """And how far along it this rank is."""

    def everything(self) -> Score:
        """What all ranks have scored together; the seconds are left open."""
        self._prepare()
        self.clock.foresee(0.0)
        self._stop()
        self._work_through()
        sums = torch.from_numpy(self.sums).to(self.model.embedding.device)
        ranks.sum_over_ranks([sums])
        nll, n_targets, n_bytes, n_gave_up = sums.tolist()
        partial = "" if n_targets == len(self.data.tokens) - 1 else self.stopped or "another rank stopped"
        return Score(nll, int(n_targets), int(n_bytes), 0.0, partial, self._notes(int(n_gave_up)))

    def _notes(self, n_gave_up: int) -> tuple[str, ...]:
        notes = list(self.undone)
        if n_gave_up:
            of_all = f"{n_gave_up} of {len(self.queue)} batches of documents diverged and were scored on without it"
            notes.append("; ".join([f"adaptation: {of_all}", *self.gave_up[:1]]))
        return tuple(notes)

    # ---- before ---------------------------------------------------------------------------------------------------

    def _shapes(self, batch: Batch) -> list[Shape]:
        m = chunk_counts(self.documents, batch)
        return [shape_of(batch, number, m, self.config) for number in range(int(m.max()))]

    def _place(self, boundary: int) -> int:
        """Of the first batch that is scored after a phase."""
        return int(np.searchsorted(self.before, boundary))

    def _chosen(self, boundary: int) -> np.ndarray:
        """What a phase learns from: the first `boundary` of the scored documents, by batch index, then place in it. In
        the published order these are the shortest of those scored so far."""
        by_index = sorted(self.queue[: self._place(boundary)], key=lambda batch: batch.index)
        return np.concatenate([batch.documents[np.argsort(batch.rows)] for batch in by_index])[:boundary]

    def _plan(self) -> Plan:
        n_ranks, lengths = ranks.place()[1], self.documents.targets + 1
        phases = [sgd_cost(int(lengths[self._chosen(b)].sum()), self.config, n_ranks) for b in self.due]
        batches = [sum(shape.cost for shape in shapes) for shapes in self.shapes]
        return plan(batches, list(zip(map(self._place, self.due), phases, strict=True)), n_ranks)

    def _prepare(self) -> None:
        with self.clock.part("compile"):
            lora = LoRA(self.model, self.config)
            step = ChunkStep(self.model, lora, len(self.data.tokens), hints=self.hints is not None)
            if self.model.embedding.is_cuda:
                # A batch's last chunk is not stepped on; what is rare makes do with these, or is captured as it comes.
                found = Counter(shape for shapes in self.shapes for shape in shapes[:-1])
                with alongside([partial(step.rehearse, shape) for shape in list(found)[:1]]):
                    for rows in {self.config.documents, 1}:  # compiled apart
                        lora.step(rows)
                step.warm_up([shape for shape, times in found.most_common(COMMON) if times > OFTEN])
        with self.clock.part("precompute"):
            step.load(self.data.tokens, self.hints)
        self.scorer = BatchScorer(self.documents, self.config, lora, step)

    # ---- the queue --------------------------------------------------------------------------------------------------

    def _work_through(self) -> None:
        """Batches as they are claimed. A batch waits for every phase whose documents were all claimed before it: so it
        does not depend on the race between ranks which weights score it, nor which documents a phase learns from.

        A rank that stops claims no more, but takes part in the next phase, where the others learn of it; then there is
        none for any rank, as all must do the same.
        """
        due = self.due
        while True:
            place = len(self.queue) if self.stopped else self.claims.next()
            while due and (place >= len(self.queue) or due[0] <= self.before[place]):
                due = due[1:] if self._phase(due[0]) else []
            if place >= len(self.queue) or self.stopped:
                return
            with self.clock.part("score"):
                self._report(self.scorer.score(self.queue[place], partial(self._before, place)), place)

    def _before(self, place: int, number: int) -> str:
        """Whether to stop before this chunk of this batch."""
        if number:
            self._go_to(self.way + self.shapes[place][number - 1].cost)
        return self._stop()

    def _go_to(self, way: float) -> None:
        self.way = max(self.way, way)
        if not self.stopped:
            self.clock.foresee(self.way / self.plan.length)

    def _stop(self) -> str:
        self.stopped = self.stopped or self.clock.stop()
        return self.stopped

    def _phase(self, boundary: int) -> bool:
        """Steps on all weights. False, and none, if any rank has stopped."""
        stops = torch.tensor(float(bool(self.stopped)), device=self.model.embedding.device)
        ranks.sum_over_ranks([stops])  # and wait until the last of their scores is final
        if stops:
            self.stopped = self.stopped or "another rank stopped"
            return False
        with self.clock.part("adapt"):
            chosen = self._chosen(boundary)
            places = [np.arange(s, s + n + 1) for s, n in zip(*(x[chosen] for x in self.documents), strict=True)]
            failed = sgd_phase(self.model, self.data.tokens[np.concatenate(places)], self.config)
            if failed:
                self.undone.append(f"adaptation: the phase after {boundary} documents was undone: {failed}")
            else:
                self.updated(np.concatenate([place[1:] for place in places]))
            self.scorer.renew()
        self._go_to(self.plan.ends[self.due.index(boundary)])
        return True

    def _report(self, scores: BatchScores, place: int) -> None:
        batch = scores.batch
        for i in np.argsort(batch.documents):
            start, losses = int(self.documents.starts[batch.documents[i]]), scores.losses[i]
            targets = np.arange(start + 1, start + 1 + len(losses))
            n_bytes = int(self.data.byte_counts[targets].sum(dtype=np.int64))
            self.sums += losses.sum(dtype=np.float64), len(targets), n_bytes, 0
            for what, *event in scores.of_document(i, targets):
                (self.record if what == "scored" else self.updated)(*event)
        if scores.gave_up:
            self.sums[3] += 1
            self.gave_up.append(scores.gave_up)
        scored = self.claims.add("targets", sum(map(len, scores.losses)))
        if self.progress:
            self.progress(scored, len(self.data.tokens) - 1)
        self._go_to(self.way + self.shapes[place][-1].cost)
