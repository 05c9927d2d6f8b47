"""Phased test-time training as a scorer for the audit, with a log of all its scores and steps."""

import numpy as np

from niblick.data.tokenizer import ByteTable
from niblick.evaluation.audit_own import ModelScorer
from niblick.evaluation.audit_protocol import Log, Total
from niblick.evaluation.hints import token_hints
from niblick.evaluation.phased import phased_score
from niblick.evaluation.phased_batch import Event
from niblick.evaluation.phased_config import PhasedConfig
from niblick.model.config import EvalConfig, TiltVersion
from niblick.model.gpt import GPT


class PhasedScorer(ModelScorer):
    """A model under phased test-time training; what is offered is in audit_protocol. table: bytes per token.

    The documents of a batch come in the log one after another, as they lie in the corpus: each has adapters of its own
    and knows nothing of the others, so it makes no difference that their chunks are computed side by side.
    """

    distributions = None  # they pass with the adapters that made them
    """Not offered."""

    def __init__(
        self, model: GPT, config: PhasedConfig, *, tilt: TiltVersion | None = None, table: ByteTable | None = None
    ) -> None:
        super().__init__(model, EvalConfig(), tilt=tilt, table=table)
        self.phased = config
        self.isolates_documents = not config.phases and config.a_at_reset == "redrawn" and not tilt

    def _evaluate(self, tokens: np.ndarray) -> Total:
        self.log, self._losses = Log(), np.full(len(tokens), np.nan)
        self._base = self._n_states = 0
        self._states: dict[int, int] = {}
        """Of the adapters of each row, after their last document."""
        hints = token_hints(tokens, self.tilt) if self.tilt else None
        result = phased_score(self.model, self._data(tokens), self.phased, hints=hints, journal=self)
        return Total(result.nll, result.n_targets, result.n_bytes if self.table is not None else None)

    def document(self, row: int, inherits: bool, events: list[Event]) -> None:
        """See `phased.Journal`."""
        state = self._states[row] if inherits and row in self._states else self._base
        for what, targets, losses in events:
            if what == "scored":
                self._losses[targets] = losses
                self.log.scored(targets, losses, state)
            else:
                state = self._updated(targets, state)
        self._states[row] = state

    def phase(self, targets: np.ndarray) -> None:
        """See `phased.Journal`."""
        self._base = self._updated(targets, self._base)

    def _updated(self, targets: np.ndarray, base: int) -> int:
        self._n_states += 1
        self.log.updated(targets, base, self._n_states)
        return self._n_states
