"""The bench as pytest-benchmark runs it: one test a kernel, size, contender and direction.

    .venv/bin/python -m pytest bench/test_kernels.py --benchmark-autosave
    .venv/bin/python -m pytest bench/test_kernels.py --benchmark-compare --benchmark-compare-fail=median:5%

The contenders of one kernel and size are timed together, in turns (`measure`); each test hands its share of those
device times to pytest-benchmark, whose statistics, storage and comparison apply. `niblick.bench.run` runs this file.
"""

from itertools import product

import pytest
import torch

from niblick.bench import measure, rivals
from niblick.bench.measure import Outcome
from niblick.bench.session import session_of


class DeviceClock:
    """A timer that shows the device's seconds: it stands still but for `advance`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now = seconds


CLOCK = DeviceClock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = session_of(metafunc.config)
    cases = [
        (kernel, size, who, direction)
        for kernel in session.kernels
        for size in session.sizes(kernel)
        for who, direction in _series(kernel, session.device)
    ]
    metafunc.parametrize(("kernel", "size", "who", "direction"), cases, ids=["-".join(case) for case in cases])


def _series(kernel: str, device: torch.device) -> list[tuple[str, str]]:
    """Contender and direction; of a file that cannot be measured one, to say so."""
    if measure.defect(kernel):
        return [("niblick", "forward")]
    module = measure.load(kernel)
    who = [contender.who for contender in rivals.contenders(kernel, module, device)]
    return list(product(who, measure.directions(kernel, module)))


@pytest.mark.benchmark(timer=CLOCK)
def test_kernel(benchmark, request, kernel: str, size: str, who: str, direction: str) -> None:
    outcome = session_of(request.config).outcome(kernel, size).get(who, Outcome("red kernel"))
    if who.startswith("niblick") and direction == "forward" and outcome.status.startswith(("red:", "failed:")):
        pytest.fail(f"{kernel} {size}, {who}: {outcome.status}", pytrace=False)
    if direction not in outcome.seconds:
        pytest.skip(outcome.status if outcome.status != "timed" else "one pass: both directions together are timed")
    benchmark.group = f"{kernel} {size} {direction}"
    benchmark.extra_info.update(outcome.records[direction])
    times = iter(outcome.seconds[direction])

    def setup() -> None:
        CLOCK.now = 0.0

    benchmark.pedantic(lambda: CLOCK.advance(next(times)), setup=setup, rounds=len(outcome.seconds[direction]))
