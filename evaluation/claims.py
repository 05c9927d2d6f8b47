"""Which rank scores what, decided as the work goes on."""

from collections import Counter

from niblick.evaluation import ranks


class Claims:
    """Counters that all ranks share; of one rank alone, its own.

    They are atomic adds on the store through which the ranks found each other. The published scripts keep one in a file
    under a lock: that needs a file system that all hosts share and whose locks hold, and a name that no other run uses;
    the store is there anyway, on any number of hosts, and ends with the run.
    """

    def __init__(self) -> None:
        rank, n_ranks = ranks.place()
        self._store, self._own, self._run = None, Counter(), 0
        if n_ranks > 1:
            self._store = ranks.store()
            self._run = self._store.add(f"niblick/runs of rank {rank}", 1)  # every rank counts the runs alike

    def next(self) -> int:
        """A number from 0 on that nobody else gets."""
        return self.add("next", 1) - 1

    def add(self, name: str, n: int) -> int:
        """What the counter is with n more."""
        if self._store is not None:
            return self._store.add(f"niblick/run {self._run}/{name}", n)
        self._own[name] += n
        return self._own[name]
