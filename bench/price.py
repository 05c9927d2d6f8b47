"""The price list: what each kernel saves of the training step, in milliseconds.

    python -m niblick.bench.price [PRESET] [--only loss_impl embed_impl] [--loop on] [--rounds 10]

A step is forward, backward, clip, optimizers and average (model/training.py), compiled, on synthetic documents. Every
field of GPTConfig and OptimConfig that offers "reference" is set to each of its other values in turn. All variants are
compiled first and stay alive; then they take turns, so that a drift of the card's clock cancels in the differences.
On a GPU the records are appended to bench/results/DATE-CARD-price.jsonl.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints
from unittest.mock import patch

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from niblick.bench import results_file
from niblick.bench.measure import first_line
from niblick.bench.workload import (
    FIRST_STEPS,
    attention_of,
    compiling_many,
    default_preset,
    in_turns,
    make_trainer,
    memory_of,
    named_preset,
    one_micro_step,
    require_device,
    synthetic_batches,
    take_step,
)
from niblick.data.command_line import guarded, nearest, parse
from niblick.data.loaders import Batch
from niblick.model.config import ConfigError, Preset
from niblick.model.errors import TrainingStopped
from niblick.model.training import Trainer

DEFAULT = "default"


@dataclass(frozen=True)
class Arguments:
    preset: tyro.conf.Positional[str] = ""
    """Default: pr1855, on a CPU demo."""
    only: tuple[str, ...] = ()
    """Fields to price (xsa_impl, model.xsa_impl) or single values of them (loss_impl=kernel); default: all."""
    loop: Literal["off", "on", "both"] = "both"
    tokens: int = 0
    """Of a step; 0: 98,304, on a CPU 256."""
    attention: Literal["auto", "fa4", "fa3", "fa2", "torch", "plain"] = "auto"
    rounds: int = 10
    """Turns of every variant; 0 only compiles, for a later run."""
    steps: int = 3
    """Steps a turn; the first is not timed."""
    compile: bool = True
    """torch.compile, as training does on a GPU; never on a CPU."""
    precompile: int = 0
    """So many processes compile the variants beforehand, into the compiler's cache; each needs the step's memory."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: a tiny step in eager, to try this command; its figures say nothing about a GPU."""
    out: Path | None = None
    """JSON-lines file to append to."""
    commit: str | None = None
    """The commit measured, where the files do not lie in a git checkout."""


@dataclass
class Variant:
    """One preset's step. By loop mode: ms, one list a turn; step_bytes, what a step allocates beyond what stays."""

    trainer: Trainer
    ms: dict[bool, list[list[float]]] = field(default_factory=dict)
    step_bytes: dict[bool, int | None] = field(default_factory=dict)


# ---- what is compared -----------------------------------------------------------------------------------------------


def choices(preset: Preset) -> dict[str, Preset | str]:
    """The preset, and for each field with a reference each of its other values, by `section.field=value`.

    A value that the rest of the preset refuses stands with the refusal instead.
    """
    found: dict[str, Preset | str] = {DEFAULT: preset}
    for section in ("model", "optim"):
        config = getattr(preset, section)
        for name, kind in get_type_hints(type(config)).items():
            values = get_args(kind) if get_origin(kind) is Literal else ()
            for value in values if "reference" in values else ():
                if value == getattr(config, name):
                    continue
                try:
                    found[f"{section}.{name}={value}"] = replace(preset, **{section: replace(config, **{name: value})})
                except ConfigError as error:
                    found[f"{section}.{name}={value}"] = f"refused: {error}"
    return found


def chosen(found: dict[str, Preset | str], only: tuple[str, ...]) -> list[str]:
    """The labels meant by `only`: fields, with or without section and value. ConfigError for one that means nothing."""
    if not only:
        return list(found)
    names = {label: _names(label) for label in found}
    for word in only:
        known = [name for names in names.values() for name in names]
        if word not in known:
            raise ConfigError(f"--only: expected some of {', '.join(found)}: got {word}{nearest(word, known)}")
    return [label for label, own in names.items() if own & set(only)]


def _names(label: str) -> set[str]:
    path = label.partition("=")[0]
    return {label, path} | {text.partition(".")[2] for text in (label, path) if "." in text}


def loop_modes(preset: Preset, wanted: str) -> list[bool]:
    modes = {"off": [False], "on": [True], "both": [False, True]}[wanted]
    found = [looping for looping in modes if not looping or preset.model.loop_extra_passes]
    if not found:
        raise ConfigError(f"--loop {wanted}: expected a preset whose layers loop")
    return found


def step_preset(arguments: Arguments) -> Preset:
    """The preset with one micro-step of so many tokens a step."""
    preset = named_preset(arguments.preset or default_preset(arguments.device))
    return one_micro_step(preset, arguments.tokens, arguments.attention, arguments.device)


# ---- measuring ------------------------------------------------------------------------------------------------------


def build(preset: Preset, loops: list[bool], device: torch.device, compile: bool) -> Variant:
    """A variant that has warmed up as for training and taken its first steps."""
    variant, batches = Variant(make_trainer(preset, device, compile)), cycle(synthetic_batches(preset, device))
    with patch.object(variant.trainer, "loop_modes", lambda: tuple(loops)):  # the others are not timed
        variant.trainer.warm_up(batches)
    for looping in loops:
        for _ in range(FIRST_STEPS):
            memory = memory_of(variant.trainer, lambda: take_step(variant.trainer, batches, looping))  # noqa: B023
            variant.step_bytes[looping] = memory
    return variant


def take_turns(variants: dict[str, Variant], loops: list[bool], rounds: int, steps: int) -> None:
    """Every variant and loop mode once a round, the order turned by one each round; what recompiles is an error.

    In a round all take the same batches: documents of other lengths are other work. Only whole rounds are noted.
    """
    labels = list(variants)
    trainer = variants[labels[0]].trainer
    batches = synthetic_batches(trainer.preset, trainer.device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for turn, order in in_turns(labels, rounds):
            found = {}
            for label in order:
                for looping in loops:
                    same = islice(cycle(batches), turn % len(batches), None)
                    found[label, looping] = _time_steps(variants[label].trainer, same, looping, steps)[1:]
            for (label, looping), times in found.items():
                variants[label].ms.setdefault(looping, []).append(times)


def _time_steps(trainer: Trainer, batches: Iterator[Batch], looping: bool, steps: int) -> list[float]:
    """Milliseconds of each step; on a GPU by events, without a wait between the steps."""
    cuda, marks = trainer.device.type == "cuda", []
    for i in range(steps + 1):
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()
        if i < steps:
            take_step(trainer, batches, looping)
    if cuda:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(marks)]
    return [1e3 * (b - a) for a, b in pairwise(marks)]


def records(variants: dict[str, Variant], presets: dict[str, Preset | str]) -> list[dict[str, object]]:
    """One a variant and loop mode. The difference to the default is taken round by round; quartiles are of those."""
    found = []
    for label, variant in variants.items():
        section_field, _, value = label.partition("=")
        section, _, name = section_field.partition(".")
        for looping, turns in variant.ms.items():
            rounds = np.median(turns, axis=1)
            default = np.median(variants[DEFAULT].ms[looping], axis=1)
            first, median, third = np.percentile(turns, (25, 50, 75))
            d_first, d_median, d_third = np.percentile(rounds - default, (25, 50, 75))
            found.append(
                {
                    "event": "price",
                    "variant": label,
                    "value": value,
                    "default": getattr(getattr(presets[DEFAULT], section), name) if value else "",
                    "loop": "on" if looping else "off",
                    "ms": float(median),
                    "q1_ms": float(first),
                    "q3_ms": float(third),
                    "n": int(np.size(turns)),
                    "difference_ms": float(d_median),
                    "difference_q1_ms": float(d_first),
                    "difference_q3_ms": float(d_third),
                    "rounds": len(rounds),
                    "step_bytes": variant.step_bytes.get(looping),
                }
            )
    return found


# ---- the command ----------------------------------------------------------------------------------------------------


def main(words: list[str]) -> None:
    arguments = parse(Arguments, words, script="niblick.bench.price", about=__doc__)
    device = require_device(arguments.device, "tries the command on a tiny step")
    for option, least in {"rounds": 0, "steps": 2, "precompile": 0}.items():
        if getattr(arguments, option) < least:
            raise ConfigError(f"expected --{option} of {least} or more: got {getattr(arguments, option)}")
    preset = step_preset(arguments)
    presets = choices(preset)
    labels = chosen(presets, arguments.only)
    loops = loop_modes(preset, arguments.loop)
    if arguments.rounds and DEFAULT not in labels:
        labels.insert(0, DEFAULT)
    if arguments.out:
        results_file.append(arguments.out, [])  # one that cannot be written is refused before anything is measured
    if device.type == "cpu":
        print("On a CPU, in eager, a tiny step: this shows that the command works, and nothing about a kernel.")
    precompile(arguments, labels, presets)
    with compiling_many():
        variants = build_all(arguments, labels, presets, loops, device)
        if arguments.rounds:
            price(arguments, variants, presets, loops, device)


def precompile(arguments: Arguments, labels: list[str], presets: dict[str, Preset | str]) -> None:
    """This command for each variant by itself, compiling only, so many at a time. A failure is shown later."""
    if not (arguments.precompile and arguments.compile and arguments.device == "cuda"):
        return
    words = [sys.executable, "-m", "niblick.bench.price", *([arguments.preset] if arguments.preset else [])]
    words += ["--rounds", "0", "--loop", arguments.loop, "--attention", arguments.attention]
    words += ["--tokens", str(arguments.tokens)]
    start = time.perf_counter()
    with ThreadPoolExecutor(arguments.precompile) as pool:
        commands = [[*words, "--only", label] for label in labels if isinstance(presets[label], Preset)]
        list(pool.map(lambda command: subprocess.run(command, capture_output=True), commands))
    print(f"compiled beforehand: {len(commands)} variants, {time.perf_counter() - start:.0f} s", flush=True)


def build_all(
    arguments: Arguments,
    labels: list[str],
    presets: dict[str, Preset | str],
    loops: list[bool],
    device: torch.device,
) -> dict[str, Variant]:
    """The variants that can be had; each of the others is said with its reason. What fails in the default is raised."""
    variants = {}
    for label in labels:
        start = time.perf_counter()
        try:
            if isinstance(presets[label], str):
                raise ConfigError(presets[label])
            variants[label] = build(presets[label], loops, device, arguments.compile and device.type == "cuda")
        except Exception as error:  # of one variant: the others are worth having
            if label == DEFAULT:
                raise
            print(f"{label}: not priced: {first_line(error)}", flush=True)
            continue
        print(f"{label}: compiled and warmed up in {time.perf_counter() - start:.1f} s", flush=True)
    return variants


def price(
    arguments: Arguments,
    variants: dict[str, Variant],
    presets: dict[str, Preset | str],
    loops: list[bool],
    device: torch.device,
) -> None:
    start = time.perf_counter()
    try:
        take_turns(variants, loops, arguments.rounds, arguments.steps)
    finally:  # what ends it early, Ctrl-C or a recompilation, costs the round that it falls in
        rounds = len(next(iter(variants[DEFAULT].ms.values()), []))
        print(f"{rounds} rounds of {len(variants)} variants: {time.perf_counter() - start:.0f} s", flush=True)
        if rounds:
            tell(arguments, variants, presets, device)


def tell(
    arguments: Arguments, variants: dict[str, Variant], presets: dict[str, Preset | str], device: torch.device
) -> None:
    """Prints, and on a GPU or where asked keeps, what was found."""
    trainer, console = variants[DEFAULT].trainer, Console(width=None if sys.stdout.isatty() else 150)
    found = records(variants, presets)
    console.print(table(found))
    out = arguments.out or (results_file.default_path("price", device) if device.type == "cuda" else None)
    if out:
        facts = {
            "preset": arguments.preset or default_preset(device.type),
            "tokens": trainer.preset.batch.tokens_per_step,
            "attention": attention_of(trainer.preset, device),
            "compile": arguments.compile and device.type == "cuda",
        }
        begin = results_file.start_record(device, **facts)
        begin["commit"] = arguments.commit or begin["commit"]
        results_file.append(out, [begin, *found])
        console.print(f"appended to {out}")


def table(found: list[dict[str, object]]) -> Table:
    """What each choice costs against the default: positive milliseconds are what the default saves."""
    loops = list(dict.fromkeys(record["loop"] for record in found))
    columns = [column for loop in loops for column in (f"loop {loop}, ms", "against the default [quartiles]")]
    shown = Table("field=value", "instead of", *columns)
    for label in dict.fromkeys(record["variant"] for record in found):
        mine = [record for record in found if record["variant"] == label]
        cells = []
        for record in mine:
            difference, low, high = (record[f"difference_{key}ms"] for key in ("", "q1_", "q3_"))
            cells += [
                f"{record['ms']:.2f}",
                "" if label == DEFAULT else f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]",
            ]
        shown.add_row(label, mine[0]["default"], *cells)
    return shown


def command(words: list[str]) -> int:
    """`main` with bad input as one line and exit status 2."""
    return guarded("niblick.bench.price", main, words, ConfigError, TrainingStopped)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was measured is kept
    sys.exit(command(sys.argv[1:]))
