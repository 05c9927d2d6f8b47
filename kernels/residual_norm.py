"""Residual stream and its norm in one pass: a weighted sum of two or three streams, kept together with its RMSNorm.

    s = x [+ addend],   u = a s + b y [+ c z],   n = λ r u,   r = 1 / sqrt(mean(u²) + eps)    (a, b, c per channel or 1)

with  G = du + λ r (dn - u r² mean(u dn)):    dx = daddend = a G + ds,   da = Σ_rows s G,
                                              dy = b G,  db = Σ_rows y G,  and likewise for z and c

λ is norm_scale. n is the norm of u before its rounding to x's dtype, and u the sum of s before its own, so that no
gradient hangs on a rounding. It serves the mixing with the embedding (x, y = stream, embedding; z = a skip connection),
the addition of a block's output (y) and, with an addend, both at once: a block's last addition and the next block's
mixing. s, if asked for, is kept as well, to be the z of a later call. h, if asked for, is a copy of n's first channels,
so that the gradient of whoever reads only those arrives as narrow as it is, and joins dn in registers.

Shapes: x, y, z, addend, s, u, n (N, D), h (N, head), all of one dtype, bfloat16, float16 or float32, channels adjacent,
any row stride; scales (D,) of x's dtype or float32. Everything in between is float32. float64 runs on CPU only, in
plain PyTorch.
Must move: forward reads the terms and writes the results; backward reads the results' gradients and the terms, from
which it sums u again, and writes each scaled term's gradient, and G once for all terms without a scale (u as stored
would be one read instead of two, but off by too much where G nearly cancels); addend's gradient is x's. Of a result
that nobody used it reads no gradient.
The gradients of the scales are sums over rows in a fixed order, without atomics, so they repeat bitwise.
Replaces: multiplications and additions, an RMSNorm, its scaling, and as many reductions over rows as there are scales;
with h the padding of a narrow gradient and its addition.
Refuses: other dtypes, streams of different shapes or dtypes, channels that are not adjacent, z_scale without z,
return_sum without addend, head > D.
From: the residual mixing of modded-nanogpt (x0 lambdas) and the layer scales of PR #1855 of the challenge.
"""

import re
from collections.abc import Callable
from functools import wraps

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

# A lifted copy has ops of its own, so that it may stand beside the package.
NAMESPACE = "niblick" if __name__.startswith("niblick.") else "niblick_" + re.sub(r"\W", "_", __name__, flags=re.A)
# NVIDIA H200, 2026-11-20. A warp holds `elements` of a row. Forward: a program a row, 97 % of a copy; walking over rows
# takes 8 % longer. Backward: programs that walk over rows, `num_stages` - 1 of them on their way: 5 a multiprocessor
# and 3 stages reach 94 % of a copy; without stages 89 % (mixing, 12 a multiprocessor) or 92 % (x unscaled, 16).
# With an addend, its sum and a head: the same, not tuned on their own yet.
LAUNCH = {"forward": {"elements": 512}, "backward": {"elements": 512, "programs": 5 * 132, "num_stages": 3}}


def residual_norm_ref(
    x: Tensor,
    y: Tensor,
    x_scale: Tensor | None = None,
    y_scale: Tensor | None = None,
    z: Tensor | None = None,
    z_scale: Tensor | None = None,
    *,
    addend: Tensor | None = None,
    return_sum: bool = False,
    head: int = 0,
    norm_scale: float = 1.0,
    eps: float = 2.0**-23,
) -> tuple[Tensor, ...]:
    """The specification, in float32 or, for float64 x, in float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    s = x.to(wide) if addend is None else x.to(wide) + addend.to(wide)
    terms = ((t, scale) for t, scale in ((s, x_scale), (y, y_scale), (z, z_scale)) if t is not None)
    u = sum(t.to(wide) if scale is None else t.to(wide) * scale.to(wide) for t, scale in terms)
    n = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps) * norm_scale
    results = [u, n] + [s] * return_sum + [n[:, :head]] * (head > 0)
    return tuple(t.to(x.dtype, copy=True) for t in results)  # h is memory of its own, whatever the dtype


@triton.jit
def _load(ptr, row, cols, stride, stride_col, D: tl.constexpr):
    columns = cols.to(tl.int64) * stride_col
    return tl.load(ptr + row * stride + columns, mask=cols < D, other=0.0).to(tl.float32)


@triton.jit
def _scale(scale_ptr, cols, D: tl.constexpr):
    """A channel scale, or 1."""
    if scale_ptr is None:
        return 1.0
    else:
        return tl.load(scale_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)


@triton.jit
def _residual_norm_fwd_kernel(
    x_ptr,  # (N, D); y and z likewise, z may be missing
    y_ptr,
    z_ptr,
    addend_ptr,  # (N, D) or missing
    x_scale_ptr,  # (D,) or missing; so the others
    y_scale_ptr,
    z_scale_ptr,
    u_ptr,  # (N, D), contiguous
    n_ptr,  # (N, D), contiguous
    s_ptr,  # (N, D), contiguous, or missing
    h_ptr,  # (N, HEAD), contiguous, or missing
    stride_x,
    stride_y,
    stride_z,
    stride_addend,
    norm_scale,
    eps: tl.constexpr,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    s = _load(x_ptr, row, cols, stride_x, 1, D)
    if addend_ptr is not None:
        s += _load(addend_ptr, row, cols, stride_addend, 1, D)
    u = s * _scale(x_scale_ptr, cols, D)
    u += _load(y_ptr, row, cols, stride_y, 1, D) * _scale(y_scale_ptr, cols, D)
    if z_ptr is not None:
        u += _load(z_ptr, row, cols, stride_z, 1, D) * _scale(z_scale_ptr, cols, D)
    n = u * (norm_scale / tl.sqrt(tl.sum(u * u) / D + eps))
    tl.store(u_ptr + row * D + cols, u.to(u_ptr.dtype.element_ty), mask=cols < D)
    tl.store(n_ptr + row * D + cols, n.to(n_ptr.dtype.element_ty), mask=cols < D)
    if s_ptr is not None:
        tl.store(s_ptr + row * D + cols, s.to(s_ptr.dtype.element_ty), mask=cols < D)
    if h_ptr is not None:
        tl.store(h_ptr + row * HEAD + cols, n.to(h_ptr.dtype.element_ty), mask=cols < HEAD)


@triton.jit
def _residual_norm_bwd_kernel(
    du_ptr,  # (N, D), any strides, or missing; dn and ds likewise
    dn_ptr,
    ds_ptr,
    dh_ptr,  # (N, HEAD), contiguous, or missing
    x_ptr,  # (N, D); z may be missing, and without dn and dh so may be a term that has no scale
    y_ptr,
    z_ptr,
    addend_ptr,  # (N, D) or missing
    x_scale_ptr,
    y_scale_ptr,
    z_scale_ptr,
    g_ptr,  # (N, D), contiguous: the gradient of every term without one of its own; missing if all have one
    dx_ptr,  # (N, D), contiguous: x's own gradient, if it has a scale or there is ds; y's and z's, if they have a scale
    dy_ptr,  # and missing if y is frozen
    dz_ptr,
    shares_ptr,  # (scales, n_programs, D) float32: each program's share of the scales' gradients; missing if frozen
    stride_du,
    stride_du_col,
    stride_dn,
    stride_dn_col,
    stride_ds,
    stride_ds_col,
    stride_x,
    stride_y,
    stride_z,
    stride_addend,
    N,
    norm_scale,
    eps: tl.constexpr,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    zeros = tl.zeros((BLOCK_D,), tl.float32)
    s, y, z = zeros, zeros, zeros
    x_share, y_share, z_share = zeros, zeros, zeros
    x_scale, y_scale, z_scale = _scale(x_scale_ptr, cols, D), _scale(y_scale_ptr, cols, D), _scale(z_scale_ptr, cols, D)
    for row in tl.range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0), num_stages=STAGES):
        if x_ptr is not None:
            s = _load(x_ptr, row, cols, stride_x, 1, D)
            if addend_ptr is not None:
                s += _load(addend_ptr, row, cols, stride_addend, 1, D)
        if y_ptr is not None:
            y = _load(y_ptr, row, cols, stride_y, 1, D)
        if z_ptr is not None:
            z = _load(z_ptr, row, cols, stride_z, 1, D)
        g, ds = zeros, zeros
        if du_ptr is not None:
            g = _load(du_ptr, row, cols, stride_du, stride_du_col, D)
        if ds_ptr is not None:
            ds = _load(ds_ptr, row, cols, stride_ds, stride_ds_col, D)
        if dn_ptr is not None or dh_ptr is not None:
            dn = zeros
            if dn_ptr is not None:
                dn = _load(dn_ptr, row, cols, stride_dn, stride_dn_col, D)
            if dh_ptr is not None:
                dn += _load(dh_ptr, row, cols, HEAD, 1, HEAD)
            u = s * x_scale + y * y_scale
            if z_ptr is not None:
                u += z * z_scale
            rstd = 1.0 / tl.sqrt(tl.sum(u * u) / D + eps)
            g += norm_scale * rstd * (dn - u * (rstd * rstd * (tl.sum(u * dn) / D)))

        if g_ptr is not None:
            tl.store(g_ptr + row * D + cols, g.to(g_ptr.dtype.element_ty), mask=inside)
        if dx_ptr is not None:
            tl.store(dx_ptr + row * D + cols, (g * x_scale + ds).to(dx_ptr.dtype.element_ty), mask=inside)
        if dy_ptr is not None:
            tl.store(dy_ptr + row * D + cols, (g * y_scale).to(dy_ptr.dtype.element_ty), mask=inside)
        if dz_ptr is not None:
            tl.store(dz_ptr + row * D + cols, (g * z_scale).to(dz_ptr.dtype.element_ty), mask=inside)
        if shares_ptr is not None:
            if x_scale_ptr is not None:
                x_share += g * s
            if y_scale_ptr is not None:
                y_share += g * y
            if z_scale_ptr is not None:
                z_share += g * z

    if shares_ptr is not None:
        share_ptr = shares_ptr + tl.program_id(0).to(tl.int64) * D + cols
        step = tl.num_programs(0).to(tl.int64) * D
        if x_scale_ptr is not None:
            tl.store(share_ptr, x_share, mask=inside)
            share_ptr += step
        if y_scale_ptr is not None:
            tl.store(share_ptr, y_share, mask=inside)
            share_ptr += step
        if z_scale_ptr is not None:
            tl.store(share_ptr, z_share, mask=inside)


@triton.jit
def _sum_shares_kernel(
    shares_ptr,  # (scales, n_shares, D) float32
    total_ptr,  # (scales, D) float32
    n_shares,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    scale = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, n_shares, BLOCK_N):
        rows = (first + tl.arange(0, BLOCK_N))[:, None]
        here = (rows < n_shares) & (cols < D)
        total += tl.load(shares_ptr + (scale * n_shares + rows) * D + cols, mask=here, other=0.0)
    tl.store(total_ptr + scale * D + cols, tl.sum(total, axis=0)[None, :], mask=cols < D)


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
    x: Tensor,
    y: Tensor,
    x_scale: Tensor | None,
    y_scale: Tensor | None,
    z: Tensor | None,
    z_scale: Tensor | None,
    addend: Tensor | None,
    return_sum: bool,
    head: int,
    norm_scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, n, s and h, the last two without elements if not asked for."""
    u, n, s, h = _allocate(x, return_sum, head)
    _residual_norm_fwd_kernel[(len(x),)](
        x, y, z, addend, x_scale, y_scale, z_scale, u, n, s if return_sum else None, h if head else None,
        *_row_strides(x, y, z, addend), norm_scale, eps, head, **_blocks("forward", x),
    )  # fmt: skip
    return u, n, s, h


@_as_given
def _backward(
    du: Tensor | None,
    dn: Tensor | None,
    ds: Tensor | None,
    dh: Tensor | None,
    x: Tensor,
    y: Tensor,
    z: Tensor | None,
    addend: Tensor | None,
    x_scale: Tensor | None,
    y_scale: Tensor | None,
    z_scale: Tensor | None,
    norm_scale: float,
    eps: float,
    y_wanted: bool = True,
    scales_wanted: bool = True,
) -> list[Tensor]:
    """The gradients that `_written` names, and (scales, D) float32, those of the scales (of none if none is wanted)."""
    terms, scales = [x, y, z], [x_scale, y_scale, z_scale]
    (N, D), n_scales = x.shape, sum(s is not None for s in scales) if scales_wanted else 0
    written = _written(ds, terms, scales, y_wanted)
    grads = [torch.empty((N, D), dtype=x.dtype, device=x.device) if w else None for w in written]
    if dn is None and dh is None:
        terms = [t if s is not None else None for t, s in zip(terms, scales, strict=True)]
    dh = None if dh is None else dh.contiguous()  # small, and so its loads are wide enough to be under way early
    # The interpreter's two programs walk over several rows each even in a test.
    n_programs = max(1, min(N, 2 if INTERPRETED else LAUNCH["backward"]["programs"]))
    shares = torch.empty((n_scales, n_programs, D), dtype=torch.float32, device=x.device)
    dscales = torch.empty((n_scales, D), dtype=torch.float32, device=x.device)
    strides = [stride for t in (du, dn, ds) for stride in ((0, 0) if t is None else t.stride())]
    _residual_norm_bwd_kernel[(n_programs,)](
        du, dn, ds, dh, *terms, addend, *scales, *grads, shares if n_scales else None, *strides,
        *_row_strides(*terms, addend), N, norm_scale, eps, 0 if dh is None else dh.shape[1],
        STAGES=LAUNCH["backward"]["num_stages"], **_blocks("backward", x),
    )  # fmt: skip
    if n_scales:
        _sum_shares_kernel[(triton.cdiv(D, 8), n_scales)](shares, dscales, n_programs, D, 256, 8)
    return [t for t in grads if t is not None] + [dscales]


def _allocate(x: Tensor, return_sum: bool, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, D = x.shape
    return tuple(x.new_empty(shape) for shape in ((N, D), (N, D), (N if return_sum else 0, D), (N, head)))


def _written(ds: Tensor | None, terms: list[Tensor | None], scales: list[Tensor | None], y_wanted: bool) -> list[bool]:
    """Which gradients there are: G, if a term has none of its own, and x's, y's and z's own; y's only if wanted."""
    own = [s is not None for s in scales]
    own[0] |= ds is not None
    shared = any(t is not None and not o for t, o in zip(terms, own, strict=True))
    return [shared, own[0], own[1] and y_wanted, own[2]]


def _row_strides(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.stride(0) for t in tensors]


def _blocks(direction: str, x: Tensor) -> dict[str, int]:
    D, block_d = x.shape[1], triton.next_power_of_2(x.shape[1])
    return {"D": D, "BLOCK_D": block_d, "num_warps": min(8, max(1, block_d // LAUNCH[direction]["elements"]))}


def _backward_eager(
    du: Tensor | None,
    dn: Tensor | None,
    ds: Tensor | None,
    dh: Tensor | None,
    x: Tensor,
    y: Tensor,
    z: Tensor | None,
    addend: Tensor | None,
    x_scale: Tensor | None,
    y_scale: Tensor | None,
    z_scale: Tensor | None,
    norm_scale: float,
    eps: float,
    y_wanted: bool = True,
    scales_wanted: bool = True,
) -> list[Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    tensors = (du, dn, ds, dh, addend, x, y, z, x_scale, y_scale, z_scale)
    du, dn, ds, dh, addend, *others = (None if t is None else t.to(wide) for t in tensors)
    terms, scales = others[:3], others[3:]
    if addend is not None:
        terms[0] = terms[0] + addend
    g = torch.zeros_like(terms[0]) if du is None else du
    if dn is not None or dh is not None:
        dn = torch.zeros_like(g) if dn is None else dn
        if dh is not None:
            dn = dn + torch.nn.functional.pad(dh, (0, g.shape[1] - dh.shape[1]))
        u = sum(t if s is None else t * s for t, s in zip(terms, scales, strict=True) if t is not None)
        rstd = torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)
        g = g + norm_scale * rstd * (dn - u * rstd.square() * (u * dn).mean(-1, keepdim=True))
    own = [g if s is None else g * s for s in scales]
    if ds is not None:
        own[0] = own[0] + ds
    grads = [t for t, want in zip((g, *own), _written(ds, terms, scales, y_wanted), strict=True) if want]
    dscales = [(g * t).sum(0) for t, s in zip(terms, scales, strict=True) if s is not None and scales_wanted]
    fresh = [torch.empty(t.shape, dtype=x.dtype).copy_(t) for t in grads]  # contiguous, and never du itself
    return [*fresh, torch.stack(dscales) if dscales else g.new_empty(0, g.shape[1])]


# Under TRITON_INTERPRET=1 the decorator above gave an interpreted function, and the CPU runs the Triton code itself.
INTERPRETED = not isinstance(_residual_norm_fwd_kernel, triton.runtime.JITFunction)

_op = torch.library.custom_op(f"{NAMESPACE}::residual_norm", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    f"{NAMESPACE}::residual_norm_backward", _backward, mutates_args=(), device_types="cuda"
)


@_op.register_kernel("cpu")
def _forward_cpu(x, *args):
    if INTERPRETED and x.dtype != torch.float64:
        return _forward(x, *args)
    *tensors, addend, return_sum, head, norm_scale, eps = args
    options = {"addend": addend, "return_sum": return_sum, "head": head, "norm_scale": norm_scale, "eps": eps}
    results = residual_norm_ref(x, *tensors, **options)
    _, _, s, h = _allocate(x, return_sum, head)
    return *results[:2], results[2] if return_sum else s, results[-1] if head else h


@_op_backward.register_kernel("cpu")
def _backward_cpu(du, dn, ds, dh, x, *args):
    narrow = INTERPRETED and x.dtype != torch.float64
    return (_backward if narrow else _backward_eager)(du, dn, ds, dh, x, *args)


@_op.register_fake
def _forward_fake(x, y, x_scale, y_scale, z, z_scale, addend, return_sum, head, norm_scale, eps):
    return _allocate(x, return_sum, head)


@_op_backward.register_fake
def _backward_fake(
    du, dn, ds, dh, x, y, z, addend, x_scale, y_scale, z_scale, norm_scale, eps, y_wanted=True, scales_wanted=True
):
    scales = [x_scale, y_scale, z_scale]
    n_scales = sum(s is not None for s in scales) if scales_wanted else 0
    grads = [x.new_empty(x.shape) for _ in range(sum(_written(ds, [x, y, z], scales, y_wanted)))]
    return [*grads, x.new_empty((n_scales, x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))]


def _setup_context(ctx, inputs, output):
    x, y, x_scale, y_scale, z, z_scale, addend, ctx.return_sum, ctx.head, ctx.norm_scale, ctx.eps = inputs
    ctx.save_for_backward(x, y, z, addend, x_scale, y_scale, z_scale)
    ctx.set_materialize_grads(False)  # a result that nobody used: None instead of zeros to write and read


def _autograd(ctx, du, dn, ds, dh):
    ds, dh = ds if ctx.return_sum else None, dh if ctx.head else None
    if du is None and dn is None and ds is None and dh is None:
        return (None,) * 11
    *terms, addend, x_scale, y_scale, z_scale = ctx.saved_tensors
    # Frozen: the model's input as y, and the scales, where only other weights are trained.
    scales, needs = [x_scale, y_scale, z_scale], ctx.needs_input_grad
    y_wanted, scales_wanted = needs[1], needs[2] or needs[3] or needs[5]
    *grads, dscales = _op_backward(du, dn, ds, dh, *ctx.saved_tensors, ctx.norm_scale, ctx.eps, y_wanted, scales_wanted)
    shared, *own = _written(ds, terms, scales, y_wanted)
    g = grads.pop(0) if shared else None
    dx, dy, dz = (None if t is None else grads.pop(0) if o else g for t, o in zip(terms, own, strict=True))
    dy, rows = dy if y_wanted else None, iter(dscales.unbind(0))
    dx_scale, dy_scale, dz_scale = (None if s is None or not scales_wanted else next(rows).to(s.dtype) for s in scales)
    daddend = None if addend is None else dx
    return dx, dy, dx_scale, dy_scale, dz, dz_scale, daddend, None, None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def residual_norm(
    x: Tensor,
    y: Tensor,
    x_scale: Tensor | None = None,
    y_scale: Tensor | None = None,
    z: Tensor | None = None,
    z_scale: Tensor | None = None,
    *,
    addend: Tensor | None = None,
    return_sum: bool = False,
    head: int = 0,
    norm_scale: float = 1.0,
    eps: float = 2.0**-23,
) -> tuple[Tensor, ...]:
    """u = x_scale (x [+ addend]) + y_scale y [+ z_scale z], and n = norm_scale u / sqrt(mean(u²) + eps).

    x, y, z, addend: (N, D) bfloat16, float16 or float32, all alike, channels adjacent; float64 on CPU only. z and
        addend may be None.
    x_scale, y_scale, z_scale: (D,) per channel, in x's dtype or float32, elements adjacent; None is 1.
    return_sum: return x + addend as well, which needs an addend.
    head: up to D; if not 0, return a copy of the first `head` channels of n as well.
    norm_scale, eps: finite numbers, eps >= 0; they get no gradient.
    Returns (u, n), then x + addend, then the copy, in x's dtype: (N, D), the copy (N, head). Differentiable once, in
    reverse mode, in all of the tensors, from any of the results.
    Raises ValueError for a shape, layout, device or number, TypeError for a dtype or an argument of another type.
    """
    optional = {"x_scale": x_scale, "y_scale": y_scale, "z": z, "z_scale": z_scale, "addend": addend}
    for name, tensor in ({"x": x, "y": y} | optional).items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name not in optional):
            raise TypeError(f"residual_norm: expected {name} to be a tensor, got {tensor!r}")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"residual_norm: expected x of shape (N, D), got {tuple(x.shape)}")
    dtypes = (torch.bfloat16, torch.float16, torch.float32) + (torch.float64,) * (x.device.type == "cpu")
    if x.dtype not in dtypes:
        expected = ", ".join(str(dtype)[6:] for dtype in dtypes)
        raise TypeError(f"residual_norm: expected x in one of {expected}, got {x.dtype} on {x.device}")
    if z is None and z_scale is not None:
        raise ValueError("residual_norm: expected no z_scale without z")
    for name, t in (("x", x), ("y", y), ("z", z), ("addend", addend)):
        if t is None:
            continue
        if t.shape != x.shape:
            raise ValueError(f"residual_norm: expected {name} of shape {tuple(x.shape)}, got {tuple(t.shape)}")
        if t.dtype != x.dtype:
            raise TypeError(f"residual_norm: expected {name} in {x.dtype} like x, got {t.dtype}")
        if t.stride(1) != 1 and t.shape[1] > 1:
            raise ValueError(f"residual_norm: expected {name} with adjacent channels, got strides {t.stride()}")
        if t.device != x.device:
            raise ValueError(f"residual_norm: expected {name} on {x.device}, got {t.device}")
    for name, s in (("x_scale", x_scale), ("y_scale", y_scale), ("z_scale", z_scale)):
        if s is None:
            continue
        if s.shape != x.shape[1:]:
            raise ValueError(f"residual_norm: expected {name} of shape ({x.shape[1]},), got {tuple(s.shape)}")
        if s.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
            raise TypeError(f"residual_norm: expected {name} in {x.dtype} or float32, got {s.dtype}")
        if s.stride(0) != 1 and len(s) > 1:
            raise ValueError(f"residual_norm: expected {name} with adjacent elements, got stride {s.stride(0)}")
        if s.device != x.device:
            raise ValueError(f"residual_norm: expected {name} on {x.device}, got {s.device}")
    for name, number in (("norm_scale", norm_scale), ("eps", eps)):
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            raise TypeError(f"residual_norm: expected {name} to be a number, got {number!r}")
        if not abs(number) < float("inf"):
            raise ValueError(f"residual_norm: expected a finite {name}, got {number}")
    if eps < 0:
        raise ValueError(f"residual_norm: expected eps >= 0, got {eps}")
    if not isinstance(return_sum, bool):
        raise TypeError(f"residual_norm: expected return_sum to be True or False, got {return_sum!r}")
    if return_sum and addend is None:
        raise ValueError("residual_norm: expected an addend with return_sum, got None")
    if not isinstance(head, int) or isinstance(head, bool):
        raise TypeError(f"residual_norm: expected head to be an int, got {head!r}")
    if not 0 <= head <= x.shape[1]:
        raise ValueError(f"residual_norm: expected 0 <= head <= {x.shape[1]}, got {head}")
    _refuse_tangents("residual_norm", x, y, x_scale, y_scale, z, z_scale, addend)
    numbers = float(norm_scale), float(eps)
    u, n, s, h = _op(x, y, x_scale, y_scale, z, z_scale, addend, return_sum, head, *numbers)
    return u, n, *([s] if return_sum else []), *([h] if head else [])


# --- not needed when lifted ---

# (N, D, how many of the terms have a scale, head): 1 is x + scale y, 2 is a mixing, 3 is a mixing of three streams.
# With a head there are an addend and its sum as well: a block's last addition and the next one's mixing and gate.
SIZES = {
    "chain": (13, 83, 3, 12),
    "odd": (9, 97, 2, 0),
    "add": (10, 128, 1, 0),
    "three": (7, 257, 3, 0),
    "record": (98304, 512, 2, 0),
    "record, add": (98304, 512, 1, 0),
    "record, chain": (98304, 512, 3, 12),
    "large": (4194400, 512, 1, 0),
}


def residual_norm_inputs(size: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    """Streams of different sizes, scales around one, one row of zeros."""
    N, D, n_scales, head = size
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, around: float, wide: bool = False) -> Tensor:
        t = around + torch.randn(shape, generator=generator, device=device) / 2
        if not wide:
            t[N // 2] = 0.0
        return t.to(torch.float32 if wide else dtype).requires_grad_()

    inputs = {"x": draw(N, D, around=0.0), "y": draw(N, D, around=0.5)}
    if n_scales > 0:
        inputs["y_scale"] = draw(D, around=1.0, wide=True)
    if n_scales > 1:
        inputs["x_scale"] = draw(D, around=1.0, wide=True)
    if n_scales > 2:
        inputs |= {"z": draw(N, D, around=-1.0), "z_scale": draw(D, around=0.5, wide=True)}
    if head:
        inputs |= {"addend": draw(N, D, around=0.0), "return_sum": True, "head": head}
    return inputs | {"norm_scale": 0.6}


def residual_norm_cost(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    N, D, n_scales, head = size
    stream, narrow, terms, chain = N * D * dtype.itemsize, N * head * dtype.itemsize, max(2, n_scales), int(head > 0)
    written = n_scales + (n_scales < terms)  # gradients
    return {
        "bytes_forward": (terms + 2 + 2 * chain) * stream + narrow,
        "bytes_backward": (2 + terms + written + 2 * chain) * stream + narrow,
        "flops_forward": (n_scales + terms + 3 + chain) * N * D,
        "flops_backward": (3 * n_scales + terms + 9 + 2 * chain) * N * D,
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
    _prove(residual_norm, residual_norm_ref, residual_norm_inputs, residual_norm_cost, SIZES)
