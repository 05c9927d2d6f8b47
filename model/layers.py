"""The stateless parts of the GPT. Sizes: N tokens, D width, H and G query and key/value heads, d head width."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from niblick.model.config import GPTConfig

EPS = 2.0**-23
"""float32's epsilon, also for bf16 input: torch takes the eps of the type it computes in."""


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + EPS) over the last dimension, no weight; float32 inside for 16-bit input."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)


def widen(x: Tensor) -> Tensor:
    """16-bit to float32; wider types stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Rotary(nn.Module):
    """Partial rotary embedding of the first `rope_dims` of a head, half-split: dimension j turns with j + rope_dims/2.

    z'_j = z_j cos θ + z_{j+h} sin θ, z'_{j+h} = -z_j sin θ + z_{j+h} cos θ, θ = position x base^(-j/h).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.half = config.rope_dims // 2
        frequencies = config.rope_base ** -(torch.arange(self.half, dtype=torch.float64) / max(self.half, 1))
        if config.rope_frequencies_bf16:
            frequencies = frequencies.float().bfloat16().double()
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self, n_tokens: int, cu_seqlens: Tensor, dtype: torch.dtype, relative: bool = False
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, each (N, 1, rope_dims / 2). The angle is a float32 product (float64 for float64).

        relative: positions count from their segment's start, as they do in rows in any case.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        positions = torch.arange(n_tokens, device=self.frequencies.device)
        if relative or self.config.attention_span == "rows":
            positions = positions - segment_start(positions, cu_seqlens)
        positions = positions.to(wide)
        if self.config.rope_positions_bf16:
            positions = positions.bfloat16().to(wide)
        angles = (positions[:, None] * self.frequencies.to(wide))[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def segment_start(positions: Tensor, cu_seqlens: Tensor) -> Tensor:
    """For each stream position (N,) the first position of its segment; trailing empty segments are harmless."""
    return cu_seqlens[torch.searchsorted(cu_seqlens, positions.to(cu_seqlens.dtype), right=True) - 1]


def channel_smear(x: Tensor, theta: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x_t <- (1 - c) x_t + c x_{t-1}, c = σ(θ) per channel, x_{-1} = 0 at the start of every row (PR #1423)."""
    positions = torch.arange(x.shape[0], device=x.device)
    starts = segment_start(positions, cu_seqlens) == positions
    previous = torch.where(starts[:, None], 0.0, x.roll(1, 0)).to(x.dtype)
    return torch.lerp(x, previous, torch.sigmoid(theta.to(x.dtype)))


def mix_lanes(a: Tensor, b: Tensor, attn: Tensor, m: Tensor, resid: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    """The lanes a and b (N, D) after a layer with attention's output and the MLP's: by resid (2,) of themselves, and by
    post (2, 2), source and lane, of those. Launched one by one these are 26 passes over memory forward."""
    if not _alone(a, resid):
        return _mix_lanes(a, b, attn, m, resid.to(a.dtype), post.to(a.dtype))
    b = b.view_as(b)  # two tensors, also where the lanes begin as one
    return compiled(_mix_lanes)(a, b, attn, m, resid, post)


def _mix_lanes(a, b, attn, m, resid, post) -> tuple[Tensor, Tensor]:
    mixed = (
        resid[0] * a + post[0, 0] * attn + post[1, 0] * m,
        resid[1] * b + post[0, 1] * attn + post[1, 1] * m,
    )
    return tuple(x.to(a.dtype) for x in mixed)


def mix_skip(x: Tensor, popped: Tensor, kept: Tensor | float, weight: Tensor) -> Tensor:
    """kept x + weight popped, x and popped (N, D), per channel."""
    if _alone(x, weight):
        return compiled(_mix_skip)(x, popped, kept, weight)
    kept, weight = (w if isinstance(w, float) else w.to(x.dtype) for w in (kept, weight))
    return _mix_skip(x, popped, kept, weight)


def _mix_skip(x, popped, kept, weight) -> Tensor:
    return (kept * x + weight * popped).to(x.dtype)


def _alone(x: Tensor, weight: Tensor) -> bool:
    """Whether to compile what is done to the stream x by a weight that is frozen, as nothing around it is compiled."""
    return x.is_cuda and x.requires_grad and not weight.requires_grad and not torch.compiler.is_compiling()


@cache
def compiled(function: Callable) -> Callable:
    """For streams of any length, that of the first argument. Other sizes are constants: dividing by numbers that are
    known only later, to find a channel, takes as long as what is computed (AdamW of adapters 4.6 ms instead of 3.0)."""
    run = torch.compile(function)

    def call(first: Tensor, *others: Tensor | float) -> object:
        for x in (first, *others):
            if isinstance(x, Tensor) and x.shape[:1] == first.shape[:1]:
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return run(first, *others)

    return call


def leaky_relu_squared(h: Tensor, slope: float) -> Tensor:
    return F.leaky_relu(h, slope).square()


def drop_largest_norms(h: Tensor, quantile: float) -> Tensor:
    """Zero the rows of h (N, F) whose norm reaches the given quantile of all N norms; survivors are not rescaled."""
    norms = widen(h).norm(dim=-1)
    # torch.quantile, spelled out: it has a limit of 16 million values and breaks the graph on some versions.
    place = quantile * (len(norms) - 1)
    low = int(place)
    ordered = norms.sort().values[low : low + 2]
    threshold = torch.lerp(ordered[0], ordered[-1], place - low)
    return torch.where((norms >= threshold)[:, None], 0.0, h).to(h.dtype)
