"""What several ranks share while they score: who takes which batch, and their sums."""

import itertools

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_runs = itertools.count()


class Ranks:
    """This process among those of torch.distributed, or alone.

    Batches are claimed by the atomic add of the store through which the ranks found each other. The published scripts
    keep the counter in a file under a lock: that needs a file system that all hosts share and whose locks hold, and a
    name that no other run uses; the store is there anyway, on any number of hosts, and ends with the run.
    """

    def __init__(self) -> None:
        self.rank, self.size, self._store, self._next = 0, 1, None, itertools.count()
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            # Every rank counts the runs alike, so they agree on the name.
            self._store = dist.PrefixStore(f"niblick/claims/{next(_runs)}", _get_default_store())

    def claim(self) -> int:
        """The next place in the queue, from 0, given to nobody else."""
        return next(self._next) if self._store is None else self._store.add("next", 1) - 1

    def done(self, n: int) -> int:
        """Counts n more targets as scored; how many all ranks have scored together."""
        if self._store is None:
            self._done = getattr(self, "_done", 0) + n
            return self._done
        return self._store.add("done", n)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor
