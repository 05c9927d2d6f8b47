"""Presets whose steps are measured side by side: built, taking turns, profiled, and the records of it."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice

import numpy as np
import torch

from niblick.bench import kernel_time
from niblick.bench.ceilings import Ceilings
from niblick.bench.intervals import mean_interval
from niblick.bench.measure import first_line
from niblick.bench.phases import WHOLE, Phases, gradients_only, time_phases
from niblick.bench.workload import in_turns, make_trainer, memory_of, take_step
from niblick.data.loaders import Batch
from niblick.model.config import Preset
from niblick.model.training import Trainer

A, B = "A", "B"
TRAINED_STEPS = 30
"""Fresh weights have out-projections of zeros, whose products keep a card cool and its clock high: one H200 takes
103.7 ms for a looped forward and backward of pr1855 then, and 110 ms after 30 optimizer steps (2026-11-20)."""


@dataclass
class Measured:
    """One preset's step. By loop mode: rounds of steps of phases; peak bytes; the card meanwhile."""

    trainer: Trainer
    steps: dict[bool, list[list[Phases]]] = field(default_factory=dict)
    peak_bytes: dict[bool, int | None] = field(default_factory=dict)
    telemetry: dict[bool, list[dict[str, float]]] = field(default_factory=dict)

    def rounds(self, looping: bool, phase: str = WHOLE) -> list[float]:
        """The median of each round."""
        return [float(np.median([step.get(phase, 0.0) for step in turn])) for turn in self.steps[looping]]

    def phases(self, looping: bool) -> Phases:
        names = dict.fromkeys(name for turn in self.steps[looping] for step in turn for name in step)
        return {name: float(np.median(self.rounds(looping, name))) for name in names}


# ---- measuring ------------------------------------------------------------------------------------------------------


def build(
    preset: Preset, device: torch.device, compile: bool, ranks: int, trained: bool, batches: list[Batch]
) -> Measured:
    """Warmed up as for training, the weights as they are to be measured."""
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0  # of another preset
    measured = Measured(make_trainer(preset, device, compile, ranks))
    source, trainer = cycle(batches), measured.trainer
    modes = trainer.loop_modes()
    trainer.warm_up(source)
    with nullcontext() if trained else gradients_only(trainer):
        for looping in modes:
            extra = memory_of(trainer, lambda: take_step(trainer, source, looping))  # noqa: B023
            measured.peak_bytes[looping] = None if extra is None else torch.cuda.max_memory_allocated() - before
        for _ in range(TRAINED_STEPS - len(modes) if trained else 0):
            take_step(trainer, source, modes[-1])
    return measured


def take_turns(found: dict[str, Measured], batches: list[Batch], rounds: int, steps: int, trained: bool) -> None:
    """Every preset and loop mode once a round, all on the round's batches; what recompiles is an error."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        for turn, order in in_turns(list(found), rounds):
            for label in order:
                one = found[label]
                for looping in one.trainer.loop_modes():
                    same = islice(cycle(batches), turn % len(batches), None)
                    one.steps.setdefault(looping, []).append(_turn(one, same, looping, steps, trained))


def _turn(one: Measured, batches: Iterator[Batch], looping: bool, steps: int, trained: bool) -> list[Phases]:
    notes = one.telemetry.setdefault(looping, [])

    def look() -> None:
        notes.append(telemetry(one.trainer.device))

    with nullcontext() if trained else gradients_only(one.trainer):
        return time_phases(one.trainer, batches, looping, steps, look)[1:]


def telemetry(device: torch.device) -> dict[str, float]:
    """Clock in MHz, power in watts, temperature in °C of the card, now; empty without one or without nvidia-ml-py."""
    if device.type != "cuda":
        return {}
    try:
        watts = torch.cuda.power_draw(device) / 1e3
        return {"MHz": torch.cuda.clock_rate(device), "W": watts, "°C": torch.cuda.temperature(device)}
    except Exception:  # of the library, which may be missing, or of a driver that does not tell
        return {}


def differences(found: dict[str, Measured]) -> list[dict[str, object]]:
    """B less A in ms, paired by round, with the 95 % interval: by loop mode and phase, the whole step first."""
    a, b = found[A], found[B]
    records = []
    for looping in a.trainer.loop_modes():
        if looping not in b.steps:
            continue
        names = {name: None for one in (a, b) for name in one.phases(looping)}
        for phase in sorted(names, key=lambda name: name != WHOLE):
            mean, half = mean_interval(np.subtract(b.rounds(looping, phase), a.rounds(looping, phase)))
            rounds = len(a.steps[looping])
            own = {"event": "versus", "loop": on_or_off(looping), "phase": phase, "difference_ms": mean}
            records.append(own | {"half_width_ms": half, "rounds": rounds})
    return records


def kernels_of(one: Measured, batches: list[Batch], ceilings: Ceilings, steps: int = 3) -> list[dict[str, object]]:
    """Of each loop mode the device's time by class, idle time, and roofs."""
    records = []
    for looping in one.trainer.loop_modes():
        kernels = kernel_time.profile_steps(one.trainer, cycle(batches), looping, steps)
        found = kernel_time.account(kernels, steps)
        record = {"event": "profile", "loop": on_or_off(looping), "steps": steps, **asdict(found)}
        record |= {"idle_share": found.idle_share, "overlap_ms": found.overlap_ms}
        record["other"] = kernel_time.longest(kernels, steps, kernel_time.OTHER)
        try:
            trainer = one.trainer
            least = kernel_time.roofs(trainer.preset, looping, trainer.device, batches[0], ceilings)
            record["roofs"] = {
                what: {"ms": sum(found.ms.get(name, 0.0) for name in names), "roof_ms": roof}
                for what, (names, roof) in least.items()
            }
        except Exception as error:  # an eager step that the card cannot hold: the times stand without their roofs
            record["roofs"], record["no_roofs"] = {}, first_line(error)
        records.append(record)
    return records


def on_or_off(looping: bool) -> str:
    return "on" if looping else "off"


def step_records(found: dict[str, Measured]) -> list[dict[str, object]]:
    """One a preset and loop mode; ms of the whole step with quartiles over all steps."""
    records = []
    for label, one in found.items():
        for looping in one.steps:
            every = [step[WHOLE] for turn in one.steps[looping] for step in turn]
            first, third = np.percentile(every, (25, 75))
            notes = [note for note in one.telemetry[looping] if note]
            middle = {key: float(np.median([note[key] for note in notes])) for key in (notes[0] if notes else {})}
            own = {"event": "step", "variant": label, "loop": on_or_off(looping), "phases": one.phases(looping)}
            own |= {"q1_ms": float(first), "q3_ms": float(third), "n": len(every), "telemetry": middle}
            records.append(own | {"peak_bytes": one.peak_bytes[looping]})
    return records
