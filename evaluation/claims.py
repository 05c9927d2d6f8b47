"""Which rank scores what, decided as the work goes on."""

import itertools
from collections import Counter

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from niblick.evaluation.ranks import place

_runs = itertools.count()


class Claims:
    """Counters that all ranks of torch.distributed share; of one rank alone, its own.

    They are atomic adds on the store through which the ranks found each other. The published scripts keep one in a file
    under a lock: that needs a file system that all hosts share and whose locks hold, and a name that no other run uses;
    the store is there anyway, on any number of hosts, and ends with the run.
    """

    def __init__(self) -> None:
        self._store, self._own = None, Counter()
        if place()[1] > 1:
            # Every rank counts the runs alike, so they agree on the name.
            self._store = dist.PrefixStore(f"niblick/claims/{next(_runs)}", _get_default_store())

    def next(self) -> int:
        """A number from 0 on that nobody else gets."""
        return self.add("next", 1) - 1

    def add(self, name: str, n: int) -> int:
        """What the counter is with n more."""
        if self._store is not None:
            return self._store.add(name, n)
        self._own[name] += n
        return self._own[name]
