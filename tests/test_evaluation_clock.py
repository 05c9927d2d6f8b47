"""The clock's parts add up to the wall clock, and the budget is kept or said."""

import inspect
import signal
import subprocess
import sys
import time

import pytest

from niblick.evaluation import clock as clock_module
from niblick.evaluation.clock import PARTS, Clock, OverBudget, process_age_s, require_plot
from niblick.model.config import ConfigError


@pytest.fixture
def now(monkeypatch):
    """A wall clock that goes when it is told to."""
    wall = [100.0]
    monkeypatch.setattr(clock_module, "perf_counter", lambda: wall[0])

    def go(seconds: float) -> None:
        wall[0] += seconds

    return go


def test_every_second_belongs_to_one_part(now):
    clock = Clock(age_s=3.0)
    now(1)
    with clock.part("score"):
        now(2)
        with clock.part("adapt"):
            now(5)
        now(7)
    with clock.part("compile"):
        now(11)
    now(13)
    assert clock.seconds == {"load": 17, "compile": 11, "precompute": 0, "score": 9, "adapt": 5}
    assert sum(clock.seconds.values()) == clock.elapsed_s == 42
    with pytest.raises(ZeroDivisionError), clock.part("score"):
        now(1)
        raise ZeroDivisionError
    now(1)
    assert clock.seconds["score"] == 10 and clock.seconds["load"] == 18


def test_text_draws_the_parts_end_to_end_and_the_budget(now):
    clock = Clock(600.0)
    now(60)
    with clock.part("score"):
        now(300)
    lines = clock.text().split("\n")
    assert lines[0] == f"load           60.0 s {'#' * 6}{' ' * 54}|"
    assert lines[3] == f"score         300.0 s {' ' * 6}{'#' * 30}{' ' * 24}|"
    assert len(lines) == len(PARTS) + 1 and lines[-1] == "total         360.0 s of 600 s"
    now(840)
    assert clock.text().endswith("total        1200.0 s of 600 s: OVER THE BUDGET")
    assert all(line[52] == "|" for line in clock.text().split("\n")[:-1]), "the line stands at 600 of 1200 s"


def test_plot(tmp_path, now):
    pytest.importorskip("matplotlib")
    clock = Clock(600.0)
    now(60)
    clock.plot(tmp_path / "clock.svg")
    assert "load 60.0 s" in (tmp_path / "clock.svg").read_text()
    for name, message in (
        ("nowhere/clock.svg", "expected a folder"),
        ("clock.doc", "expected a file of .*found 'clock"),
    ):
        with pytest.raises(ConfigError, match=message):
            require_plot(tmp_path / name)


def work(clock, now, seconds_a_piece: list[float]) -> int:
    for done, seconds in enumerate(seconds_a_piece, start=1):
        now(seconds)
        clock.foresee(done / len(seconds_a_piece))
    return done


def test_of_several_ranks_the_first_one_judges(now, monkeypatch):
    monkeypatch.setattr(clock_module, "place", lambda: (1, 2))
    assert work(Clock(600.0, "refuse"), now, [1.2] * 1000) == 1000


def test_what_will_not_fit_is_said_as_soon_as_the_rate_is_known(now):
    clock = Clock(600.0, "refuse")
    now(30)
    with pytest.raises(OverBudget, match=r"at the rate found \(0.2% of the work in 2.4 s, after 40.0 s\)"):
        work(clock, now, [10.0] + [1.2] * 999)
    assert clock.elapsed_s < 43, "the first piece, slow as first ones are, is not the rate"
    assert work(Clock(600.0, "refuse"), now, [10.0] + [0.5] * 999) == 1000
    with pytest.raises(OverBudget, match=r"620.0 s have passed with 50.0% of the work done"):
        work(Clock(600.0, "refuse"), now, [620.0, 1.0])
    assert work(Clock(600.0, "run"), now, [1.2] * 1000) == 1000
    assert work(Clock(600.0, "refuse"), now, [0.1] * 4) == 4


def test_the_end_of_the_budget_stops_where_it_is_to_be_kept(now):
    clocks = [Clock(600.0, policy) for policy in ("refuse", "run")]
    now(599)
    assert [clock.stop() for clock in clocks] == ["", ""]
    now(2)
    assert [clock.stop() for clock in clocks] == ["the budget of 600 s ended", ""]


def test_the_first_interrupt_asks_and_the_second_ends():
    clock, before = Clock(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), clock.interruptible():
        assert clock.stop() == ""
        signal.raise_signal(signal.SIGINT)
        assert clock.stop() == "interrupted"
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(process_age_s() is None, reason="the system does not tell when a process began")
def test_the_age_of_a_process(monkeypatch):
    script = f"import os, time\nfrom pathlib import Path\n{inspect.getsource(process_age_s)}time.sleep(0.3)\n"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", f"{script}print(process_age_s())"], capture_output=True, text=True)
    assert 0.3 < float(done.stdout) < time.perf_counter() - began + 0.05, done.stderr
    monkeypatch.setattr(clock_module, "process_age_s", process_age_s)
    assert Clock.of_process(1.0, "run").elapsed_s >= process_age_s() - 0.05


def test_where_the_system_does_not_tell_it_begins_now(monkeypatch, now):
    monkeypatch.setattr(clock_module, "process_age_s", lambda: None)
    assert Clock.of_process(1.0, "run").elapsed_s == 0
