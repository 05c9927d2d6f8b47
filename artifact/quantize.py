"""A model's weights to integers: which tensor is rounded how, by `ArtifactConfig`.

Matrices and embedding: steps (`steps`), then rounding to the nearest, GPTQ (`gptq`), or GPTQ with a trellis
(`viterbi`), then corrections (`lqer`). Head gates and other small tensors: eight bits or float16.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from niblick.artifact.errors import ArtifactError
from niblick.artifact.gptq import Choose, Factor, Rounded, factorise, gptq, nearest, weighted_error
from niblick.artifact.lqer import correct_largest_errors
from niblick.artifact.matrices import HESSIANS, split_roles
from niblick.artifact.records import Quantized, RowIntegers, SmallIntegers, is_matrix, largest_integer
from niblick.artifact.steps import SMALLEST_STEP, Steps, all_steps
from niblick.artifact.viterbi import along_rows
from niblick.model.config import ArtifactConfig

MAX_GATE = 8192
"""Values of a layer's gate up to which the published scripts keep it in eight bits."""

MIN_SMALL = 512
"""Values from which on eight bits save more than a stream of their own costs."""


class Quantization(NamedTuple):
    """The integers, all on the CPU, and how it went.

    error: by role the Hessian-weighted error of each matrix, float64 (n,); empty without Hessians.
    notes: a line for everything out of the ordinary (a Hessian that took more damping).
    """

    tensors: Quantized
    error: dict[str, Tensor]
    notes: list[str]


def quantize(
    state: dict[str, Tensor], config: ArtifactConfig, calibration: dict[str, Tensor] | None = None
) -> Quantization:
    """All of a model's parameters to what `config` says, matrices on the Hessians' device.

    `calibration` is what `calibration.calibrate` gives; needed unless config.rounding is "nearest". ArtifactError
    naming tensor and index for a weight that is not finite or that float16 cannot hold.
    """
    if config.rounding != "nearest" and calibration is None:
        raise ArtifactError(f"artifact.rounding {config.rounding}: expected Hessians of the layers' inputs, found none")
    tensors: Quantized = split_roles(state)
    for name, tensor in tensors.items():
        _require_finite(name, tensor, tensor, "a finite weight")
    weights = {role: tensor.detach().float() for role, tensor in tensors.items() if is_matrix(role)}
    if calibration is not None:
        weights = {role: weight.to(calibration[HESSIANS[role]].device) for role, weight in weights.items()}
    steps, error, notes, factors = all_steps(weights, config, calibration), {}, [], {}
    for name, tensor in tensors.items():
        if not is_matrix(name):
            tensors[name] = _small(name, tensor.detach().cpu().float(), config)
            continue
        hessian = None if calibration is None else calibration[HESSIANS[name]]
        if config.rounding != "nearest" and HESSIANS[name] not in factors:
            factors[HESSIANS[name]] = factorise(HESSIANS[name], hessian, config.damping)
            notes += _damping_notes(HESSIANS[name], factors[HESSIANS[name]], config.damping)
        factor = factors.get(HESSIANS[name])
        tensors[name], rounded = _matrices(name, weights[name], steps[name], config, hessian, factor)
        if rounded is not None:
            error[name] = rounded.error.cpu()
    if config.low_rank_matrices:
        rows = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, RowIntegers)}
        tensors |= correct_largest_errors(weights, rows, config.low_rank_matrices, config.low_rank_asymmetric)
    return Quantization(tensors, error, notes)


def _matrices(
    role: str, weight: Tensor, steps: Steps, config: ArtifactConfig, hessian: Tensor | None, factor: Factor | None
) -> tuple[RowIntegers, Rounded | None]:
    scale, bits = steps
    if factor is None:
        q, rounded = nearest(largest_integer(bits))(weight / scale.float()[..., None]).to(torch.int8), None
    else:
        rounded = gptq(weight, factor, scale.float(), _choose(largest_integer(bits), config))
        q = rounded.q
    if config.value_dedup > 1:
        t, Q = config.value_dedup, largest_integer(bits)
        q = (q.div(t, rounding_mode="floor") * t).clamp(min=-(Q // t) * t).to(torch.int8)
        if rounded is not None:
            rounded = Rounded(q, weighted_error(weight, q * scale.float()[..., None], hessian, factor))
    return RowIntegers(q.cpu(), scale.cpu(), bits, config.states), rounded


def _choose(largest: int, config: ArtifactConfig) -> Choose:
    return along_rows(largest, config.states) if config.states else nearest(largest)


def _damping_notes(name: str, factor: Factor, expected: float) -> list[str]:
    return [
        f"Hessian of {name}[{i}]: not positive definite with damping {expected:g}, raised to {used:g}"
        for i, used in enumerate(factor.damping.tolist())
        if used > 1.5 * expected
    ]


def _small(name: str, tensor: Tensor, config: ArtifactConfig) -> SmallIntegers | Tensor:
    gate = name == "gate_weight" and tensor[0].numel() <= MAX_GATE
    if (config.gate_bits if gate else config.small_bits) == 8 and (gate or tensor.numel() >= MIN_SMALL):
        scale = (tensor.abs().amax(-1) / 127).clamp(min=SMALLEST_STEP).half()
        _require_finite(name, scale, scale, "a step within float16's range")
        return SmallIntegers((tensor / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8), scale)
    half = tensor.half()
    _require_finite(name, half, tensor, "a weight within float16's range")
    return half


def _require_finite(name: str, judged: Tensor, shown: Tensor, expected: str) -> None:
    bad = ~torch.isfinite(judged)
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise ArtifactError(f"cannot quantise {name}{list(index)}: expected {expected}, found {shown[index].item()}")
