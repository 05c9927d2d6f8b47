"""An evaluation on several ranks: who does what, and sums over all. One process is one rank that needs no other."""

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def place() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_share(items: Sequence[T]) -> Sequence[T]:
    """Of R ranks, rank r takes items fl(r n / R) .. fl((r + 1) n / R) - 1."""
    rank, n_ranks = place()
    return items[rank * len(items) // n_ranks : (rank + 1) * len(items) // n_ranks]


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """In place. Every rank must call it, with tensors of the same shapes."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
