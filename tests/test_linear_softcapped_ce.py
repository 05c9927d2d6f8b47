"""Edge cases of kernels/linear_softcapped_ce.py, and the faults its contract must reject."""

import numerics
import pytest
import torch
from torch import Tensor

from niblick.kernels import linear_softcapped_ce as module
from niblick.kernels.linear_softcapped_ce import linear_softcapped_ce, linear_softcapped_ce_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FAULTS = [
    ("(exp_z * (s - s * s)).to(e_ptr", "exp_z.to(e_ptr"),  # no derivative of the cap
    ("acc * (2.885390081777927 / softcap)", "acc * (2.885390081777927 / 29.0)"),  # another cap in the tiles
    ("(cols[None, :] != target[:, None]) & (cols[None, :] < V)", "cols[None, :] < V"),  # the target counts twice
    ("(cols[None, :] != target[:, None]) & (cols[None, :] < V)", "cols[None, :] != target[:, None]"),  # masked columns
    ("for start in range(0, D, BLOCK_K)", "for start in range(0, D - BLOCK_K + 1, BLOCK_K)"),  # ragged tail dropped
    ("tl.store(e_ptrs, e, mask=(rows[:, None] < n_rows) & (cols[None, :] < V))",
     "tl.store(e_ptrs, e, mask=(rows[:, None] < n_rows) & (cols[None, :] < V - 1))"),  # last column never written
    ("e_ptr + rows * stride_e + target,", "e_ptr + rows * stride_e + (target + 1) % V,"),  # the next column's
    ("(-others * e * q * q)", "(-others)"),  # no derivative at the target
    ("(-others * e * q * q)", "(-(mine + others) * e * q * q)"),  # p_t - 1 taken as -1
    ("ratio = share * 4.0 / (mine + others)", "ratio = share * 4.0 / others"),
    ("ratio = share * 4.0 / (mine + others)", "ratio = 4.0 / (mine + others)"),  # weights and ignored rows forgotten
    ("share = tl.where(target == ignore_index, 0.0, share)", "share = share"),
    ("tl.where(others > mine, far, 0.0) + ", ""),  # the loss as if every row were confident
    ("tl.store(loss_ptr + rows, share * loss", "tl.store(loss_ptr + rows, loss"),
    ("x_ptr + rows[:, None] * stride_x + k[None, :]", "x_ptr + rows[:, None] * D + k[None, :]"),  # row stride ignored
    ("weight_ptr + target[:, None] * stride_weight + d", "weight_ptr + target[:, None] * D + d"),
    ("rows * stride_target, mask=here", "rows, mask=here"),  # targets read as if adjacent
    ("rows * stride_weights", "rows"),
    ("out *= tl.load(ratio_ptr", "out += 0.0 * tl.load(ratio_ptr"),  # dx without its rows' factors
    ("(out * factor)", "out"),  # upstream gradient ignored
    ("scaled = (x * ratio[:, None])", "scaled = x"),  # dweight of rows that all weigh the same
    ("x.new_empty((N if with_dx else 0, D))", "x.new_empty((N, D), dtype=wide if N % 2 else x.dtype)"),  # fake lies
]  # fmt: skip


def arguments(N: int, V: int, D: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(N, D, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) * 12 / D**0.5).to(DEVICE, dtype).requires_grad_()
    return {"x": x, "weight": weight, "targets": torch.randint(V, (N,), generator=generator).to(DEVICE)}


def results(fn, tensors: dict[str, Tensor], upstream: float = 1.0, **kwargs) -> dict[str, Tensor]:
    loss = fn(**tensors, **kwargs)
    wanted = {key: tensor for key, tensor in tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()), torch.full_like(loss, upstream)) if wanted else ()
    return {"loss": loss.detach()} | dict(zip(wanted, gradients, strict=True))


def detached(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {key: t.detach().to(dtype or t.dtype) if t.is_floating_point() else t for key, t in tensors.items()}


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    doubled = detached(tensors, torch.float64)
    return {key: doubled[key].requires_grad_(tensor.requires_grad) for key, tensor in tensors.items()}


def assert_as_reference(tensors: dict[str, Tensor], **kwargs) -> None:
    got, eager = results(linear_softcapped_ce, tensors, **kwargs), results(linear_softcapped_ce_ref, tensors, **kwargs)
    f64 = results(linear_softcapped_ce_ref, double(tensors), **kwargs)
    assert got.keys() == eager.keys()
    for key in got:
        numerics.assert_like_eager(key, got[key], eager[key], f64[key])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_count_only_rows_not_ignored(reduction: str, weighted: bool) -> None:
    tensors = arguments(9, 70, 20)
    tensors["targets"][2:4] = -100
    if weighted:
        tensors["weights"] = torch.linspace(0, 2, 9, device=DEVICE)
    assert_as_reference(tensors, reduction=reduction, upstream=-3.5)


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_without_reduction_and_gradient(weighted: bool) -> None:
    tensors = detached(arguments(9, 70, 20))
    tensors["targets"][4] = -100
    if weighted:
        tensors["weights"] = torch.linspace(0, 2, 9, device=DEVICE)
    assert_as_reference(tensors, reduction="none")


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_one_gradient_alone(frozen: str) -> None:
    tensors = arguments(9, 70, 20)
    assert_as_reference(tensors | {frozen: tensors[frozen].detach()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks, the last one short: dweight is their sum."""
    tensors = arguments(20, 70, 20, dtype)
    tensors["weights"] = torch.linspace(0.5, 2, 20, device=DEVICE)
    tensors["targets"][9] = -100
    monkeypatch.setitem(module.LAUNCH, "rows", 8)
    assert_as_reference(tensors)


def test_all_rows_ignored() -> None:
    tensors = arguments(3, 50, 8)
    tensors["targets"][:] = 7
    got = results(linear_softcapped_ce, tensors, ignore_index=7, reduction="sum")
    assert got["loss"] == 0 and not got["x"].any() and not got["weight"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("why", ["ignored", "no rows", "weightless"])
def test_mean_over_nothing(why: str, dtype: torch.dtype) -> None:
    """NaN, as in torch, but with gradients that leave the parameters as they are."""
    tensors = arguments(0 if why == "no rows" else 3, 50, 8, dtype)
    if why == "ignored":
        tensors["targets"][:] = -100
    elif why == "weightless":
        tensors["weights"] = torch.zeros(3, device=DEVICE)
    for fn in (linear_softcapped_ce, linear_softcapped_ce_ref):
        got = results(fn, tensors)
        assert got["loss"].isnan() and not got["x"].any() and not got["weight"].any()


@pytest.mark.parametrize("V", [1, 2, 65])
@pytest.mark.parametrize("softcap", [5.0, 64.0])
def test_any_vocabulary_and_softcap(V: int, softcap: float) -> None:
    """Under softcap 64, with logits of some hundreds, E spans e^±64; with one column there is nothing to learn."""
    tensors = arguments(5, V, 16)
    tensors["weight"] = (tensors["weight"].detach() * 8).requires_grad_()
    assert_as_reference(tensors, softcap=softcap)


def test_confident_row_keeps_its_gradient() -> None:
    """p = 0.999: p - 1 rounded before the subtraction would be wrong by 100 % in bfloat16."""
    weight = torch.zeros(1000, 8, device=DEVICE, dtype=torch.bfloat16)
    x = torch.zeros(1, 8, device=DEVICE, dtype=torch.bfloat16)
    weight[3, 0], x[0, 0] = 1.0, 15.0  # capped to 13.86, so p = 1 / (1 + 999 exp(-13.86)) = 0.99904
    tensors = {"x": x.requires_grad_(), "weight": weight, "targets": torch.tensor([3], device=DEVICE)}
    got, want = results(linear_softcapped_ce, tensors), results(linear_softcapped_ce_ref, double(tensors))
    assert abs(got["x"][0, 0].item() / want["x"][0, 0].item() - 1) < numerics.CONFIDENT_ROW


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is refused on a GPU")
def test_float64_is_the_reference_itself() -> None:
    tensors = arguments(7, 40, 16, torch.float64) | {"weights": torch.linspace(0, 1, 7, dtype=torch.float64)}
    tensors["targets"][1] = -100
    got, want = results(linear_softcapped_ce, tensors), results(linear_softcapped_ce_ref, tensors)
    for key in want:
        numerics.assert_same_f64(key, got[key], want[key])


def test_backward_twice_through_a_kept_graph() -> None:
    tensors = arguments(6, 40, 16)
    loss = linear_softcapped_ce(**tensors)
    leaves = [tensors["x"], tensors["weight"]]
    first, second = (torch.autograd.grad(loss, leaves, torch.tensor(u).to(loss), retain_graph=True) for u in (1.0, 2.0))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


def test_int32_targets_and_no_rows() -> None:
    tensors = arguments(6, 40, 16)
    got, want = (
        results(linear_softcapped_ce, tensors | {"targets": t(tensors["targets"])}) for t in (Tensor.int, Tensor.long)
    )
    assert all(torch.equal(got[key], want[key]) for key in want)
    empty = results(linear_softcapped_ce, arguments(0, 40, 16), reduction="sum")
    assert empty["loss"] == 0 and empty["x"].shape == (0, 16) and not empty["weight"].any()


@pytest.mark.parametrize("bad", [40, -1, 2**40])
def test_target_out_of_range_is_nan_in_its_row_alone(bad: int) -> None:
    """But dweight, a sum over the rows, is NaN as a whole."""
    tensors = arguments(3, 40, 16)
    tensors["targets"][1] = bad
    loss = linear_softcapped_ce(**detached(tensors), reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    got = results(linear_softcapped_ce, tensors, reduction="sum")
    assert got["x"].isnan().any(1).tolist() == [False, True, False] and got["weight"].isnan().all()


def test_nan_in_an_ignored_row() -> None:
    """Its loss is 0, and so is its gradient in plain PyTorch; the kernels multiply what they have read by 0."""
    tensors = arguments(4, 40, 16)
    tensors["targets"][1] = -100
    with torch.no_grad():
        tensors["x"][1, 3] = float("nan")
    loss = linear_softcapped_ce(**detached(tensors), reduction="none")
    assert loss[1] == 0 and loss.isfinite().all()
    got = results(linear_softcapped_ce, tensors)
    assert got["loss"].isfinite() and got["x"][[0, 2, 3]].isfinite().all()
    if DEVICE == "cpu" and not module.INTERPRETED:
        assert not got["x"][1].any() and got["weight"].isfinite().all()


def test_compiles_with_numbers_that_change() -> None:
    def call(x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
        return linear_softcapped_ce(x, weight, targets, softcap)

    torch._dynamo.reset()
    whole = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for N, softcap in ((5, 30.0), (6, 15.0), (7, 20)):
        tensors = arguments(N, 40, 16)
        got, want = (results(fn, tensors, softcap=softcap) for fn in (whole, call))
        assert all(torch.equal(got[key], want[key]) for key in want)


def test_fp8_of_no_rows() -> None:
    tensors = detached(arguments(0, 40, 16, torch.bfloat16))
    total, rows, raw, _, dweight = module._forward(*tensors.values(), None, 30.0, -100, True, True, True)
    assert total == 0 and rows.shape == (0,) and raw.shape == (0, 16) and not dweight.any()


def test_weights_to_learn_where_nothing_is_differentiated() -> None:
    tensors = detached(arguments(4, 40, 16))
    weights = torch.linspace(0.5, 2, 4, device=DEVICE)
    want = linear_softcapped_ce(**tensors, weights=weights)
    with torch.no_grad():
        assert torch.equal(linear_softcapped_ce(**tensors, weights=weights.clone().requires_grad_()), want)


def test_check_targets_names_the_row() -> None:
    tensors = arguments(4, 40, 16)
    linear_softcapped_ce(**tensors, check_targets=True)
    tensors["targets"][0], tensors["targets"][2] = -100, -5
    with pytest.raises(ValueError, match=r"targets in \[0, 40\) or -100, got -5 in row 2"):
        linear_softcapped_ce(**tensors, check_targets=True)


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [False, True])
def test_fp8_logits(weighted: bool) -> None:
    tensors = arguments(1000, 2000, 512, torch.bfloat16)
    tensors["weight"] = (tensors["weight"].detach() / 3).requires_grad_()
    if weighted:
        tensors["weights"] = torch.linspace(0.5, 2, 1000, device=DEVICE)
    got = results(linear_softcapped_ce, tensors, fp8=True)
    want = results(linear_softcapped_ce_ref, double(tensors))
    for key in want:
        numerics.assert_fp8_logits(key, got[key], want[key])


@pytest.mark.gpu
def test_row_offsets_beyond_int32() -> None:
    """x holds more than 2^31 elements; the last rows are as if they were alone."""
    N, V, D, last = 4194432, 72, 512, 1000
    tensors = arguments(last, V, D, torch.bfloat16)
    got = results(linear_softcapped_ce, tensors, reduction="sum")
    x = torch.zeros(N, D, dtype=torch.bfloat16, device=DEVICE)
    x[-last:] = tensors["x"].detach()
    targets = torch.full((N,), -100, device=DEVICE)
    targets[-last:] = tensors["targets"]
    far = results(linear_softcapped_ce, tensors | {"x": x.requires_grad_(), "targets": targets}, reduction="sum")
    f64 = results(linear_softcapped_ce_ref, double(tensors), reduction="sum")
    assert not far["x"][:-last].any()
    for key in got:
        numerics.assert_like_eager(key, far[key][-last:] if key == "x" else far[key], got[key], f64[key])


HALF = torch.zeros(4, 16, dtype=torch.float16)
REFUSED = {
    "one dimension": ({"x": torch.zeros(16)}, ValueError, r"x of shape \(N, D\), got \(16,\)"),
    "no columns": ({"x": torch.zeros(4, 0)}, ValueError, r"x of shape \(N, D\), got \(4, 0\)"),
    "another D": ({"weight": torch.zeros(5, 15)}, ValueError, r"weight of shape \(V, 16\), got \(5, 15\)"),
    "no vocabulary": ({"weight": torch.zeros(0, 16)}, ValueError, r"weight of shape \(V, 16\), got \(0, 16\)"),
    "float16": ({"x": HALF}, TypeError, "got x in torch.float16"),
    "two dtypes": ({"weight": torch.zeros(5, 16).bfloat16()}, TypeError, "weight in torch.float32 as x, got torch.bf"),
    "columns apart": ({"x": torch.zeros(16, 4).t()}, ValueError, r"x with adjacent columns, got strides \(1, 4\)"),
    "too few targets": ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets of shape \(4,\).*\(3,\)"),
    "x in a list": ({"x": [[0.0]]}, TypeError, "x as a tensor, got list"),
    "weight in numpy": ({"weight": torch.zeros(5, 16).numpy()}, TypeError, "weight as a tensor, got ndarray"),
    "targets in a list": ({"targets": [0, 1, 2, 3]}, TypeError, "targets as a tensor, got list"),
    "no targets": ({"targets": None}, TypeError, "targets as a tensor, got NoneType"),
    "weights in a list": ({"weights": [1.0]}, TypeError, "weights as a tensor, got list"),
    "float targets": ({"targets": torch.zeros(4)}, TypeError, "int64 or int32, got torch.float32"),
    "targets elsewhere": ({"targets": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "got meta"),
    "a weight a column": ({"weights": torch.ones(5)}, ValueError, r"weights of shape \(4,\).*\(5,\)"),
    "whole weights": ({"weights": torch.ones(4, dtype=torch.int64)}, TypeError, "got torch.int64"),
    "weights to learn": ({"weights": torch.ones(4, requires_grad=True)}, ValueError, "weights that require no grad"),
    "softcap 0": ({"softcap": 0.0}, ValueError, "softcap <= 64, got 0.0"),
    "softcap 65": ({"softcap": 65.0}, ValueError, "softcap <= 64, got 65.0"),
    "softcap nan": ({"softcap": float("nan")}, ValueError, "softcap <= 64, got nan"),
    "softcap inf": ({"softcap": float("inf")}, ValueError, "softcap <= 64, got inf"),
    "softcap to learn": ({"softcap": torch.ones(1)}, TypeError, "softcap as a number, got Tensor"),
    "three numbers": ({"softcap": (23.0, 5.0, 7.5)}, TypeError, "softcap as a number, got tuple"),
    "ignore_index a float": ({"ignore_index": -100.0}, TypeError, "ignore_index as an int, got float"),
    "ignore_index 2^63": ({"ignore_index": 2**63}, ValueError, "ignore_index in 64 bits, got 9223372036854775808"),
    "reduction": ({"reduction": "average"}, ValueError, "got 'average'"),
    "fp8 on a CPU": ({"fp8": True}, ValueError, "compute capability 8.9 for fp8, got cpu"),
    "a gradient a row": ({"x": torch.zeros(4, 16, requires_grad=True), "reduction": "none"}, ValueError, "no gradient"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    change, error, message = REFUSED[case]
    good = {"x": torch.zeros(4, 16), "weight": torch.zeros(5, 16), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        linear_softcapped_ce(**good | change)
