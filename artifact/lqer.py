"""LQER: a low-rank correction of the quantisation error, for the few matrices with the largest error.

E = W - s q (R, C), its singular value decomposition U S V^T, and of rank r:  A = U_r S_r (R, r),  B = V_r^T (r, C),
both in a few bits. Asymmetric: A in -2 .. 1 with one step for all, B in -8 .. 7 with one step a GROUP of its row-major
values. Symmetric, where the groups do not come out even: one step a row of either, `BITS` bits. As PR #1851 of the
Parameter Golf challenge does it, with the plain norm of E, after Zhang et al. 2024.
"""

import torch
from torch import Tensor

from niblick.artifact.records import LowRank, RowIntegers, largest_integer, matrix
from niblick.artifact.steps import SMALLEST_STEP

RANK, GROUP, BITS = 4, 64, 4


def correct_largest_errors(
    weights: dict[str, Tensor], rows: dict[str, RowIntegers], count: int, asymmetric: bool = True
) -> dict[str, RowIntegers]:
    """`rows` with corrections of the `count` matrices whose error has the largest Frobenius norm, over all roles."""
    errors = {
        (role, i): weights[role][i].float().cpu() - matrix(rows[role], i)
        for role in rows
        for i in range(len(rows[role].q))
    }
    largest = sorted(errors, key=lambda place: -errors[place].norm().item())[:count]
    corrected = dict(rows)
    for role, i in sorted(largest):
        found = low_rank(i, errors[role, i].to(weights[role].device), asymmetric)
        found = LowRank(i, *(tensor.cpu() for tensor in found[1:]))
        corrected[role] = corrected[role]._replace(low_rank=(*corrected[role].low_rank, found))
    return corrected


def low_rank(index: int, error: Tensor, asymmetric: bool = True) -> LowRank:
    """The correction of one matrix from its error (R, C), float32."""
    a, b = _largest_factors(error)
    if asymmetric and b.numel() % GROUP == 0:
        groups = b.reshape(-1, GROUP)
        a_scale, b_scale = _step(a.abs().max()[None], 1.5), _step(groups.abs().amax(1), 7.5)
        b_integers = _integers(groups, b_scale, -8, 7).view(b.shape)
        return LowRank(index, _integers(a, a_scale, -2, 1), a_scale, b_integers, b_scale)
    Q = largest_integer(BITS)
    a_scale, b_scale = _step(a.abs().amax(1), Q), _step(b.abs().amax(1), Q)
    return LowRank(index, _integers(a, a_scale, -Q, Q), a_scale, _integers(b, b_scale, -Q, Q), b_scale)


def _largest_factors(error: Tensor) -> tuple[Tensor, Tensor]:
    """U_r S_r and V_r^T by the eigenvectors of the smaller of E E^T and E^T E: a hundredth of a whole SVD's time."""
    wide = error.double()
    if wide.shape[0] < wide.shape[1]:
        b, a = (
            factor.mT for factor in _largest_factors(error.mT)
        )  # of E^T = V_r (U_r S_r)^T, the norm at the wrong end
        norms = b.norm(dim=1).clamp(min=1e-30)
        return (a * norms).contiguous(), (b / norms[:, None]).contiguous()
    v = torch.linalg.eigh(wide.mT @ wide).eigenvectors.flip(1)[:, :RANK]
    return (wide @ v).float(), v.mT.float().contiguous()


def _step(largest: Tensor, steps: float) -> Tensor:
    return (largest / steps).clamp(min=SMALLEST_STEP).half()


def _integers(values: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (values / scale.float()[:, None]).round().clamp(low, high).to(torch.int8)
