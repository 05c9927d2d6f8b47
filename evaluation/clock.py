"""The clock of an evaluation: one wall clock, split into parts that add up to it, and the budget as a line across it.

Every moment belongs to one part, load until another begins: so nothing lies outside, and no second counts twice. What
the clock cannot see is what came before the process, a launcher's own start for example.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch

from niblick.evaluation.ranks import place
from niblick.model.config import ConfigError
from niblick.model.files import write_atomically

PARTS = {
    "load": "start, artifact, data",
    "compile": "rehearsal on random ids",
    "precompute": "hints",
    "score": "scoring",
    "adapt": "training on what is scored",
}
LOOK_S, LOOK_SHARE = 2.0, 0.05
"""So many seconds of work, or such a share of it, tell the rate of the rest."""
WIDTH = 60

Policy = Literal["refuse", "run"]


class OverBudget(ConfigError):
    """An evaluation that would take longer than its budget."""


class Clock:
    """Runs from its making on, or from the start of the process (`of_process`).

    policy: what becomes of an evaluation that does not fit: `refuse` it as soon as the rate is known, and end one that
    slows down when the budget ends; or `run` it all the same.
    """

    def __init__(self, budget_s: float = 600.0, policy: Policy = "run", *, age_s: float = 0.0) -> None:
        self.budget_s, self.policy, self.interrupted = budget_s, policy, False
        self._began = self._since = perf_counter() - age_s
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part = "load"
        self._first: tuple[float, float] | None = None
        self._foreseen = False

    @classmethod
    def of_process(cls, budget_s: float, policy: Policy) -> "Clock":
        """Where the system does not tell when the process began (Linux does), from now: what it did before, some
        seconds of imports, is then missing."""
        return cls(budget_s, policy, age_s=process_age_s() or 0.0)

    # ---- parts -----------------------------------------------------------------------------------------------------

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside belongs to this part, one of PARTS; afterwards the part before goes on."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, name: str) -> str:
        _finish_launched()
        now, outer = perf_counter(), self._part
        self._seconds[outer] += now - self._since
        self._since, self._part = now, name
        return outer

    @property
    def seconds(self) -> dict[str, float]:
        """By part, until now."""
        self._switch(self._part)
        return dict(self._seconds)

    @property
    def elapsed_s(self) -> float:
        return perf_counter() - self._began

    # ---- the budget ------------------------------------------------------------------------------------------------

    def foresee(self, share: float) -> None:
        """To be called as the work goes on, with the share of its way (0..1) that is behind.

        The first call is where measuring begins, as what is before it may be slower. As soon as the rate is known, and
        only then: OverBudget if the rest does not fit. Of several ranks the first one judges.
        """
        if self._foreseen or self.policy == "run" or place()[0]:
            return
        if self.elapsed_s > self.budget_s:
            self._refuse(f"{self.elapsed_s:.1f} s have passed with {share:.1%} of the work done")
        if self._first is None:
            _finish_launched()
            self._first = perf_counter(), share
            return
        done = share - self._first[1]
        if done <= 0 or (perf_counter() - self._first[0] < LOOK_S and share < LOOK_SHARE):
            return
        _finish_launched()  # only now: to wait for the GPU at each call would slow down what is measured
        self._foreseen, seconds = True, perf_counter() - self._first[0]
        needed = self.elapsed_s + (1 - share) * seconds / done
        if needed > self.budget_s:
            rate = f"{done:.1%} of the work in {seconds:.1f} s, after {self.elapsed_s - seconds:.1f} s"
            self._refuse(f"at the rate found ({rate}) it would take {needed:.0f} s")

    def _refuse(self, why: str) -> None:
        raise OverBudget(
            f"expected an evaluation within {self.budget_s:g} s: {why}; --over-budget run does it all the same"
        )

    def stop(self) -> str:
        """Why the work should end here, or nothing."""
        if self.interrupted:
            return "interrupted"
        if self.policy == "refuse" and self.elapsed_s > self.budget_s:
            return f"the budget of {self.budget_s:g} s ended"
        return ""

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C ends the work at the next opportunity, so that what is done is kept; a second one at once."""

        def interrupt(*_: object) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    # ---- as text and as a plot -------------------------------------------------------------------------------------

    def text(self) -> str:
        """A line a part, each bar beginning where the one above ends, and the budget as a line down through them."""
        parts = self.seconds
        total = sum(parts.values())
        scale = WIDTH / max(total, self.budget_s)
        line, lines, start = round(self.budget_s * scale), [], 0.0
        for name, seconds in parts.items():
            bar = [" "] * (WIDTH + 1)
            first, last = round(start * scale), round((start + seconds) * scale)
            bar[first:last] = "#" * (last - first)
            bar[line] = "|"
            lines.append(f"{name:11}{seconds:8.1f} s {''.join(bar).rstrip()}")
            start += seconds
        verdict = "" if total <= self.budget_s else ": OVER THE BUDGET"
        return "\n".join([*lines, f"{'total':11}{total:8.1f} s of {self.budget_s:g} s{verdict}"])

    def plot(self, path: Path) -> None:
        """The same as a picture; its format is that of the path's suffix. ConfigError as `require_plot`."""
        require_plot(path)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 2.4), layout="constrained")
        axes, start = figure.subplots(), 0.0
        for name, seconds in self.seconds.items():
            axes.barh(0, seconds, left=start, label=f"{name} {seconds:.1f} s ({PARTS[name]})")
            start += seconds
        axes.axvline(self.budget_s, color="black", linestyle="--")
        axes.set(xlabel=f"seconds; the budget is {self.budget_s:g}, the total {start:.1f}", yticks=[])
        figure.legend(loc="outside upper center", ncols=3, fontsize="small", frameon=False)
        write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:]))


def require_plot(path: Path) -> None:
    """ConfigError for a folder that is not there, a format that cannot be drawn, or where matplotlib is missing."""
    if not path.parent.is_dir():
        raise ConfigError(f"--plot: expected a folder {path.parent} to write into, found none")
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ConfigError("--plot: expected matplotlib, found none: pip install matplotlib") from error
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:] not in formats:
        raise ConfigError(f"--plot: expected a file of {', '.join(formats)}, found {path.name!r}")


def process_age_s() -> float | None:
    """Seconds since the process was started, to a hundredth; None where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # the name before may hold spaces
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return None
    return age if age >= 0 else None


def _finish_launched() -> None:
    """A GPU runs behind: what was launched belongs to the part that launched it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
