"""Negative log-likelihood of softcapped logits under a hint: one token of the row is made likelier, the rest rescaled.

With z = softcap * tanh(logits / softcap), p = softmax(z), hint h of strength beta, q = p(h) and target t:

    p'(a) = p(a) exp(beta [a == h]) / (1 + q (exp(beta) - 1)),          which sums to 1 over a
    nll   = -ln p'(t) = -ln p(t) + log1p(q expm1(beta)) - beta [t == h]

hint -1 means none: nll is then the plain loss of the softcapped logits, so one call scores every row, hinted or not.

logits (n_rows, V) float32, bfloat16 or float16, last stride 1, row stride free; targets (n_rows,) in [0, V) and hints
(n_rows,) in [-1, V), int32 or int64; betas (n_rows,) float32, nats. Returns (n_rows,) float32, nats. float64 logits are
computed in float64 on the CPU. A target or a hint outside its range gives NaN for its row: looking at the values before
the launch would stall the stream; check_targets=True asks for that.

Must move: the logits once, and 24 bytes a row. Replaces softcap, cross_entropy, a second softmax for q and the tilt,
which read or write (n_rows, V) several times. Refuses: gradients (training steps on the untilted loss), a strided last
dimension, a softcap so large that float32 could overflow.

The float32 sum needs no running maximum. It is taken relative to the softcap, which no z exceeds:

    rest = exp(softcap - z_t) sum_{j != t} exp(z_j - softcap),    nll = log1p(rest)

As |z| <= softcap, every term is within exp(-2 softcap) and 1, and rest below V exp(2 softcap). Unlike lse - z_t this
never rounds below zero and keeps its relative accuracy on a confident row. Tilting adds beta to the hint's logit, so

    t == h: rest' = rest exp(-beta)             t != h: rest' = rest + exp(z_h - z_t) (exp(beta) - 1)

and expm1 is not needed either: the error of exp(beta) - 1 is a float32 rounding of exp(beta), and rest' already holds
exp(beta) exp(z_h - z_t). beta is meant to be in [0, 8]; above 88 - 2 softcap - ln V the result may be inf or NaN.

Source: PR #1420 and PR #1514 of the challenge (n-gram tilt), PR #2018 (token hints only).
"""

import math
import re
from collections.abc import Callable
from functools import wraps

import torch
import triton
import triton.language as tl
from torch import Tensor

# A lifted copy has ops of its own, so that it may stand beside the package.
NAMESPACE = "niblick" if __name__.startswith("niblick.") else "niblick_" + re.sub(r"\W", "_", __name__, flags=re.A)
# Columns of one of the four vectors that a turn of the loop takes, and warps per row. NVIDIA H200, 2026-11-20.
LAUNCH = {"BLOCK_V": 256, "num_warps": 1}
MAX_EXPONENT = 80.0  # of 2 softcap + ln V; exp overflows float32 at 88.7, which leaves room for beta <= 8


def ngram_tilt_ref(logits: Tensor, targets: Tensor, hints: Tensor, betas: Tensor, softcap: float = 30.0) -> Tensor:
    """The formula above in plain PyTorch, in float32 or, for float64 logits, float64."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probs = torch.log_softmax(softcap * torch.tanh(logits.to(wide) / softcap), dim=-1)
    V = logits.shape[1]
    valid = (targets >= 0) & (targets < V) & (hints >= -1) & (hints < V)
    nll = -log_probs.gather(-1, torch.where(valid, targets, 0).long()[:, None])[:, 0]
    hinted = valid & (hints != -1)
    q = log_probs.gather(-1, torch.where(hinted, hints, 0).long()[:, None])[:, 0].exp()
    betas = torch.where(hinted, betas.to(wide), 0.0)
    tilted = nll + torch.log1p(q * torch.expm1(betas)) - torch.where(targets == hints, betas, 0.0)
    return torch.where(valid, tilted, torch.nan)


@triton.jit
def _reciprocal(x, COMPILED: tl.constexpr):
    if COMPILED:  # one instruction instead of the eight of a division; x is never denormal
        asm: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def _denominator(x, softcap: tl.constexpr, COMPILED: tl.constexpr):
    """1 + exp(2 x / softcap), at most about 2^30, so that no product of four overflows. 2.885... is 2 log2(e)."""
    if COMPILED and x.dtype == tl.bfloat16:  # both halves of a register clamped at once, then taken apart
        limit = tl.full(x.shape, 30.0 / 2.8853900817779268 * softcap, tl.bfloat16)
        asm: tl.constexpr = (
            """{ .reg .b32 t; min.NaN.bf16x2 t, $2, $3; shl.b32 $0, t, 16; and.b32 $1, t, 0xFFFF0000; }"""
        )
        x = tl.inline_asm_elementwise(asm, "=r,=r,r,r", [x, limit], dtype=tl.float32, is_pure=True, pack=2)
        exponent = x * (2.8853900817779268 / softcap)
    else:
        exponent = x.to(tl.float32) * (2.8853900817779268 / softcap)
        exponent = tl.minimum(exponent, 30.0, propagate_nan=tl.PropagateNan.ALL)
    return 1.0 + tl.exp2(exponent)


@triton.jit
def _exponent(x, softcap: tl.constexpr, COMPILED: tl.constexpr):
    # (z - softcap) log2(e), since 1 - tanh(y) = 2 / (1 + exp(2y)). Nothing cancels, and near the cap, where the likely
    # columns lie, it is small and therefore exact.
    return (-2.8853900817779268 * softcap) * _reciprocal(_denominator(x, softcap, COMPILED), COMPILED)


@triton.jit
def _exp2_by_polynomial(x):
    """2^x for |x| < 126, relative error 4e-6, without the special function unit."""
    shifted = x + 12583039.0  # 1.5 2^23 + 127: rounds to an integer, which with a float's bias lands in the low bits
    r = x - (shifted - 12583039.0)
    p = 0.009567534551024437 * r + 0.05596153810620308  # minimax on [-1/2, 1/2]
    p = p * r + 0.24025216698646545
    p = p * r + 0.6931147575378418
    p = p * r + 0.9999988675117493
    return p * (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _log1p(x):
    # For x >= 0. log(u) / (u - 1) varies so slowly that the rounding of u = 1 + x hardly moves it, and times x it gives
    # back the bits that u lost. Where u == 1, log1p(x) is x to rounding.
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _four(row_ptr, cols, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """The logits at cols and at 1, 2 and 3 BLOCK_V beyond; 0 outside the row."""
    x0 = tl.load(row_ptr + cols, mask=cols < V, other=0.0)
    x1 = tl.load(row_ptr + cols + BLOCK_V, mask=cols + BLOCK_V < V, other=0.0)
    x2 = tl.load(row_ptr + cols + 2 * BLOCK_V, mask=cols + 2 * BLOCK_V < V, other=0.0)
    x3 = tl.load(row_ptr + cols + 3 * BLOCK_V, mask=cols + 3 * BLOCK_V < V, other=0.0)
    return x0, x1, x2, x3


@triton.jit
def _ngram_tilt_kernel(
    logits_ptr,  # (n_rows, V)
    targets_ptr,  # (n_rows,)
    hints_ptr,  # (n_rows,)
    betas_ptr,  # (n_rows,)
    nll_ptr,  # (n_rows,)
    stride_row,
    V: tl.constexpr,
    softcap: tl.constexpr,
    COMPILED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TURNS: tl.constexpr,
    LANE_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    cols = tl.arange(0, BLOCK_V)
    x0, x1, x2, x3 = _four(row_ptr, cols, V, BLOCK_V)
    target = tl.load(targets_ptr + row).to(tl.int64)
    hint = tl.load(hints_ptr + row).to(tl.int64)
    beta = tl.load(betas_ptr + row).to(tl.float32)
    valid = (target >= 0) & (target < V) & (hint >= -1) & (hint < V)
    hinted = valid & (hint >= 0)
    target = tl.where(valid, target, 0)
    x_target = tl.load(row_ptr + target).to(tl.float32)
    x_hint = tl.load(row_ptr + tl.where(hinted, hint, 0)).to(tl.float32)
    lane = target % BLOCK_V
    same = tl.arange(0, LANE_V) * BLOCK_V + lane
    x_same = tl.load(row_ptr + same, mask=same < V, other=0.0).to(tl.float32)

    # Special functions, not bytes, set the pace, and after them instructions. Of three a column (exp, 1/x, exp) 1.75
    # are left: four columns share a reciprocal, 1/a = bcd / abcd, and two of them take the second exp by polynomial.
    K: tl.constexpr = -2.8853900817779268 * softcap
    total = tl.zeros((BLOCK_V,), tl.float32)
    for turn in range(TURNS):
        first = turn * (4 * BLOCK_V) + cols
        d0 = _denominator(x0, softcap, COMPILED)
        d1 = _denominator(x1, softcap, COMPILED)
        d2 = _denominator(x2, softcap, COMPILED)
        d3 = _denominator(x3, softcap, COMPILED)
        d01 = d0 * d1
        d23 = d2 * d3
        r = K * _reciprocal(d01 * d23, COMPILED)
        r01 = r * d23
        r23 = r * d01
        term0 = _exp2_by_polynomial(r01 * d1)
        term1 = tl.exp2(r01 * d0)
        term2 = _exp2_by_polynomial(r23 * d3)
        term3 = tl.exp2(r23 * d2)
        if V % (4 * BLOCK_V) != 0:
            term0 = tl.where(first < V, term0, 0.0)
            term1 = tl.where(first + BLOCK_V < V, term1, 0.0)
            term2 = tl.where(first + 2 * BLOCK_V < V, term2, 0.0)
            term3 = tl.where(first + 3 * BLOCK_V < V, term3, 0.0)
        total += term0
        total += term1
        total += term2
        total += term3
        x0, x1, x2, x3 = _four(row_ptr, first + 4 * BLOCK_V, V, BLOCK_V)  # of the next turn; none after the last
    # The target is left out afterwards, and not by subtraction, which would cancel: the one sum that it went into, that
    # of the columns equal to it modulo BLOCK_V, is replaced. A comparison a column would cost more.
    others = tl.where((same < V) & (same != target), tl.exp2(_exponent(x_same, softcap, COMPILED)), 0.0)
    rest = tl.sum(tl.where(cols == lane, 0.0, total), axis=0) + tl.sum(others, axis=0)

    z_target = _exponent(x_target, softcap, COMPILED)
    z_hint = _exponent(x_hint, softcap, COMPILED)
    plain = rest * tl.exp2(-z_target)
    missed = plain + tl.exp2(z_hint - z_target) * (tl.exp(beta) - 1.0)
    tilted = tl.where(hint == target, plain * tl.exp(-beta), missed)
    tl.store(nll_ptr + row, tl.where(valid, _log1p(tl.where(hinted, tilted, plain)), float("nan")))


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
def _forward(logits: Tensor, targets: Tensor, hints: Tensor, betas: Tensor, softcap: float) -> Tensor:
    n_rows, V = logits.shape
    nll = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    if n_rows:
        # V is a constexpr: one compilation a vocabulary, and Triton 3.5's interpreter cannot loop to a runtime bound.
        block = LAUNCH["BLOCK_V"]
        turns, lane = triton.cdiv(V, 4 * block), triton.next_power_of_2(triton.cdiv(V, block))
        _ngram_tilt_kernel[(n_rows,)](
            logits, targets, hints, betas, nll, logits.stride(0), V, softcap, not INTERPRETED,
            block, turns, lane, num_warps=LAUNCH["num_warps"],
        )  # fmt: skip
    return nll


# Under TRITON_INTERPRET=1 the decorator above gave an interpreted function, and the CPU runs the Triton code itself.
INTERPRETED = not isinstance(_ngram_tilt_kernel, triton.runtime.JITFunction)

_op = torch.library.custom_op(f"{NAMESPACE}::ngram_tilt", _forward, mutates_args=(), device_types="cuda")


@_op.register_kernel("cpu")
def _forward_cpu(logits, *args):
    return (_forward if INTERPRETED and logits.dtype != torch.float64 else ngram_tilt_ref)(logits, *args)


@_op.register_fake
def _forward_fake(logits, targets, hints, betas, softcap):
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))


def ngram_tilt(
    logits: Tensor,
    targets: Tensor,
    hints: Tensor,
    betas: Tensor,
    softcap: float = 30.0,
    *,
    check_targets: bool = False,
) -> Tensor:
    """Tilted negative log-likelihood of each target, nats; see the top of the file for the formula.

    Args:
        logits: (n_rows, V) raw, before the softcap; float32, bfloat16 or float16 (float64 on the CPU only).
        targets: (n_rows,) int32 or int64 in [0, V); anything else gives NaN.
        hints: (n_rows,) int32 or int64 in [-1, V), -1 for no hint; anything else gives NaN.
        betas: (n_rows,) float32, strength of the hint in nats; ignored where the hint is -1.
        softcap: > 0, with 2 softcap + ln V <= 80.
        check_targets: wait for the device and raise a ValueError for the first target or hint outside its range.

    Returns: (n_rows,) float32 (float64 for float64 logits), without gradient.
    Raises: TypeError for a dtype or an argument of another type, ValueError for a shape, stride, device, softcap or a
    wanted gradient.
    """
    for name, tensor in (("logits", logits), ("targets", targets), ("hints", hints), ("betas", betas)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"ngram_tilt: {name} must be a tensor, got {tensor!r}")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"ngram_tilt: logits must be (n_rows, V) with V >= 1, got {tuple(logits.shape)}")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"ngram_tilt: logits must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.dtype == torch.float64 and logits.device.type != "cpu":
        raise TypeError(f"ngram_tilt: float64 logits are computed on the CPU only, got them on {logits.device}")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"ngram_tilt: logits must have last stride 1, got strides {logits.stride()}")
    n_rows, V = logits.shape
    for name, rows, dtypes in (
        ("targets", targets, (torch.int64, torch.int32)),
        ("hints", hints, (torch.int64, torch.int32)),
        ("betas", betas, (torch.float32,)),
    ):
        if rows.dtype not in dtypes:
            raise TypeError(f"ngram_tilt: {name} must be {' or '.join(map(str, dtypes))}, got {rows.dtype}")
        if rows.shape != (n_rows,) or not rows.is_contiguous():
            got = f"{tuple(rows.shape)} with strides {rows.stride()}"
            raise ValueError(f"ngram_tilt: {name} must be contiguous ({n_rows},), one for each row, got {got}")
        if rows.device != logits.device:
            raise ValueError(f"ngram_tilt: {name} must be on {logits.device} as logits, got {rows.device}")
    if not isinstance(softcap, (int, float)) or isinstance(softcap, bool):
        raise TypeError(f"ngram_tilt: softcap must be a number, got {softcap!r}")
    if not 0.0 < 2.0 * softcap <= MAX_EXPONENT - math.log(V):
        limit = (MAX_EXPONENT - math.log(V)) / 2.0
        raise ValueError(f"ngram_tilt: softcap must be in (0, {limit:.2f}] for V = {V}, got {softcap}")
    if torch.is_grad_enabled() and (logits.requires_grad or betas.requires_grad):
        raise ValueError(
            "ngram_tilt: has no gradient, got an input that requires one: train on softcapped_ce, "
            "or score under torch.no_grad()"
        )
    if check_targets:
        for name, ids, least in (("targets", targets, 0), ("hints", hints, -1)):
            bad = ((ids < least) | (ids >= V)).nonzero()
            if len(bad):
                row = bad[0, 0].item()
                raise ValueError(f"ngram_tilt: {name} must be in [{least}, {V}), got {ids[row].item()} in row {row}")
    return _op(logits, targets, hints, betas, float(softcap))


# --- not needed when lifted ---

SIZES = {
    "odd": (12, 2053),  # a third turn of the loop for five columns; first, middle and last column in lanes of their own
    "tile": (12, 4096),
    "one": (1, 1),
    "record": (98304, 8192),
    "large": (262400, 8192),
}


def ngram_tilt_inputs(size: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    """Keyword arguments at (n_rows, V). Twelve kinds of row repeat: hit and miss, on the first, last and middle column,
    with a sure hint and an unlikely one, beta 0, small and large, no hint, and a row whose logits are all low."""
    n_rows, V = size
    first, last, mid, none, flat = 0, V - 1, V // 2, -1, -2
    kinds = [  # target, hint, column that has almost all the mass (none: logits N(0, 15²); flat: N(-20, 1)), beta
        (first, first, none, 2.625),
        (last, last, last, 2.625),
        (first, last, last, 2.0),
        (last, first, first, 2.0),
        (mid, first, mid, 1.5),
        (first, none, first, 2.5),
        (last, none, none, 2.5),
        (mid, mid, none, 0.0),
        (mid, last, last, 0.0),
        (mid, last, last, 1e-3),
        (last, mid, flat, 7.5),
        (first, mid, first, 1e-3),
    ]
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(size, generator=generator, device=device, dtype=dtype).mul_(15)
    columns = torch.tensor([kind[:3] for kind in kinds], device=device).repeat(n_rows // 12 + 1, 1)[:n_rows]
    betas = torch.tensor([kind[3] for kind in kinds], device=device).repeat(n_rows // 12 + 1)[:n_rows]
    targets, hints, sure = (column.contiguous() for column in columns.unbind(1))
    low, rows = (sure != none).nonzero()[:, 0], (sure >= 0).nonzero()[:, 0]
    logits[low] = logits[low] / 15 - 20
    logits[rows, sure[rows]] = 90
    return {"logits": logits, "targets": targets, "hints": hints, "betas": betas}


def ngram_tilt_cost(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    """Bytes and operations the maths needs: logits once; int64 target and hint, float32 beta and result a row."""
    n_rows, V = size
    moved = n_rows * (V * dtype.itemsize + 24)
    return {"bytes_forward": moved, "bytes_backward": 0, "flops_forward": 8 * n_rows * V, "flops_backward": 0}


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
    _prove(ngram_tilt, ngram_tilt_ref, ngram_tilt_inputs, ngram_tilt_cost, SIZES)
