"""GPTQ: the identity of its error, a naive implementation in float64, and Hessians that are degenerate."""

import pytest
import torch
from numerics import IDENTITY_F64

from niblick.artifact.errors import ArtifactError
from niblick.artifact.gptq import factorise, gptq, nearest, weighted_error
from niblick.artifact.lqer import correct_largest_errors, low_rank
from niblick.artifact.records import RowIntegers, dequantize
from niblick.artifact.viterbi import along_rows

R, C, LARGEST = 24, 40, 31


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(kind: str, seed: int = 1) -> torch.Tensor:
    """x (n, C): what the Hessian is made of."""
    x = random(200, C, seed=seed) @ random(C, C, seed=seed + 1)
    if kind == "dead":
        x[:, [0, 7, C - 1]] = 0
    if kind == "rank 1":
        x = x[:1]
    if kind == "all dead":
        x = x * 0
    return x


KINDS = ("random", "dead", "rank 1", "all dead")


def case(kind: str, n: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, x = random(n, R, C, seed=9), torch.stack([inputs(kind, 10 * i) for i in range(n)])
    return weight, x.mT @ x, (13 * weight.std(-1) / LARGEST).half().double()


def naive(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The definition, column by column, through the inverse that `factorise` never forms."""
    dead = hessian.diagonal() == 0
    hessian = hessian + torch.diag(dead.double())
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(C, dtype=torch.float64)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    w, q = weight.clone(), torch.zeros_like(weight)
    w[:, dead] = 0
    w = w[:, order]
    for j in range(C):
        integers = (w[:, j] / scale).round().clamp(-LARGEST, LARGEST)
        e = (w[:, j] - scale * integers) / upper[j, j]
        for k in range(j, C):
            w[:, k] -= e * upper[j, k]
        q[:, order[j]] = integers
    return q


@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_those_of_the_naive_implementation(kind):
    weight, hessian, scale = case(kind, n=3)
    rounded = gptq(weight, factorise("x", hessian), scale, nearest(LARGEST), block=16)
    for i in range(3):
        assert torch.equal(rounded.q[i].double(), naive(weight[i], hessian[i], scale[i]))


@pytest.mark.parametrize(
    "choose", [nearest(LARGEST), along_rows(LARGEST, 8), nearest(1)], ids=["", "trellis", "clipped"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_the_weighted_one(kind, choose):
    """sum |e_j|^2 = tr(E H E^T) with the damped H, over columns that are not dead."""
    weight, hessian, scale = case(kind)
    rounded = gptq(weight, factorise("x", hessian), scale, choose)
    alive = hessian[0].diagonal() != 0
    whole = weighted_error(weight, scale[..., None] * rounded.q, hessian, factorise("x", hessian))
    E = torch.where(alive, weight[0] - scale[0][:, None] * rounded.q[0], 0.0)
    diagonal = torch.where(alive, hessian[0].diagonal(), 1.0)
    damped = hessian[0] + 0.01 * diagonal.mean() * torch.eye(C, dtype=torch.float64)
    expected = ((E @ damped) * E).sum()
    assert (rounded.error[0] - expected).abs() <= IDENTITY_F64 * expected
    assert (whole[0] - expected).abs() <= IDENTITY_F64 * expected
    assert (rounded.q[0][:, ~alive] == 0).all(), "a dead column is zeros"


def test_the_trellis_shrinks_no_weight():
    """Errors of one sign add up through the layers, which their squares do not show."""
    targets = 4 * torch.randn(30, 2048, generator=torch.Generator().manual_seed(5))
    found = along_rows(127, 8)(targets)
    assert abs((found * targets).sum() / targets.square().sum() - 1) < 0.003


def test_the_error_is_far_below_that_of_rounding():
    weight, hessian, scale = case("random")
    rounded = gptq(weight, factorise("x", hessian), scale, nearest(LARGEST))
    E = weight[0] - scale[0][:, None] * (weight[0] / scale[0][:, None]).round()
    assert rounded.error[0] < 0.5 * ((E @ hessian[0]) * E).sum()


@pytest.mark.parametrize("block", [1, 7, 40, 128])
def test_blocks_change_nothing(block):
    weight, hessian, scale = case("random", n=2)
    factor = factorise("x", hessian)
    expected = gptq(weight, factor, scale, nearest(LARGEST), block=16).q
    assert torch.equal(gptq(weight, factor, scale, nearest(LARGEST), block=block).q, expected)


def test_an_indefinite_hessian_is_damped_more_and_said_so():
    _, hessian, _ = case("random", n=2)
    hessian[1] -= 0.5 * hessian[1].diagonal().mean() * torch.eye(C, dtype=torch.float64)
    assert factorise("x", hessian).damping.tolist() == [0.01, 1.0]


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_hopeless_or_infinite_hessian_is_refused(damping):
    _, hessian, _ = case("random")
    with pytest.raises(
        ArtifactError, match=r"Hessian of x\[0\]: expected a matrix that damping makes positive definite"
    ):
        factorise("x", -hessian + 1e9 * (1 - torch.eye(C, dtype=torch.float64)), damping)
    hessian[0, 3, 4] = torch.nan
    with pytest.raises(ArtifactError, match=r"Hessian of x\[0, 3, 4\]: expected finite values, found nan"):
        factorise("x", hessian, damping)


# ---- corrections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("shape", [(48, 64), (30, 17)])
def test_a_correction_takes_its_error_away(asymmetric, shape):
    """An error of rank four, of which the factors in four bits must bring back most; in two, a part."""
    error = (random(shape[0], 4) @ random(4, shape[1], seed=1)).float()
    found = low_rank(0, error, asymmetric)
    a, b = found.factors()
    left = (error - a @ b).norm() / error.norm()
    two_bits = asymmetric and 4 * shape[1] % 64 == 0
    assert left < (0.8 if two_bits else 0.2)
    assert len(found.a_scale) == (1 if two_bits else shape[0])
    assert found.a.min() >= (-2 if two_bits else -7) and found.a.max() <= (1 if two_bits else 7)
    assert found.b.abs().max() <= (8 if two_bits else 7)


def test_the_largest_errors_are_corrected():
    q = torch.zeros(3, 8, 64, dtype=torch.int8)
    rows = {name: RowIntegers(q, torch.ones(3, 8).half(), 6) for name in ("mlp_up", "mlp_down")}
    weights = {name: random(3, 8, 64).float() for name in rows}
    weights["mlp_up"][1] *= 10
    weights["mlp_down"][2] *= 5
    corrected = correct_largest_errors(weights, rows, 2)
    assert [c.matrix for c in corrected["mlp_up"].low_rank] == [1]
    assert [c.matrix for c in corrected["mlp_down"].low_rank] == [2]
    state = dequantize(corrected)
    assert (state["mlp_up_bank"][1] - weights["mlp_up"][1]).norm() < weights["mlp_up"][1].norm()
    assert (state["mlp_up_bank"][0] == 0).all()
