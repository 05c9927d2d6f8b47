"""What quantisation is told of a model: the Hessians of its inputs, and how its loss depends on the steps."""

from collections.abc import Iterable
from itertools import islice

from torch import Tensor

from niblick.artifact.hessians import collect_hessians, generate_rows
from niblick.artifact.sensitivity import collect_sensitivities
from niblick.model.config import ArtifactConfig
from niblick.model.gpt import GPT

GENERATED_ROWS = 64


def calibrate(model: GPT, config: ArtifactConfig, training: Iterable[object], seed: int) -> dict[str, Tensor] | None:
    """What `config` asks for, from its number of `training` batches (with .ids and .cu_seqlens, whole rows of
    max_segment tokens), or from rows that the model draws, from `seed`; for rounding to the nearest, none.

    Hessians by input (`matrices.HESSIANS`), and where steps are allocated, sensitivities by role (`matrices.ROLES`).
    """
    if config.rounding == "nearest":
        return None
    if config.calibration == "generated":
        batches = list(generate_rows(model, GENERATED_ROWS, model.config.max_segment, seed=seed))
    else:
        batches = [(batch.ids, batch.cu_seqlens) for batch in islice(training, config.calibration_batches)]
    found = collect_hessians(model, batches)
    if config.allocation != "clips":
        found |= collect_sensitivities(model, batches, found, damping=config.damping, seed=seed)
    return found
