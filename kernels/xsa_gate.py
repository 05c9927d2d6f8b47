"""Exclusive self-attention and head gates: what follows attention, before the output projection.

Each query head loses its component along its own token's value, and is multiplied by a gate. For head i, whose
key/value head is i // (H / G), with u = v / max(|v|, 1e-12), s = y · u and o = y - s u:

    out = a o,    a = amplitude σ(gate_scale z_i),    z = x gate_weight^T  or  gate_logits

Backward, with t = dout · u and p = dout - t u, all sums over the H / G heads i of a value:

    dy = a p,    dv = -(Σ a (s p + t y) - u Σ a s t) / |v|,    dz_i = gate_scale a' (y · p),
    dx = Σ_i dz_i gate_weight_i,    dgate_weight_i = Σ_tokens dz_i x

σ is the logistic function, a' the derivative of a. Where |v| < 1e-12, u is v times 1e12 and the minus before the second
sum a plus. Either part may be left out: without v nothing is excluded, without x and gate_logits a is 1.

Shapes: y (N, H, d) and v (N, G, d), G dividing H, d <= 256, bfloat16, float16 or float32, channels adjacent, any other
strides; x (N, W), W <= 64, the slice of the stream that opens the gates, any row stride; gate_weight (H, W); or
gate_logits (N, H), for gates that read the whole stream: those are a matrix product of their own. Returns (N, H, d),
contiguous. In between everything is float32, and float64 for float32 y, as a sum over a head multiplies whole rows.
float64 runs on CPU only, in plain PyTorch.
Must move: forward reads y and v and writes out; backward reads dout, y and v and writes dy and dv. Only the inputs are
saved. The gradient of gate_weight is summed in a fixed order, without atomics, so it repeats bitwise.
Replaces: normalize, two products and sums over broadcast heads, a linear layer, sigmoid, a product.
Refuses: other dtypes, channels that are not adjacent, d > 256, W > 64, an x wider than gate_weight.
From: exclusive self-attention (XSA) and sparse head gates as in PR #1855 of the challenge.
"""

import re
from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

# A lifted copy has ops of its own, so that it may stand beside the package.
NAMESPACE = "niblick" if __name__.startswith("niblick.") else "niblick_" + re.sub(r"\W", "_", __name__, flags=re.A)
# Elements of v per program. And, for the gradients of the gate's inputs, elements of a product per step; programs, each
# of which takes every programs-th step; warps; stages of the pipeline of loads. NVIDIA H200, 2026-11-20.
LAUNCH = {
    "heads": {"elements": 256},
    "weight": {"elements": 8192, "programs": 132, "num_warps": 8, "STAGES": 3},
}


def xsa_gate_ref(
    y: Tensor,
    v: Tensor | None = None,
    x: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_scale: float = 1.0,
    *,
    gate_logits: Tensor | None = None,
    amplitude: float = 1.0,
) -> Tensor:
    """The specification, in float32 or, for float64 y, in float64."""
    wide = torch.promote_types(y.dtype, torch.float32)
    out = y.to(wide)
    if v is not None:
        unit = F.normalize(v.to(wide), dim=-1, eps=1e-12)[:, :, None]
        grouped = out.unflatten(1, (v.shape[1], -1))
        out = (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).flatten(1, 2)
    if x is not None:
        gate_logits = F.linear(x.to(wide), gate_weight.to(wide))
    if gate_logits is not None:
        out = out * (amplitude * torch.sigmoid(gate_scale * gate_logits.to(wide)))[:, :, None]
    return out.to(y.dtype)


@triton.jit
def _group_tile(N, H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, BLOCK_N: tl.constexpr):
    """Token, head, group and column of a tile (heads of a group, tokens and groups, columns), and what of it there is.

    A thread holds all heads of a value, so that what they share is loaded once and sums over them are its own.
    """
    BLOCK_G: tl.constexpr = triton.next_power_of_2(G)
    number = tl.arange(0, triton.next_power_of_2(H // G))[:, None, None].to(tl.int64)
    row = tl.arange(0, BLOCK_N * BLOCK_G)[None, :, None].to(tl.int64)
    token, group = tl.program_id(0).to(tl.int64) * BLOCK_N + row // BLOCK_G, row % BLOCK_G
    col = tl.arange(0, triton.next_power_of_2(d))[None, None, :]
    there = (token < N) & (group < G)
    return token, group * (H // G) + number, group, col, there & (number < H // G), there & (col < d)


@triton.jit
def _load_unit(v_ptrs, there, WIDE: tl.constexpr):
    """u, 1 / max(|v|, 1e-12), and whether |v| is no less."""
    v = tl.load(v_ptrs, mask=there, other=0.0).to(WIDE)
    norm = tl.sqrt(tl.sum(v * v, axis=2))[:, :, None]
    inverse = 1.0 / tl.maximum(norm, 1e-12)
    return v * inverse, inverse, norm >= 1e-12


@triton.jit
def _load_gate(
    x_ptr, weight_ptr, logits_ptr, token, head, known, stride_x, stride_logits, N,
    W: tl.constexpr, gate_scale: tl.constexpr, amplitude: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """a and da/dz, from e = exp(-|z|) so that neither cancels; 1 and 0 without a gate. (heads, tokens and groups, 1)"""
    a, slope = 1.0, 0.0
    if (weight_ptr is not None) or (logits_ptr is not None):
        if weight_ptr is not None:
            col = tl.arange(0, triton.next_power_of_2(W))[None, None, :]
            weight = tl.load(weight_ptr + head * W + col, mask=known & (col < W), other=0.0).to(WIDE)
            x = tl.load(x_ptr + token * stride_x + col, mask=(token < N) & (col < W), other=0.0).to(WIDE)
            z = tl.sum(x * weight, axis=2)[:, :, None]
        else:
            z = tl.load(logits_ptr + token * stride_logits + head, mask=known, other=0.0).to(WIDE)
        z = gate_scale * z
        e = tl.exp(-tl.abs(z))
        s = 1.0 / (1.0 + e)
        a, slope = amplitude * tl.where(z > 0, s, e * s), gate_scale * amplitude * e * s * s
    return a, slope


@triton.jit
def _xsa_gate_fwd_kernel(
    y_ptr,  # (N, H, d)
    v_ptr,  # (N, G, d) or None
    x_ptr,  # (N, W) or None
    weight_ptr,  # (H, W), contiguous, or None
    logits_ptr,  # (N, H) or None
    out_ptr,  # (N, H, d), contiguous
    stride_y, stride_y_head, stride_v, stride_v_head, stride_x, stride_logits, N,
    H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, W: tl.constexpr,
    gate_scale: tl.constexpr, amplitude: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    token, head, group, col, known, there = _group_tile(N, H, G, d, BLOCK_N)
    here = known & (col < d)
    y = tl.load(y_ptr + token * stride_y + head * stride_y_head + col, mask=here, other=0.0).to(WIDE)
    if v_ptr is not None:
        u, _, _ = _load_unit(v_ptr + token * stride_v + group * stride_v_head + col, there, WIDE)
        y -= tl.sum(y * u, axis=2)[:, :, None] * u
    a, _ = _load_gate(
        x_ptr, weight_ptr, logits_ptr, token, head, known, stride_x, stride_logits, N, W, gate_scale, amplitude, WIDE
    )
    tl.store(out_ptr + (token * H + head) * d + col, (a * y).to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _xsa_gate_bwd_kernel(
    dout_ptr,  # (N, H, d), any strides
    y_ptr,  # (N, H, d)
    v_ptr,  # (N, G, d) or None
    x_ptr,  # (N, W) or None
    weight_ptr,  # (H, W), contiguous, or None
    logits_ptr,  # (N, H) or None
    dy_ptr,  # (N, H, d), contiguous
    dv_ptr,  # (N, G, d), contiguous, or None
    dz_ptr,  # (N, H), contiguous, or None
    stride_dout, stride_dout_head, stride_dout_d,
    stride_y, stride_y_head, stride_v, stride_v_head, stride_x, stride_logits, N,
    H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, W: tl.constexpr,
    gate_scale: tl.constexpr, amplitude: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    token, head, group, col, known, there = _group_tile(N, H, G, d, BLOCK_N)
    here = known & (col < d)
    dout_ptrs = dout_ptr + token * stride_dout + head * stride_dout_head + col.to(tl.int64) * stride_dout_d
    p = tl.load(dout_ptrs, mask=here, other=0.0).to(WIDE)
    y = tl.load(y_ptr + token * stride_y + head * stride_y_head + col, mask=here, other=0.0).to(WIDE)
    a, slope = _load_gate(
        x_ptr, weight_ptr, logits_ptr, token, head, known, stride_x, stride_logits, N, W, gate_scale, amplitude, WIDE
    )
    if v_ptr is not None:
        u, inverse, longer = _load_unit(v_ptr + token * stride_v + group * stride_v_head + col, there, WIDE)
        s, t = tl.sum(y * u, axis=2)[:, :, None], tl.sum(p * u, axis=2)[:, :, None]
        p -= t * u
        both = tl.sum((a * s) * p + (a * t) * y, axis=0)[None, :, :]
        along = tl.sum(a * s * t, axis=0)[None, :, :]
        dv = -inverse * (both + tl.where(longer, -along, along) * u)
        tl.store(dv_ptr + (token * G + group) * d + col, dv.to(dv_ptr.dtype.element_ty), mask=there)
    tl.store(dy_ptr + (token * H + head) * d + col, (a * p).to(dy_ptr.dtype.element_ty), mask=here)
    if dz_ptr is not None:
        dz = slope * tl.sum(y * p, axis=2)[:, :, None]
        tl.store(dz_ptr + token * H + head, dz.to(dz_ptr.dtype.element_ty), mask=known)


@triton.jit
def _xsa_gate_bwd_weight_kernel(
    dz_ptr,  # (N, H) float32, contiguous
    x_ptr,  # (N, W)
    weight_ptr,  # (H, W), contiguous
    dx_ptr,  # (N, W), contiguous
    dweight_ptr,  # (programs, H, W) float32: each program's share; or None
    stride_x, N, steps,
    H: tl.constexpr, W: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A kernel of its own: its sums over tokens hold 60 registers a thread, with which the one before took 0.136 ms
    instead of 0.099 and 0.016 for both this and the sum over programs (NVIDIA H200, the record's size)."""
    head = tl.arange(0, triton.next_power_of_2(H))[:, None, None]
    col = tl.arange(0, triton.next_power_of_2(W))[None, None, :]
    known = (head < H) & (col < W)
    weight = tl.load(weight_ptr + head * W + col, mask=known, other=0.0).to(WIDE)
    dweight = tl.zeros((triton.next_power_of_2(H), BLOCK_N, triton.next_power_of_2(W)), WIDE)
    for step in tl.range(tl.program_id(0), steps, tl.num_programs(0), num_stages=STAGES):
        token = step * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None].to(tl.int64)
        here = (token < N) & (col < W)
        dz = tl.load(dz_ptr + token * H + head, mask=(token < N) & (head < H), other=0.0).to(WIDE)
        x = tl.load(x_ptr + token * stride_x + col, mask=here, other=0.0).to(WIDE)
        dx = tl.sum(dz * weight, axis=0)[None, :, :]
        tl.store(dx_ptr + token * W + col, dx.to(dx_ptr.dtype.element_ty), mask=here)
        dweight += dz * x
    if dweight_ptr is not None:
        share = tl.sum(dweight, axis=1)[:, None, :].to(tl.float32)
        tl.store(dweight_ptr + tl.program_id(0) * H * W + head * W + col, share, mask=known)


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


@_as_given
def _forward(
    y: Tensor, v: Tensor | None, x: Tensor | None, gate_weight: Tensor | None, gate_logits: Tensor | None,
    gate_scale: float, amplitude: float,
) -> Tensor:  # fmt: skip
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    grid, strides, sizes = _launch(y, v, x, gate_logits)
    _xsa_gate_fwd_kernel[grid](
        y, v, x, gate_weight, gate_logits, out, *strides, **sizes, gate_scale=gate_scale, amplitude=amplitude
    )
    return out


@_as_given
def _backward(
    dout: Tensor, y: Tensor, v: Tensor | None, x: Tensor | None, gate_weight: Tensor | None,
    gate_logits: Tensor | None, gate_scale: float, amplitude: float, weight_wanted: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of y, v, x, gate_weight and gate_logits; without elements where there is none, or none wanted."""
    dy, dv, dx, dz = (
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (y, v, x, gate_logits)
    )
    if x is not None:
        dz = torch.empty(y.shape[:2], dtype=torch.float32, device=y.device)
    grid, strides, sizes = _launch(y, v, x, gate_logits)
    _xsa_gate_bwd_kernel[grid](
        dout, y, v, x, gate_weight, gate_logits, dy, dv, dz, *dout.stride(), *strides,
        **sizes, gate_scale=gate_scale, amplitude=amplitude,
    )  # fmt: skip
    dweight = None if x is None else _backward_weight(dz, x, gate_weight, dx, sizes["WIDE"], weight_wanted)
    dlogits = None if gate_logits is None else dz
    return tuple(y.new_empty(0) if t is None else t for t in (dy, dv, dx, dweight, dlogits))


def _backward_weight(
    dz: Tensor, x: Tensor, gate_weight: Tensor, dx: Tensor, wide: tl.dtype, wanted: bool
) -> Tensor | None:
    """Fills dx and returns the gradient of gate_weight, if it is wanted."""
    (H, W), launch = gate_weight.shape, LAUNCH["weight"]
    block_n = max(1, launch["elements"] // (_power_of_2(H) * _power_of_2(W)))
    steps = -(-len(x) // block_n)
    # Two programs are enough to test the loop and the sum over programs in the interpreter.
    programs = min(steps, launch["programs"] if x.is_cuda else 2)
    shares = torch.empty((programs, H, W), dtype=torch.float32, device=x.device) if wanted else None
    _xsa_gate_bwd_weight_kernel[(programs,)](
        dz, x, gate_weight, dx, shares, x.stride(0), len(x), steps, H, W, block_n, wide, launch["STAGES"],
        num_warps=launch["num_warps"],
    )  # fmt: skip
    return shares.sum(0).to(gate_weight.dtype) if wanted else None


def _launch(
    y: Tensor, v: Tensor | None, x: Tensor | None, gate_logits: Tensor | None
) -> tuple[tuple[int], list[int], dict[str, object]]:
    """Grid, strides, and everything else that both directions take by name."""
    (N, H, d), G = y.shape, y.shape[1] if v is None else v.shape[1]
    values = _power_of_2(G) * _power_of_2(d)  # channels of a token's values, padded
    block_n = max(1, LAUNCH["heads"]["elements"] // values)
    strides = [0 if t is None else t.stride(i) for t, i in ((y, 0), (y, 1), (v, 0), (v, 1), (x, 0), (gate_logits, 0))]
    sizes = {"N": N, "H": H, "G": G, "d": d, "W": 0 if x is None else x.shape[1], "BLOCK_N": block_n}
    wide = tl.float64 if y.dtype == torch.float32 else tl.float32
    warps = max(1, min(8, block_n * values // 256))  # one load of 8 channels a thread and head
    return (-(-N // block_n),), strides, sizes | {"WIDE": wide, "num_warps": warps}


def _power_of_2(n: int) -> int:
    """The least power of two that is not below n; triton's own takes the host 4 µs."""
    return 1 << (n - 1).bit_length()


@_as_given
def _forward_eager(y, v, x, gate_weight, gate_logits, gate_scale, amplitude):
    out = xsa_gate_ref(y, v, x, gate_weight, gate_scale, gate_logits=gate_logits, amplitude=amplitude)
    return out.contiguous()  # it follows the strides of y


@_as_given
def _backward_eager(
    dout, y, v, x, gate_weight, gate_logits, gate_scale, amplitude, weight_wanted=True
) -> tuple[Tensor, ...]:
    inputs = (y, v, x, gate_weight, gate_logits)
    wide = torch.float64 if dout.dtype.itemsize > 2 else torch.float32
    y, v, x, weight, logits = (None if t is None else t.to(wide) for t in inputs)
    p, a, dv, dz, dx, dweight = dout.to(wide), torch.ones_like(y[..., :1]), None, None, None, None
    if x is not None:
        logits = F.linear(x, weight)
    if logits is not None:
        share = torch.sigmoid(gate_scale * logits)[..., None]
        a = amplitude * share
    if v is not None:
        norm = v.norm(dim=-1, keepdim=True)
        inverse = 1 / norm.clamp_min(1e-12)
        u = (v * inverse).repeat_interleave(y.shape[1] // v.shape[1], dim=1)
        s, t = ((h * u).sum(-1, keepdim=True) for h in (y, p))
        p = p - t * u
        both, along = ((a * h).unflatten(1, (v.shape[1], -1)).sum(2) for h in (s * p + t * y, s * t * u))
        dv = -inverse * (both + torch.where(norm >= 1e-12, -along, along))
    if logits is not None:
        dz = (gate_scale * a * (1 - share) * y * p).sum(-1)
    if x is not None:
        dx, dweight = dz @ weight, dz.mT @ x
    gradients = zip(inputs, (a * p, dv, dx, dweight if weight_wanted else None, dz), strict=True)
    return tuple(dout.new_empty(0) if t is None or g is None else g.to(t.dtype).contiguous() for t, g in gradients)


# Under TRITON_INTERPRET=1 the decorator above gave an interpreted function, and the CPU runs the Triton code itself.
INTERPRETED = not isinstance(_xsa_gate_fwd_kernel, triton.runtime.JITFunction)

_op = torch.library.custom_op(f"{NAMESPACE}::xsa_gate", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    f"{NAMESPACE}::xsa_gate_backward", _backward, mutates_args=(), device_types="cuda"
)


@_op.register_kernel("cpu")
def _forward_cpu(y, *args):
    return (_forward if INTERPRETED and y.dtype != torch.float64 else _forward_eager)(y, *args)


@_op_backward.register_kernel("cpu")
def _backward_cpu(dout, *args):
    return (_backward if INTERPRETED and dout.dtype != torch.float64 else _backward_eager)(dout, *args)


@_op.register_fake
def _forward_fake(y, *_):
    return y.new_empty(y.shape)


@_op_backward.register_fake
def _backward_fake(dout, y, v, x, gate_weight, gate_logits, gate_scale, amplitude, weight_wanted=True):
    inputs = (y, v, x, gate_weight if weight_wanted else None, gate_logits)
    return tuple(dout.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.gate_scale, ctx.amplitude = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dout):
    inputs, weight_wanted = ctx.saved_tensors, ctx.needs_input_grad[3]
    dy, dv, dx, dweight, dlogits = _op_backward(dout, *inputs, ctx.gate_scale, ctx.amplitude, weight_wanted)
    gradients = (dy, dv, dx, dweight if weight_wanted else None, dlogits)
    return *(None if t is None else g for t, g in zip(inputs, gradients, strict=True)), None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def xsa_gate(
    y: Tensor,
    v: Tensor | None = None,
    x: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_scale: float = 1.0,
    *,
    gate_logits: Tensor | None = None,
    amplitude: float = 1.0,
) -> Tensor:
    """amplitude σ(gate_scale z) (y - (y · u) u) per head, u the unit value of the head's own token.

    y: (N, H, d) attention output, d <= 256, bfloat16, float16 or float32, channels adjacent; float64 on CPU only.
    v: (N, G, d), G dividing H, in y's dtype, channels adjacent; None leaves y as it is (no u).
    x: (N, W), W <= 64, in y's dtype, channels adjacent, such as stream[:, :W], and gate_weight: (H, W), contiguous, in
    y's dtype or float32, for z = x gate_weight^T; or gate_logits: (N, H), in y's dtype or float32, for z, when a gate
    reads the whole stream or has a bias. Neither: no gate.
    gate_scale, amplitude: finite ints or floats. They get no gradient.
    Returns (N, H, d), contiguous, in y's dtype. Differentiable once, in reverse mode, in all five tensors.
    Raises ValueError for a shape, layout, device, number or combination, TypeError for a dtype or another type.
    """
    named = {"y": y, "v": v, "x": x, "gate_weight": gate_weight, "gate_logits": gate_logits}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "y"):
            raise TypeError(f"xsa_gate: expected {name} to be a tensor, got {type(tensor).__name__}")
    if y.ndim != 3 or 0 in y.shape[1:] or y.shape[2] > 256:
        raise ValueError(f"xsa_gate: expected y of shape (N, H, d), d <= 256, got {tuple(y.shape)}")
    N, H, d = y.shape
    if (x is None) != (gate_weight is None) or (x is not None and gate_logits is not None):
        raise ValueError("xsa_gate: expected x and gate_weight, or gate_logits, or none of the three, got a mixture")
    if v is None and x is None and gate_logits is None:
        raise ValueError("xsa_gate: expected v, or x and gate_weight, or gate_logits, got none: nothing to do")
    if v is not None and (v.ndim != 3 or (N, d) != (len(v), v.shape[2]) or v.shape[1] == 0 or H % v.shape[1]):
        raise ValueError(f"xsa_gate: expected v of shape ({N}, G, {d}), G dividing {H}, got {tuple(v.shape)}")
    if x is not None and (gate_weight.ndim != 2 or len(gate_weight) != H or not 1 <= gate_weight.shape[1] <= 64):
        got = tuple(gate_weight.shape)
        raise ValueError(f"xsa_gate: expected gate_weight of shape ({H}, W), W <= 64, else gate_logits; got {got}")
    if x is not None and x.shape != (N, gate_weight.shape[1]):
        expected = (N, gate_weight.shape[1])
        raise ValueError(f"xsa_gate: expected x of shape {expected}, such as stream[:, :W], got {tuple(x.shape)}")
    if gate_logits is not None and gate_logits.shape != (N, H):
        raise ValueError(f"xsa_gate: expected gate_logits of shape ({N}, {H}), got {tuple(gate_logits.shape)}")
    for name, tensor in ((name, tensor) for name, tensor in named.items() if tensor is not None):
        dtypes = (torch.bfloat16, torch.float16, torch.float32) + (torch.float64,) * (y.device.type == "cpu")
        if name != "y":
            float32_too = name.startswith("gate") and y.dtype != torch.float64
            dtypes = (y.dtype, torch.float32) if float32_too else (y.dtype,)
        if tensor.dtype not in dtypes:
            expected = " or ".join(dict.fromkeys(str(dtype)[6:] for dtype in dtypes))
            raise TypeError(f"xsa_gate: expected {name} in {expected}, got {tensor.dtype} on {tensor.device}")
        if tensor.device != y.device:
            raise ValueError(f"xsa_gate: expected {name} on {y.device}, got {tensor.device}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"xsa_gate: expected {name} with adjacent channels, got strides {tensor.stride()}")
    if gate_weight is not None and not gate_weight.is_contiguous():
        raise ValueError(f"xsa_gate: expected a contiguous gate_weight, got strides {gate_weight.stride()}")
    for name, number in (("gate_scale", gate_scale), ("amplitude", amplitude)):
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            raise TypeError(f"xsa_gate: expected {name} to be a number, got {number!r}")
        if not abs(number) < float("inf"):
            raise ValueError(f"xsa_gate: expected a finite {name}, got {number}")
    _refuse_tangents("xsa_gate", *named.values())
    return _op(y, v, x, gate_weight, gate_logits, float(gate_scale), float(amplitude))


# --- not needed when lifted ---

SIZES = {  # N, H d, G, d, W; W = 0: gate_logits instead of x; G = 0: without v
    "odd": (11, 180, 3, 20, 5),
    "tile": (9, 512, 4, 64, 12),
    "long": (600, 16, 1, 8, 12),
    "logits": (9, 192, 1, 48, 0),
    "gate": (11, 96, 0, 16, 12),
    "record": (98304, 512, 4, 64, 12),
    "large": (4194400, 512, 1, 64, 12),
}


def xsa_gate_inputs(size: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    """Gates from closed to open; a value is zero, one shorter than 1e-12, one along its token's output."""
    N, D, G, d, W = size
    H = D // d
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, logits, weight = draw(N, max(16, W)).to(dtype), draw(N, H).to(dtype), draw(H, max(1, W))
    v, y = draw(N, max(1, G), d), draw(N, H, d)
    y[-1, -1] = v[-1, -1] * 2 + y[-1, -1] / 8
    v[0, 0], v[-2, 0] = 0.0, v[-2, 0] * 1e-14
    inputs = {"y": y.to(dtype).requires_grad_(), "gate_scale": 1.5, "amplitude": 2.0}
    if G:
        inputs["v"] = v.to(dtype).requires_grad_()
    if W:
        return inputs | {"x": x[:, :W].requires_grad_(), "gate_weight": weight.requires_grad_()}
    return inputs | {"gate_logits": logits.requires_grad_()}


def xsa_gate_cost(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    N, D, G, d, W = size
    y, v, x = N * D * dtype.itemsize, N * G * d * dtype.itemsize, N * (W or D // d) * dtype.itemsize
    return {
        "bytes_forward": 2 * y + v + x,
        "bytes_backward": 3 * y + 2 * v + 2 * x,
        "flops_forward": N * (5 * D + 3 * G * d + 2 * W * D // d),
        "flops_backward": N * (13 * D + 6 * G * d + 6 * W * D // d),
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
    _prove(xsa_gate, xsa_gate_ref, xsa_gate_inputs, xsa_gate_cost, SIZES)
