"""Edge cases of kernels/smear_gate.py, and the faults its contract must reject."""

import math

import numerics
import pytest
import torch
from torch import Tensor

from niblick.kernels.smear_gate import smear_gate, smear_gate_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOS = 1

FAULTS = [
    # forward
    ("!= bos_id)\n    return head", "!= bos_id + 1)\n    return head"),  # the mask on another id
    ("if bos_id is not None:\n        open_", "if bos_id is None:\n        open_"),  # the mask vanishes
    ("open_ = (rows >= 1) & (rows < N)", "open_ = (rows >= 2) & (rows < N)"),  # row 1 takes nothing in
    ("s = 1.0 / (1.0 + tl.exp(-tl.sum(head * w", "s = 1.0 / (1.0 + tl.exp(tl.sum(head * w"),  # sign of the gate
    ("mask=inside, other=0.0).to(WIDE)", "mask=inside & (cols[None, :] < W - 1), other=0.0).to(WIDE)"),
    ("gate[:, None].to(tl.float32) * previous", "gate[:, None].to(tl.float32) * x"),  # smears the token with itself
    # backward
    ("!= bos_id)\n    m = ", "!= bos_id + 1)\n    m = "),  # the mask on another id
    ("if bos_id is not None:\n        takes", "if bos_id is None:\n        takes"),
    ("takes = (row >= 1) & (row < N)", "takes = (row >= 2) & (row < N)"),
    ("tl.exp(-tl.sum(w * head", "tl.exp(tl.sum(w * head"),
    ("u = scale * s * (1.0 - s) * a", "u = scale * s * a"),  # no derivative of the sigmoid
    ("u = scale * s * (1.0 - s) * a", "u = s * (1.0 - s) * a"),  # nor of the scale
    ("+ g_next * dy_next", ""),  # nothing handed to the token before
    ("(m_next * scale * s_next)", "(scale * s_next)"),  # gradient leaks over the document's start
    ("(m_next * scale * s_next)", "(m_next * scale * s)"),  # gate of the wrong row
    (" + u.to(tl.float32) * w_row\n", "\n"),  # gradient through the gate itself missing
    ("s, m, m * tl.sum(dy", "s, m, tl.sum(dy"),  # masked rows move weight and scale
    ("tl.sum(dy.to(WIDE) * x_before.to(WIDE)", "tl.sum(dy.to(WIDE) * dy.to(WIDE)"),  # a of the wrong rows
    ("dscale += s * a", "dscale += tl.where(row < N - 1, s * a, 0.0)"),  # last row left out of dλ
    ("dweight += u * head", "dweight += u * head_next"),
    ("mask=(cols < D) & (row >= 1), other=0.0", "mask=(cols < 0), other=0.0"),  # strips do not touch
    ("cols.to(tl.int64) * stride_dy_col", "cols.to(tl.int64)"),  # dy read as if contiguous
    ("dy_ptr + row * stride_dy +", "dy_ptr + row * D +"),
    ("mask=i < n_programs, other=0.0", "mask=i < n_programs - 1, other=0.0"),  # the last program's share lost
    ("range(ROWS)", "range(ROWS - 1)"),  # the last row of a strip never written
    ("return x.new_empty(x.shape)\n", "return x.new_empty(x.shape, dtype=torch.float64)\n"),  # fake lies
]


def arguments(N: int, D: int, W: int = 12, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    accurate = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": torch.randn(N, D, generator=generator).to(DEVICE, dtype).requires_grad_(),
        "weight": torch.randn(W, generator=generator).to(DEVICE, accurate).requires_grad_(),
        "scale": torch.full((1,), 0.75, device=DEVICE, dtype=accurate, requires_grad=True),
        "token_ids": torch.randint(4, (N,), generator=generator).to(DEVICE),
    }


def results(fn, tensors: dict[str, Tensor], bos_id: int | None = BOS) -> dict[str, Tensor]:
    y = fn(**tensors, bos_id=bos_id)
    wanted = [key for key, value in tensors.items() if value.requires_grad]
    dy = torch.cos(torch.arange(y.numel())).bfloat16().view_as(y).to(y)
    gradients = torch.autograd.grad(y, [tensors[key] for key in wanted], dy)
    return {"y": y.detach()} | dict(zip(wanted, gradients, strict=True))


def double(value: Tensor) -> Tensor:
    return value.detach().double().requires_grad_() if value.is_floating_point() else value


def assert_as_reference(tensors: dict[str, Tensor], bos_id: int | None = BOS) -> None:
    got, eager = results(smear_gate, tensors, bos_id), results(smear_gate_ref, tensors, bos_id)
    f64 = results(smear_gate_ref, {key: double(value) for key, value in tensors.items()}, bos_id)
    for key in got:
        numerics.assert_matches_f64(key, got[key], eager[key], f64[key])


def test_by_hand() -> None:
    """Weight 0 opens the gate by one half: y_t = x_t + x_{t-1} with scale 2, but not into a document's first token."""
    x = torch.tensor([[1.0], [10.0], [100.0], [1000.0]], device=DEVICE)
    weight, scale = torch.zeros(1, device=DEVICE), torch.full((1,), 2.0, device=DEVICE)
    token_ids = torch.tensor([5, 6, BOS, 7], device=DEVICE)
    assert smear_gate(x, weight, scale, token_ids)[:, 0].tolist() == [1.0, 11.0, 100.0, 1100.0]
    assert smear_gate(x, weight, scale, token_ids, None)[:, 0].tolist() == [1.0, 11.0, 110.0, 1100.0]


def test_nothing_crosses_the_start_of_a_document() -> None:
    """Not a bit of the second document, forward or backward, depends on the first; without the mask it does."""
    tensors = arguments(20, 16)
    tensors["token_ids"] = torch.full((20,), 3, device=DEVICE)
    tensors["token_ids"][11] = BOS
    changed = tensors | {"x": torch.where(torch.arange(20, device=DEVICE)[:, None] < 11, -2.0, tensors["x"].detach())}
    for bos_id, same in ((BOS, True), (None, False)):
        first, second = (smear_gate(**t, bos_id=bos_id)[11:] for t in (tensors, changed))
        assert torch.equal(first, second) == same
        gradient = torch.autograd.grad(first.sum(), tensors["x"])[0][:11]
        assert gradient.any().item() != same


@pytest.mark.parametrize("bos_id", [None, 0, 1, -1])
@pytest.mark.parametrize(("N", "D", "W"), [(1, 1, 1), (2, 5, 5), (9, 40, 1), (700, 24, 13)])
def test_any_shape_and_bos(N: int, D: int, W: int, bos_id: int | None) -> None:
    assert_as_reference(arguments(N, D, W), bos_id)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    tensors = arguments(40, 32, dtype=dtype)
    tensors |= {key: tensors[key].detach().to(dtype).requires_grad_() for key in ("weight", "scale")}
    assert_as_reference(tensors)


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is refused on a GPU")
@pytest.mark.parametrize("bos_id", [None, BOS])
def test_float64_is_the_reference_itself(bos_id: int | None) -> None:
    tensors = arguments(30, 16, dtype=torch.float64)
    got, want = results(smear_gate, tensors, bos_id), results(smear_gate_ref, tensors, bos_id)
    for key in want:
        numerics.assert_same_f64(key, got[key], want[key])


def test_a_bos_id_is_not_cut_to_the_ids_bits() -> None:
    tensors = arguments(30, 16)
    tensors["token_ids"] = tensors["token_ids"].int()
    got, want = results(smear_gate, tensors, (1 << 32) + 2), results(smear_gate, tensors, None)
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_int32_ids_and_no_tokens() -> None:
    tensors = arguments(30, 16)
    assert torch.equal(smear_gate(**tensors), smear_gate(**tensors | {"token_ids": tensors["token_ids"].int()}))
    empty = results(smear_gate, arguments(0, 16))
    assert empty["y"].shape == empty["x"].shape == (0, 16)
    assert not empty["weight"].any() and empty["scale"].tolist() == [0.0]


REFUSED = {
    "one dimension": ({"x": torch.zeros(16)}, ValueError, r"x of shape \(N, D\), got \(16,\)"),
    "weight wider than x": ({"weight": torch.zeros(17)}, ValueError, r"1 <= W <= 16, got \(17,\)"),
    "weight as a matrix": ({"weight": torch.zeros(1, 12)}, ValueError, r"shape \(W,\).*got \(1, 12\)"),
    "no weight": ({"weight": torch.zeros(0)}, ValueError, r"got \(0,\)"),
    "scale without shape": ({"scale": torch.tensor(1.0)}, ValueError, r"scale of shape \(1,\), got \(\)"),
    "too few ids": ({"token_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"shape \(4,\), got \(3,\)"),
    "float ids": ({"token_ids": torch.zeros(4)}, TypeError, "int64 or int32, got torch.float32"),
    "integers": ({"x": torch.zeros(4, 16, dtype=torch.int32)}, TypeError, "expected x in .* got torch.int32"),
    "float64 weight alone": ({"weight": torch.zeros(12).double()}, TypeError, "weight in .* got torch.float64"),
    "float64 x alone": ({"x": torch.zeros(4, 16).double()}, TypeError, "expected weight in float64, got torch.float32"),
    "channels apart": ({"x": torch.zeros(16, 4).t()}, ValueError, r"strides \(1, 4\)"),
    "weight apart": ({"weight": torch.zeros(24)[::2]}, ValueError, r"and \(2,\)"),
    "ids elsewhere": ({"token_ids": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "got meta"),
    "bos of many bits": ({"bos_id": -(1 << 63) - 1}, ValueError, "bos_id in 64 bits, got -9223372036854775809"),
    "no x": ({"x": None}, TypeError, "x to be a tensor, got None"),
    "weight as a list": ({"weight": [1.0]}, TypeError, r"weight to be a tensor, got \[1.0\]"),
    "scale as a number": ({"scale": 0.5}, TypeError, "scale to be a tensor, got 0.5"),
    "an id": ({"token_ids": 3}, TypeError, "token_ids to be a tensor, got 3"),
    "bos of no kind": ({"bos_id": True}, TypeError, "None for no mask, got True"),
    "bos as a float": ({"bos_id": math.nan}, TypeError, "None for no mask, got nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    change, error, message = REFUSED[case]
    good = {"x": torch.zeros(4, 16), "weight": torch.zeros(12), "scale": torch.ones(1)}
    with pytest.raises(error, match=message):
        smear_gate(**{**good, "token_ids": torch.zeros(4, dtype=torch.int64), **change})
