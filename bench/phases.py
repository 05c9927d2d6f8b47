"""The phases of a training step, timed where the trainer goes from one to the next.

Forward and backward last from the step's start to the optimizer's; clipping each micro-step interrupts them. A phase is
what the device does between two marks, so collectives, on a stream of their own, are what is left to wait for of them.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from niblick.bench.workload import take_step
from niblick.data.loaders import Batch
from niblick.model import distributed, optim
from niblick.model.schedule import Clock
from niblick.model.training import Trainer

GRADIENTS, CLIP, COLLECTIVES, OPTIMIZER, AVERAGE, REST = (
    "forward + backward",
    "clip",
    "collectives",
    "optimizer",
    "EMA",
    "rest",
)
WHOLE = "whole step"
_END = ""
Phases = dict[str, float]
"""Milliseconds of each phase of a step, and of the whole."""


def seams(trainer: Trainer) -> list[tuple[str, object, str]]:
    """Where a phase after the gradients begins: its name, an object, and the name of the function called on it."""
    return [
        (CLIP, torch.nn.utils, "clip_grad_norm_"),
        (CLIP, optim, "clip_averaged"),
        (COLLECTIVES, distributed.Pending, "wait"),
        (OPTIMIZER, trainer.optimizers, "step"),
        (AVERAGE, trainer.ema, "update"),
    ]


class Marks:
    """Points in time, each the start of a phase; on a GPU events, so that nothing waits until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._points: list[tuple[str, torch.cuda.Event | float]] = []
        self._steps: list[int] = []

    def start_step(self) -> None:
        self._steps.append(len(self._points))
        self.begin(GRADIENTS)

    @property
    def phase(self) -> str:
        return self._points[-1][0]

    def begin(self, phase: str) -> None:
        now = torch.cuda.Event(enable_timing=True) if self._cuda else time.perf_counter()
        if self._cuda:
            now.record()
        self._points.append((phase, now))

    def read(self) -> list[Phases]:
        """Of each step milliseconds by phase, and their sum as WHOLE; the last step ends now."""
        self._steps.append(len(self._points))
        self.begin(_END)
        if self._cuda:
            torch.cuda.synchronize()
        found = []
        for first, last in zip(self._steps, self._steps[1:], strict=False):
            step: Phases = {}
            for (phase, start), (_, end) in zip(self._points[first:last], self._points[first + 1 :], strict=False):
                ms = start.elapsed_time(end) if self._cuda else 1e3 * (end - start)
                step[phase] = step.get(phase, 0.0) + ms
            found.append(step | {WHOLE: sum(step.values())})
        return found


@contextmanager
def marked(trainer: Trainer, marks: Marks) -> Iterator[None]:
    """Inside, the trainer's steps mark their phases."""
    with ExitStack() as stack:
        for phase, owner, name in seams(trainer):
            stack.enter_context(patch.object(owner, name, _marking(getattr(owner, name), phase, marks)))
        yield


def _marking(function: Callable, phase: str, marks: Marks) -> Callable:
    def run(*args: object, **options: object) -> object:
        outer = marks.phase
        marks.begin(phase)
        result = function(*args, **options)
        marks.begin(REST if phase in (OPTIMIZER, AVERAGE) else outer)
        return result

    return run


@contextmanager
def gradients_only(trainer: Trainer) -> Iterator[None]:
    """Inside, a step is forward and backward and nothing else: the weights stay as they are."""
    with ExitStack() as stack:
        for _, owner, name in seams(trainer):
            stack.enter_context(patch.object(owner, name, lambda *args, **options: None))
        yield


def time_phases(
    trainer: Trainer,
    batches: Iterator[Batch],
    looping: bool,
    steps: int,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Phases]:
    """Milliseconds of each step by phase. `meanwhile` is called when all are queued, before they are waited for."""
    marks = Marks(trainer.device)
    with marked(trainer, marks):
        for _ in range(steps):
            marks.start_step()
            take_step(trainer, batches, looping)
    meanwhile()
    return marks.read()


def loader_wait(trainer: Trainer, loader: Iterator[Batch], looping: bool, steps: int) -> tuple[float, float]:
    """Milliseconds a step that the host waits for a batch, and of the step, paced by the training's own clock.

    A wait that ends before the step in flight does costs nothing.
    """
    waited = 0.0

    def batches() -> Iterator[Batch]:
        nonlocal waited
        while True:
            start = time.perf_counter()
            batch = next(loader)
            waited += time.perf_counter() - start
            yield batch

    source, clock = batches(), Clock(trainer.device, trainer.world_size)
    clock.start()
    for step in range(steps):
        loss, _ = trainer.step(source, factor=1.0, momentum=trainer.preset.optim.momentum, looping=looping)
        clock.tick(step, loss)
    clock.drain()
    return 1e3 * waited / steps, 1e3 * clock.elapsed_s / steps
