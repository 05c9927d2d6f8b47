"""Training on the validation stream before quantisation (PR #1423 of the challenge and its siblings). NOT LEGAL.

The artifact then depends on the tokens that it is scored on: each score on its own target and on later ones, tokens
learnt before they are scored, and several times. It was published and rejected; this is here so that it can be
reproduced, and measured. What it makes is marked so: `artifact.container.ILLEGAL`.

AdamW without decay, over the whole sequences of the stream in their order; the rate falls by a cosine from epoch to
epoch; gradients are averaged over ranks and clipped; the first blocks are frozen. (Steps of 32 sequences are a choice:
the size is not in what was published.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from niblick.evaluation.adaptation import (
    clear_gradients,
    clip_gradients,
    freeze_first_blocks,
    half_cosine,
    mean_gradients,
)
from niblick.evaluation.score import require_targets
from niblick.evaluation.windows import plain_windows, rows_kept
from niblick.model.config import EvalConfig
from niblick.model.errors import TrainingStopped
from niblick.model.gpt import GPT


@dataclass(frozen=True)
class PrequantizationConfig:
    """last_rate: the share of the learning rate that the cosine falls towards."""

    learning_rate: float = 5e-4
    last_rate: float = 0.1
    epochs: int = 6
    frozen_blocks: int = 2
    clip: float = 1.0
    sequences_per_step: int = 32


PR1423 = PrequantizationConfig()


def train_on_validation(
    model: GPT,
    tokens: np.ndarray,
    config: EvalConfig,
    settings: PrequantizationConfig = PR1423,
    said: Callable[[str], object] = lambda line: None,
) -> list[float]:
    """Trains the model in place on tokens (N,), an integer type; the mean loss of each epoch, nats a token. `said` is
    called with a line an epoch. ConfigError where there is no whole sequence, TrainingStopped for a gradient that is
    not finite."""
    length = config.sequence_length
    windows = plain_windows(rows_kept(len(tokens), length, "drop"), length)
    require_targets(windows, len(tokens))
    steps = [windows[i : i + settings.sequences_per_step] for i in range(0, len(windows), settings.sequences_per_step)]
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.0)
    was_training, losses = model.training, []
    model.train()
    for epoch in range(settings.epochs):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * _factor(epoch, settings)
        total = torch.zeros((), dtype=torch.float64, device=model.embedding.device)
        for sequences in steps:
            total += mean_gradients(model, tokens, sequences, config.tokens_per_batch) * len(sequences)
            freeze_first_blocks(model, settings.frozen_blocks)
            if not math.isfinite(norm := clip_gradients(model, settings.clip)):
                raise TrainingStopped(f"training on the validation stream: a gradient's norm is {norm}")
            optimizer.step()
        losses.append(total.item() / len(windows))
        said(f"ILLEGAL training on the validation stream, epoch {epoch + 1}: {losses[-1]:.4f} nats a token")
    clear_gradients(model)
    model.train(was_training)
    return losses


def _factor(epoch: int, settings: PrequantizationConfig) -> float:
    return settings.last_rate + (1 - settings.last_rate) * half_cosine(epoch / settings.epochs)
