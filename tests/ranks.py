"""Several ranks on this machine, over gloo: forked from one process that has imported everything, so in a moment."""

import io
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

PATIENCE_S = 100


def run_ranks(function: Callable, world_size: int, *arguments: object) -> list[object]:
    """What `function(rank, *arguments)`, a function of a test module, returns in each rank.

    None for a rank that ended without returning; an assertion error here for one that raised.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["niblick.model.run", "niblick.data.loaders", "safetensors.torch", "pytest"])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(function, rank, world_size, folder, arguments), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        ranks[0].join(PATIENCE_S)
        outcomes = [Path(folder) / str(rank) for rank in range(world_size)]
        for process in ranks[1:]:  # one that a test has stopped never ends by itself
            process.join(5 if all(path.exists() for path in outcomes[:1]) else 1)
        for process in ranks:
            process.kill()
        results = [torch.load(path, weights_only=False) if path.exists() else None for path in outcomes]
    for rank, result in enumerate(results):
        assert not isinstance(result, _Failure), f"rank {rank}:\n{result}"
    return results


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For modules that import this name: tensors so small gain nothing by threads, which wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class _Failure(str):
    """The traceback of a rank that raised."""


def _rank(function: Callable, rank: int, world_size: int, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = io.StringIO()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        result = function(rank, *arguments)
    except BaseException:
        result = _Failure(traceback.format_exc())
    part = Path(folder) / f"{rank}.part"
    torch.save(result, part)
    part.rename(Path(folder) / str(rank))
