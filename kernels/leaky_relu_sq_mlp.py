"""MLP block with a squared leaky ReLU, forward and backward: the elementwise work lives in two of its six GEMMs.

    h = x up^T        a = leaky(h)²        y = a down^T             leaky(h) = h or, where h < 0, negative_slope h
    dh = (dy down) 2 leaky(h) leaky'(h)    dx = dh up    dup = dh^T x    ddown = dy^T a

Two kernels: x up^T, whose epilogue writes a and nothing else, and dy down, whose epilogue reads a and writes dh. The
others are torch's own (fp8: a third kernel takes both weight gradients where its tiles fill the card). h is never
stored: |leaky(h)| is the root of a, and the sign of h is the last bit of a's mantissa. a is therefore rounded, once,
from the float32 sum to every second number of its dtype: an error of at most one unit in the last place, root mean
square 0.58; eager, which rounds h before it squares, has 0.67 (bfloat16). At slope 0 (ReLU²) no sign is needed and a is
rounded as usual.

Shapes: x (..., D), up (F, D), down (D, F), all contiguous and of one dtype: bfloat16, float16 or float32; y like x.
Sums are float32, of float32 inputs float64. float64 inputs: CPU only, in plain PyTorch. float16 holds no a below 6e-8:
|h| < 2.4e-4 is lost; and none above 65504. An a that overflows, in any dtype, becomes inf, or NaN where h < 0 (inf
with its last bit set).
Must move: forward reads x, writes a, reads it, writes y; backward reads dy and a, writes dh, and reads x, dy, a, dh
for the gradients; each (N, F) matrix is 400 MB at N = 98,304, F = 2,048. Arithmetic outweighs it: 12 N D F operations.

fp8=True: the same on 8-bit floats (e4m3) from compute capability 8.9 on, 16-bit x, sizes that are multiples of 16.
x, dy and the weights are scaled to a root mean square of 8 and cast, also transposed, because Hopper's 8-bit products
want both operands contiguous along the summed dimension; the epilogues write a and dh in 8 bits, transposed too, and
the signs of h, a bit each. So that this costs little, rows of x, dy, up and down^T are cast into an order in which a
thread of the tensor cores then holds neighbours of the product, blocks of 4 x 4, and stores words instead of bytes.
Scales are the tensors' own, measured in the same call: nothing to choose, nothing carried from step to step, no
synchronisation. x, dy and the weights are measured in full: a read more of each, 0.03 ms for x and as much for dy at
the record. Scales of a and dh follow from those of x, up, dy and down (as of independent factors). Casts saturate: x,
dy and weights at 56 root mean squares, a at that of |h| = 21, dh at 112. Tensor cores add 8-bit products with 14 bits,
which costs two digits over 98,304 rows: the weight gradients are therefore taken out of them after CHAIN rows. A cast
to e4m3 is off by 2.6 % (root mean square); y is within 6 %, the gradients within 7 % of float64 (normal inputs, NVIDIA
H200), where bfloat16 has 0.5 %; the tests bound them at 10 %, of the root mean square.

Replaces: two linear layers, leaky_relu and square; saves h, leaky(h) and their gradients, 1.2 GB written and read.
Refuses: other dtypes, anything not contiguous, fp8 where it does not run.
From: LeakyReLU(0.5)² of PR #1855 of the challenge (ReLU²: So et al. 2021); the fused epilogue of modded-nanogpt.
"""

import math
import re
from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from triton.tools.tensor_descriptor import TensorDescriptor

# A lifted copy has ops of its own, so that it may stand beside the package.
NAMESPACE = "niblick" if __name__.startswith("niblick.") else "niblick_" + re.sub(r"\W", "_", __name__, flags=re.A)
ROUNDS_BETWEEN = True  # y and the gradients are products of a and dh, which are rounded to x's dtype
# programs: per multiprocessor, each looping over tiles; 0: one a tile. PARTS: pieces of a tile's columns stored apart.
# At the record size, NVIDIA H200, 2026-11-20: "forward" 0.354 ms and "backward" 0.435 ms, cuBLAS without an epilogue
# 0.31 each; "forward fp8" 0.250, "backward fp8" 0.323, cuBLAS 0.15 each; "weights fp8" 0.289 for both, cuBLAS 0.349.
# Three programs a multiprocessor hide the 8-bit epilogues best, and have 168 registers. 15 to 20 configurations each;
# "pointers" (other cards, odd sizes) and "float32" are not tuned.
LAUNCH = {
    "forward": dict(BLOCK_M=128, BLOCK_F=128, BLOCK_K=64, PARTS=4, programs=3, num_warps=4, num_stages=2),
    "backward": dict(BLOCK_M=128, BLOCK_F=128, BLOCK_K=32, PARTS=2, programs=0, num_warps=4, num_stages=4),
    "forward fp8": dict(
        BLOCK_M=128, BLOCK_F=128, BLOCK_K=64, PARTS=2, programs=3, num_warps=4, num_stages=3, maxnreg=168
    ),
    "backward fp8": dict(
        BLOCK_M=128, BLOCK_F=128, BLOCK_K=64, PARTS=2, programs=3, num_warps=4, num_stages=3, maxnreg=168
    ),
    "weights fp8": dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, num_warps=8, num_stages=5),
    "pointers": dict(BLOCK_M=128, BLOCK_F=128, BLOCK_K=32, PARTS=1, programs=0, num_warps=8, num_stages=3),
    "float32": dict(BLOCK_M=32, BLOCK_F=64, BLOCK_K=8, PARTS=1, programs=0, num_warps=8, num_stages=2),
}
# 0.050 ms for x of the record; same card and day, 8 configurations.
CAST = {"BLOCK_M": 64, "BLOCK_D": 128, "num_warps": 4}
# Rows in one 8-bit sum of a weight gradient: 0.3 % off; in all of them at once 0.9 %, torch's slow accumulation 0.17 %.
CHAIN = 12288
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
def _in_order(tile):
    """A tile of a product of which `_place` ordered the rows and columns, in the order of the tensors.

    Only names change: a thread holds four neighbours in both directions, which it stores together.
    """
    BLOCK_M: tl.constexpr = tile.shape[0]
    BLOCK_F: tl.constexpr = tile.shape[1]
    parts = tile.reshape((BLOCK_M // 128, 2, 4, 2, 8, BLOCK_F // 16, 2, 4, 2))
    return parts.permute(0, 2, 4, 1, 3, 5, 7, 6, 8).reshape((BLOCK_M, BLOCK_F))


@triton.jit
def _quarter(t):
    """The four slices of the last two dimensions, each of two."""
    even, odd = t.split()
    t0, t2 = even.split()
    t1, t3 = odd.split()
    return t0, t1, t2, t3


@triton.jit
def _four_by_four(tile):
    """A tile (M, C) as columns of 4 x 4 blocks: (M / 4, C / 4, 2, 2), four of them."""
    M: tl.constexpr = tile.shape[0]
    C: tl.constexpr = tile.shape[1]
    return _quarter(tile.reshape((M // 4, 4, C // 4, 4)).permute(0, 2, 1, 3).reshape((M // 4, C // 4, 2, 2, 2, 2)))


@triton.jit
def _join_rows(w0, w1, w2, w3):
    """(M, C) four times to (4 M, C), rows in turn."""
    M: tl.constexpr = w0.shape[0]
    C: tl.constexpr = w0.shape[1]
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape((M, C, 4)).permute(0, 2, 1).reshape((4 * M, C))


@triton.jit
def _words(eight):
    """Bytes (M, C), four neighbours in a word: (M, C / 4)."""
    bytes = eight.to(tl.uint8, bitcast=True).to(tl.int32).reshape((eight.shape[0], eight.shape[1] // 4, 4))
    return tl.sum(bytes << (8 * tl.arange(0, 4))[None, None, :], axis=2)


@triton.jit
def _epilogue_8_bits(
    acc, row, col, N, n_cols, seen, out, out_t, signs, positive, negative, ASM: tl.constexpr, BACKWARD: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """x² times `positive` or, where x < 0, `negative`, and signs of x; backward x sqrt(a) times the same, by sign.

    A thread has blocks of 4 x 4 elements. It stores their rows and their columns as words, and their signs as one.
    """
    ROWS: tl.constexpr = acc.shape[0] // 4
    COLS: tl.constexpr = acc.shape[1] // 4
    if BACKWARD:
        acc *= tl.sqrt(_load_tile(seen, row, col, N, n_cols, 4 * ROWS, 4 * COLS, TMA).to(tl.float32))
        # a tile, and not tl.load, whose layout all operands of the assembly would follow
        bits = _load_tile(signs, row // 4, col // 4, N // 4, n_cols // 4, ROWS, COLS, TMA).to(tl.int32)
    if ASM is None:
        place = tl.arange(0, 16)[None, None, :]
        if BACKWARD:
            below = ((bits[:, :, None] >> place) & 1).reshape((ROWS, COLS, 4, 4)).permute(0, 2, 1, 3)
            below = below.reshape((4 * ROWS, 4 * COLS)) != 0
        else:
            below = acc < 0
            blocks = below.to(tl.int32).reshape((ROWS, 4, COLS, 4)).permute(0, 2, 1, 3).reshape((ROWS, COLS, 16))
            bits = tl.sum(blocks << place, axis=2)
            acc *= acc
        eight = (acc * tl.where(below, negative, positive)).to(tl.float8e4nv)  # saturates
        words, words_t = _words(eight), _words(eight.T)
    else:  # half of the instructions, for which the tensor cores wait
        c0, c1, c2, c3 = _four_by_four(acc)
        x00, x10, x20, x30 = _quarter(c0)
        x01, x11, x21, x31 = _quarter(c1)
        x02, x12, x22, x32 = _quarter(c2)
        x03, x13, x23, x33 = _quarter(c3)
        if not BACKWARD:
            bits = tl.zeros((ROWS, COLS), tl.int32)
        w0, w1, w2, w3, t0, t1, t2, t3, bits = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [x00, x01, x02, x03, x10, x11, x12, x13, x20, x21, x22, x23, x30, x31, x32, x33, positive, negative, bits],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
        words, words_t = _join_rows(w0, w1, w2, w3), _join_rows(t0.T, t1.T, t2.T, t3.T)
    if not BACKWARD:
        _store_tile(signs, bits.to(tl.int16), row // 4, col // 4, N // 4, n_cols // 4, TMA)
    _store_tile(out, words, row, col // 4, N, n_cols // 4, TMA)
    _store_tile(out_t, words_t, col, row // 4, n_cols, N // 4, TMA)


@triton.jit
def _epilogue(
    acc, row, col, N, n_cols, seen, out, out_t, signs, unit, s_a,
    slope: tl.constexpr, BACKWARD: tl.constexpr, FP8: tl.constexpr, FAST: tl.constexpr, TMA: tl.constexpr,
    DTYPE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What becomes of a tile of a product; columns by halves, so that little is held and stores overlap."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_F: tl.constexpr = acc.shape[1]
    if PARTS > 1:
        left, right = acc.reshape((BLOCK_M, 2, BLOCK_F // 2)).permute(0, 2, 1).split()
        _epilogue(
            left, row, col, N, n_cols, seen, out, out_t, signs, unit, s_a,
            slope, BACKWARD, FP8, FAST, TMA, DTYPE, PARTS // 2,
        )  # fmt: skip
        _epilogue(
            right, row, col + BLOCK_F // 2, N, n_cols, seen, out, out_t, signs, unit, s_a,
            slope, BACKWARD, FP8, FAST, TMA, DTYPE, PARTS // 2,
        )  # fmt: skip
    elif not FP8:
        if BACKWARD:
            a = _load_tile(seen, row, col, N, n_cols, BLOCK_M, BLOCK_F, TMA)
            if FAST:
                dh = _times_slope_pairs(acc, a, slope)
            else:
                dh = _times_slope(acc, a, slope)
            _store_tile(out, dh, row, col, N, n_cols, TMA)
        else:
            if FAST:
                a = _square_pairs(acc, slope)
            else:
                a = _square(acc, slope, DTYPE)
            _store_tile(out, a, row, col, N, n_cols, TMA)
    else:
        if BACKWARD:
            positive, negative = unit, -slope * unit
        else:
            root = unit * tl.sqrt(s_a)  # the square of unit alone may leave float32
            positive, negative = root * root, slope * slope * (root * root)
        _epilogue_8_bits(
            _in_order(acc), row, col, N, n_cols, seen, out, out_t, signs, positive, negative, FAST, BACKWARD, TMA
        )


@triton.jit
def _tile_of_product(
    tile, x, w, N, n_cols, seen, out, out_t, signs, unit, s_a, K: tl.constexpr, OPERAND: tl.constexpr,
    ROWS_OF_W: tl.constexpr, slope: tl.constexpr, BACKWARD: tl.constexpr, FP8: tl.constexpr, FAST: tl.constexpr,
    TMA: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    # Columns vary fastest: the weights stay in the L2 cache, and neighbours in time share their rows of x.
    n_blocks = tl.cdiv(n_cols, BLOCK_F)
    row = tile // n_blocks * BLOCK_M
    col = tile % n_blocks * BLOCK_F
    n_rows = tl.cdiv(N, BLOCK_M) * BLOCK_M if FP8 else N
    # float32 is multiplied and added up in float64: where the terms of a column of gradients nearly cancel, what is
    # left is of the size of the roundings, and those of float32 chains of only 16 were thrice a library's. Without
    # tl.dot, of which Triton 3.7 has none in float64 for Blackwell.
    acc = tl.zeros((BLOCK_M, BLOCK_F), tl.float64 if DTYPE == tl.float32 else tl.float32)
    for k in range(0, K, BLOCK_K):
        a = _load_tile(x, row, k, n_rows, K, BLOCK_M, BLOCK_K, TMA).to(OPERAND)
        if ROWS_OF_W:  # w (n_cols, K), else (K, n_cols)
            b = _load_tile(w, col, k, n_cols, K, BLOCK_F, BLOCK_K, TMA).to(OPERAND).T
        else:
            b = _load_tile(w, k, col, K, n_cols, BLOCK_K, BLOCK_F, TMA).to(OPERAND)
        if DTYPE == tl.float32:
            acc += tl.sum(a.to(tl.float64)[:, :, None] * b.to(tl.float64)[None, :, :], 1)
        else:
            acc = tl.dot(a, b, acc)
    _epilogue(
        acc.to(tl.float32), row, col, N, n_cols, seen, out, out_t, signs, unit, s_a,
        slope, BACKWARD, FP8, FAST, TMA, DTYPE, PARTS,
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
    signs,  # (N/4, n_cols/4) int16, fp8: a bit for each element of a block of 4 x 4
    scales,  # fp8: (2, 4, 4) float32, of x, up, down, a
    scales_2,  # fp8 backward: (2, 2, 4) float32, of dy, dh
    K: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS_OF_W: tl.constexpr,
    slope: tl.constexpr,
    BACKWARD: tl.constexpr,
    FP8: tl.constexpr,
    FAST: tl.constexpr,  # the epilogue's assembly: 16-bit: whether any; 8-bit: it, or None
    TMA: tl.constexpr,
    DTYPE: tl.constexpr,
    LOOP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    unit, s_a = 1.0, 1.0
    if FP8:
        s_a = tl.load(scales + 12)
        if BACKWARD:  # dh as it is stored, of the product of what is stored and the root of a as it is stored
            unit = 2.0 * tl.load(scales_2 + 4) / (tl.load(scales_2) * tl.load(scales + 8) * tl.sqrt(s_a))
        else:  # h, of the product of what is stored
            unit = 1.0 / (tl.load(scales) * tl.load(scales + 4))
    if LOOP:
        # flatten: one pipelined loop over all k of all tiles, so that a tile's loads start during the last epilogue
        n_tiles = tl.cdiv(N, BLOCK_M) * tl.cdiv(n_cols, BLOCK_F)
        for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
            _tile_of_product(
                tile, x, w, N, n_cols, seen, out, out_t, signs, unit, s_a, K, OPERAND,
                ROWS_OF_W, slope, BACKWARD, FP8, FAST, TMA, DTYPE, BLOCK_M, BLOCK_F, BLOCK_K, PARTS,
            )  # fmt: skip
    else:
        _tile_of_product(
            tl.program_id(0), x, w, N, n_cols, seen, out, out_t, signs, unit, s_a, K, OPERAND,
            ROWS_OF_W, slope, BACKWARD, FP8, FAST, TMA, DTYPE, BLOCK_M, BLOCK_F, BLOCK_K, PARTS,
        )  # fmt: skip


@triton.jit
def _sum_squares(x_ptr, n, first, step, BLOCK: tl.constexpr):
    squares = tl.zeros((BLOCK,), tl.float32)
    for block in tl.range(first, tl.cdiv(n, BLOCK), step):
        i = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
        squares += x * x
    return tl.sum(squares)


@triton.jit
def _sum_squares_kernel(
    x_ptr, up_ptr, down_ptr, sums_ptr, n_x, n_weights, N_X, N_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Partial sums of squares: N_X of x, and, each, N_WEIGHTS of up and down."""
    program = tl.program_id(0)
    if N_WEIGHTS == 0:
        total = _sum_squares(x_ptr, n_x, program, N_X, BLOCK)
    elif program < N_X:
        total = _sum_squares(x_ptr, n_x, program, N_X, BLOCK)
    elif program < N_X + N_WEIGHTS:
        total = _sum_squares(up_ptr, n_weights, program - N_X, N_WEIGHTS, BLOCK)
    else:
        total = _sum_squares(down_ptr, n_weights, program - N_X - N_WEIGHTS, N_WEIGHTS, BLOCK)
    tl.store(sums_ptr + program, total)


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
def _place(i, ORDER: tl.constexpr):
    """Where row i goes, that a thread of the tensor cores finds neighbours in what it holds of the product.

    ORDER 128: of the left operand; a thread of four warps has rows l, l + 8, l + 64 and l + 72 of 16 warp. 16: of the
    right one; it has columns 2 q, 2 q + 1, 2 q + 8 and 2 q + 9.
    """
    if ORDER == 128:
        i = (i & -128) | (i >> 2 & 7) | (i & 1) << 3 | (i >> 5 & 3) << 4 | (i >> 1 & 1) << 6
    elif ORDER == 16:
        i = (i & -16) | (i & 1) | (i >> 2 & 3) << 1 | (i >> 1 & 1) << 3
    return i


@triton.jit
def _forward_scales_kernel(
    sums_ptr, n_x, n_weights, N_X, N_WEIGHTS,
    scales_ptr,  # (2, 4, 4): of x, up, down, a, and their inverses, each in the first of four places
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x = _root_mean_square(sums_ptr, N_X, n_x, BLOCK)
    up = _root_mean_square(sums_ptr + N_X, N_WEIGHTS, n_weights, BLOCK)
    h = x * up * tl.sqrt(D + 0.0)
    _put_scale(scales_ptr, 0, 4, 8.0 / x)
    _put_scale(scales_ptr, 1, 4, 8.0 / up)
    _put_scale(scales_ptr, 2, 4, 8.0 / _root_mean_square(sums_ptr + N_X + N_WEIGHTS, N_WEIGHTS, n_weights, BLOCK))
    _put_scale(scales_ptr, 3, 4, 1.0 / (h * h))


@triton.jit
def _backward_scales_kernel(
    sums_ptr, n_dy, N_DY,
    scales_ptr,  # (2, 4, 4), of the forward
    scales_2_ptr,  # (2, 2, 4): of dy, dh, and their inverses
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dy = _root_mean_square(sums_ptr, N_DY, n_dy, BLOCK)
    down, h = 8.0 / tl.load(scales_ptr + 8), 1.0 / tl.sqrt(tl.load(scales_ptr + 12))
    _put_scale(scales_2_ptr, 0, 2, 8.0 / dy)
    _put_scale(scales_2_ptr, 1, 2, 4.0 / (dy * down * tl.sqrt(D + 0.0) * 2.0 * h))


@triton.jit
def _cast_tile(
    x_ptr, out_ptr, out_t_ptr, scale_ptr, tile, M, D, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of x (M, D) in 8 bits, its rows in the order ROWS; and transposed, in the order COLS."""
    n_blocks = tl.cdiv(D, BLOCK_D)
    rows = (tile // n_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tile % n_blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < M) & (cols[None, :] < D)
    x = tl.load(x_ptr + rows[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    eight = (x * tl.load(scale_ptr)).to(tl.float8e4nv)
    tl.store(out_t_ptr + _place(cols, COLS)[:, None] * M + rows[None, :], eight.T, mask=mask.T)
    if ROWS == 128:  # whole tiles of 128 rows, zeros beyond M
        mask = (rows[:, None] < tl.cdiv(M, 128) * 128) & (cols[None, :] < D)
    tl.store(out_ptr + _place(rows, ROWS)[:, None] * D + cols[None, :], eight, mask=mask)


@triton.jit
def _cast_kernel(
    x_ptr, x8_ptr, x8_t_ptr,  # (N, D): of the forward or dy
    up_ptr, up8_ptr, up8_t_ptr,  # (n_cols, D)
    down_ptr, down8_ptr, down8_t_ptr,  # (D, n_cols)
    scales_ptr, N, D, n_cols, WEIGHTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if WEIGHTS:
        of_up = tl.cdiv(n_cols, BLOCK_M) * tl.cdiv(D, BLOCK_D)
        of_both = of_up + tl.cdiv(D, BLOCK_M) * tl.cdiv(n_cols, BLOCK_D)
        if program < of_up:
            _cast_tile(up_ptr, up8_ptr, up8_t_ptr, scales_ptr + 4, program, n_cols, D, 16, 1, BLOCK_M, BLOCK_D)
        elif program < of_both:
            tile = program - of_up
            _cast_tile(down_ptr, down8_ptr, down8_t_ptr, scales_ptr + 8, tile, D, n_cols, 1, 16, BLOCK_M, BLOCK_D)
        program -= of_both
    if program >= 0:
        # the last rows first: the L2 cache still has some of them from the sum
        tile = tl.cdiv(N, 128) * (128 // BLOCK_M) * tl.cdiv(D, BLOCK_D) - 1 - program
        _cast_tile(x_ptr, x8_ptr, x8_t_ptr, scales_ptr, tile, N, D, 128, 1, BLOCK_M, BLOCK_D)


@triton.jit
def _long_product(
    left, right, out_ptr, scale, row, col, N, n_left, n_right, turns, CHUNK, OPERAND: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # The tensor cores add 8-bit products with 14 bits: sums of CHUNK turns are taken out and added in float32.
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for chunk in tl.range(0, turns, CHUNK):
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for turn in tl.range(chunk, tl.minimum(chunk + CHUNK, turns)):
            a = _load_tile(left, row, turn * BLOCK_K, n_left, N, BLOCK_M, BLOCK_K, TMA).to(OPERAND)
            b = _load_tile(right, col, turn * BLOCK_K, n_right, N, BLOCK_N, BLOCK_K, TMA).to(OPERAND)
            acc = tl.dot(a, b.T, acc)
        total += acc
    rows = row + tl.arange(0, BLOCK_M)[:, None]
    cols = col + tl.arange(0, BLOCK_N)[None, :]
    out = (total * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows * n_right + cols, out, mask=(rows < n_left) & (cols < n_right))


@triton.jit
def _weight_gradients_kernel(
    dh_t, x_t, dy_t, a_t, dup_ptr, ddown_ptr, scales_ptr, scales_2_ptr, N, D, n_cols, turns, CHUNK,
    OPERAND: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, of_dup = tl.program_id(0), tl.cdiv(n_cols, BLOCK_M) * tl.cdiv(D, BLOCK_N)
    if tile < of_dup:
        scale = tl.load(scales_2_ptr + 12) * tl.load(scales_ptr + 16)
        row, col = tile // tl.cdiv(D, BLOCK_N) * BLOCK_M, tile % tl.cdiv(D, BLOCK_N) * BLOCK_N
        _long_product(
            dh_t, x_t, dup_ptr, scale, row, col, N, n_cols, D, turns, CHUNK, OPERAND, TMA, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        scale = tl.load(scales_2_ptr + 8) * tl.load(scales_ptr + 28)
        tile -= of_dup
        row, col = tile // tl.cdiv(n_cols, BLOCK_N) * BLOCK_M, tile % tl.cdiv(n_cols, BLOCK_N) * BLOCK_N
        _long_product(
            dy_t, a_t, ddown_ptr, scale, row, col, N, D, n_cols, turns, CHUNK, OPERAND, TMA, BLOCK_M, BLOCK_N, BLOCK_K
        )


# Under TRITON_INTERPRET=1 the decorator above gave an interpreted function, and the CPU runs the Triton code itself.
INTERPRETED = not isinstance(_mlp_kernel, triton.runtime.JITFunction)
E4M3 = torch.float8_e4m3fn
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, E4M3: tl.float8e4nv}


def _assembly(backward: bool) -> str:
    """For a block of 4 x 4: its rows and columns in 8 bits ($0 to $7) and its 16 signs ($8), from its elements ($9 to
    $24), the factors of positive and negative ones ($25, $26) and, backward, the signs ($27)."""
    lines = ["{ .reg .f32 a<16>, f; .reg .b16 lo, hi; .reg .b32 w<4>, u<4>, b; .reg .pred p;", "mov.b32 b, 0;"]
    for i in reversed(range(16)):
        if backward:
            lines += [f"and.b32 b, $27, {1 << i}; setp.ne.b32 p, b, 0;", f"mov.f32 a{i}, ${9 + i};"]
        else:
            lines += [f"setp.lt.f32 p, ${9 + i}, 0f00000000; shf.l.wrap.b32 b, ${9 + i}, b, 1;"]
            lines += [f"mul.f32 a{i}, ${9 + i}, ${9 + i};"]
        lines += [f"selp.f32 f, $26, $25, p; mul.f32 a{i}, a{i}, f;"]
    for row in range(4):
        for half, name in ((0, "lo"), (2, "hi")):
            lines += [f"cvt.rn.satfinite.e4m3x2.f32 {name}, a{4 * row + half + 1}, a{4 * row + half};"]
        lines += [f"mov.b32 w{row}, {{lo, hi}};"]
    # columns: bytes of rows 0 and 1, and of 2 and 3, in turn; then pairs of those in turn
    for i in range(4):
        lines += [f"prmt.b32 u{i}, w{i % 2 * 2}, w{i % 2 * 2 + 1}, {'0x5140' if i < 2 else '0x7362'};"]
    for i in range(4):
        lines += [f"prmt.b32 ${4 + i}, u{i // 2 * 2}, u{i // 2 * 2 + 1}, {'0x7632' if i % 2 else '0x5410'};"]
    return "\n".join([*lines, *(f"mov.b32 ${row}, w{row};" for row in range(4)), "mov.b32 $8, b; }"])


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
    signs: Tensor | None = None,
    scales: Tensor | None = None,
    scales_2: Tensor | None = None,
) -> None:
    """One launch of the kernel; `seen` makes it the backward one, `scales` the 8-bit one."""
    if not out.numel():
        return
    (N, n_cols), K = out.shape, x.shape[1]
    backward, fp8 = seen is not None, scales is not None
    path = _path(*(t for t in (x, w, out, seen, out_t, signs) if t is not None))
    tuned = ("backward" if backward else "forward") + (" fp8" if fp8 else "")
    config = dict(LAUNCH["float32" if x.dtype == torch.float32 else tuned if path == "tma" else "pointers"])
    block_m, block_f, block_k = config["BLOCK_M"], config["BLOCK_F"], config["BLOCK_K"]
    programs, part = config.pop("programs"), block_f // config["PARTS"]

    def matrix(t: Tensor | None, *block: int) -> object:
        return t if t is None or path == "pointers" else TensorDescriptor.from_tensor(t, list(block))

    n_tiles = triton.cdiv(N, block_m) * triton.cdiv(n_cols, block_f)
    # No interpreter multiplies 16- or 8-bit floats rightly in tl.dot, so there the operands are float32.
    operand = tl.float32 if INTERPRETED else _TYPES[x.dtype]
    fast, word = not INTERPRETED and out.dtype == torch.bfloat16 and slope != 0, 1
    if fp8:
        fast, word, out, out_t = None if INTERPRETED else _assembly(backward), 4, *_as_words(out, out_t)
    _mlp_kernel[(min(n_tiles, programs * _processors(x.device)) if programs else n_tiles,)](
        matrix(x, block_m, block_k),
        matrix(w, block_f, block_k) if rows_of_w else matrix(w, block_k, block_f),
        N,
        n_cols,
        matrix(seen, block_m, part),
        matrix(out, block_m, part // word),
        matrix(out_t, part, block_m // word),
        matrix(signs, block_m // 4, part // 4),
        scales,
        scales_2,
        K,
        operand,
        rows_of_w,
        abs(slope),  # leaky is squared, or multiplied by its own derivative
        backward,
        fp8,
        fast,
        path == "tma",
        _TYPES[x.dtype],
        programs > 0,
        **config,
    )


def _as_words(*matrices: Tensor) -> list[Tensor]:
    return [t.view(torch.int32) for t in matrices]


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


def _refuse_tangents(name: str, *tensors: Tensor | None) -> None:
    """An op has no rule for forward-mode differentiation: tangents would be dropped, as if they were 0."""
    if not torch.compiler.is_compiling() and any(unpack_dual(t).tangent is not None for t in tensors if t is not None):
        raise RuntimeError(f"{name}: expected no forward-mode differentiation, got a tensor with a tangent")


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


def _sums(x: Tensor, up: Tensor | None = None, down: Tensor | None = None) -> tuple[Tensor, int, int]:
    """Partial sums of squares of x, and of up and down; how many of x and of each of the others."""
    n_w = 0 if up is None else up.numel()
    of_x, of_w = (min(triton.cdiv(n, 8192), limit) for n, limit in ((x.numel(), SUMS), (n_w, SUMS // 8)))
    sums = torch.empty(of_x + 2 * of_w, dtype=torch.float32, device=x.device)
    _sum_squares_kernel[sums.shape](x, up, down, sums, x.numel(), n_w, of_x, of_w, 8192, num_warps=8)
    return sums, of_x, of_w


def _eights(x: Tensor, order: int = 1) -> tuple[Tensor, Tensor]:
    """For x in 8 bits, to whole tiles of `order` rows, and transposed."""
    M, D = x.shape
    padded = triton.cdiv(M, order) * order
    return x.new_empty((padded, D), dtype=E4M3), x.new_empty((D, M), dtype=E4M3)


def _cast(x: Tensor, scales: Tensor, up: Tensor | None = None, down: Tensor | None = None) -> list[Tensor]:
    """x, up and down in 8 bits, each also transposed."""
    (N, D), n_cols = x.shape, 0 if up is None else len(up)
    eights = [*_eights(x, 128), *(t for w in (up, down) for t in ((None, None) if w is None else _eights(w)))]
    block_m, block_d = CAST["BLOCK_M"], CAST["BLOCK_D"]
    tiles = triton.cdiv(N, 128) * (128 // block_m) * triton.cdiv(D, block_d)
    if up is not None:
        tiles += sum(triton.cdiv(a, block_m) * triton.cdiv(b, block_d) for a, b in ((n_cols, D), (D, n_cols)))
    _cast_kernel[(tiles,)](
        x, *eights[:2], up, *eights[2:4], down, *eights[4:], scales, N, D, n_cols, up is not None, **CAST
    )
    return eights


def _multiply(a: Tensor, b_t: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a b, with b given as its transpose."""
    return torch._scaled_mm(a, b_t.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)


def _weights_path(D: int, n_cols: int, device: torch.device) -> str:
    """ "together": both weight gradients in one kernel, where their tiles occupy the multiprocessors; else "apart"."""
    waves = 2 * triton.cdiv(D, 128) * triton.cdiv(n_cols, 128) / _processors(device)
    return "together" if waves / math.ceil(waves) > 0.9 else "apart"


def _weight_gradients(
    dh_t: Tensor, x_t: Tensor, dy_t: Tensor, a_t: Tensor, scales: Tensor, scales_2: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    (n_cols, N), D = dh_t.shape, len(x_t)
    dup, ddown = dh_t.new_empty((n_cols, D), dtype=dtype), dh_t.new_empty((D, n_cols), dtype=dtype)
    config, tma = LAUNCH["weights fp8"], _path(dh_t, x_t, dy_t, a_t) == "tma"
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]

    def matrix(t: Tensor, rows: int) -> object:
        return TensorDescriptor.from_tensor(t, [rows, block_k]) if tma else t

    turns = triton.cdiv(N, block_k)
    chunk = triton.cdiv(turns, triton.cdiv(turns * block_k, CHAIN))
    tiles = sum(triton.cdiv(a, block_m) * triton.cdiv(b, block_n) for a, b in ((n_cols, D), (D, n_cols)))
    _weight_gradients_kernel[(tiles,)](
        matrix(dh_t, block_m), matrix(x_t, block_n), matrix(dy_t, block_m), matrix(a_t, block_n), dup, ddown, scales,
        scales_2, N, D, n_cols, turns, chunk, tl.float32 if INTERPRETED else tl.float8e4nv, tma, **config,
    )  # fmt: skip
    return dup, ddown


@_as_given
def _forward_fp8(
    x: Tensor, up: Tensor, down: Tensor, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, and for the backward x', a, signs of h, a', up', down' in 8 bits (' is transposed) and the scales."""
    (N, D), n_cols = x.shape, len(up)
    sums, of_x, of_w = _sums(x, up, down)
    scales = torch.empty((2, 4, 4), dtype=torch.float32, device=x.device)
    _forward_scales_kernel[(1,)](sums, N * D, n_cols * D, of_x, of_w, scales, D, triton.next_power_of_2(of_x + of_w))
    x8, x8_t, up8, up8_t, down8, down8_t = _cast(x, scales, up, down)
    a = torch.empty((N, n_cols), dtype=E4M3, device=x.device)
    a_t = torch.empty((n_cols, N), dtype=E4M3, device=x.device)
    signs = torch.empty((N // 4, n_cols // 4), dtype=torch.int16, device=x.device)
    _product(x8, up8, True, negative_slope, a, out_t=a_t, signs=signs, scales=scales)
    y = _multiply(a, down8, scales[1, 3, 0], scales[1, 2, 0], x.dtype, fast=True)
    return y, x8_t, a, signs, a_t, up8_t, down8_t, scales


@_as_given
def _backward_fp8(
    dy: Tensor, x_t: Tensor, a: Tensor, signs: Tensor, a_t: Tensor, up_t: Tensor, down_t: Tensor, scales: Tensor,
    negative_slope: float, with_dx: bool, with_dup: bool, with_ddown: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (N, D), n_cols, (sums, n_sums, _) = dy.shape, a.shape[1], _sums(dy)
    scales_2 = torch.empty((2, 2, 4), dtype=torch.float32, device=dy.device)
    _backward_scales_kernel[(1,)](sums, N * D, n_sums, scales, scales_2, D, triton.next_power_of_2(n_sums))
    dy8, dy8_t = _cast(dy, scales_2)[:2]
    dx, dup, ddown = (dy.new_empty(0) for _ in range(3))
    if with_dx or with_dup:
        dh, dh_t = torch.empty_like(a), torch.empty_like(a_t)
        _product(
            dy8, down_t, True, negative_slope, dh, seen=a, out_t=dh_t, signs=signs, scales=scales, scales_2=scales_2
        )
    if with_dx:
        dx = _multiply(dh, up_t, scales_2[1, 1, 0], scales[1, 1, 0], dy.dtype, fast=True)
    if with_dup and with_ddown and _weights_path(D, n_cols, dy.device) == "together":
        return dx, *_weight_gradients(dh_t, x_t, dy8_t, a_t, scales, scales_2, dy.dtype)
    if with_dup:
        dup = _multiply(dh_t, x_t, scales_2[1, 1, 0], scales[1, 0, 0], dy.dtype, fast=False)
    if with_ddown:
        ddown = _multiply(dy8_t, a_t, scales_2[1, 0, 0], scales[1, 3, 0], dy.dtype, fast=False)
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
    x_t, a, a_t, up_t, down_t = (
        x.new_empty(shape, dtype=E4M3) for shape in ((D, N), (N, n_cols), (n_cols, N), (D, n_cols), (n_cols, D))
    )
    signs = x.new_empty((N // 4, n_cols // 4), dtype=torch.int16)
    return x.new_empty(x.shape), x_t, a, signs, a_t, up_t, down_t, x.new_empty((2, 4, 4), dtype=torch.float32)


@_op_fp8_backward.register_fake
def _backward_fp8_fake(dy, x_t, a, signs, a_t, up_t, down_t, scales, negative_slope, *wanted):
    D, n_cols = up_t.shape
    shapes = zip((dy.shape, (n_cols, D), (D, n_cols)), wanted, strict=True)
    return tuple(dy.new_empty(shape if w else 0) for shape, w in shapes)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.slope = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else autograd writes zeros, a gradient of a
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
    ctx.set_materialize_grads(False)
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
    Returns (..., D) in x's dtype. Differentiable once, in reverse mode, in x, up and down; products for frozen ones are
    left out. A gradient with other strides (of stride 0, transposed) is copied.
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
    _refuse_tangents(name, x, up, down)
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
