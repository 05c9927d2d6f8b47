"""Edge cases of kernels/leaky_relu_sq_mlp.py, and the faults its contract must reject."""

import math
from collections.abc import Callable

import numerics
import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from niblick.kernels import leaky_relu_sq_mlp as module
from niblick.kernels.leaky_relu_sq_mlp import leaky_relu_sq_mlp, leaky_relu_sq_mlp_inputs, leaky_relu_sq_mlp_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON_RUNS = DEVICE == "cuda" or triton.knobs.runtime.interpret

FAULTS = [
    ("leaky = tl.where(negative, h * slope, h)", "leaky = tl.where(negative, 0.0, h)"),  # ReLU
    ("a = leaky * leaky\n", "a = leaky\n"),  # not squared
    ("bits | 1, bits & -2", "bits, bits & -2"),  # sign of h lost, float32
    ("dh = 2.0 * da * tl.sqrt(", "dh = da * tl.sqrt("),
    ("dh = 2.0 * da * tl.sqrt(a.to(tl.float32))", "dh = 2.0 * da * a.to(tl.float32)"),  # no root
    ("-slope * dh, dh)", "slope * dh, dh)"),  # sign of the negative side
    ("-slope * dh, dh)", "-dh, dh)"),  # leaky'(h) missing
    ("& 1) != 0, -slope", "& 2) != 0, -slope"),  # another bit
    ("row = tile // n_blocks * BLOCK_M", "row = tile % n_blocks * BLOCK_M"),  # tiles left out
    ("right, row, col + BLOCK_F // 2", "right, row, col"),  # both halves into the left one
    ("mask=(rows < n_rows) & (cols < n_cols), other", "mask=(rows < n_rows) & (cols < n_cols - 1), other"),
    ("tile, mask=(rows < n_rows) & (cols < n_cols))", "tile, mask=(rows < n_rows - 1) & (cols < n_cols))"),
    ("for k in range(0, K, BLOCK_K):", "for k in range(BLOCK_K, K, BLOCK_K):"),
    ("_product(dy, down, False, negative_slope, dh", "_product(x, down, False, negative_slope, dh"),
    ("none(0), dh.t() @ x if", "none(0), dh.t() @ dy if"),
    ("none(0), dy.t() @ a if", "none(0), x.t() @ a if"),
    ("return a @ down.t(), a", "return a.sqrt() @ down.t(), a"),
    (
        "(t.shape if w else (0,) for t, w in zip((x, up, down)",
        "(t.shape if w else (0,) for t, w in zip((x, down, up)",
    ),
]


def fp8_runs() -> bool:
    return TRITON_RUNS and (DEVICE == "cpu" or torch.cuda.get_device_capability() >= (8, 9))


needs_fp8 = pytest.mark.skipif(not fp8_runs(), reason="no 8-bit floats here")


def arguments(*size: int, dtype: torch.dtype = torch.float32, slope: float = 0.5) -> dict[str, object]:
    return leaky_relu_sq_mlp_inputs(size, dtype, DEVICE, seed=3) | {"negative_slope": slope}


def run(
    fn: Callable, inputs: dict[str, object], dtype: torch.dtype | None = None, dy: float | None = None
) -> dict[str, Tensor]:
    """y and the gradients, all inputs in dtype; the cotangent is full of dy, or of varied values."""
    leaves = {}
    for key, value in inputs.items():
        leaves[key] = value.detach().to(dtype or value.dtype).requires_grad_() if isinstance(value, Tensor) else value
    y = fn(**leaves)
    values = (
        torch.cos(torch.arange(y.numel(), device=DEVICE)) if dy is None else torch.full((y.numel(),), dy, device=DEVICE)
    )
    wanted = [leaves[key] for key in ("x", "up", "down")]
    gradients = torch.autograd.grad(y, wanted, values.bfloat16().view_as(y).to(y))
    return dict(zip(("y", "d_x", "d_up", "d_down"), (y.detach(), *gradients), strict=True))


def assert_as_reference(inputs: dict[str, object]) -> None:
    got, eager = run(leaky_relu_sq_mlp, inputs), run(leaky_relu_sq_mlp_ref, inputs)
    f64 = run(leaky_relu_sq_mlp_ref, inputs, torch.float64)
    for key in got:
        numerics.assert_like_eager(key, got[key], eager[key], f64[key])


def test_by_hand() -> None:
    """h = (2, -4): a = (4, 4) at slope one half; a tells the two apart all the same."""
    x, up = torch.tensor([[2.0]], device=DEVICE), torch.tensor([[1.0], [-2.0]], device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, up, torch.tensor([[10.0, 1.0]], device=DEVICE))]
    y = leaky_relu_sq_mlp(*leaves)
    dx, dup, ddown = torch.autograd.grad(y, leaves, torch.ones_like(y))
    # dh = (10 * 2 * 2, 1 * 2 * -2 * 0.5) = (40, -2)
    for got, want in ((y, [[44.0]]), (dx, [[44.0]]), (dup, [[80.0], [-4.0]]), (ddown, [[4.0, 4.0]])):
        numerics.assert_close_f32("by hand", got, torch.tensor(want, dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize("slope", [0, 0.0, 0.01, 1.0, -0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_slope(dtype: torch.dtype, slope: float) -> None:
    assert_as_reference(arguments(20, 16, 24, dtype=dtype, slope=slope))


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 8, 8), (130, 17, 5), (3, 200, 40), (129, 8, 136)])
def test_any_shape(size: tuple[int, ...]) -> None:
    assert_as_reference(arguments(*size))


@pytest.mark.skipif(not TRITON_RUNS, reason="eager keeps h itself")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_last_bit_is_the_sign(dtype: torch.dtype) -> None:
    """a is the nearest number whose last bit says h < 0, at most one unit off; h = 0 has no sign."""
    h = torch.linspace(-3, 3, 257, device=DEVICE)[:, None].to(dtype)
    one = torch.ones(1, 1, dtype=dtype, device=DEVICE)
    a = module._forward(h, one, one, 0.5)[1]
    bits = a.view(torch.int32 if dtype == torch.float32 else torch.int16)
    assert torch.equal((bits & 1).bool(), h < 0)
    exact = torch.where(h < 0, 0.5 * h.double(), h.double()).square()
    numerics.assert_matches_f64("a", a, exact.to(dtype), exact)


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_not_a_number_stays_one(slope: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = arguments(5, 16, 8, dtype=dtype, slope=slope)
        with torch.no_grad():
            inputs["x"][2, 3] = math.nan
        results = run(leaky_relu_sq_mlp, inputs)
        assert results["y"][2].isnan().all() and results["y"][[0, 1, 3, 4]].isfinite().all()
        assert results["d_up"].isnan().all() and results["d_x"][2].isnan().all()


def frozen(inputs: dict[str, object], wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """The gradients of the wanted tensors, the others frozen."""
    leaves = {k: v.detach().requires_grad_(k in wanted) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    y = leaky_relu_sq_mlp(**leaves)
    values = torch.cos(torch.arange(y.numel(), device=DEVICE)).bfloat16().view_as(y).to(y)
    return dict(zip(wanted, torch.autograd.grad(y, [leaves[key] for key in wanted], values), strict=True))


SUBSETS = [("x",), ("up",), ("down",), ("x", "up"), ("x", "down"), ("up", "down")]


@pytest.mark.parametrize("wanted", SUBSETS, ids=",".join)
def test_frozen_inputs_cost_no_products(wanted: tuple[str, ...]) -> None:
    inputs = arguments(20, 16, 24)
    want = run(leaky_relu_sq_mlp, inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = frozen(inputs, wanted)
    for key in wanted:
        assert torch.equal(got[key], want[f"d_{key}"]), key
    # Of six products a kernel has one of the forward and dh, eager none.
    products = sum(event.count for event in profile.key_averages() if event.key == "aten::mm")
    assert products == (1 if TRITON_RUNS else 2 + bool({"x", "up"} & set(wanted))) + len(wanted)


@pytest.mark.parametrize("wanted", SUBSETS, ids=",".join)
def test_backward_op_without_products_is_registered_rightly(wanted: tuple[str, ...]) -> None:
    x, up, down, slope = (v.detach() if isinstance(v, Tensor) else v for v in arguments(6, 8, 10).values())
    kept = module._op(x, up, down, slope)[1]
    flags = [key in wanted for key in ("x", "up", "down")]
    torch.library.opcheck(module._op_backward, (torch.ones_like(x), x, up, down, kept, slope, *flags))


@pytest.mark.parametrize("fp8", [False, pytest.param(True, marks=needs_fp8)])
def test_what_is_kept_gets_no_gradient_of_zeros(fp8: bool) -> None:
    """Autograd would write one for each output of the op that only the backward reads: 0.1 to 0.2 ms at the record."""
    inputs = arguments(32, 16, 48, dtype=torch.bfloat16)
    leaves = [inputs[key] for key in ("x", "up", "down")]
    y = leaky_relu_sq_mlp(*leaves, fp8=fp8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(y, leaves, y.detach())
    assert not {"aten::zeros", "aten::zeros_like", "aten::zero_"} & {event.key for event in profile.key_averages()}


def test_slope_of_numpy() -> None:
    inputs = arguments(5, 8, 8)
    got = leaky_relu_sq_mlp(**inputs | {"negative_slope": np.float64(0.5)})
    assert torch.equal(got, leaky_relu_sq_mlp(**inputs))


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is refused on a GPU")
def test_float64_is_the_reference_itself() -> None:
    inputs = arguments(30, 16, 20, dtype=torch.float64)
    got, want = run(leaky_relu_sq_mlp, inputs), run(leaky_relu_sq_mlp_ref, inputs)
    for key in want:
        numerics.assert_same_f64(key, got[key], want[key])


def test_leading_dimensions_and_no_rows() -> None:
    inputs = arguments(24, 16, 8)
    flat = run(leaky_relu_sq_mlp, inputs)
    shaped = run(leaky_relu_sq_mlp, inputs | {"x": inputs["x"].detach().view(2, 3, 4, 16).requires_grad_()})
    for key in flat:
        assert torch.equal(flat[key], shaped[key].view_as(flat[key])), key
    for fp8 in (False, True):
        if fp8 and not TRITON_RUNS:
            continue
        dtype = torch.bfloat16 if fp8 else torch.float32
        empty = run(leaky_relu_sq_mlp, arguments(0, 16, 8, dtype=dtype) | {"fp8": fp8})
        assert empty["y"].shape == empty["d_x"].shape == (0, 16)
        assert not empty["d_up"].any() and not empty["d_down"].any()


# ---------------------------------------------------------------------------------------------------------- 8 bits


@needs_fp8
@pytest.mark.parametrize("slope", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_is_about_right(dtype: torch.dtype, slope: float) -> None:
    inputs = arguments(144, 64, 80, dtype=dtype, slope=slope)
    got = run(leaky_relu_sq_mlp, inputs | {"fp8": True})
    f64 = run(leaky_relu_sq_mlp_ref, inputs, torch.float64)
    for key in got:
        assert got[key].dtype == dtype
        numerics.assert_fp8_mlp(key, got[key], f64[key])


@needs_fp8
@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_fp8_scales_with_its_inputs(scale: float) -> None:
    """By powers of two, the same bits: no range is assumed of x, the weights or the gradient."""
    inputs = arguments(48, 32, 64, dtype=torch.bfloat16) | {"fp8": True}
    bigger = inputs | {"down": (inputs["down"].detach() * scale).requires_grad_()}
    got = run(leaky_relu_sq_mlp, bigger, dy=scale)
    want = run(leaky_relu_sq_mlp, inputs, dy=1.0)
    powers = {"y": 1, "d_x": 2, "d_up": 2, "d_down": 1}
    for key, power in powers.items():
        numerics.assert_close_f32(key, got[key].double() * scale**-power, want[key].double())


@needs_fp8
def test_fp8_survives_weights_of_zero() -> None:
    """As networks start: down is zero, so y is, and x and up have no gradient yet."""
    inputs = arguments(32, 32, 48, dtype=torch.bfloat16) | {"fp8": True}
    with torch.no_grad():
        inputs["down"].zero_()
    got = run(leaky_relu_sq_mlp, inputs)
    f64 = run(leaky_relu_sq_mlp_ref, inputs, torch.float64)
    assert not got["y"].any() and not got["d_x"].any() and not got["d_up"].any()
    numerics.assert_fp8_mlp("d_down", got["d_down"], f64["d_down"])


@needs_fp8
def test_fp8_measures_every_row() -> None:
    """A gradient, and an x, of odd rows only."""
    inputs = arguments(8192, 16, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        inputs["x"][::2] = 0
    leaves = [inputs[key] for key in ("x", "up", "down")]
    dy = torch.cos(torch.arange(8192 * 16, device=DEVICE)).view(8192, 16).bfloat16() * 2.0**-30
    dy[::2] = 0
    got = torch.autograd.grad(leaky_relu_sq_mlp(*leaves, fp8=True), leaves, dy)
    doubled = [t.detach().double().requires_grad_() for t in leaves]
    want = torch.autograd.grad(leaky_relu_sq_mlp_ref(*doubled), doubled, dy.double())
    for key, ours, truth in zip(("d_x", "d_up", "d_down"), got, want, strict=True):
        numerics.assert_fp8_mlp(key, ours, truth)


@needs_fp8
def test_fp8_sums_of_more_blocks_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SUMS", 3)
    x = torch.ones(4801, 16, device=DEVICE)  # ten blocks, the last ragged
    sums, of_x, of_w = module._sums(x)
    assert len(sums) == of_x == 3 and of_w == 0 and sums.sum().item() == x.numel()


@needs_fp8
def test_fp8_sums_of_three_tensors() -> None:
    x, up, down = torch.ones(4801, 16, device=DEVICE), torch.ones(700, 16, device=DEVICE), torch.ones(16, 700)
    sums, of_x, of_w = module._sums(x, up, 2 * down.to(DEVICE))
    assert [part.sum().item() for part in sums.split([of_x, of_w, of_w])] == [4801 * 16, 700 * 16, 4 * 700 * 16]


@needs_fp8
@pytest.mark.parametrize("size", [(144, 64, 80), (272, 144, 176)])
def test_fp8_weight_gradients_in_one_kernel(size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In chains of 128 terms; the same products as torch's, but for the order of the sums."""
    inputs = arguments(*size, dtype=torch.bfloat16) | {"fp8": True}
    monkeypatch.setattr(module, "_weights_path", lambda *_: "apart")
    apart = run(leaky_relu_sq_mlp, inputs)
    monkeypatch.setattr(module, "_weights_path", lambda *_: "together")
    monkeypatch.setattr(module, "CHAIN", 128)
    got, f64 = run(leaky_relu_sq_mlp, inputs), run(leaky_relu_sq_mlp_ref, inputs, torch.float64)
    for key in got:
        numerics.assert_fp8_mlp(key, got[key], f64[key])
        numerics.assert_fp8_mlp(key, got[key], apart[key].double())


@needs_fp8
@pytest.mark.parametrize("path", ["descriptors", "pointers"])
def test_fp8_by_either_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = arguments(144, 64, 96, dtype=torch.bfloat16) | {"fp8": True}
    if path == "pointers":
        monkeypatch.setattr(module, "_path", lambda *_: "pointers")
    got, f64 = run(leaky_relu_sq_mlp, inputs), run(leaky_relu_sq_mlp_ref, inputs, torch.float64)
    for key in got:
        numerics.assert_fp8_mlp(key, got[key], f64[key])


@needs_fp8
@pytest.mark.parametrize("wanted", SUBSETS, ids=",".join)
def test_fp8_frozen_inputs(wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_weights_path", lambda *_: "apart")  # as where one of the weights is frozen
    inputs = arguments(32, 16, 48, dtype=torch.bfloat16) | {"fp8": True}
    got, want = frozen(inputs, wanted), run(leaky_relu_sq_mlp, inputs)
    for key in wanted:
        assert torch.equal(got[key], want[f"d_{key}"]), key


@needs_fp8
def test_fp8_op_is_registered_rightly() -> None:
    inputs = arguments(32, 16, 48, dtype=torch.bfloat16)
    tensors = [inputs[key] for key in ("x", "up", "down")]
    tests = ("test_autograd_registration", "test_faketensor")  # the others calculate with 8-bit floats
    torch.library.opcheck(module._op_fp8, (*tensors, 0.5), test_utils=tests)
    kept = [t.detach() for t in module._op_fp8(*tensors, 0.5)[1:]]
    for wanted in ((True, True, True), (False, True, False)):
        torch.library.opcheck(module._op_fp8_backward, (inputs["x"].detach(), *kept, 0.5, *wanted), test_utils=tests)


@needs_fp8
def test_fp8_compiles_whole() -> None:
    inputs = arguments(32, 16, 48, dtype=torch.bfloat16) | {"fp8": True}
    got = run(torch.compile(leaky_relu_sq_mlp, fullgraph=True, backend="aot_eager"), inputs)
    want = run(leaky_relu_sq_mlp, inputs)
    for key in want:
        assert torch.equal(got[key], want[key]), key


# -------------------------------------------------------------------------------------------------------- refusals

X, UP, DOWN = torch.zeros(4, 16), torch.zeros(8, 16), torch.zeros(16, 8)
REFUSED = {
    "no dimension": ({"x": torch.tensor(1.0)}, ValueError, r"x of shape \(..., 16\), got \(\)"),
    "x too narrow": ({"x": torch.zeros(4, 15)}, ValueError, r"x of shape \(..., 16\), got \(4, 15\)"),
    "up as a vector": ({"up": torch.zeros(16)}, ValueError, r"up of shape \(F, D\), got \(16,\)"),
    "no hidden columns": ({"up": torch.zeros(0, 16)}, ValueError, r"got \(0, 16\)"),
    "down the other way": ({"down": torch.zeros(8, 16)}, ValueError, r"down of shape \(16, 8\), got \(8, 16\)"),
    "integers": ({"x": torch.zeros(4, 16, dtype=torch.int32)}, TypeError, "expected x in .*got torch.int32"),
    "weights in another dtype": ({"up": UP.bfloat16()}, TypeError, "up in torch.float32 as x, got torch.bfloat16"),
    "down in another dtype": ({"down": DOWN.double()}, TypeError, "down in torch.float32 as x, got torch.float64"),
    "weights elsewhere": ({"down": DOWN.to("meta")}, ValueError, "down on .* as x, got meta"),
    "columns apart": ({"x": torch.zeros(16, 4).t()}, ValueError, r"contiguous x, got strides \(1, 4\)"),
    "rows apart": ({"up": torch.zeros(8, 32)[:, :16]}, ValueError, r"contiguous up, got strides \(32, 1\)"),
    "down transposed": ({"down": torch.zeros(8, 16).t()}, ValueError, r"contiguous down, got strides \(1, 16\)"),
    "slope as a tensor": ({"negative_slope": torch.tensor(0.5)}, TypeError, "negative_slope to be a number"),
    "slope as a bool": ({"negative_slope": True}, TypeError, "negative_slope to be a number, got True"),
    "slope without end": ({"negative_slope": -math.inf}, ValueError, "finite negative_slope, got -inf"),
    "slope not a number": ({"negative_slope": math.nan}, ValueError, "finite negative_slope, got nan"),
    "x as a list": ({"x": [1.0]}, TypeError, r"x to be a tensor, got \[1.0\]"),
    "no up": ({"up": None}, TypeError, "up to be a tensor, got None"),
    "no down": ({"down": None}, TypeError, "down to be a tensor, got None"),
    "fp8 of no kind": ({"fp8": 1}, TypeError, "fp8 to be a bool, got 1"),
    "fp8 on float32": ({"fp8": True}, TypeError, "bfloat16 or float16 for fp8, got torch.float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    change, error, message = REFUSED[case]
    with pytest.raises(error, match=f"leaky_relu_sq_mlp: .*{message}"):
        leaky_relu_sq_mlp(**{"x": X, "up": UP, "down": DOWN, **change})


@needs_fp8
@pytest.mark.parametrize("size", [(15, 16, 16), (16, 24, 16), (16, 16, 40)])
def test_fp8_refuses_ragged_sizes(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"multiples of 16 for fp8, got {size[0]} rows, D = {size[1]}, F = {size[2]}"):
        leaky_relu_sq_mlp(**arguments(*size, dtype=torch.bfloat16), fp8=True)


@pytest.mark.skipif(TRITON_RUNS, reason="the interpreter has 8-bit floats")
def test_fp8_refuses_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"compute capability 8\.9 or later for fp8, got cpu"):
        leaky_relu_sq_mlp(**arguments(16, 16, 16, dtype=torch.bfloat16), fp8=True)


# ------------------------------------------------------------------------------------------------------ only on a card


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(2**20 + 130, 64, 2056), (2**20 + 130, 60, 2055)], ids=["descriptors", "pointers"])
def test_offsets_beyond_int32(size: tuple[int, ...]) -> None:
    """Beyond 2^31 elements of a and dh."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    inputs = leaky_relu_sq_mlp_inputs(size, torch.bfloat16, "cuda")
    assert size[0] * size[2] > 2**31
    got = run(leaky_relu_sq_mlp, inputs, dy=1.0)
    tail = inputs | {"x": inputs["x"].detach()[-300:].clone().requires_grad_()}
    eager, f64 = (run(leaky_relu_sq_mlp_ref, tail, dtype, dy=1.0) for dtype in (None, torch.float64))
    for key in ("y", "d_x"):
        numerics.assert_like_eager(key, got[key][-300:], eager[key], f64[key])
