"""The step of every row, chosen before rounding.

SDClip (PR #1394 of the Parameter Golf challenge): s = clip x std(row) / Q with Q = 2^(bits-1) - 1, float16. At six bits
and more nothing is clipped, and only clip / Q matters: rounding error grows with it and coded size shrinks. On top,
each with its own setting of `ArtifactConfig`:

row_exponent alpha   s proportional to std^alpha instead, the geometric mean of each matrix kept. Rate theory has equal
                     steps (alpha = 0) where all outputs matter alike.
hessian_clip lam     clip x (1 + lam (r - 1)), r the row's mean |w| weighted by the Hessian's diagonal, over the mean of
                     all rows (PR #1412).
steps_per_octave n   s rounded to a power of 2^(1/n), which costs n's share of a per cent in step and takes far fewer
                     bytes than a float16; before rounding, so the integers belong to the rounded step.
trellis              finer steps, see FINER.
allocation           all of a model's steps together, by what they cost the loss (`allocation`). Some become fine, so
                     the range of the integers grows to what the largest weight needs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from niblick.artifact.allocation import allocate
from niblick.artifact.errors import ArtifactError
from niblick.artifact.matrices import HESSIANS
from niblick.artifact.records import grid_steps, largest_integer
from niblick.model.config import ArtifactConfig

SMALLEST_STEP = 2.0**-24
"""Of float16. The published floor, 1e-10, rounds to zero in float16, and a row of zeros would divide by it."""
MAX_BITS = 8
FINER = {0: 1.0, 8: 0.5635, 32: 0.571}
"""By states of the trellis, the step that leaves the same mean square error as 1 does without one."""


class Steps(NamedTuple):
    """Of a role: float16 (n, R), and the bits of the integers: more than the settings say where that would clip."""

    scale: Tensor
    bits: int


def bits_and_clip(role: str, config: ArtifactConfig) -> tuple[int, float]:
    if role == "embedding":
        return config.embedding_bits, config.embedding_clip
    return config.matrix_bits, config.mlp_clip if role.startswith("mlp") else config.attention_clip


def all_steps(
    weights: dict[str, Tensor], config: ArtifactConfig, calibration: dict[str, Tensor] | None = None
) -> dict[str, Steps]:
    """For the matrices (n, R, C) of each role, float32 or float64. calibration: as `calibration.calibrate` gives it;
    needed where config.hessian_clip is not 0 or config.allocation not "clips".

    ArtifactError naming the row whose step is beyond float16's range.
    """
    known = calibration or {}
    steps = {role: _clip_steps(role, weight, config, known.get(HESSIANS[role])) for role, weight in weights.items()}
    bits = {role: bits_and_clip(role, config)[0] for role in weights}
    if config.allocation != "clips":
        widths = {role: weight.shape[-1] for role, weight in weights.items()}
        steps = allocate(steps, known, widths, config.allocation)
        largest = {role: weight.abs().amax(-1) for role, weight in weights.items()}
        steps = {role: step.maximum(largest[role] / largest_integer(MAX_BITS)) for role, step in steps.items()}
        bits = {role: max(bits[role], _bits_for((largest[role] / steps[role]).max().item())) for role in bits}
    return {role: Steps(_stored(role, step, config), bits[role]) for role, step in steps.items()}


def _bits_for(largest: float) -> int:
    """The least for integers that are rounded from up to `largest` in size, at most MAX_BITS."""
    return next((bits for bits in range(2, MAX_BITS) if largest <= largest_integer(bits)), MAX_BITS)


def _clip_steps(role: str, weight: Tensor, config: ArtifactConfig, hessian: Tensor | None) -> Tensor:
    """(n, R), in the weight's own dtype, of the rules but allocation and the grid."""
    bits, clip = bits_and_clip(role, config)
    deviation = weight.std(dim=-1)
    if config.row_exponent != 1:
        logs = deviation.clamp(min=SMALLEST_STEP).log()
        mean = logs.mean(-1, keepdim=True)
        deviation = (mean + config.row_exponent * (logs - mean)).exp()
    step = clip * deviation / largest_integer(bits) * FINER[config.states]
    return step * _importance(weight, hessian, config.hessian_clip) if config.hessian_clip else step


def _stored(role: str, step: Tensor, config: ArtifactConfig) -> Tensor:
    step = step.clamp(min=SMALLEST_STEP)
    half = (on_grid(step, config.steps_per_octave) if config.steps_per_octave else step).half()
    _require_finite(role, half)
    return half


def on_grid(step: Tensor, per_octave: int) -> Tensor:
    """The nearest of the steps 2^(k / per_octave), k an integer, as float16 rounds it."""
    return grid_steps((step.log2() * per_octave).round().long(), per_octave)


def _importance(weight: Tensor, hessian: Tensor, strength: float) -> Tensor:
    """1 + strength (r - 1) a row, (n, R)."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    diagonal = diagonal / diagonal.mean(-1, keepdim=True)
    rows = (weight.abs() * diagonal[:, None]).mean(-1)
    return 1 + strength * (rows / rows.mean(-1, keepdim=True) - 1)


def _require_finite(role: str, step: Tensor) -> None:
    bad = ~torch.isfinite(step)
    if bad.any():
        index = bad.nonzero()[0].tolist()
        found = step[tuple(index)].item()
        raise ArtifactError(f"cannot quantise {role}{index}: expected a step within float16's range, found {found}")
