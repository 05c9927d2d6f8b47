"""The bench of kernels: who is found, who may be timed, what is told of it and where it is written."""

import ast
import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import niblick.kernels
from niblick.bench import gate, measure, report, results_file, rivals, run
from niblick.bench.ceilings import Ceilings, ceiling_dtypes, measure_ceilings
from niblick.bench.gate import Case, Verdict
from niblick.bench.measure import Outcome
from niblick.bench.rivals import Contender
from niblick.bench.session import Options, Session
from niblick.bench.timing import Calls, interleave, timer_for
from niblick.data.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
KERNEL = "int6_linear"
"""Of the run of the whole command: one with a short contract."""
DIRECTIONS = ("forward", "backward", "both")
CPU = torch.device("cpu")
CEILINGS = Ceilings(4e12, {"bfloat16": 5e14, "float32": 1e14, "float8_e4m3fn": 1e15})
STUB = """
import torch
NAMESPACE = "niblick"
def doubled(x): return 2 * x
def doubled_ref(x): return x + x
SIZES = {"odd": (3, 5), "tile": (64, 64), "record": (4096, 512), "large": (2**22, 512)}
def doubled_inputs(size, dtype, device, seed=0):
    x = torch.randn(size, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)
    return {"x": x.requires_grad_()}
def doubled_cost(size, dtype):
    n = size[0] * size[1]
    moved = 2 * n * dtype.itemsize
    return {"bytes_forward": moved, "bytes_backward": moved, "flops_forward": n, "flops_backward": n}
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch) -> str:
    """A folder of kernels that holds one, `doubled`."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "doubled.py").write_text(STUB)
    monkeypatch.setattr(niblick.kernels, "__path__", [str(folder)])
    monkeypatch.delitem(sys.modules, "niblick.kernels.doubled", raising=False)
    yield "doubled"
    sys.modules.pop("niblick.kernels.doubled", None)
    if hasattr(niblick.kernels, "doubled"):
        del niblick.kernels.doubled


def measured(kernel: str, rounds: int = 3) -> dict[str, Outcome]:
    return measure.measure(kernel, "tile", torch.float32, CPU, CEILINGS, rounds)


def a_record(**changes: object) -> dict[str, object]:
    work = {"bytes_forward": 4e9, "bytes_backward": 4e9, "flops_forward": 0, "flops_backward": 0}
    facts = {"kernel": "k", "size_name": "record", "size": (98304, 512), "version": "", "method": "events"}
    facts |= {"peak_bytes": 2**20, "gated": True}
    return facts | measure.figures("both", [0.004], work, CEILINGS, "bfloat16") | changes


# ------------------------------------------------------------------------------------------------------ who is found


def test_kernels_are_the_files_of_the_folder() -> None:
    assert measure.kernels() == sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))


def test_a_file_added_is_found_and_a_broken_one_named(stub: str) -> None:
    folder = Path(niblick.kernels.__path__[0])
    (folder / "halved.py").write_text("def halved(x): return x\nSIZES = {}\n")
    (folder / "torn.py").write_text("import no_such_module\n")
    assert measure.kernels() == ["doubled", "halved", "torn"]
    assert measure.defect("doubled") is None
    assert measure.defect("halved") == "lacks halved_ref, halved_inputs, halved_cost"
    assert "no_such_module" in measure.defect("torn")
    (folder / "unsized.py").write_text(STUB.replace("doubled", "unsized").replace('"record"', '"recrod"'))
    assert measure.defect("unsized") == "lacks SIZES['record']"
    assert Session(Options(device="cpu")).outcome("halved", "record")["niblick"].status.startswith("red: lacks")


def test_only_rivals_names_kernels() -> None:
    names = set(measure.kernels())
    for path in sorted((ROOT / "bench").glob("*.py")):
        tree = ast.parse(path.read_text())
        words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert path.name == "rivals.py" or not names & words, f"{path.name} names {names & words}"
        assert not any(str(module).startswith("niblick.kernels.") for module in imported), path.name


def test_sizes(stub: str) -> None:
    module = measure.load(stub)
    assert measure.size_of(module, "record") == (4096, 512)
    assert measure.size_of(module, "record/16") == (256, 512)
    assert measure.size_of(module, "odd/16") == (1, 5)
    assert measure.size_of(module, "record*2") == (8192, 512)
    assert measure.small_size(stub, module) == "tile"
    assert measure.default_sizes(module) == ["record/16", "record/4", "record"]
    assert measure.directions(stub, module) == DIRECTIONS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(kernels=("doublet",)), "--kernels: expected some of doubled: got doublet (nearest: doubled)"),
        (Options(sizes=("recrod",)), "--sizes: expected odd, tile, record, large"),
        (Options(sizes=("record/four",)), "got record/four"),
        (Options(sizes=("record/0",)), "got record/0"),
        (Options(rounds=0), "--rounds: expected at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(stub: str, options: Options, message: str) -> None:
    with pytest.raises(DataError) as refusal:
        Session(options)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--round", "3"], "unknown option '--round' (nearest: --rounds)"),
        (["--device", "cuda"], "found none"),
        (["--benchmark-compare-fail=median:5%"], "expected --benchmark-compare with it"),
        (["--benchmark-compar"], "unrecognized arguments"),
        (["--out", "/"], "Is a directory"),
    ],
)
def test_bad_command_line_is_one_line(stub: str, words: list[str], message: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.command(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


# ------------------------------------------------------------------------------------------------------ who is timed


CONTRACT = """
import pytest
names = ["ce", "linear_ce", "ce_tail", "slow"]
@pytest.mark.parametrize("check", ["numerics", "cotangents", "inputs"])
@pytest.mark.parametrize("name", names)
def test_check(name, check):
    assert (name, check) != ("linear_ce", "cotangents"), "gradient is wrong"
@pytest.mark.parametrize("dtype", [0, 1])
@pytest.mark.parametrize("name", names)
def test_opcheck(name, dtype):
    if name == "ce_tail": pytest.skip("not here")
@pytest.mark.parametrize("name", names)
def test_planted_fault_is_rejected(name): assert False, "left out"
"""


def test_gate_judges_each_kernel_by_its_own_tests(tmp_path: Path) -> None:
    """A red kernel does not redden those whose names hold its name; what did not run is not green."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_contract.py").write_text(CONTRACT)
    verdicts = gate.run_contract(["ce", "linear_ce", "ce_tail"], cuda=False, root=tmp_path)
    assert verdicts["ce"] == Verdict(True, "5 tests pass")
    assert not verdicts["linear_ce"].green and "1 of 5 tests fail" in verdicts["linear_ce"].reason
    assert "gradient is wrong" in verdicts["linear_ce"].reason
    assert not verdicts["ce_tail"].green and verdicts["ce_tail"].reason.startswith("opcheck did not run")
    (tmp_path / "tests" / "test_contract.py").write_text("import no_such_module\n")
    verdict = gate.run_contract(["ce"], cuda=False, root=tmp_path)["ce"]
    assert not verdict.green and "no_such_module" in verdict.reason
    with pytest.raises(DataError, match="checkout"):
        gate.run_contract(["ce"], cuda=False, root=tmp_path / "tests")


def test_gate_knows_the_contract() -> None:
    """The names of the checks that it waits for are those of the contract."""
    text = (ROOT / "tests" / "test_contract.py").read_text()
    for check in gate.NEEDED_ON_CARD:
        kind, _, name = check.rpartition(" ")
        assert f"def {kind}_{name}(" in text if kind else f"def test_{name}(" in text, check
    for name in (*gate.LEFT_OUT, *gate.LEFT_OUT_ON_CPU):
        assert f"def test_{name}" in text, name


def test_gate_on_a_card_waits_for_graphs() -> None:
    cases = [Case("k", check, "passed") for check in gate.NEEDED]
    assert gate.judge("k", cases, gate.NEEDED, "").green
    assert gate.judge("k", cases, gate.NEEDED_ON_CARD, "died").reason == "cuda_graph_replays did not run (died)"


def test_red_kernel_is_not_timed(stub: str, monkeypatch) -> None:
    said = []
    session = Session(Options(device="cpu"), said.append)
    monkeypatch.setattr("niblick.bench.session.run_contract", lambda *_: {stub: Verdict(False, "1 of 9 tests fail")})
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("timed"))
    status = "red: 1 of 9 tests fail"
    assert session.outcome(stub, "tile") == {"niblick": Outcome(status)}
    assert said[0] == f"{stub}: RED, not timed, 1 of 9 tests fail"
    assert run.records(stub, "tile", session.outcomes[stub, "tile"]) == [
        {
            "event": "not timed",
            "kernel": stub,
            "size_name": "tile",
            "who": "niblick",
            "status": status,
        }
    ]


def test_ungated_run_says_so(stub: str) -> None:
    said = []
    session = Session(Options(device="cpu", contract=False, rounds=1), said.append)
    session.__dict__["ceilings"] = CEILINGS
    outcome = session.outcome(stub, "tile")["niblick"]
    assert "NO CONTRACT" in said[0]
    assert [record["gated"] for record in outcome.records.values()] == [False] * 3
    assert not session.whole and said[-1].startswith("doubled tile: ")


def test_a_size_that_does_not_fit_is_shown(stub: str, monkeypatch) -> None:
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto")

    session = Session(Options(device="cpu", contract=False), print)
    session.__dict__["ceilings"] = CEILINGS
    monkeypatch.setattr(measure, "measure", no_memory)
    assert session.outcome(stub, "tile")["niblick"].status == "failed: OutOfMemoryError: CUDA out of memory. Tried"


# ------------------------------------------------------------------------------------------------- what is told of it


def test_roof_is_the_larger_of_the_two_times() -> None:
    assert CEILINGS.roof(8_000_000_000, 10**11, "bfloat16") == (0.002, "bytes")
    assert CEILINGS.roof(8_000_000_000, 2 * 10**12, "bfloat16") == (0.004, "flops")
    assert CEILINGS.roof(8_000_000_000, 2 * 10**12, "float8_e4m3fn") == (0.002, "bytes")
    assert CEILINGS.roof(4_000_000_000, 10**18, "float16") == (0.001, "bytes")  # its products were not measured


def test_figures() -> None:
    work = {"bytes_forward": 2e9, "bytes_backward": 6e9, "flops_forward": 1e11, "flops_backward": 3e11}
    seconds = [0.004, 0.008, 0.004, 0.001, 0.016]
    both = measure.figures("both", seconds, work, CEILINGS, "bfloat16")
    assert (both["ms"], both["q1_ms"], both["q3_ms"], both["n"]) == (4.0, 4.0, 8.0, 5)
    assert (both["tb_per_s"], both["tflops"]) == (2.0, 100.0)
    assert (both["roof_ms"], both["percent_of_roof"], both["bound"]) == (2.0, 50.0, "bytes")
    backward = measure.figures("backward", seconds, work, CEILINGS, "bfloat16", saved=4e9)
    assert (backward["roof_ms"], backward["percent_of_roof"], backward["bound"]) == (0.6, 15.0, "flops")


def test_ceilings_on_a_cpu() -> None:
    found = measure_ceilings(CPU, ceiling_dtypes(CPU, torch.float32), rounds=2)
    assert found.bytes_per_s > 1e8 and set(found.flops_per_s) == {"float32"}
    assert found.flops_per_s["float32"] == max(product["tflops"] for product in found.products) * 1e12 > 1e8


def test_contenders_take_turns() -> None:
    order = []
    timers = {name: SimpleNamespace(measure=lambda turn, name=name: order.append(name + str(turn))) for name in "abc"}
    interleave(timers, 4)
    assert " ".join(order) == "a0 b1 c2 b3 c4 a5 c6 a7 b8 a9 b10 c11"


def test_inputs_rotate_through_three_times_the_cache(stub: str, monkeypatch) -> None:
    """Every call on the next set, every set with noise and cotangents of its own."""
    module = measure.load(stub)
    make = module.doubled_inputs
    monkeypatch.setattr(module, "doubled_inputs", lambda size, dtype, device, seed: make(size, dtype, "cpu", seed))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=100_000))
    sets = measure.input_sets(stub, module, (64, 64), torch.float32, torch.device("cuda"))
    touched = sum(inputs["x"].nbytes for inputs in sets)
    assert touched > 3 * 100_000 and len({inputs["x"].sum().item() for inputs in sets}) == len(sets) == 20
    calls = Calls(module.doubled, sets)
    assert all(calls.inputs(turn) is sets[turn % 20] for turn in range(41))
    first, second = (calls.cotangents(list(calls.forward(sets[turn])), turn)[0] for turn in range(2))
    assert not torch.equal(first, second) and first is calls.cotangents([], 20)[0]


def test_both_directions_are_timed() -> None:
    x = torch.ones(50, requires_grad=True)
    timer = timer_for(Calls(lambda x: x * x, [{"x": x}, {"x": x}]), CPU, graph=False)
    interleave({"": timer}, 3)
    for forward, backward, both in zip(*(timer.seconds[d] for d in ("forward", "backward", "both")), strict=True):
        assert forward > 0 and backward > 0 and backward == both - forward
    many = Calls(lambda x: x * x, [{"x": x}] * 9)
    timer_for(many, CPU, graph=False)
    assert len(many._cotangents) == 9, "a cotangent would be made inside the time"
    without = timer_for(Calls(lambda x: x * x, [{"x": x.detach()}]), CPU, graph=False)
    interleave({"": without}, 3)
    assert list(without.seconds) == ["forward"] and len(without.seconds["forward"]) == 3


def test_a_contender_that_overwrites_gets_fresh_inputs() -> None:
    x = torch.ones(4, requires_grad=True)

    def overwrites(x):
        assert torch.equal(x, torch.ones(4)), "it got what it had overwritten"
        result = (x * 3).sum()
        x.data.zero_()
        return result

    calls = Calls(overwrites, [{"x": x}], overwrites=True)
    for turn in range(3):
        assert calls.results(turn)[1].tolist() == [3.0] * 4
    assert x.tolist() == [1.0] * 4


def test_missing_failing_and_other_operations_are_shown(stub: str, monkeypatch) -> None:
    def absent(x):
        import no_such_distribution

        return no_such_distribution.f(x)

    def breaks(x):
        raise RuntimeError("no such card\nlong story")

    found = [
        Contender("Absent", absent, "no-such-distribution"),
        Contender("Breaks", breaks),
        Contender("Tripled", lambda x: 3 * x),
        Contender("Not a number", lambda x: 2 * x + math.nan),
        Contender("One pass", lambda x: 2 * x, one_pass=True, gemm_dtype="float8_e4m3fn"),
        Contender("Direct", lambda x: tuple(Calls(lambda x: 2 * x, [{"x": x}]).results()), direct=True),
    ]  # fmt: skip
    monkeypatch.setitem(rivals.RIVALS, stub, found)
    outcomes = measured(stub)
    assert outcomes["Absent"].status == "missing: no-such-distribution is not installed"
    assert outcomes["Breaks"].status == "failed: RuntimeError: no such card"
    assert outcomes["Tripled"].status == "failed: ValueError: computes something else: relative error 0.5"
    assert "computes something else" in outcomes["Not a number"].status
    assert outcomes["niblick"].status == outcomes["eager"].status == "timed"
    assert set(outcomes["niblick"].records) == {"forward", "backward", "both"}
    assert set(outcomes["One pass"].records) == set(outcomes["Direct"].records) == {"both"}
    assert outcomes["eager"].records["both"]["version"] == torch.__version__


def test_each_says_why_where_all_fail(stub: str, monkeypatch) -> None:
    monkeypatch.setattr(rivals, "contenders", lambda *_: [Contender(who, lambda x: 3 * x) for who in ("niblick", "b")])
    statuses = {outcome.status for outcome in measured(stub).values()}
    assert statuses == {"failed: ValueError: computes something else: relative error 0.5"}


def test_rivals_belong_to_kernels_and_to_the_extra() -> None:
    """A kernel that is renamed takes its rivals along; each package is one that setup.py's [bench] installs."""
    extra = (ROOT / "setup.py").read_text()
    for contender in (contender for found in rivals.RIVALS.values() for contender in found):
        assert f'"{contender.package}"' in extra
        assert contender.version() is None or contender.version()[0].isdigit()


# -------------------------------------------------------------------------------------------- and where it is written


def outcomes_for_readme() -> dict[tuple[str, str], dict[str, Outcome]]:
    small = {"niblick": Outcome("timed", {"both": a_record(size=(6144, 512), ms=0.5)})}
    by_who = {
        "niblick": Outcome("timed", {"forward": a_record(ms=1.0), "both": a_record()}),
        "niblick, one pass": Outcome("timed", {"both": a_record(ms=2.0, percent_of_roof=100.0)}),
        "eager": Outcome("timed", {"both": a_record(ms=20.0, percent_of_roof=10.0, version="2.11.0")}),
        "Liger": Outcome("missing: liger-kernel is not installed"),
    }
    red = {"niblick": Outcome("red: 2 of 9 tests fail")}
    return {("k", "record"): by_who, ("k", "record/16"): small, ("a", "record"): red}


START = {"card": "NVIDIA H200", "driver": "580", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-20T10:00:00"}
START["commit"] = "0123456789abcdef"


def test_readme_table_stands_between_its_markers_and_nothing_else_changes(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    before, after = "# title\n\n| a | b |\n\n", "\n\nthe end, ü\r\n"
    readme.write_bytes(f"{before}<!-- bench -->\nold\n<!-- /bench -->{after}".encode())
    for _ in range(2):  # writing twice gives the same
        report.write_readme(readme, outcomes_for_readme(), START, CEILINGS)
        text = readme.read_bytes().decode()
        assert text.startswith(f"{before}<!-- bench -->\n") and text.endswith(f"\n<!-- /bench -->{after}")
        assert "old" not in text and text.count("<!-- bench -->") == 1
    table = [line for line in text.splitlines() if line.startswith("|")][1:]
    assert table[0] == "| kernel | size | roof | niblick | eager | Liger |"
    assert table[2] == "| `a` | record |  | red |  |  |"
    assert table[3] == "| `k` | 98304×512 | 2 (bytes) | **4** (50 %) | 20 (10 %) | missing |"
    assert table[4] == "| `k`, one pass | 98304×512 | 2 (bytes) | **2** (100 %) |  |  |"
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1
    assert "NVIDIA H200" in text and "4.00 TB/s" in text and "commit 0123456789ab. " in text
    dirty = START | {"commit": START["commit"] + "-dirty"}
    assert "commit 0123456789ab-dirty." in report.readme_lines(outcomes_for_readme(), dirty, CEILINGS)[0]


def test_the_table_can_be_written_again_from_the_results(tmp_path: Path) -> None:
    outcomes, file = outcomes_for_readme(), tmp_path / "results.jsonl"
    for (kernel, size), by_who in outcomes.items():
        for who, outcome in by_who.items():
            for direction, record in outcome.records.items():
                record |= {"kernel": kernel, "size_name": size, "who": who, "direction": direction}
    products = [{"dtype": "bfloat16", "mkn": [1, 2, 3], "ms": 1.0, "tflops": CEILINGS.flops_per_s["bfloat16"] / 1e12}]
    start = START | {"event": "start", "copy_tb_per_s": CEILINGS.bytes_per_s / 1e12, "products": products}
    found = [record for (kernel, size), by_who in outcomes.items() for record in run.records(kernel, size, by_who)]
    results_file.append(file, [start | {"card": "an older run"}, {"event": "kernel"}, start, *found])
    again, found, ceilings = report.read_run(file)
    assert found["card"] == START["card"] and ceilings.bytes_per_s == CEILINGS.bytes_per_s
    assert report.readme_lines(again, found, ceilings)[1:] == report.readme_lines(outcomes, START, CEILINGS)[1:]
    file.write_text("{}")
    with pytest.raises(DataError, match=r"results\.jsonl: expected the JSON lines of a run"):
        report.read_run(file)


@pytest.mark.parametrize("text", ["no markers", "<!-- bench --> only", "<!-- /bench --> <!-- bench -->",
                                  "<!-- bench --> <!-- bench --> <!-- /bench -->"])  # fmt: skip
def test_readme_without_its_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(DataError, match="once each"):
        report.write_readme(readme, outcomes_for_readme(), START, CEILINGS)
    assert readme.read_text() == text and list(tmp_path.iterdir()) == [readme]


def test_the_readme_has_the_markers() -> None:
    text = (ROOT / "README.md").read_text()
    assert [text.count(marker) for marker in (report.BEGIN, report.END)] == [1, 1]
    assert text.index(report.BEGIN) < text.index(report.END)


def test_plots(tmp_path: Path) -> None:
    """One a kernel that was timed at more than one size; the same figures give the same bytes."""
    paths = report.write_plots(tmp_path, outcomes_for_readme(), START)
    assert paths == list(tmp_path.iterdir()) == [tmp_path / "k.svg"]
    drawn = paths[0].read_bytes()
    assert b"one pass" in drawn and b"98304" not in drawn and len(drawn) < 60_000
    assert report.write_plots(tmp_path, outcomes_for_readme(), START)[0].read_bytes() == drawn


def test_terminal_table(capsys) -> None:
    report.print_outcomes(outcomes_for_readme(), Console(width=200))
    shown = capsys.readouterr().out
    assert "not timed: a record, niblick: red: 2 of 9 tests fail" in shown and "50 % (bytes)" in shown


def test_results_are_appended_and_rounded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    results_file.append(path, [{"ms": 1 / 3, "size": (1, 2), "inner": [{"x": 2e12 / 3}]}])
    results_file.append(path, [{"b": None}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"ms": 0.333333, "size": [1, 2], "inner": [{"x": 666667000000.0}]}, {"b": None}]


def test_results_are_named_by_date_and_card(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    path = results_file.default_path("kernels", torch.device("cuda"))
    assert path.parent == ROOT / "bench" / "results" and path.name.endswith("-h100-80gb-hbm3-kernels.jsonl")


def test_an_interrupted_run_keeps_what_it_has(stub: str, tmp_path: Path, monkeypatch, capsys) -> None:
    (Path(niblick.kernels.__path__[0]) / "tripled.py").write_text(STUB.replace("doubled", "tripled"))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    measures = measure.measure

    def interrupted(kernel: str, *rest) -> dict[str, Outcome]:
        if kernel == "tripled":
            kept.append(out.read_text())  # what a kill that cannot be caught would leave
            raise KeyboardInterrupt
        return measures(kernel, *rest)

    monkeypatch.setattr(measure, "measure", interrupted)
    out, kept = tmp_path / "out.jsonl", []
    words = ["--device", "cpu", "--no-contract", "--rounds", "2", "--out", str(out)]
    assert run.command([*words, f"--benchmark-storage=file://{tmp_path / 'storage'}"]) == 130
    assert kept == [out.read_text()]
    start, *records = [json.loads(line) for line in kept[0].splitlines()]
    assert start["event"] == "start" and {record["kernel"] for record in records} == {stub}
    assert capsys.readouterr().err.endswith("niblick.bench.run: interrupted\n")


def test_what_is_refused_at_the_end_costs_nothing(stub: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """pytest-benchmark finds only after the measurements that there is nothing to compare with."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    out = tmp_path / "out.jsonl"
    words = ["--device", "cpu", "--no-contract", "--rounds", "2", "--out", str(out), "--benchmark-compare"]
    words += [f"--benchmark-storage=file://{tmp_path / 'storage'}", "--benchmark-compare-fail=median:5%"]
    assert run.command(words) == 2
    assert len(out.read_text().splitlines()) == 1 + 2 * 3
    assert "requires valid --benchmark-compare" in capsys.readouterr().err


def test_our_own_variant_that_fails_fails_the_run(stub: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setitem(rivals.RIVALS, stub, [Contender("niblick, thrice", lambda x: 3 * x)])
    words = ["--device", "cpu", "--no-contract", "--rounds", "2", f"--benchmark-storage=file://{tmp_path}"]
    with pytest.raises(SystemExit) as exit:
        run.command(words)
    assert exit.value.code == 1
    assert "niblick, thrice: failed: ValueError: computes something else" in capsys.readouterr().out


def test_only_a_whole_run_writes_the_readme(stub: str, tmp_path: Path, monkeypatch) -> None:
    readme, untouched = tmp_path / "README.md", "<!-- bench --><!-- /bench -->"
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(results_file, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(Session, "cuda", property(lambda self: True))
    by_who = outcomes_for_readme()["k", "record"]

    def finished(measured: list[str], **options: object) -> str:
        readme.write_text(untouched)
        session = Session(Options(**options))
        session.__dict__["ceilings"] = CEILINGS
        session.outcomes = {(stub, size): by_who for size in measured}
        results = run.Results(session, dict(START))
        for size in measured:
            results(stub, size)
        run.finish(session, results)
        return readme.read_text()

    every = ["record/16", "record/4", "record"]
    assert "`doubled` | 98304×512" in finished(every)
    (results,) = (tmp_path / "results").glob("*-kernels.jsonl")
    events = [json.loads(line)["event"] for line in results.read_text().splitlines()[1:]]
    assert events.count("kernel") == 4 * 3 and events.count("not timed") == 3
    assert (tmp_path / "results" / "plots").is_dir()
    assert finished(every[:2]) == finished(every, contract=False) == finished(every, readme=False) == untouched
    assert finished(["record"], sizes=("record",)) == untouched
    assert finished(every, rounds=2) == finished(every, dtype="float32") == untouched
    (Path(niblick.kernels.__path__[0]) / "halved.py").write_text("")
    assert finished(every, kernels=(stub,)) == untouched


# --------------------------------------------------------------------------------------------------- the whole command


def bench(folder: Path, *words: str) -> subprocess.CompletedProcess:
    outside = {key: value for key, value in os.environ.items() if key != "PYTEST_XDIST_WORKER"}
    command = [sys.executable, "-m", "niblick.bench.run", "--device", "cpu", "--kernels", KERNEL, *words]
    command += [f"--benchmark-storage=file://{folder / 'storage'}"]
    environment = outside | {"TRITON_INTERPRET": "0"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_whole_run_without_a_gpu(tmp_path: Path) -> None:
    """Gated, timed, kept where asked and nowhere else; pytest-benchmark stores it and finds a later run slower."""
    kept = [ROOT / "README.md", *sorted((ROOT / "bench" / "results").rglob("*"))]
    before = [(path, path.stat().st_mtime_ns) for path in kept]
    out = tmp_path / "out.jsonl"
    done = bench(tmp_path, "--out", str(out), "--rounds", "5", "--benchmark-save=first")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("No GPU") and f"{KERNEL}: green, " in done.stdout
    start, *records = [json.loads(line) for line in out.read_text().splitlines()]
    assert start["event"] == "start" and start["gated"] and start["copy_tb_per_s"] > 0 and start["products"]
    assert {"card", "driver", "torch", "triton", "commit", "date"} <= start.keys()
    assert {(r["who"], r["direction"]) for r in records} == set(product(("niblick", "eager"), DIRECTIONS))
    sizes = [list(size) for size in measure.load(KERNEL).SIZES.values()]
    for record in records:
        assert record["event"] == "kernel" and record["kernel"] == KERNEL and record["size"] in sizes
        assert (record["n"], record["dtype"], record["gated"], record["method"]) == (5, "float32", True, "clock")
        assert record["q1_ms"] <= record["ms"] <= record["q3_ms"]
        assert {"size_name", "version", "tb_per_s", "tflops", "percent_of_roof", "bound", "peak_bytes"} <= record.keys()
    (stored,) = (tmp_path / "storage").rglob("*_first.json")
    saved = json.loads(stored.read_text())
    medians = {
        tuple(b["extra_info"][key] for key in ("who", "direction")): b["stats"]["median"] for b in saved["benchmarks"]
    }
    for record in records:
        assert results_file.rounded(1e3 * medians[record["who"], record["direction"]]) == record["ms"]

    for benchmark in saved["benchmarks"]:
        benchmark["stats"]["median"] /= 1e6
    stored.write_text(json.dumps(saved))
    slower = bench(
        tmp_path, "--no-contract", "--rounds", "2", "--benchmark-compare", "--benchmark-compare-fail=median:5%"
    )
    assert slower.returncode == 1, slower.stdout + slower.stderr
    assert "NO CONTRACT" in slower.stdout and "(0001)" in slower.stdout and "(NOW)" in slower.stdout
    assert [(path, path.stat().st_mtime_ns) for path in kept] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "storage"]
