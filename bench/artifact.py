"""What each way of packing a checkpoint costs, in bytes and in bits per byte.

    python -m niblick.bench.artifact CHECKPOINT --data FOLDER [--preset pr1855] [--max-tokens N]
    python -m niblick.bench.artifact simulated

The first table is at equal Hessian-weighted error: the containers on the same integers of GPTQ, then trellises with the
steps that leave the same error in each group of clips. The second is at equal bytes: every way fills up to the size of
the first table's first row, or to --target-bytes; ways that choose where bits go are in this one only. "diverged" is as
"lost", with far less noise (`divergence`). FOLDER holds training and validation shards and a tokenizer. `simulated` has
weights of the record's shapes, with a spread over columns that explains the published sizes, and no score.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_type_hints

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from niblick.artifact.calibration import calibrate
from niblick.artifact.container import pack, read_artifact
from niblick.artifact.errors import ArtifactError
from niblick.artifact.fill import fill
from niblick.artifact.load import set_weights
from niblick.artifact.published import require_lrzip
from niblick.artifact.quantize import Quantization, quantize
from niblick.bench.divergence import Divergence
from niblick.data import loaders
from niblick.data import tokenizer as tokenizers
from niblick.data.command_line import guarded, parse
from niblick.data.shards import find_shards
from niblick.evaluation.run import ValidationSet, evaluate_model
from niblick.model.attention import choose_attention
from niblick.model.config import ArtifactConfig, ConfigError, EvalConfig, GPTConfig
from niblick.model.files import write_atomically
from niblick.model.gpt import BANKS, GPT
from niblick.model.presets import PRESETS

OURS = {"container": "niblick", "steps_per_octave": 16, "small_bits": 8, "gate_bits": 8}
WAYS = {
    "brotli": {"container": "brotli"},
    "brotli, a stream a role": {"container": "groups_brotli", "sort_rows": False},
    "lrzip, a stream a role": {"container": "lrzip", "sort_rows": False},
    "lrzip, rows sorted": {"container": "lrzip", "sort_rows": True},
    "range coder": {"container": "niblick"},
    "range coder, small parts": OURS,
    "without LQER": OURS | {"low_rank_matrices": 0},
    "equal steps in a matrix": OURS | {"row_exponent": 0.0},
    "steps by root of deviation": OURS | {"row_exponent": 0.5},
    "value dedup": OURS | {"value_dedup": 2},
    "trellis, 8 states": OURS | {"rounding": "trellis8"},
    "trellis, 32 states": OURS | {"rounding": "trellis32"},
    "trellis, 8 states, without LQER": OURS | {"rounding": "trellis8", "low_rank_matrices": 0},
    "trellis, 8 states, equal steps": OURS | {"rounding": "trellis8", "row_exponent": 0.0},
    "bits by role": OURS | {"allocation": "roles"},
    "bits by matrix": OURS | {"allocation": "matrices"},
    "bits by row": OURS | {"allocation": "rows"},
    "trellis, 8 states, bits by row": OURS | {"allocation": "rows", "rounding": "trellis8"},
    "trellis, 32 states, bits by row": OURS | {"allocation": "rows", "rounding": "trellis32"},
}
"""What differs from the preset. The error of the first is what the others are brought to."""
GROUPS = {"attention_clip": "attn", "mlp_clip": "mlp", "embedding_clip": "embedding"}
"""Clip -> how the names of its roles begin."""
WIDTH = 120
"""Of the tables, also where the output is no terminal."""


@dataclass(frozen=True)
class Arguments:
    checkpoint: tyro.conf.Positional[str]
    """A checkpoint of train.py, or `simulated`."""
    data: Path | None = None
    preset: str = "pr1855"
    """Whose clips and calibration are used."""
    ways: tuple[str, ...] = ()
    """Rows of the table; default: all, those with lrzip where it is installed."""
    equal_bytes: bool = True
    """Also the second table, which quantises every way two to four times more."""
    target_bytes: int = 0
    """Of the second table; 0: as many as the first row of the first has."""
    max_tokens: int = 0
    """Of the held-out text; 0: all."""
    calibration_tokens: int = 0
    """0: as many as the preset takes."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    out: Path | None = None
    """Also write the rows there, a line of JSON each."""


class Scored(NamedTuple):
    """Bits per byte: of the held-out text, and the divergence from the unquantised model's predictions."""

    bits: float
    divergence: float


class Subject(NamedTuple):
    """What is packed: a model's weights, their calibration, and how to score weights; None: not at all."""

    config: GPTConfig
    state: dict[str, Tensor]
    calibration: dict[str, Tensor]
    score: Callable[[Quantization | None], Scored] | None


class Row(NamedTuple):
    table: str
    way: str
    model_bytes: int
    error_db: float
    """Mean over roles of the weighted error, against the first row's."""
    bits_per_byte: float
    lost: float
    divergence: float
    quantise_s: float
    pack_s: float
    read_s: float
    clips: tuple[float, float, float]


def main(words: list[str]) -> None:
    arguments = parse(Arguments, words, script="niblick.bench.artifact", about=__doc__)
    if arguments.preset not in PRESETS:
        raise ConfigError(f"--preset: expected one of {', '.join(PRESETS)}, got {arguments.preset}")
    ways = chosen_ways(arguments.ways, arguments.checkpoint != "simulated")
    base = PRESETS[arguments.preset].artifact
    if arguments.calibration_tokens:
        base = replace(base, calibration_batches=1, calibration_tokens=arguments.calibration_tokens)
    cuda = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    subject = simulated() if arguments.checkpoint == "simulated" else loaded(arguments, base, device)
    rows = []
    for row in compare(subject, base, ways, arguments.equal_bytes, arguments.target_bytes):
        rows.append(row)
        print(f"{row.table}: {row.way}: {row.model_bytes:,} bytes, {row.error_db:+.3f} dB", flush=True)
    console = Console(width=max(Console().width, WIDTH))
    for table in dict.fromkeys(row.table for row in rows):
        console.print(rendered(table, [row for row in rows if row.table == table]))
    if arguments.out:
        text = "".join(json.dumps(row._asdict()) + "\n" for row in rows)
        write_atomically(arguments.out, lambda file: file.write(text.encode()))


def chosen_ways(names: tuple[str, ...], real: bool) -> dict[str, dict]:
    """Those named, or all; unasked, none that needs an lrzip that is missing, or a real model's loss."""
    for name in names:
        if name not in WAYS:
            raise ConfigError(f"--ways: expected some of {list(WAYS)}, got {name!r}")
    chosen = {name: WAYS[name] for name in names or WAYS if names or real or "allocation" not in WAYS[name]}
    if "allocation" in next(iter(chosen.values())):
        raise ConfigError(f"--ways: expected first one whose bytes the others get, got {next(iter(chosen))!r}")
    if any(way.get("container") == "lrzip" for way in chosen.values()):
        try:
            require_lrzip()
        except ArtifactError as error:
            if names:
                raise
            print(f"left out: {error}")
            return {name: way for name, way in chosen.items() if way.get("container") != "lrzip"}
    return chosen


def compare(
    subject: Subject, base: ArtifactConfig, ways: dict[str, dict], equal_bytes: bool, target_bytes: int = 0
) -> Iterator[Row]:
    """The rows of the first table, then, if wanted, those of the second."""
    unquantised = subject.score(None).bits if subject.score else math.nan
    reference, target, done = None, target_bytes, {}
    for name, way in ways.items():
        start = time.perf_counter()
        settings = replace(base, **way)
        if settings.allocation != "clips":
            continue
        key = replace(settings, container="niblick", sort_rows=True)  # the container changes no integer
        if key not in done:
            done[key] = at_equal_error(subject, key, reference)
        found, quantization = done[key]
        settings = replace(found, container=settings.container, sort_rows=settings.sort_rows)
        seconds = time.perf_counter() - start
        row = measured("equal error", name, subject, settings, quantization, reference, unquantised, seconds)
        if reference is None:
            reference, target = quantization.error, target_bytes or row.model_bytes
        yield row

    def size_of(quantization: Quantization, settings: ArtifactConfig) -> int:
        return len(pack(quantization.tensors, subject.config, settings=settings))

    own = {name: way for name, way in ways.items() if way["container"] == "niblick"}  # the others: minutes a trial
    for name, way in own.items() if equal_bytes else ():
        start = time.perf_counter()
        settings, quantization, _ = fill(subject.state, replace(base, **way), subject.calibration, size_of, target)
        seconds = time.perf_counter() - start
        yield measured("equal bytes", name, subject, settings, quantization, reference, unquantised, seconds)


def at_equal_error(
    subject: Subject, settings: ArtifactConfig, reference: dict[str, Tensor] | None
) -> tuple[ArtifactConfig, Quantization]:
    """Clips for which every group of roles has the weighted error of the reference; error grows with step squared."""
    quantization = quantize(subject.state, settings, subject.calibration)
    for _ in range(2 if reference else 0):
        factors = {
            clip: math.exp(-_mean_log(quantization.error, reference, start) / 2) for clip, start in GROUPS.items()
        }
        if all(abs(math.log(factor)) < 0.0005 for factor in factors.values()):
            break
        settings = replace(settings, **{clip: factor * getattr(settings, clip) for clip, factor in factors.items()})
        quantization = quantize(subject.state, settings, subject.calibration)
    return settings, quantization


def measured(
    table: str,
    name: str,
    subject: Subject,
    settings: ArtifactConfig,
    quantization: Quantization,
    reference: dict[str, Tensor] | None,
    unquantised: float,
    quantise_s: float,
) -> Row:
    start = time.perf_counter()
    data = pack(quantization.tensors, subject.config, settings=settings)
    packed = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.nbk"
        path.write_bytes(data)
        began = time.perf_counter()
        read_artifact(path)
        read = time.perf_counter() - began
    decibels = 10 / math.log(10) * _mean_log(quantization.error, reference) if reference else 0.0
    bits, divergence = subject.score(quantization) if subject.score else (math.nan, math.nan)
    clips = (settings.attention_clip, settings.mlp_clip, settings.embedding_clip)
    return Row(
        table, name, len(data), decibels, bits, bits - unquantised, divergence, quantise_s, packed - start, read, clips,
    )  # fmt: skip


def _mean_log(error: dict[str, Tensor], reference: dict[str, Tensor], start: str = "") -> float:
    roles = [role for role in error if role.startswith(start)]
    return sum((error[role].sum() / reference[role].sum()).log().item() for role in roles) / len(roles)


def rendered(title: str, rows: list[Row]) -> Table:
    heads = ["way", "bytes", "saved", "dB", "bits/byte", "lost", "diverged", "quantise s", "pack s", "read s"]
    table = Table(*heads, title=title)
    for row in rows:
        table.add_row(
            row.way, f"{row.model_bytes:,}", f"{rows[0].model_bytes - row.model_bytes:,}", f"{row.error_db:+.3f}",
            f"{row.bits_per_byte:.5f}", f"{row.lost:.5f}", f"{row.divergence:.5f}", f"{row.quantise_s:.1f}",
            f"{row.pack_s:.1f}", f"{row.read_s:.1f}",
        )  # fmt: skip
    return table


# ---- what is packed ------------------------------------------------------------------------------------------------


def loaded(arguments: Arguments, base: ArtifactConfig, device: torch.device) -> Subject:
    """The averaged weights of a checkpoint, calibrated on training shards, scored on validation shards."""
    if arguments.data is None:
        raise ConfigError("--data: expected the folder of the checkpoint's shards and tokenizer, got none")
    config, state = read_checkpoint(Path(arguments.checkpoint))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = GPT(config, dtype=dtype)
    model.load_state_dict(state)
    model.to(device).eval()
    _, model.attend = choose_attention("auto", device, dtype)
    row = config.max_segment
    rows = loaders.SequenceLoader(
        find_shards(arguments.data, "train"), max(base.calibration_tokens // row, 1) * row, sequence_length=row,
        rank=0, world_size=1, prefetch=1, vocab_size=config.vocab_size, pin_memory=False, cursor=None,
    )  # fmt: skip
    with rows as batches:
        calibration = calibrate(model, replace(base, rounding="gptq", allocation="rows"), batches, 0)
    held_out = ValidationSet.load(
        find_shards(arguments.data, "val"), tokenizers.find(arguments.data), vocab_size=config.vocab_size,
        bos_id=config.bos_id, max_tokens=arguments.max_tokens,
    )  # fmt: skip
    kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    diverged = Divergence(model, held_out)

    def score(quantization: Quantization | None) -> Scored:
        if quantization is None:
            model.load_state_dict(kept)
        else:
            set_weights(model, quantization.tensors)
        bits = evaluate_model(model, held_out, EvalConfig(sequence_length=row)).bits_per_byte
        return Scored(bits, diverged(model))

    return Subject(config, kept, calibration, score)


def read_checkpoint(path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Settings and averaged weights of a checkpoint of train.py. ConfigError for another file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            identity = json.loads(file.metadata()["niblick"])["identity"]
            state = {
                name.removeprefix("ema."): file.get_tensor(name) for name in file.keys() if name.startswith("ema.")
            }
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: expected a checkpoint of train.py, found none: {error}") from error
    names = get_type_hints(GPTConfig)
    settings = {name: identity[f"model.{name}"] for name in names if f"model.{name}" in identity}
    return GPTConfig(**settings), state


def simulated(config: GPTConfig | None = None) -> Subject:
    """Gaussian rows; columns and rows with a log-normal spread of 0.22 and 0.2; Hessians of correlated inputs."""
    config = config or PRESETS["pr1855"].model
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    state = {}
    for name, tensor in GPT(config).state_dict().items():
        if name in (*BANKS, "embedding"):
            *stack, R, C = tensor.shape
            spread = (0.22 * normal(*stack, 1, C) + 0.2 * normal(*stack, R, 1)).exp()
            state[name] = 0.05 * spread * normal(*tensor.shape)
        else:
            state[name] = tensor.float() + 0.05 * normal(*tensor.shape)
    L, D = config.num_layers, config.model_dim
    sizes = {
        "attn_in": (L, D),
        "attn_out": (L, D),
        "mlp_in": (L, D),
        "mlp_hidden": (L, config.mlp_hidden),
        "head": (1, D),
    }
    hessians = {}
    for name, (n, C) in sizes.items():
        x = [
            normal(2 * C, C) @ (torch.eye(C) + 0.5 * normal(C, C) / C**0.5) * (0.4 * normal(C)).exp() for _ in range(n)
        ]
        hessians[name] = torch.stack([rows.mT @ rows for rows in x])
    return Subject(config, state, hessians, None)


if __name__ == "__main__":
    sys.exit(guarded("niblick.bench.artifact", main, sys.argv[1:], ArtifactError, ConfigError))
