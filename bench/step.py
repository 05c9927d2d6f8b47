"""The ledger of the training step: its phases, the steps that fit the budget, and what a millisecond is worth.

    python -m niblick.bench.step [PRESET] [--set optim.clip=global] [--versus pr1934] [--versus-set optim.clip=micro]

Phases are timed inside whole training steps, on synthetic documents or those of --data, with the loop off and on. The
result is compared with the last run of the same card and preset in bench/results/*-step.jsonl, to which it is appended:
a step longer by more than --fail-over percent is exit status 1. With --versus or --versus-set a second preset takes
turns with the first in the same process. Under torchrun every process is a rank, and collectives are a phase.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from rich.console import Console

from niblick.bench import ledger, ledger_report, results_file
from niblick.bench.ceilings import measure_ceilings
from niblick.bench.phases import WHOLE, loader_wait
from niblick.bench.step_runs import A, B, Measured, build, differences, kernels_of, on_or_off, step_records, take_turns
from niblick.bench.workload import (
    attention_of,
    compiling_many,
    default_preset,
    named_preset,
    one_micro_step,
    open_loader,
    require_device,
    require_same_batches,
    synthetic_batches,
    with_settings,
)
from niblick.data.command_line import guarded, parse
from niblick.data.loaders import Batch
from niblick.data.prepare import prepare_cached
from niblick.model.config import ConfigError, Preset
from niblick.model.errors import TrainingStopped
from niblick.model.launch import be_deterministic
from niblick.model.training import Trainer

BATCHES_KEPT = 32
"""Of a real loader, read before the clock and cycled."""


@dataclass(frozen=True)
class Arguments:
    preset: tyro.conf.Positional[str] = ""
    """Default: pr1855, on a CPU demo."""
    set: tuple[str, ...] = ()
    """Settings laid over the preset, as model.mlp_impl=reference."""
    versus: str = ""
    """A second preset, interleaved with the first."""
    versus_set: tuple[str, ...] = ()
    """Settings laid over the second preset; without --versus, over the first one."""
    tokens: int = 0
    """Of a step and rank; 0: 98,304, on a CPU 256."""
    weights: Literal["trained", "init"] = "trained"
    """trained: after 30 optimizer steps. init: fresh weights, forward and backward only."""
    data: str = ""
    """What train.py takes as data.source: real batches, and the wait for their loader. Default: synthetic ones."""
    tokenizer: str = ""
    attention: Literal["auto", "fa4", "fa3", "fa2", "torch", "plain"] = "auto"
    rounds: int = 10
    steps: int = 4
    """Of each turn; the first is not counted."""
    profile: bool = True
    """Where the device's time goes, by torch.profiler, over three steps (only on a GPU)."""
    compile: bool = True
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: a tiny step in eager, to try this command; its figures say nothing about a GPU."""
    fail_over: float = 3.0
    """Percent of the last comparable run by which a step may be longer."""
    out: Path | None = None
    """JSON-lines file to append to; default on a GPU bench/results/DATE-CARD-step.jsonl. Runs are compared with those
    of its folder."""
    commit: str | None = None
    """The commit measured, where the files do not lie in a git checkout."""


# ---- the command ----------------------------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    arguments = parse(Arguments, words, script="niblick.bench.step", about=__doc__)
    device = require_device(arguments.device, "tries the command on a tiny step")
    for option, least in {"rounds": 2, "steps": 2}.items():
        if getattr(arguments, option) < least:
            raise ConfigError(f"expected --{option} of {least} or more: got {getattr(arguments, option)}")
    ledger.require_percent(arguments.fail_over)
    name = arguments.preset or default_preset(arguments.device)
    whole = {A: named_preset(name, arguments.set)}
    if arguments.versus or arguments.versus_set:
        settings = arguments.versus_set if arguments.versus else arguments.set + arguments.versus_set
        whole[B] = named_preset(arguments.versus or name, settings)
    device, rank, ranks = join(device)
    try:
        return run(arguments, name, whole, device, rank, ranks)
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def join(device: torch.device) -> tuple[torch.device, int, int]:
    """This process's device and its place among the ranks of torchrun, if it is one."""
    if not dist.is_torchelastic_launched():
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return device, dist.get_rank(), dist.get_world_size()


def run(arguments: Arguments, name: str, whole: dict[str, Preset], device: torch.device, rank: int, ranks: int) -> int:
    presets = {
        label: one_micro_step(preset, arguments.tokens, arguments.attention, device.type, ranks)
        for label, preset in whole.items()
    }
    require_same_batches(*presets.values())
    if presets[A].run.deterministic:
        be_deterministic()
    out = arguments.out or (results_file.default_path("step", device) if device.type == "cuda" else None)
    if out and rank == 0:
        results_file.append(out, [])  # one that cannot be written is refused before anything is measured
        ledger.last_comparable(out, {})  # and so is a damaged history
    say = Console(width=None if sys.stdout.isatty() else 150, quiet=rank > 0, highlight=False).print
    if device.type == "cpu":
        say("On a CPU, in eager, a tiny step: this shows that the command works, and nothing about a GPU.")
    trained = arguments.weights == "trained"
    with sources(arguments, presets[A], device, rank, ranks) as (batches, live), compiling_many():
        found = {}
        for label, preset in presets.items():
            start = time.perf_counter()
            compile = arguments.compile and device.type == "cuda"
            found[label] = build(preset, device, compile, ranks, trained, batches)
            say(f"{label}: compiled and warmed up in {time.perf_counter() - start:.1f} s")
        take_turns(found, batches, arguments.rounds, arguments.steps, trained)
        waits = {}
        if live and trained:
            trainer, n = found[A].trainer, arguments.rounds * arguments.steps
            waits = {on_or_off(looping): loader_wait(trainer, live, looping, n) for looping in trainer.loop_modes()}
        profiled = []
        if arguments.profile and trained and device.type == "cuda":
            profiled = kernels_of(found[A], batches, measure_ceilings(device, [torch.bfloat16]))
    if rank:
        return 0
    begin = results_file.start_record(device, **facts_of(arguments, found[A].trainer, name))
    begin["commit"] = arguments.commit or begin["commit"]
    history = compare(out or results_file.default_path("step", device), begin, found[A], arguments.fail_over)
    return tell(arguments, whole[A], found, waits, profiled, [begin, history], out, say)


@contextmanager
def sources(
    arguments: Arguments, preset: Preset, device: torch.device, rank: int, ranks: int
) -> Iterator[tuple[list[Batch], Iterator[Batch] | None]]:
    """The batches to measure with, and the loader that goes on behind them if there is one."""
    if not arguments.data:
        yield synthetic_batches(preset, device, seed=rank), None
        return
    words = (f"data.source={arguments.data}", f"data.tokenizer={arguments.tokenizer}")
    preset = with_settings(preset, words)
    if rank == 0:
        prepare_cached(preset.data, preset.model.vocab_size)  # the others find it ready
    if ranks > 1:
        dist.barrier()
    prepared = prepare_cached(preset.data, preset.model.vocab_size)
    with open_loader(preset, prepared, device, rank, ranks) as loader:
        yield list(islice(loader, BATCHES_KEPT)), loader


# ---- what is told ---------------------------------------------------------------------------------------------------


def facts_of(arguments: Arguments, trainer: Trainer, name: str) -> dict[str, object]:
    attention = attention_of(trainer.preset, trainer.device)
    return {
        "preset": name,
        "settings": sorted(arguments.set),
        "tokens": trainer.preset.batch.tokens_per_micro_step,
        "attention": attention,
        "attention_rung": attention.split()[0],
        "precision": "fp8" if trainer.model.fp8 else str(trainer.model.dtype).removeprefix("torch."),
        "compile": arguments.compile and trainer.device.type == "cuda",
        "weights": arguments.weights,
        "ranks": trainer.world_size,
        "data": arguments.data or "synthetic",
        "versus": [arguments.versus, *arguments.versus_set],
    }


def compare(out: Path, begin: dict[str, object], one: Measured, fail_over: float) -> dict[str, object]:
    """The step of this run beside that of the last comparable one."""
    before = ledger.last_comparable(out, begin)
    now = {on_or_off(looping): one.phases(looping)[WHOLE] for looping in one.steps}
    percent = ledger.changes(before["ms"], now) if before else {}
    own = {"event": "history", "percent": percent, "regression": any(x > fail_over for x in percent.values())}
    return own | {"before": {key: before[key] for key in ("date", "commit", "ms")} if before else None}


def tell(
    arguments: Arguments,
    preset: Preset,
    found: dict[str, Measured],
    waits: dict[str, tuple[float, float]],
    profiled: list[dict[str, object]],
    frame: list[dict[str, object]],
    out: Path | None,
    say,
) -> int:
    """Prints and keeps everything; 1 if the step has become longer than allowed."""
    begin, history = frame
    steps, versus = step_records(found), differences(found) if B in found else []
    projected: list[ledger.Projection | str] = []
    if arguments.weights == "trained":
        phases = {looping: found[A].phases(looping) for looping in found[A].steps}
        projected = ledger.project(phases, preset, begin["tokens"], begin["ranks"])
    for shown in ledger_report.lines(begin, steps, waits, profiled, projected, preset.schedule, versus, history):
        say(shown)
    kept = [{"event": "projection", **asdict(p)} for p in projected if not isinstance(p, str)]
    kept += [{"event": "loader", "loop": loop, "wait_ms": w, "step_ms": ms} for loop, (w, ms) in waits.items()]
    if out:
        results_file.append(out, [begin, *steps, *profiled, *versus, *kept, history])
        say(f"appended to {out}")
    if history["regression"]:
        print(f"niblick.bench.step: {ledger_report.regression(history, arguments.fail_over)}", file=sys.stderr)
    return int(history["regression"])


def command(words: list[str]) -> int:
    """The exit status: 0, 1 for a step that has become longer, 2 after one line for bad input."""
    status = 0

    def run_main(words: list[str]) -> None:
        nonlocal status
        status = main(words)

    return guarded("niblick.bench.step", run_main, words, ConfigError, TrainingStopped) or status


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
