"""The schedule as a function of the clock, and the clock itself."""

import time

import torch
import torch.distributed as dist

from niblick.model.config import OptimConfig, ScheduleConfig


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


class Clock:
    """Seconds of training, the same number on every rank, and losses, without stalling the GPU.

    Inside the clock: everything from `start` on, the writing of checkpoints included. Outside: reading data and
    models from disk, compilation, the warm-up steps, and whatever runs between `pause` and `resume`.

    `tick` is called once a step. It enqueues the copy of the step's loss to the host, then waits for the *previous*
    step to end: so one step is always in flight, and elapsed time is known to within a step. Ranks agree by taking
    the latest of their clocks (one collective of one number a step, read a step later).
    """

    def __init__(self, device: torch.device, world_size: int, elapsed_s: float = 0.0) -> None:
        self.device, self.world_size = device, world_size
        self.elapsed_s = elapsed_s
        self.loss = float("nan")
        """Of the last step read, this rank's own micro-steps' mean."""
        self._pending: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
        self._origin = time.perf_counter() - elapsed_s

    def start(self) -> None:
        self._synchronize()
        self._origin = time.perf_counter() - self.elapsed_s

    def pause(self) -> None:
        self.drain()
        self._synchronize()
        self.elapsed_s = time.perf_counter() - self._origin

    resume = start

    def tick(self, loss: torch.Tensor) -> None:
        previous, self._pending = self._pending, self._enqueue(loss)
        if previous is not None:
            self._read(previous)

    def drain(self) -> None:
        """Wait for the step in flight; afterwards `loss` and `elapsed_s` are those of the last step."""
        if self._pending is not None:
            self._read(self._pending)
            self._pending = None

    def _enqueue(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        now = time.perf_counter() - self._origin
        loss = loss.detach().double()
        pair = torch.stack((loss, torch.full_like(loss, now)))
        if self.world_size > 1:
            dist.all_reduce(pair[1:], op=dist.ReduceOp.MAX)
        if self.device.type != "cuda":
            return pair, None
        host = torch.empty(2, dtype=torch.float64, pin_memory=True)
        host.copy_(pair, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def _read(self, pending: tuple[torch.Tensor, torch.cuda.Event | None]) -> None:
        pair, event = pending
        if event is not None:
            event.synchronize()
        self.loss = float(pair[0])
        self.elapsed_s = float(pair[1]) if self.world_size > 1 else time.perf_counter() - self._origin

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
