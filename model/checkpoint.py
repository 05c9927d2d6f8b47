"""A checkpoint: every tensor of a run and its position, in one safetensors file that appears whole or not at all."""

import dataclasses
import json
from pathlib import Path

from torch import Tensor

from niblick.model.config import ConfigError, Preset
from niblick.model.files import write_atomically
from niblick.model.training import Position

SAME = ("model", "optim", "batch", "data")
"""The parts of a preset that a resumed run must share with the one that wrote the checkpoint."""

FREE = ("cache", "prefetch", "attention")
"""Fields of those parts that do not change what is computed."""


def save_checkpoint(path: Path, tensors: dict[str, Tensor], position: Position, preset: Preset) -> None:
    """Write beside and rename: a run that is killed meanwhile leaves the previous checkpoint in place."""
    from safetensors.torch import save

    record = {"position": dataclasses.asdict(position), "preset": dataclasses.asdict(preset)}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda file: file.write(save(tensors, {"niblick": json.dumps(record)})))


def load_checkpoint(path: Path, preset: Preset) -> tuple[dict[str, Tensor], Position]:
    """Tensors on the CPU and the position. Refuses a file that is damaged or belongs to another configuration."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConfigError(f"--resume expected a checkpoint at {path}: found none")
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["niblick"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{path}: expected a checkpoint of niblick, found a damaged or foreign file ({error})"
        ) from error
    _require_same(path, record["preset"], dataclasses.asdict(preset))
    return tensors, Position(**record["position"])


def _require_same(path: Path, found: dict, expected: dict) -> None:
    for part in SAME:
        for key, value in expected[part].items():
            if key not in FREE and found[part].get(key) != value:
                raise ConfigError(
                    f"{path} was written with {part}.{key} = {found[part].get(key)!r}: expected {value!r}"
                )
