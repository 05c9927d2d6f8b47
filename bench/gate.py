"""No speed behind a red test: the contract of a kernel, run before the kernel is timed."""

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from niblick.data.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 900
LEFT_OUT = ("planted_fault", "lists_faults", "proves_itself", "offsets_beyond")
"""What judges the tests rather than the kernel, and what needs most of a card's memory."""
LEFT_OUT_ON_CPU = ("compiles", "lifts")
NEEDED = {"check numerics", "check cotangents", "opcheck"}
NEEDED_ON_CARD = NEEDED | {"cuda_graph_replays"}
"""A contract that did not run these is not green, whatever else passed."""


class Verdict(NamedTuple):
    green: bool
    reason: str


def run_contract(kernels: list[str], cuda: bool, workers: int = 0, root: Path = ROOT) -> dict[str, Verdict]:
    """The verdict on each kernel, from one pytest of tests/test_contract.py. workers: of pytest-xdist."""
    contract = root / "tests" / "test_contract.py"
    if not contract.exists():
        raise DataError(f"the contract: expected {contract}, in a checkout of the repository (or --no-contract)")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [sys.executable, "-m", "pytest", str(contract), "-k", expression(kernels, cuda)]
        words += ["--junitxml", str(report), "--tb=line", "-p", "no:benchmark", *(["-n", str(workers)] * (workers > 0))]
        if not cuda:  # what is timed there are the eager paths; set without touching this process's environment
            words = ["env", "TRITON_INTERPRET=0", "OMP_NUM_THREADS=1", *words]
        try:
            done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return dict.fromkeys(kernels, Verdict(False, f"the contract took more than {TIMEOUT_S} s"))
        cases = _cases(report) if report.exists() else []
    needed, said = NEEDED_ON_CARD if cuda else NEEDED, _what_went_wrong(done.stdout + done.stderr)
    return {kernel: judge(kernel, cases, needed, said) for kernel in kernels}


def expression(kernels: list[str], cuda: bool) -> str:
    """pytest -k: the tests whose parameters begin with one of the kernels' names, whole ("test_opcheck[name-...")."""
    chosen = " or ".join(f"[{kernel}{end}" for kernel in kernels for end in "-]")
    left_out = " or ".join(LEFT_OUT + (() if cuda else LEFT_OUT_ON_CPU))
    return f"({chosen}) and not ({left_out})"


class Case(NamedTuple):
    kernel: str
    check: str
    """`opcheck` for test_opcheck[kernel-...], `check numerics` for test_check[kernel-...-numerics]."""
    outcome: str
    """"passed", "skipped", or the first line of what failed."""


def judge(kernel: str, cases: list[Case], needed: set[str], said: str) -> Verdict:
    """said: pytest's own word, for where tests are missing."""
    mine = [case for case in cases if case.kernel == kernel]
    failed = [case for case in mine if case.outcome not in ("passed", "skipped")]
    if failed:
        first = failed[0]
        return Verdict(False, f"{len(failed)} of {len(mine)} tests fail; {first.check}: {first.outcome}")
    passed = {case.check for case in mine if case.outcome == "passed"}
    if not needed <= passed:
        return Verdict(False, f"{', '.join(sorted(needed - passed))} did not run ({said})")
    return Verdict(True, f"{sum(case.outcome == 'passed' for case in mine)} tests pass")


def _what_went_wrong(output: str) -> str:
    """The first line that pytest marks as an error (of collecting, for example), else the last one."""
    lines = output.strip().splitlines() or ["no output"]
    return next((line[2:].strip() for line in lines if line.startswith("E ")), lines[-1])


def _cases(report: Path) -> list[Case]:
    cases = []
    for element in ElementTree.parse(report).iter("testcase"):
        named = re.fullmatch(r"test_(\w+)\[(\w+)(?:-(.*))?\]", element.get("name", ""))
        if not named:
            continue
        check, kernel, rest = named.groups()
        if check == "check":
            check = f"check {rest.rpartition('-')[2]}"
        cases.append(Case(kernel, check, _outcome(element)))
    return cases


def _outcome(element: ElementTree.Element) -> str:
    for kind in ("failure", "error"):
        found = element.find(kind)
        if found is not None:
            return (found.get("message") or kind).splitlines()[0]
    return "passed" if element.find("skipped") is None else "skipped"
