"""Weights to small integers and back: per-row SDClip rounding (PR #1394 of the challenge).

A row w (the last dimension) of a matrix becomes integers q and one float16 step s,

    Q = 2^(bits-1) - 1,   s = float16(clip x std(w) / Q),   q = min(max(round(w / s), -Q), Q),   w ~ s q

with the unbiased standard deviation, rounding half to even, and the float16 value of s, widened, in the division. Only
clip / Q matters at the published settings: rounding error grows with it, coded size shrinks, and nothing is clipped.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from niblick.artifact.errors import ArtifactError
from niblick.kernels.int6_linear import int6_pack
from niblick.model.config import ArtifactConfig
from niblick.model.gpt import BANKS, PackedMatrix

SMALLEST_STEP = 2.0**-24
"""Of float16. The published floor, 1e-10, rounds to zero in float16, and a row of zeros would divide by it."""


class RowIntegers(NamedTuple):
    """q int8 (..., C) in [-Q, Q], scale float16 (...), one step a row; bits gives Q = 2^(bits-1) - 1."""

    q: Tensor
    scale: Tensor
    bits: int


Quantized = dict[str, RowIntegers | Tensor]
"""A model's parameters by name: rows of integers, or a float16 tensor for what is too small to be worth it."""


def quantize(state: dict[str, Tensor], config: ArtifactConfig) -> Quantized:
    """Banks and embedding to integers, everything else to float16; all on the CPU, so the device does not matter.

    ArtifactError naming tensor and index for a weight that is not finite, or that float16 cannot hold.
    """
    return {name: _quantize(name, tensor.detach().cpu().float(), config) for name, tensor in state.items()}


def dequantize(quantized: Quantized) -> dict[str, Tensor]:
    """The parameters in float32: s q for rows of integers. Exact but for that product's rounding."""
    return {
        name: tensor.float() if isinstance(tensor, Tensor) else tensor.q.float() * tensor.scale.float()[..., None]
        for name, tensor in quantized.items()
    }


def pack_for_inference(quantized: Quantized) -> dict[str, list[PackedMatrix]]:
    """Every bank as packed six-bit matrices, for `GPT.use_packed`. ArtifactError for more bits or an odd width."""
    packed = {}
    for name in BANKS:
        q, scale, bits = quantized[name]
        if bits > 6:
            raise ArtifactError(f"packed weights: expected {name} in at most 6 bits, found {bits}")
        try:
            packed[name] = [PackedMatrix(int6_pack(matrix), s.float()) for matrix, s in zip(q, scale, strict=True)]
        except ValueError as error:
            raise ArtifactError(f"packed weights: {name}: {error}") from error
    return packed


def largest_integer(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def _bits_and_clip(name: str, config: ArtifactConfig) -> tuple[int, float] | None:
    if name == "embedding":
        return config.embedding_bits, config.embedding_clip
    if name in BANKS:
        return config.matrix_bits, config.mlp_clip if name.startswith("mlp") else config.attention_clip
    return None


def _quantize(name: str, weight: Tensor, config: ArtifactConfig) -> RowIntegers | Tensor:
    _require_finite(name, weight, weight, "a finite weight")
    chosen = _bits_and_clip(name, config)
    if chosen is None:
        half = weight.half()
        _require_finite(name, half, weight, "a weight within float16's range")
        return half
    bits, clip = chosen
    Q = largest_integer(bits)
    scale = (clip * weight.std(dim=-1) / Q).clamp(min=SMALLEST_STEP).half()
    _require_finite(name, scale, scale, "a row whose step is within float16's range")
    q = (weight / scale.float()[..., None]).round().clamp(-Q, Q).to(torch.int8)
    return RowIntegers(q, scale, bits)


def _require_finite(name: str, judged: Tensor, shown: Tensor, expected: str) -> None:
    bad = ~torch.isfinite(judged)
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise ArtifactError(f"cannot quantise {name}{list(index)}: expected {expected}, found {shown[index].item()}")
