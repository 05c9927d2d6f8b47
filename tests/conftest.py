"""Set up before any test module is imported.

Without a CUDA card the Triton kernels run in Triton's interpreter, so that their own code is what is tested.
`TRITON_INTERPRET=0 pytest` tests the eager CPU implementations instead.
"""

import os
import time

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by @triton.jit, so it must precede the kernels' import
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores among themselves, and the cards
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["PYTEST_XDIST_WORKER"][2:]) % torch.cuda.device_count())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))


@pytest.fixture(autouse=True)
def young_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of an evaluation counts from the start of its process. The tests' own may be older than its budget."""
    start = time.perf_counter()
    monkeypatch.setattr("niblick.evaluation.clock.process_age_s", lambda: time.perf_counter() - start)
