"""A checkpoint: every tensor of a run and its position, in one safetensors file that appears whole or not at all."""

import dataclasses
import json
from pathlib import Path

from niblick.model.config import ConfigError
from niblick.model.files import write_atomically
from niblick.model.training import Position, Trainer

FREE = ("cache", "prefetch", "attention")
"""Settings that do not change what is computed. The schedule is free too: a run may be given a longer budget."""


def save_checkpoint(path: Path, trainer: Trainer, position: Position) -> None:
    """Write beside and rename: a run that is killed meanwhile leaves the previous checkpoint in place. OSError.

    The time that the last write takes is not in its file: a run resumed from it does not pay for it.
    """
    from safetensors.torch import save

    record = {"position": dataclasses.asdict(position), "identity": _identity(trainer)}
    tensors = {name: tensor.contiguous() for name, tensor in trainer.state_dict().items()}
    write_atomically(path, lambda file: file.write(save(tensors, {"niblick": json.dumps(record)})))


def load_checkpoint(path: Path, trainer: Trainer) -> Position:
    """Put the trainer where the checkpoint was written. ConfigError for a file that is damaged or of another run."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConfigError(f"--resume expected a checkpoint at {path}: found none")
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["niblick"])
            position, identity = Position(**record["position"]), record["identity"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{path}: expected a checkpoint of niblick, found a damaged or foreign file ({error})"
        ) from error
    for name, expected in _identity(trainer).items():
        if identity.get(name) != expected:
            raise ConfigError(f"{path} was written with {name} = {identity.get(name)!r}: expected {expected!r}")
    trainer.load_state_dict(tensors)
    return position


def _identity(trainer: Trainer) -> dict[str, object]:
    """What a resumed run must share with the one that wrote the checkpoint, by the name of its setting."""
    preset = trainer.preset
    parts = {name: dataclasses.asdict(getattr(preset, name)) for name in ("model", "optim", "batch", "data")}
    settings = {f"{part}.{key}": value for part, fields in parts.items() for key, value in fields.items()}
    launch = {"run.seed": preset.run.seed, "run.precision": str(trainer.model.dtype), "ranks": trainer.world_size}
    return {name: value for name, value in settings.items() if name.split(".")[1] not in FREE} | launch
