"""Phased test-time training once more, slowly, from its definitions: document by document, each adapter a pair of plain
matrices, gradients by autograd through `reference_gpt`. In float64."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import reference_gpt as ref
import torch
from torch import Tensor

from niblick.evaluation.phased_config import PhasedConfig
from niblick.model.config import GPTConfig

Adapters = dict[tuple[int, str], Tensor]


class AdaptedPass(ref.Pass):
    """The reference's blocks with W + s B A for queries, keys and values, and s B A n beside the other products."""

    adapters: Adapters
    scale: float
    slot = 0

    def _low(self, name: str, n: Tensor) -> Tensor | float:
        if (self.slot, name) not in self.adapters:
            return 0.0
        a, b = self.adapters[self.slot, name]
        return self.scale * (n @ a.T) @ b.T

    def attn(self, x: Tensor, i: int) -> Tensor:
        n, c, banks = self.norm(x, i), self.config, dict(self.params)
        for name, bank, row in (("q", "qo_bank", i), ("k", "kv_bank", i), ("v", "kv_bank", c.num_layers + i)):
            if (self.slot, name) in self.adapters:
                a, b = self.adapters[self.slot, name]
                matrices = list(banks[bank])
                matrices[row] = matrices[row] + self.scale * b @ a
                banks[bank] = torch.stack(matrices)
        out = ref.attention(n, banks, i, self.starts, c) + self._low("o", n)
        return self.params["attn_scale"][i] * out

    def mlp(self, x: Tensor, i: int) -> Tensor:
        n = self.norm(x, i)
        out = ref.mlp(n, self.params, i, self.config, self.training) + self._low("mlp", n)
        self.slot += 1
        return self.params["mlp_scale"][i] * out


def losses_of(params, shape: GPTConfig, tokens: np.ndarray, adapters: Adapters, scale: float) -> Tensor:
    """Of every target of one row, attention dense."""
    ids, targets = torch.from_numpy(tokens[:-1].astype(np.int64)), torch.from_numpy(tokens[1:].astype(np.int64))
    shape = replace(shape, max_segment=len(ids))
    x = x0 = ref.reference_input(params, shape, ids)
    run = AdaptedPass(params, shape, [0] * len(ids), x0, training=False)
    run.adapters, run.scale = adapters, scale
    encoder, decoder = ref.layer_order(shape, looping=True)
    stack = []
    for i in encoder:
        x = ref.block(x, i, run)
        stack.append(x)
    z = ref.rms_norm(ref.decode(x, stack, decoder, run))
    logits = z @ params["embedding"].T
    if (-1, "head") in adapters:
        a, b = adapters[-1, "head"]
        logits = logits + scale * (z @ a.T) @ b.T
    caps = [params[f"softcap_{sign}"] for sign in ("positive", "negative")] if shape.asymmetric_softcap else ()
    capped = ref.asymmetric_softcap(logits, *caps) if caps else ref.symmetric_softcap(logits, shape.softcap)
    return ref.cross_entropy(capped, targets)


class BruteForce:
    """losses (N,) and the parameters at the end. draw(number): the A of all rows, by (slot, target), (rows, r, in)."""

    def __init__(self, params, shape: GPTConfig, tokens: np.ndarray, config: PhasedConfig, draw: Callable) -> None:
        self.params = {name: p.detach().double().clone() for name, p in params.items()}
        self.shape, self.tokens, self.config, self.draw = shape, tokens, config, draw
        self.losses = np.full(len(tokens), np.nan)
        self.a, self.n_phases, self.last_size = None, 0, None
        bos = [t for t in range(len(tokens) - 1) if tokens[t] == shape.bos_id]
        self.documents = [tokens[p:q] for p, q in zip(bos, [q + 1 for q in bos[1:]] + [None], strict=True)]
        self.starts = bos
        self._everything()

    def _everything(self) -> None:
        config, lengths = self.config, [len(document) for document in self.documents]
        corpus = config.order == "corpus"
        order = list(range(len(lengths))) if corpus else sorted(range(len(lengths)), key=lambda d: lengths[d])
        batches = [order[i : i + config.documents] for i in range(0, len(order), config.documents)]
        queue = list(enumerate(batches)) if corpus else list(enumerate(batches))[::-1]
        limits, scored = [config.prefix * j // config.phases for j in range(1, config.phases + 1)], []
        for index, batch in queue:
            while limits and sum(len(b) for _, b in scored) >= limits[0]:
                self._phase([d for _, b in sorted(scored) for d in b][: limits.pop(0)])
            self._batch(index, batch)
            scored.append((index, batch))

    def _batch(self, index: int, batch: list[int]) -> None:
        config = self.config
        resized = config.order == "longest-first" and self.last_size not in (None, len(batch))
        if self.a is None or config.a_at_reset == "redrawn" or resized or config.order == "corpus":
            self.a = self.draw(index if config.a_at_reset == "redrawn" else self.n_phases)
        self.last_size = len(batch)
        longest, chunk = max(len(self.documents[d]) for d in batch), config.chunk
        if config.order == "longest-first":
            chunk = next((c for limit, c in config.short_chunks if longest <= limit), chunk)
        chunks = [math.ceil((len(self.documents[d]) - 1) / chunk) for d in batch]
        decay = 1 - config.lr * config.weight_decay
        for row in range(config.documents):  # of the rows' matrices, all decay as long as the batch is stepped on
            own = 0
            if row < len(batch):
                own = chunks[row] - 1
                self._document(row, batch[row], chunk)
            for key in self.a:
                self.a[key][row] *= decay ** (max(chunks) - 1 - own)

    def _document(self, row: int, d: int, chunk: int) -> None:
        config, text, width = self.config, self.documents[d], {"q": 1, "o": 1, "mlp": 1}
        n, c = len(text) - 1, self.shape
        out = {"k": c.kv_dim, "v": c.kv_dim, "head": c.vocab_size} | {name: c.model_dim for name in width}
        keys = list(self.a)
        a = [self.a[key][row].clone().requires_grad_() for key in keys]
        b = [torch.zeros(out[target], config.rank, dtype=torch.float64, requires_grad=True) for _, target in keys]
        squares, scale = [torch.zeros_like(x) for x in (*a, *b)], config.alpha / config.rank if config.alpha else 1.0
        for number in range(math.ceil(n / chunk)):
            begin, end = number * chunk, min(n, (number + 1) * chunk)
            right = (number + 1) * chunk if config.order == "corpus" else end
            left = max(0, right - config.window)
            adapters = dict(zip(keys, zip(a, b, strict=True), strict=True))
            losses = losses_of(self.params, c, text[left : end + 1], adapters, scale)[begin - left :]
            self.losses[self.starts[d] + begin + 1 : self.starts[d] + end + 1] = losses.detach()
            if end == n:
                break
            self._adamw([*a, *b], torch.autograd.grad(losses.mean(), [*a, *b]), squares, number + 1)
        for key, matrix in zip(keys, a, strict=True):
            self.a[key][row] = matrix.detach()

    def _adamw(self, parameters, gradients, squares, step: int) -> None:
        c = self.config
        for x, g, v in zip(parameters, gradients, squares, strict=True):
            v.copy_(c.beta2 * v + (1 - c.beta2) * g * g)
            x.data.copy_((1 - c.lr * c.weight_decay) * x - c.lr * g / (torch.sqrt(v / (1 - c.beta2**step)) + c.eps))

    def _phase(self, chosen: list[int]) -> None:
        config, text = self.config, np.concatenate([self.documents[d] for d in chosen])
        n_chunks = math.ceil((len(text) - 1) / config.sgd_chunk)
        momentum = {name: torch.zeros_like(p) for name, p in self.params.items()}
        for c in range(n_chunks - 1):
            rate = config.sgd_lr / 2 * (1 + math.cos(math.pi * c / (n_chunks - 1)))
            for _ in range(config.sgd_epochs):
                self._sgd(text[c * config.sgd_chunk : (c + 1) * config.sgd_chunk + 1], rate, momentum)
        self.a, self.n_phases, self.last_size = None, self.n_phases + 1, None

    def _sgd(self, text: np.ndarray, rate: float, momentum) -> None:
        config, params = self.config, {name: p.clone().requires_grad_() for name, p in self.params.items()}
        shape, losses = replace(self.shape, max_segment=config.sgd_segment or self.shape.max_segment), []
        for first in range(0, config.sgd_chunk, config.sgd_row):
            row = torch.from_numpy(text[first : first + config.sgd_row + 1].astype(np.int64))
            losses.append(ref.reference_losses(params, shape, row[:-1], row[1:], looping=True, training=True))
        gradients = torch.autograd.grad(torch.cat(losses).mean(), list(params.values()))
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
        for name, g in zip(params, gradients, strict=True):
            momentum[name] = config.sgd_momentum * momentum[name] + g * min(1.0, config.sgd_clip / (norm + 1e-6))
            self.params[name] -= rate * momentum[name]
