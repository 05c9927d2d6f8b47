"""Steps on all weights of a model, with documents that have been scored: a phase of test-time training.

The documents are laid end to end, R tokens, and cut into M = ceil((R - 1) / chunk) chunks of which the last is left out.
A step takes a chunk, in rows that begin anew: attention is cut at each BOS and every `sgd_segment` tokens after it. The
learning rate falls from chunk to chunk like half a cosine; momentum begins at zero in each phase.
"""

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from niblick.data.loaders import document_starts
from niblick.evaluation.phased_config import PhasedConfig
from niblick.evaluation.claims import Ranks
from niblick.model.gpt import GPT


def sgd_phase(model: GPT, text: np.ndarray, config: PhasedConfig, ranks: Ranks) -> bool:
    """Trains the model in place; every rank must call it, and each takes its share of a chunk's rows.

    text (R,): the documents' tokens. False where the losses end above `config.diverged` times what they began with, or
    any number is not finite: then the weights are those of before.
    """
    n_chunks = -(-(len(text) - 1) // config.sgd_chunk)
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    was_training, wanted = model.training, [p.requires_grad for p in parameters]
    model.train().requires_grad_(True)
    optimizer = torch.optim.SGD(parameters, lr=config.sgd_lr, momentum=config.sgd_momentum)
    losses = []
    try:
        for chunk in range(n_chunks - 1):
            rate = 0.5 * config.sgd_lr * (1 + math.cos(math.pi * chunk / (n_chunks - 1)))
            optimizer.param_groups[0]["lr"] = rate
            for _ in range(config.sgd_epochs):
                losses.append(_step(model, text[chunk * config.sgd_chunk :], config, ranks))
                torch.nn.utils.clip_grad_norm_(parameters, config.sgd_clip)
                optimizer.step()
                optimizer.zero_grad()
    finally:
        model.train(was_training)
        for p, kept in zip(parameters, wanted, strict=True):
            p.requires_grad_(kept)
    if not losses or _sound(ranks.sum(torch.stack(losses)), parameters, config):
        return True
    with torch.no_grad():
        for p, kept in zip(parameters, before, strict=True):
            p.copy_(kept)
    warnings.warn("test-time training of all weights diverged: they are put back as they were before", stacklevel=2)
    return False


def _sound(losses: Tensor, parameters: list[Tensor], config: PhasedConfig) -> bool:
    first, last = losses[: config.patience].mean(), losses[-config.patience :].mean()
    finite = torch.stack([p.isfinite().all() for p in parameters]).all()
    return bool(finite & losses.isfinite().all() & (last <= config.diverged * first))


def _step(model: GPT, text: np.ndarray, config: PhasedConfig, ranks: Ranks) -> Tensor:
    """Leaves the gradients of the chunk's mean loss in `.grad`, the same on all ranks; returns this rank's share of it.

    Rows do not depend on the number of ranks, so nor do the steps.
    """
    n_rows = config.sgd_chunk // config.sgd_row
    first, end = (n_rows * r // ranks.size * config.sgd_row for r in (ranks.rank, ranks.rank + 1))
    share = torch.zeros((), device=model.embedding.device)
    if first < end:
        share = model(*_rows(text[first : end + 1], model, config)) * ((end - first) / config.sgd_chunk)
        share.backward()
    for p in model.parameters():
        if p.grad is None:  # a rank without rows
            p.grad = torch.zeros_like(p)
        ranks.sum(p.grad)
    return share.detach().float()


def _rows(text: np.ndarray, model: GPT, config: PhasedConfig) -> tuple[Tensor, Tensor, Tensor, bool, Tensor]:
    """What the model's forward takes, of inputs text[:-1] and targets text[1:], whole rows."""
    ids, targets = text[:-1].astype(np.int64), text[1:].astype(np.int64)
    bos_id, starts = model.config.bos_id, range(0, len(ids), config.sgd_row)
    segments = [
        first + document_starts(ids[first : first + config.sgd_row], bos_id, config.sgd_segment).numpy()[:-1]
        for first in starts
    ]
    cu_seqlens = np.concatenate([*segments, [len(ids)]]).astype(np.int32)
    device = model.embedding.device
    arrays = (ids, targets, cu_seqlens, np.array(starts))
    ids, targets, cu_seqlens, row_starts = (torch.from_numpy(x).to(device) for x in arrays)
    return ids, targets, cu_seqlens, True, row_starts
