"""What an artifact holds of a model: integers with steps, low-rank corrections, small tensors; and the way back.

Matrices are stored by role (`matrices`), rows of integers q with one float16 step s a row: w ~ s q. Everything else is
a float16 tensor, or bytes with one step a row where that is harmless.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from niblick.artifact.matrices import ROLES, join_roles


class LowRank(NamedTuple):
    """A correction A B of one matrix of a stack (LQER, `lqer`).

    matrix: its index. a int8 (R, r), b int8 (r, C). Asymmetric: a_scale float16 (1,), b_scale float16 (r C / group,),
    one a group of B's row-major values. Symmetric: a_scale (R,), b_scale (r,), one a row.
    """

    matrix: int
    a: Tensor
    a_scale: Tensor
    b: Tensor
    b_scale: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, r) and B (r, C) in float32."""
        a = self.a.float() * self.a_scale.float()[:, None]  # one scale for all, or one a row
        groups = self.b.float().view(len(self.b_scale), -1) * self.b_scale.float()[:, None]
        return a, groups.view(self.b.shape)


class RowIntegers(NamedTuple):
    """q int8 (n, R, C) in [-Q, Q], Q = 2^(bits-1) - 1; scale float16 (n, R), one step a row.

    states is that of the trellis that chose q (`trellis`), or 0: any q may follow any other.
    """

    q: Tensor
    scale: Tensor
    bits: int
    states: int = 0
    low_rank: tuple[LowRank, ...] = ()


class SmallIntegers(NamedTuple):
    """q int8 (..., C) and one float16 step a row, scale (...): a small tensor in eight bits."""

    q: Tensor
    scale: Tensor


Quantized = dict[str, RowIntegers | SmallIntegers | Tensor]
"""A model by role and parameter name: rows of integers, or for what is too small to be worth it bytes or float16."""


def dequantize(quantized: Quantized) -> dict[str, Tensor]:
    """A model's parameters in float32: s q, plus its correction if it has one."""
    return join_roles({name: _dequantize(tensor) for name, tensor in quantized.items()})


def matrix(rows: RowIntegers, index: int) -> Tensor:
    """One matrix (R, C) of a stack in float32."""
    weight = rows.q[index].float() * rows.scale[index].float()[:, None]
    for correction in rows.low_rank:
        if correction.matrix == index:
            a, b = correction.factors()
            weight = weight + a @ b
    return weight


def largest_integer(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def grid_steps(levels: Tensor, per_octave: int) -> Tensor:
    """2^(level / per_octave) in float32; its float16 is the same everywhere: none is near the middle of two."""
    return torch.exp2(levels.double() / per_octave).float()


def is_matrix(name: str) -> bool:
    return name in ROLES


def _dequantize(tensor: RowIntegers | SmallIntegers | Tensor) -> Tensor:
    if isinstance(tensor, RowIntegers):
        return torch.stack([matrix(tensor, i) for i in range(len(tensor.q))])
    if isinstance(tensor, SmallIntegers):
        return tensor.q.float() * tensor.scale.float()[..., None]
    return tensor.float()
