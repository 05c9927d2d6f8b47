"""How far a model's predictions have moved, in bits per byte: a thirtieth of the noise of the score's own change.

Of two models that differ little, the change of the score is a sum of gains and losses: with D nats of divergence a
token its deviation is some sqrt(2 D) a token, seventeen times the mean at D = 0.007, where the divergence's own is
below its mean. If the first model is right about the text, the two have the same mean.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from niblick.artifact.hessians import softcapped
from niblick.data.loaders import document_starts
from niblick.evaluation.validation import ValidationSet
from niblick.model.gpt import GPT

TOKENS = 16_384
"""Looked at, in rows spread over the text; their predictions are kept, 32 kB each at 8192 tokens."""


class Divergence:
    """From the predictions that the model makes now to those that it makes at a call."""

    @torch.no_grad()
    def __init__(self, model: GPT, held_out: ValidationSet, tokens: int = TOKENS) -> None:
        length, total = model.config.max_segment, len(held_out.tokens)
        n = max(min(tokens, total) // length, 1)
        starts = [i * max(total - length, 0) // n for i in range(n)]
        rows = [slice(start, start + length) for start in starts]
        self.rows = [torch.from_numpy(held_out.tokens[row].astype(np.int64)) for row in rows]
        self.bytes = sum(float(held_out.byte_counts[row].sum(dtype=np.int64)) for row in rows)
        self.reference = list(self._log_probabilities(model))

    @torch.no_grad()
    def __call__(self, model: GPT) -> float:
        """Bits per byte of the text looked at."""
        pairs = zip(self.reference, self._log_probabilities(model), strict=True)
        nats = sum((given.exp() * (given - found)).sum().item() for given, found in pairs)
        return nats / math.log(2) / self.bytes

    def _log_probabilities(self, model: GPT) -> Iterator[Tensor]:
        for row in self.rows:
            starts = document_starts(row, model.config.bos_id, model.config.max_segment)
            hidden = model.hidden(row.to(model.embedding.device), starts.to(model.embedding.device))
            yield softcapped(model, model.head(hidden).float()).log_softmax(-1)
