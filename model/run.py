"""A run inside the clock: its progress line, log records and checkpoints, and how it ends before its time."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch.distributed as dist

from niblick.model.checkpoint import save_checkpoint
from niblick.model.distributed import contact
from niblick.model.errors import TrainingStopped
from niblick.model.progress import ProgressLine
from niblick.model.runlog import RunLog
from niblick.model.schedule import Clock, Reading
from niblick.model.training import Batch, Position, Trainer, train
from niblick.model.watchdog import Watchdog


def run_clock(
    trainer: Trainer, batches: Iterator[Batch], position: Position, checkpoint: Path, log: RunLog | None
) -> Position:
    """Train from `position` until the clock runs out. Rank 0, which has the log, writes and shows.

    TrainingStopped where it cannot go on, naming the checkpoint that is left.
    """
    schedule, run = trainer.preset.schedule, trainer.preset.run
    last_s = schedule.budget_s - schedule.reserve_s - 5.0  # later, writing would break the budget
    saved_s = position.elapsed_s
    batches = chain([next(batches)], batches)  # a resumed loader finds its place before the clock starts
    if trainer.world_size > 1:
        with contact():
            dist.barrier()  # which, like compiling, takes some ranks longer than others, or than their patience
    with ProgressLine(schedule, log) as line, _watch(trainer, checkpoint) as beat:

        def on_reading(reading: Reading) -> None:
            beat()
            line.update(reading)

        clock = Clock(trainer.device, trainer.world_size, position.elapsed_s, on_reading, run.patience_s)

        def on_step(position: Position) -> None:
            nonlocal saved_s
            # Every rank has the same elapsed_s, so every rank takes this branch at the same step.
            if run.checkpoint_every_s and saved_s + run.checkpoint_every_s <= clock.elapsed_s < last_s:
                clock.drain()
                position.elapsed_s = saved_s = clock.elapsed_s
                if _keep(checkpoint, trainer, position) and log:
                    log.write("checkpoint", **position_fields(position))
                clock.refresh()

        try:
            position = train(trainer, batches, clock, position, on_step)
        except TrainingStopped as stopped:
            if log:
                log.write("stopped", reason=str(stopped), **position_fields(position))
            raise TrainingStopped(f"{_who(trainer)}{stopped}; {_what_is_left(checkpoint)}") from stopped
    if log:
        log.write("end of training", **position_fields(position))
    if run.checkpoint_every_s:  # off the clock: --resume then goes straight on to what follows training
        _keep(checkpoint, trainer, position)
    return position


def _keep(checkpoint: Path, trainer: Trainer, position: Position) -> bool:
    """Whether it was written: a full disk costs the checkpoint, not the run, whose artifact may still fit."""
    try:
        save_checkpoint(checkpoint, trainer, position)
    except OSError as error:
        print(f"{error.strerror}; going on without it", file=sys.stderr)
        return False
    return True


def position_fields(position: Position) -> dict[str, object]:
    return {"step": position.step, "elapsed_s": round(position.elapsed_s, 3)}


@contextmanager
def _watch(trainer: Trainer, checkpoint: Path) -> Iterator[Callable[[], None]]:
    """Yields what is to be called as steps end. Of several ranks, one that has no such call for too long leaves."""
    if trainer.world_size == 1:
        yield lambda: None
        return
    patience_s = trainer.preset.run.patience_s
    reason = f"train.py: {_who(trainer)}no step has ended for {patience_s:g} s: a rank has died or hangs"
    with Watchdog(patience_s, lambda: f"{reason}; {_what_is_left(checkpoint)}") as watchdog:
        yield watchdog.beat


def _who(trainer: Trainer) -> str:
    return f"rank {trainer.rank}: " if trainer.world_size > 1 else ""


def _what_is_left(checkpoint: Path) -> str:
    return f"the last checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint"
