"""The schedule as a function of the clock, and the clock itself."""

import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from niblick.model.config import OptimConfig, ScheduleConfig
from niblick.model.distributed import contact
from niblick.model.errors import TrainingStopped

POLL_S = 1e-4


def progress(elapsed_s: float, config: ScheduleConfig) -> float:
    """Fraction of the training clock that is used up."""
    return min(1.0, elapsed_s / (config.budget_s - config.reserve_s))


def lr_factor(fraction: float, config: ScheduleConfig) -> float:
    """1 until the warm-down, then linear to zero at fraction 1, floored at `min_lr`. There is no warm-up."""
    if fraction < 1 - config.warmdown:
        return 1.0
    return max((1 - fraction) / config.warmdown, config.min_lr)


def momentum(step: int, config: OptimConfig) -> float:
    """Muon's momentum rises linearly over its warm-up steps."""
    ramp = min(step / config.momentum_warmup_steps, 1.0) if config.momentum_warmup_steps else 1.0
    return config.momentum_start + (config.momentum - config.momentum_start) * ramp


class Reading(NamedTuple):
    """A step that has ended: its number, the mean loss of this rank's micro-steps, seconds on the clock at its end."""

    step: int
    loss: float
    elapsed_s: float


class Clock:
    """Seconds of training, the same number on every rank, and losses, without stalling the GPU.

    Inside the clock: everything from `start` on, the writing of checkpoints included. Outside: reading data and
    models from disk, compilation, the warm-up steps.

    `tick` is called once a step. On a GPU it enqueues the copy of the step's loss to the host and then waits for the
    step *before* to end, so that one step is always in flight; `ahead_s` adds the time that one will take. Ranks agree
    on the latest of their clocks, over the CPU, so the GPU never waits for it; that some rank's loss is no longer
    finite travels along, and ends the run on all of them (TrainingStopped).

    `patience_s`: after so long without an answer another rank is given up (RankLost).
    """

    def __init__(
        self,
        device: torch.device,
        world_size: int,
        elapsed_s: float = 0.0,
        on_reading: Callable[[Reading], object] = lambda reading: None,
        patience_s: float = 60.0,
    ) -> None:
        self.device, self.elapsed_s = device, elapsed_s
        self._on_reading = on_reading
        patience = timedelta(seconds=patience_s)
        self._group = dist.new_group(backend="gloo", timeout=patience) if world_size > 1 else None
        self._pending: tuple[int, torch.Tensor, torch.cuda.Event] | None = None
        self._step_s = 0.0
        self._origin = time.perf_counter() - elapsed_s

    @property
    def ahead_s(self) -> float:
        """Seconds on the clock when all steps so far will have ended."""
        return self.elapsed_s + (self._step_s if self._pending else 0.0)

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._origin = time.perf_counter() - self.elapsed_s

    def tick(self, step: int, loss: torch.Tensor) -> None:
        if self.device.type != "cuda":
            self._read(step, loss)
            return
        host = torch.empty((), dtype=loss.dtype, pin_memory=True)
        host.copy_(loss, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        previous, self._pending = self._pending, (step, host, event)
        if previous:
            self._wait(*previous)

    def drain(self) -> None:
        """Wait for the step in flight, if any."""
        if self._pending:
            pending, self._pending = self._pending, None
            self._wait(*pending)

    def refresh(self, stop: bool = False) -> bool:
        """Bring `elapsed_s` up to now; also after work on the clock that is no step. True if any rank says `stop`."""
        now = torch.tensor([time.perf_counter() - self._origin, stop], dtype=torch.float64)
        if self._group is not None:
            with contact():
                dist.all_reduce(now, op=dist.ReduceOp.MAX, group=self._group)
        self.elapsed_s, stopped = now.tolist()
        return bool(stopped)

    def _wait(self, step: int, loss: torch.Tensor, event: torch.cuda.Event) -> None:
        while not event.query():  # a wait inside CUDA would not be ended by a signal if a rank that died keeps it busy
            time.sleep(POLL_S)
        self._read(step, loss)

    def _read(self, step: int, loss: torch.Tensor) -> None:
        before, value = self.elapsed_s, loss.item()
        finite = math.isfinite(value)
        stopped = self.refresh(not finite)
        if stopped:
            raise TrainingStopped(
                f"the loss of step {step} is "
                + (f"not finite on another rank, {value:.4f} here" if finite else f"{value}")
            )
        self._step_s = self.elapsed_s - before
        self._on_reading(Reading(step, value, self.elapsed_s))
