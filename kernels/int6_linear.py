"""Linear layer on packed six-bit weights: y = (x q^T) scale, with q integers in [-31, 31] and one scale an output row.

    forward   y[m, n] = scale[n] sum_k x[m, k] q[n, k]         backward   dx[m, k] = sum_n dy[m, n] scale[n] q[n, k]

Layout. Stored are u = q + 32 in [1, 63]. Each row is cut into groups of 128 columns, a group into quarters of 32:
k = 128 g + 32 j + t. A group takes 96 bytes, three planes of 32 (one sector of memory each). Plane j holds quarter j in
its low six bits, and two bits of the fourth quarter above them:

    packed[n, 96 g + 32 j + t] = u_j[t] + 64 ((u_3[t] >> 2 j) mod 4),   j = 0, 1, 2

so three weights of four come out with one mask, all loads are of whole aligned bytes, and a quarter is one tl.dot with
the matching 32 columns of x: nothing is permuted in registers.

x (..., K) bfloat16, float16 or float32, K a multiple of 128; packed (N, 3K/4) uint8; scale (N,) float16 or float32.
Returns (..., N) in x's dtype. Products are accumulated in float32 (q is exact in all three dtypes) and the scale is
applied once, after the sum. Up to SMALL_M rows of x the weights are never unpacked to memory; above, where arithmetic
outweighs their bytes, they are dequantised once into x's dtype, N K elements of scratch, for the ordinary GEMM.

Must move: 3/4 byte a weight, x and y once. Replaces a dequantised copy of the weights (2 bytes each) and F.linear.
Refuses: gradients of packed and scale (weights are frozen; the one of x is there for adapters trained around them), K
that is not a multiple of 128, and an x that is not contiguous.

Source: own layout; segments of two and four bits are the idea of FP6-LLM (Xia et al. 2024), planes that of torchao.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

NAMESPACE = "niblick"
GROUP, QUARTER = 128, 32
SMALL_M = 64  # rows of x up to which the weights stay packed
# 16 rows are the smallest tl.dot; with them sm_80, sm_90 and sm_100 all use mma.sync.m16n8k16. Not tuned on any card.
LAUNCH = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4}


def int6_pack(q: Tensor) -> Tensor:
    """(N, K) integers in [-31, 31] to (N, 3K/4) uint8. For use offline: it looks at the values, so it synchronises.

    Raises: TypeError if q is not of integers, ValueError for a shape or a value out of range, naming the first one.
    """
    if q.is_floating_point() or q.is_complex() or q.dtype == torch.bool:
        raise TypeError(f"int6_pack: q must be of integers, got {q.dtype}")
    if q.ndim != 2 or q.shape[1] == 0 or q.shape[1] % GROUP:
        raise ValueError(f"int6_pack: q must be (N, K) with K a positive multiple of {GROUP}, got {tuple(q.shape)}")
    outside = (q < -31) | (q > 31)
    if outside.any():
        n, k = outside.nonzero()[0].tolist()
        raise ValueError(f"int6_pack: q must be in [-31, 31], got {q[n, k].item()} at index ({n}, {k})")
    N, K = q.shape
    u0, u1, u2, u3 = (q + 32).to(torch.uint8).view(N, K // GROUP, 4, QUARTER).unbind(2)
    planes = [u0 | (u3 & 3) << 6, u1 | (u3 >> 2 & 3) << 6, u2 | (u3 >> 4) << 6]
    return torch.stack(planes, dim=2).view(N, 3 * K // 4)


def int6_unpack(packed: Tensor) -> Tensor:
    """(N, 3K/4) uint8 to (N, K) int8, the inverse of `int6_pack`.

    Raises: TypeError for a dtype, ValueError for a shape or stride.
    """
    _check_packed("int6_unpack", packed)
    N, groups = packed.shape[0], packed.shape[1] // (3 * QUARTER)
    p0, p1, p2 = packed.view(N, groups, 3, QUARTER).unbind(2)
    u3 = p0 >> 6 | p1 >> 6 << 2 | p2 >> 6 << 4
    u = torch.stack([p0 & 63, p1 & 63, p2 & 63, u3], dim=2)
    return u.view(N, groups * GROUP).to(torch.int8) - 32


def _check_packed(caller: str, packed: Tensor) -> None:
    if packed.dtype != torch.uint8:
        raise TypeError(f"{caller}: packed must be torch.uint8, got {packed.dtype}")
    if packed.ndim != 2 or packed.shape[1] == 0 or packed.shape[1] % (3 * QUARTER):
        raise ValueError(
            f"{caller}: packed must be (N, 3K/4) with K a positive multiple of {GROUP}, got {tuple(packed.shape)}"
        )
    if not packed.is_contiguous():
        raise ValueError(f"{caller}: packed must be contiguous, got strides {packed.stride()}")


def _dequantise(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K) weights q scale, multiplied in at least float32 and rounded once."""
    wide = torch.promote_types(scale.dtype, torch.float32)
    return (int6_unpack(packed) * scale.to(wide)[:, None]).to(dtype)


def int6_linear_ref(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """The formula above in plain PyTorch, in the dtype of x, float64 included."""
    return F.linear(x, _dequantise(packed, scale, x.dtype))


@triton.jit
def _dot_quarter(acc, x_ptrs, x_mask, u, OPERAND: tl.constexpr):
    x = tl.load(x_ptrs, mask=x_mask, other=0.0).to(tl.float32).to(OPERAND)  # (BLOCK_M, 32)
    q = (u - 32).to(tl.float32).to(OPERAND)  # (32, BLOCK_N)
    return tl.dot(x, q, acc, input_precision="ieee")


@triton.jit
def _int6_linear_kernel(
    x_ptr,  # (M, K)
    packed_ptr,  # (N, 3K/4)
    scale_ptr,  # (N,)
    y_ptr,  # (M, N)
    M,
    N,
    K: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, 32)
    x_mask = m[:, None] < M
    n_mask = n < N
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * K + t[None, :]
    packed_ptrs = packed_ptr + n.to(tl.int64)[None, :] * (K // 4 * 3) + t[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, 128):
        p0 = tl.load(packed_ptrs, mask=n_mask[None, :], other=0).to(tl.int32)
        p1 = tl.load(packed_ptrs + 32, mask=n_mask[None, :], other=0).to(tl.int32)
        p2 = tl.load(packed_ptrs + 64, mask=n_mask[None, :], other=0).to(tl.int32)
        u3 = (p0 >> 6) | ((p1 >> 6) << 2) | ((p2 >> 6) << 4)
        acc = _dot_quarter(acc, x_ptrs, x_mask, p0 & 63, OPERAND)
        acc = _dot_quarter(acc, x_ptrs + 32, x_mask, p1 & 63, OPERAND)
        acc = _dot_quarter(acc, x_ptrs + 64, x_mask, p2 & 63, OPERAND)
        acc = _dot_quarter(acc, x_ptrs + 96, x_mask, u3, OPERAND)
        x_ptrs += 128
        packed_ptrs += 96

    scale = tl.load(scale_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptrs, (acc * scale[None, :]).to(y_ptr.dtype.element_ty), mask=x_mask & n_mask[None, :])


# Under TRITON_INTERPRET=1 the decorator above gave an interpreted function, and the CPU runs the Triton code itself.
INTERPRETED = not isinstance(_int6_linear_kernel, triton.runtime.JITFunction)
_OPERAND = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _forward(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    (M, K), N = x.shape, packed.shape[0]
    if M > SMALL_M:
        return F.linear(x, _dequantise(packed, scale, x.dtype))
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M and N:
        # K is a constexpr: one compilation a weight shape, and Triton 3.5's interpreter cannot loop to a runtime bound.
        # No interpreter multiplies bfloat16 rightly in tl.dot, so there the operands are float32.
        operand = tl.float32 if INTERPRETED else _OPERAND[x.dtype]
        grid = (triton.cdiv(N, LAUNCH["BLOCK_N"]), triton.cdiv(M, LAUNCH["BLOCK_M"]))
        _int6_linear_kernel[grid](x, packed, scale, y, M, N, K, operand, **LAUNCH)
    return y


def _backward(dy: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    # Adapters train on thousands of rows, where the ordinary GEMM on dequantised weights is the fast way in any case.
    return dy @ _dequantise(packed, scale, dy.dtype)


_op = torch.library.custom_op(f"{NAMESPACE}::int6_linear", _forward, mutates_args=(), device_types="cuda")
_op.register_kernel("cpu")(_forward if INTERPRETED else int6_linear_ref)
_op_backward = torch.library.custom_op(f"{NAMESPACE}::int6_linear_backward", _backward, mutates_args=())


@_op.register_fake
def _forward_fake(x, packed, scale):
    return x.new_empty((x.shape[0], packed.shape[0]))


@_op_backward.register_fake
def _backward_fake(dy, packed, scale):
    return dy.new_empty((dy.shape[0], packed.shape[1] // 3 * 4))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _autograd(ctx, dy):
    # contiguous(): the same bits whatever the layout of dy, which would choose among GEMM kernels
    return _op_backward(dy.contiguous(), *ctx.saved_tensors), None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def int6_linear(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """F.linear(x, q scale[:, None]) on weights packed by `int6_pack`; gradient to x only.

    Args:
        x: (..., K) bfloat16, float16 or float32, contiguous.
        packed: (N, 3K/4) uint8, contiguous.
        scale: (N,) float16 or float32, contiguous.

    Returns: (..., N) in x's dtype.
    Raises: TypeError for a dtype, ValueError for a shape, stride, device or a wanted gradient of scale.
    """
    _check_packed("int6_linear", packed)
    N, K = packed.shape[0], packed.shape[1] // 3 * 4
    if x.dtype not in _OPERAND:
        raise TypeError(f"int6_linear: x must be bfloat16, float16 or float32, got {x.dtype}")
    if scale.dtype not in (torch.float16, torch.float32):
        raise TypeError(f"int6_linear: scale must be float16 or float32, got {scale.dtype}")
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"int6_linear: x must be (..., {K}) as packed is {tuple(packed.shape)}, got {tuple(x.shape)}")
    if scale.shape != (N,) or not scale.is_contiguous():
        got = f"{tuple(scale.shape)} with strides {scale.stride()}"
        raise ValueError(f"int6_linear: scale must be contiguous ({N},), one for each row of packed, got {got}")
    if not x.is_contiguous():
        raise ValueError(f"int6_linear: x must be contiguous, got {tuple(x.shape)} with strides {x.stride()}")
    for name, tensor in (("packed", packed), ("scale", scale)):
        if tensor.device != x.device:
            raise ValueError(f"int6_linear: {name} must be on {x.device} as x, got {tensor.device}")
    if torch.is_grad_enabled() and scale.requires_grad:
        raise ValueError("int6_linear: scale has no gradient, got one that requires it: detach it")
    return _op(x.view(x.shape[:-1].numel(), K), packed, scale).view(*x.shape[:-1], N)


# --- not needed when lifted ---

# (M, N, K); "wide" takes the GEMM path. "record" is the up-projection of the record's MLP at 64 rows.
SIZES = {
    "odd": (17, 33, 384),
    "tile": (16, 64, 256),
    "one": (1, 5, 128),
    "full": (64, 32, 128),
    "wide": (65, 40, 256),
    "record": (64, 2048, 512),
}


def int6_linear_inputs(size: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    """Keyword arguments at (M, N, K): the first two rows of weights are at the ends of the range; scale is float32 for
    float32 x and float16, as artifacts store it, for the others."""
    M, N, K = size
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn((M, K), generator=generator, device=device, dtype=dtype)
    q = torch.randint(-31, 32, (N, K), generator=generator, device=device, dtype=torch.int8)
    q[0], q[1] = 31, -31
    scale = torch.rand(N, generator=generator, device=device) * 0.02 + 0.001
    return {
        "x": x.requires_grad_(),
        "packed": int6_pack(q),
        "scale": scale if dtype == torch.float32 else scale.half(),
    }


def int6_linear_cost(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    """Bytes and operations the maths needs: packed weights, scale, x and y once; the same again backward."""
    M, N, K = size
    scale_bytes = 4 if dtype == torch.float32 else 2
    moved = N * K * 3 // 4 + N * scale_bytes + M * (N + K) * dtype.itemsize
    return {
        "bytes_forward": moved,
        "bytes_backward": moved,
        "flops_forward": 2 * M * N * K,
        "flops_backward": 2 * M * N * K,
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
    _prove(int6_linear, int6_linear_ref, int6_linear_inputs, int6_linear_cost, SIZES)
