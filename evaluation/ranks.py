"""An evaluation on several ranks: who does what, and sums over all. One process is one rank that needs no other.

The ranks are those of torch.distributed's default group, or of the group that `using` names, in its thread; so is the
store through which they found each other.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

T = TypeVar("T")
_named: ContextVar["tuple[dist.ProcessGroup, dist.Store] | None"] = ContextVar("named", default=None)


@contextmanager
def using(group: dist.ProcessGroup, store: dist.Store) -> Iterator[None]:
    token = _named.set((group, store))
    try:
        yield
    finally:
        _named.reset(token)


def _current() -> dist.ProcessGroup | None:
    named = _named.get()
    return named[0] if named else dist.group.WORLD if dist.is_initialized() else None


def store() -> dist.Store:
    """Shared by the ranks, of which there are several."""
    named = _named.get()
    return named[1] if named else _get_default_store()


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
