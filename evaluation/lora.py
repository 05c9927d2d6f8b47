"""Low-rank adapters (LoRA) for a batch of documents, each with its own, in every executed layer of a GPT.

A linear map y = W x gains s B A x, A (r, in), B (out, r), s = alpha / r. Queries, keys, values, and an addition to the
attention's output, all read the attention's input n; another reads the MLP's input and is added to its output; the last
is the head's. Additions to outputs come before the layer scales, which the model has folded into W and which here
multiply the rows of B as these are rounded to the model's dtype. Rows of a forward are documents: x is (d w, in), d
rows of w tokens.

Layout: everything of a document is one row of flat (d, P) buffers, all A first. So an optimizer step is one pass over
one tensor, a reset is a fill, the last documents of a batch are a slice, and a product over all documents is one
batched GEMM on strided views. The A that read one input are one matrix (R, in). Gradients are written into their buffer
by the backward pass itself, and what is added to y and dx is added by the GEMM: there is no pass for it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from niblick.evaluation.phased_config import PhasedConfig, Target
from niblick.model.gpt import GPT


class Slice(NamedTuple):
    """A matrix of every document: where it begins in a row of the buffers, and its shape."""

    offset: int
    rows: int
    columns: int

    def of(self, buffer: Tensor) -> Tensor:
        """(d, rows, columns), a view of (d, P)."""
        return buffer[:, self.offset : self.offset + self.rows * self.columns].unflatten(1, (self.rows, self.columns))


class Pair(NamedTuple):
    """A matrix of d documents and the place of its gradient, (d, rows, columns) each."""

    weight: Tensor
    gradient: Tensor


class Up(NamedTuple):
    """One target: B, the columns of y that it adds to, and its columns among the R of A x."""

    b: Pair
    columns: slice
    low: slice


class Layout:
    """Where the matrices of a model of `slots` executed layers lie. `places`: by (slot, input) A, by (slot, target) B.

    The head's slot is -1.
    """

    def __init__(self, config: PhasedConfig, slots: int, width: int, kv_width: int, vocab_size: int) -> None:
        widths: dict[Target, int] = {"q": width, "k": kv_width, "v": kv_width, "o": width, "mlp": width}
        self.attention = [t for t in ("q", "k", "v", "o") if t in config.targets]
        self.rank, self.places, offset = config.rank, {}, 0
        wanted: list[tuple[object, int, int]] = []
        for slot in range(slots):
            if self.attention:
                wanted.append(((slot, "n"), len(self.attention) * config.rank, width))
            if "mlp" in config.targets:
                wanted.append(((slot, "m"), config.rank, width))
        if "head" in config.targets:
            wanted.append(((-1, "h"), config.rank, width))
        n_inputs = len(wanted)
        wanted += [((s, t), widths[t], config.rank) for s in range(slots) for t in widths if t in config.targets]
        if "head" in config.targets:
            wanted.append(((-1, "head"), vocab_size, config.rank))
        for place, (key, rows, columns) in enumerate(wanted):
            if place == n_inputs:
                self.n_a = offset
            self.places[key] = Slice(offset, rows, columns)
            offset += rows * columns
        self.n = offset

    def columns(self, target: Target, width: int, kv_width: int) -> slice:
        """Of a target among queries, keys and values, side by side."""
        first, n = {"q": (0, width), "k": (width, kv_width), "v": (width + kv_width, kv_width)}[target]
        return slice(first, first + n)

    def low(self, target: Target) -> slice:
        place = self.attention.index(target) * self.rank
        return slice(place, place + self.rank)


class LoRA:
    """The adapters of up to `config.documents` documents, on the model's device.

    `master` and `second`, AdamW's mean of squares, are float32 (float64 for a float64 model); `weights`, the master
    times the layer scales in `channels` (1, P), and their `gradients` are of the model's dtype. Documents take the last
    rows, so that those still going are a slice when the rows are sorted by length.
    """

    def __init__(self, model: GPT, config: PhasedConfig) -> None:
        c, self.model, self.config = model.config, model, config
        slots = len(model.orders[True])
        self.layout = Layout(config, slots, c.model_dim, c.kv_dim, c.vocab_size)
        device, dtype = model.embedding.device, model.embedding.dtype
        shape, wide = (config.documents, self.layout.n), torch.promote_types(dtype, torch.float32)
        self.master = torch.zeros(shape, dtype=wide, device=device)
        self.second = torch.zeros(shape, dtype=wide, device=device)
        self.gradients = torch.zeros(shape, dtype=dtype, device=device)
        self.weights = torch.zeros(shape, dtype=dtype, device=device)
        self.channels = torch.ones(1, self.layout.n, dtype=wide, device=device)
        self.step_number = torch.zeros((), dtype=wide, device=device)
        numbers = (config.lr, 1 - config.beta2, config.eps, 1 - config.lr * config.weight_decay)
        self.numbers = [torch.tensor(number, dtype=wide, device=device) for number in numbers]
        self.adamw = torch.compile(adamw_, dynamic=True) if device.type == "cuda" else adamw_
        self.base: dict[str, list[Tensor]] = {}
        self.refresh()

    # ---- between documents ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset(self) -> None:
        """B and everything of AdamW to zero, the step count too; A stays, and takes effect as it is."""
        self.master[:, self.layout.n_a :] = 0
        self.second.zero_()
        self.step_number.zero_()
        self._round()

    @torch.no_grad()
    def silence(self) -> None:
        """All A and B to zero: the model is as without. (A that are not finite would make B A x so, for B = 0.)"""
        self.master.zero_()
        self._round()

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """New A, uniform within ± 1 / sqrt(in); `reset` is to follow."""
        generator = torch.Generator(self.master.device).manual_seed(seed)
        bound = self.model.config.model_dim**-0.5
        self.master[:, : self.layout.n_a].uniform_(-bound, bound, generator=generator)

    @torch.no_grad()
    def rearrange(self, source: Tensor, factors: Tensor) -> None:
        """Row i of A becomes what row source[i] was, times factors[i]; `reset` is to follow."""
        a = self.master[:, : self.layout.n_a]
        a.copy_(a[source].mul_(factors[:, None]))

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the model's matrices and layer scales anew; into the same memory."""
        for slot, step in enumerate(self.model.orders[True]):
            for target, scales in (("o", self.model.attn_scale), ("mlp", self.model.mlp_scale)):
                if (slot, target) in self.layout.places:
                    self.layout.places[slot, target].of(self.channels).copy_(scales[step.layer][:, None])
        for role, matrices in self.model.weights.items():
            fresh = [m.to(self.model.embedding.dtype) for m in matrices]
            for kept, new in zip(self.base.setdefault(role, fresh), fresh, strict=True):
                kept.copy_(new)

    def _round(self) -> None:
        torch.mul(self.master, self.channels, out=self.weights)

    @torch.no_grad()
    def step(self, rows: int) -> None:
        """AdamW on the last `rows` documents, with the gradients that the backward pass has left."""
        last = slice(len(self.master) - rows, None)
        self.step_number += 1
        rows = (x[last] for x in (self.master, self.second, self.gradients, self.weights))
        correction = (1 - self.config.beta2**self.step_number).rsqrt()  # here: inside it would be a power an element
        self.adamw(*rows, self.channels, correction, *self.numbers)

    def view(self, last: int, rows: int, anchor: Tensor) -> "View":
        """`rows` documents, the first of them the one that is `last` rows from the end."""
        first = len(self.master) - last
        pick = slice(first, first + rows)
        return View(self, {key: self._pair(place, pick) for key, place in self.layout.places.items()}, anchor)

    def _pair(self, place: Slice, rows: slice) -> Pair:
        return Pair(place.of(self.weights[rows]), place.of(self.gradients[rows]))


def adamw_(
    master: Tensor,
    second: Tensor,
    gradient: Tensor,
    weights: Tensor,
    channels: Tensor,
    correction: Tensor,
    lr: Tensor,
    renewed: Tensor,
    eps: Tensor,
    kept: Tensor,
) -> None:
    """AdamW with beta1 = 0, in place: no mean of gradients is kept, and a first step is ± lr. correction:
    (1 - beta2^t)^(-1/2) in step t = 1, 2, ...; renewed: 1 - beta2; kept: 1 - lr x weight decay. All are tensors, as for
    a compiled function another number is another function.

    `weights` becomes master times channels, which `gradient` is of. Compiled, it is one pass.
    """
    g = gradient.to(master.dtype) * channels
    second.lerp_(g * g, renewed)
    master.mul_(kept).sub_(lr * g / (second.sqrt() * correction + eps))
    weights.copy_(master * channels)


@dataclass(frozen=True)
class View:
    """The adapters of some rows, as `GPT.hidden` takes them. anchor: any tensor that requires a gradient; by it the
    backward pass comes by, although the gradients of the adapters are nowhere asked for."""

    lora: LoRA
    pairs: dict[object, Pair]
    anchor: Tensor

    @property
    def weights(self) -> dict[str, list]:
        return self.lora.base

    def project(self, slot: int, n: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        layout, c = self.lora.layout, self.lora.model.config
        if not layout.attention:
            return n @ weight.T, None
        ups = [
            Up(self.pairs[slot, t], layout.columns(t, c.model_dim, c.kv_dim), layout.low(t))
            for t in layout.attention
            if t != "o"
        ]
        rest = layout.low("o") if "o" in layout.attention else None
        y, low = _Project.apply(n, self.anchor, weight, self.pairs[slot, "n"], ups, rest, self.lora.config.scale)
        return y, low if rest else None

    def output(self, slot: int, y: Tensor, weight: Tensor, low: Tensor | None) -> Tensor:
        if low is None:
            return y @ weight.T
        return _Output.apply(y, low, weight, self.pairs[slot, "o"])

    def mlp(self, slot: int, n: Tensor, m: Tensor) -> Tensor:
        if (slot, "m") not in self.pairs:
            return m
        a, b = self.pairs[slot, "m"], self.pairs[slot, "mlp"]
        return _Add.apply(m, n, self.anchor, a, b, self.lora.config.scale)

    def head(self, hidden: Tensor) -> Tensor:
        """Raw logits of hidden states, as `GPT.head`: as many of each document."""
        model = self.lora.model
        if (-1, "h") not in self.pairs:
            return model.head(hidden)
        up = Up(self.pairs[-1, "head"], slice(None), slice(None))
        scale = self.lora.config.scale
        return _Project.apply(hidden, self.anchor, model.embedding, self.pairs[-1, "h"], [up], None, scale)[0]


# ---- the products: x (d w, in), A (d, R, in), B (d, out, r); gradients of A and B go where the pair says -------------


def _times(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale a b, batched, in one GEMM."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2]) if out is None else out
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _by_document(x: Tensor, d: int) -> Tensor:
    return x.unflatten(0, (d, -1))


class _Project(torch.autograd.Function):
    """y = x Wᵀ + h Bᵀ, target by target in its columns, with h = s x Aᵀ; and the columns `rest` of h."""

    @staticmethod
    def forward(ctx, x, anchor, weight, a: Pair, ups: list[Up], rest: slice | None, scale: float):
        h = _times(_by_document(x, len(a.weight)), a.weight.mT, scale)
        y = x @ weight.T
        for up in ups:
            _by_document(y, len(h))[..., up.columns].baddbmm_(h[..., up.low], up.b.weight.mT)
        ctx.save_for_backward(x, weight, h)
        ctx.a, ctx.ups, ctx.rest, ctx.scale = a, ups, rest, scale
        return y, h[..., rest].clone() if rest else h.new_empty(0)

    @staticmethod
    def backward(ctx, dy, dlow):
        x, weight, h = ctx.saved_tensors
        a, dh, dy_rows = ctx.a, torch.empty_like(h), _by_document(dy, len(h))
        for up in ctx.ups:
            mine = dy_rows[..., up.columns]
            torch.bmm(mine.mT, h[..., up.low], out=up.b.gradient)
            torch.bmm(mine, up.b.weight, out=dh[..., up.low])
        if ctx.rest:
            dh[..., ctx.rest] = dlow
        _times(dh.mT, _by_document(x, len(h)), ctx.scale, out=a.gradient)
        if not ctx.needs_input_grad[0]:
            return (None,) * 7
        dx = dy @ weight
        _by_document(dx, len(h)).baddbmm_(dh, a.weight, alpha=ctx.scale)
        return dx, *(None,) * 6


class _Output(torch.autograd.Function):
    """y = x Wᵀ + h Bᵀ."""

    @staticmethod
    def forward(ctx, x, h, weight, b: Pair):
        y = x @ weight.T
        _by_document(y, len(h)).baddbmm_(h, b.weight.mT)
        ctx.save_for_backward(h, weight)
        ctx.b = b
        return y

    @staticmethod
    def backward(ctx, dy):
        h, weight = ctx.saved_tensors
        return dy @ weight, _into_b(dy, h, ctx.b), None, None


class _Add(torch.autograd.Function):
    """y + h Bᵀ with h = s x Aᵀ; over y, which nobody has kept."""

    @staticmethod
    def forward(ctx, y, x, anchor, a: Pair, b: Pair, scale: float):
        h = _times(_by_document(x, len(a.weight)), a.weight.mT, scale)
        y = y.detach()  # autograd, told of the change in place, would copy y's gradient three times
        _by_document(y, len(h)).baddbmm_(h, b.weight.mT)
        ctx.save_for_backward(x, h)
        ctx.a, ctx.b, ctx.scale = a, b, scale
        return y

    @staticmethod
    def backward(ctx, dy):
        x, h = ctx.saved_tensors
        dh = _into_b(dy, h, ctx.b)
        _times(dh.mT, _by_document(x, len(h)), ctx.scale, out=ctx.a.gradient)
        dx = _times(dh, ctx.a.weight, ctx.scale).view_as(x) if ctx.needs_input_grad[1] else None
        return dy, dx, *(None,) * 4


def _into_b(dy: Tensor, h: Tensor, b: Pair) -> Tensor:
    """Writes the gradient of B; returns that of h."""
    dy_rows = _by_document(dy, len(h))
    torch.bmm(dy_rows.mT, h, out=b.gradient)
    return torch.bmm(dy_rows, b.weight)
