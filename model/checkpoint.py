"""A checkpoint: every tensor of a run and its position, in one safetensors file that appears whole or not at all.

It does not depend on the number of ranks: optimizer state is that of all of them, and the loaders that read one stream
in order (documents, stream) count its tokens, so that another number of ranks goes on with the very next one. A shard's
end is the exception: what is left there and is too short for all ranks together is skipped, more by many than by few.
The loader of shuffled rows deals whole shards out to ranks and has no place that another number could take up.
"""

import dataclasses
import json
from pathlib import Path

import torch

from niblick.model.config import ConfigError
from niblick.model.errors import TrainingStopped
from niblick.model.files import write_atomically
from niblick.model.training import Position, Trainer

SECTIONS = ("model", "optim", "batch", "data")
FREE = ("cache", "prefetch", "attention")
"""Settings that do not change what is computed. The schedule is free too: a run may be given a longer budget."""


def save_checkpoint(path: Path, trainer: Trainer, position: Position) -> None:
    """Write beside and rename: a run that is killed meanwhile leaves the previous checkpoint in place. OSError.

    Every rank must call it; rank 0 writes. TrainingStopped, and nothing written, where a weight is not finite.
    The time that the last write takes is not in its file: a run resumed from it does not pay for it.
    """
    from safetensors.torch import save

    _require_finite_weights(trainer, position)
    tensors = {name: tensor.contiguous() for name, tensor in trainer.state_dict().items()}
    if trainer.rank:
        return
    record = {
        "position": dataclasses.asdict(position),
        "identity": _identity(trainer),
        "ranks": trainer.world_size,
    }
    write_atomically(path, lambda file: file.write(save(tensors, {"niblick": json.dumps(record)})))


def load_checkpoint(path: Path, trainer: Trainer) -> Position:
    """Put the trainer where the checkpoint was written. ConfigError for a file that is damaged or of another run."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConfigError(f"--resume expected a checkpoint at {path}: found none")
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["niblick"])
            position, identity, ranks = Position(**record["position"]), record["identity"], record["ranks"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{path}: expected a checkpoint of niblick, found a damaged or foreign file ({error})"
        ) from error
    for name, expected in _identity(trainer).items():
        if identity.get(name) != expected:
            raise ConfigError(f"{path} was written with {name} = {identity.get(name)!r}: expected {expected!r}")
    if ranks != trainer.world_size and trainer.preset.data.loader == "sequences":
        raise ConfigError(
            f"{path} was written by {ranks} rank(s), to which data.loader sequences dealt the shards out: expected as "
            f"many, got {trainer.world_size}"
        )
    _require_same_tensors(path, tensors, trainer)
    trainer.load_state_dict(tensors)
    return position


def remove_half_written(path: Path) -> None:
    """What a run that was killed in the middle of a write left beside `path`."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def _require_finite_weights(trainer: Trainer, position: Position) -> None:
    """The loss was finite before the step's update; the update may not have been."""
    names, finite = [], []
    for name, p in trainer.model.named_parameters():
        names.append(name)
        finite.append(torch.isfinite(p).all())
    for name, ok in zip(names, torch.stack(finite).tolist(), strict=True):
        if not ok:
            raise TrainingStopped(f"after step {position.step}, {name} is not finite")


def _require_same_tensors(path: Path, tensors: dict[str, torch.Tensor], trainer: Trainer) -> None:
    """Weights and averages by name and shape: another version of niblick may have others under the same settings."""
    for name, p in trainer.model.named_parameters():
        for key in (f"model.{name}", f"ema.{name}"):
            found = tuple(tensors[key].shape) if key in tensors else "none"
            if found != tuple(p.shape):
                raise ConfigError(f"{path}: expected {key} of shape {tuple(p.shape)}, found {found}")


def _identity(trainer: Trainer) -> dict[str, object]:
    """What a resumed run must share with the one that wrote the checkpoint, by the name of its setting."""
    preset, model = trainer.preset, trainer.model
    launch = {"run.seed": preset.run.seed, "run.precision": f"{model.dtype}{' fp8' * model.fp8}"}
    return {name: value for name, value in preset.settings().items() if _matters(*name.split("."))} | launch


def _matters(section: str, field: str) -> bool:
    return section in SECTIONS and field not in FREE
