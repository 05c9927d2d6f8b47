"""MLP block with a squared leaky ReLU, forward and backward: the elementwise work lives in two of its six GEMMs.

    h = x up^T        a = leaky(h)²        y = a down^T             leaky(h) = h or, where h < 0, negative_slope h
    dh = (dy down) 2 leaky(h) leaky'(h)    dx = dh up    dup = dh^T x    ddown = dy^T a

Two kernels: x up^T, whose epilogue writes a and nothing else, and dy down, whose epilogue reads a and writes dh. The
other four products are torch's own. h is never stored: |leaky(h)| is the root of a, and the sign of h is the last bit
of a's mantissa. a is therefore rounded, once, from the float32 sum to every second number of its dtype: an error of at
most one unit in the last place, root mean square 0.58; eager, which rounds h before it squares, has 0.67 (bfloat16). At
slope 0 (ReLU²) no sign is needed and a is rounded as usual.

Shapes: x (..., D), up (F, D), down (D, F), all contiguous and of one dtype: bfloat16, float16 or float32; y like x.
Sums are float32. float64 runs on CPU only, in plain PyTorch. float16 holds no a below 6e-8: |h| < 2.4e-4 is lost; and
none above 65504. An a that overflows, in any dtype, becomes inf, or NaN where h < 0 (inf with its last bit set).
Must move: forward reads x, writes a, reads it, writes y; backward reads dy and a, writes dh, and reads x, dy, a, dh
for the gradients; each (N, F) matrix is 400 MB at N = 98,304, F = 2,048. Arithmetic outweighs it: 12 N D F operations.

fp8=True: the same on 8-bit floats (e4m3) from compute capability 8.9 on, 16-bit x, sizes that are multiples of 16.
x, dy and the weights are scaled to a root mean square of 8 and cast, also transposed, because Hopper's 8-bit products
want both operands contiguous along the summed dimension; the epilogues write h, a and dh in 8 bits, a and dh
transposed too. Scales are the tensors' own, measured in the same call: nothing to choose, nothing carried from step to
step, no synchronisation. x, dy and the weights are measured in full: a read more of each, an estimated 0.03 ms for x
and as much for dy at the record. Scales of h, a and dh follow from those of x, up, dy and down (as of independent
factors). Casts saturate: x, dy, weights, h at 56 root mean squares, a at that of |h| = 21, dh at 112. Weight gradients
sum without Hopper's fast accumulation, which costs two digits over 98,304 rows. A cast to e4m3 is off by 2.6 % (root
mean square), from which y is estimated within 6 %, the gradients within 8 % of float64, where bfloat16 has 0.5 %; what
the tests bound is 10 %, of the root mean square.

Replaces: two linear layers, leaky_relu and square; saves h, leaky(h) and their gradients, 1.2 GB written and read.
Refuses: other dtypes, anything not contiguous, fp8 where it does not run.
From: LeakyReLU(0.5)² of PR #1855 of the challenge (ReLU²: So et al. 2021); the fused epilogue of modded-nanogpt.
"""

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

NAMESPACE = "niblick"
ROUNDS_BETWEEN = True  # y and the gradients are products of a and dh, which are rounded to x's dtype
# programs: per multiprocessor, each looping over tiles; 0: one a tile. PARTS: pieces of a tile's columns stored apart.
# "forward" 0.354 ms and "backward" 0.435 ms at the record size, cuBLAS without an epilogue 0.31 each; 20 configurations
# each, NVIDIA H200, 2026-11-20. fp8: configurations measured on earlier versions of these kernels, not since;
# "pointers" (other cards, odd sizes) and "float32" are not tuned.
LAUNCH = {
    "forward": dict(BLOCK_M=128, BLOCK_F=128, BLOCK_K=64, PARTS=4, programs=3, num_warps=4, num_stages=2),
    "backward": dict(BLOCK_M=128, BLOCK_F=128, BLOCK_K=32, PARTS=2, programs=0, num_warps=4, num_stages=4),
    "forward fp8": dict(BLOCK_M=128, BLOCK_F=128, BLOCK_K=128, PARTS=2, programs=2, num_warps=4, num_stages=3),
    "backward fp8": dict(BLOCK_M=128, BLOCK_F=128, BLOCK_K=64, PARTS=2, programs=0, num_warps=4, num_stages=3),
    "pointers": dict(BLOCK_M=128, BLOCK_F=128, BLOCK_K=32, PARTS=1, programs=0, num_warps=8, num_stages=3),
    "float32": dict(BLOCK_M=64, BLOCK_F=64, BLOCK_K=16, PARTS=1, programs=0, num_warps=4, num_stages=2),
}
# 0.057 ms for x of the record; same card and day, 6 configurations.
CAST = {"BLOCK_M": 64, "BLOCK_D": 128, "num_warps": 4}
SUMS = 1024  # partial sums of squares of a tensor, at most: eight programs a multiprocessor, and one load for all


def leaky_relu_sq_mlp_ref(
    x: Tensor, up: Tensor, down: Tensor, negative_slope: float = 0.5, *, fp8: bool = False
) -> Tensor:
    """The specification, in the dtype of x; fp8 is a matter of accuracy and changes nothing here."""
    return F.linear(F.leaky_relu(F.linear(x, up), negative_slope).square(), down)


@triton.jit
def _load_tile(source, row, col, n_rows, n_cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TMA: tl.constexpr):
    """A tile of a contiguous matrix, zeros outside it."""
    if TMA:
        tile = source.load([row, col])
    else:
        rows, cols = tl.arange(0, BLOCK_R).to(tl.int64)[:, None] + row, tl.arange(0, BLOCK_C)[None, :] + col
        tile = tl.load(source + rows * n_cols + cols, mask=(rows < n_rows) & (cols < n_cols), other=0.0)
    return tile


@triton.jit
def _store_tile(target, tile, row, col, n_rows, n_cols, TMA: tl.constexpr):
    if TMA:
        target.store([row, col], tile)
    else:
        rows = tl.arange(0, tile.shape[0]).to(tl.int64)[:, None] + row
        cols = tl.arange(0, tile.shape[1])[None, :] + col
        tl.store(target + rows * n_cols + cols, tile, mask=(rows < n_rows) & (cols < n_cols))


@triton.jit
def _square(h, slope: tl.constexpr, DTYPE: tl.constexpr):
    """a = leaky(h)² in DTYPE, its last bit set where h < 0; at slope 0 plain."""
    negative = h < 0
    leaky = tl.where(negative, h * slope, h)
    a = leaky * leaky
    if slope == 0:
        a = a.to(DTYPE)
    elif DTYPE == tl.bfloat16:
        # The nearest number with that last bit, which is bit 16 here; min keeps a NaN from wrapping round to zero.
        bits = tl.minimum(a.to(tl.int32, bitcast=True), 0x7FC00000)
        bits = tl.where(negative, bits & -0x20000 | 0x10000, bits + 0x10000 & -0x20000)
        a = bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        INT: tl.constexpr = tl.int16 if DTYPE == tl.float16 else tl.int32
        bits = a.to(DTYPE).to(INT, bitcast=True)
        a = tl.where(negative, bits | 1, bits & -2).to(DTYPE, bitcast=True)
    return a


@triton.jit
def _square_pairs(h, slope: tl.constexpr):
    """`_square` in bfloat16 in 17 instructions for two elements: the tensor cores wait for them."""
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 l0, l1; .reg .pred p0, p1; .reg .b32 u0, u1, h0, h1;
        mul.f32 l0, $1, $3; mul.f32 l1, $2, $4;
        setp.lt.f32 p0, $1, 0f00000000; setp.lt.f32 p1, $2, 0f00000000;
        selp.f32 l0, l0, $1, p0; selp.f32 l1, l1, $2, p1;
        mul.f32 l0, l0, l0; mul.f32 l1, l1, l1;
        mov.b32 u0, l0; mov.b32 u1, l1;
        min.s32 u0, u0, 0x7fc00000; min.s32 u1, u1, 0x7fc00000;
        @!p0 add.s32 u0, u0, 0x10000; @!p1 add.s32 u1, u1, 0x10000;
        mov.b32 h0, $1; mov.b32 h1, $2;
        prmt.b32 u0, u0, u1, 0x7632; prmt.b32 h0, h0, h1, 0x7632;
        shr.u32 h0, h0, 15;
        and.b32 h0, h0, 0x00010001; and.b32 u0, u0, 0xfffefffe;
        or.b32 $0, u0, h0;
        }""",
        "=r,r,r,r,r",
        [h, tl.full(h.shape, slope, tl.float32)],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _times_slope(da, a, slope: tl.constexpr):
    """dh = da 2 leaky(h) leaky'(h) from what `_square` stored."""
    dh = 2.0 * da * tl.sqrt(a.to(tl.float32))
    if slope != 0:
        INT: tl.constexpr = tl.int32 if a.dtype == tl.float32 else tl.int16
        dh = tl.where((a.to(INT, bitcast=True) & 1) != 0, -slope * dh, dh)
    return dh.to(a.dtype)


@triton.jit
def _times_slope_pairs(da, a, slope: tl.constexpr):
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 r0, r1, g0, g1; .reg .b32 u0, u1; .reg .pred p0, p1;
        and.b32 u0, $1, 1; and.b32 u1, $1, 0x10000;
        setp.ne.b32 p0, u0, 0; setp.ne.b32 p1, u1, 0;
        shl.b32 u0, $1, 16; and.b32 u1, $1, 0xffff0000;
        mov.b32 r0, u0; mov.b32 r1, u1;
        sqrt.approx.ftz.f32 r0, r0; sqrt.approx.ftz.f32 r1, r1;
        add.f32 g0, $2, $2; add.f32 g1, $3, $3;
        @p0 mul.f32 g0, $2, $4; @p1 mul.f32 g1, $3, $5;
        mul.f32 g0, g0, r0; mul.f32 g1, g1, r1;
        cvt.rn.bf16x2.f32 $0, g1, g0;
        }""",
        "=r,r,r,r,r,r",
        [a, da, tl.full(da.shape, -2.0 * slope, tl.float32)],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _epilogue(
    acc, row, col, N, n_cols, seen, out, out_t, out_2, unit, s_h, s_a,
    slope: tl.constexpr, BACKWARD: tl.constexpr, FP8: tl.constexpr, PAIRS: tl.constexpr, TMA: tl.constexpr,
    DTYPE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What becomes of a tile of a product; columns by halves, so that little is held and stores overlap."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_F: tl.constexpr = acc.shape[1]
    if PARTS > 1:
        left, right = acc.reshape((BLOCK_M, 2, BLOCK_F // 2)).permute(0, 2, 1).split()
        _epilogue(
            left, row, col, N, n_cols, seen, out, out_t, out_2, unit, s_h, s_a,
            slope, BACKWARD, FP8, PAIRS, TMA, DTYPE, PARTS // 2,
        )  # fmt: skip
        _epilogue(
            right, row, col + BLOCK_F // 2, N, n_cols, seen, out, out_t, out_2, unit, s_h, s_a,
            slope, BACKWARD, FP8, PAIRS, TMA, DTYPE, PARTS // 2,
        )  # fmt: skip
    elif not FP8:
        if BACKWARD:
            a = _load_tile(seen, row, col, N, n_cols, BLOCK_M, BLOCK_F, TMA)
            if PAIRS:
                dh = _times_slope_pairs(acc, a, slope)
            else:
                dh = _times_slope(acc, a, slope)
            _store_tile(out, dh, row, col, N, n_cols, TMA)
        else:
            if PAIRS:
                a = _square_pairs(acc, slope)
            else:
                a = _square(acc, slope, DTYPE)
            _store_tile(out, a, row, col, N, n_cols, TMA)
    else:  # the casts saturate (cvt.rn.satfinite)
        if BACKWARD:
            h = _load_tile(seen, row, col, N, n_cols, BLOCK_M, BLOCK_F, TMA).to(tl.float32)
            eight = (acc * tl.where(h < 0, h * (slope * slope * unit), h * unit)).to(tl.float8e4nv)
        else:
            h = acc * unit
            leaky = tl.where(h < 0, h * slope, h)
            _store_tile(out_2, (h * s_h).to(tl.float8e4nv), row, col, N, n_cols, TMA)
            eight = (leaky * leaky * s_a).to(tl.float8e4nv)
        _store_tile(out, eight, row, col, N, n_cols, TMA)
        _store_tile(out_t, eight.T, col, row, n_cols, N, TMA)


@triton.jit
def _tile_of_product(
    tile, x, w, N, n_cols, seen, out, out_t, out_2, unit, s_h, s_a, K: tl.constexpr, OPERAND: tl.constexpr,
    ROWS_OF_W: tl.constexpr, slope: tl.constexpr, BACKWARD: tl.constexpr, FP8: tl.constexpr, PAIRS: tl.constexpr,
    TMA: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    # Columns vary fastest: the weights stay in the L2 cache, and neighbours in time share their rows of x.
    n_blocks = tl.cdiv(n_cols, BLOCK_F)
    row = tile // n_blocks * BLOCK_M
    col = tile % n_blocks * BLOCK_F
    acc = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = _load_tile(x, row, k, N, K, BLOCK_M, BLOCK_K, TMA).to(OPERAND)
        if ROWS_OF_W:  # w (n_cols, K), else (K, n_cols)
            b = _load_tile(w, col, k, n_cols, K, BLOCK_F, BLOCK_K, TMA).to(OPERAND).T
        else:
            b = _load_tile(w, k, col, K, n_cols, BLOCK_K, BLOCK_F, TMA).to(OPERAND)
        if OPERAND == tl.float32:  # in pieces: the roundings of one long chain are beyond twice a library's error
            acc += tl.dot(a, b, input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc)
    _epilogue(
        acc, row, col, N, n_cols, seen, out, out_t, out_2, unit, s_h, s_a,
        slope, BACKWARD, FP8, PAIRS, TMA, DTYPE, PARTS,
    )  # fmt: skip


@triton.jit
def _mlp_kernel(
    x,  # (N, K): x or dy; a matrix is a pointer or a TMA descriptor
    w,  # (n_cols, K) if ROWS_OF_W, else (K, n_cols)
    N,
    n_cols,
    seen,  # (N, n_cols), backward: a; with fp8 h
    out,  # (N, n_cols): a or dh
    out_t,  # (n_cols, N), fp8: out transposed
    out_2,  # (N, n_cols), fp8 forward: h
    scales,  # fp8: (2, 5, 4) float32, of x, up, down, h, a
    scales_2,  # fp8 backward: (2, 2, 4) float32, of dy, dh
    K: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS_OF_W: tl.constexpr,
    slope: tl.constexpr,
    BACKWARD: tl.constexpr,
    FP8: tl.constexpr,
    PAIRS: tl.constexpr,
    TMA: tl.constexpr,
    DTYPE: tl.constexpr,
    LOOP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    unit, s_h, s_a = 1.0, 1.0, 1.0
    if FP8:
        s_h, s_a = tl.load(scales + 12), tl.load(scales + 16)
        if BACKWARD:  # dh as it is stored, of the product of what is stored and h as it is stored
            unit = 2.0 * tl.load(scales_2 + 4) / (tl.load(scales_2) * tl.load(scales + 8) * s_h)
        else:  # h, of the product of what is stored
            unit = 1.0 / (tl.load(scales) * tl.load(scales + 4))
    if LOOP:
        # flatten: one pipelined loop over all k of all tiles, so that a tile's loads start during the last epilogue
        n_tiles = tl.cdiv(N, BLOCK_M) * tl.cdiv(n_cols, BLOCK_F)
        for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
            _tile_of_product(
                tile, x, w, N, n_cols, seen, out, out_t, out_2, unit, s_h, s_a, K, OPERAND,
                ROWS_OF_W, slope, BACKWARD, FP8, PAIRS, TMA, DTYPE, BLOCK_M, BLOCK_F, BLOCK_K, PARTS,
            )  # fmt: skip
    else:
        _tile_of_product(
            tl.program_id(0), x, w, N, n_cols, seen, out, out_t, out_2, unit, s_h, s_a, K, OPERAND,
            ROWS_OF_W, slope, BACKWARD, FP8, PAIRS, TMA, DTYPE, BLOCK_M, BLOCK_F, BLOCK_K, PARTS,
        )  # fmt: skip


@triton.jit
def _sum_squares_kernel(x_ptr, sums_ptr, n, n_blocks, BLOCK: tl.constexpr):
    """One partial sum a program over its blocks of the n elements of x."""
    squares = tl.zeros((BLOCK,), tl.float32)
    for block in tl.range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        i = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
        squares += x * x
    tl.store(sums_ptr + tl.program_id(0), tl.sum(squares))


@triton.jit
def _root_mean_square(sums_ptr, n_sums, n, BLOCK: tl.constexpr):
    """1 for a tensor of zeros, to which any scale is right; below 2e-23 squares are zero, and count as such."""
    i = tl.arange(0, BLOCK)
    mean = tl.sum(tl.load(sums_ptr + i, mask=i < n_sums, other=0.0)) / n
    return tl.where(mean == 0, 1.0, tl.sqrt(mean))


@triton.jit
def _put_scale(scales_ptr, index, n_scales: tl.constexpr, scale):
    tl.store(scales_ptr + 4 * index, scale)  # 16 bytes apart: cublasLt takes no pointer to a scale between
    tl.store(scales_ptr + 4 * (n_scales + index), 1.0 / scale)


@triton.jit
def _forward_scales_kernel(
    x_sums, up_sums, down_sums, n_x_sums, n_up_sums, n_down_sums, n_x, n_up, n_down,
    scales_ptr,  # (2, 5, 4): of x, up, down, h, a, and their inverses, each in the first of four places
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x = _root_mean_square(x_sums, n_x_sums, n_x, BLOCK)
    up = _root_mean_square(up_sums, n_up_sums, n_up, BLOCK)
    h = x * up * tl.sqrt(D + 0.0)
    _put_scale(scales_ptr, 0, 5, 8.0 / x)
    _put_scale(scales_ptr, 1, 5, 8.0 / up)
    _put_scale(scales_ptr, 2, 5, 8.0 / _root_mean_square(down_sums, n_down_sums, n_down, BLOCK))
    _put_scale(scales_ptr, 3, 5, 8.0 / h)
    _put_scale(scales_ptr, 4, 5, 1.0 / (h * h))


@triton.jit
def _backward_scales_kernel(
    dy_sums, n_dy_sums, n_dy,
    scales_ptr,  # (2, 5, 4), of the forward
    scales_2_ptr,  # (2, 2, 4): of dy, dh, and their inverses
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dy = _root_mean_square(dy_sums, n_dy_sums, n_dy, BLOCK)
    down, h = 8.0 / tl.load(scales_ptr + 8), 8.0 / tl.load(scales_ptr + 12)
    _put_scale(scales_2_ptr, 0, 2, 8.0 / dy)
    _put_scale(scales_2_ptr, 1, 2, 4.0 / (dy * down * tl.sqrt(D + 0.0) * 2.0 * h))


@triton.jit
def _cast_kernel(
    x_ptr,  # (M, D)
    out_ptr,  # (M, D) e4m3
    out_t_ptr,  # (D, M) e4m3
    scale_ptr,
    M,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < M) & (cols[None, :] < D)
    x = tl.load(x_ptr + rows[:, None] * D + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    eight = (x * tl.load(scale_ptr)).to(tl.float8e4nv)
    tl.store(out_ptr + rows[:, None] * D + cols[None, :], eight, mask=inside)
    tl.store(out_t_ptr + cols[:, None] * M + rows[None, :], eight.T, mask=inside.T)


# Under TRITON_INTERPRET=1 the decorator above gave an interpreted function, and the CPU runs the Triton code itself.
INTERPRETED = not isinstance(_mlp_kernel, triton.runtime.JITFunction)
E4M3 = torch.float8_e4m3fn
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, E4M3: tl.float8e4nv}


def _path(*matrices: Tensor) -> str:
    """ "tma" (descriptors; Hopper and data-centre Blackwell, rows that are multiples of 16 bytes) or "pointers"."""
    fits = all(t.stride(0) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0 for t in matrices)
    able = INTERPRETED or 90 <= triton.runtime.driver.active.get_current_target().arch < 120
    return "tma" if fits and able else "pointers"


def _product(
    x: Tensor,
    w: Tensor,
    rows_of_w: bool,
    slope: float,
    out: Tensor,
    seen: Tensor | None = None,
    out_t: Tensor | None = None,
    out_2: Tensor | None = None,
    scales: Tensor | None = None,
    scales_2: Tensor | None = None,
) -> None:
    """One launch of the kernel; `seen` makes it the backward one, `scales` the 8-bit one."""
    if not out.numel():
        return
    (N, K), n_cols = x.shape, out.shape[1]
    backward, fp8 = seen is not None, scales is not None
    path = _path(*(t for t in (x, w, out, seen, out_t, out_2) if t is not None))
    tuned = ("backward" if backward else "forward") + (" fp8" if fp8 else "")
    config = dict(LAUNCH["float32" if x.dtype == torch.float32 else tuned if path == "tma" else "pointers"])
    block_m, block_f, block_k = config["BLOCK_M"], config["BLOCK_F"], config["BLOCK_K"]
    programs, part = config.pop("programs"), block_f // config["PARTS"]

    def matrix(t: Tensor | None, *block: int) -> object:
        return t if t is None or path == "pointers" else TensorDescriptor.from_tensor(t, list(block))

    n_tiles = triton.cdiv(N, block_m) * triton.cdiv(n_cols, block_f)
    # No interpreter multiplies 16- or 8-bit floats rightly in tl.dot, so there the operands are float32.
    operand = tl.float32 if INTERPRETED else _TYPES[x.dtype]
    pairs = out.dtype == torch.bfloat16 and slope != 0 and not INTERPRETED
    _mlp_kernel[(min(n_tiles, programs * _processors(x.device)) if programs else n_tiles,)](
        matrix(x, block_m, block_k),
        matrix(w, block_f, block_k) if rows_of_w else matrix(w, block_k, block_f),
        N,
        n_cols,
        matrix(seen, block_m, part),
        matrix(out, block_m, part),
        matrix(out_t, part, block_m),
        matrix(out_2, block_m, part),
        scales,
        scales_2,
        K,
        operand,
        rows_of_w,
        abs(slope),  # leaky is squared, or multiplied by its own derivative
        backward,
        fp8,
        pairs,
        path == "tma",
        _TYPES[out.dtype],
        programs > 0,
        **config,
    )


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _as_given(launcher: Callable) -> Callable:
    """On the device of the arguments, where Triton takes the current one, and in their dtypes, autocast or not."""

    @wraps(launcher)
    def run(*args, **kwargs):
        flat = (t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else (arg,)))
        tensor = next(t for t in flat if isinstance(t, Tensor))
        with torch.cuda.device_of(tensor), torch.autocast(tensor.device.type, enabled=False):
            return launcher(*args, **kwargs)

    return run


@_as_given
def _forward(x: Tensor, up: Tensor, down: Tensor, negative_slope: float) -> tuple[Tensor, Tensor]:
    """y, and a with the signs of h for the backward."""
    a = x.new_empty((len(x), len(up)))
    _product(x, up, True, negative_slope, a)
    return a @ down.t(), a


@_as_given
def _backward(
    dy: Tensor, x: Tensor, up: Tensor, down: Tensor, a: Tensor, negative_slope: float,
    with_dx: bool, with_dup: bool, with_ddown: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, up and down; without elements where none is wanted."""
    dh, none = torch.empty_like(a), a.new_empty
    if with_dx or with_dup:
        _product(dy, down, False, negative_slope, dh, seen=a)
    return dh @ up if with_dx else none(0), dh.t() @ x if with_dup else none(0), dy.t() @ a if with_ddown else none(0)


@_as_given
def _forward_eager(x: Tensor, up: Tensor, down: Tensor, negative_slope: float) -> tuple[Tensor, Tensor]:
    """y, and h for the backward: there is no a with signs here."""
    h = x @ up.t()
    return F.leaky_relu(h, negative_slope).square() @ down.t(), h


@_as_given
def _backward_eager(
    dy: Tensor, x: Tensor, up: Tensor, down: Tensor, h: Tensor, negative_slope: float,
    with_dx: bool, with_dup: bool, with_ddown: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    leaky, dh = F.leaky_relu(h, negative_slope), None
    if with_dx or with_dup:
        dh = (dy @ down) * 2 * torch.where(h < 0, negative_slope * leaky, leaky)
    dx = dh @ up if with_dx else h.new_empty(0)
    dup = dh.t() @ x if with_dup else h.new_empty(0)
    return dx, dup, dy.t() @ leaky.square() if with_ddown else h.new_empty(0)


def _sums(x: Tensor) -> tuple[Tensor, int]:
    """Partial sums of squares of all elements, and their number."""
    n, n_blocks = x.numel(), triton.cdiv(x.numel(), 8192)
    sums = torch.empty(min(n_blocks, SUMS), dtype=torch.float32, device=x.device)
    _sum_squares_kernel[sums.shape](x, sums, n, n_blocks, 8192, num_warps=8)
    return sums, n


def _cast(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x in 8 bits, and transposed."""
    M, D = x.shape
    eight, eight_t = (torch.empty(shape, dtype=E4M3, device=x.device) for shape in ((M, D), (D, M)))
    grid = (triton.cdiv(M, CAST["BLOCK_M"]), triton.cdiv(D, CAST["BLOCK_D"]))
    _cast_kernel[grid](x, eight, eight_t, scale, M, D, **CAST)
    return eight, eight_t


def _multiply(a: Tensor, b_t: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a b, with b given as its transpose."""
    return torch._scaled_mm(a, b_t.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)


@_as_given
def _forward_fp8(
    x: Tensor, up: Tensor, down: Tensor, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, and for the backward x', h, a', up', down' in 8 bits (' is transposed) and the scales."""
    (N, D), n_cols = x.shape, len(up)
    (x_sums, n_x), (up_sums, n_up), (down_sums, n_down) = (_sums(t) for t in (x, up, down))
    scales = torch.empty((2, 5, 4), dtype=torch.float32, device=x.device)
    n_sums = len(x_sums), len(up_sums), len(down_sums)
    _forward_scales_kernel[(1,)](
        x_sums, up_sums, down_sums, *n_sums, n_x, n_up, n_down, scales, D, triton.next_power_of_2(max(n_sums))
    )
    (x8, x8_t), (up8, up8_t), (down8, down8_t) = (_cast(t, scales[0, i, 0]) for i, t in enumerate((x, up, down)))
    a, h = (torch.empty((N, n_cols), dtype=E4M3, device=x.device) for _ in range(2))
    a_t = torch.empty((n_cols, N), dtype=E4M3, device=x.device)
    _product(x8, up8, True, negative_slope, a, out_t=a_t, out_2=h, scales=scales)
    y = _multiply(a, down8, scales[1, 4, 0], scales[1, 2, 0], x.dtype, fast=True)
    return y, x8_t, h, a_t, up8_t, down8_t, scales


@_as_given
def _backward_fp8(
    dy: Tensor, x_t: Tensor, h: Tensor, a_t: Tensor, up_t: Tensor, down_t: Tensor, scales: Tensor,
    negative_slope: float, with_dx: bool, with_dup: bool, with_ddown: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sums, n = _sums(dy)
    scales_2 = torch.empty((2, 2, 4), dtype=torch.float32, device=dy.device)
    _backward_scales_kernel[(1,)](sums, len(sums), n, scales, scales_2, dy.shape[1], triton.next_power_of_2(len(sums)))
    dy8, dy8_t = _cast(dy, scales_2[0, 0, 0])
    dx, dup, ddown = (dy.new_empty(0) for _ in range(3))
    if with_dx or with_dup:
        dh, dh_t = torch.empty_like(h), torch.empty_like(a_t)
        _product(dy8, down_t, True, negative_slope, dh, seen=h, out_t=dh_t, scales=scales, scales_2=scales_2)
    if with_dx:
        dx = _multiply(dh, up_t, scales_2[1, 1, 0], scales[1, 1, 0], dy.dtype, fast=True)
    if with_dup:
        dup = _multiply(dh_t, x_t, scales_2[1, 1, 0], scales[1, 0, 0], dy.dtype, fast=False)
    if with_ddown:
        ddown = _multiply(dy8_t, a_t, scales_2[1, 0, 0], scales[1, 4, 0], dy.dtype, fast=False)
    return dx, dup, ddown


_op = torch.library.custom_op(f"{NAMESPACE}::leaky_relu_sq_mlp", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    f"{NAMESPACE}::leaky_relu_sq_mlp_backward", _backward, mutates_args=(), device_types="cuda"
)
_op_fp8 = torch.library.custom_op(
    f"{NAMESPACE}::leaky_relu_sq_mlp_fp8", _forward_fp8, mutates_args=(), device_types=("cuda", "cpu")
)
_op_fp8_backward = torch.library.custom_op(
    f"{NAMESPACE}::leaky_relu_sq_mlp_fp8_backward", _backward_fp8, mutates_args=(), device_types=("cuda", "cpu")
)


@_op.register_kernel("cpu")
def _forward_cpu(x, *args):
    return (_forward if INTERPRETED and x.dtype != torch.float64 else _forward_eager)(x, *args)


@_op_backward.register_kernel("cpu")
def _backward_cpu(dy, *args):
    return (_backward if INTERPRETED and dy.dtype != torch.float64 else _backward_eager)(dy, *args)


@_op.register_fake
def _forward_fake(x, up, down, negative_slope):
    return x.new_empty(x.shape), x.new_empty((x.shape[0], up.shape[0]))


@_op_backward.register_fake
def _backward_fake(dy, x, up, down, a, negative_slope, *wanted):
    shapes = (t.shape if w else (0,) for t, w in zip((x, up, down), wanted, strict=True))
    return tuple(x.new_empty(shape) for shape in shapes)


@_op_fp8.register_fake
def _forward_fp8_fake(x, up, down, negative_slope):
    (N, D), n_cols = x.shape, up.shape[0]
    shapes = ((D, N), (N, n_cols), (n_cols, N), (D, n_cols), (n_cols, D))
    eights = (x.new_empty(shape, dtype=E4M3) for shape in shapes)
    return x.new_empty(x.shape), *eights, x.new_empty((2, 5, 4), dtype=torch.float32)


@_op_fp8_backward.register_fake
def _backward_fp8_fake(dy, x_t, h, a_t, up_t, down_t, scales, negative_slope, *wanted):
    D, n_cols = up_t.shape
    shapes = zip((dy.shape, (n_cols, D), (D, n_cols)), wanted, strict=True)
    return tuple(dy.new_empty(shape if w else 0) for shape, w in shapes)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.slope = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _autograd(ctx, dy, _da):
    # contiguous(): the same bits whatever the layout of dy, and rows that descriptors can take
    return _wanted(ctx, _op_backward(dy.contiguous(), *ctx.saved_tensors, ctx.slope, *ctx.needs_input_grad[:3]))


def _wanted(ctx, gradients):
    """None for inputs that are frozen, whose products were left out, and for negative_slope."""
    return *(g if w else None for g, w in zip(gradients, ctx.needs_input_grad[:3], strict=True)), None


def _setup_context_fp8(ctx, inputs, output):
    ctx.slope = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _autograd_fp8(ctx, dy, *_):
    return _wanted(ctx, _op_fp8_backward(dy.contiguous(), *ctx.saved_tensors, ctx.slope, *ctx.needs_input_grad[:3]))


_op.register_autograd(_autograd, setup_context=_setup_context)
_op_fp8.register_autograd(_autograd_fp8, setup_context=_setup_context_fp8)


def leaky_relu_sq_mlp(x: Tensor, up: Tensor, down: Tensor, negative_slope: float = 0.5, *, fp8: bool = False) -> Tensor:
    """leaky_relu(x up^T, negative_slope)² down^T.

    x: (..., D), contiguous, bfloat16, float16 or float32; float64 on CPU only.
    up: (F, D), down: (D, F), contiguous, in x's dtype: the casts of float32 masters are the caller's.
    negative_slope: any finite int or float; 0 is ReLU². It gets no gradient.
    fp8: all six products on 8-bit floats, for 16-bit x on a card of compute capability 8.9 or later; sizes
    that are multiples of 16. Faster and coarser, as the head of this file says.
    Returns (..., D) in x's dtype. Differentiable once, in x, up and down; products for frozen ones are left out. A
    gradient with other strides (of stride 0, transposed) is copied.
    Raises ValueError for a shape, layout, device, card or slope, TypeError for a dtype or an argument of another type.
    """
    name = "leaky_relu_sq_mlp"
    if type(fp8) is not bool:
        raise TypeError(f"{name}: expected fp8 to be a bool, got {fp8!r}")
    for key, tensor in (("x", x), ("up", up), ("down", down)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected {key} to be a tensor, got {tensor!r}")
    if up.ndim != 2 or 0 in up.shape:
        raise ValueError(f"{name}: expected up of shape (F, D), got {tuple(up.shape)}")
    n_cols, D = up.shape
    if down.shape != (D, n_cols):
        raise ValueError(f"{name}: expected down of shape ({D}, {n_cols}), got {tuple(down.shape)}")
    if x.ndim == 0 or x.shape[-1] != D:
        raise ValueError(f"{name}: expected x of shape (..., {D}), got {tuple(x.shape)}")
    dtypes = (torch.bfloat16, torch.float16) + (() if fp8 else (torch.float32,))
    if x.device.type == "cpu" and not fp8:
        dtypes += (torch.float64,)
    if x.dtype not in dtypes:
        expected = " or ".join(str(dtype)[6:] for dtype in dtypes)
        raise TypeError(f"{name}: expected x in {expected}{' for fp8' * fp8}, got {x.dtype} on {x.device}")
    for key, tensor in (("x", x), ("up", up), ("down", down)):
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected {key} in {x.dtype} as x, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected {key} on {x.device} as x, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous {key}, got strides {tensor.stride()}")
    if not isinstance(negative_slope, (int, float)) or isinstance(negative_slope, bool):
        raise TypeError(f"{name}: expected negative_slope to be a number, got {negative_slope!r}")
    if not abs(negative_slope) < float("inf"):
        raise ValueError(f"{name}: expected a finite negative_slope, got {negative_slope}")
    rows = x.view(x.shape[:-1].numel(), D)
    if fp8 and len(rows):
        _check_fp8(rows, n_cols)
        return _op_fp8(rows, up, down, float(negative_slope))[0].view(x.shape)
    return _op(rows, up, down, float(negative_slope))[0].view(x.shape)


def _check_fp8(x: Tensor, n_cols: int) -> None:
    if not INTERPRETED:
        got = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
        if got is None or got < (8, 9):
            where = f"{x.device}" if got is None else "{}.{}".format(*got)
            raise ValueError(f"leaky_relu_sq_mlp: expected compute capability 8.9 or later for fp8, got {where}")
    if any(size % 16 for size in (*x.shape, n_cols)):
        got = f"{len(x)} rows, D = {x.shape[1]}, F = {n_cols}"
        raise ValueError(f"leaky_relu_sq_mlp: expected multiples of 16 for fp8, got {got}")


# --- not needed when lifted ---

# (N, D, F); rows of "odd" and "one" are no multiples of 16 bytes, which descriptors need
SIZES = {
    "tile": (144, 64, 176),
    "odd": (37, 83, 70),
    "one": (1, 5, 3),
    "wide": (3056, 512, 2048),
    "record": (98304, 512, 2048),
}


def leaky_relu_sq_mlp_inputs(
    size: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0
) -> dict[str, object]:
    """x and h of size one, both signs."""
    N, D, n_cols = size
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * (1 if shape[0] == N else shape[1] ** -0.5)
        return values.to(dtype).requires_grad_()

    return {"x": normal(N, D), "up": normal(n_cols, D), "down": normal(D, n_cols), "negative_slope": 0.5}


def leaky_relu_sq_mlp_cost(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    N, D, n_cols = size
    rows, hidden, weight = (dtype.itemsize * n for n in (N * D, N * n_cols, D * n_cols))
    return {
        "bytes_forward": 2 * rows + 2 * hidden + 2 * weight,
        "bytes_backward": 4 * rows + 5 * hidden + 4 * weight,
        "flops_forward": 4 * N * D * n_cols,
        "flops_backward": 8 * N * D * n_cols,
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
    _prove(leaky_relu_sq_mlp, leaky_relu_sq_mlp_ref, leaky_relu_sq_mlp_inputs, leaky_relu_sq_mlp_cost, SIZES)
