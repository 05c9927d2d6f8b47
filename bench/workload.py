"""The step that the bench measures: a preset with settings laid over it, batches, a trainer, and taking turns."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_type_hints
from unittest.mock import patch

import numpy as np
import torch

from niblick.data import loaders
from niblick.data.command_line import nearest, parse
from niblick.data.loaders import Batch, document_starts, row_starts
from niblick.data.prepare import Prepared
from niblick.model.attention import attention_version, choose_attention
from niblick.model.config import ConfigError, Preset
from niblick.model.gpt import GPT
from niblick.model.precision import choose_precision
from niblick.model.presets import PRESETS
from niblick.model.training import Trainer

BATCHES, BUCKET = 4, 64
WARM_UP_STEPS = 2
"""In each loop mode: the first compiles."""
FIRST_STEPS = 3
"""After the warm-up, which puts everything back: no matrix is zero any more, as the out-projections start."""

# ---- presets --------------------------------------------------------------------------------------------------------


def require_device(name: str, purpose: str) -> torch.device:
    """The device, ready for use. ConfigError where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"expected a CUDA device, found none (--device cpu {purpose})")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")
    return torch.device(name)


def default_preset(device: str) -> str:
    return "pr1855" if device == "cuda" else "demo"


def named_preset(name: str, settings: tuple[str, ...] = ()) -> Preset:
    """The preset of that name with settings, each `section.field=value`, laid over it."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
    return with_settings(PRESETS[name], settings)


def with_settings(preset: Preset, settings: tuple[str, ...]) -> Preset:
    words = [_option(setting) for setting in settings]
    return parse(Preset, words, script="settings", default=preset) if words else preset


def _option(setting: str) -> str:
    """`section.field=value` as the option of a command line, where a yes or no is the option's presence."""
    path, equals, value = setting.partition("=")
    section, _, field = path.partition(".")
    if not (section and field and equals) or section.startswith("-"):
        raise ConfigError(f"expected a setting as section.field=value: got {setting}")
    kind = get_type_hints(get_type_hints(Preset).get(section, Preset)).get(field)
    if kind is not bool:
        return f"--{setting}"
    if value.lower() not in ("true", "false"):
        raise ConfigError(f"expected {path}=true or {path}=false: got {setting}")
    return f"--{path}" if value.lower() == "true" else f"--{section}.no-{field}"


def one_micro_step(preset: Preset, tokens: int, attention: str, device: str, world_size: int = 1) -> Preset:
    """The preset with one micro-step of so many tokens a rank and step; 0: 98,304, on a CPU 256."""
    tokens = tokens or (98_304 if device == "cuda" else 256)
    return replace(
        preset,
        model=replace(preset.model, attention=attention if device == "cuda" else "auto"),
        batch=replace(preset.batch, tokens_per_step=tokens * world_size, tokens_per_micro_step=tokens),
        schedule=replace(preset.schedule, warmup_steps=WARM_UP_STEPS),
    )


def require_same_batches(first: Preset, *others: Preset) -> None:
    """ConfigError unless all read the same batches: else one's figures say nothing beside another's."""
    model = ("vocab_size", "bos_id", "max_segment", "attention_span")
    for other in others:
        pairs = [(f"model.{name}", getattr(first.model, name), getattr(other.model, name)) for name in model]
        for section in ("batch", "data"):
            theirs = vars(getattr(other, section))
            pairs += [(f"{section}.{name}", mine, theirs[name]) for name, mine in vars(getattr(first, section)).items()]
        for name, mine, its in pairs:
            if mine != its:
                raise ConfigError(f"expected both presets to read the same batches: got {name} {mine} and {its}")
        if first.run.deterministic != other.run.deterministic:
            raise ConfigError("expected both presets with the same run.deterministic, which holds for a whole process")


# ---- batches --------------------------------------------------------------------------------------------------------


def synthetic_batches(preset: Preset, device: torch.device, seed: int = 0) -> list[Batch]:
    """Uniform ids in documents of exp(N(ln 600, 0.9²)) tokens, at least 32, each begun by BOS."""
    config, n = preset.model, preset.batch.tokens_per_micro_step
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(BATCHES):
        ids = rng.integers(config.vocab_size - 1, size=n + 1)
        ids += ids >= config.bos_id  # any id but BOS
        lengths = np.exp(rng.normal(np.log(600), 0.9, size=n // 32 + 1)).astype(int).clip(32)
        starts = np.cumsum(lengths) - lengths
        ids[starts[starts <= n]] = config.bos_id
        if config.attention_span == "documents":
            cu_seqlens = document_starts(ids[:-1], config.bos_id, config.max_segment, BUCKET)
        else:
            cu_seqlens = row_starts(n, config.max_segment, BUCKET)
        tensors = [torch.from_numpy(ids[:-1]), torch.from_numpy(ids[1:]), cu_seqlens]
        # In page-locked memory, as the loaders have them: else each step would wait for the one before.
        batches.append(Batch(*(x.pin_memory() if device.type == "cuda" else x for x in tensors), {}))
    return batches


def open_loader(preset: Preset, prepared: Prepared, device: torch.device, rank: int = 0, world_size: int = 1):
    """The preset's loader from its first batch on; a context manager."""
    return loaders.open_loader(
        preset.data.loader,
        prepared.train,
        preset.batch.tokens_per_micro_step,
        bos_id=preset.model.bos_id,
        max_segment=preset.model.max_segment,
        rank=rank,
        world_size=world_size,
        prefetch=preset.data.prefetch,
        vocab_size=preset.model.vocab_size,
        pin_memory=device.type == "cuda",
    )


# ---- the step -------------------------------------------------------------------------------------------------------


def make_trainer(preset: Preset, device: torch.device, compile: bool, world_size: int = 1) -> Trainer:
    dtype, fp8 = choose_precision(preset.run.precision, device)
    _, attend = choose_attention(preset.model.attention, device, dtype, preset.run.deterministic)
    model = GPT(preset.model, seed=preset.run.seed, dtype=dtype, fp8=fp8).to(device)
    model.attend = attend
    return Trainer(model, preset, device, world_size, compile)


def attention_of(preset: Preset, device: torch.device) -> str:
    """The rung in use and its version."""
    dtype, _ = choose_precision(preset.run.precision, device)
    rung, _ = choose_attention(preset.model.attention, device, dtype)
    return f"{rung} {attention_version(rung)}"


def take_step(trainer: Trainer, batches: Iterator[Batch], looping: bool, factor: float = 1.0) -> None:
    trainer.step(batches, factor=factor, momentum=trainer.preset.optim.momentum, looping=looping)


def compiling_many():
    """Every variant and loop mode is a compilation of the same code object, of which torch allows eight."""
    return torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000)


def memory_of(trainer: Trainer, step: Callable[[], None]) -> int | None:
    """Bytes that the trainer's step allocates beyond what stays, its kernels launched one by one: what a CUDA graph
    holds for itself the allocator counts as free. None on a CPU."""
    if trainer.device.type != "cuda":
        step()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with patch.object(trainer, "graphed", None):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def in_turns(labels: list[str], rounds: int) -> Iterator[tuple[int, list[str]]]:
    """Every label once a round, the order turned by one each round."""
    for turn in range(rounds):
        first = turn % len(labels)
        yield turn, labels[first:] + labels[:first]
