"""Work done beside the main thread's, before the clock."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch


@contextmanager
def alongside(jobs: Sequence[Callable[[], object]]) -> Iterator[None]:
    """Runs every job in a thread of its own while the body runs, and waits for all at its end.

    Meant for Triton's compilation while Inductor compiles the model: Triton holds the interpreter only for its front
    end, not in LLVM nor in ptxas. The threads use the caller's device and its ordinary stream, so that memory they free
    is free for the main thread. A job's error is raised at the end, except that it lacked memory: what it did early is
    done later.
    """
    if not jobs:
        yield
        return
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    use = partial(torch.cuda.set_device, device) if device else None  # a thread begins on card 0, whatever the rank
    with ThreadPoolExecutor(len(jobs), thread_name_prefix="niblick-rehearsal", initializer=use) as pool:
        futures = [pool.submit(job) for job in jobs]
        yield
        for future in futures:
            if not isinstance(error := future.exception(), torch.OutOfMemoryError | None):
                raise error
