"""Low-rank adapters (LoRA) for a batch of documents, each with its own, in every executed layer of a GPT.

A linear map y = W x gains s B A x, A (r, in), B (out, r), s = alpha / r. Queries, keys, values, and an addition to the
attention's output, all read the attention's input n; another reads the MLP's input and is added to its output; the last
is the head's. Additions to outputs come before the layer scales, which the model has folded into W and which here
multiply the rows of B as these are rounded to the model's dtype. Rows of a forward are documents: x is (d w, in), d
rows of w tokens.

Layout: everything of a document is one row of flat (d, P) buffers, all A first. So an optimizer step is one pass over
one tensor, a reset is a fill, the last documents of a batch are a slice, and a product over all documents is one
batched GEMM on strided views. The A that read one input are one matrix (R, in). Gradients are written into their buffer
by the backward pass itself, and what is added to y and dx is added by a GEMM: there is no pass for it. Of two products
that are summed the model's own is the second, as it has so much to multiply that it can read the first meanwhile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from niblick.evaluation.phased_config import PhasedConfig, Target
from niblick.model.gpt import GPT
from niblick.model.layers import compiled


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
        self.adamw = compiled(adamw_) if device.type == "cuda" else adamw_
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
        # Detached: compiled for a view of a buffer, the function would be compiled again for most others.
        rows = (x[last].detach() for x in (self.master, self.second, self.gradients, self.weights))
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
        y, low = _Project.apply(n, self.anchor, weight, self.pairs[slot, "n"], ups, self.lora.config.scale)
        return y, low if "o" in layout.attention else None

    def output(self, slot: int, y: Tensor, weight: Tensor, low: Tensor | None) -> Tensor:
        if low is None:
            return y @ weight.T
        return _Output.apply(y, low, weight, self.pairs[slot, "o"], self.lora.layout.low("o"))

    def mlp(self, slot: int, n: Tensor, mlp: Callable[[Tensor], Tensor]) -> Tensor:
        if (slot, "m") not in self.pairs:
            return mlp(n)
        n, low = _Down.apply(n, self.anchor, self.pairs[slot, "m"], self.lora.config.scale)
        return _Up.apply(mlp(n), low, self.pairs[slot, "mlp"])

    def head(self, hidden: Tensor) -> Tensor:
        """Raw logits of hidden states, as `GPT.head`: as many of each document."""
        model = self.lora.model
        if (-1, "h") not in self.pairs:
            return model.head(hidden)
        up = Up(self.pairs[-1, "head"], slice(None), slice(None))
        scale = self.lora.config.scale
        return _Project.apply(hidden, self.anchor, model.embedding, self.pairs[-1, "h"], [up], scale)[0]


# ---- the products: x (n, in), n = d w, A (d, R, in), B (d, out, r); gradients of A and B go where the pair says ------


def _by_document(x: Tensor, d: int) -> Tensor:
    return x.unflatten(0, (d, -1))


def _low(x: Tensor, a: Pair, scale: float) -> Tensor:
    """h = s x Aᵀ, (n, R)."""
    rows = _by_document(x, len(a.weight))
    h = x.new_empty(*rows.shape[:2], a.weight.shape[1])
    return torch.baddbmm(h, rows, a.weight.mT, beta=0, alpha=scale, out=h).flatten(0, 1)


def _into_a(dh: Tensor, x: Tensor, a: Pair, scale: float) -> None:
    """Writes the gradient of A, of h's (n, R)."""
    dh, x = (_by_document(t, len(a.weight)) for t in (dh, x))
    torch.baddbmm(a.gradient, dh.mT, x, beta=0, alpha=scale, out=a.gradient)


def _into_b(dy: Tensor, h: Tensor, b: Pair, dh: Tensor) -> None:
    """Writes the gradient of B, of y's (n, out), and that of h (n, r)."""
    dy, h, dh = (_by_document(t, len(b.weight)) for t in (dy, h, dh))
    torch.bmm(dy.mT, h, out=b.gradient)
    torch.bmm(dy, b.weight, out=dh)


class _Project(torch.autograd.Function):
    """y = x Wᵀ + h Bᵀ, target by target in its columns, with h = s x Aᵀ; and h, of whose gradient the columns that no
    target here reads are taken as they come, and the others are not."""

    @staticmethod
    def forward(ctx, x, anchor, weight, a: Pair, ups: list[Up], scale: float):
        ctx.set_materialize_grads(False)
        h, d = _low(x, a, scale), len(a.weight)
        covered = sum(up.b.weight.shape[1] for up in ups) == len(weight)
        y = (x.new_empty if covered else x.new_zeros)(len(x), len(weight))
        for up in ups:
            torch.bmm(_by_document(h[:, up.low], d), up.b.weight.mT, out=_by_document(y[:, up.columns], d))
        ctx.save_for_backward(x, weight, h)
        ctx.a, ctx.ups, ctx.scale = a, ups, scale
        return y.addmm_(x, weight.T), h

    @staticmethod
    def backward(ctx, dy, dh):
        x, weight, h = ctx.saved_tensors
        a, dh = ctx.a, torch.empty_like(h) if dh is None else dh
        for up in ctx.ups:
            _into_b(dy[:, up.columns], h[:, up.low], up.b, dh[:, up.low])
        _into_a(dh, x, a, ctx.scale)
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        dx = torch.empty_like(x)
        dx_rows = _by_document(dx, len(a.weight))
        torch.baddbmm(dx_rows, _by_document(dh, len(a.weight)), a.weight, beta=0, alpha=ctx.scale, out=dx_rows)
        return dx.addmm_(dy, weight), *(None,) * 5


class _Output(torch.autograd.Function):
    """y = x Wᵀ + h Bᵀ, with columns `low` of an h that nobody else reads (see `_Project`)."""

    @staticmethod
    def forward(ctx, x, h, weight, b: Pair, low: slice):
        y = x.new_empty(len(x), len(weight))
        torch.bmm(_by_document(h[:, low], len(b.weight)), b.weight.mT, out=_by_document(y, len(b.weight)))
        ctx.save_for_backward(h, weight)
        ctx.b, ctx.low = b, low
        return y.addmm_(x, weight.T)

    @staticmethod
    def backward(ctx, dy):
        h, weight = ctx.saved_tensors
        dh = torch.empty_like(h)
        _into_b(dy, h[:, ctx.low], ctx.b, dh[:, ctx.low])
        return dy @ weight, dh, None, None, None


class _Down(torch.autograd.Function):
    """x as it is, for one reader, and h = s x Aᵀ. What h adds to dx is added to what that reader has found."""

    @staticmethod
    def forward(ctx, x, anchor, a: Pair, scale: float):
        ctx.save_for_backward(x)
        ctx.a, ctx.scale = a, scale
        return x.view_as(x), _low(x, a, scale)

    @staticmethod
    def backward(ctx, dx, dh):
        (x,), a = ctx.saved_tensors, ctx.a
        _into_a(dh, x, a, ctx.scale)
        if ctx.needs_input_grad[0]:
            _by_document(dx, len(a.weight)).baddbmm_(_by_document(dh, len(a.weight)), a.weight, alpha=ctx.scale)
        return dx, None, None, None


class _Up(torch.autograd.Function):
    """y + h Bᵀ; over y, which nobody has kept."""

    @staticmethod
    def forward(ctx, y, h, b: Pair):
        y = y.detach()  # autograd, told of the change in place, would copy y's gradient three times
        _by_document(y, len(b.weight)).baddbmm_(_by_document(h, len(b.weight)), b.weight.mT)
        ctx.save_for_backward(h)
        ctx.b = b
        return y

    @staticmethod
    def backward(ctx, dy):
        (h,) = ctx.saved_tensors
        dh = torch.empty_like(h)
        _into_b(dy, h, ctx.b, dh)
        return dy, dh, None
