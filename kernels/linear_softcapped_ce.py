"""LM head and tanh-capped cross-entropy in one: hidden states to the loss, never holding all logits.

    a = x weight^T      z = c tanh(a / c)      c = softcap, t = targets[i], p = softmax(z)
    loss = Σ_i w_i (logsumexp_j z_ij - z_it)                                  w = weights, or 1; 0 on ignored rows
    da_ij = w_i (p_ij - [j = t]) (1 - tanh²(a_ij / c)),    dx = da weight,    dweight = da^T x

The cap bounds z to [-c, c], so exp(z) needs no running maximum, and the gradient can be written before the row's sum is
known. With s = σ(-2a/c), z = c - 2cs and 1 - tanh² = 4s(1 - s), the GEMM's epilogue stores

    E_ij = exp(z_ij) s(1 - s)      (in x's dtype, a chunk of rows at a time)

and, per tile of columns, the sum of exp(z_ij) over j != t. A kernel over the rows then forms S_i = Σ_j exp(z_ij), the
loss, r_i = 4 w_i / S_i, and the one element that is different, E_it = -(S_i - exp(z_it)) s(1 - s): the share of the
other columns, which does not cancel for a confident row. Hence da = diag(r) E, and with two GEMMs of a library

    dx = diag(r) (E weight)        dweight = E^T (diag(r) x)

Range: with c <= 64, E and 1 / S lie within e^±(64 + log V), inside the e^±87 of bfloat16 and float32.
As the upstream gradient is a scalar, the forward computes both gradients for upstream 1, where one is wanted, and the
backward multiplies: dx's rows by r_i times it. dweight is summed over the chunks in float32 and rounded once, in a
fixed order and without atomics: everything repeats bitwise.

Shapes: x (N, D), weight (V, D) bfloat16 or float32, columns adjacent, any row stride; targets (N,) int64 or int32.
Loss and sums are float32. float64 runs on CPU only, in plain PyTorch.
Must move: x, weight, targets, dx, dweight; 6 N V D operations. Scratch: E, at most LAUNCH["bytes"], and dx once more.
Replaces: F.linear, softcap, F.cross_entropy and their backward: (N, V) logits held twice, some ten passes over them.
Refuses: other dtypes, columns that are not adjacent, softcap outside (0, 64], gradients with reduction="none". A target
outside [0, V) that is not ignore_index makes its row's loss and dx NaN, and all of dweight, which sums over the rows;
looking for one would stall the GPU (check_targets). An ignored row's loss is 0 whatever x holds there; its gradients
are the kernels' numbers times 0, and so NaN, in dweight too, where x of that row is.
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
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# A lifted copy has ops of its own, so that it may stand beside the package.
NAMESPACE = "niblick" if __name__.startswith("niblick.") else "niblick_" + re.sub(r"\W", "_", __name__, flags=re.A)
ROUNDS_BETWEEN = True  # E and the rows scaled by r are rounded to 16 bits between the GEMMs, as eager's logits are
# NVIDIA H200, 2026-11-20. rows: of E at once, three waves of 132 times 128; bytes: of E at most, whatever V is.
# hopper: its shared memory holds four stages at D = 512; maxnreg is 65536 registers for 12 warps.
LAUNCH = {
    "rows": 50688,
    "bytes": 840_000_000,
    "hopper": {"STAGES": 4, "num_warps": 4, "maxnreg": 168},
    "tiles": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    "row": {"BLOCK_ROWS": 4, "num_warps": 2},
}
_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float8_e4m3fn: tl.float8e4nv}


def linear_softcapped_ce_ref(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float = 30.0,
    *,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The specification: logits in x's dtype, the rest in float32 or, for float64 x, in float64."""
    ignored = targets == ignore_index
    logits = F.linear(x, weight)
    capped = softcap * torch.tanh(logits.to(torch.promote_types(x.dtype, torch.float32)) / softcap)
    loss = F.cross_entropy(capped, targets.long(), ignore_index=ignore_index, reduction="none")
    counted = (~ignored).to(loss.dtype)
    if weights is not None:
        counted = counted * weights.to(loss.dtype)
    loss = loss * counted
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else _linear_ce_mean(loss.sum(), counted.sum())


def _linear_ce_mean(total: Tensor, count: Tensor) -> Tensor:
    """total / count; NaN for a count of 0, through which no gradient passes, where 1 / 0 would bring inf times 0."""
    return torch.where(count == 0, torch.nan, total / torch.where(count == 0, 1.0, count))


# ------------------------------------------------------------------------------------------------------- any card


@triton.jit
def _linear_ce_tile_kernel(
    x_ptr,  # (n_rows, D)
    weight_ptr,  # (V, D)
    targets_ptr,  # (n_rows,)
    e_ptr,  # (n_rows, V): E
    partial_ptr,  # (tiles of columns, n_rows) float32: sums of exp(z) but for the target
    scale_ptr,  # () float32 of float8 operands, or None
    stride_x,
    stride_weight,
    stride_target,
    stride_e,
    n_rows,
    V: tl.constexpr,
    D: tl.constexpr,
    softcap: tl.constexpr,
    GRADIENT: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles: tl.constexpr = (V + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) % tiles  # neighbours share their rows of x; weight fits the cache as a whole
    rows = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * stride_x + k[None, :]
    w_ptrs = weight_ptr + cols[None, :].to(tl.int64) * stride_weight + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        x = tl.load(x_ptrs + start, mask=(rows[:, None] < n_rows) & (k[None, :] < D - start), other=0.0)
        w = tl.load(w_ptrs + start, mask=(cols[None, :] < V) & (k[:, None] < D - start), other=0.0)
        acc = tl.dot(x.to(OPERAND), w.to(OPERAND), acc, input_precision="ieee")

    if scale_ptr is not None:
        acc *= tl.load(scale_ptr)
    CAP: tl.constexpr = softcap * 1.4426950408889634  # in powers of two
    s = 1.0 / (1.0 + tl.exp2(acc * (2.885390081777927 / softcap)))  # exp2 may reach inf, then s is 0 as it should
    exp_z = tl.exp2(CAP - (2.0 * CAP) * s)
    target = tl.load(targets_ptr + rows * stride_target, mask=rows < n_rows, other=-1)
    others = tl.where((cols[None, :] != target[:, None]) & (cols[None, :] < V), exp_z, 0.0)
    tl.store(partial_ptr + tile * n_rows + rows, tl.sum(others, axis=1), mask=rows < n_rows)
    if GRADIENT:
        e_ptrs = e_ptr + rows[:, None] * stride_e + cols[None, :]
        e = (exp_z * (s - s * s)).to(e_ptr.dtype.element_ty)
        tl.store(e_ptrs, e, mask=(rows[:, None] < n_rows) & (cols[None, :] < V))


@triton.jit
def _linear_ce_row_kernel(
    x_ptr,  # (n_rows, D)
    weight_ptr,  # (V, D)
    targets_ptr,  # (n_rows,)
    weights_ptr,  # (n_rows,) or None
    partial_ptr,  # (tiles, n_rows) float32
    e_ptr,  # (n_rows, V)
    loss_ptr,  # (n_rows,) float32
    ratio_ptr,  # (n_rows,) float32: r
    scaled_ptr,  # (n_rows, D): diag(r) x
    stride_x,
    stride_weight,
    stride_target,
    stride_weights,
    stride_e,
    n_rows,
    tiles: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    softcap: tl.constexpr,
    ignore_index: tl.constexpr,
    GRADIENT: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = rows < n_rows
    target = tl.load(targets_ptr + rows * stride_target, mask=here, other=0).to(tl.int64)
    known = here & (target >= 0) & (target < V)
    d = tl.arange(0, BLOCK_D)[None, :]
    x_ptrs, inside = x_ptr + rows[:, None] * stride_x + d, d < D
    x = tl.load(x_ptrs, mask=here[:, None] & inside, other=0.0).to(tl.float32)
    w_ptrs = weight_ptr + target[:, None] * stride_weight + d
    w = tl.load(w_ptrs, mask=known[:, None] & inside, other=0.0).to(tl.float32)
    a = tl.sum(x * w, axis=1) * (2.885390081777927 / softcap)
    e = tl.exp2(-tl.abs(a))  # of the smaller sign, so that neither s nor 1 - s cancels
    q = 1.0 / (1.0 + e)
    CAP: tl.constexpr = softcap * 1.4426950408889634  # in powers of two
    log_mine = CAP - (2.0 * CAP) * tl.where(a > 0, e * q, q)
    mine = tl.exp2(log_mine)

    i = tl.arange(0, BLOCK_TILES)[:, None]
    partial = tl.load(partial_ptr + i * n_rows + rows[None, :], mask=(i < tiles) & here[None, :], other=0.0)
    others = tl.sum(partial.to(tl.float32), axis=0)
    # log(mine + others) - log(mine), from whichever is larger: a confident row's loss does not cancel
    far = tl.log2(tl.maximum(others, mine)) - log_mine
    loss = tl.where(others > mine, far, 0.0) + tl.log2(1.0 + tl.minimum(others, mine) / tl.maximum(others, mine))
    loss = tl.where(target == ignore_index, 0.0, loss)  # even of NaN
    share = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    if weights_ptr is not None:
        share = tl.load(weights_ptr + rows * stride_weights, mask=here, other=0.0).to(tl.float32)
    share = tl.where(known, share, float("nan"))
    share = tl.where(target == ignore_index, 0.0, share)
    tl.store(loss_ptr + rows, share * loss * 0.6931471805599453, mask=here)
    if GRADIENT:
        ratio = share * 4.0 / (mine + others)
        tl.store(ratio_ptr + rows, ratio, mask=here)
        tl.store(e_ptr + rows * stride_e + target, (-others * e * q * q).to(e_ptr.dtype.element_ty), mask=known)
        if SCALED:
            scaled = (x * ratio[:, None]).to(scaled_ptr.dtype.element_ty)
            tl.store(scaled_ptr + rows[:, None] * D + d, scaled, mask=here[:, None] & inside)


@triton.jit
def _linear_ce_scale_kernel(
    raw_ptr,  # (n_rows, D)
    ratio_ptr,  # (n_rows,) float32, or None
    upstream_ptr,  # () float32
    out_ptr,  # (n_rows, D)
    n_rows,
    D,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows[:, None] < n_rows) & (d < D)
    factor = tl.load(upstream_ptr).to(tl.float32)
    out = tl.load(raw_ptr + rows[:, None] * D + d, mask=inside, other=0.0).to(tl.float32)
    if ratio_ptr is not None:
        out *= tl.load(ratio_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
    tl.store(out_ptr + rows[:, None] * D + d, (out * factor).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _linear_ce_fp8_kernel(
    in_ptr, scale_ptr, out_ptr, stride_in, n_rows, D, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows of (n_rows, D) over the scale, in float8."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows[:, None] < n_rows) & (d < D)
    x = tl.load(in_ptr + rows[:, None] * stride_in + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows[:, None] * D + d, (x / tl.load(scale_ptr)).to(out_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------------- Hopper
# A CTA keeps 128 rows of x in shared memory and streams weight past them. Two warpgroups take its tiles in turn, so
# that one's epilogue (three special functions an element, 16 a cycle) runs under the other's matrix instructions; one
# warp more fills the buffers: of x, for each unit of work, and of weight, STAGES blocks of 128 by 128 bytes. (Eight
# warps a tile instead of four spill registers: 1.95 ms instead of 1.57 at the record's size.)


@gluon.jit
def _linear_ce_fill(given, n_units, GROUPS: gl.constexpr, TILES: gl.constexpr):
    descriptors, bufs, bars = given
    x_desc, w_desc, _ = descriptors
    x_bufs, w_bufs, _ = bufs
    x_full, x_empty, w_full, w_empty, _, _ = bars
    STEPS: gl.constexpr = x_bufs.type.shape[0]
    STAGES: gl.constexpr = w_bufs.type.shape[0]
    BLOCK_K: gl.constexpr = w_bufs.type.shape[2]
    slot = 0
    turn = 0
    for unit in range(gl.program_id(0), n_units, gl.num_programs(0)):
        mbarrier.wait(x_empty, turn & 1 ^ 1)
        mbarrier.expect(x_full, STEPS * x_desc.block_type.nbytes)
        for k in range(STEPS):
            tma.async_copy_global_to_shared(x_desc, [unit // GROUPS * 128, k * BLOCK_K], x_full, x_bufs.index(k))
        turn += 1
        for i in range(TILES * STEPS):
            s = slot % STAGES
            mbarrier.wait(w_empty.index(s), slot // STAGES & 1 ^ 1)
            mbarrier.expect(w_full.index(s), w_desc.block_type.nbytes)
            at = [(unit % GROUPS * TILES + i // STEPS) * 128, i % STEPS * BLOCK_K]
            tma.async_copy_global_to_shared(w_desc, at, w_full.index(s), w_bufs.index(s))
            slot += 1


@gluon.jit
def _linear_ce_consume(
    which: gl.constexpr, given, targets_ptr, partial_ptr, scale_ptr, n_units, n_rows, stride_target,
    V: gl.constexpr, softcap: gl.constexpr, GRADIENT: gl.constexpr, GROUPS: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    descriptors, bufs, bars = given
    _, _, e_desc = descriptors
    x_bufs, w_bufs, e_buf = bufs
    x_full, x_empty, w_full, w_empty, order, e_order = bars
    STEPS: gl.constexpr = x_bufs.type.shape[0]
    STAGES: gl.constexpr = w_bufs.type.shape[0]
    CAP: gl.constexpr = softcap * 1.4426950408889634
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 256 // x_bufs.dtype.primitive_bitwidth])
    columns = gl.arange(0, 128, gl.SliceLayout(0, MMA))
    scale = 2.885390081777927 / softcap
    if scale_ptr is not None:
        scale = scale * gl.load(scale_ptr)
    slot = which * STEPS
    turn = 0
    taken = 0
    for unit in range(gl.program_id(0), n_units, gl.num_programs(0)):
        row = unit // GROUPS * 128
        rows = row + gl.arange(0, 128, gl.SliceLayout(1, MMA))
        target = gl.load(targets_ptr + rows.to(gl.int64) * stride_target, mask=rows < n_rows, other=-1).to(gl.int32)
        mbarrier.wait(x_full, turn & 1)
        turn += 1
        for i in range(TILES // 2):
            tile = unit % GROUPS * TILES + 2 * i + which
            # A parity alone cannot tell this tile's buffers from those two phases before, which are the other's.
            mbarrier.wait(order.index(which), taken & 1 ^ 1 - which)
            acc = gl.full((128, 128), 0.0, gl.float32, MMA)
            for k in range(STEPS):
                mbarrier.wait(w_full.index(slot % STAGES), slot // STAGES & 1)
                w = w_bufs.index(slot % STAGES).permute((1, 0))
                acc = hopper.warpgroup_mma(x_bufs.index(k), w, acc, use_acc=k > 0, is_async=True)
                acc = hopper.warpgroup_mma_wait(num_outstanding=1, deps=[acc])
                mbarrier.arrive(w_empty.index((slot + STAGES - 1) % STAGES), count=1, pred=k > 0)
                slot += 1
            mbarrier.arrive(order.index(1 - which), count=1)  # every buffer of this tile has been waited for
            acc = hopper.warpgroup_mma_wait(num_outstanding=0, deps=[acc])
            mbarrier.arrive(w_empty.index((slot + STAGES - 1) % STAGES), count=1)
            mbarrier.arrive(x_empty, count=1, pred=i == TILES // 2 - 1)
            slot += STEPS  # the other's tile

            # the arithmetic of _linear_ce_tile_kernel
            power = 1.0 + gl.exp2(acc * scale)
            s = gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [power], gl.float32, True, 1)
            exp_z = gl.exp2(CAP - (2.0 * CAP) * s)
            other = columns[None, :] != (target - tile * 128)[:, None]
            if GROUPS * TILES * 128 != V:
                other = other & (columns < V - tile * 128)[None, :]
            sums = gl.sum(gl.where(other, exp_z, 0.0), axis=1)
            gl.store(partial_ptr + tile * n_rows + rows, sums, mask=rows < n_rows)
            if GRADIENT:
                e = (exp_z * (s - s * s)).to(e_desc.dtype)
                mbarrier.wait(e_order.index(which), taken & 1 ^ 1 - which)
                e_buf.store(e)
                hopper.fence_async_shared()
                tma.async_copy_shared_to_global(e_desc, [row, tile * 128], e_buf)
                tma.store_wait(0)
                mbarrier.arrive(e_order.index(1 - which), count=1)
            taken += 1


@gluon.jit
def _linear_ce_barriers(n: gl.constexpr, count: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit
def _linear_ce_hopper_kernel(
    x_desc, w_desc, e_desc, targets_ptr, partial_ptr, scale_ptr, stride_target, n_units, n_rows,
    V: gl.constexpr, softcap: gl.constexpr, GRADIENT: gl.constexpr, GROUPS: gl.constexpr, TILES: gl.constexpr,
    STEPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STEPS, 128, BLOCK_K], x_desc.layout)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 128, BLOCK_K], w_desc.layout)
    e_buf = gl.allocate_shared_memory(e_desc.dtype, [128, 128], e_desc.layout)
    x_full, x_empty = _linear_ce_barriers(1, 1), _linear_ce_barriers(1, 2)
    w_full, w_empty = _linear_ce_barriers(STAGES, 1), _linear_ce_barriers(STAGES, 1)
    order, e_order = _linear_ce_barriers(2, 1), _linear_ce_barriers(2, 1)  # whose turn it is to multiply, to store
    hopper.fence_async_shared()
    bars = (x_full.index(0), x_empty.index(0), w_full, w_empty, order, e_order)
    given = ((x_desc, w_desc, e_desc), (x_bufs, w_bufs, e_buf), bars)
    gl.warp_specialize(
        [
            (_linear_ce_consume, (
                gl.constexpr(0), given, targets_ptr, partial_ptr, scale_ptr, n_units, n_rows, stride_target,
                V, softcap, GRADIENT, GROUPS, TILES,
            )),
            (_linear_ce_consume, (
                gl.constexpr(1), given, targets_ptr, partial_ptr, scale_ptr, n_units, n_rows, stride_target,
                V, softcap, GRADIENT, GROUPS, TILES,
            )),
            (_linear_ce_fill, (given, n_units, GROUPS, TILES)),
        ],
        [4, 1],
        [240, 24],  # registers a thread; the first keeps 240 too
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- launchers


def _linear_ce_path(x: Tensor, weight: Tensor) -> str:
    """hopper, where its instructions, its 227 KB of shared memory and the alignment of its copies allow; or tiles."""
    if INTERPRETED or triton.runtime.driver.active.get_current_target().arch // 10 != 9:
        return "tiles"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    D, size = x.shape[1], x.element_size()
    fits = size <= 2 and D * size <= 1024 and D * size % 128 == 0 and version >= (3, 6)
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) * size % 16 == 0 for t in (x, weight))
    return "hopper" if fits and aligned else "tiles"


def _linear_ce_tiles(
    x: Tensor, weight: Tensor, targets: Tensor, e: Tensor, softcap: float, gradient: bool, scale: Tensor | None
) -> Tensor:
    """Fill e with E (if gradient) and return the partial sums, (tiles, n_rows)."""
    (n, D), V = x.shape, weight.shape[0]
    if _linear_ce_path(x, weight) == "hopper":
        # A unit of work is 128 rows by 1 / groups of the columns; few groups, as each unit loads its rows of x anew.
        # (132: where the Hopper code is compiled without a card.)
        sms = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132
        groups = triton.next_power_of_2(triton.cdiv(sms, triton.cdiv(n, 128)))
        groups = min(groups, 8, triton.next_power_of_2(triton.cdiv(V, 256)))
        tiles = 2 * triton.cdiv(V, 256 * groups)  # a group's; even, as two warpgroups take turns
        partial = torch.empty((tiles * groups, n), dtype=torch.float32, device=x.device)
        units = triton.cdiv(n, 128) * groups
        descriptors = (
            _linear_ce_descriptor(t, [rows, 128 // width])
            for t, rows, width in ((x, 128, x.element_size()), (weight, 128, x.element_size()), (e, 128, 1))
        )
        _linear_ce_hopper_kernel[(min(sms, units),)](
            *descriptors, targets, partial, scale, targets.stride(0), units, n,
            V, softcap, gradient, groups, tiles, D * x.element_size() // 128, **LAUNCH["hopper"],
        )  # fmt: skip
        return partial
    blocks = LAUNCH["tiles"]
    if INTERPRETED or x.dtype == torch.float32:  # float32 has no tensor cores: a tile that its registers hold
        blocks = blocks | {"BLOCK_M": 64, "BLOCK_N": 64}
    tiles = triton.cdiv(V, blocks["BLOCK_N"])
    partial = torch.empty((tiles, n), dtype=torch.float32, device=x.device)
    # No interpreter multiplies bfloat16 rightly in tl.dot, so there the operands are float32.
    operand = tl.float32 if INTERPRETED else _DTYPE[x.dtype]
    _linear_ce_tile_kernel[(tiles * triton.cdiv(n, blocks["BLOCK_M"]),)](
        x, weight, targets, e, partial, scale, x.stride(0), weight.stride(0), targets.stride(0), e.stride(0), n,
        V, D, softcap, gradient, operand, **blocks,
    )  # fmt: skip
    return partial


def _linear_ce_descriptor(t: Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, _DTYPE[t.dtype])
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block, layout)


def _linear_ce_mm_f32(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, the operands in 16 bits on a card."""
    if a.dtype == torch.float32 or a.device.type != "cuda":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _linear_ce_quantise(t: Tensor) -> tuple[Tensor, Tensor]:
    """t in e4m3 and its scale: the largest magnitude becomes 448."""
    low, high = torch.aminmax(t)
    scale = torch.maximum(-low, high).float().clamp_min(1e-20) / 448.0
    out = torch.empty(t.shape, dtype=torch.float8_e4m3fn, device=t.device)
    block_d = triton.next_power_of_2(t.shape[1])
    rows = max(1, 4096 // block_d)
    _linear_ce_fp8_kernel[(triton.cdiv(len(t), rows),)](t, scale, out, t.stride(0), *t.shape, rows, block_d)
    return out, scale


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
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    softcap: float,
    ignore_index: int,
    fp8: bool,
    with_dx: bool,
    with_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum and the rows' losses; and for the backward E weight, r and dweight for upstream 1 (float32)."""
    (N, D), V = x.shape, weight.shape[0]
    gradient = with_dx or with_dweight
    x, weight = x.detach(), weight.detach()
    loss, ratio = (torch.empty(N, dtype=torch.float32, device=x.device) for _ in range(2))
    raw = torch.empty((N if with_dx else 0, D), dtype=x.dtype, device=x.device)
    dweight = torch.zeros((V if with_dweight else 0, D), dtype=torch.float32, device=x.device)
    padded = triton.cdiv(V, 8) * 8  # rows of a whole number of 16 bytes, for the GEMMs' wide loads
    rows = max(1, min(N, LAUNCH["rows"], LAUNCH["bytes"] // (padded * x.element_size())))
    e = torch.empty((rows if gradient else 1, padded), dtype=x.dtype, device=x.device)[:, :V]
    scaled = torch.empty((rows if with_dweight else 1, D), dtype=x.dtype, device=x.device)
    operands, scale = (x, weight), None
    if fp8 and N:  # no rows have no largest value
        operands, scales = zip(*map(_linear_ce_quantise, operands), strict=True)
        scale = scales[0] * scales[1]
    for first in range(0, N, rows):
        part = slice(first, first + rows)
        x_part, targets_part = x[part], targets[part]
        n = len(x_part)
        weights_part = None if weights is None else weights[part]
        partial = _linear_ce_tiles(operands[0][part], operands[1], targets_part, e[:n], softcap, gradient, scale)
        blocks = LAUNCH["row"] | {"BLOCK_TILES": triton.next_power_of_2(len(partial))}
        _linear_ce_row_kernel[(triton.cdiv(n, blocks["BLOCK_ROWS"]),)](
            x_part, weight, targets_part, weights_part, partial, e, loss[part], ratio[part], scaled,
            x.stride(0), weight.stride(0), targets.stride(0), 0 if weights is None else weights.stride(0), e.stride(0),
            n, len(partial), V, D, softcap, ignore_index, gradient, with_dweight,
            BLOCK_D=triton.next_power_of_2(D), **blocks,
        )  # fmt: skip
        if with_dx:
            torch.mm(e[:n], weight, out=raw[part])
        if with_dweight:
            dweight += _linear_ce_mm_f32(e[:n].t(), scaled[:n])
    return loss.sum(), loss, raw, ratio, dweight


@_as_given
def _backward(dtotal: Tensor, raw: Tensor, ratio: Tensor, dweight: Tensor) -> tuple[Tensor, Tensor]:
    results = []
    for source, factors in ((raw, ratio), (dweight, None)):
        (n, D), block_d = source.shape, triton.next_power_of_2(source.shape[1])
        out = torch.empty((n, D), dtype=raw.dtype, device=raw.device)
        if n:
            rows = max(1, 4096 // block_d)
            _linear_ce_scale_kernel[(triton.cdiv(n, rows),)](
                source, factors, dtotal, out, n, D, BLOCK_ROWS=rows, BLOCK_D=block_d, num_warps=4
            )  # fmt: skip
        results.append(out)
    return results[0], results[1]


@_as_given
def _forward_eager(x, weight, targets, weights, softcap, ignore_index, fp8, with_dx, with_dweight):
    wide = torch.promote_types(x.dtype, torch.float32)
    known, ignored = (targets >= 0) & (targets < len(weight)), targets == ignore_index
    x = x.masked_fill(ignored[:, None], 0.0)
    t = torch.tanh(F.linear(x, weight).to(wide) / softcap)
    column = targets.long().masked_fill(~known, 0)[:, None]
    log_p = (softcap * t).log_softmax(-1)
    mine = log_p.gather(1, column)[:, 0]
    share = torch.ones_like(mine) if weights is None else weights.to(wide)
    share = torch.where(ignored, 0.0, torch.where(known, share, torch.nan))
    loss = -mine * share
    da = (log_p.exp().scatter(1, column, torch.expm1(mine)[:, None]) * (1 - t * t)).to(x.dtype)
    raw = da @ weight if with_dx else x.new_empty((0, x.shape[1]))
    scaled = x.to(wide) * share[:, None]
    dweight = da.t().to(wide) @ scaled if with_dweight else x.new_empty((0, x.shape[1]), dtype=wide)
    return loss.sum(), loss, raw, share, dweight


@_as_given
def _backward_eager(dtotal: Tensor, raw: Tensor, ratio: Tensor, dweight: Tensor) -> tuple[Tensor, Tensor]:
    dx = raw.to(ratio.dtype) * (ratio[:, None] * dtotal) if len(raw) else raw.clone()
    return dx.to(raw.dtype), (dweight * dtotal).to(raw.dtype)


# Under TRITON_INTERPRET=1 the decorator above gave an interpreted function, and the CPU runs the Triton code itself.
INTERPRETED = not isinstance(_linear_ce_row_kernel, triton.runtime.JITFunction)

_op = torch.library.custom_op(f"{NAMESPACE}::linear_softcapped_ce", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    f"{NAMESPACE}::linear_softcapped_ce_backward", _backward, mutates_args=(), device_types="cuda"
)


@_op.register_kernel("cpu")
def _forward_cpu(x, *args):
    return (_forward if INTERPRETED and x.dtype != torch.float64 else _forward_eager)(x, *args)


@_op_backward.register_kernel("cpu")
def _backward_cpu(dtotal, raw, *args):
    return (_backward if INTERPRETED and raw.dtype != torch.float64 else _backward_eager)(dtotal, raw, *args)


@_op.register_fake
def _forward_fake(x, weight, targets, weights, softcap, ignore_index, fp8, with_dx, with_dweight):
    (N, D), V, wide = x.shape, weight.shape[0], torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty((), dtype=wide),
        x.new_empty(N, dtype=wide),
        x.new_empty((N if with_dx else 0, D)),
        x.new_empty(N, dtype=wide),
        x.new_empty((V if with_dweight else 0, D), dtype=wide),
    )


@_op_backward.register_fake
def _backward_fake(dtotal, raw, ratio, dweight):
    return raw.new_empty(raw.shape), raw.new_empty(dweight.shape)


def _setup_context(ctx, inputs, output):
    ctx.wanted = inputs[-2:]
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)  # else autograd writes zeros for them, as many bytes as the gradient of x
    ctx.save_for_backward(*rest[1:])


def _autograd(ctx, dtotal, *_):
    gradients = _op_backward(dtotal, *ctx.saved_tensors)
    return *(g if wanted else None for g, wanted in zip(gradients, ctx.wanted, strict=True)), *[None] * 7


_op.register_autograd(_autograd, setup_context=_setup_context)


def linear_softcapped_ce(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float = 30.0,
    *,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    reduction: str = "mean",
    fp8: bool = False,
    check_targets: bool = False,
) -> Tensor:
    """Cross-entropy of softcap * tanh(F.linear(x, weight) / softcap), in nats.

    Arguments as torch.nn.functional.linear_cross_entropy, with softcap, and per-token in place of per-class weights.
    x: (N, D), weight: (V, D), both bfloat16 or float32, columns adjacent; float64 on CPU only.
    targets: (N,) int64 or int32, in [0, V) or ignore_index, whose rows count for nothing. weights: (N,), no gradient.
    reduction: "mean" divides by the sum of the weights of the rows that count, NaN if it is zero (its
    gradients then are 0); "sum"; "none" gives (N,), without gradients only.
    fp8: multiply x and weight to logits in e4m3, each scaled by its largest value (compute capability 8.9 and up); the
    gradients' GEMMs stay in bfloat16. Logits then carry an error of about 4 % of their standard deviation.
    check_targets: look for a target out of range, which stalls the GPU; without it such a row's loss and gradient in x
    are NaN, and so is all of the gradient in weight.
    Returns float32 (float64 for float64 x). Differentiable once, in reverse mode, in x and weight.
    Raises ValueError for a shape, layout, device or number out of range, TypeError for a dtype or another type.
    """
    me = "linear_softcapped_ce"
    for name, tensor in (("x", x), ("weight", weight), ("targets", targets), ("weights", weights)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name != "weights"):
            raise TypeError(f"{me}: expected {name} as a tensor, got {type(tensor).__name__}")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{me}: expected x of shape (N, D), got {tuple(x.shape)}")
    if weight.ndim != 2 or len(weight) == 0 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"{me}: expected weight of shape (V, {x.shape[1]}), got {tuple(weight.shape)}")
    dtypes = (torch.bfloat16, torch.float32, *([torch.float64] if x.device.type == "cpu" else []))
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in dtypes:
            got = f"{name} in {tensor.dtype} on {tensor.device}"
            raise TypeError(f"{me}: expected x and weight in bfloat16 or float32 (float64 on CPU only), got {got}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{me}: expected {name} in {x.dtype} as x, got {tensor.dtype}")
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"{me}: expected {name} with adjacent columns, got strides {tensor.stride()}")
    for name, tensor in (("targets", targets), ("weights", weights)):
        if tensor is not None and tensor.shape != x.shape[:1]:
            raise ValueError(f"{me}: expected {name} of shape ({len(x)},), one a row, got {tuple(tensor.shape)}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{me}: expected targets in int64 or int32, got {targets.dtype}")
    if weights is not None and not weights.is_floating_point():
        raise TypeError(f"{me}: expected weights in a floating dtype, got {weights.dtype}")
    if weights is not None and weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{me}: expected weights that require no grad (they get none), got some that do")
    for name, tensor in (("weight", weight), ("targets", targets), ("weights", weights)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{me}: expected {name} on {x.device}, got {tensor.device}")
    if not isinstance(softcap, (int, float)) or isinstance(softcap, bool):  # a tensor would get no gradient
        raise TypeError(f"{me}: expected softcap as a number, got {type(softcap).__name__}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"{me}: expected ignore_index as an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{me}: expected ignore_index in 64 bits, got {ignore_index}")
    if not 0 < softcap <= 64:
        raise ValueError(f"{me}: expected 0 < softcap <= 64, got {softcap}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{me}: expected reduction 'mean', 'sum' or 'none', got {reduction!r}")
    if fp8:
        if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) < (8, 9):
            raise ValueError(f"{me}: expected a card of compute capability 8.9 for fp8, got {x.device}")
        if x.dtype != torch.bfloat16 or x.shape[1] % 16:
            got = f"{x.dtype} {tuple(x.shape)}"
            raise ValueError(f"{me}: expected bfloat16 x and D a multiple of 16 for fp8, got {got}")
    with_dx, with_dweight = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    if reduction == "none" and (with_dx or with_dweight):
        raise ValueError(
            f"{me}: expected no gradient with reduction='none' (torch.no_grad or detached inputs): one "
            "upstream gradient a row cannot be applied after dweight is summed; for a weighted sum pass weights"
        )
    if check_targets:
        bad = ((targets < 0) | (targets >= len(weight))) & (targets != ignore_index)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{me}: expected targets in [0, {len(weight)}) or {ignore_index}, got {int(targets[row])} in row {row}"
            )
    _refuse_tangents(me, x, weight, weights)
    total, rows, *_ = _op(x, weight, targets, weights, float(softcap), ignore_index, fp8, with_dx, with_dweight)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return total
    counted = (targets != ignore_index).to(total.dtype)
    return _linear_ce_mean(total, (counted if weights is None else counted * weights.to(total.dtype)).sum())


# --- not needed when lifted ---

SIZES = {  # N, V, D
    "odd": (5, 131, 33),
    "tile": (64, 128, 64),
    "quarter": (24576, 8192, 512),
    "record": (98304, 8192, 512),
}


def linear_softcapped_ce_inputs(
    size: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0
) -> dict[str, object]:
    """Logits N(0, 15²), which the cap bends; targets on the first and last column; row 1 confident, row 2 ignored,
    row 3 undecided: all its logits are 0."""
    N, V, D = size
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn((N, D), generator=generator, device=device)
    weight = torch.randn((V, D), generator=generator, device=device).mul_(15 / D**0.5)
    targets = torch.randint(V, (N,), generator=generator, device=device)
    targets[0], targets[-1], targets[2] = 0, V - 1, -100
    x[1] = weight[targets[1]] * (60 / weight[targets[1]].square().sum())
    x[3] = 0
    weights = torch.rand(N, generator=generator, device=device) + 0.5
    return {
        "x": x.to(dtype).requires_grad_(),
        "weight": weight.to(dtype).requires_grad_(),
        "targets": targets,
        "softcap": 30.0,
        "weights": weights,
    }


def linear_softcapped_ce_cost(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    """Inputs and gradients once; the logits, were there memory for them, would move nothing."""
    N, V, D = size
    matrices = (N + V) * D * dtype.itemsize
    return {
        "bytes_forward": matrices + 12 * N,
        "bytes_backward": matrices,
        "flops_forward": 2 * N * V * D,
        "flops_backward": 4 * N * V * D,
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
    _prove(
        linear_softcapped_ce,
        linear_softcapped_ce_ref,
        linear_softcapped_ce_inputs,
        linear_softcapped_ce_cost,
        SIZES,
    )
