"""Cross-entropy on capped logits to which weighted rows of a table are added: loss and gradient in one read of both.

    z = c tanh(x / c) + sum_k f_ik T[r_ik, :],    x = logits,  c = softcap,  T = table,  r = rows,  f = factors
    loss_i = weights_i (logsumexp_j z_ij - z_it),    t = targets[i],    p = softmax(z)
    dx_ij = dloss_i weights_i (p_ij - [j = t]) (1 - tanh(x_ij / c)^2)

The table holds, one under the other, the log-probabilities of the next token after every context (n-grams, hashed);
a token's loss takes K rows of it: one an order that is summed, or one alone, of the order that was backed off to. The
bias comes after the cap, so that the cap holds for what the network says; the table gets no gradient.
With E = exp(2 x / c) and s = 1 / (1 + E) the cap is c - 2 c s, exact near the cap, where the probable columns lie, and
its derivative is 4 E s^2. Sums are taken relative to the row's largest z, so any bias may be added. For a confident row
p_t - 1 is the difference of nearly equal numbers; it is minus the share of all other columns instead.

logits (n_rows, V) float32, bfloat16 or float16, columns adjacent, any row stride; targets (n_rows,) int64 or int32;
table (R, V) of any of those dtypes, columns adjacent; rows (n_rows, K) int64 or int32 in [-1, R), -1 for no row;
factors (n_rows, K) float32, any strides (so K numbers may be expanded); weights (n_rows,) float32; loss float32.
Everything in between is float32. float64 runs on the CPU only, in plain PyTorch.
Must move: the logits in once, their gradient out once, and K rows of the table in for each token; nothing of shape
(n_rows, V) is made in between. As dloss is known only then, the backward reads logits and table again by default; a
caller who knows it before (upstream=1.0) saves that. Rows longer than BLOCK_V columns are read twice all the same.
Replaces: softcap, a gather and a weighted addition a table, cross_entropy: some ten passes over (n_rows, V).
Refuses: other dtypes, columns that are not adjacent, numbers out of range, a table, factors or weights that want a
gradient. What only the device knows is not checked, as that would stall it: a target outside [0, V) that is not
ignore_index, or a row outside [-1, R), makes its row NaN (but see check_targets). An ignored row's loss is 0.
From: the n-gram logit bias of taka6745/paramgolf, whose tables are made by niblick.model.ngram_tables.
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
# Columns that a program holds at once, at most, and a warp of it, by the bytes of a table's entry. NVIDIA H200,
# 2026-11-20.
LAUNCH = {"BLOCK_V": 8192, "columns_per_warp": {2: 2048, 4: 1024}}
LARGEST = 1e4  # cap: beyond it float32 rounds losses, by some 2e-7 c nats, to nothing useful
MAX_ROWS = 8  # of the table for a token: the kernel's code grows with them
# The partitioner of torch 2.9 finds no cut through a gradient that the forward has made.
PROMISES_COMPILE = torch.__version__ >= (2, 11)


def ngram_bias_ref(
    logits: Tensor,
    targets: Tensor,
    table: Tensor,
    rows: Tensor,
    factors: Tensor,
    softcap: float = 30.0,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    upstream: float | None = None,  # a promise to the kernel; it changes no value
    check_targets: bool = False,
) -> Tensor:
    """The specification, in float32 or, for float64 logits, in float64."""
    z = _ngram_bias_logits(logits, table, rows, factors, softcap)
    known, ignored = (targets >= 0) & (targets < logits.shape[1]), targets == ignore_index
    loss = -torch.log_softmax(z, 1).gather(1, torch.where(known, targets, 0).long()[:, None])[:, 0]
    w = torch.ones_like(loss) if weights is None else weights.to(loss.dtype)
    w = torch.where(ignored, 0.0, w)
    loss = torch.where(ignored, 0.0, torch.where(known, w * loss, torch.nan))
    return _ngram_bias_reduce(loss, w, reduction)


def _ngram_bias_logits(logits: Tensor, table: Tensor, rows: Tensor, factors: Tensor, softcap: float) -> Tensor:
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = softcap * torch.tanh(x / softcap)
    for index, factor in zip(rows.long().unbind(1), factors.to(x.dtype).unbind(1), strict=True):
        known = (index >= 0) & (index < len(table))
        factor = torch.where(known, factor, torch.where(index == -1, 0.0, torch.nan))
        z = z + factor[:, None] * table[torch.where(known, index, 0)].to(x.dtype)
    return z


def _ngram_bias_reduce(loss: Tensor, w: Tensor | None, reduction: str) -> Tensor:
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
def _reciprocal(x, COMPILED: tl.constexpr):
    if COMPILED:  # one instruction instead of the eight of a division; x is never denormal
        asm: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def _ngram_bias_columns(
    row_ptr, table_ptr, index_ptr, factor_ptr, stride_table, stride_index, stride_factor, R, cols, inside,
    softcap: tl.constexpr, K: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """(z - softcap) log2(e) of some columns of a row, -inf outside; and a quarter of the cap's derivative."""
    LOG2E: tl.constexpr = 1.4426950408889634
    x = tl.load(row_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    bias = 0.0
    for k in tl.static_range(K):
        index = tl.load(index_ptr + k * stride_index).to(tl.int64)
        factor = tl.load(factor_ptr + k * stride_factor).to(tl.float32)
        known = (index >= 0) & (index < R)
        factor = tl.where(known, factor, tl.where(index == -1, 0.0, float("nan")))
        # Masked, not multiplied by 0: a row that is not asked for is not read either.
        bias += factor * tl.load(table_ptr + index * stride_table + cols, mask=inside & known, other=0.0).to(tl.float32)
    u = tl.minimum(x * (2.0 * LOG2E / softcap), 126.0, propagate_nan=tl.PropagateNan.ALL)
    E = tl.exp2(u)
    s = _reciprocal(1.0 + E, COMPILED)
    z = bias * LOG2E - (2.0 * LOG2E * softcap) * s
    return tl.where(inside, z, float("-inf")), s * (E * s)


@triton.jit
def _ngram_bias_kernel(
    logits_ptr,  # (n_rows, V)
    targets_ptr,  # (n_rows,)
    table_ptr,  # (R, V)
    rows_ptr,  # (n_rows, K)
    factors_ptr,  # (n_rows, K) float32
    weights_ptr,  # (n_rows,) float32; None for ones
    dloss_ptr,  # (n_rows,) float32; None for no gradient
    loss_ptr,  # (n_rows,) float32
    dlogits_ptr,  # (n_rows, V)
    R,
    stride_row,
    stride_target,
    stride_table,
    stride_rows,
    stride_index,
    stride_factors,
    stride_factor,
    stride_weight,
    stride_dloss,
    V: tl.constexpr,
    K: tl.constexpr,
    softcap: tl.constexpr,
    ignore_index: tl.constexpr,
    COMPILED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    index_ptr, factor_ptr = rows_ptr + row * stride_rows, factors_ptr + row * stride_factors
    target = tl.load(targets_ptr + row * stride_target).to(tl.int64)
    ignored = target == ignore_index
    known = (target >= 0) & (target < V)
    target = tl.where(known, target, 0).to(tl.int32)
    # The target's own column, by itself: among the others it would have to be picked out of registers.
    z_target, slope_target = _ngram_bias_columns(
        row_ptr, table_ptr, index_ptr, factor_ptr, stride_table, stride_index, stride_factor, R, target, target < V,
        softcap, K, COMPILED,
    )  # fmt: skip

    if V <= BLOCK_V:
        cols = tl.arange(0, BLOCK_V)
        z, slope = _ngram_bias_columns(
            row_ptr, table_ptr, index_ptr, factor_ptr, stride_table, stride_index, stride_factor, R, cols, cols < V,
            softcap, K, COMPILED,
        )  # fmt: skip
        top = tl.max(z, axis=0)
        e = tl.exp2(z - top)
        others = tl.sum(tl.where(cols == target, 0.0, e), axis=0)
        unscaled = e * slope
    else:
        top, others = float("-inf"), 0.0
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            z, slope = _ngram_bias_columns(
                row_ptr, table_ptr, index_ptr, factor_ptr, stride_table, stride_index, stride_factor, R, cols, cols < V,
                softcap, K, COMPILED,
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(z, axis=0))
            e = tl.sum(tl.where(cols == target, 0.0, tl.exp2(z - higher)), axis=0)
            others = others * tl.exp2(top - higher) + e
            top = higher

    gap = top - z_target
    e_target = tl.where(known | ignored, tl.exp2(-gap), float("nan"))
    total = others + e_target
    # Far below the top e_target underflows, and log1p(others / e_target) is log(total) + gap to rounding.
    loss = tl.where(gap > 60.0, 0.6931471805599453 * gap + tl.log(total), _log1p(others / e_target))
    weight = 1.0 if weights_ptr is None else tl.load(weights_ptr + row * stride_weight).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, weight * loss))

    if dloss_ptr is not None:
        dloss = tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)
        factor = tl.where(ignored, 0.0, 4.0 * dloss * weight) / total
        dx_target = -others * slope_target * factor
        out_ptr = dlogits_ptr + row * V
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            if V > BLOCK_V:
                z, slope = _ngram_bias_columns(
                    row_ptr, table_ptr, index_ptr, factor_ptr, stride_table, stride_index, stride_factor, R, cols,
                    cols < V, softcap, K, COMPILED,
                )  # fmt: skip
                unscaled = tl.exp2(z - top) * slope
            dx = tl.where(cols == target, dx_target, unscaled * factor)
            tl.store(out_ptr + cols, dx.to(dlogits_ptr.dtype.element_ty), mask=cols < V)


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
    logits: Tensor, targets: Tensor, table: Tensor, rows: Tensor, factors: Tensor, weights: Tensor | None,
    dloss: Tensor | None, softcap: float, ignore_index: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses (n_rows,); and for a dloss, that is, for a gradient: dlogits (n_rows, V)."""
    (n_rows, V), device = logits.shape, logits.device
    loss = torch.empty(n_rows, dtype=torch.float32, device=device)
    dlogits = torch.empty((0,) if dloss is None else (n_rows, V), dtype=logits.dtype, device=device)
    block = max(min(LAUNCH["BLOCK_V"], triton.next_power_of_2(V)), 256)
    if n_rows:
        _ngram_bias_kernel[(n_rows,)](
            logits, targets, table, rows, factors, weights, dloss, loss, dlogits, len(table), logits.stride(0),
            targets.stride(0), table.stride(0), *rows.stride(), *factors.stride(),
            *(0 if t is None else t.stride(0) for t in (weights, dloss)), V, rows.shape[1], softcap, ignore_index,
            not INTERPRETED, block, num_warps=max(1, block // LAUNCH["columns_per_warp"][table.itemsize]),
        )  # fmt: skip
    return loss, dlogits


@_as_given
def _backward(
    dloss: Tensor, logits: Tensor, targets: Tensor, table: Tensor, rows: Tensor, factors: Tensor,
    weights: Tensor | None, softcap: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    """The sums are taken again: they cost no byte, and nothing but the inputs has to be saved for them."""
    return _forward(logits, targets, table, rows, factors, weights, dloss, softcap, ignore_index)[1]


def _forward_eager(logits, targets, table, rows, factors, weights, dloss, softcap, ignore_index):
    z = _ngram_bias_logits(logits, table, rows, factors, softcap)
    known, ignored = (targets >= 0) & (targets < z.shape[1]), targets == ignore_index
    t = torch.where(known, targets, 0).long()[:, None]
    w = z.new_ones(len(z)) if weights is None else weights
    w = torch.where(ignored, 0.0, torch.where(known, w, torch.nan))
    loss = torch.where(ignored, 0.0, -w * torch.log_softmax(z, 1).gather(1, t)[:, 0])
    if dloss is None:
        return loss, logits.new_empty(0)
    p, u = torch.softmax(z, 1), logits.to(z.dtype) * (2.0 / softcap)
    dz = (w * dloss)[:, None] * p.scatter(1, t, -p.scatter(1, t, 0.0).sum(1, keepdim=True))
    return loss, (dz * (4 * torch.sigmoid(u) * torch.sigmoid(-u))).to(logits.dtype)


# Under TRITON_INTERPRET=1 the decorator above gave an interpreted function, and the CPU runs the Triton code itself.
INTERPRETED = not isinstance(_ngram_bias_kernel, triton.runtime.JITFunction)

_op = torch.library.custom_op(f"{NAMESPACE}::ngram_bias", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    f"{NAMESPACE}::ngram_bias_backward", _backward, mutates_args=(), device_types="cuda"
)


@_op.register_kernel("cpu")
def _forward_cpu(logits, *args):
    return (_forward if INTERPRETED and logits.dtype != torch.float64 else _forward_eager)(logits, *args)


@_op_backward.register_kernel("cpu")
def _backward_cpu(dloss, logits, targets, table, rows, factors, weights, *numbers):
    return _forward_cpu(logits, targets, table, rows, factors, weights, dloss, *numbers)[1]


@_op.register_fake
def _forward_fake(logits, targets, table, rows, factors, weights, dloss, softcap, ignore_index):
    loss = logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))
    return loss, logits.new_empty((0,) if dloss is None else logits.shape)


@_op_backward.register_fake
def _backward_fake(dloss, logits, *args):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    *tensors, promised, ctx.softcap, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for dlogits' own gradient would cost as much as writing it did
    ctx.written = promised is not None
    ctx.save_for_backward(*((promised, output[1]) if ctx.written else tensors))


def _autograd(ctx, dloss, _):
    if ctx.written:
        if torch.is_grad_enabled():
            got = "create_graph=True with upstream, whose gradient is written already and would count as a constant"
            raise RuntimeError(f"ngram_bias: expected a backward() that is not differentiated, got {got}")
        promised, dlogits = ctx.saved_tensors
        both = (t[:1] if t.stride(0) == 0 else t for t in (dloss, promised))  # expanded: one number for all rows
        kept = torch.isclose(*both, 1e-5, 0.0, equal_nan=True).all()
        torch._assert_async(kept, "ngram_bias: backward() brought another gradient than upstream had promised")
    else:
        dlogits = _op_backward(dloss, *ctx.saved_tensors, ctx.softcap, ctx.ignore_index)
    return dlogits, *(None,) * 8


_op.register_autograd(_autograd, setup_context=_setup_context)


def ngram_bias(
    logits: Tensor,
    targets: Tensor,
    table: Tensor,
    rows: Tensor,
    factors: Tensor,
    softcap: float = 30.0,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    upstream: float | None = None,
    check_targets: bool = False,
) -> Tensor:
    """Cross-entropy of capped and then biased logits against targets; see the top of the file for the formula.

    logits: (n_rows, V) bfloat16, float16 or float32, each row's columns adjacent; float64 on CPU only.
    targets: (n_rows,) int64 or int32, in [0, V) or ignore_index, whose rows count for nothing.
    table: (R, V) in any of those dtypes, each row's columns adjacent, nats, finite. It gets no gradient.
    rows: (n_rows, K) int64 or int32, 1 <= K <= 8: the rows of the table added to each row of logits; -1 for none.
    factors: (n_rows, K) float32: what each is multiplied by. They get no gradient.
    softcap: 0 < c <= 1e4, for c tanh(x / c).
    weights: (n_rows,) float32, factors of the rows' losses. They get no gradient.
    reduction: "none" gives (n_rows,), "sum" and "mean" a scalar; the mean is over the weights of the rows not ignored,
        NaN if none is.
    upstream: the gradient that backward() will bring to this result, where the caller knows it: 1.0 for
        loss.backward(), 0.125 for (loss / 8).backward(). The gradient is then written while logits and table are read
        for the loss, and backward() hands it out. Should it bring anything else (by more than 1e-5 of it), it raises
        RuntimeError on a CPU and ends in a device-side assertion on a GPU; and for create_graph=True it raises
        RuntimeError. None: any gradient is right; so it is, and the promise is not needed, inside torch.compile before
        torch 2.11.
    check_targets: raise for a target or a row out of range, which makes the host wait; else its row's loss is NaN.
    Returns the loss in nats, float32 (float64 for float64 logits). Differentiable once, in reverse mode, in the logits.
    Raises ValueError for a shape, layout, device or number out of range, TypeError for a dtype or another type.
    """
    name = "ngram_bias"
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: expected reduction 'mean', 'sum' or 'none', got {reduction!r}")
    _ngram_bias_validate(name, logits, targets, table, rows, factors, softcap, weights, ignore_index)
    if check_targets:
        _ngram_bias_check_values(name, logits, targets, table, rows, ignore_index)
    wide, w, promised = torch.promote_types(logits.dtype, torch.float32), None, None
    if upstream is not None:
        if not isinstance(upstream, (int, float)) or isinstance(upstream, bool):
            raise TypeError(f"{name}: expected upstream as a number, got {type(upstream).__name__}")
        if not abs(upstream) <= torch.finfo(wide).max:
            raise ValueError(f"{name}: expected a finite upstream in {wide}, got {upstream}")
    if reduction == "mean":
        w = (targets != ignore_index).to(wide)
        w = w if weights is None else w * weights
    wanted = torch.is_grad_enabled() and logits.requires_grad
    if upstream is not None and wanted and (PROMISES_COMPILE or not torch.compiler.is_compiling()):
        promised = torch.full((), float(upstream), dtype=wide, device=logits.device)
        promised = (promised if w is None else promised / w.sum()).expand(logits.shape[0])
    _refuse_tangents(name, logits, table, factors, weights)
    loss = _op(logits, targets, table, rows, factors, weights, promised, float(softcap), ignore_index)[0]
    return _ngram_bias_reduce(loss, w, reduction)


def _ngram_bias_validate(name, logits, targets, table, rows, factors, softcap, weights, ignore_index) -> None:
    tensors = {"logits": logits, "targets": targets, "table": table, "rows": rows, "factors": factors}
    for what, tensor in (tensors | {"weights": weights}).items():
        if not isinstance(tensor, Tensor) and (tensor is not None or what != "weights"):
            raise TypeError(f"{name}: expected {what} as a tensor, got {type(tensor).__name__}")
    wide = torch.promote_types(logits.dtype, torch.float32)
    floats = (torch.bfloat16, torch.float16, torch.float32, *((torch.float64,) if logits.device.type == "cpu" else ()))
    tables = (*floats[:3], *((torch.float64,) if logits.dtype == torch.float64 else ()))
    integers = (torch.int64, torch.int32)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"{name}: expected logits of shape (n_rows, V), got {tuple(logits.shape)}")
    n_rows, V = logits.shape
    if rows.ndim != 2 or not 1 <= rows.shape[1] <= MAX_ROWS:
        raise ValueError(f"{name}: expected rows of shape (n_rows, K), 1 <= K <= {MAX_ROWS}, got {tuple(rows.shape)}")
    if table.ndim != 2 or table.shape[0] == 0:
        raise ValueError(f"{name}: expected table of shape (R, {V}) with R >= 1, got {tuple(table.shape)}")
    one, each = (n_rows,), (n_rows, rows.shape[1])
    for what, tensor, shape, dtypes in (
        ("logits", logits, (n_rows, V), floats),
        ("targets", targets, one, integers),
        ("table", table, (table.shape[0], V), tables),
        ("rows", rows, each, integers),
        ("factors", factors, each, (wide,)),
        ("weights", weights, one, (wide,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name}: expected {what} in {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected {what} of shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != logits.device:
            raise ValueError(f"{name}: expected {what} on {logits.device}, got {tensor.device}")
        if what != "logits" and tensor.requires_grad:
            raise ValueError(f"{name}: expected {what} that require no grad (they get none), got some that do")
    for what, tensor in (("logits", logits), ("table", table)):
        if tensor.stride(1) != 1 and V != 1:
            raise ValueError(f"{name}: expected {what} with adjacent columns, stride 1, got {tensor.stride()}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"{name}: expected ignore_index as an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{name}: expected ignore_index in 64 bits, got {ignore_index}")
    if not isinstance(softcap, (int, float)) or isinstance(softcap, bool):
        raise TypeError(f"{name}: expected softcap as a number, got {type(softcap).__name__}")
    if not 0 < softcap <= LARGEST:
        raise ValueError(f"{name}: expected 0 < softcap <= {LARGEST:g}, got {softcap}")


def _ngram_bias_check_values(name, logits, targets, table, rows, ignore_index) -> None:
    V, R = logits.shape[1], table.shape[0]
    for what, bad, values, low, high in (
        ("targets", (targets != ignore_index) & ((targets < 0) | (targets >= V)), targets, 0, V),
        ("rows", (rows < -1) | (rows >= R), rows, -1, R),
    ):
        where = bad.nonzero()
        if len(where):
            found, row = int(values[tuple(where[0])]), int(where[0, 0])
            raise ValueError(f"{name}: expected {what} in [{low}, {high}), got {found} in row {row}")


# --- not needed when lifted ---

SIZES = {  # n_rows, V, K, R
    "odd": (6, 257, 2, 9),
    "one table": (5, 256, 1, 3),
    "three tables": (7, 515, 3, 30),
    "wide": (3, 8195, 2, 5),  # more than one block, with a ragged tail
    "high cap": (5, 260, 3, 6),
    "record": (98304, 8192, 3, 49152),
    "record, one table": (98304, 8192, 1, 16384),
    "large": (262400, 8192, 1, 262408),
}


def ngram_bias_inputs(size: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    """Logits N(0, 15²), which the cap bends, and a table of log-probabilities in another dtype in turn; targets on the
    first and last column, one of them unlikely; one row confident, one ignored, one without a row of the table."""
    n_rows, V, K, R = size
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn((n_rows, V), generator=generator, device=device, dtype=dtype).mul_(15 if V != 260 else 45)
    table = torch.randn((R, V), generator=generator, device=device, dtype=torch.float16 if V == 515 else dtype)
    table.mul_(2.5).sub_(9.0)
    targets = torch.randint(V, (n_rows,), generator=generator, device=device)
    rows = torch.randint(R, (n_rows, K), generator=generator, device=device)
    factors = torch.rand((n_rows, K), generator=generator, device=device)
    weights = 0.5 + torch.rand(n_rows, generator=generator, device=device)
    targets[0], targets[2], targets[-1] = 0, -100, V - 1
    rows[0, 0], rows[1, -1], rows[-1, 0] = 0, -1, R - 1
    logits[1] /= 15
    logits[1, targets[1]], logits[0, 0], logits[0, -1] = 16.0, -60.0, 75.0
    extra: dict[str, object] = {}
    if V == 257:  # and other strides than those of contiguous tensors
        extra["weights"] = weights
        logits = torch.cat((logits, torch.full_like(logits, torch.nan)), 1)[:, :V]
        rows, factors = rows.t().contiguous().t(), factors.t().contiguous().t()
    elif V == 260:
        extra["softcap"] = 100.0
        logits[0, 0], logits[:, -1] = -180.0, 225.0
    elif V == 515 or n_rows > 10_000:
        factors = torch.tensor([0.20, 0.15, 0.10][:K], device=device).expand(n_rows, -1)
    tensors = {"logits": logits.requires_grad_(), "targets": targets, "table": table, "rows": rows, "factors": factors}
    return tensors | {"reduction": "none"} | extra


def ngram_bias_cost(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    """Both directions together: logits and K rows of a table of their dtype read once, the gradient written once."""
    n_rows, V, K, _ = size
    logits = n_rows * V * dtype.itemsize
    return {
        "bytes_forward": (1 + K) * logits + n_rows * (8 + 4 + 12 * K),
        "bytes_backward": logits,
        "flops_forward": (15 + 2 * K) * n_rows * V,
        "flops_backward": 15 * n_rows * V,
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
    _prove(ngram_bias, ngram_bias_ref, ngram_bias_inputs, ngram_bias_cost, SIZES)
