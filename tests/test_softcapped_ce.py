"""Edge cases of kernels/softcapped_ce.py, and the faults its contract must reject."""

import numerics
import pytest
import torch
from torch import Tensor

from niblick.kernels.softcapped_ce import softcapped_ce, softcapped_ce_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

STORE = "tl.store(dlogits_ptr + row * V + cols, dx.to(dlogits_ptr.dtype.element_ty), mask=cols < V"
FAULTS = [
    ("4.0 * e * s * s\n", "1.0 + 0.0 * e\n"),  # no derivative of the cap
    ("tl.where(x > 0, e * s, s), 4.0", "tl.where(x >= -softcap, e * s, s), 4.0"),  # cap right for one sign only
    ("tl.where(cols == target, -miss,", "tl.where(cols == target + 1, -miss,"),  # the subtracted one in the next column
    ("(cols < V) & (cols != target)", "cols < V"),  # target summed with the others: it counts twice
    ("w = tl.where((cols < V) & (cols != target), w", "w = tl.where(cols != target, w"),  # masked columns counted
    ("dz = dloss * tl.where", "dz = tl.where"),  # upstream gradient ignored
    ("row * stride_dloss", "row"),  # expanded dloss read as if contiguous
    ("tl.exp(-w - lse))", "tl.where(cols < BLOCK_V, tl.exp(-w - lse), 0.0))"),  # no gradient after the first block
    ("others * tl.exp(closer - nearest)", "others"),  # online sum not rescaled
    (STORE, STORE + " - 1"),  # last column never written
    ("mask=cols < V, other=0.0).to(tl.float32), softcap)", "mask=cols < V - 1, other=0.0).to(tl.float32), softcap)"),
    ("dx = tl.where(target == ignore_index, 0.0, dz * slope)", "dx = dz * slope"),  # ignored rows get a gradient
    ("tl.where(ignored, 0.0, tl.log(total)", "tl.where(False, 0.0, tl.log(total)"),  # and a loss
    ("logits_ptr + row * stride_row + cols", "logits_ptr + row * V + cols"),  # row stride ignored, backward
    ("row_ptr = logits_ptr + row * stride_row", "row_ptr = logits_ptr + row * V"),  # and forward
    ("others / total)", "(others / total).to(tl.bfloat16).to(tl.float32))"),  # what the gradient needs, rounded
    ("n_rows, V = logits.shape\n    loss", "n_rows, V = logits.detach().mul_(0.5).shape\n    loss"),  # overwrites x
    ("return logits.new_empty(logits.shape)", "return logits.new_empty(logits.shape, dtype=dloss.dtype)"),  # fake lies
    ("tuple(logits.new_empty(logits.shape[0], dtype=dtype)", "tuple(logits.new_empty(logits.shape[0])"),
]  # fmt: skip


def logits_and_targets(n_rows: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(n_rows, V, generator=generator) * 15).to(DEVICE, dtype)
    return logits.requires_grad_(), torch.randint(V, (n_rows,), generator=generator).to(DEVICE)


def loss_and_gradient(fn, logits: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    loss = fn(logits, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, logits, torch.ones_like(loss))[0]


def assert_as_reference(logits: Tensor, targets: Tensor, **kwargs) -> None:
    f64_logits = logits.detach().double().requires_grad_()
    got = loss_and_gradient(softcapped_ce, logits, targets, **kwargs)
    eager = loss_and_gradient(softcapped_ce_ref, logits, targets, **kwargs)
    f64 = loss_and_gradient(softcapped_ce_ref, f64_logits, targets, **kwargs)
    for what, *values in zip(("loss", "gradient"), got, eager, f64, strict=True):
        numerics.assert_matches_f64(what, *values)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_count_only_rows_not_ignored(reduction: str) -> None:
    logits, targets = logits_and_targets(7, 600)
    targets[2:4] = -100
    assert_as_reference(logits, targets, reduction=reduction)


def test_all_rows_ignored() -> None:
    logits, targets = logits_and_targets(3, 50)
    targets[:] = 7
    loss, gradient = loss_and_gradient(softcapped_ce, logits, targets, ignore_index=7, reduction="sum")
    assert loss == 0 and not gradient.any()
    assert softcapped_ce(logits, targets, ignore_index=7).isnan()  # no row to take the mean of, as in torch


@pytest.mark.parametrize("V", [1, 2, 3, 257])
@pytest.mark.parametrize("softcap", [15.0, 60.0])
def test_any_vocabulary_and_softcap(V: int, softcap: float) -> None:
    """Under softcap 60 logits near -40 lie some 95 below the cap, beyond the range of exp in float32."""
    logits, targets = logits_and_targets(5, V, torch.bfloat16)
    logits = (logits.detach() / 4 - 40).requires_grad_()
    assert_as_reference(logits, targets, softcap=softcap, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    if dtype == torch.float64 and DEVICE != "cpu":
        pytest.skip("float64 is refused on a GPU")
    logits, targets = logits_and_targets(4, 300, dtype)
    assert softcapped_ce(logits, targets).dtype == torch.promote_types(dtype, torch.float32)
    assert_as_reference(logits, targets)


def test_float64_is_the_reference_itself() -> None:
    logits, targets = logits_and_targets(5, 300, torch.float64)
    targets[1] = -100
    got = loss_and_gradient(softcapped_ce, logits.cpu().detach().requires_grad_(), targets.cpu())
    want = loss_and_gradient(softcapped_ce_ref, logits.cpu().detach().requires_grad_(), targets.cpu())
    for what, a, b in zip(("loss", "gradient"), got, want, strict=True):
        numerics.assert_same_f64(what, a, b)


def test_confident_row_keeps_its_gradient() -> None:
    """p = 0.999: p - 1 rounded before the subtraction would be wrong by 100 % in bfloat16."""
    logits = torch.zeros(1, 1000, device=DEVICE, dtype=torch.bfloat16)
    logits[0, 3] = 15.0  # capped to 13.86, so p = 1 / (1 + 999 exp(-13.86)) = 0.99904
    targets = torch.tensor([3], device=DEVICE)
    _, got = loss_and_gradient(softcapped_ce, logits.requires_grad_(), targets)
    _, want = loss_and_gradient(softcapped_ce_ref, logits.detach().double().requires_grad_(), targets)
    assert abs(got[0, 3].item() / want[0, 3].item() - 1) < numerics.CONFIDENT_ROW


def test_rows_of_a_wider_tensor_and_int32_targets() -> None:
    wide, targets = logits_and_targets(5, 210)
    columns, targets = wide.detach()[:, 3:203], targets.clamp(max=199)
    got = loss_and_gradient(softcapped_ce, columns.requires_grad_(), targets.int())
    want = loss_and_gradient(softcapped_ce, columns.detach().clone().requires_grad_(), targets)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_target_out_of_range_is_nan_in_its_row_alone() -> None:
    logits, targets = logits_and_targets(3, 40)
    if not softcapped_ce_runs_triton():
        pytest.skip("the eager CPU path raises instead")
    targets[1] = 40
    loss = softcapped_ce(logits, targets, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]


def softcapped_ce_runs_triton() -> bool:
    from niblick.kernels import softcapped_ce as module

    return DEVICE == "cuda" or module.INTERPRETED


def test_no_rows() -> None:
    logits, targets = logits_and_targets(0, 40)
    loss, gradient = loss_and_gradient(softcapped_ce, logits, targets, reduction="none")
    assert loss.shape == (0,) and gradient.shape == (0, 40)
    assert softcapped_ce(logits, targets, reduction="sum") == 0


REFUSED = {
    "one dimension": ({"logits": torch.zeros(5)}, ValueError, r"expected logits of shape \(n_rows, V\), got \(5,\)"),
    "no columns": ({"logits": torch.zeros(4, 0)}, ValueError, r"got \(4, 0\)"),
    "integers": ({"logits": torch.zeros(4, 5, dtype=torch.int32)}, TypeError, "got torch.int32"),
    "columns apart": ({"logits": torch.zeros(5, 4).t()}, ValueError, r"stride 1, got \(1, 4\)"),
    "too few targets": ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"shape \(4,\).*got \(3,\)"),
    "float targets": ({"targets": torch.zeros(4)}, TypeError, "int64 or int32, got torch.float32"),
    "targets elsewhere": ({"targets": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "got meta"),
    "softcap 0": ({"softcap": 0.0}, ValueError, "softcap > 0, got 0.0"),
    "softcap nan": ({"softcap": float("nan")}, ValueError, "softcap > 0, got nan"),
    "reduction": ({"reduction": "average"}, ValueError, "got 'average'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    change, error, message = REFUSED[case]
    arguments = {"logits": torch.zeros(4, 5), "targets": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        softcapped_ce(**arguments)


@pytest.mark.gpu
def test_refuses_float64_on_a_gpu() -> None:
    logits, targets = logits_and_targets(2, 8, torch.float64)
    with pytest.raises(TypeError, match=r"float64 on CPU only\), got torch.float64 on cuda"):
        softcapped_ce(logits, targets)
