"""Causal attention inside segments of one flat stream, and the ladder of its implementations.

Every rung has one signature: `attend(q, k, v, cu_seqlens, max_segment) -> y` with q, y (N, H, d), k, v (N, G, d),
query head h reading key/value head h // (H / G), scores scaled by 1 / sqrt(d), and segment s being the tokens
cu_seqlens[s] .. cu_seqlens[s+1] (int32, trailing empty segments allowed). Tokens of two segments never meet.

The ladder is FlashAttention-4 -> 3 -> 2 -> torch's own; `plain` is the loop over segments that a CPU uses.
"""

import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from niblick.model.config import ConfigError
from niblick.model.layers import compiled

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]

LADDER = ("fa4", "fa3", "fa2", "torch")


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, deterministic: bool = False
) -> tuple[str, Attend]:
    """The rung named, or for `auto` the first that this machine offers. A named rung that is missing is refused.

    `deterministic`: gradients that repeat bit for bit. (torch's own rung follows torch.use_deterministic_algorithms.)
    """
    flash_possible = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if name == "plain" or (name == "auto" and not flash_possible):
        return "plain", attend_plain
    if not flash_possible:
        raise ConfigError(
            f"model.attention {name} needs a CUDA device and 16-bit activations: got {device} and {dtype}"
        )
    reasons = []
    for rung in LADDER if name == "auto" else (name,):
        try:
            return rung, _LOADERS[rung](device, deterministic)
        except (ImportError, OSError, AttributeError, ConfigError) as error:  # not there, or built for another torch
            reasons.append(f"{rung}: {error}")
    raise ConfigError(f"model.attention {name} is not available here ({'; '.join(reasons)})")


def attend_plain(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_segment: int) -> Tensor:
    """Segment by segment through torch's scaled_dot_product_attention; any dtype; reads cu_seqlens on the host."""
    bounds = cu_seqlens.tolist()
    pieces = []
    for start, end in pairwise(bounds):
        if start == end:
            continue
        one = [x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        pieces.append(F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(pieces)


def attend_some(q: Tensor, k: Tensor, v: Tensor, wanted: Tensor) -> Tensor:
    """Of few positions of each segment, where the stream is R segments of one width; any dtype and device.

    wanted: (R, c) int64, positions in the stream. q, y (R c, H, d), k, v (N, G, d).
    """
    (R, c), G, d = wanted.shape, *k.shape[1:]
    # The query heads of a key head lie one after another, as if they were more queries.
    q = q.view(R, c, G, -1, d).permute(0, 2, 3, 1, 4).reshape(R, G, -1, d)
    k, v = (x.unflatten(0, (R, -1)).transpose(1, 2) for x in (k, v))  # (R, G, width, d)
    width = k.shape[2]
    seen = torch.arange(width, device=wanted.device) <= wanted[:, :, None] % width  # (R, c, width)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.repeat(1, q.shape[2] // c, 1)[:, None])
    return y.unflatten(2, (-1, c)).permute(0, 3, 1, 2, 4).reshape(R * c, -1, d)


def _require_capability(device: torch.device, minimum: tuple[int, int]) -> None:
    found = torch.cuda.get_device_capability(device)
    if found < minimum:
        raise ConfigError(f"needs compute capability {minimum[0]}.{minimum[1]}, the card has {found[0]}.{found[1]}")


def _load_torch(device: torch.device, deterministic: bool) -> Attend:
    _require_capability(device, (8, 0))

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_segment: int) -> Tensor:
        return torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, max_segment, max_segment, 0.0, True, False, scale=q.shape[-1] ** -0.5
        )[0]

    return attend


def _load_fa2(device: torch.device, deterministic: bool) -> Attend:
    from flash_attn import flash_attn_varlen_func

    _require_capability(device, (8, 0))
    return _from_varlen_func(flash_attn_varlen_func, deterministic)


def _load_fa3(device: torch.device, deterministic: bool) -> Attend:
    from flash_attn_interface import flash_attn_varlen_func

    _require_capability(device, (9, 0))
    return _from_varlen_func(flash_attn_varlen_func, deterministic)


def _from_varlen_func(varlen_func: Callable, deterministic: bool) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_segment: int) -> Tensor:
        y = varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_segment,
            max_seqlen_k=max_segment,
            causal=True,
            deterministic=deterministic,
        )
        return y[0] if isinstance(y, tuple) else y

    return attend


@cache  # an op is registered once a process
def _load_fa4(device: torch.device, deterministic: bool) -> Attend:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    _require_capability(device, (9, 0))
    warnings.filterwarnings("ignore", message="Argument aux_data")  # of its own JIT about its own arguments
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    name = "attention_fa4_deterministic" if deterministic else "attention_fa4"
    return _register_fa4(name, _flash_attn_fwd, partial(_flash_attn_bwd, deterministic=deterministic), hopper)


def _register_fa4(name: str, forward: Callable, backward: Callable, hopper: bool) -> Attend:
    """FlashAttention-4 is a JIT without torch registration; as an opaque op it stays inside a full graph.

    The op takes k and v with an axis of turns, (N, G, T, d), all alike: their gradients then come apart, and whoever
    consumes them sums over the turns on the way. T is 1 but for Hopper's backward, see `_backward_by_turns`.
    """

    @torch.library.custom_op(f"niblick::{name}", mutates_args=(), device_types="cuda")
    def op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_segment: int) -> tuple[Tensor, Tensor]:
        # Its own choice for heads of 64 on Hopper is (192, 128): 0.459 ms where this takes 0.443 (H200, documents).
        tile = {"tile_mn": (192, 96)} if hopper and q.shape[-1] == 64 else {}
        y, lse, *_ = forward(q, k[:, :, 0], v[:, :, 0], **_segments(cu_seqlens, max_segment), return_lse=True, **tile)
        return y, lse

    @op.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_segment: int) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)

    @torch.library.custom_op(f"niblick::{name}_backward", mutates_args=(), device_types="cuda")
    def op_backward(
        dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cu_seqlens: Tensor, max_segment: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _backward_by_turns(partial(backward, **_segments(cu_seqlens, max_segment)), dy, q, k, v, y, lse)

    @op_backward.register_fake
    def _(dy, q, k, v, y, lse, cu_seqlens, max_segment):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def setup_context(ctx, inputs, output):
        q, k, v, cu_seqlens, ctx.max_segment = inputs
        y, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, y, lse, cu_seqlens)

    def autograd_backward(ctx, dy, dlse):
        q, k, v, y, lse, cu_seqlens = ctx.saved_tensors
        grads = op_backward(dy.contiguous(), q, k, v, y, lse, cu_seqlens, ctx.max_segment)
        return *grads, None, None

    op.register_autograd(autograd_backward, setup_context=setup_context)

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_segment: int) -> Tensor:
        turns = q.shape[1] // k.shape[1] if hopper else 1
        whole = turns == 1 or torch.compiler.is_compiling()  # then sums over turns are part of what reads them
        k, v = (_expand if whole else _InTurns.apply)(k, v, turns)
        return op(q, k, v, cu_seqlens, max_segment)[0]

    return attend


def _expand(k: Tensor, v: Tensor, turns: int) -> tuple[Tensor, Tensor]:
    return tuple(x[:, :, None].expand(-1, -1, turns, -1) for x in (k, v))


class _InTurns(torch.autograd.Function):
    """`_expand`, of whose gradients torch's own sum takes three times as long as reading and writing them."""

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, turns: int) -> tuple[Tensor, Tensor]:
        return _expand(k, v, turns)

    @staticmethod
    def backward(ctx, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, None]:
        return *compiled(_sums_of_turns)(dk, dv), None


def _sums_of_turns(*gradients: Tensor) -> tuple[Tensor, ...]:
    return tuple(sum(x.unbind(2)) for x in gradients)


def _segments(cu_seqlens: Tensor, max_segment: int) -> dict[str, object]:
    both = {"cu_seqlens": cu_seqlens, "max_seqlen": max_segment}
    return {f"{name}_{side}": value for name, value in both.items() for side in "qk"} | {"causal": True}


def _backward_by_turns(
    backward: Callable, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q and, turn by turn, of k and v: turn t takes every T-th query head, beginning with t.

    With T = H / G a turn has as many query heads as key heads. With more, FlashAttention-4 on Hopper adds dk and dv in
    float32 buffers, which it must clear and convert afterwards: 1.21 ms instead of 1.00 (H200, 8 heads on 4).
    """
    turns = k.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for t in range(turns):
        one = slice(t, None, turns)
        into = {"dq": dq[:, one], "dk": dk[:, :, t], "dv": dv[:, :, t]}
        backward(q[:, one], k[:, :, t], v[:, :, t], y[:, one], dy[:, one], lse[one], **into)
    return dq, dk, dv


_LOADERS: dict[str, Callable[[torch.device, bool], Attend]] = {
    "fa4": _load_fa4,
    "fa3": _load_fa3,
    "fa2": _load_fa2,
    "torch": _load_torch,
}

PACKAGES = {"fa4": "flash-attn-4", "fa3": "flash-attn-3", "fa2": "flash-attn"}


def attention_version(rung: str) -> str:
    """The version of the package behind a rung; torch's for its own rungs."""
    try:
        return version(PACKAGES[rung]) if rung in PACKAGES else torch.__version__
    except PackageNotFoundError:
        return "of unknown version"
