"""The progress line of a training run: it shows what the clock has read already and never asks the GPU for more."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from niblick.model.config import ScheduleConfig
from niblick.model.runlog import RunLog


class ProgressLine:
    """Loss, ms/step, steps and seconds left. A live bar on a terminal, else a line every `every_s` seconds.

    Without a log (ranks other than 0) it is silent. Every step's loss goes into the log.
    """

    def __init__(self, schedule: ScheduleConfig, log: RunLog | None, every_s: float = 10.0) -> None:
        self._limit = schedule.budget_s - schedule.reserve_s
        self._log, self._every = log, every_s
        self._shown_at = self._step_at = time.perf_counter()
        self._last_step: int | None = None
        self._ms = float("nan")
        live = log is not None and Console().is_terminal
        self._bar = Progress(
            BarColumn(), TextColumn("{task.description}"), disable=not live, auto_refresh=False, transient=False
        )
        self._task = self._bar.add_task("", total=self._limit)

    def __enter__(self) -> "ProgressLine":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(self, step: int, elapsed_s: float, loss: float, final: bool = False) -> None:
        if self._log is None:
            return
        now = time.perf_counter()
        if self._last_step is not None and step > self._last_step:
            latest = 1e3 * (now - self._step_at) / (step - self._last_step)
            self._ms = latest if self._ms != self._ms else 0.9 * self._ms + 0.1 * latest
        self._step_at, self._last_step = now, step
        # The loss is that of the step before: the clock reads it while the next one runs.
        self._log.write("step" if not final else "end", step=step, elapsed_s=round(elapsed_s, 4), loss=loss)
        if not (final or now - self._shown_at >= (0.2 if not self._bar.disable else self._every)):
            return
        self._shown_at = now
        left = max(0.0, self._limit - elapsed_s)
        text = f"step {step}  loss {loss:.4f}  {self._ms:.1f} ms/step  {left:.0f} s left"
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.update(self._task, completed=elapsed_s, description=text, refresh=True)
