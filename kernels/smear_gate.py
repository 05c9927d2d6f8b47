"""Smear gate: each token's embedding takes in a gated share of the one before it.

    y_t = x_t + g_t x_{t-1},    g_t = m_t λ s_t,    s_t = σ(w · x_t[:W]),    m_t = [t >= 1 and token_ids_t != bos_id]

    with a_t = m_t dy_t · x_{t-1}  and  u_t = λ s_t (1 - s_t) a_t:
    dx_t = dy_t + g_{t+1} dy_{t+1}, and on the first W channels + u_t w;    dw = Σ_t u_t x_t[:W];    dλ = Σ_t s_t a_t

σ is the logistic function, λ the argument `scale`. The mask keeps the first token of a document (BOS) from taking in
the last token of the document before it: in a stream of packed documents nothing else would.

Shapes: x (N, D), one stream of N tokens, bfloat16, float16 or float32, channels adjacent, any row stride; weight (W,),
W <= D, and scale (1,) in any of these dtypes; token_ids (N,) int64 or int32; y like x. Everything in between is
float32, but for float32 x the few numbers a row (s, a, u) are float64. float64 x runs on CPU only, in plain PyTorch.
Must move: forward reads x and writes y; backward reads x and dy and writes dx. A neighbour's row comes from the cache.
The gradients of weight and scale are summed in a fixed order, without atomics, so they repeat bitwise.
Replaces: a linear layer, sigmoid, comparison, concatenation, two multiplications and an addition.
Refuses: other dtypes, channels that are not adjacent, W > D, token ids that are not integers.
From: PR #1667 of the challenge; the mask is that of PR #1851.
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
# Forward: elements of x per program, as whole rows, and warps. Backward: programs that a card of 132 multiprocessors
# holds at once with a warp for every 512 channels (one more round of them cost 30 %). NVIDIA H200, 2026-11-20.
LAUNCH = {"elements": 8192, "num_warps": 8, "programs_backward": 16 * 132}


def smear_gate_ref(x: Tensor, weight: Tensor, scale: Tensor, token_ids: Tensor, bos_id: int | None = 1) -> Tensor:
    """The specification, in float32 or, for float64 x, in float64."""
    h, w, λ = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (x, weight, scale))
    gate = λ * torch.sigmoid(h[:, : len(w)] @ w)
    if bos_id is not None:
        gate = torch.where(token_ids.long() == bos_id, 0.0, gate)
    return (h + gate[:, None] * _previous(h)).to(x.dtype)


def _previous(h: Tensor) -> Tensor:
    """Row t - 1 in row t, zeros in row 0."""
    return torch.cat((torch.zeros_like(h[:1]), h[:-1]))


@triton.jit
def _smear_gate(
    rows,
    x_ptr,
    weight_ptr,
    token_ids_ptr,
    stride_x,
    stride_token,
    N,
    W,
    bos_id: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The first W channels of some rows, their s, and their mask m (0 outside 1 <= t < N), in WIDE."""
    cols = tl.arange(0, BLOCK_W)
    inside = (rows[:, None] < N) & (cols[None, :] < W)
    head = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=inside, other=0.0).to(WIDE)
    w = tl.load(weight_ptr + cols, mask=cols < W, other=0.0).to(WIDE)
    s = 1.0 / (1.0 + tl.exp(-tl.sum(head * w[None, :], axis=1)))
    open_ = (rows >= 1) & (rows < N)
    if bos_id is not None:
        open_ = open_ & (tl.load(token_ids_ptr + rows * stride_token, mask=rows < N, other=0).to(tl.int64) != bos_id)
    return head, s, open_.to(WIDE)


@triton.jit
def _smear_gate_fwd_kernel(
    x_ptr,  # (N, D)
    weight_ptr,  # (W,)
    scale_ptr,  # (1,)
    token_ids_ptr,  # (N,)
    y_ptr,  # (N, D), contiguous
    stride_x,
    stride_token,
    N,
    D,
    W,
    bos_id: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WIDE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)[None, :]
    _, s, m = _smear_gate(rows, x_ptr, weight_ptr, token_ids_ptr, stride_x, stride_token, N, W, bos_id, BLOCK_W, WIDE)
    gate = m * tl.load(scale_ptr).to(WIDE) * s
    here = (rows[:, None] < N) & (cols < D)
    before = here & (rows[:, None] >= 1)
    x = tl.load(x_ptr + rows[:, None] * stride_x + cols, mask=here, other=0.0).to(tl.float32)
    previous = tl.load(x_ptr + (rows[:, None] - 1) * stride_x + cols, mask=before, other=0.0).to(tl.float32)
    y = x + gate[:, None].to(tl.float32) * previous
    tl.store(y_ptr + rows[:, None] * D + cols, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit
def _rows_of(row, x_ptr, dy_ptr, stride_x, stride_dy, stride_dy_col, N, D, BLOCK_D: tl.constexpr):
    """One row of x and of dy, zeros beyond the last."""
    cols = tl.arange(0, BLOCK_D)
    inside = (cols < D) & (row < N)
    x = tl.load(x_ptr + row * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride_dy + cols.to(tl.int64) * stride_dy_col, mask=inside, other=0.0).to(tl.float32)
    return x, dy


@triton.jit
def _numbers_of(
    row,
    dy,
    x_before,
    w,
    x_ptr,
    token_ids_ptr,
    stride_x,
    stride_token,
    N,
    W,
    bos_id: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The first W channels of one row, its s, its mask m and its a, in WIDE."""
    cols = tl.arange(0, BLOCK_W)
    head = tl.load(x_ptr + row * stride_x + cols, mask=(cols < W) & (row < N), other=0.0).to(WIDE)
    s = 1.0 / (1.0 + tl.exp(-tl.sum(w * head, axis=0)))
    takes = (row >= 1) & (row < N)
    if bos_id is not None:
        takes = takes & (tl.load(token_ids_ptr + row * stride_token, mask=row < N, other=0).to(tl.int64) != bos_id)
    m = takes.to(WIDE)
    return head, s, m, m * tl.sum(dy.to(WIDE) * x_before.to(WIDE), axis=0)


@triton.jit
def _smear_gate_bwd_kernel(
    dy_ptr,  # (N, D), any strides
    x_ptr,  # (N, D)
    weight_ptr,  # (W,)
    scale_ptr,  # (1,)
    token_ids_ptr,  # (N,)
    dx_ptr,  # (N, D), contiguous
    shares_ptr,  # (W + 1, n_programs) float32: each program's share of dw and dλ
    stride_dy,
    stride_dy_col,
    stride_x,
    stride_token,
    N,
    D,
    W,
    bos_id: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WIDE: tl.constexpr,
):
    # A program walks down a strip of rows and hands each on to the next turn, so that a row is read once although three
    # results need it. One row is on its way from memory while another is worked on.
    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS
    cols = tl.arange(0, BLOCK_D)
    cols_w = tl.arange(0, BLOCK_W)
    scale = tl.load(scale_ptr).to(WIDE)
    w = tl.load(weight_ptr + cols_w, mask=cols_w < W, other=0.0).to(WIDE)
    before = tl.load(x_ptr + (row - 1) * stride_x + cols, mask=(cols < D) & (row >= 1), other=0.0).to(tl.float32)
    x, dy = _rows_of(row, x_ptr, dy_ptr, stride_x, stride_dy, stride_dy_col, N, D, BLOCK_D)
    x_next, dy_next = _rows_of(row + 1, x_ptr, dy_ptr, stride_x, stride_dy, stride_dy_col, N, D, BLOCK_D)
    head, s, _, a = _numbers_of(
        row, dy, before, w, x_ptr, token_ids_ptr, stride_x, stride_token, N, W, bos_id, BLOCK_W, WIDE
    )
    dweight = tl.zeros((BLOCK_W,), WIDE)
    dscale = tl.zeros((), WIDE)
    for _ in range(ROWS):
        x_coming, dy_coming = _rows_of(row + 2, x_ptr, dy_ptr, stride_x, stride_dy, stride_dy_col, N, D, BLOCK_D)
        head_next, s_next, m_next, a_next = _numbers_of(
            row + 1, dy_next, x, w, x_ptr, token_ids_ptr, stride_x, stride_token, N, W, bos_id, BLOCK_W, WIDE
        )
        u = scale * s * (1.0 - s) * a  # 0 beyond the last row, as a is
        g_next = (m_next * scale * s_next).to(tl.float32)
        w_row = tl.load(weight_ptr + cols, mask=cols < W, other=0.0).to(tl.float32)  # again: registers are scarcer
        dx = dy + g_next * dy_next + u.to(tl.float32) * w_row
        tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=(cols < D) & (row < N))
        dweight += u * head
        dscale += s * a
        x, dy, head, s, a = x_next, dy_next, head_next, s_next, a_next
        x_next, dy_next = x_coming, dy_coming
        row += 1
    shares_ptrs = shares_ptr + cols_w * tl.num_programs(0) + program
    tl.store(shares_ptrs, dweight.to(tl.float32), mask=cols_w < W)
    tl.store(shares_ptr + W * tl.num_programs(0) + program, dscale.to(tl.float32))


@triton.jit
def _add_shares_kernel(shares_ptr, dweight_ptr, dscale_ptr, n_programs, W, BLOCK: tl.constexpr):
    channel = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(shares_ptr + channel * n_programs + i, mask=i < n_programs, other=0.0), axis=0)
    if channel < W:
        tl.store(dweight_ptr + channel, total.to(dweight_ptr.dtype.element_ty))
    else:
        tl.store(dscale_ptr, total.to(dscale_ptr.dtype.element_ty))


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
def _forward(x: Tensor, weight: Tensor, scale: Tensor, token_ids: Tensor, bos_id: int | None) -> Tensor:
    (N, D), W = x.shape, len(weight)
    y = torch.empty((N, D), dtype=x.dtype, device=x.device)
    block_d = triton.next_power_of_2(D)
    block_n = max(1, LAUNCH["elements"] // block_d)
    _smear_gate_fwd_kernel[(triton.cdiv(N, block_n),)](
        x, weight, scale, token_ids, y, x.stride(0), token_ids.stride(0), N, D, W, bos_id,
        block_n, block_d, triton.next_power_of_2(W), _number_dtype(x.dtype), num_warps=LAUNCH["num_warps"],
    )  # fmt: skip
    return y


@_as_given
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, token_ids: Tensor, bos_id: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    (N, D), W = x.shape, len(weight)
    block_d, block_w = triton.next_power_of_2(D), triton.next_power_of_2(W)
    rows = 4
    while triton.cdiv(N, rows) > LAUNCH["programs_backward"]:
        rows = rows // 2 * 3 if rows.bit_count() == 1 else rows // 3 * 4  # 4, 6, 8, 12, 16: few compilations
    n_programs = triton.cdiv(N, rows)
    dx = torch.empty((N, D), dtype=x.dtype, device=x.device)
    dweight, dscale = torch.empty_like(weight), torch.empty_like(scale)
    shares = torch.empty((W + 1, n_programs), dtype=torch.float32, device=x.device)
    if n_programs:
        _smear_gate_bwd_kernel[(n_programs,)](
            dy, x, weight, scale, token_ids, dx, shares, dy.stride(0), dy.stride(1), x.stride(0), token_ids.stride(0),
            N, D, W, bos_id, rows, block_d, block_w, _number_dtype(x.dtype), num_warps=min(max(block_d // 512, 1), 16),
        )  # fmt: skip
    _add_shares_kernel[(W + 1,)](shares, dweight, dscale, n_programs, W, triton.next_power_of_2(max(n_programs, 1)))
    return dx, dweight, dscale


def _number_dtype(dtype: torch.dtype) -> tl.dtype:
    # a_t is a sum over D that a float32 gradient multiplies: in float32 its rounding alone reaches 1e-6 of dx.
    return tl.float64 if dtype == torch.float32 else tl.float32


@_as_given
def _backward_eager(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, token_ids: Tensor, bos_id: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    dy, h, w, λ = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (dy, x, weight, scale))
    head = h[:, : len(w)]
    s = torch.sigmoid(head @ w)
    m = torch.ones_like(s) if bos_id is None else (token_ids.long() != bos_id).to(s.dtype)
    a = m * (dy * _previous(h)).sum(1)
    u = λ * s * (1 - s) * a
    back = (m * λ * s)[:, None] * dy  # what row t hands to row t - 1
    dx = dy + torch.cat((back[1:], torch.zeros_like(back[:1])))
    dx[:, : len(w)] += u[:, None] * w
    return dx.to(x.dtype), (u @ head).to(weight.dtype), (s @ a)[None].to(scale.dtype)


# Under TRITON_INTERPRET=1 the decorator above gave an interpreted function, and the CPU runs the Triton code itself.
INTERPRETED = not isinstance(_smear_gate_fwd_kernel, triton.runtime.JITFunction)

_op = torch.library.custom_op(f"{NAMESPACE}::smear_gate", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    f"{NAMESPACE}::smear_gate_backward", _backward, mutates_args=(), device_types="cuda"
)


@_op.register_kernel("cpu")
def _forward_cpu(x, *args):
    return (_forward if INTERPRETED and x.dtype != torch.float64 else _as_given(smear_gate_ref))(x, *args)


@_op_backward.register_kernel("cpu")
def _backward_cpu(dy, *args):
    return (_backward if INTERPRETED and dy.dtype != torch.float64 else _backward_eager)(dy, *args)


@_op.register_fake
def _forward_fake(x, weight, scale, token_ids, bos_id):
    return x.new_empty(x.shape)


@_op_backward.register_fake
def _backward_fake(dy, x, weight, scale, token_ids, bos_id):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), scale.new_empty(scale.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.bos_id = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dy):
    return *_op_backward(dy, *ctx.saved_tensors, ctx.bos_id), None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def smear_gate(x: Tensor, weight: Tensor, scale: Tensor, token_ids: Tensor, bos_id: int | None = 1) -> Tensor:
    """x_t + [token_ids_t != bos_id] λ σ(weight · x_t[:W]) x_{t-1}; row 0 as it is.

    x: (N, D) raw embeddings of one stream, bfloat16, float16 or float32, channels adjacent; float64 on CPU only.
    weight: (W,), 1 <= W <= D, elements adjacent. scale: (1,), λ. Each in any of these dtypes, but float64 with float64.
    token_ids: (N,) int64 or int32. bos_id: the id that starts a document; None, and only None, is no mask (PR #1934).
    Returns (N, D) in x's dtype. Differentiable once, in reverse mode, in x, weight and scale.
    Raises ValueError for a shape, layout, device or number, TypeError for a dtype or an argument of another type.
    """
    for name, tensor in (("x", x), ("weight", weight), ("scale", scale), ("token_ids", token_ids)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"smear_gate: expected {name} to be a tensor, got {tensor!r}")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"smear_gate: expected x of shape (N, D), got {tuple(x.shape)}")
    if weight.ndim != 1 or not 1 <= len(weight) <= x.shape[1]:
        got = tuple(weight.shape)
        raise ValueError(f"smear_gate: expected weight of shape (W,), 1 <= W <= {x.shape[1]}, got {got}")
    if scale.shape != (1,):
        raise ValueError(f"smear_gate: expected scale of shape (1,), got {tuple(scale.shape)}")
    if token_ids.shape != x.shape[:1]:
        raise ValueError(f"smear_gate: expected token_ids of shape ({len(x)},), got {tuple(token_ids.shape)}")
    for name, tensor in (("x", x), ("weight", weight), ("scale", scale)):
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        if x.dtype == torch.float64 and x.device.type == "cpu":
            dtypes = (torch.float64,)
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype)[6:] for dtype in dtypes)
            raise TypeError(f"smear_gate: expected {name} in {expected}, got {tensor.dtype} on {tensor.device}")
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"smear_gate: expected token_ids in int64 or int32, got {token_ids.dtype}")
    if bos_id is not None and type(bos_id) is not int:
        raise TypeError(f"smear_gate: expected bos_id to be an int, or None for no mask, got {bos_id!r}")
    if bos_id is not None and not -(2**63) <= bos_id < 2**63:
        raise ValueError(f"smear_gate: expected bos_id in 64 bits, got {bos_id}")
    if (x.stride(1) != 1 and x.shape[1] > 1) or (weight.stride(0) != 1 and len(weight) > 1):
        raise ValueError(
            f"smear_gate: expected x and weight with adjacent channels, got strides {x.stride()} and {weight.stride()}"
        )
    for name, tensor in (("weight", weight), ("scale", scale), ("token_ids", token_ids)):
        if tensor.device != x.device:
            raise ValueError(f"smear_gate: expected {name} on {x.device}, got {tensor.device}")
    _refuse_tangents("smear_gate", x, weight, scale)
    return _op(x, weight, scale, token_ids, bos_id)


# --- not needed when lifted ---

SIZES = {
    "odd": (37, 83),
    "tile": (96, 128),
    "one": (1, 12),
    "record": (98304, 512),
    "large": (4194400, 512),
}


def smear_gate_inputs(size: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    """Gates from closed to open; a document starts on the first row and on about every ninth, not on 1 nor the last."""
    N, D = size
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(size, generator=generator, device=device).to(dtype)
    weight = torch.randn(min(12, D), generator=generator, device=device)
    token_ids = torch.randint(9, (N,), generator=generator, device=device)
    token_ids[1:2], token_ids[-1:], token_ids[:1] = 2, 2, 1
    scale = torch.full((1,), 0.75, device=device)
    return {
        "x": x.requires_grad_(),
        "weight": weight.requires_grad_(),
        "scale": scale.requires_grad_(),
        "token_ids": token_ids,
        "bos_id": 1,
    }


def smear_gate_cost(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    N, D = size
    rows, ids = N * D * dtype.itemsize, 8 * N
    return {
        "bytes_forward": 2 * rows + ids,
        "bytes_backward": 3 * rows + ids,
        "flops_forward": 2 * N * D,
        "flops_backward": 7 * N * D,
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
    _prove(smear_gate, smear_gate_ref, smear_gate_inputs, smear_gate_cost, SIZES)
