"""What every adaptation of a model's parameters to a stream shares: gradients of windows, their rate, and the way back.

A step's loss is the mean over all scored rows of its windows, by the model's own training forward (looped, its learned
softcaps parameters like all others, no tilt), with attention cut as when the same windows are scored: a model of rows
sees whole windows, one of documents its documents. Windows are shared out over ranks and gradients summed, so the
number of ranks changes nothing but the order of sums.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from niblick.evaluation.ranks import own_share, sum_over_ranks
from niblick.evaluation.score import batches, pack
from niblick.evaluation.windows import Window
from niblick.model.config import ConfigError
from niblick.model.gpt import GPT

IGNORED = -100
BLOCKS = ("q_gain", "attn_scale", "mlp_scale", "resid_mix", "gate_weight", "gate_bias", "lane_post", "lane_resid",
          "mlp_up_bank", "mlp_down_bank", "qo_bank", "kv_bank")  # fmt: skip
"""Parameters with one row a block; the last two have a second half of rows for the same blocks."""


def require_dense(model: GPT, method: str) -> None:
    if model.packed:
        raise ConfigError(f"{method}: expected dense weights, which it trains: got packed ones (--weights dense)")


@contextmanager
def parameters_kept(model: GPT) -> Iterator[list[Tensor]]:
    """All parameters may be trained inside. Yields copies of them; at the end they and the mode are what they were."""
    start, was_training, trained = copy_parameters(model), model.training, [p.requires_grad for p in model.parameters()]
    model.requires_grad_(True)
    try:
        yield start
    finally:
        set_parameters(model, start)
        model.train(was_training)
        clear_gradients(model)
        for p, wanted in zip(model.parameters(), trained, strict=True):
            p.requires_grad_(wanted)


@torch.no_grad()
def copy_parameters(model: GPT) -> list[Tensor]:
    return [p.clone() for p in model.parameters()]


@torch.no_grad()
def set_parameters(model: GPT, values: list[Tensor]) -> None:
    torch._foreach_copy_(list(model.parameters()), values)


def clear_gradients(model: GPT) -> None:
    for p in model.parameters():
        p.grad = None


def mean_gradients(model: GPT, tokens: np.ndarray, windows: Sequence[Window], tokens_per_batch: int) -> Tensor:
    """The gradients of the mean loss over all rows of `windows`, left in `.grad`; that loss, the same on every rank.

    A forward and backward takes windows up to tokens_per_batch tokens. The caller has set the mode.
    """
    clear_gradients(model)
    n_rows = sum(window.end - window.first_scored for window in windows)
    loss = torch.zeros((), dtype=torch.float64, device=model.embedding.device)
    for batch in batches(own_share(windows), tokens_per_batch):
        packed = pack(tokens, batch, model.config)
        targets = torch.full_like(packed.ids, IGNORED)  # a row before a window, which the smear gate reads, is not one
        targets[packed.rows] = torch.from_numpy(tokens[packed.targets].astype(np.int64))
        inputs = (x.to(loss.device) for x in (packed.ids, targets, packed.cu_seqlens))
        part = model(*inputs, looping=True) * (len(packed.rows) / n_rows)
        part.backward()
        loss += part.detach()
    sum_gradients(model, loss)
    return loss


def sum_gradients(model: GPT, loss: Tensor) -> None:
    """Gradients and loss, in place, over all ranks; a rank that computed none has gradients of zero."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    sum_over_ranks([loss, *(p.grad for p in model.parameters())])


def half_cosine(done: float) -> float:
    """What is left of a learning rate when so much of its way, 0..1, is done: from 1 to 0."""
    return (1 + math.cos(math.pi * done)) / 2


def freeze_first_blocks(model: GPT, n: int) -> None:
    """Zero gradients for the parameters of blocks 0 .. n - 1."""
    for name, p in model.named_parameters():
        if n and name in BLOCKS:
            p.grad.view(-1, model.config.num_layers, *p.shape[1:])[:, :n].zero_()


def clip_gradients(model: GPT, limit: float) -> float:
    """Scales the gradients to a norm of at most `limit`; returns the norm that they had."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
