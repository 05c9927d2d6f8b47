"""Cross-entropy on tanh-capped logits, forward and backward.

    z = c tanh(x / c)                    c = softcap; x = logits
    loss_i = logsumexp_j z_ij - z_it     t = targets[i]
    dx_ij = dloss_i (p_ij - [j = t]) (1 - tanh²(x_ij / c))          p = softmax(z)

With σ the logistic function, w = 2cσ(-2x/c) = c - z is the distance below the cap. The cap itself cancels in the loss,
so both kernels work with w (as PR #1855 of the challenge does with 2cσ(2x/c)): loss = logsumexp_j(-w_j) + w_t, and
1 - tanh² = 4σ(1 - σ). The most probable columns lie nearest the cap, where w is small and therefore exact; far below
it w carries the rounding of float32 at 2c, so the loss is good to about 2e-7 c nats.
For a confident row p_t - 1 is the difference of two nearly equal numbers; it is taken instead as minus the share of all
other columns, which the forward sums separately.

Shapes: logits (n_rows, V) bfloat16, float16 or float32, columns adjacent, any row stride and any V; targets (n_rows,)
int64 or int32; loss float32. Everything in between is float32. float64 runs on CPU only, in plain PyTorch.
Must move: forward reads the logits; backward reads them again and writes dlogits. The logits are never overwritten.
Replaces: softcap * torch.tanh(logits / softcap) and torch.nn.functional.cross_entropy, ten passes over (n_rows, V).
Refuses: other dtypes, columns that are not adjacent, softcap <= 0. A target outside [0, V) that is not ignore_index
makes its row's loss NaN; it is not checked, because that would stall the GPU.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

NAMESPACE = "niblick"
# Columns per step of the loop, at most, and warps per row: the record's V in one step. Not tuned on any card yet.
# V itself is a constexpr (one compilation a vocabulary): Triton 3.5's interpreter cannot loop to a runtime bound.
LAUNCH = {"BLOCK_V": 8192, "num_warps": 8}


def softcapped_ce_ref(
    logits: Tensor, targets: Tensor, softcap: float = 30.0, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """The specification, in float32 or, for float64 logits, in float64."""
    capped = softcap * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / softcap)
    return F.cross_entropy(capped, targets.long(), ignore_index=ignore_index, reduction=reduction)


@triton.jit
def _below_cap(x, softcap: tl.constexpr):
    """w = 2cσ(-2x/c) and dz/dx = 4σ(1-σ), from e = exp(-|2x/c|) so that neither cancels."""
    e = tl.exp(-tl.abs(x) * (2.0 / softcap))
    s = 1.0 / (1.0 + e)
    return 2.0 * softcap * tl.where(x > 0, e * s, s), 4.0 * e * s * s


@triton.jit
def _softcapped_ce_fwd_kernel(
    logits_ptr,  # (n_rows, V)
    targets_ptr,  # (n_rows,)
    loss_ptr,  # (n_rows,) float32
    lse_ptr,  # (n_rows,) float32: logsumexp of -w; of no meaning where the row is ignored
    miss_ptr,  # (n_rows,) float32: 1 - p_t; likewise
    stride_row,
    stride_target,
    V: tl.constexpr,
    softcap: tl.constexpr,
    ignore_index: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row * stride_target).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    ignored = target == ignore_index
    known = (target >= 0) & (target < V)
    x_target = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    w_target = _below_cap(tl.where(ignored, 0.0, x_target), softcap)[0]

    nearest = w_target  # running minimum of w; both sums are relative to exp(-nearest)
    others = w_target * 0.0
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        w = _below_cap(tl.load(row_ptr + cols, mask=cols < V, other=0.0).to(tl.float32), softcap)[0]
        w = tl.where((cols < V) & (cols != target), w, float("inf"))
        closer = tl.minimum(nearest, tl.min(w, axis=0))
        others = others * tl.exp(closer - nearest) + tl.sum(tl.exp(closer - w), axis=0)
        nearest = closer

    # w_target is a product, which a subtraction would take unrounded (fused multiply-add): equal must give zero.
    gap = tl.where(nearest == w_target, 0.0, w_target - nearest)
    total = others + tl.exp(-gap)
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, tl.log(total) + gap))
    tl.store(lse_ptr + row, tl.log(total) - nearest)
    tl.store(miss_ptr + row, others / total)


@triton.jit
def _softcapped_ce_bwd_kernel(
    dloss_ptr,  # (n_rows,) float32
    logits_ptr,  # (n_rows, V)
    targets_ptr,  # (n_rows,)
    lse_ptr,  # (n_rows,) float32
    miss_ptr,  # (n_rows,) float32
    dlogits_ptr,  # (n_rows, V), contiguous
    stride_dloss,
    stride_row,
    stride_target,
    V: tl.constexpr,
    softcap: tl.constexpr,
    ignore_index: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row * stride_target).to(tl.int64)
    dloss = tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)
    lse = tl.load(lse_ptr + row).to(tl.float32)
    miss = tl.load(miss_ptr + row).to(tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + row * stride_row + cols, mask=cols < V, other=0.0).to(tl.float32)
        w, slope = _below_cap(x, softcap)
        dz = dloss * tl.where(cols == target, -miss, tl.exp(-w - lse))
        dx = tl.where(target == ignore_index, 0.0, dz * slope)
        tl.store(dlogits_ptr + row * V + cols, dx.to(dlogits_ptr.dtype.element_ty), mask=cols < V)


def _forward(logits: Tensor, targets: Tensor, softcap: float, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    n_rows, V = logits.shape
    loss, lse, miss = (torch.empty(n_rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    _softcapped_ce_fwd_kernel[(n_rows,)](
        logits, targets, loss, lse, miss, logits.stride(0), targets.stride(0), V, softcap, ignore_index, **_launch(V)
    )  # fmt: skip
    return loss, lse, miss


def _backward(
    dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, miss: Tensor, softcap: float, ignore_index: int
) -> Tensor:
    n_rows, V = logits.shape
    dlogits = torch.empty((n_rows, V), dtype=logits.dtype, device=logits.device)
    _softcapped_ce_bwd_kernel[(n_rows,)](
        dloss, logits, targets, lse, miss, dlogits,
        dloss.stride(0), logits.stride(0), targets.stride(0), V, softcap, ignore_index, **_launch(V),
    )  # fmt: skip
    return dlogits


def _launch(V: int) -> dict[str, int]:
    return LAUNCH | {"BLOCK_V": min(LAUNCH["BLOCK_V"], triton.next_power_of_2(V))}


def _forward_eager(logits: Tensor, targets: Tensor, softcap: float, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    z = softcap * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / softcap)
    ignored = targets == ignore_index
    column = targets.long().masked_fill(ignored, 0)[:, None]
    log_p = z.log_softmax(-1).gather(1, column)[:, 0]
    return (-log_p).masked_fill(ignored, 0.0), z.logsumexp(-1) - softcap, -torch.expm1(log_p)


def _backward_eager(
    dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, miss: Tensor, softcap: float, ignore_index: int
) -> Tensor:
    capped = torch.tanh(logits.to(miss.dtype) / softcap)
    ignored = targets == ignore_index
    column = targets.long().masked_fill(ignored, 0)[:, None]
    dz = (softcap * capped).softmax(-1).scatter(1, column, -miss[:, None])
    dx = dloss[:, None] * dz * (1 - capped * capped)
    return dx.masked_fill(ignored[:, None], 0.0).to(logits.dtype)


# Under TRITON_INTERPRET=1 the decorator above gave an interpreted function, and the CPU runs the Triton code itself.
INTERPRETED = not isinstance(_softcapped_ce_fwd_kernel, triton.runtime.JITFunction)

_op = torch.library.custom_op(f"{NAMESPACE}::softcapped_ce", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    f"{NAMESPACE}::softcapped_ce_backward", _backward, mutates_args=(), device_types="cuda"
)


@_op.register_kernel("cpu")
def _forward_cpu(logits, *args):
    return (_forward if INTERPRETED and logits.dtype != torch.float64 else _forward_eager)(logits, *args)


@_op_backward.register_kernel("cpu")
def _backward_cpu(dloss, logits, *args):
    return (_backward if INTERPRETED and logits.dtype != torch.float64 else _backward_eager)(dloss, logits, *args)


@_op.register_fake
def _forward_fake(logits, targets, softcap, ignore_index):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return tuple(logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(3))


@_op_backward.register_fake
def _backward_fake(dloss, logits, targets, lse, miss, softcap, ignore_index):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, targets, ctx.softcap, ctx.ignore_index = inputs
    _, lse, miss = output
    ctx.mark_non_differentiable(lse, miss)
    ctx.save_for_backward(logits, targets, lse, miss)


def _autograd(ctx, dloss, _dlse, _dmiss):
    return _op_backward(dloss, *ctx.saved_tensors, ctx.softcap, ctx.ignore_index), None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def softcapped_ce(
    logits: Tensor, targets: Tensor, softcap: float = 30.0, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of softcap * tanh(logits / softcap) against targets, as torch.nn.functional.cross_entropy.

    logits: (n_rows, V) bfloat16, float16 or float32, each row's columns adjacent; float64 on CPU only.
    targets: (n_rows,) int64 or int32, in [0, V) or ignore_index, whose rows count for nothing.
    reduction: "none" gives (n_rows,), "sum" and "mean" a scalar; the mean is over the rows not ignored, NaN if none is.
    Returns the loss in nats, float32 (float64 for float64 logits). Differentiable once, in logits.
    Raises ValueError for a shape, layout, device or number out of range, TypeError for a dtype.
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"softcapped_ce: expected logits of shape (n_rows, V), got {tuple(logits.shape)}")
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    if logits.dtype not in (dtypes if logits.device.type != "cpu" else (*dtypes, torch.float64)):
        raise TypeError(
            f"softcapped_ce: expected logits in bfloat16, float16 or float32 (float64 on CPU only), "
            f"got {logits.dtype} on {logits.device}"
        )
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"softcapped_ce: expected logits with adjacent columns, stride 1, got {logits.stride()}")
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"softcapped_ce: expected targets of shape ({logits.shape[0]},), one a row, got {tuple(targets.shape)}"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"softcapped_ce: expected targets in int64 or int32, got {targets.dtype}")
    if targets.device != logits.device:
        raise ValueError(f"softcapped_ce: expected targets on {logits.device}, got {targets.device}")
    if not softcap > 0:
        raise ValueError(f"softcapped_ce: expected softcap > 0, got {softcap}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"softcapped_ce: expected reduction 'mean', 'sum' or 'none', got {reduction!r}")
    loss, _, _ = _op(logits, targets, float(softcap), ignore_index)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (targets != ignore_index).sum()


# --- not needed when lifted ---

SIZES = {
    "odd": (5, 1025),
    "tile": (8, 2048),
    "wide": (4, 9001),  # more than one step of the loop, with a ragged tail
    "record": (98304, 8192),
    "large": (262400, 8192),
}


def softcapped_ce_inputs(size: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    """Logits N(0, 15²), which the cap bends; targets on the first and last column; one row confident, one ignored, one
    with its largest logit last."""
    n_rows, V = size
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(size, generator=generator, device=device).mul_(15).to(dtype)
    targets = torch.randint(V, (n_rows,), generator=generator, device=device)
    targets[0], targets[-1], targets[2] = 0, V - 1, -100
    logits[1] /= 15
    logits[1, targets[1]], logits[0, -1] = 16.0, 75.0
    return {"logits": logits.requires_grad_(), "targets": targets, "softcap": 30.0, "reduction": "none"}


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
