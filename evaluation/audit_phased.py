"""Phased test-time training as a scorer for the audit."""

import numpy as np

from niblick.data.tokenizer import ByteTable
from niblick.evaluation.audit_own import ModelScorer
from niblick.evaluation.clock import Clock
from niblick.evaluation.hints import token_hints
from niblick.evaluation.phased import phased_score
from niblick.evaluation.phased_config import PhasedConfig
from niblick.evaluation.score import Record, Score
from niblick.evaluation.validation import ValidationSet
from niblick.model.config import EvalConfig, TiltVersion
from niblick.model.gpt import GPT


class PhasedScorer(ModelScorer):
    """A model under phased test-time training; what is offered is in audit_protocol. table: bytes per token."""

    distributions = None
    """Not offered: they pass with the adapters that made them."""

    def __init__(
        self, model: GPT, config: PhasedConfig, *, tilt: TiltVersion | None = None, table: ByteTable | None = None
    ) -> None:
        super().__init__(model, EvalConfig(), tilt=tilt, table=table)
        self.phased = config
        # Of the parameters, only phases move any; and a document learns of others by them, or by A that are handed on.
        self.levers = tuple(name for name, _ in model.named_parameters()) if config.phases else ()
        hands_on = config.a_at_reset == "kept" and config.order == "longest-first"
        self.isolates_documents = not (config.phases or hands_on or tilt)

    def _evaluate(self, model: GPT, tokens: np.ndarray, record: Record | None, clock: Clock | None) -> Score:
        counts = np.zeros(len(tokens), np.int16) if self.table is None else self.byte_counts(tokens)
        hints = token_hints(tokens, self.tilt) if self.tilt else None
        return phased_score(model, ValidationSet(tokens, counts), self.phased, hints=hints, record=record, clock=clock)

    def state(self, stage: str, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """As ModelScorer's; to be warm is to have scored random ids."""
        if stage == "warm":
            random = np.random.default_rng(0).integers(0, self.model.config.vocab_size, len(tokens))
            random[0] = self.model.config.bos_id
            self._evaluate(self.model, random, None, None)
            stage = "loaded"
        return super().state(stage, tokens)
