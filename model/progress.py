"""The progress line of a training run: it shows what the clock has read already and never asks the GPU for more."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from niblick.model.config import ScheduleConfig
from niblick.model.runlog import RunLog
from niblick.model.schedule import Reading


class ProgressLine:
    """Loss, ms/step, steps and seconds left. A live bar on a terminal, else a line every `every_s` seconds.

    Without a log (ranks other than 0) it is silent. Every step's loss goes into the log.
    """

    def __init__(self, schedule: ScheduleConfig, log: RunLog | None, every_s: float = 10.0) -> None:
        self._limit = schedule.budget_s - schedule.reserve_s
        self._log, self._every = log, every_s
        self._shown_at = time.perf_counter()
        self._before: Reading | None = None
        self._ms: float | None = None
        live = log is not None and Console().is_terminal
        self._bar = Progress(
            BarColumn(), TextColumn("{task.description}"), disable=not live, auto_refresh=False, transient=False
        )
        self._task = self._bar.add_task("", total=self._limit)

    def __enter__(self) -> "ProgressLine":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            self._show(self._before)
        self._bar.stop()

    def update(self, reading: Reading) -> None:
        if self._log is None:
            return
        self._log.write("step", step=reading.step, loss=reading.loss, elapsed_s=round(reading.elapsed_s, 4))
        if self._before is not None:
            latest = 1e3 * (reading.elapsed_s - self._before.elapsed_s)
            self._ms = latest if self._ms is None else 0.9 * self._ms + 0.1 * latest
        self._before = reading
        now = time.perf_counter()
        if now - self._shown_at >= (self._every if self._bar.disable else 0.2):
            self._shown_at = now
            self._show(reading)

    def _show(self, reading: Reading) -> None:
        left = max(0.0, self._limit - reading.elapsed_s)
        ms = "" if self._ms is None else f"  {self._ms:.1f} ms/step"
        text = f"step {reading.step}  loss {reading.loss:.4f}{ms}  {left:.0f} s left"
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.update(self._task, completed=reading.elapsed_s, description=text, refresh=True)
