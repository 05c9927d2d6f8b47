"""Steps on all weights of a model, with documents that have been scored: a phase of test-time training.

The documents are laid end to end, R tokens, and cut into M = ceil((R - 1) / chunk) chunks, of which the last is left
out. A step takes a chunk, in rows that begin anew: attention is cut at each BOS and every `sgd_segment` tokens after
it. The learning rate falls from chunk to chunk like half a cosine; momentum begins at zero in each phase.
"""

import math

import numpy as np
import torch
from torch import Tensor

from niblick.data.loaders import document_starts
from niblick.evaluation.adaptation import clear_gradients, copy_parameters, set_parameters
from niblick.evaluation.phased_config import PhasedConfig
from niblick.evaluation.ranks import place, sum_over_ranks
from niblick.model.gpt import GPT


def sgd_phase(model: GPT, text: np.ndarray, config: PhasedConfig) -> str:
    """Trains the model in place; every rank must call it, and each takes its share of a chunk's rows.

    text (R,): the documents' tokens. Returns why it failed, or nothing: where the losses end above `config.diverged`
    times what they began with, or any number is not finite, the weights are those of before.
    """
    n_chunks = -(-(len(text) - 1) // config.sgd_chunk)
    before, was_training = copy_parameters(model), model.training
    model.train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.sgd_lr, momentum=config.sgd_momentum)
    losses = []
    for chunk in range(n_chunks - 1):
        rate = 0.5 * config.sgd_lr * (1 + math.cos(math.pi * chunk / (n_chunks - 1)))
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(config.sgd_epochs):
            losses.append(_gradients(model, text[chunk * config.sgd_chunk :], config))
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.sgd_clip)
            optimizer.step()
            clear_gradients(model)
    model.train(was_training).requires_grad_(False)
    failed = _failure(model, torch.stack(losses), config) if losses else ""
    if failed:
        set_parameters(model, before)
    return failed


def _failure(model: GPT, losses: Tensor, config: PhasedConfig) -> str:
    first, last = losses[0].item(), losses[-config.patience :].mean().item()
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        return "weights are no longer finite"
    return "" if last <= config.diverged * first else f"its loss went from {first:.4g} to {last:.4g} nats a token"


def _gradients(model: GPT, text: np.ndarray, config: PhasedConfig) -> Tensor:
    """Leaves those of the chunk's mean loss in `.grad`; that loss, float32. The same on all ranks, and whatever their
    number: rows do not depend on it."""
    n_rows, (rank, n_ranks) = config.sgd_chunk // config.sgd_row, place()
    first, end = (n_rows * r // n_ranks * config.sgd_row for r in (rank, rank + 1))
    share = torch.zeros((), device=model.embedding.device)
    if first < end:
        share = model(*_rows(text[first : end + 1], model, config)) * ((end - first) / config.sgd_chunk)
        share.backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # of a rank without rows
    loss = share.detach().float()
    sum_over_ranks([loss, *(p.grad for p in model.parameters())])
    return loss


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
