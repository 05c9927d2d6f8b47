"""Fill the cap: one factor on all clips, so that the file comes to just under so many bytes.

Where integers are many, doubling the steps saves a bit a weight, so the first trial says where to try next; from then
on the last two do. Two to four trials are enough at the published clips.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from niblick.artifact.errors import ArtifactError
from niblick.artifact.quantize import Quantization, quantize
from niblick.model.config import ArtifactConfig

SLACK = 2048
"""Bytes under the target that are near enough: 0.00001 bits per byte."""
MAX_TRIALS = 10
MAX_FACTOR = 16.0
"""On the clips: beyond it nearly all integers are zero."""


class Filled(NamedTuple):
    config: ArtifactConfig
    """With the clips that were found."""
    quantization: Quantization
    size: int


def fill(
    state: dict[str, Tensor],
    config: ArtifactConfig,
    calibration: dict[str, Tensor] | None,
    size_of: Callable[[Quantization, ArtifactConfig], int],
    target: int,
) -> Filled:
    """The quantisation whose file, `size_of` it, is the largest tried of at most `target` bytes.

    Ends within SLACK of the target or after MAX_TRIALS. ArtifactError if no clip reaches the target.
    """
    weights = sum(tensor.numel() for tensor in state.values())
    best, smallest, factor, last = None, math.inf, 1.0, None
    per_octave = weights / 8  # bytes that doubling the steps saves
    low, high = 1 / MAX_FACTOR, MAX_FACTOR  # the sizes at these are taken to lie above and below the target
    for _ in range(MAX_TRIALS):
        trial = scaled(config, factor)
        quantization = quantize(state, trial, calibration)
        size = size_of(quantization, trial)
        smallest = min(smallest, size)
        if size <= target:
            high = factor
            if best is None or size > best.size:
                best = Filled(trial, quantization, size)
            if target - size <= SLACK:
                break
        else:
            if factor >= MAX_FACTOR:
                break
            low = factor
        if last and size != last[1]:
            per_octave = max((last[1] - size) / math.log2(factor / last[0]), weights / 1000)
        last = (factor, size)
        guess = factor * 2 ** min((size - target + SLACK / 2) / per_octave, 10)
        factor = guess if low < guess < high else math.sqrt(low * high)
        if size > target and guess >= MAX_FACTOR:
            factor = MAX_FACTOR
    if best is None:
        raise ArtifactError(
            f"artifact.target_bytes: expected a clip for which the model takes at most {target:,} bytes, found none: "
            f"the smallest took {smallest:,}"
        )
    return best


def scaled(config: ArtifactConfig, factor: float) -> ArtifactConfig:
    """The settings with all clips times `factor`."""
    names = ("attention_clip", "mlp_clip", "embedding_clip")
    return replace(config, **{name: factor * getattr(config, name) for name in names})
