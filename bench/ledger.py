"""What a step's milliseconds come to: steps in the budget, the worth of one, and the last run to compare with."""

import json
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from niblick.bench.phases import CLIP, COLLECTIVES, GRADIENTS, WHOLE, Phases
from niblick.data.errors import DataError
from niblick.model.config import ConfigError, Preset, ScheduleConfig

COMPARABLE = (
    "card", "preset", "settings", "tokens", "attention_rung", "precision", "compile", "weights", "ranks", "data"
)  # fmt: skip
"""Facts of a run that must agree before its milliseconds are compared with another's."""


# ---- steps in the budget --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """Steps in the budget and at which the loop starts (None: never), and what a millisecond less a step adds."""

    what: str
    ms: dict[bool, float]
    steps: int
    loop_from: int | None
    steps_per_ms: float


def steps_in_budget(ms: dict[bool, float], schedule: ScheduleConfig) -> tuple[int, int | None]:
    """Steps of so many ms, by loop mode, that training takes, and the first that loops (None without loop).

    As the training loop decides: a step starts while all before it end inside budget less reserve, and loops if they
    end at or after loop_at of it.
    """
    limit = 1e3 * (schedule.budget_s - schedule.reserve_s)
    if True not in ms:
        return min(math.ceil(limit / ms[False]), schedule.max_steps), None
    off = math.ceil(schedule.loop_at * limit / ms[False])
    on = max(0, math.ceil((limit - off * ms[False]) / ms[True]))
    steps = min(off + on, schedule.max_steps)
    return steps, off if off < steps else None


def steps_per_ms(ms: dict[bool, float], schedule: ScheduleConfig) -> float:
    """Steps gained by a step shorter by 1 ms in every mode, fractions of a step included."""

    def steps(less: float) -> float:
        limit = 1e3 * (schedule.budget_s - schedule.reserve_s)
        share = schedule.loop_at if True in ms else 1.0
        late = (1 - share) * limit / (ms[True] - less) if True in ms else 0.0
        return share * limit / (ms[False] - less) + late

    step = min(1.0, 0.01 * min(ms.values()))  # of a step of a few ms, a whole one would be no small change
    return (steps(step) - steps(0.0)) / step


def step_ms(phases: Phases, preset: Preset, micro_steps: int) -> float:
    """A step of so many micro-steps, from the phases of a step of one. Adding up their gradients is not in it."""
    again = phases[GRADIENTS] + (phases.get(CLIP, 0.0) if preset.optim.clip == "micro" else 0.0)
    return phases[WHOLE] + (micro_steps - 1) * again


def project(phases: dict[bool, Phases], preset: Preset, tokens: int, measured_ranks: int) -> list[Projection | str]:
    """The preset's budget on 1 and on 8 GPUs at the preset's batch, and on one at a micro-step a step; what cannot be
    said, as the reason. `tokens`: of the micro-step measured."""
    found: list[Projection | str] = []
    for ranks, batch in ((8, preset.batch.tokens_per_step), (1, preset.batch.tokens_per_step), (1, tokens)):
        what = f"{ranks} GPU{'s' * (ranks > 1)}, {batch:,} tokens a step"
        micro_steps, rest = divmod(batch, tokens * ranks)
        if rest or not micro_steps:
            found.append(f"{what}: no whole number of micro-steps of {tokens:,} tokens a GPU")
            continue
        if ranks != measured_ranks:
            what += f" (measured on {measured_ranks}, collectives and the share of the optimizer's work too)"
        alone = {loop: p.get(COLLECTIVES, 0.0) if ranks == 1 else 0.0 for loop, p in phases.items()}
        ms = {loop: step_ms(p, preset, micro_steps) - alone[loop] for loop, p in phases.items()}
        steps, loop_from = steps_in_budget(ms, preset.schedule)
        gain = steps_per_ms(ms, preset.schedule) if steps < preset.schedule.max_steps else 0.0
        projection = Projection(what, ms, steps, loop_from, gain)
        if projection not in found:
            found.append(projection)
    return found


# ---- history --------------------------------------------------------------------------------------------------------


def last_comparable(out: Path, facts: dict[str, object]) -> dict[str, object] | None:
    """The start record, with the whole step's ms by loop mode under "ms", of the latest run in `out` and the step files
    beside it whose COMPARABLE facts are these and which was no regression itself: else a slower step, measured twice,
    would pass."""
    paths = {*out.parent.glob("*-step.jsonl"), out}
    runs = [run for path in sorted(paths) if path.exists() for run in read_runs(path)]
    same = [run for run in runs if all(run.get(key) == facts.get(key) for key in COMPARABLE)]
    usable = [run for run in same if run["ms"] and not run["regression"]]
    return sorted(usable, key=_date)[-1] if usable else None


def _date(record: dict[str, object]) -> datetime:
    return datetime.strptime(record["date"], "%Y-%m-%dT%H:%M:%S%z")


def read_runs(path: Path) -> list[dict[str, object]]:
    """The runs of a step file: the start record of each, with ms and regression. DataError for a damaged file."""
    runs: list[dict[str, object]] = []
    try:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if record["event"] == "start":
                _date(record)
                runs.append(record | {"ms": {}, "regression": False})
            elif record["event"] == "step" and record["variant"] == "A":
                runs[-1]["ms"][record["loop"]] = record["phases"][WHOLE]
            elif record["event"] == "history":
                runs[-1]["regression"] = record["regression"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: expected the JSON lines of niblick.bench.step: {error!r}") from error
    return runs


def changes(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """Percent by which each mode's step has become longer."""
    return {loop: 100 * (now[loop] / before[loop] - 1) for loop in now if loop in before}


def require_percent(value: float) -> None:
    if not 0 <= value < math.inf:
        raise ConfigError(f"expected --fail-over in percent, 0 or more: got {value:g}")
