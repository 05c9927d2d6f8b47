"""How a process takes its place: its rank, its device, what it computes in."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from niblick.model.config import ConfigError, Preset
from niblick.model.precision import choose_precision


class Launch(NamedTuple):
    """Facts of the launch: this process's place and device, and the resolved precision and compilation."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    fp8: bool
    compile: bool


def launch(preset: Preset, rank: int, local_rank: int, world_size: int) -> Launch:
    """Joins the other ranks, if any. ConfigError for a device that is not there."""
    run = preset.run
    device = _device(run.device, local_rank)
    dtype, fp8 = choose_precision(run.precision, device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if run.deterministic:
        be_deterministic()
    if world_size > 1:
        patience = timedelta(hours=2)  # preparing a large text may take rank 0 longer than the usual ten minutes
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            device_id=device if cuda else None,
            timeout=patience,
            rank=rank,
            world_size=world_size,
        )
    compile = run.compile == "on" or (run.compile == "auto" and cuda)
    return Launch(rank, world_size, device, dtype, fp8, compile)


def be_deterministic() -> None:
    """For the whole process, and for good."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device cuda: expected a CUDA device, found none (--run.device cpu trains without one)")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"torchrun --nproc-per-node: expected at most {torch.cuda.device_count()}, one a CUDA device")
    return torch.device("cuda", local_rank)


@contextmanager
def said_once(rank: int) -> Iterator[None]:
    """What every rank refuses alike is left to rank 0 to say."""
    try:
        yield
    except ConfigError:
        if rank:
            sys.exit(2)
        raise
