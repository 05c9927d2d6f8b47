"""Edge cases of kernels/newton_schulz.py, and the faults its contract must reject."""

import math

import numerics
import pytest
import torch

from niblick.kernels.newton_schulz import QUINTIC, newton_schulz, newton_schulz_inputs, newton_schulz_ref
from niblick.model import optim

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FAULTS = [
    ("acc = c * acc + b * tl.load", "acc = b * acc + b * tl.load"),
    ("acc = c * acc + b * tl.load", "acc = c * acc + c * tl.load"),
    ("i[:, None] == j[None, :], a, 0.0", "i[:, None] == j[None, :] + 1, a, 0.0"),  # a beside the diagonal
    ("i[:, None] == j[None, :], a, 0.0", "row == column, a, 0.0"),  # a on the whole diagonal tile
    ("if row != column:", "if row == column:"),  # the lower triangle never written
    ("tl.trans(out)", "out"),  # mirrored without transposing
    ("inverse * inverse\n", "inverse\n"),  # A normalised once
    ("acc *= inverse if POLYNOMIAL else", "acc *= 1.0 if POLYNOMIAL else"),  # X not normalised
    ("row = tile - column * (column + 1) // 2", "row = tile - column"),  # another walk over the triangle
    ("tl.where((column + 1) * (column + 2) // 2 <= tile, column + 1, column)", "column + 1"),
    ("range(TURNS)", "range(TURNS - 1)"),  # the last columns left out
    ("j.to(tl.int64)[None, :] * stride_m + k", "i.to(tl.int64)[None, :] * stride_m + k"),  # diagonal tiles only
    ("mask=(i[:, None] < m) & inside[None, :], other=0.0", "mask=(i[:, None] < m), other=0.0"),  # the next row's values
    ("inverse = None", "inverse = inverse"),  # normalised in every turn
    ("torch.bmm(g, polynomial) if m > n", "torch.bmm(g, gram) if m > n"),
    ("coefficients[start : start + 3]", "coefficients[:3]"),  # the first coefficients in every turn
    ("return g.new_empty(g.shape)", "return g.new_empty(g.shape, dtype=torch.float64)"),  # fake lies
]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 16, 16), (1, 129, 129), (2, 40, 300), (1, 300, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    got, eager, f64 = newton_schulz(g), newton_schulz_ref(g), newton_schulz_ref(g.double())
    numerics.assert_like_eager("newton_schulz", got, eager, f64)


@pytest.mark.parametrize("name", optim.COEFFICIENTS)
def test_the_reference_is_the_optimizers(name: str) -> None:
    g = torch.randn(2, 20, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    coefficients = optim.COEFFICIENTS[name]
    want = optim.newton_schulz(g, coefficients)
    numerics.assert_same_f64(name, newton_schulz_ref(g, coefficients), want)
    numerics.assert_same_f64(name, newton_schulz(g, coefficients), want)


def test_a_matrix_does_not_see_its_neighbours() -> None:
    g = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    alone = torch.cat((torch.zeros_like(g[:2]), g[2:]))  # as many matrices, or the library might choose another kernel
    g[1] *= 1e4
    assert torch.equal(newton_schulz(g)[2], newton_schulz(alone)[2])


def test_zero_matrices_and_no_matrices() -> None:
    assert not newton_schulz(torch.zeros(2, 5, 7, device=DEVICE)).any()
    assert newton_schulz(torch.zeros(0, 5, 7, device=DEVICE)).shape == (0, 5, 7)


def test_no_gradient() -> None:
    g = newton_schulz_inputs((1, 4, 5), torch.float32, DEVICE)["g"].requires_grad_()
    with pytest.raises(ValueError, match="no gradient"):
        newton_schulz(g)
    with torch.no_grad():
        assert not newton_schulz(g).requires_grad


REFUSED = {
    "matrix": ({"g": torch.zeros(4, 5)}, ValueError, r"\(B, m, n\).* got \(4, 5\)"),
    "no columns": ({"g": torch.zeros(1, 4, 0)}, ValueError, r"got \(1, 4, 0\)"),
    "half": ({"g": torch.zeros(1, 4, 5).half()}, TypeError, "bfloat16 or float32, got torch.float16"),
    "integers": ({"g": torch.zeros(1, 4, 5).long()}, TypeError, "got torch.int64"),
    "strided": ({"g": torch.zeros(1, 5, 4).mT}, ValueError, r"contiguous, got \(1, 4, 5\) with strides \(20, 1, 4\)"),
    "no turns": ({"coefficients": []}, ValueError, r"one or more, got \[\]"),
    "a list": ({"g": [[1.0]]}, TypeError, r"g to be a tensor, got \[\[1.0\]\]"),
    "no coefficients": ({"coefficients": None}, TypeError, "as a sequence .* got None"),
    "one turn, flat": ({"coefficients": [1.0, 2.0, 3.0]}, TypeError, r"as a sequence .* got \[1.0, 2.0, 3.0\]"),
    "turns to learn": ({"coefficients": torch.ones(2, 3)}, TypeError, "as a sequence .* got tensor"),
    "a number to learn": ({"coefficients": [(torch.tensor(1.0), 2, 3)]}, TypeError, r"in numbers, got \[\(tensor"),
    "a bool": ({"coefficients": [(True, 2, 3)]}, TypeError, r"in numbers, got \[\(True"),
    "no value": ({"coefficients": [(1, math.nan, 3)]}, ValueError, r"finite coefficients, got \[\(1, nan, 3\)\]"),
    "two numbers": ({"coefficients": [(1.0, 2.0)]}, ValueError, r"got \[\(1.0, 2.0\)\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    change, error, message = REFUSED[case]
    with pytest.raises(error, match=f"newton_schulz: .*{message}"):
        newton_schulz(**{"g": torch.zeros(1, 4, 5), "coefficients": QUINTIC} | change)
