"""Steps on all weights of a model, with documents that have been scored: a phase of test-time training.

The documents are laid end to end, R tokens, and cut into M = ceil((R - 1) / chunk) chunks, of which the last is left
out. A step takes a chunk, in rows that begin anew: attention is cut at each BOS and every `sgd_segment` tokens after
it. The learning rate falls from chunk to chunk like half a cosine; momentum begins at zero in each phase.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from niblick.data.loaders import document_starts
from niblick.evaluation.adaptation import clear_gradients, copy_parameters, half_cosine, set_parameters, sum_gradients
from niblick.evaluation.chunk_step import LAUNCH_TOKENS
from niblick.evaluation.phased_config import PhasedConfig
from niblick.evaluation.ranks import place
from niblick.model.config import GPTConfig
from niblick.model.cuda_graph import GraphedMicroStep
from niblick.model.gpt import GPT

COST = 3
"""What a token costs here, in tokens of a chunk's step (`Shape.cost`): 3.4 and 1.1 µs, H200, 2026-11-20."""
LAUNCHED = 2
"""Steps that are launched kernel by kernel, so that everything is compiled, before one is captured."""


def sgd_phase(model: GPT, text: np.ndarray, config: PhasedConfig) -> str:
    """Trains the model in place; every rank must call it, and each takes its share of a chunk's rows.

    text (R,): the documents' tokens. Returns why it failed, or nothing: where the last step's loss is more than
    `config.diverged` above that of the weights of before, or any number is not finite, they are put back.
    """
    n_chunks = -(-(len(text) - 1) // config.sgd_chunk)
    before, was_training = copy_parameters(model), model.training
    model.train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.sgd_lr, momentum=config.sgd_momentum)
    gradients, losses = _Gradients(model, config), []
    for chunk in range(n_chunks - 1):
        optimizer.param_groups[0]["lr"] = config.sgd_lr * half_cosine(chunk / (n_chunks - 1))
        for _ in range(config.sgd_epochs):
            last = text[chunk * config.sgd_chunk :]
            losses.append(gradients(last))
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.sgd_clip)
            optimizer.step()
            clear_gradients(model)
    failed = _failure(model, losses[-1].item(), before, lambda: gradients(last), config) if losses else ""
    model.train(was_training).requires_grad_(False)
    if failed:
        set_parameters(model, before)
    return failed


def sgd_cost(n_tokens: int, config: PhasedConfig, n_ranks: int) -> int:
    """Of a phase of so many tokens, for a rank, in tokens of a chunk's step; with the look for failure at its end."""
    n_chunks = -(-(n_tokens - 1) // config.sgd_chunk)
    steps = (n_chunks - 1) * config.sgd_epochs + 1 if n_chunks > 1 else 0
    rows = -(-config.sgd_chunk // config.sgd_row // n_ranks)
    return steps * (COST * rows * config.sgd_row + LAUNCH_TOKENS)


def _failure(
    model: GPT, loss: float, before: list[Tensor], gradients: Callable[[], Tensor], config: PhasedConfig
) -> str:
    """loss: of the last step. It is compared with that of the weights `before` on the same chunk."""
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        return "weights are no longer finite"
    trained = copy_parameters(model)
    set_parameters(model, before)
    without = gradients().item()
    clear_gradients(model)
    set_parameters(model, trained)
    return (
        ""
        if loss <= without + config.diverged
        else f"{loss:.4g} nats a token in its last step, {without:.4g} without it"
    )


class _Gradients:
    """Those of a chunk's mean loss, left in `.grad`, the same on all ranks and whatever their number: rows do not
    depend on it. On a GPU forward and backward are a CUDA graph: a rank's share among eight, 4096 tokens, takes the
    host longer to launch than the GPU to compute."""

    def __init__(self, model: GPT, config: PhasedConfig) -> None:
        self.model, self.config, self.device = model, config, model.embedding.device
        n_rows, (rank, n_ranks) = config.sgd_chunk // config.sgd_row, place()
        first, end = (n_rows * r // n_ranks for r in (rank, rank + 1))
        most = max(1, config.tokens_per_forward // config.sgd_row)
        rows = max((n for n in range(1, most + 1) if (end - first) % n == 0), default=1)
        self.size = rows * config.sgd_row
        """Tokens a forward, in each the same."""
        self.firsts = range(first * config.sgd_row, end * config.sgd_row, self.size)
        self.row_starts = torch.arange(0, self.size, config.sgd_row, device=self.device)
        graphs = model.embedding.is_cuda and self.firsts
        self.graphed = GraphedMicroStep(self._share, list(model.parameters())) if graphs else None
        self.launched = 0

    def __call__(self, text: np.ndarray) -> Tensor:
        """text: the stream from the chunk on. Its loss, float32."""
        loss, several = torch.zeros((), device=self.device), len(self.firsts) > 1
        total = [torch.zeros_like(p) for p in self.model.parameters()] if several else []
        for first in self.firsts:
            loss += self._own(text[first : first + self.size + 1])
            if several:  # a graph fills the same tensors again
                _take_gradients(self.model, total)
        for p, gradient in zip(self.model.parameters(), total, strict=several):
            p.grad = gradient
        sum_gradients(self.model, loss)
        return loss

    def _own(self, text: np.ndarray) -> Tensor:
        ids, targets, cu_seqlens = _packed(text, self.model.config, self.config)
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


def _take_gradients(model: GPT, total: list[Tensor]) -> None:
    """Adds them to `total`, and clears them."""
    for p, gradient in zip(model.parameters(), total, strict=True):
        if p.grad is not None:
            gradient += p.grad
    clear_gradients(model)


def _packed(text: np.ndarray, model: GPTConfig, config: PhasedConfig) -> tuple[Tensor, Tensor, Tensor]:
    """ids and targets int64, and cu_seqlens int32, of whole rows."""
    ids, targets = text[:-1].astype(np.int64), text[1:].astype(np.int64)
    segments = [
        first + document_starts(ids[first : first + config.sgd_row], model.bos_id, config.segment(model)).numpy()[:-1]
        for first in range(0, len(ids), config.sgd_row)
    ]
    cu_seqlens = np.concatenate([*segments, [len(ids)]]).astype(np.int32)
    return torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(cu_seqlens)
