"""GPTQ: columns are rounded one after the other, and each column's error is paid for by the columns still to come.

For a matrix W (R, C) whose inputs have the Hessian H = sum x x^T (C, C), damped by lambda = damping x mean H_jj, and
pi the order of falling H_jj:

    U upper triangular with (H[pi, pi])^-1 = U^T U
    for j in order:   q_j = choose(w_j / s),   e_j = (w_j - s q_j) / U_jj,   w_k -= e_j U_jk for all k > j

s is one step a row. The errors E = W - s q then obey  sum_j |e_j|^2 = tr(E H E^T): the loss is the sum over columns of
what each column's own rounding leaves, so whatever lowers |w_j - s q_j| lowers it one for one. A dead column (H_jj = 0,
an input that is always zero) becomes zeros and takes no part. As PR #1394 of the Parameter Golf challenge and its
descendants use it (Frantar et al. 2022, with act-order), but that matrices of one shape run as a batch, on any device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from niblick.artifact.errors import ArtifactError

DAMPING = 0.01
MAX_DAMPING = 10.0
"""Damping is raised tenfold until the Hessian factors; beyond this little of the Hessian is left."""
BLOCK = 128

Choose = Callable[[Tensor], Tensor]
"""Targets (n, R) in steps -> integers (n, R), of the same dtype."""


class Factor(NamedTuple):
    """The inverse Hessians of n matrices, for `gptq`: order (n, C), upper (n, C, C), dead (n, C), damping (n,)."""

    order: Tensor
    upper: Tensor
    dead: Tensor
    damping: Tensor


class Rounded(NamedTuple):
    """q int8 (n, R, C); error (n,) float64, the sum of |e_j|^2, which is tr(E H E^T) over columns that are not dead."""

    q: Tensor
    error: Tensor


def factorise(name: str, hessian: Tensor, damping: float = DAMPING) -> Factor:
    """Order and factor Hessians (n, C, C), float32 or float64, on their device; `name` is for the errors.

    A Hessian that is not positive definite is damped ten times as much, as often as it takes: `Factor.damping` says how
    much. ArtifactError for one that is not finite, or that MAX_DAMPING does not help.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    if not torch.isfinite(hessian).all():
        index = (~torch.isfinite(hessian)).nonzero()[0].tolist()
        raise ArtifactError(f"Hessian of {name}{index}: expected finite values, found {hessian[tuple(index)].item()}")
    dead = diagonal == 0
    mean = torch.where(dead, 1.0, diagonal).mean(-1)
    order = (torch.where(dead, 1.0, diagonal)).argsort(dim=-1, descending=True, stable=True)
    ordered = _permute(hessian + torch.diag_embed(dead.to(hessian.dtype)), order)
    used = torch.full_like(mean, damping)
    upper = torch.empty_like(hessian)
    with _all_digits():
        for i in range(len(hessian)):
            upper[i], used[i] = _factor(f"{name}[{i}]", ordered[i], mean[i], damping)
    return Factor(order, upper, dead, used)


def gptq(weight: Tensor, factor: Factor, scale: Tensor, choose: Choose, *, block: int = BLOCK) -> Rounded:
    """Integers of the matrices `weight` (n, R, C) with the steps `scale` (n, R), computed in the weights' dtype.

    The choice of block changes nothing but the order of sums.
    """
    n, R, C = weight.shape
    order = factor.order
    # Transposed, so that a column lies in one piece, as do the columns still to come.
    w = weight.masked_fill(factor.dead[:, None], 0.0).mT.gather(1, order[..., None].expand(n, C, R)).contiguous()
    error = torch.zeros(n, dtype=torch.float64, device=weight.device)
    scale = scale.to(w.dtype)
    q = torch.empty((n, C, R), dtype=torch.int8, device=w.device)
    alive = ~factor.dead.gather(1, order)
    for start in range(0, C, block):
        end = min(start + block, C)
        errors = torch.empty((n, end - start, R), dtype=w.dtype, device=w.device)
        for j in range(start, end):
            column = w[:, j]
            chosen = choose(column / scale)
            q[:, j] = chosen.to(torch.int8)
            e = (column - scale * chosen) / factor.upper[:, j, j, None]
            w[:, j + 1 : end].addcmul_(factor.upper[:, j, j + 1 : end, None], e[:, None], value=-1)
            errors[:, j - start] = e
        error += (errors.double().square().sum(-1) * alive[:, start:end]).sum(-1)
        with _all_digits():
            w[:, end:] -= factor.upper[:, start:end, end:].mT @ errors
    unordered = torch.empty_like(q).scatter_(1, order[..., None].expand(n, C, R), q)
    return Rounded(unordered.mT.masked_fill(factor.dead[:, None], 0).contiguous(), error)


def weighted_error(weight: Tensor, found: Tensor, hessian: Tensor, factor: Factor) -> Tensor:
    """tr(E H E^T) of each matrix for E = weight - found (n, R, C), as `Rounded.error` has it; (n,) float64."""
    error = (weight - found).double().masked_fill(factor.dead[:, None], 0.0)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).double()
    damping = factor.damping.double() * torch.where(factor.dead, 1.0, diagonal).mean(-1)
    products = error @ hessian.double() + damping[:, None, None] * error
    return (products * error).sum((-2, -1))


def nearest(largest: int) -> Choose:
    """Rounding to the nearest integer in [-largest, largest], half to even."""
    return lambda targets: targets.round().clamp(-largest, largest)


@contextmanager
def _all_digits() -> Iterator[None]:
    """float32 products in float32: with TF32, which training may have switched on, the identity above fails."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _permute(matrices: Tensor, order: Tensor) -> Tensor:
    n, C, _ = matrices.shape
    rows = matrices.gather(1, order[..., None].expand(n, C, C))
    return rows.gather(2, order[:, None].expand(n, C, C))


def _factor(name: str, hessian: Tensor, mean: Tensor, damping: float) -> tuple[Tensor, float]:
    """U (C, C) of one ordered Hessian, and the damping that it took."""
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    while damping <= MAX_DAMPING:
        damped = hessian + damping * mean * identity
        # With both orders reversed, H = V V^T for an upper V, and U = V^-1: no inverse is formed and factored again.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            if torch.isfinite(upper).all():
                return upper, damping
        damping = max(10 * damping, 1e-4)
    raise ArtifactError(
        f"Hessian of {name}: expected a matrix that damping makes positive definite, found none up to {MAX_DAMPING:g} "
        "times its mean diagonal"
    )
