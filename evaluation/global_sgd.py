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
from niblick.model.cuda_graph import GraphedMicroStep
from niblick.model.gpt import GPT

LAUNCHED = 2
"""Steps that are launched kernel by kernel, so that everything is compiled, before one is captured."""


def sgd_phase(model: GPT, text: np.ndarray, config: PhasedConfig) -> str:
    """Trains the model in place; every rank must call it, and each takes its share of a chunk's rows.

    text (R,): the documents' tokens. Returns why it failed, or nothing: where the losses end above `config.diverged`
    times what they began with, or any number is not finite, the weights are those of before.
    """
    n_chunks = -(-(len(text) - 1) // config.sgd_chunk)
    before, was_training = copy_parameters(model), model.training
    model.train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.sgd_lr, momentum=config.sgd_momentum)
    gradients, losses = _Gradients(model, config), []
    for chunk in range(n_chunks - 1):
        rate = 0.5 * config.sgd_lr * (1 + math.cos(math.pi * chunk / (n_chunks - 1)))
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(config.sgd_epochs):
            losses.append(gradients(text[chunk * config.sgd_chunk :]))
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


class _Gradients:
    """Those of a chunk's mean loss, left in `.grad`, the same on all ranks and whatever their number: rows do not
    depend on it. On a GPU forward and backward are a CUDA graph: a rank's share among eight, 4096 tokens, takes the
    host longer to launch than the GPU to compute."""

    def __init__(self, model: GPT, config: PhasedConfig) -> None:
        self.model, self.config, self.device = model, config, model.embedding.device
        n_rows, (rank, n_ranks) = config.sgd_chunk // config.sgd_row, place()
        self.first, self.end = (n_rows * r // n_ranks * config.sgd_row for r in (rank, rank + 1))
        self.row_starts = torch.arange(0, self.end - self.first, config.sgd_row, device=self.device)
        graphs = model.embedding.is_cuda and self.first < self.end
        self.graphed = GraphedMicroStep(self._share, list(model.parameters())) if graphs else None
        self.launched = 0

    def __call__(self, text: np.ndarray) -> Tensor:
        """text: the stream from the chunk on. Its loss, float32."""
        loss = torch.zeros((), device=self.device)
        if self.first < self.end:
            loss += self._own(text[self.first : self.end + 1])
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # of a rank without rows
        sum_over_ranks([loss, *(p.grad for p in self.model.parameters())])
        return loss

    def _own(self, text: np.ndarray) -> Tensor:
        ids, targets, cu_seqlens = _packed(text, self.model.config.bos_id, self.config)
        if self.graphed and self.graphed.fits(cu_seqlens, looping=True):
            return self.graphed.replay(ids, targets, cu_seqlens, looping=True)
        inputs = [x.to(self.device) for x in (ids, targets, cu_seqlens)]
        if self.graphed and self.launched == LAUNCHED:
            self.graphed.capture(*inputs, looping=True)
            self.launched = 0
            return self.graphed.replay(*inputs, looping=True)
        self.launched += 1
        share = self._share(*inputs, looping=True)
        share.backward()
        return share.detach()

    def _share(self, ids: Tensor, targets: Tensor, cu_seqlens: Tensor, looping: bool) -> Tensor:
        """Of this rank's rows, of the mean over the chunk."""
        return self.model(ids, targets, cu_seqlens, looping, self.row_starts) * (len(ids) / self.config.sgd_chunk)


def _packed(text: np.ndarray, bos_id: int, config: PhasedConfig) -> tuple[Tensor, Tensor, Tensor]:
    """ids and targets int64, and cu_seqlens int32, of whole rows."""
    ids, targets = text[:-1].astype(np.int64), text[1:].astype(np.int64)
    segments = [
        first + document_starts(ids[first : first + config.sgd_row], bos_id, config.sgd_segment).numpy()[:-1]
        for first in range(0, len(ids), config.sgd_row)
    ]
    cu_seqlens = np.concatenate([*segments, [len(ids)]]).astype(np.int32)
    return torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(cu_seqlens)
