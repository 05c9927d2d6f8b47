"""Query and key heads made ready for attention: RMSNorm without weight, partial rotary embedding, gain per query head.

For a head vector z of d channels, with r = 1 / sqrt(mean(z²) + eps) and n = r z:

    out = g R n,    (R n)_j = n_j cos_j + n_{j+h} sin_j,    (R n)_{j+h} = n_{j+h} cos_j - n_j sin_j,    j < h

R leaves the channels from 2h on alone; g is gain[head] for q and 1 for k. R is orthogonal, so with p = R^T dout and
c = p · n, one sum over the head serves both gradients:

    dz = g r (p - n c / d),    dgain[head] = Σ_tokens c

A fused projection (queries, then keys, then values, one GEMM) is taken whole: v' = v and dv = dv', copied, so that its
gradient too is one tensor, written in one pass and ready for one GEMM, without concatenation or padding.

Shapes: q (N, H, d), k (N, G, d) raw projections, bfloat16, float16 or float32, channels adjacent, any other strides
(slices of one fused projection), or that projection (N, H + 2G, d) as q and kv_heads = G for k; cos and sin (N, h) or
(N, 1, h), 0 <= 2h <= d <= 256, in that dtype or float32; gain (H,) likewise, or None. Returns contiguous q' (N, H, d)
and k' (N, G, d), of a fused projection v' (N, G, d) too. Everything in between is float32. float64 runs on CPU only, in
plain PyTorch.
Must move: forward reads q and k and writes q' and k'; backward reads q, k and both gradients and writes dq and dk; v
costs a read and a write each way. Only the inputs are saved. The gradient of a result that nobody used is not read. The
gain's gradient is summed in a fixed order, without atomics, so it repeats bitwise.
Replaces: two RMSNorms, two rotary embeddings (three slices, four products and a concatenation each), a product; in the
backward of a fused projection, the concatenation of three gradients.
Refuses: other dtypes, channels that are not adjacent, d > 256, cos or sin that ask for a gradient.
From: modded-nanogpt (normalised queries and keys, half-split rotary); the gain per head is that of the challenge.
"""

import re
from collections.abc import Callable
from functools import lru_cache, wraps

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

# A lifted copy has ops of its own, so that it may stand beside the package.
NAMESPACE = "niblick" if __name__.startswith("niblick.") else "niblick_" + re.sub(r"\W", "_", __name__, flags=re.A)
EPS = 2.0**-23  # float32's, as torch.nn.functional.rms_norm takes it for 16-bit input too
# Query heads per program, at most; programs a split of the heads, each of which takes every programs-th step; warps;
# stages of the pipeline of loads. NVIDIA H200, 2026-11-20.
LAUNCH = {
    "forward": {"heads": 4, "programs": 264, "num_warps": 4, "STAGES": 2},
    "backward": {"heads": 4, "programs": 396, "num_warps": 2, "STAGES": 2},
}


def qk_norm_rope_ref(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, gain: Tensor | None = None, *, kv_heads: int | None = None,
    eps: float = EPS,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The specification, in float32 or, for float64 q, in float64; v as it is."""
    q, k, *v = (q, k) if k is not None else q.split((q.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (t.to(wide).view(len(q), 1, t.shape[-1]) for t in (cos, sin))
    h = cos.shape[-1]

    def norm_rope(z: Tensor) -> Tensor:
        n = F.rms_norm(z.to(wide), z.shape[-1:], eps=eps)
        first, second, rest = n.split((h, h, z.shape[-1] - 2 * h), dim=-1)
        return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)

    scale = 1.0 if gain is None else gain.to(wide)[:, None]
    return (norm_rope(q) * scale).to(q.dtype), norm_rope(k).to(k.dtype), *v


@triton.jit
def _head_tile(step, N, HEADS: tl.constexpr, d: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    """Head, token and column of a step's tile (heads, tokens, columns), and what of it there is.

    Heads come first so that a thread holds several heads of a token, whose rotation it then loads and unpacks once.
    """
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None, None]).to(tl.int64)
    token = step * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None].to(tl.int64)
    col = tl.arange(0, triton.next_power_of_2(d))[None, None, :]
    return head, token, col, (head < HEADS) & (token < N) & (col < d)


@triton.jit
def _rotation(cos_ptr, sin_ptr, place, N, h: tl.constexpr):
    """cos_j in columns j and j + h, 1 beyond; sin_j in column j, -sin_j in column j + h, 0 beyond. (1, tokens, d)"""
    _, token, col, _ = place
    cos, sin = 1.0, 0.0
    if h > 0:
        # Runs of columns, as long as the power of two in h, stay runs: told so, the compiler makes wide loads of them.
        run: tl.constexpr = h & -h
        j = tl.max_contiguous(tl.multiple_of(tl.where(col < h, col, col - h), (1, 1, run)), (1, 1, run))
        inside = (token < N) & (col < 2 * h)
        cos = tl.load(cos_ptr + token * h + j, mask=inside, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + token * h + j, mask=inside, other=0.0).to(tl.float32)
        sin = tl.where(col < h, sin, -sin)
    return cos, sin


@triton.jit
def _load_heads(ptr, place, stride_token, stride_head, stride_d):
    head, token, col, here = place
    z = tl.zeros(here.shape, tl.float32)  # the gradient of a result that nobody used
    if ptr is not None:
        offsets = head * stride_head + token * stride_token + col.to(tl.int64) * stride_d
        z = tl.load(ptr + offsets, mask=here, other=0.0).to(tl.float32)
    return z


@triton.jit
def _load_partners(ptr, place, stride_token, stride_head, stride_d, h: tl.constexpr):
    """Column j + h in column j < h, j in column j + h, 0 beyond: from the cache, where the heads come to anyway."""
    head, token, col, here = place
    partners = 0.0
    if (h > 0) and (ptr is not None):
        run: tl.constexpr = h & -h
        partner = tl.max_contiguous(tl.multiple_of(tl.where(col < h, col + h, col - h), (1, 1, run)), (1, 1, run))
        offsets = head * stride_head + token * stride_token + partner.to(tl.int64) * stride_d
        partners = tl.load(ptr + offsets, mask=here & (col < 2 * h), other=0.0).to(tl.float32)
    return partners


@triton.jit
def _store_heads(ptr, z, place, HEADS: tl.constexpr, d: tl.constexpr):
    """HEADS: from token to token of the tensor, which may be more than are stored."""
    head, token, col, here = place
    tl.store(ptr + (token * HEADS + head) * d + col, z.to(ptr.dtype.element_ty), mask=here)


@triton.jit
def _rstd(z, d: tl.constexpr, eps: tl.constexpr):
    return tl.rsqrt(tl.sum(z * z, axis=2) / d + eps)


@triton.jit
def _qk_norm_rope_fwd_kernel(
    q_ptr,  # (N, H, d)
    k_ptr,  # (N, G, d)
    v_ptr,  # (N, G, d), strides as k's, or None
    cos_ptr,  # (N, h), contiguous
    sin_ptr,  # (N, h), contiguous
    gain_ptr,  # (H,) or None
    q_out_ptr,  # (N, H, d), contiguous
    k_out_ptr,  # (N, G, d), contiguous
    v_out_ptr,  # (N, G, d), contiguous, or None
    stride_q, stride_q_head, stride_k, stride_k_head, N, steps,
    H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, h: tl.constexpr, eps: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for step in tl.range(tl.program_id(0), steps, tl.num_programs(0), num_stages=STAGES):
        at_q, at_k = _head_tile(step, N, H, d, BLOCK_N, BLOCK_H), _head_tile(step, N, G, d, BLOCK_N, BLOCK_G)
        # All loads before the first store, over which the compiler could not move them.
        q = _load_heads(q_ptr, at_q, stride_q, stride_q_head, 1)
        k = _load_heads(k_ptr, at_k, stride_k, stride_k_head, 1)
        partners_q = _load_partners(q_ptr, at_q, stride_q, stride_q_head, 1, h)
        partners_k = _load_partners(k_ptr, at_k, stride_k, stride_k_head, 1, h)
        v = _load_heads(v_ptr, at_k, stride_k, stride_k_head, 1)
        cos, sin = _rotation(cos_ptr, sin_ptr, at_q, N, h)
        scale = _rstd(q, d, eps)
        if gain_ptr is not None:
            heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
            scale *= tl.load(gain_ptr + heads, mask=heads < H, other=0.0).to(tl.float32)[:, None]
        _store_heads(q_out_ptr, (q * cos + partners_q * sin) * scale[:, :, None], at_q, H, d)
        _store_heads(k_out_ptr, (k * cos + partners_k * sin) * _rstd(k, d, eps)[:, :, None], at_k, G, d)
        if v_out_ptr is not None:
            _store_heads(v_out_ptr, v, at_k, G, d)


@triton.jit
def _through_norm(z, p, d: tl.constexpr, eps: tl.constexpr):
    """dz / g and c, from z and p = R^T dout."""
    r = _rstd(z, d, eps)
    c = r * tl.sum(z * p, axis=2)
    return r[:, :, None] * (p - (r * c / d)[:, :, None] * z), c


@triton.jit
def _qk_norm_rope_bwd_kernel(
    dq_out_ptr,  # (N, H, d), any strides, or None
    dk_out_ptr,  # (N, G, d), any strides, or None
    dv_out_ptr,  # (N, G, d), any strides, or None
    q_ptr,  # (N, H, d)
    k_ptr,  # (N, G, d)
    cos_ptr,  # (N, h), contiguous
    sin_ptr,  # (N, h), contiguous
    gain_ptr,  # (H,) or None
    dq_ptr,  # (N, H, d), contiguous, or the first heads of (N, H + 2G, d)
    dk_ptr,  # (N, G, d), contiguous, or the next
    dv_ptr,  # (N, G, d), the last, or None
    dgain_ptr,  # (programs, H) float32: each program's share, or None
    stride_dq, stride_dq_head, stride_dq_d, stride_dk, stride_dk_head, stride_dk_d,
    stride_dv, stride_dv_head, stride_dv_d,
    stride_q, stride_q_head, stride_k, stride_k_head, N, steps,
    H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, h: tl.constexpr, eps: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    HEADS_Q: tl.constexpr = H if dv_ptr is None else H + 2 * G
    HEADS_K: tl.constexpr = G if dv_ptr is None else H + 2 * G
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dgain = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)  # by a token's place in the step; summed over those at the end
    for step in tl.range(tl.program_id(0), steps, tl.num_programs(0), num_stages=STAGES):
        at_q, at_k = _head_tile(step, N, H, d, BLOCK_N, BLOCK_H), _head_tile(step, N, G, d, BLOCK_N, BLOCK_G)
        q = _load_heads(q_ptr, at_q, stride_q, stride_q_head, 1)
        p_q = _load_heads(dq_out_ptr, at_q, stride_dq, stride_dq_head, stride_dq_d)
        k = _load_heads(k_ptr, at_k, stride_k, stride_k_head, 1)
        p_k = _load_heads(dk_out_ptr, at_k, stride_dk, stride_dk_head, stride_dk_d)
        partners_q = _load_partners(dq_out_ptr, at_q, stride_dq, stride_dq_head, stride_dq_d, h)
        partners_k = _load_partners(dk_out_ptr, at_k, stride_dk, stride_dk_head, stride_dk_d, h)
        dv = _load_heads(dv_out_ptr, at_k, stride_dv, stride_dv_head, stride_dv_d)
        cos, sin = _rotation(cos_ptr, sin_ptr, at_q, N, h)
        dq, c = _through_norm(q, p_q * cos - partners_q * sin, d, eps)
        dk, _ = _through_norm(k, p_k * cos - partners_k * sin, d, eps)
        if gain_ptr is not None:
            dq *= tl.load(gain_ptr + heads, mask=heads < H, other=0.0).to(tl.float32)[:, None, None]
            dgain += c
        _store_heads(dq_ptr, dq, at_q, HEADS_Q, d)
        _store_heads(dk_ptr, dk, at_k, HEADS_K, d)
        if dv_ptr is not None:
            _store_heads(dv_ptr, dv, at_k, HEADS_K, d)
    if dgain_ptr is not None:
        tl.store(dgain_ptr + tl.program_id(0) * H + heads, tl.sum(dgain, axis=1), mask=heads < H)


def _as_given(launcher: Callable) -> Callable:
    """On the device of the arguments, where Triton takes the current one, and in their dtypes, autocast or not."""

    @wraps(launcher)
    def run(*args, **kwargs):
        flat = (t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else (arg,)))
        tensor = next(t for t in flat if isinstance(t, Tensor))
        with torch.cuda.device_of(tensor), torch.autocast(tensor.device.type, enabled=False):
            return launcher(*args, **kwargs)

    return run


def _refuse_tangents(name: str, *tensors: Tensor | None) -> None:
    """An op has no rule for forward-mode differentiation: tangents would be dropped, as if they were 0."""
    if not torch.compiler.is_compiling() and any(unpack_dual(t).tangent is not None for t in tensors if t is not None):
        raise RuntimeError(f"{name}: expected no forward-mode differentiation, got a tensor with a tangent")


def _heads(q: Tensor, k: Tensor | None, kv_heads: int) -> tuple[Tensor, ...]:
    """q and k or, of a fused projection, its views q, k and v."""
    return (q, k) if k is not None else q.split((q.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)


@_as_given
def _forward(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, gain: Tensor | None, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q', k' and, of a fused projection, v; without k, v has no elements."""
    q, k, *v = _heads(q, k, kv_heads)
    q_out, k_out, *v_out = (torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in (q, k, *v))
    grid, sizes = _launch("forward", q.is_cuda, *q.shape, k.shape[1], cos.shape[1])
    _qk_norm_rope_fwd_kernel[grid](
        q, k, *(v or [None]), cos, sin, gain, q_out, k_out, *(v_out or [None]),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), **sizes, eps=eps,
    )  # fmt: skip
    return q_out, k_out, *(v_out or [q.new_empty(0)])


@_as_given
def _backward(
    dq_out: Tensor | None, dk_out: Tensor | None, dv_out: Tensor | None, q: Tensor, k: Tensor | None,
    cos: Tensor, sin: Tensor, gain: Tensor | None, kv_heads: int, eps: float, gain_wanted: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q (or of the fused projection), k and gain, without elements where there is none, or none is
    wanted."""
    dq, dk = (None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in (q, k))
    gradients, (q_heads, k_heads, *v) = _heads(dq, dk, kv_heads), _heads(q, k, kv_heads)
    grid, sizes = _launch("backward", q.is_cuda, *q_heads.shape, k_heads.shape[1], cos.shape[1])
    gain_wanted = gain_wanted and gain is not None
    dgain = torch.empty((grid[0], len(gain)), dtype=torch.float32, device=q.device) if gain_wanted else None
    douts = (dq_out, dk_out, dv_out if v else None)
    # None is no argument at all: what the two forms do not share costs the plain one nothing, to the instruction.
    strides = (stride for dout in douts for stride in ((None,) * 3 if dout is None else dout.stride()))
    _qk_norm_rope_bwd_kernel[grid](
        *douts, q_heads, k_heads, cos, sin, gain, *gradients, *([] if v else [None]), dgain, *strides,
        q_heads.stride(0), q_heads.stride(1), k_heads.stride(0), k_heads.stride(1), **sizes, eps=eps,
    )  # fmt: skip
    dk = q.new_empty(0) if dk is None else dk
    return dq, dk, dgain.sum(0).to(gain.dtype) if gain_wanted else q.new_empty(0)


@lru_cache  # it is most of what a launch costs the host
def _launch(direction: str, cuda: bool, N: int, H: int, d: int, G: int, h: int) -> tuple[tuple[int, int], dict]:
    launch = LAUNCH[direction]
    splits = triton.cdiv(H, launch["heads"])
    # One load of 8 channels a thread and head, so that all tiles of a program lie in its threads alike.
    block_n = max(1, 256 * launch["num_warps"] // triton.next_power_of_2(d))
    steps = triton.cdiv(N, block_n)
    # Two programs are enough to test the loop and the sum over programs in the interpreter.
    programs = min(steps, launch["programs"] if cuda else 2)
    block_h, block_g = (triton.next_power_of_2(triton.cdiv(heads, splits)) for heads in (H, G))
    sizes = {"N": N, "steps": steps, "H": H, "G": G, "d": d, "h": h}
    blocks = {"BLOCK_N": block_n, "BLOCK_H": block_h, "BLOCK_G": block_g}
    return (programs, splits), sizes | blocks | {"STAGES": launch["STAGES"], "num_warps": launch["num_warps"]}


def _forward_eager(q, k, cos, sin, gain, kv_heads, eps):
    q_out, k_out, *v = qk_norm_rope_ref(q, k, cos, sin, gain, kv_heads=kv_heads, eps=eps)
    v_out = v[0].clone(memory_format=torch.contiguous_format) if v else q.new_empty(0)
    return q_out, k_out, v_out


def _backward_eager(dq_out, dk_out, dv_out, q, k, cos, sin, gain, kv_heads, eps, gain_wanted=True):
    fused, dtype, wide = k is None, q.dtype, torch.promote_types(q.dtype, torch.float32)
    cos, sin = (t.to(wide)[:, None] for t in (cos, sin))
    q, k, *v = _heads(q, k, kv_heads)
    douts = zip((dq_out, dk_out, dv_out), (q, k, *v), strict=False)
    dq_out, dk_out, *dv = (torch.zeros_like(z) if dout is None else dout for dout, z in douts)
    h, d = cos.shape[-1], q.shape[-1]

    def through(dout: Tensor, z: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
        first, second, rest = dout.to(wide).split((h, h, d - 2 * h), dim=-1)
        p = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
        r = torch.rsqrt(z.to(wide).square().mean(-1, keepdim=True) + eps)
        n = z.to(wide) * r
        c = (n * p).sum(-1, keepdim=True)
        return (scale * r * (p - n * c / d)).to(dtype), c[..., 0]

    dq, c = through(dq_out, q, 1.0 if gain is None else gain.to(wide)[:, None])
    dk, _ = through(dk_out, k, 1.0)
    dq, dk = (torch.cat((dq, dk, *dv), 1), q.new_empty(0)) if fused else (dq, dk)
    return dq, dk, c.sum(0).to(gain.dtype) if gain is not None and gain_wanted else q.new_empty(0)


# Under TRITON_INTERPRET=1 the decorator above gave an interpreted function, and the CPU runs the Triton code itself.
INTERPRETED = not isinstance(_qk_norm_rope_fwd_kernel, triton.runtime.JITFunction)

_op = torch.library.custom_op(f"{NAMESPACE}::qk_norm_rope", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    f"{NAMESPACE}::qk_norm_rope_backward", _backward, mutates_args=(), device_types="cuda"
)


@_op.register_kernel("cpu")
def _forward_cpu(q, *args):
    return (_forward if INTERPRETED and q.dtype != torch.float64 else _forward_eager)(q, *args)


@_op_backward.register_kernel("cpu")
def _backward_cpu(dq_out, dk_out, dv_out, q, *args):
    backward = _backward if INTERPRETED and q.dtype != torch.float64 else _backward_eager
    return backward(dq_out, dk_out, dv_out, q, *args)


@_op.register_fake
def _forward_fake(q, k, cos, sin, gain, kv_heads, eps):
    q, k, *v = _heads(q, k, kv_heads)
    return q.new_empty(q.shape), k.new_empty(k.shape), q.new_empty(v[0].shape if v else 0)


@_op_backward.register_fake
def _backward_fake(dq_out, dk_out, dv_out, q, k, cos, sin, gain, kv_heads, eps, gain_wanted=True):
    dk = q.new_empty(0 if k is None else k.shape)
    dgain = gain.new_empty(gain.shape) if gain is not None and gain_wanted else q.new_empty(0)
    return q.new_empty(q.shape), dk, dgain


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # a result that nobody used: None instead of zeros to write and read
    *tensors, ctx.kv_heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dq_out, dk_out, dv_out):
    _, k, _, _, gain = tensors = ctx.saved_tensors
    gain_wanted = gain is not None and ctx.needs_input_grad[4]
    dq, dk, dgain = _op_backward(dq_out, dk_out, dv_out, *tensors, ctx.kv_heads, ctx.eps, gain_wanted)
    return dq, None if k is None else dk, None, None, dgain if gain_wanted else None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def qk_norm_rope(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, gain: Tensor | None = None, *, kv_heads: int | None = None,
    eps: float = EPS,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Queries and keys, normalised per head, their first 2h channels rotated, the queries times their head's gain.

    q: (N, H, d), k: (N, G, d), d <= 256, bfloat16, float16 or float32, channels adjacent; float64 on CPU only. Or, with
    k None and kv_heads = G, q: (N, H + 2G, d), a fused projection: heads of queries, then of keys, then of values.
    cos, sin: (N, h) or (N, 1, h), 0 <= 2h <= d, contiguous, in q's dtype or float32: the angle of channels j and
    j + h. They get no gradient. gain: (H,), elements adjacent, in q's dtype or float32, or None for 1. eps: > 0.
    Returns q' (N, H, d) and k' (N, G, d), of a fused projection also a copy of v (N, G, d): contiguous, in q's dtype.
    Differentiable once, in reverse mode, in q, k and gain.
    Raises ValueError for a shape, layout, device or eps, or a cos or sin with a gradient; TypeError for a dtype or
    another type.
    """
    named = {"q": q, "k": k, "cos": cos, "sin": sin, "gain": gain}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name not in ("k", "gain")):
            raise TypeError(f"qk_norm_rope: expected {name} to be a tensor, got {type(tensor).__name__}")
    if (k is None) == (kv_heads is None):
        got = "neither" if k is None else "both"
        raise ValueError(f"qk_norm_rope: expected k or, for a fused projection, k=None and kv_heads, got {got}")
    if k is None:
        if not isinstance(kv_heads, int) or isinstance(kv_heads, bool):
            raise TypeError(f"qk_norm_rope: expected kv_heads to be an int, got {kv_heads!r}")
        if kv_heads < 1 or q.ndim != 3 or q.shape[1] <= 2 * kv_heads or q.shape[2] == 0:
            got = f"{tuple(q.shape)} with kv_heads={kv_heads}"
            raise ValueError(f"qk_norm_rope: expected q of shape (N, H + 2 kv_heads, d), kv_heads > 0, got {got}")
    elif q.ndim != 3 or k.ndim != 3 or len(q) != len(k) or q.shape[2] != k.shape[2] or 0 in (*q.shape[1:], k.shape[1]):
        got = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(f"qk_norm_rope: expected q of shape (N, H, d) and k of shape (N, G, d), got {got}")
    if q.shape[2] > 256:
        raise ValueError(f"qk_norm_rope: expected q and k with d <= 256, got {q.shape[2]}")
    (N, H, d), G = q.shape, kv_heads or 0
    H -= 2 * G
    if cos.shape != sin.shape or cos.shape[:-1] not in ((N,), (N, 1)) or 2 * cos.shape[-1] > d:
        got = f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        raise ValueError(f"qk_norm_rope: expected cos and sin of shape ({N}, h) or ({N}, 1, h), 2h <= {d}, got {got}")
    if gain is not None and gain.shape != (H,):
        raise ValueError(f"qk_norm_rope: expected gain of shape ({H},), got {tuple(gain.shape)}")
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"qk_norm_rope: expected eps to be a number, got {eps!r}")
    if not 0 < eps < float("inf"):
        raise ValueError(f"qk_norm_rope: expected a finite eps > 0, got {eps}")
    allowed = (torch.bfloat16, torch.float16, torch.float32) + (torch.float64,) * (q.device.type == "cpu")
    for name, tensor in named.items():
        if tensor is None:
            continue
        dtypes = allowed if name == "q" else (q.dtype,)
        if name not in ("q", "k") and q.dtype != torch.float64:
            dtypes = (q.dtype, torch.float32)
        if tensor.dtype not in dtypes:
            expected = " or ".join(dict.fromkeys(str(dtype)[6:] for dtype in dtypes))
            raise TypeError(f"qk_norm_rope: expected {name} in {expected}, got {tensor.dtype} on {tensor.device}")
        if tensor.device != q.device:
            raise ValueError(f"qk_norm_rope: expected {name} on {q.device}, got {tensor.device}")
        if name not in ("cos", "sin") and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"qk_norm_rope: expected {name} with adjacent channels, got strides {tensor.stride()}")
    if not (cos.is_contiguous() and sin.is_contiguous()):
        got = f"{cos.stride()} and {sin.stride()}"
        raise ValueError(f"qk_norm_rope: expected contiguous cos and sin, got strides {got}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("qk_norm_rope: expected cos and sin without a gradient, got requires_grad=True")
    _refuse_tangents("qk_norm_rope", *named.values())
    if cos.ndim == 3:
        cos, sin = cos[:, 0], sin[:, 0]
    q_out, k_out, v = _op(q, k, cos, sin, gain, G, float(eps))
    return (q_out, k_out) if k is not None else (q_out, k_out, v)


# --- not needed when lifted ---

SIZES = {  # N, H d, G, d, 2h and, of a fused projection, 1
    "odd": (71, 60, 2, 20, 12),
    "odd, qkv": (43, 120, 3, 20, 12, 1),
    "tile": (40, 512, 4, 64, 16),
    "whole": (9, 96, 3, 32, 32),
    "none": (1, 16, 1, 16, 0),
    "record": (98304, 512, 4, 64, 16),
    "record, qkv": (98304, 512, 4, 64, 16, 1),
    "large": (4194400, 512, 1, 64, 16),
}


def qk_norm_rope_inputs(size: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    """Head vectors of every length, from one fused projection with values behind them; one is zero, one tiny."""
    N, D, G, d, rope_dims, *fused = size
    H = D // d
    generator = torch.Generator(device).manual_seed(seed)
    length = torch.rand((N, H + 2 * G, 1), generator=generator, device=device) * 4
    qkv = length * torch.randn((N, H + 2 * G, d), generator=generator, device=device)
    qkv[-1, 0], qkv[0, H] = 0.0, qkv[0, H] * 1e-3
    qkv = qkv.to(dtype)
    q, k, _ = qkv.split((H, G, G), dim=1)
    frequencies = 10000.0 ** -torch.linspace(0, 1, rope_dims // 2, device=device)
    angles = torch.arange(N, device=device)[:, None, None] * frequencies
    gain = 1.5 + torch.randn(H, generator=generator, device=device)
    heads = {"q": qkv, "k": None, "kv_heads": G} if fused else {"q": q, "k": k.requires_grad_()}
    heads["q"].requires_grad_()
    return heads | {
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "gain": gain.requires_grad_(),
    }


def qk_norm_rope_cost(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    N, D, G, d, rope_dims, *fused = size
    heads, tables = N * (D + G * d) * dtype.itemsize, N * rope_dims * dtype.itemsize
    values = 2 * N * G * d * dtype.itemsize if fused else 0
    return {
        "bytes_forward": 2 * heads + values + tables,
        "bytes_backward": 3 * heads + values + tables,
        "flops_forward": 4 * N * (D + G * d),
        "flops_backward": 8 * N * (D + G * d),
    }


def _prove(fn: Callable, ref: Callable, make_inputs: Callable, cost: Callable, sizes: dict) -> None:
    """Print the error against float64 beside eager's and, on a GPU, the speed at the record size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{fn.__name__}: largest error against float64, of the largest value (eager's), per result")
    for dtype in (torch.float32, torch.bfloat16):
        for size in list(sizes.values())[:2]:
            inputs = make_inputs(size, dtype, device)
            doubled = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in _floats(inputs).items()}
            truth = _results(ref, inputs | doubled)
            ours, eagers = ([_error(r, t) for r, t in zip(_results(f, inputs), truth, strict=True)] for f in (fn, ref))
            print(f"  {size} {dtype}:", ", ".join(f"{a:.1e} ({b:.1e})" for a, b in zip(ours, eagers, strict=True)))
    if device == "cpu":
        print("no GPU here: nothing timed")
        return
    inputs, work = make_inputs(sizes["record"], torch.bfloat16, device), cost(sizes["record"], torch.bfloat16)
    source = torch.empty(2**30, dtype=torch.uint8, device=device).random_()
    roof = 2 * source.numel() / triton.testing.do_bench(source.clone, return_mode="median")
    leaves = [v for v in _floats(inputs).values() if v.requires_grad]
    ones = [torch.ones_like(output) for output in _outputs(fn, inputs)]
    calls = {"forward": lambda: fn(**inputs)}
    if leaves:
        calls["forward + backward"] = lambda: torch.autograd.grad(_outputs(fn, inputs), leaves, ones)
    for directions, call in calls.items():
        ms = triton.testing.do_bench(call, return_mode="median")
        moved, flops = (sum(work[f"{what}_{d}"] for d in directions.split(" + ")) / ms for what in ("bytes", "flops"))
        speed = f"{moved / 1e9:.2f} TB/s ({moved / roof:.0%} of a copy's), {flops / 1e9:.0f} TFLOP/s"
        print(f"{directions} {sizes['record']}: {ms:.3f} ms, {speed}")


def _floats(inputs: dict[str, object]) -> dict[str, Tensor]:
    return {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}


def _outputs(fn: Callable, inputs: dict[str, object]) -> list[Tensor]:
    outputs = fn(**inputs)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def _results(fn: Callable, inputs: dict[str, object]) -> list[Tensor]:
    outputs, leaves = _outputs(fn, inputs), [v for v in _floats(inputs).values() if v.requires_grad]
    gradients = torch.autograd.grad(sum(output.sum() for output in outputs), leaves) if leaves else ()
    return [output.detach() for output in outputs] + list(gradients)


def _error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).abs().max() / truth.abs().max())


if __name__ == "__main__":
    _prove(qk_norm_rope, qk_norm_rope_ref, qk_norm_rope_inputs, qk_norm_rope_cost, SIZES)
