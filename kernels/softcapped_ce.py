"""Cross-entropy on capped logits: loss and gradient, each in one read of the logits, or both in the same one.

    z = c tanh(x / c),  or A σ((x + B) / C),  or c₊ tanh(x / c₊) for x > 0 and c₋ tanh(x / c₋) for x <= 0;    x = logits
    loss_i = weights_i (lse_i - z_it + z_loss lse_i²),    lse_i = logsumexp_j z_ij,    t = targets[i],    p = softmax(z)
    dx_ij = dz_ij dz/dx(x_ij),    dz_ij = dloss_i weights_i ((1 + 2 z_loss lse_i) p_ij - [j = t]),    dc = Σ dz_ij dz/dc

σ is the logistic function. The caps are one, up to a constant that cancels in the loss: c + c tanh(x / c) is
A σ((x + B) / C) with A = 2c, B = 0, C = c / 2. With E = exp((x + B) / C) and s = 1 / (1 + E), the kernel works on the
distance below the cap, w = A s (as PR #1855 of the challenge does with 2cσ(2x/c)), and dz/dx = (A / C) E s². The most
probable columns lie nearest the cap, where w is small and therefore exact; far below it w carries the rounding of
float32 at A, so the loss is good to about 2e-7 A nats.
For a confident row p_t - 1 is the difference of two nearly equal numbers; it is taken instead as minus the share of all
other columns. To sum them without comparing each with the target, 16 bytes of columns around the target (its group) are
left out of the row, stores included, and done by themselves.

Shapes: logits (n_rows, V) bfloat16, float16 or float32, columns adjacent, any row stride and any V; targets (n_rows,)
int64 or int32; weights (n_rows,) float32; loss float32. Everything in between is float32. float64 runs on CPU only, in
plain PyTorch.
Must move: the logits in once, their gradient out once. By default the backward reads the logits again, because dloss is
known only then; a caller who knows it before (upstream=1.0) saves that read. Nothing overwrites the logits, but for
softcapped_ce_and_grad(..., inplace=True).
Replaces: softcap * torch.tanh(logits / softcap) and torch.nn.functional.cross_entropy, ten passes over (n_rows, V).
Refuses: other dtypes, columns that are not adjacent, numbers out of range, weights that want a gradient. What only the
device knows is not checked, as that would stall it: a cap <= 0 in a tensor makes every loss NaN, a target outside
[0, V) that is not ignore_index its row's loss (but see check_targets). An ignored row's loss is 0 whatever it holds;
its gradient is the kernel's numbers times 0, and so NaN where a logit of that row is.
From: PR #1855 (the cap) and PR #1923 (a cap for each sign) of the challenge; the sigmoid is modded-nanogpt's.
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
# Columns that a program holds at once, at most, and a warp of it; SHARED and AHEAD are explained where they are used.
# NVIDIA H200, 2026-11-20.
LAUNCH = {
    "loss": {"BLOCK_V": 8192, "columns_per_warp": 4096, "SHARED": 4},
    "gradient": {"BLOCK_V": 8192, "columns_per_warp": 2048, "SHARED": 1},
    "gradient in 8 bits": {"BLOCK_V": 8192, "columns_per_warp": 2048, "SHARED": 2},
    "gradient in loops": {"BLOCK_V": 2048, "columns_per_warp": 512, "SHARED": 4},
    "gradient by a team": {"BLOCK_V": 4096, "columns_per_warp": 2048, "SHARED": 4, "AHEAD": 660, "maxnreg": 96},
}
LARGEST = 1e4  # cap: beyond it float32 rounds losses, by some 2e-7 A nats, to nothing useful
# The partitioner of torch 2.9 finds no cut through a gradient that the forward has made.
PROMISES_COMPILE = torch.__version__ >= (2, 11)
REACH = 60.0  # caps up to which sums need no maximum: exp(±60) of e^28 columns stays within float32


def softcapped_ce_ref(
    logits: Tensor,
    targets: Tensor,
    softcap: float | tuple[float, float, float] | Tensor = 30.0,
    softcap_negative: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    upstream: float | None = None,  # a promise to the kernel; it changes no value
    check_targets: bool = False,
) -> Tensor:
    """The specification, in float32 or, for float64 logits, in float64."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if isinstance(softcap, tuple):
        A, B, C = softcap
        z = A * torch.sigmoid((x + B) / C)
    else:
        c = softcap if softcap_negative is None else torch.where(x > 0, softcap, softcap_negative)
        z = c * torch.tanh(x / c)
    loss = F.cross_entropy(z, targets.long(), ignore_index=ignore_index, reduction="none")
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(z, 1).square()
    w = (targets != ignore_index).to(x.dtype) * (1.0 if weights is None else weights.to(x.dtype))
    return _softcapped_ce_reduce(w * loss, w, reduction)


def _softcapped_ce_reduce(loss: Tensor, w: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / w.sum()


@triton.jit
def _log1p(x):
    # For x >= 0. log(u) / (u - 1) varies so slowly that the rounding of u = 1 + x hardly moves it, and times x it gives
    # back the bits that u lost. Where u == 1, log1p(x) is x to rounding.
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _softcapped_ce_reciprocal(d, SHARED: tl.constexpr):
    """1 / d. SHARED neighbours have it from one reciprocal of their product, 1 / a = b / (ab): a special function keeps
    its unit for 8 cycles a warp, a product for 1. SHARED = 0 divides, which is slower, and right to one bit more."""
    if SHARED == 0:
        return 1.0 / d
    elif SHARED == 1:
        root = tl.rsqrt(d)
        return root * root
    else:
        a, b = tl.split(tl.reshape(d, (d.shape[0] // 2, 2)))
        r = _softcapped_ce_reciprocal(a * b, SHARED // 2)
        return tl.reshape(tl.join(r * b, r * a), (d.shape[0],))


@triton.jit
def _softcapped_ce_cap(x, ref, caps_ptr, CAP: tl.constexpr, SHARED: tl.constexpr):
    """exp(ref - w); E s², which is dz/dx without its factor A / C; w; dz/dc."""
    LOG2E: tl.constexpr = 1.4426950408889634
    LIMIT: tl.constexpr = 124 // max(SHARED, 1)  # a product of SHARED (1 + E) stays finite, its reciprocal above 0
    A: tl.constexpr = CAP[0]
    B: tl.constexpr = CAP[1]
    C: tl.constexpr = CAP[2]
    if caps_ptr is None:
        u = x * (LOG2E / C) + (B * LOG2E / C)
    else:
        positive, negative = tl.load(caps_ptr).to(tl.float32), tl.load(caps_ptr + 1).to(tl.float32)
        positive = tl.where((positive > 0) & (negative > 0), positive, float("nan"))
        u = x * tl.where(x > 0, 2 * LOG2E / positive, 2 * LOG2E / negative)
    u = tl.minimum(u, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    E = tl.exp2(u)
    s = _softcapped_ce_reciprocal(1.0 + E, SHARED)
    if caps_ptr is None:
        w = A * s
        e = tl.exp2(ref * LOG2E - (A * LOG2E) * s)
    else:
        cap = tl.where(x > 0, positive, negative)
        w = (positive - cap) + 2 * cap * s
        e = tl.exp2((ref - w) * LOG2E)
    slope = s * (E * s)
    return e, slope, w, (E * s - s) - (2.0 / LOG2E) * u * slope  # tanh(y) - y tanh'(y) at y = x / c


@triton.jit
def _softcapped_ce_block(
    row_ptr, start, group, ref, caps_ptr,
    V: tl.constexpr, CAP: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_V columns e E s²; and, by groups but the target's, Σe, and Σ e dz/dc over x > 0 and over x <= 0."""
    cols = start + tl.arange(0, BLOCK_V)
    x = tl.load(row_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
    e, slope, _, dcap = _softcapped_ce_cap(x, ref, caps_ptr, CAP, SHARED)
    # One comparison a group where V is whole groups.
    counted = e if V % GROUP == 0 else tl.where(cols < V, e, 0.0)
    groups = start // GROUP + tl.arange(0, BLOCK_V // GROUP)
    far = (groups != group) & (groups * GROUP < V)
    total = tl.where(far, tl.sum(tl.reshape(counted, (BLOCK_V // GROUP, GROUP)), axis=1), 0.0)
    up, down = total, total
    if caps_ptr is not None:
        dcap = tl.reshape(counted * dcap, (BLOCK_V // GROUP, GROUP))  # its sign is that of x
        up, down = tl.maximum(dcap, 0.0), tl.minimum(dcap, 0.0)
        up, down = tl.where(far, tl.sum(up, axis=1), 0.0), tl.where(far, tl.sum(down, axis=1), 0.0)
    return e * slope, total, up, down


@triton.jit
def _softcapped_ce_store(dlogits_ptr, cols, dx, mask):
    if dlogits_ptr.dtype.element_ty == tl.float8e5:
        dx = tl.clamp(dx, -57344.0, 57344.0, propagate_nan=tl.PropagateNan.ALL)  # its largest number
    tl.store(dlogits_ptr + cols, dx.to(dlogits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _softcapped_ce_kernel(
    logits_ptr,  # (n_rows, V)
    targets_ptr,  # (n_rows,)
    weights_ptr,  # (n_rows,) float32; None for ones
    caps_ptr,  # (2,): c₊ and c₋; None for those of CAP
    dloss_ptr,  # (n_rows,) float32; None for no gradient
    loss_ptr,  # (n_rows,) float32
    dlogits_ptr,  # (n_rows, V); it may be the logits
    dcaps_ptr,  # (n_rows, 2) float32: each row's share
    board_ptr,  # (1 + n_rows * PARTS,) int32, all -1; None for one part
    stride_row,
    stride_target,
    stride_weight,
    stride_dloss,
    stride_dlogits,
    V: tl.constexpr,
    CAP: tl.constexpr,  # A, B, C, floor: z = floor + A σ((x + B) / C)
    z_loss: tl.constexpr,
    ignore_index: tl.constexpr,
    REACH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """A program does a row. Or a team of PARTS programs does: each keeps BLOCK_V columns in registers, posts their sum
    on a board and waits for the others' sums. No team waits in vain: parts are taken up in the order in which programs
    start (the board's first number counts them), so every team before it is complete, and will end without it."""
    program = tl.program_id(0).to(tl.int64)
    if PARTS > 1:
        program = tl.atomic_add(board_ptr, 1, sem="relaxed").to(tl.int64) + 1
    row, part = program // PARTS, (program % PARTS).to(tl.int32)
    first = part * BLOCK_V
    IN_REGISTERS: tl.constexpr = V <= BLOCK_V * PARTS
    if AHEAD > 0:
        # What the program AHEAD of this one will load is asked into L2: while they wait, programs ask for nothing.
        LINE: tl.constexpr = 8 * GROUP  # columns of 128 bytes
        later = tl.minimum(program + AHEAD, tl.num_programs(0) - 1)
        lines = tl.minimum(later % PARTS * BLOCK_V + tl.arange(0, BLOCK_V // LINE) * LINE, V - 1)
        lines_ptr = (logits_ptr + later // PARTS * stride_row + lines).to(tl.int64)
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines_ptr], tl.int32, False, 1)
    row_ptr = logits_ptr + row * stride_row
    target = tl.load(targets_ptr + row * stride_target).to(tl.int64)
    ignored = target == ignore_index
    known = (target >= 0) & (target < V)
    target = tl.where(known, target, 0).to(tl.int32)
    group = target // GROUP

    # Sums are of exp(ref - w). ref is the middle of w's range or, where that reaches too far, the row's least w.
    if caps_ptr is None:
        ref = CAP[0] / 2
        far = ref > REACH
    else:
        ref = tl.load(caps_ptr).to(tl.float32)
        far = tl.maximum(ref, tl.load(caps_ptr + 1).to(tl.float32)) > REACH
    if far:
        largest = float("-inf")
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            x = tl.load(row_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
            largest = tl.maximum(largest, tl.max(x, axis=0))
        ref = _softcapped_ce_cap(largest, 0.0, caps_ptr, CAP, 0)[2]

    if IN_REGISTERS:
        unscaled, total, up, down = _softcapped_ce_block(
            row_ptr, first, group, ref, caps_ptr, V, CAP, BLOCK_V, GROUP, SHARED
        )
    else:
        total = tl.zeros((BLOCK_V // GROUP,), tl.float32)
        up, down = total, total
        for start in range(0, V, BLOCK_V):
            some = _softcapped_ce_block(row_ptr, start, group, ref, caps_ptr, V, CAP, BLOCK_V, GROUP, SHARED)
            total, up, down = total + some[1], up + some[2], down + some[3]

    # The target's group, in the program that has it.
    cols = group * GROUP + tl.arange(0, GROUP)
    mine = PARTS == 1 or (group * GROUP >= first) & (group * GROUP < first + BLOCK_V)
    inside = (cols < V) & mine
    here, beside = inside & (cols == target), inside & (cols != target)
    x = tl.load(row_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    e, slope, w, dcap = _softcapped_ce_cap(x, ref, caps_ptr, CAP, 0)
    e_target = tl.where(known | ignored, tl.sum(tl.where(here, e, 0.0), axis=0), float("nan"))
    others = tl.sum(total, axis=0) + tl.sum(tl.where(beside, e, 0.0), axis=0)
    total = others + e_target
    if PARTS > 1:
        # The mov keeps what is in registers as it is. The compiler would move its last product behind the wait, and so
        # keep three factors instead (226 registers a thread instead of 96).
        unscaled = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [unscaled], tl.float32, is_pure=False, pack=1)
        places = tl.arange(0, triton.next_power_of_2(PARTS))
        row_board_ptr = board_ptr + 1 + row * PARTS
        # A sum is its own flag, as no other data hangs on it: without a sign bit even NaN is no negative integer.
        tl.atomic_xchg(row_board_ptr + part, tl.abs(total).to(tl.int32, bitcast=True), sem="relaxed")
        posted = tl.load(row_board_ptr + places, mask=places < PARTS, other=0, volatile=True)
        while tl.min(posted, axis=0) < 0:
            posted = tl.load(row_board_ptr + places, mask=places < PARTS, other=0, volatile=True)
        sums = posted.to(tl.float32, bitcast=True)
        others += tl.sum(tl.where(places == part, 0.0, sums), axis=0)
        total = tl.sum(sums, axis=0)

    top = CAP[0] + CAP[3] if caps_ptr is None else tl.load(caps_ptr).to(tl.float32)
    lse = top - ref + tl.log(total)
    weight = 1.0 if weights_ptr is None else tl.load(weights_ptr + row * stride_weight).to(tl.float32)
    loss = _log1p(others / e_target)
    gap = tl.sum(tl.where(here, w, 0.0), axis=0) - ref
    loss = tl.where(far & (gap > REACH), gap + tl.log(total), loss)  # where e_target may have underflowed
    loss = tl.where(ignored, 0.0, weight * (loss + z_loss * lse * lse))
    tl.store(loss_ptr + row, loss, mask=mine)

    if dloss_ptr is not None:
        SLOPE: tl.constexpr = CAP[0] / CAP[2]
        dloss = tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)
        dloss = tl.where(ignored, 0.0, dloss * weight)
        factor = dloss * (1.0 + 2.0 * z_loss * lse) / total
        dz_target = dloss * (2.0 * z_loss * lse * (e_target / total) - others / total)
        out_ptr = dlogits_ptr + row * stride_dlogits
        for start in range(0, BLOCK_V if IN_REGISTERS else V, BLOCK_V):
            block = first + start + tl.arange(0, BLOCK_V)
            if not IN_REGISTERS:
                unscaled = _softcapped_ce_block(row_ptr, start, group, ref, caps_ptr, V, CAP, BLOCK_V, GROUP, SHARED)[0]
            _softcapped_ce_store(out_ptr, block, unscaled * (factor * SLOPE), (block < V) & (block // GROUP != group))
        dz = tl.where(here, dz_target, e * factor)
        _softcapped_ce_store(out_ptr, cols, dz * slope * SLOPE, inside)
        if caps_ptr is not None:
            dcap = tl.where(inside, dz * dcap, 0.0)
            up = tl.sum(up, axis=0) * factor + tl.sum(tl.where(x > 0, dcap, 0.0), axis=0)
            down = tl.sum(down, axis=0) * factor + tl.sum(tl.where(x > 0, 0.0, dcap), axis=0)
            tl.store(dcaps_ptr + row * 2, up)
            tl.store(dcaps_ptr + row * 2 + 1, down)


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
    logits: Tensor, targets: Tensor, weights: Tensor | None, caps: Tensor | None, dloss: Tensor | None,
    cap: list[float], z_loss: float, ignore_index: int, grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses (n_rows,); and for a dloss, that is, for a gradient: dlogits (n_rows, V) and, with caps, dcaps (2,)."""
    shape = (0,) if dloss is None else logits.shape
    dlogits = torch.empty(shape, dtype=grad_dtype or logits.dtype, device=logits.device)
    loss, dcaps = _launch(logits, targets, weights, caps, dloss, dlogits, cap, z_loss, ignore_index)
    return loss, dlogits, dcaps


@_as_given
def _backward(
    dloss: Tensor, logits: Tensor, targets: Tensor, weights: Tensor | None, caps: Tensor | None,
    cap: list[float], z_loss: float, ignore_index: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sums are taken again: they cost no byte, and nothing but the logits has to be saved for them."""
    return _forward(logits, targets, weights, caps, dloss, cap, z_loss, ignore_index, None)[1:]


def _softcapped_ce_in_place(
    logits: Tensor, targets: Tensor, weights: Tensor | None, dloss: Tensor,
    cap: list[float], z_loss: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    """Losses; the logits become their gradient."""
    return _launch(logits, targets, weights, None, dloss, logits, cap, z_loss, ignore_index)[0]


def _launch(logits, targets, weights, caps, dloss, dlogits, cap, z_loss, ignore_index) -> tuple[Tensor, Tensor]:
    (n_rows, V), device = logits.shape, logits.device
    way = "loss" if dloss is None else _softcapped_ce_way(logits, dlogits.dtype, caps is None and cap[0] <= 2 * REACH)
    launch = {"AHEAD": 0} | LAUNCH[way]
    columns_per_warp, group = launch.pop("columns_per_warp"), 16 // logits.itemsize
    block = launch["BLOCK_V"] = max(min(launch["BLOCK_V"], triton.next_power_of_2(V)), 32 * group)
    if logits.dtype == torch.float32:
        launch["SHARED"] = 0
    parts = triton.cdiv(V, block) if way == "gradient by a team" else 1
    board = torch.full((1 + n_rows * parts,), -1, dtype=torch.int32, device=device) if parts > 1 else None
    loss = torch.empty(n_rows, dtype=torch.float32, device=device)
    dcaps = torch.empty((n_rows, 0 if caps is None or dloss is None else 2), dtype=torch.float32, device=device)
    _softcapped_ce_kernel[(n_rows * parts,)](
        logits, targets, weights, caps, dloss, loss, dlogits, dcaps, board, logits.stride(0), targets.stride(0),
        *(0 if t is None else t.stride(0) for t in (weights, dloss)), dlogits.stride(0), V, tuple(cap), z_loss,
        ignore_index, REACH, parts, GROUP=group, **launch, num_warps=max(1, block // columns_per_warp),
    )  # fmt: skip
    return loss, dcaps.sum(0)


def _softcapped_ce_way(logits: Tensor, grad_dtype: torch.dtype, simple: bool) -> str:
    """The entry of LAUNCH for a gradient. Where a row is too long for the registers of a program, a team of programs
    shares it, which wait for one another (the interpreter runs them in turn), or it is read again in a second loop.

    simple: no tensor caps, whose derivatives need twice the registers, and no row maximum.
    """
    V, group = logits.shape[1], 16 // logits.itemsize
    if simple and V <= LAUNCH["gradient"]["BLOCK_V"]:
        return "gradient in 8 bits" if grad_dtype.itemsize == 1 else "gradient"
    aligned = V % group == 0 and logits.stride(0) % group == 0  # else accesses are of one column, and loops do better
    return "gradient by a team" if simple and aligned and not INTERPRETED else "gradient in loops"


def _forward_eager(logits, targets, weights, caps, dloss, cap, z_loss, ignore_index, grad_dtype):
    known, ignored = (targets >= 0) & (targets < logits.shape[1]), targets == ignore_index
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(ignored[:, None], 0.0)
    A, B, C, floor = cap
    if caps is not None:
        c = torch.where((caps > 0).all(), caps, torch.nan)
        c = torch.where(x > 0, c[0], c[1])
        A, B, C, floor = 2 * c, 0.0, c / 2, -c
    u = (x + B) / C
    z = floor + A / 2 + A / 2 * torch.tanh(u / 2)
    slope = A / C * torch.sigmoid(u) * torch.sigmoid(-u)
    t = torch.where(known, targets, 0).long()[:, None]
    lse, p = torch.logsumexp(z, 1), torch.softmax(z, 1)
    w = torch.ones_like(lse) if weights is None else weights
    w = torch.where(ignored, 0.0, torch.where(known, w, torch.nan))
    loss = w * (z_loss * lse.square() - torch.log_softmax(z, 1).gather(1, t)[:, 0])
    dtype = grad_dtype or logits.dtype
    if dloss is None:
        return loss, logits.new_empty(0, dtype=dtype), x.new_zeros(0)
    rise, others = 2 * z_loss * lse[:, None], p.scatter(1, t, 0.0).sum(1, keepdim=True)
    dz = torch.where(ignored, 0.0, w * dloss)[:, None] * ((1 + rise) * p).scatter(1, t, rise * p.gather(1, t) - others)
    dcaps = x.new_zeros(0)
    if caps is not None:
        dcap = dz * (torch.tanh(u / 2) - u / 2 * slope)
        dcaps = torch.stack([dcap[side].sum() for side in (x > 0, x <= 0)])
    dx, largest = dz * slope, torch.finfo(dtype).max
    return loss, (dx.clamp(-largest, largest) if dtype == torch.float8_e5m2 else dx).to(dtype), dcaps


# Under TRITON_INTERPRET=1 the decorator above gave an interpreted function, and the CPU runs the Triton code itself.
INTERPRETED = not isinstance(_softcapped_ce_kernel, triton.runtime.JITFunction)

_op = torch.library.custom_op(f"{NAMESPACE}::softcapped_ce", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    f"{NAMESPACE}::softcapped_ce_backward", _backward, mutates_args=(), device_types="cuda"
)
_op_in_place = torch.library.custom_op(
    f"{NAMESPACE}::softcapped_ce_in_place", _softcapped_ce_in_place, mutates_args=("logits",), device_types="cuda"
)


@_op.register_kernel("cpu")
def _forward_cpu(logits, *args):
    return (_forward if INTERPRETED and logits.dtype != torch.float64 else _forward_eager)(logits, *args)


@_op_backward.register_kernel("cpu")
def _backward_cpu(dloss, logits, targets, weights, caps, *numbers):
    return _forward_cpu(logits, targets, weights, caps, dloss, *numbers, None)[1:]


@_op_in_place.register_kernel("cpu")
def _softcapped_ce_in_place_cpu(logits, targets, weights, dloss, *numbers):
    if INTERPRETED and logits.dtype != torch.float64:
        return _softcapped_ce_in_place(logits, targets, weights, dloss, *numbers)
    loss, dlogits, _ = _forward_eager(logits, targets, weights, None, dloss, *numbers, None)
    logits.copy_(dlogits)
    return loss


@_op.register_fake
def _forward_fake(logits, targets, weights, caps, dloss, cap, z_loss, ignore_index, grad_dtype):
    wide = torch.promote_types(logits.dtype, torch.float32)
    dlogits = logits.new_empty((0,) if dloss is None else logits.shape, dtype=grad_dtype or logits.dtype)
    dcaps = logits.new_empty(0 if caps is None or dloss is None else 2, dtype=wide)
    return logits.new_empty(logits.shape[0], dtype=wide), dlogits, dcaps


@_op_backward.register_fake
def _backward_fake(dloss, logits, targets, weights, caps, *numbers):
    return _forward_fake(logits, targets, weights, caps, dloss, *numbers, None)[1:]


@_op_in_place.register_fake
def _softcapped_ce_in_place_fake(logits, *args):
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))


def _setup_context(ctx, inputs, output):
    *tensors, promised, ctx.cap, ctx.z_loss, ctx.ignore_index, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for dlogits' own gradient would cost as much as writing it did
    ctx.has_caps, ctx.written = tensors[3] is not None, promised is not None
    ctx.save_for_backward(*((promised, *output[1:]) if ctx.written else tensors))


def _autograd(ctx, dloss, *_):
    if ctx.written:
        if torch.is_grad_enabled():
            got = "create_graph=True with upstream, whose gradient is written already and would count as a constant"
            raise RuntimeError(f"softcapped_ce: expected a backward() that is not differentiated, got {got}")
        promised, dlogits, dcaps = ctx.saved_tensors
        both = (t[:1] if t.stride(0) == 0 else t for t in (dloss, promised))  # expanded: one number for all rows
        kept = torch.isclose(*both, 1e-5, 0.0, equal_nan=True).all()
        torch._assert_async(kept, "softcapped_ce: backward() brought another gradient than upstream had promised")
    else:
        dlogits, dcaps = _op_backward(dloss, *ctx.saved_tensors, ctx.cap, ctx.z_loss, ctx.ignore_index)
    return dlogits, None, None, dcaps if ctx.has_caps else None, *(None,) * 5


_op.register_autograd(_autograd, setup_context=_setup_context)


def softcapped_ce(
    logits: Tensor,
    targets: Tensor,
    softcap: float | tuple[float, float, float] | Tensor = 30.0,
    softcap_negative: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    upstream: float | None = None,
    check_targets: bool = False,
) -> Tensor:
    """Cross-entropy of capped logits against targets, as torch.nn.functional.cross_entropy.

    logits: (n_rows, V) bfloat16, float16 or float32, each row's columns adjacent; float64 on CPU only.
    targets: (n_rows,) int64 or int32, in [0, V) or ignore_index, whose rows count for nothing.
    softcap: 0 < c <= 1e4, for c tanh(x / c); (A, B, C), for A σ((x + B) / C); or a learnt c, a float tensor of one
        element, for all logits, or for the positive ones if there is a softcap_negative, a tensor like it.
    weights: (n_rows,) float32, factors of the rows' losses. They get no gradient.
    reduction: "none" gives (n_rows,), "sum" and "mean" a scalar; the mean is over the weights of the rows not ignored,
        NaN if none is.
    z_loss: coefficient of lse², lse the logsumexp of the capped logits.
    upstream: the gradient that backward() will bring to this result, where the caller knows it: 1.0 for
        loss.backward(), 0.125 for (loss / 8).backward(). The gradient is then written while the logits are read for
        the loss, and backward() hands it out. Should it bring anything else (by more than 1e-5 of it), it raises
        RuntimeError on a CPU and ends in a device-side assertion on a GPU; and for create_graph=True it raises
        RuntimeError. None: any gradient is right; so it is, and the promise is not needed, inside torch.compile before
        torch 2.11.
    check_targets: raise for a target out of range, which makes the host wait; else its row's loss is NaN.
    Returns the loss in nats, float32 (float64 for float64 logits).
    Differentiable once, in reverse mode, in logits and caps.
    Raises ValueError for a shape, layout, device or number out of range, TypeError for a dtype or another type.
    """
    name = "softcapped_ce"
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: expected reduction 'mean', 'sum' or 'none', got {reduction!r}")
    cap, caps = _softcapped_ce_validate(name, logits, targets, softcap, softcap_negative, weights, ignore_index, z_loss)
    if check_targets:
        _softcapped_ce_check_targets(name, targets, logits.shape[1], ignore_index)
    wide, w, promised = torch.promote_types(logits.dtype, torch.float32), None, None
    if upstream is not None:
        if not _softcapped_ce_is_number(upstream):
            raise TypeError(f"{name}: expected upstream as a number, got {type(upstream).__name__}")
        if not abs(upstream) <= torch.finfo(wide).max:
            raise ValueError(f"{name}: expected a finite upstream in {wide}, got {upstream}")
    if reduction == "mean":
        w = (targets != ignore_index).to(wide)
        w = w if weights is None else w * weights
    wanted = torch.is_grad_enabled() and (logits.requires_grad or (caps is not None and caps.requires_grad))
    if upstream is not None and wanted and (PROMISES_COMPILE or not torch.compiler.is_compiling()):
        promised = torch.full((), float(upstream), dtype=wide, device=logits.device)
        promised = (promised if w is None else promised / w.sum()).expand(logits.shape[0])
    _refuse_tangents(name, logits, weights, caps)
    loss = _op(logits, targets, weights, caps, promised, cap, float(z_loss), ignore_index, None)[0]
    return _softcapped_ce_reduce(loss, w, reduction)


def softcapped_ce_and_grad(
    logits: Tensor,
    targets: Tensor,
    softcap: float | tuple[float, float, float] = 30.0,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    grad_dtype: torch.dtype | None = None,
    grad_scale: float = 1.0,
    inplace: bool = False,
    check_targets: bool = False,
) -> tuple[Tensor, Tensor]:
    """The losses of softcapped_ce(..., reduction="none") and grad_scale times the gradient of their sum, in one pass.

    For a backward of your own: neither result is followed by autograd. Arguments as of softcapped_ce, but for
    grad_dtype: logits' dtype, or torch.float8_e5m2, in which values beyond ±57,344 become that, and for
    inplace: write the gradient over the logits, and return them as dlogits.
    Returns losses (n_rows,) float32 and dlogits (n_rows, V). Raises as softcapped_ce does, and for inplace with another
    grad_dtype, with logits that require grad or with rows that overlap.
    """
    name = "softcapped_ce_and_grad"
    if isinstance(softcap, Tensor):
        raise TypeError(f"{name}: expected softcap in numbers (softcapped_ce learns caps), got a tensor")
    cap, _ = _softcapped_ce_validate(name, logits, targets, softcap, None, weights, ignore_index, z_loss)
    if grad_dtype not in ((None, logits.dtype) if inplace else (None, logits.dtype, torch.float8_e5m2)):
        or_8_bits = " with inplace" if inplace else " or torch.float8_e5m2"
        raise TypeError(f"{name}: expected grad_dtype {logits.dtype}{or_8_bits}, got {grad_dtype}")
    if inplace and logits.requires_grad:
        raise ValueError(f"{name}: expected logits that do not require grad with inplace, got logits that do")
    if inplace and logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(f"{name}: expected rows that do not overlap with inplace, got strides {logits.stride()}")
    if check_targets:
        _softcapped_ce_check_targets(name, targets, logits.shape[1], ignore_index)
    wide = torch.promote_types(logits.dtype, torch.float32)
    dloss = torch.full((), grad_scale, dtype=wide, device=logits.device).expand(logits.shape[0])
    if inplace:
        return _op_in_place(logits, targets, weights, dloss, cap, float(z_loss), ignore_index), logits
    logits = logits.detach()
    return _op(logits, targets, weights, None, dloss, cap, float(z_loss), ignore_index, grad_dtype)[:2]


def _softcapped_ce_validate(
    name, logits, targets, softcap, softcap_negative, weights, ignore_index, z_loss
) -> tuple[list[float], Tensor | None]:
    """A, B, C and floor of z = floor + A σ((x + B) / C); and tensor caps as (2,), for which A / C = 4."""
    for what, tensor in (("logits", logits), ("targets", targets), ("weights", weights)):
        if not isinstance(tensor, Tensor) and (tensor is not None or what != "weights"):
            raise TypeError(f"{name}: expected {what} as a tensor, got {type(tensor).__name__}")
    got, wide = tuple(logits.shape), torch.promote_types(logits.dtype, torch.float32)
    if logits.ndim != 2 or got[-1] == 0:
        raise ValueError(f"{name}: expected logits of shape (n_rows, V), got {got}")
    dtypes = (torch.bfloat16, torch.float16, torch.float32, *((torch.float64,) if logits.device.type == "cpu" else ()))
    if logits.dtype not in dtypes:
        expected = "logits in bfloat16, float16 or float32 (float64 on CPU only)"
        raise TypeError(f"{name}: expected {expected}, got {logits.dtype} on {logits.device}")
    if logits.stride(1) != 1 and got[1] != 1:
        raise ValueError(f"{name}: expected logits with adjacent columns, stride 1, got {logits.stride()}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected targets in int64 or int32, got {targets.dtype}")
    for what, tensor in (("targets", targets), ("weights", weights)):
        if tensor is not None and tensor.shape != got[:1]:
            raise ValueError(f"{name}: expected {what} of shape ({got[0]},), one a row, got {tuple(tensor.shape)}")
    if weights is not None and weights.dtype != wide:
        raise TypeError(f"{name}: expected weights in {wide}, got {weights.dtype}")
    if weights is not None and weights.requires_grad:
        raise ValueError(f"{name}: expected weights that require no grad (they get none), got some that do")
    tensors = {"targets": targets, "weights": weights, "softcap": softcap, "softcap_negative": softcap_negative}
    for what, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device != logits.device:
            raise ValueError(f"{name}: expected {what} on {logits.device}, got {tensor.device}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"{name}: expected ignore_index as an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{name}: expected ignore_index in 64 bits, got {ignore_index}")
    if not _softcapped_ce_is_number(z_loss):
        raise TypeError(f"{name}: expected z_loss as a number, got {type(z_loss).__name__}")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"{name}: expected z_loss >= 0, got {z_loss}")
    return _softcapped_ce_validate_caps(name, softcap, softcap_negative, wide)


def _softcapped_ce_validate_caps(name, softcap, softcap_negative, wide) -> tuple[list[float], Tensor | None]:
    if softcap_negative is not None and not isinstance(softcap_negative, Tensor):
        raise TypeError(f"{name}: expected softcap_negative as a tensor, got {type(softcap_negative).__name__}")
    for what, tensor in (("softcap", softcap), ("softcap_negative", softcap_negative)):
        if isinstance(tensor, Tensor) and not (tensor.numel() == 1 and tensor.is_floating_point()):
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{name}: expected {what}, as a tensor, to be one float, got {got}")
    if isinstance(softcap, Tensor):
        both = (softcap, softcap if softcap_negative is None else softcap_negative)
        return [4.0, 0.0, 1.0, 0.0], torch.cat([c.reshape(1) for c in both]).to(wide)
    numbers = softcap if isinstance(softcap, tuple) else (softcap,)
    for number in numbers:  # a tensor among them would lose its gradient in silence
        if not _softcapped_ce_is_number(number):
            expected = "softcap as a number, a tuple of three or a tensor"
            raise TypeError(f"{name}: expected {expected}, got {type(number).__name__}")
    if softcap_negative is not None:
        raise TypeError(f"{name}: expected softcap as a tensor beside softcap_negative, got {softcap!r}")
    inf = float("inf")
    if isinstance(softcap, tuple):
        if len(softcap) != 3 or not (0 < softcap[0] <= LARGEST and -inf < softcap[1] < inf and 0 < softcap[2] < inf):
            expected = f"finite softcap (A, B, C) with 0 < A <= {LARGEST:g} and C > 0"
            raise ValueError(f"{name}: expected {expected}, got {softcap}")
        return [float(softcap[0]), float(softcap[1]), float(softcap[2]), 0.0], None
    if not 0 < softcap <= LARGEST:
        raise ValueError(f"{name}: expected 0 < softcap <= {LARGEST:g}, got {softcap}")
    return [2.0 * softcap, 0.0, 0.5 * softcap, -float(softcap)], None


def _softcapped_ce_is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _softcapped_ce_check_targets(name: str, targets: Tensor, V: int, ignore_index: int) -> None:
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= V))
    if bad.any():
        row = int(bad.int().argmax())
        raise ValueError(f"{name}: expected targets in [0, {V}), got {int(targets[row])} in row {row}")


# --- not needed when lifted ---

SIZES = {
    "odd": (5, 1025),
    "sigmoid": (7, 515),
    "two caps": (6, 1000),
    "wide": (4, 9001),  # more than one block, with a ragged tail
    "high cap": (5, 260),  # sums need the row's maximum
    "record": (98304, 8192),
    "record, 50304": (16384, 50304),
    "large": (262400, 8192),
}


def softcapped_ce_inputs(size: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    """Logits N(0, 15²), which the cap bends; targets on the first and last column, one of them unlikely; one row
    confident, one ignored. The other arguments depend on V, so that the small sizes together use all of them."""
    n_rows, V = size
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(size, generator=generator, device=device).mul_(15 if V != 260 else 45).to(dtype)
    targets = torch.randint(V, (n_rows,), generator=generator, device=device)
    weights = 0.5 + torch.rand(n_rows, generator=generator, device=device)
    targets[0], targets[2], targets[-1] = 0, -100, V - 1
    logits[1] /= 15
    logits[1, targets[1]], logits[0, 0], logits[0, -1] = 16.0, -60.0, 75.0
    extra: dict[str, object] = {"softcap": 30.0}
    if V == 1025:
        extra["weights"] = weights
    elif V == 515:
        extra = {"softcap": (23.0, 5.0, 7.5), "weights": weights, "z_loss": 1e-3}
    elif V == 1000:
        caps = (torch.full((1,), c, device=device, requires_grad=True) for c in (27.0, 21.0))
        extra = {**dict(zip(("softcap", "softcap_negative"), caps, strict=True)), "z_loss": 1e-3}
    elif V == 260:
        extra["softcap"] = 100.0
        logits[0, 0], logits[:, -1] = -180.0, 225.0
    return {"logits": logits.requires_grad_(), "targets": targets, "reduction": "none", **extra}


def softcapped_ce_cost(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    """Both directions together: the logits read once, their gradient written once."""
    n_rows, V = size
    logits, rows = n_rows * V * dtype.itemsize, n_rows * (8 + 4)  # targets and loss
    return {
        "bytes_forward": logits + rows,
        "bytes_backward": logits,
        "flops_forward": 15 * n_rows * V,
        "flops_backward": 15 * n_rows * V,
    }


def _softcapped_ce_prove_one_pass() -> None:
    """What the promise of an upstream gradient and a gradient in fp8 are worth, at the record size."""
    size, dtype = SIZES["record"], torch.bfloat16
    inputs = softcapped_ce_inputs(size, dtype, "cuda")
    logits, targets = inputs["logits"], inputs["targets"]
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    roof = 2 * source.numel() / triton.testing.do_bench(source.clone, return_mode="median")
    calls = {
        "loss and gradient, upstream=1.0": (lambda: softcapped_ce(logits, targets, upstream=1.0).backward(), 2),
        "softcapped_ce_and_grad": (lambda: softcapped_ce_and_grad(logits, targets), 2),
        "the same in fp8": (lambda: softcapped_ce_and_grad(logits, targets, grad_dtype=torch.float8_e5m2), 1),
    }
    for what, (call, written) in calls.items():
        ms = triton.testing.do_bench(call, grad_to_none=[logits], return_mode="median")
        speed = logits.numel() * (2 + written) / ms
        print(f"{what} {size}: {ms:.3f} ms, {speed / 1e9:.2f} TB/s ({speed / roof:.0%} of a copy's)")


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
    _prove(softcapped_ce, softcapped_ce_ref, softcapped_ce_inputs, softcapped_ce_cost, SIZES)
    if torch.cuda.is_available():
        _softcapped_ce_prove_one_pass()
