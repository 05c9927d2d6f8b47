"""The dossier of a speed-up: two settings trained on the same batches; does learning differ by more than seeds do?

    python -m niblick.bench.dossier pr1855 pr1855 --b-set model.mlp_impl=reference --steps 500 --seeds 3 --data fineweb

Both train for the same number of steps, from the same seeds, step by step in turns on the same batches; the schedule
follows the steps, not the clock. The folder --out gets report.md, curves.svg and dossier.json.
"""

import hashlib
import shlex
import sys
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from niblick.bench import dossier_report, results_file
from niblick.bench.dossier_report import Checksum
from niblick.bench.workload import (
    attention_of,
    compiling_many,
    make_trainer,
    named_preset,
    open_loader,
    require_device,
    require_same_batches,
    with_settings,
)
from niblick.data.command_line import guarded, parse
from niblick.data.loaders import Batch
from niblick.data.prepare import Prepared, prepare_cached
from niblick.model.config import ConfigError, Preset
from niblick.model.errors import TrainingStopped
from niblick.model.launch import be_deterministic
from niblick.model.schedule import lr_factor, momentum
from niblick.model.training import Trainer


@dataclass(frozen=True)
class Arguments:
    a: tyro.conf.Positional[str]
    """A preset: what the other is compared with, and whose seeds are the measure."""
    b: tyro.conf.Positional[str]
    a_set: tuple[str, ...] = ()
    """Settings laid over A, as optim.clip=global."""
    b_set: tuple[str, ...] = ()
    steps: int = 300
    seeds: int = 3
    """Runs of each: seed run.seed, run.seed + 1, ... of the preset."""
    data: str = "stdlib"
    """What train.py takes as data.source."""
    tokenizer: str = ""
    tokens: int = 0
    """Of a step, in one micro-step; 0: the preset's micro-step."""
    window: float = 0.25
    """The last part of the steps, whose mean loss is compared."""
    attention: Literal["auto", "fa4", "fa3", "fa2", "torch", "plain"] = "auto"
    compile: bool = True
    """torch.compile, as training does on a GPU; never on a CPU."""
    device: Literal["cuda", "cpu"] = "cuda"
    out: Path = Path("runs/dossier")
    """A new or empty folder."""
    commit: str | None = None
    """The commit, where the files do not lie in a git checkout."""


@dataclass
class Run:
    """One setting with one seed: losses in nats a token and ms, a step each; SHA-256 of the weights, by parameter
    before the first step and of all of them after the last."""

    seed: int
    losses: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    initial: dict[str, Checksum] = field(default_factory=dict)
    final: str = ""


# ---- training -------------------------------------------------------------------------------------------------------


def train_both(
    presets: dict[str, Preset], arguments: Arguments, prepared: Prepared, device: torch.device
) -> dict[str, list[Run]]:
    """By label ("A", "B") a run a seed. The trainers are built and compiled once; a seed is a state put into them."""
    compile = arguments.compile and device.type == "cuda"
    trainers = {label: make_trainer(preset, device, compile) for label, preset in presets.items()}
    if compile:
        for label, trainer in trainers.items():
            start = time.perf_counter()
            with open_loader(presets["A"], prepared, device) as batches:
                trainer.warm_up(batches)
            print(f"{label}: compiled and warmed up in {time.perf_counter() - start:.1f} s", flush=True)
    runs: dict[str, list[Run]] = {label: [] for label in presets}
    for i in range(arguments.seeds):
        pair = {}
        for label, trainer in trainers.items():
            seed = presets[label].run.seed + i
            reseed(trainer, seed)
            pair[label] = Run(seed, initial=checksums(trainer))
            runs[label].append(pair[label])
        with open_loader(presets["A"], prepared, device) as batches:
            take_turns(trainers, pair, batches, arguments.steps)
        losses = ", ".join(f"{label} {run.losses[-1]:.4f}" for label, run in pair.items())
        print(f"seeds {' and '.join(str(run.seed) for run in pair.values())}: last losses {losses}", flush=True)
    return runs


def reseed(trainer: Trainer, seed: int) -> None:
    """The state of a new trainer of this seed, put into a compiled one."""
    preset = replace(trainer.preset, run=replace(trainer.preset.run, seed=seed))
    trainer.load_state_dict(make_trainer(preset, trainer.device, compile=False).state_dict())


def take_turns(trainers: dict[str, Trainer], runs: dict[str, Run], batches, steps: int) -> None:
    """Every trainer takes each step on the same batch, the first to go changing from step to step."""
    labels, cuda = list(trainers), next(iter(trainers.values())).device.type == "cuda"
    losses: dict[str, list[Tensor]] = {label: [] for label in labels}
    marks: list[tuple[str, torch.cuda.Event | float]] = []

    def mark(label: str) -> None:
        now = torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter()
        if cuda:
            now.record()
        marks.append((label, now))

    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(steps):
            batch = next(batches)
            for label in labels if step % 2 == 0 else labels[::-1]:
                mark(label)
                losses[label].append(_step(trainers[label], batch, step, steps))
            mark("")  # what follows, the wait for a batch, belongs to nobody
    if cuda:
        torch.cuda.synchronize()
    for (label, start), (_, end) in pairwise(marks):
        if label:
            runs[label].ms.append(start.elapsed_time(end) if cuda else 1e3 * (end - start))
    for label, run in runs.items():
        run.losses = torch.stack(losses[label]).tolist()
        run.final = digest(*(tensor for _, tensor in sorted(weights(trainers[label]).items())))


def _step(trainer: Trainer, batch: Batch, step: int, steps: int) -> Tensor:
    """A training step at the fraction step / steps of the schedule, as the clock has it in a race."""
    schedule, fraction = trainer.preset.schedule, step / steps
    loss, _ = trainer.step(
        iter([batch]),
        factor=lr_factor(fraction, schedule),
        momentum=momentum(step, trainer.preset.optim),
        looping=len(trainer.loop_modes()) > 1 and fraction >= schedule.loop_at,
    )
    return loss


# ---- checksums ------------------------------------------------------------------------------------------------------


def weights(trainer: Trainer) -> dict[str, Tensor]:
    prefix = "model."
    return {name.removeprefix(prefix): t for name, t in trainer.state_dict().items() if name.startswith(prefix)}


def checksums(trainer: Trainer) -> dict[str, Checksum]:
    return {name: (f"{tuple(t.shape)} {t.dtype}", digest(t)) for name, t in weights(trainer).items()}


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# ---- the command ----------------------------------------------------------------------------------------------------


def main(words: list[str]) -> None:
    arguments = parse(Arguments, words, script="niblick.bench.dossier", about=__doc__)
    device = require_device(arguments.device, "trains without one, in eager")
    for option, least in {"steps": 8, "seeds": 2, "tokens": 0}.items():
        if getattr(arguments, option) < least:
            raise ConfigError(f"expected --{option} of {least} or more: got {getattr(arguments, option)}")
    if not 0 < arguments.window <= 1:
        raise ConfigError(f"expected --window above 0 and at most 1: got {arguments.window:g}")
    presets = {
        "A": chosen(arguments, arguments.a, arguments.a_set),
        "B": chosen(arguments, arguments.b, arguments.b_set),
    }
    require_same_batches(*presets.values())
    if presets["A"].run.deterministic:
        be_deterministic()
    if arguments.out.exists() and not (arguments.out.is_dir() and not any(arguments.out.iterdir())):
        raise ConfigError(f"--out {arguments.out}: expected a new or empty folder")
    if device.type == "cpu":
        print("On a CPU, in eager: the losses count, the times say nothing about a GPU.", flush=True)
    prepared = prepare_cached(presets["A"].data, presets["A"].model.vocab_size)
    with compiling_many():
        runs = train_both(presets, arguments, prepared, device)
        facts = results_file.start_record(device, attention=attention_of(presets["A"], device))
    facts |= {"commit": arguments.commit or facts["commit"], "data": arguments.data}
    facts |= {"A": name_of(arguments.a, arguments.a_set), "B": name_of(arguments.b, arguments.b_set)}
    tokens = presets["A"].batch.tokens_per_step
    facts |= {"tokens": tokens, "passes": arguments.steps * tokens / prepared.train_tokens}
    facts |= {"compile": arguments.compile and device.type == "cuda"}
    facts["command"] = shlex.join(["python", "-m", "niblick.bench.dossier", *words])
    findings = dossier_report.find(runs, arguments.window)
    dossier_report.write(arguments.out, facts, runs, findings)
    print(findings.verdict)
    print(f"written: {arguments.out / 'report.md'}")


def chosen(arguments: Arguments, name: str, settings: tuple[str, ...]) -> Preset:
    """The preset with settings, data and one micro-step a step."""
    data = (f"data.source={arguments.data}", f"data.tokenizer={arguments.tokenizer}")
    preset = with_settings(named_preset(name, data), settings)
    tokens = arguments.tokens or preset.batch.tokens_per_micro_step
    attention = arguments.attention if arguments.device == "cuda" else "auto"
    return replace(
        preset,
        model=replace(preset.model, attention=attention),
        batch=replace(preset.batch, tokens_per_step=tokens, tokens_per_micro_step=tokens),
        schedule=replace(preset.schedule, warmup_steps=max(1, min(2, preset.schedule.warmup_steps))),
    )


def name_of(preset: str, settings: tuple[str, ...]) -> str:
    return " ".join((preset, *settings))


def command(words: list[str]) -> int:
    """`main` with bad input as one line and exit status 2."""
    return guarded("niblick.bench.dossier", main, words, ConfigError, TrainingStopped)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
