"""Kernels against their rivals and against the roof of the card in hand.

    python -m niblick.bench.run [--kernels softcapped_ce smear_gate] [--sizes record record/4] [--workers 8]

Each kernel must first pass its contract. Options that begin with --benchmark- go to pytest-benchmark, written with an
equals sign: --benchmark-compare, --benchmark-compare=0003, --benchmark-compare-fail=median:5%. On a GPU every run is
saved in .benchmarks/ for that, its records are appended to bench/results/, and a whole run rewrites README.md's table.
Exit status 1: a kernel is red or failed, or --benchmark-compare-fail found it slower.
"""

import contextlib
import io
import re
import signal
import sys
import warnings
from functools import cached_property
from pathlib import Path

import pytest
import torch
from rich.console import Console

from niblick.bench import report, results_file
from niblick.bench.measure import Outcome
from niblick.bench.session import KEY, Options, Session
from niblick.data.command_line import guarded, parse
from niblick.data.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
QUIET = ["--benchmark-quiet"]
COMPARING = ["--benchmark-columns=median,iqr,rounds", "--benchmark-name=short"]


class Plugin:
    """What pytest is told of this run."""

    def __init__(self, session: Session, start: dict[str, object]) -> None:
        self._session, self._start = session, start

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[KEY] = self._session

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """No dots: the session says what it is at."""
        if report.failed:
            return None
        return report.outcome if report.when == "call" or report.skipped else "", "", ""

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_machine_info(self, config: pytest.Config, machine_info: dict) -> None:
        """So that a comparison across cards or versions is warned of."""
        machine_info.update({key: self._start[key] for key in ("card", "driver", "torch", "triton")})


def main(words: list[str]) -> None:
    for_pytest = [word for word in words if word.startswith("--benchmark-")]
    rest = [word for word in words if word not in for_pytest]
    options = parse(Options, rest, script="niblick.bench.run", default=Options(), about=__doc__)
    session = Session(options)
    if not session.cuda:
        print("No GPU: the eager CPU paths at small sizes. It shows that the bench works, and nothing about a kernel.")
        torch.set_num_threads(1)  # on such sizes threads only wait for one another
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")  # of a backward's first product, harmless
    start = results_file.start_record(session.device)
    start["commit"] = options.commit or start["commit"]
    if options.out:
        results_file.append(options.out, [])  # one that cannot be written is refused before anything is measured
    session.keep = results = Results(session, start)
    try:
        failed = run_pytest(session, start, for_pytest)
    finally:  # Ctrl-C, or pytest-benchmark's refusal at the end, costs nothing that was measured
        if session.outcomes:
            finish(session, results)
    if failed:
        sys.exit(1)


def run_pytest(session: Session, start: dict[str, object], for_pytest: list[str]) -> bool:
    """Whether something failed: a kernel, or the comparison."""
    try:
        from pytest_benchmark.session import PerformanceRegression
    except ImportError:
        raise DataError('expected pytest-benchmark: found none (pip install "niblick[bench]")') from None
    compares = any(word.startswith("--benchmark-compare") for word in for_pytest)
    if any(word.startswith("--benchmark-compare-fail") for word in for_pytest) and not any(
        word == "--benchmark-compare" or word.startswith("--benchmark-compare=") for word in for_pytest
    ):
        raise DataError("--benchmark-compare-fail: expected --benchmark-compare with it, got it alone")
    saves = any(word.startswith(("--benchmark-save=", "--benchmark-autosave")) for word in for_pytest)
    words = [str(ROOT / "bench" / "test_kernels.py"), "--rootdir", str(ROOT), "--import-mode=importlib", "-s", "-rN"]
    words += ["--no-header", "--tb=short", "-p", "no:warnings", "--override-ini=addopts=-q -p no:cacheprovider"]
    words += [f"--benchmark-storage=file://{ROOT / '.benchmarks'}", *(COMPARING if compares else QUIET)]
    words += ["--benchmark-autosave"] * (session.cuda and not saves)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            status = pytest.main([*words, *for_pytest], plugins=[Plugin(session, start)])
    except PerformanceRegression:
        return True  # it has said which
    except pytest.UsageError as error:
        raise DataError(f"{' '.join(for_pytest)}: {error}") from None
    if status == pytest.ExitCode.USAGE_ERROR:
        reasons = re.findall("error: (.*)", said.getvalue(), re.IGNORECASE)
        raise DataError(f"{' '.join(for_pytest)}: {(reasons or ['pytest refuses this'])[-1]}")
    sys.stderr.write(said.getvalue())
    if status == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    return status != pytest.ExitCode.OK


class Results:
    """The file of a run: its start, then what was found of every kernel and size as soon as it is, because a run that
    is killed should keep what it has. Without a GPU only where a file is asked for."""

    def __init__(self, session: Session, start: dict[str, object]) -> None:
        self.session, self._start = session, start
        self.path = session.options.out
        if session.cuda and not self.path:
            self.path = results_file.default_path("kernels", session.device)
        self._begun = False

    @cached_property
    def start(self) -> dict[str, object]:
        """Measures the ceilings, if nothing did yet."""
        options, ceilings = self.session.options, self.session.ceilings
        facts = {"rounds": options.rounds, "gated": options.contract}
        return self._start | facts | {"copy_tb_per_s": ceilings.bytes_per_s / 1e12, "products": ceilings.products}

    def __call__(self, kernel: str, size: str) -> None:
        if self.path:
            found = records(kernel, size, self.session.outcomes[kernel, size])
            results_file.append(self.path, found if self._begun else [self.start, *found])
            self._begun = True


def records(kernel: str, size: str, by_who: dict[str, Outcome]) -> list[dict[str, object]]:
    """One a series of times, and one for each contender that was not timed, with the reason."""
    found = []
    for who, outcome in by_who.items():
        found += [{"event": "kernel"} | record for record in outcome.records.values()]
        if not outcome.records:
            named = {"kernel": kernel, "size_name": size, "who": who, "status": outcome.status}
            found.append({"event": "not timed"} | named)
    return found


def finish(session: Session, results: Results) -> None:
    """Prints what was found, and on a GPU draws it; a whole run rewrites the table of README.md."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    report.print_ceilings(session.ceilings, console)
    report.print_outcomes(session.outcomes, console)
    if results.path:
        console.print(f"appended to {results.path}")
    if session.cuda and session.options.plots:
        for path in report.write_plots(results_file.FOLDER / "plots", session.outcomes, results.start):
            console.print(f"drawn: {path}")
    if session.whole and session.options.readme:
        report.write_readme(ROOT / "README.md", session.outcomes, results.start, session.ceilings)
        console.print("README.md: table written")
    if not session.options.contract:
        console.print("NO CONTRACT WAS RUN: these figures are ungated.")


def command(words: list[str]) -> int:
    """`main` with bad input as one line and exit status 2."""
    return guarded("niblick.bench.run", main, words)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was measured is kept
    sys.exit(command(sys.argv[1:]))
