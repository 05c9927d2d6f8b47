"""An evaluation on several ranks: who does what, and sums over all. One process is one rank that needs no other.

The ranks are those of torch.distributed's default group, or of the group that `using` names, in its thread.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_group: ContextVar["dist.ProcessGroup | None"] = ContextVar("group", default=None)


@contextmanager
def using(group: dist.ProcessGroup) -> Iterator[None]:
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def _current() -> dist.ProcessGroup | None:
    return _group.get() or (dist.group.WORLD if dist.is_initialized() else None)


def place() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    group = _current()
    return (group.rank(), group.size()) if group else (0, 1)


def own_share(items: Sequence[T]) -> Sequence[T]:
    """Of R ranks, rank r takes items fl(r n / R) .. fl((r + 1) n / R) - 1."""
    rank, n_ranks = place()
    return items[rank * len(items) // n_ranks : (rank + 1) * len(items) // n_ranks]


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """In place. Every rank must call it, with tensors of the same shapes."""
    if group := _current():
        for work in [group.allreduce([tensor]) for tensor in tensors]:
            work.wait()
