"""Linear layer on packed six-bit weights: y = (x q^T) scale, with q integers in [-31, 31] and one scale an output row.

    forward   y[m, n] = scale[n] sum_k x[m, k] q[n, k]  (+ sum_r B[n, r] sum_k A[r, k] x[m, k], with lowrank = (A, B))
    backward  dx[m, k] = sum_n dy[m, n] scale[n] q[n, k]  (+ sum_r A[r, k] sum_n B[n, r] dy[m, n])

Layout. Stored are u = q + 32 in [1, 63]. A row of K weights is cut into eight strips of E = K/8 columns, k = E j + i.
Six strips fill the low six bits of the bytes of three planes of E 16-bit elements; the last two lie in the bytes' two
high bits, two bits in each plane:

    plane_p[n, i], byte h = u_{2p+h}[i] + 64 ((u_{6+h}[i] >> 2 p) mod 4),   p = 0, 1, 2,  h = 0, 1;   plane_p at 2 E p

So an element holds the same column of two strips, neighbours in memory are neighbours in k, and two weights lie in the
halves of a register as a tensor core wants them: a mask, an OR into the mantissa of 128 (bfloat16; 1024 in float16) and
a subtraction make both, exactly and without a conversion. 1.9 instructions a weight were counted, 2.2 with all loads.

x (..., K) bfloat16, float16 or float32, K a multiple of 128; packed (N, 3K/4) uint8; scale (N,) float16 or float32; A
(R, K) and B (N, R), R <= 64, in x's dtype. Returns (..., N) in x's dtype. Products are accumulated in float32 (q is
exact in all three dtypes); the scale is applied once, after the sum. Up to SMALL_M rows of 16-bit x the weights are
never unpacked to memory: the sum over k is split among programs, whose shares a second kernel adds in a fixed order, so
that results repeat bitwise; that kernel also adds the low-rank term, from x A^T, a small GEMM. Above, where arithmetic
outweighs their bytes, one kernel dequantises the weights into x's dtype, N K elements of scratch, for the ordinary
GEMM; so does the backward, and so any number of rows in float32, where the order of such long sums is too coarse.

Must move: 3/4 byte a weight, x and y once. Replaces a dequantised copy of the weights (2 bytes each) and F.linear.
Refuses: gradients of packed, scale and lowrank (weights are frozen; the one of x is there for adapters trained around
them), K that is not a multiple of 128, and an x that is not contiguous.

Source: own layout; segments of two and four bits are the idea of FP6-LLM (Xia et al. 2024), planes that of torchao, the
OR into a mantissa that of FasterTransformer (Kim et al. 2022); the low-rank term is LQER (Zhang et al. 2024).
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
GROUP = 128  # K is a multiple of it: a strip is then at least one tl.dot deep
SMALL_M = 128  # rows of x up to which the weights stay packed
MAX_RANK = 64
PIECE = 256  # terms that float32 adds up in one chain
# By rows of x: output columns, elements of a strip and pipeline stages of a program, its warps; how many programs to
# aim at by splitting k, and the fewest turns of a loop to leave each. 64 elements are the 128 bytes of a cache line; at
# 64 rows a third stage counts for more than a second program on each multiprocessor, and shares are then half as many.
# NVIDIA H200, 2026-11-20.
LAUNCH = {
    8: {"BLOCK_N": 32, "BLOCK_I": 64, "STAGES": 3, "num_warps": 2, "programs": 512, "turns": 4},
    16: {"BLOCK_N": 64, "BLOCK_I": 64, "STAGES": 3, "num_warps": 4, "programs": 256, "turns": 2},
    32: {"BLOCK_N": 64, "BLOCK_I": 64, "STAGES": 2, "num_warps": 4, "programs": 256, "turns": 2},
    64: {"BLOCK_N": 128, "BLOCK_I": 32, "STAGES": 3, "num_warps": 8, "programs": 128, "turns": 2},
}


def int6_pack(q: Tensor) -> Tensor:
    """(N, K) integers in [-31, 31] to (N, 3K/4) uint8. For use offline: it looks at the values, so it synchronises.

    Raises: TypeError if q is not a tensor of signed integers, ValueError for a shape or a value out of range, naming
    the first one.
    """
    _check_tensor("int6_pack", "q", q)
    if q.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"int6_pack: q must be of signed integers, got {q.dtype}")
    if q.ndim != 2 or q.shape[1] == 0 or q.shape[1] % GROUP:
        raise ValueError(f"int6_pack: q must be (N, K) with K a positive multiple of {GROUP}, got {tuple(q.shape)}")
    outside = (q < -31) | (q > 31)
    if outside.any():
        n, k = outside.nonzero()[0].tolist()
        raise ValueError(f"int6_pack: q must be in [-31, 31], got {q[n, k].item()} at index ({n}, {k})")
    N, K = q.shape
    u = (q + 32).to(torch.uint8).view(N, 4, 2, K // 8)  # (N, p, h, i)
    planes = torch.stack([u[:, p] | (u[:, 3] >> 2 * p & 3) << 6 for p in range(3)], dim=1)
    return planes.mT.reshape(N, 3 * K // 4)


def int6_unpack(packed: Tensor) -> Tensor:
    """(N, 3K/4) uint8 to (N, K) int8, the inverse of `int6_pack`.

    Raises: TypeError for a dtype or what is no tensor, ValueError for a shape or stride.
    """
    _check_packed("int6_unpack", packed)
    N, E = packed.shape[0], packed.shape[1] // 6
    planes = packed.view(N, 3, E, 2).mT
    last = planes[:, 0] >> 6 | planes[:, 1] >> 6 << 2 | planes[:, 2] >> 6 << 4
    u = torch.cat([planes & 63, last[:, None]], dim=1)
    return u.view(N, 8 * E).to(torch.int8) - 32


def _check_tensor(caller: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor, got {value!r}")


def _check_packed(caller: str, packed: Tensor) -> None:
    _check_tensor(caller, "packed", packed)
    if packed.dtype != torch.uint8:
        raise TypeError(f"{caller}: packed must be torch.uint8, got {packed.dtype}")
    if packed.ndim != 2 or packed.shape[1] == 0 or packed.shape[1] % (3 * GROUP // 4):
        raise ValueError(
            f"{caller}: packed must be (N, 3K/4) with K a positive multiple of {GROUP}, got {tuple(packed.shape)}"
        )
    if not packed.is_contiguous():
        raise ValueError(f"{caller}: packed must be contiguous, got strides {packed.stride()}")


def _dequantise_eager(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K) weights q scale, multiplied in at least float32 and rounded once."""
    wide = torch.promote_types(scale.dtype, torch.float32)
    return (int6_unpack(packed) * scale.to(wide)[:, None]).to(dtype)


def int6_linear_ref(x: Tensor, packed: Tensor, scale: Tensor, lowrank: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The formula above in plain PyTorch, in the dtype of x, float64 included."""
    y = F.linear(x, _dequantise_eager(packed, scale, x.dtype))
    if lowrank is not None:
        a, b = (t.to(x.dtype) for t in lowrank)
        y = y + F.linear(F.linear(x, a), b)
    return y


@triton.jit
def _fourth(p0, p1, p2, ASM: tl.constexpr):
    """The last two strips' u, from the high bits of the three planes."""
    if ASM is not None:
        return tl.inline_asm_elementwise(ASM, "=r,r,r,r", [p0, p1, p2], dtype=tl.int16, is_pure=True, pack=2)
    else:
        return ((p0 >> 6) & 0x0303) | ((p1 >> 4) & 0x0C0C) | ((p2 >> 2) & 0x3030)


@triton.jit
def _weights(v, HIGH: tl.constexpr, OPERAND: tl.constexpr, ASM: tl.constexpr):
    """q of the low bytes, or of the high ones."""
    if ASM is not None:
        bits = tl.inline_asm_elementwise(ASM, "=r,r", [v], dtype=tl.int16, is_pure=True, pack=2)
        return bits.to(OPERAND, bitcast=True)
    else:
        return (((v >> 8 if HIGH else v) & 63) - 32).to(tl.float32).to(OPERAND)


@triton.jit
def _int6_linear_kernel(
    x_ptr,  # (M, K)
    packed_ptr,  # (N, 3K/8) int16
    shares_ptr,  # (SPLITS, M, N) float32: sums over a part of k
    M,
    N,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    OPERAND: tl.constexpr,
    ASM_LOW: tl.constexpr,
    ASM_HIGH: tl.constexpr,
    ASM_FOURTH: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The weights are the left operand: they stay in registers, and few rows of x cost little. All is transposed, then.
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    E: tl.constexpr = K // 8
    TURNS: tl.constexpr = (E + BLOCK_I * SPLITS - 1) // (BLOCK_I * SPLITS)
    EVEN: tl.constexpr = E % (BLOCK_I * SPLITS) == 0
    split = tl.program_id(1).to(tl.int64)
    m = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    i = tl.program_id(1) * (TURNS * BLOCK_I) + tl.arange(0, BLOCK_I)
    x_ptrs = x_ptr + m * K + i[:, None]
    x_mask = m < M
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    packed_ptrs = packed_ptr + tl.minimum(n, N - 1) * (3 * E) + i[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for turn in tl.range(0, TURNS, num_stages=STAGES):
        if EVEN:
            p0 = tl.load(packed_ptrs)
            p1 = tl.load(packed_ptrs + E)
            p2 = tl.load(packed_ptrs + 2 * E)
            mask = x_mask
        else:
            inside = i + turn * BLOCK_I < E
            p0 = tl.load(packed_ptrs, mask=inside[None, :], other=0)
            p1 = tl.load(packed_ptrs + E, mask=inside[None, :], other=0)
            p2 = tl.load(packed_ptrs + 2 * E, mask=inside[None, :], other=0)
            mask = x_mask & inside[:, None]
        p3 = _fourth(p0, p1, p2, ASM_FOURTH)
        for j in tl.static_range(8):
            v = p0 if j < 2 else (p1 if j < 4 else (p2 if j < 6 else p3))
            q = _weights(v, j % 2 == 1, OPERAND, ASM_HIGH if j % 2 else ASM_LOW)
            x = tl.load(x_ptrs + j * E, mask=mask, other=0.0).to(OPERAND)
            acc = tl.dot(q, x, acc)
        packed_ptrs += BLOCK_I
        x_ptrs += BLOCK_I
    tl.store(shares_ptr + (split * M + m) * N + n, acc, mask=x_mask & (n < N))


@triton.jit
def _add_splits_kernel(
    shares_ptr,  # (SPLITS, M, N)
    t_ptr,  # (M, RANK): x A^T
    b_ptr,  # (N, RANK)
    scale_ptr,  # (N,)
    y_ptr,  # (M, N)
    M,
    N,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    OPERAND: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (m < M) & (n < N)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(shares_ptr + (split * M + m) * N + n, mask=mask, other=0.0)
    acc *= tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if RANK > 0:
        r = tl.arange(0, BLOCK_R)
        t = tl.load(t_ptr + m * RANK + r[None, :], mask=(m < M) & (r[None, :] < RANK), other=0.0).to(OPERAND)
        b = tl.load(b_ptr + n * RANK + r[:, None], mask=(n < N) & (r[:, None] < RANK), other=0.0).to(OPERAND)
        acc = tl.dot(t, b, acc, input_precision="ieee")
    tl.store(y_ptr + m * N + n, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantise_kernel(packed_ptr, scale_ptr, w_ptr, E, BLOCK_I: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    scale = tl.load(scale_ptr + n).to(tl.float32)
    p0 = tl.load(packed_ptr + n * (3 * E) + i, mask=i < E, other=0)
    p1 = tl.load(packed_ptr + n * (3 * E) + i + E, mask=i < E, other=0)
    p2 = tl.load(packed_ptr + n * (3 * E) + i + 2 * E, mask=i < E, other=0)
    p3 = _fourth(p0, p1, p2, None)
    for j in tl.static_range(8):
        v = p0 if j < 2 else (p1 if j < 4 else (p2 if j < 6 else p3))
        w = _weights(v, j % 2 == 1, tl.float32, None) * scale
        tl.store(w_ptr + n * (8 * E) + j * E + i, w.to(w_ptr.dtype.element_ty), mask=i < E)


# Under TRITON_INTERPRET=1 the decorator above gave an interpreted function, and the CPU runs the Triton code itself.
INTERPRETED = not isinstance(_int6_linear_kernel, triton.runtime.JITFunction)
_OPERAND = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# What the compiler does not find by itself: both halves of a register at once. 0xEA is (a & b) | c.
_FOURTH = """{ .reg .b32 a, b, c; shr.b32 a, $1, 6; shr.b32 b, $2, 4; shr.b32 c, $3, 2; and.b32 a, a, 0x03030303;
lop3.b32 a, b, 0x0C0C0C0C, a, 0xEA; lop3.b32 $0, c, 0x30303030, a, 0xEA; }"""
_BOTH = """{{ .reg .b32 u, one, less; mov.b32 one, {one}; mov.b32 less, {less}; {shift}
lop3.b32 u, {source}, 0x003F003F, {magic}, 0xEA; fma.rn.{kind} $0, u, one, less; }}"""


def _asm(dtype: torch.dtype) -> tuple[str | None, ...]:
    """Assembly of `_weights` for low and high bytes and of `_fourth`; None for Triton's own operations."""
    if INTERPRETED:
        return None, None, None
    if dtype == torch.bfloat16:  # 128, 1 and -160
        values = {"kind": "bf16x2", "magic": "0x43004300", "one": "0x3F803F80", "less": "0xC320C320"}
    else:  # 1024, 1 and -1056
        values = {"kind": "f16x2", "magic": "0x64006400", "one": "0x3C003C00", "less": "0xE420E420"}
    low = _BOTH.format(**values, shift="", source="$1")
    return low, _BOTH.format(**values, shift="shr.b32 u, $1, 8;", source="u"), _FOURTH


def _planes(packed: Tensor) -> Tensor:
    if packed.storage_offset() % 2:
        raise ValueError(
            f"int6_linear: packed must start at an even byte of its storage, got {packed.storage_offset()}"
        )
    return packed.view(torch.int16)


def _overlap() -> str:
    """How a kernel follows the one before it: "early" is programmatic launch, Hopper's; "after" the ordinary way."""
    if INTERPRETED or triton.runtime.driver.active.get_current_target().arch < 90:
        return "after"
    return "early"


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
def _forward(x: Tensor, packed: Tensor, scale: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    (M, K), N = x.shape, packed.shape[0]
    if M > SMALL_M or x.dtype == torch.float32:
        y = _matmul(x, _dequantise(packed, scale, x.dtype).t())
        return y if a is None else y + F.linear(F.linear(x, a), b)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if not (M and N):
        return y
    block_m = min((rows for rows in LAUNCH if rows >= M), default=max(LAUNCH))
    launch = LAUNCH[block_m].copy()
    launch["BLOCK_I"] = min(launch["BLOCK_I"], triton.next_power_of_2(K // 8))
    tiles, turns = triton.cdiv(N, launch["BLOCK_N"]), triton.cdiv(K // 8, launch["BLOCK_I"])
    wanted = triton.next_power_of_2(max(launch.pop("programs") // tiles, 1))
    splits = max(1, min(wanted, turns // launch.pop("turns")))
    rank, t = (0, None) if a is None else (a.shape[0], F.linear(x, a))
    shares = torch.empty((splits, M, N), dtype=torch.float32, device=x.device)
    # K is a constexpr: one compilation a weight shape, and Triton 3.5's interpreter cannot loop to a runtime bound.
    # No interpreter multiplies bfloat16 rightly in tl.dot, so there the operands are float32.
    operand = tl.float32 if INTERPRETED else _OPERAND[x.dtype]
    early = _overlap() == "early"
    options = {"launch_pdl": True} if early else {}
    _int6_linear_kernel[(tiles, splits, triton.cdiv(M, block_m))](
        x, _planes(packed), shares, M, N, K, splits, operand, *_asm(x.dtype), early,
        BLOCK_M=block_m, **launch, **options,
    )  # fmt: skip
    add_m, add_n, block_r = (min(block_m, 16), 64, max(16, triton.next_power_of_2(rank))) if rank else (1, 512, 1)
    _add_splits_kernel[(triton.cdiv(N, add_n), triton.cdiv(M, add_m))](
        shares, t, b, scale, y, M, N, rank, splits, operand, early, add_m, add_n, block_r, num_warps=4, **options
    )
    return y


def _dequantise(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    N, E = packed.shape[0], packed.shape[1] // 6
    w = torch.empty((N, 8 * E), dtype=torch.float32 if INTERPRETED else dtype, device=packed.device)
    if N:
        block = min(1024, triton.next_power_of_2(E))
        _dequantise_kernel[(N, triton.cdiv(E, block))](_planes(packed), scale, w, E, block)
    return w.to(dtype)  # the interpreter's own rounding would cut digits off


@_as_given
def _backward(dy: Tensor, packed: Tensor, scale: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    # Adapters train on thousands of rows, where the ordinary GEMM on dequantised weights is the fast way in any case.
    dx = _matmul(dy, _dequantise(packed, scale, dy.dtype))
    return dx if a is None else dx + (dy @ b) @ a


def _matmul(x: Tensor, w: Tensor) -> Tensor:
    """x w, in float32 in pieces of the sum: in one chain of 8192 terms a library's GEMM may lose 1.3e-6 of the row's
    largest value, another one of its kernels, for another layout of x, a tenth of that on the same element."""
    if x.dtype != torch.float32:
        return x @ w
    y = x.new_zeros((x.shape[0], w.shape[1]))
    for x_piece, w_piece in zip(x.split(PIECE, dim=1), w.split(PIECE), strict=True):
        y.addmm_(x_piece, w_piece)
    return y


@_as_given
def _forward_eager(x: Tensor, packed: Tensor, scale: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    return int6_linear_ref(x, packed, scale, None if a is None else (a, b))


@_as_given
def _backward_eager(dy: Tensor, packed: Tensor, scale: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    dx = dy @ _dequantise_eager(packed, scale, dy.dtype)
    return dx if a is None else dx + (dy @ b) @ a


_op = torch.library.custom_op(f"{NAMESPACE}::int6_linear", _forward, mutates_args=(), device_types="cuda")
_op.register_kernel("cpu")(_forward if INTERPRETED else _forward_eager)
_op_backward = torch.library.custom_op(
    f"{NAMESPACE}::int6_linear_backward", _backward, mutates_args=(), device_types="cuda"
)
_op_backward.register_kernel("cpu")(_backward if INTERPRETED else _backward_eager)


@_op.register_fake
def _forward_fake(x, packed, scale, a, b):
    return x.new_empty((x.shape[0], packed.shape[0]))


@_op_backward.register_fake
def _backward_fake(dy, packed, scale, a, b):
    return dy.new_empty((dy.shape[0], packed.shape[1] // 3 * 4))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _autograd(ctx, dy):
    # contiguous(): the same bits whatever the layout of dy, which would choose among GEMM kernels
    return _op_backward(dy.contiguous(), *ctx.saved_tensors), None, None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def int6_linear(x: Tensor, packed: Tensor, scale: Tensor, *, lowrank: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """F.linear(x, q scale[:, None] + B A) on weights packed by `int6_pack`; gradient to x only.

    Args:
        x: (..., K) bfloat16, float16 or float32, contiguous.
        packed: (N, 3K/4) uint8, contiguous.
        scale: (N,) float16 or float32, contiguous.
        lowrank: A (R, K) and B (N, R), 1 <= R <= 64, in x's dtype, contiguous; None for no such term.

    Returns: (..., N) in x's dtype.
    Raises: TypeError for a dtype or an argument of another type, ValueError for a shape, stride, device or a wanted
    gradient of a weight.
    """
    _check_packed("int6_linear", packed)
    for name, value in (("x", x), ("scale", scale)):
        _check_tensor("int6_linear", name, value)
    if lowrank is not None and not (isinstance(lowrank, (tuple, list)) and len(lowrank) == 2):
        raise TypeError(f"int6_linear: lowrank must be a pair (A, B) or None, got {lowrank!r}")
    N, K = packed.shape[0], packed.shape[1] // 3 * 4
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
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
    a, b = (None, None) if lowrank is None else lowrank
    if lowrank is not None:
        _check_lowrank(x, a, b, N, K)
    for name, tensor in (("packed", packed), ("scale", scale), ("lowrank's A", a), ("lowrank's B", b)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"int6_linear: {name} must be on {x.device} as x, got {tensor.device}")
        if tensor is not None and torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"int6_linear: {name} has no gradient, got one that requires it: detach it")
    _refuse_tangents("int6_linear", x, scale, a, b)
    return _op(x.view(x.shape[:-1].numel(), K), packed, scale, a, b).view(*x.shape[:-1], N)


def _check_lowrank(x: Tensor, a: Tensor, b: Tensor, N: int, K: int) -> None:
    for name, value in (("lowrank's A", a), ("lowrank's B", b)):
        _check_tensor("int6_linear", name, value)
    rank = a.shape[0] if a.ndim == 2 else 0
    if not 1 <= rank <= MAX_RANK or a.shape != (rank, K) or b.shape != (N, rank):
        expected = f"A (R, {K}) and B ({N}, R), 1 <= R <= {MAX_RANK}"
        raise ValueError(f"int6_linear: lowrank must be {expected}, got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != x.dtype or b.dtype != x.dtype:
        raise TypeError(f"int6_linear: lowrank must be {x.dtype} as x, got {a.dtype} and {b.dtype}")
    if not (a.is_contiguous() and b.is_contiguous()):
        raise ValueError(f"int6_linear: lowrank must be contiguous, got strides {a.stride()} and {b.stride()}")


# --- not needed when lifted ---

# (M, N, K) and, with a low-rank term, R. "deep" splits k, and unevenly; "wide" takes the GEMM path; "record" is the
# up-projection of the record's MLP at 64 rows.
SIZES = {
    "odd": (17, 33, 384),
    "deep": (9, 20, 1664, 5),
    "tile": (16, 64, 256),
    "one": (1, 5, 128),
    "full": (64, 32, 128),
    "wide": (129, 40, 256),
    "record": (64, 2048, 512),
    "record, 4096 at 1": (1, 4096, 4096),
    "record, 4096 at 16": (16, 4096, 4096),
    "record, 4096 at 64": (64, 4096, 4096),
    "record, 8192 at 1": (1, 8192, 8192),
    "record, 8192 at 16": (16, 8192, 8192),
    "record, 8192 at 64": (64, 8192, 8192),
}


def int6_linear_inputs(size: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    """Keyword arguments at (M, N, K) or (M, N, K, R): the first two rows of weights are at the ends of the range; scale
    is float32 for float32 x and float16, as artifacts store it, for the others."""
    M, N, K, *rank = size
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn((M, K), generator=generator, device=device, dtype=dtype)
    q = torch.randint(-31, 32, (N, K), generator=generator, device=device, dtype=torch.int8)
    q[0], q[1] = 31, -31
    scale = torch.rand(N, generator=generator, device=device) * 0.02 + 0.001
    inputs = {
        "x": x.requires_grad_(),
        "packed": int6_pack(q),
        "scale": scale if dtype == torch.float32 else scale.half(),
    }
    if rank:
        a = torch.randn((rank[0], K), generator=generator, device=device, dtype=dtype)
        b = torch.randn((N, rank[0]), generator=generator, device=device, dtype=dtype)
        inputs["lowrank"] = (a, b * 0.01)  # a correction, as of a quantiser's error
    return inputs


def int6_linear_cost(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    """Bytes and operations the maths needs: packed weights, scale, low-rank term, x and y once; backward the same."""
    M, N, K, *rank = size
    scale_bytes = 4 if dtype == torch.float32 else 2
    values = M * (N + K) + sum(rank) * (N + K)
    moved = N * K * 3 // 4 + N * scale_bytes + values * dtype.itemsize
    flops = 2 * M * (N * K + sum(rank) * (N + K))
    return {"bytes_forward": moved, "bytes_backward": moved, "flops_forward": flops, "flops_backward": flops}


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
