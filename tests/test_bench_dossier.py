"""The dossier: its verdicts on constructed curves and on real training, its checksums, its schedule, its folder."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from configs import REFERENCE

from niblick.bench import dossier, dossier_report, workload
from niblick.bench.dossier import Run
from niblick.bench.intervals import mean_interval, seed_noise
from niblick.model.presets import PRESETS
from niblick.model.schedule import lr_factor, momentum

CPU = torch.device("cpu")
SMALL = {"num_layers": 2, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "mlp_hidden": 32, "vocab_size": 300}
SMALL |= {"loop_start": 0, "loop_end": 0, "parallel": "none", "max_segment": 64}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Fifty documents with some structure: enough for a tokenizer and a few thousand tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    words = "the quick brown fox jumps over a lazy dog while seven small models learn to count bytes".split()
    rng = np.random.default_rng(0)
    for i in range(50):
        lines = [" ".join(rng.choice(words, 12)) + f" {rng.integers(1000)}." for _ in range(12)]
        (folder / f"{i:02}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def tiny(monkeypatch, corpus: Path) -> str:
    """A preset without kernels, on the corpus, prepared once."""
    base = PRESETS["pr1855"]
    optim = replace(base.optim, newton_schulz_impl="reference")
    data = replace(base.data, cache=str(corpus.parent / "cache"))
    preset = replace(base, model=replace(base.model, **SMALL, **REFERENCE), optim=optim, data=data)
    monkeypatch.setitem(PRESETS, "tiny", preset)
    return "tiny"


@pytest.fixture
def compared(tiny: str, corpus: Path, tmp_path: Path, capsys):
    """The command on the tiny preset; its status, what it printed, and the folder."""

    def run(*words: str) -> tuple[int, str, Path]:
        out = tmp_path / "dossier"
        options = ["--device", "cpu", "--tokens", "128", "--steps", "16", "--data", str(corpus), "--out", str(out)]
        status = dossier.command(["tiny", "tiny", *options, *words])
        return status, capsys.readouterr().out, out

    return run


def runs_of(*levels: float, steps: int = 8, seed: int = 1, weights: str = "w") -> list[Run]:
    """Runs whose losses are a level each, after a first half that lies 5 higher."""
    return [
        Run(seed + i, [level + 5.0 * (step < steps // 2) for step in range(steps)], [2.0] * steps,
            {"embedding": ("(2, 2)", f"{weights}{seed + i}"), weights: ("(1,)", "x")}, f"end {level}")
        for i, level in enumerate(levels)
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- statistics


def test_findings_by_hand() -> None:
    """B lies 0.1, 0.2 and 0.3 above A's 1, 2 and 3, so 0.2 ± 4.3027 · 0.1 / √3; the noise is 4.3027 · √(2/3)."""
    found = dossier_report.find({"A": runs_of(1.0, 2.0, 3.0), "B": runs_of(1.1, 2.2, 3.3)}, 0.25)
    assert found.window == 2 and found.deviation == 1.0 and found.place == "inside"
    assert found.difference == pytest.approx(0.2) and found.half_width == pytest.approx(4.30265 * 0.1 / 3**0.5)
    assert found.noise == pytest.approx(4.30265 * (2 / 3) ** 0.5)
    assert found.per_seed == pytest.approx([0.1, 0.2, 0.3])
    assert found.verdict == (
        "The difference, +0.20000 ± 0.24841 nats, lies inside the seed noise of ± 3.51310; its interval contains zero."
    )
    assert found.same_seeds and found.starts_that_differ == [] and found.other_shapes == []
    assert not found.same_final_weights


def test_the_window_leaves_out_what_came_before() -> None:
    """The first half differs by 5 in B alone; only a window that reaches into it may say so."""
    a, b = runs_of(1.0, 1.1, 1.2), runs_of(1.0, 1.1, 1.2)
    for run in b:
        run.losses[:4] = [0.0] * 4
    assert dossier_report.find({"A": a, "B": b}, 0.5).difference == 0.0
    assert dossier_report.find({"A": a, "B": b}, 1.0).difference == pytest.approx(-3.05)
    assert dossier_report.find({"A": a, "B": b}, 1.0).place == "outside"


@pytest.mark.parametrize(
    ("difference", "half", "noise", "words"),
    [
        (0.02, 0.01, 0.03, "lies inside the seed noise of ± 0.03000; its interval does not contain zero"),
        (-0.02, 0.05, 0.03, "-0.02000 ± 0.05000 nats, lies inside the seed noise of ± 0.03000; its interval contains"),
        (-0.04, 0.01, 0.03, "lies outside the seed noise of ± 0.03000; its interval does not contain zero"),
        (0.04, 0.05, 0.03, "lies outside the seed noise of ± 0.03000, but its interval contains zero: undecided"),
    ],
)
def test_verdicts(difference: float, half: float, noise: float, words: str) -> None:
    assert words in dossier_report.verdict(difference, half, noise)


def test_verdicts_are_right_as_often_as_they_say() -> None:
    """Seeds alone: inside in 95 % of cases, outside in less than 5. A shift of twenty deviations: outside."""
    rng = np.random.default_rng(1)
    places = {0.0: [], 2.0: []}
    for _ in range(600):
        a, b = rng.normal(2.0, 0.1, (2, 3))
        for shift, found in places.items():
            found.append(dossier_report.place(*mean_interval(b + shift - a), seed_noise(a)))
    assert 0.93 < places[0.0].count("inside") / 600 < 0.97 and places[0.0].count("outside") < 0.05 * 600
    assert places[2.0].count("outside") > 0.95 * 600


def test_starts_are_compared_where_shapes_are_the_same() -> None:
    a, b = runs_of(1.0, 2.0), runs_of(1.0, 2.0)
    found = dossier_report.find({"A": a, "B": b}, 0.5)
    assert found.verdict.startswith("Every loss of B is A's to the last bit") and found.same_final_weights
    for run in b:
        run.initial |= {"embedding": ("(2, 2)", "other"), "w": ("(7,)", "y"), "new": ("(1,)", "z")}
    found = dossier_report.find({"A": a, "B": b}, 0.5)
    assert found.starts_that_differ == ["embedding"] and found.other_shapes == ["new", "w"]
    assert found.verdict.endswith("From the same seed they start from other weights.")
    for run in b:
        run.seed += 100
    assert not dossier_report.find({"A": a, "B": b}, 0.5).verdict.endswith("other weights.")


# ------------------------------------------------------------------------------------------------------- training


def test_a_preset_against_itself(compared) -> None:
    """To the last bit, and the folder holds everything."""
    status, said, out = compared("--seeds", "2")
    assert status == 0 and "Every loss of B is A's to the last bit" in said
    record = json.loads((out / "dossier.json").read_text())
    assert record["findings"]["same_final_weights"] and record["findings"]["difference"] == 0.0
    first, second = record["runs"]["A"]
    assert len(first["losses"]) == len(first["ms"]) == 16 and first["losses"][-1] < first["losses"][0] - 0.5
    assert first["initial"]["embedding"] != second["initial"]["embedding"] and first["final"] != second["final"]
    assert {"card", "torch", "commit", "date", "command", "passes"} <= record.keys()
    report = (out / "report.md").read_text()
    for words in (record["findings"]["verdict"], record["command"], "What it does not show", first["final"][:16]):
        assert words in report
    assert "python -m niblick.bench.dossier tiny tiny --device cpu" in record["command"]
    assert ElementTree.parse(out / "curves.svg").getroot().tag.endswith("svg")


def test_another_seed_lies_inside_the_noise(compared) -> None:
    """One draw of those of which one in twenty lies outside."""
    status, said, out = compared("--seeds", "4", "--a-set", "run.seed=7", "--b-set", "run.seed=1007")
    assert status == 0 and "lies inside the seed noise" in said
    findings = json.loads((out / "dossier.json").read_text())["findings"]
    assert (
        findings["place"] == "inside" and not findings["same_seeds"] and "embedding" in findings["starts_that_differ"]
    )
    assert "their seeds being others" in (out / "report.md").read_text()


def test_another_preset_lies_outside(compared) -> None:
    """Learning rates a hundredth as large; the starts are the same."""
    rates = ("optim.matrix_lr=0.0003", "optim.embedding_lr=0.0003", "optim.scalar_lr=0.0002")
    status, said, out = compared("--seeds", "3", "--b-set", *rates)
    assert status == 0 and "lies outside the seed noise" in said
    findings = json.loads((out / "dossier.json").read_text())["findings"]
    assert findings["difference"] > 0.5 and findings["starts_that_differ"] == [] and findings["same_seeds"]
    assert "is the same to the last bit" in (out / "report.md").read_text()


def trainer_of(preset: str):
    return workload.make_trainer(workload.one_micro_step(PRESETS[preset], 64, "auto", "cpu"), CPU, compile=False)


def test_a_seed_put_into_a_trained_trainer_is_a_new_one(tiny: str) -> None:
    used, batches = trainer_of(tiny), iter(workload.synthetic_batches(trainer_of(tiny).preset, CPU))
    for _ in range(2):
        workload.take_step(used, batches, looping=True)
    dossier.reseed(used, 7)
    PRESETS[tiny] = replace(PRESETS[tiny], run=replace(PRESETS[tiny].run, seed=7))
    new = trainer_of(tiny).state_dict()
    found = used.state_dict()
    assert found.keys() == new.keys() and all(torch.equal(found[name], new[name]) for name in new)


def test_steps_drive_the_schedule_and_both_see_the_same_batches(tiny: str, monkeypatch) -> None:
    trainers = {"A": trainer_of(tiny), "B": trainer_of(tiny)}
    preset = trainers["A"].preset
    seen: dict[str, list] = {"A": [], "B": []}
    order = []
    for label, trainer in trainers.items():

        def step(batches, *, factor, momentum, looping, label=label):
            order.append(label)
            seen[label].append((next(batches), factor, momentum, looping))
            return torch.tensor(float(len(seen[label]))), {}

        monkeypatch.setattr(trainer, "step", step)
    runs = {label: Run(0) for label in trainers}
    batches = workload.synthetic_batches(preset, CPU)
    dossier.take_turns(trainers, runs, iter(batches * 5), 20)
    assert "".join(order) == "ABBA" * 10 and runs["B"].losses == [float(i) for i in range(1, 21)]
    assert len(runs["A"].ms) == len(runs["B"].ms) == 20
    for i, ((batch, *rest), (other, *same)) in enumerate(zip(seen["A"], seen["B"], strict=True)):
        assert batch is other is batches[i % 4] and rest == same
        factor, mu, looping = rest
        assert factor == lr_factor(i / 20, preset.schedule) and mu == momentum(i, preset.optim)
        assert looping == (i / 20 >= preset.schedule.loop_at)
    assert {looping for _, _, _, looping in seen["A"]} == {False, True}


def test_time_belongs_to_who_took_it(tiny: str, monkeypatch) -> None:
    """A takes 1 s a step, B 3 s, the batches 10."""
    now = [0.0]
    monkeypatch.setattr(dossier.time, "perf_counter", lambda: now[0])
    trainers = {"A": trainer_of(tiny), "B": trainer_of(tiny)}
    for trainer, seconds in zip(trainers.values(), (1.0, 3.0), strict=True):

        def step(batches, seconds=seconds, **rest):
            now[0] += seconds
            return torch.tensor(0.0), {}

        monkeypatch.setattr(trainer, "step", step)

    def batches():
        while True:
            now[0] += 10.0
            yield None

    runs = {label: Run(0) for label in trainers}
    dossier.take_turns(trainers, runs, islice(batches(), 6), 6)
    assert runs["A"].ms == [1e3] * 6 and runs["B"].ms == [3e3] * 6


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny"], "b"),
        (["tiny", "pr9"], "unknown preset 'pr9'"),
        (["tiny", "tiny", "--seeds", "1"], "--seeds of 2 or more: got 1"),
        (["tiny", "tiny", "--steps", "7"], "--steps of 8 or more"),
        (["tiny", "tiny", "--window", "0"], "--window above 0"),
        (["tiny", "tiny", "--b-set", "optim.matrix_l=1"], "(nearest: --optim.matrix-lr)"),
        (["tiny", "tiny", "--b-set", "model.vocab_size=400"], "same batches: got model.vocab_size 300 and 400"),
        (["tiny", "tiny", "--b-set", "data.loader=stream"], "same batches: got data.loader documents and stream"),
        (["tiny", "tiny", "--data", "/no/such"], "/no/such"),
        (["tiny", "tiny", "--out", "FULL"], "expected a new or empty folder"),
        (["tiny", "tiny", "--sede", "3"], "unknown option '--sede' (nearest: --seeds)"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tiny: str, tmp_path: Path, words, message: str, capsys) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("kept")
    words = [str(full) if word == "FULL" else word for word in words]
    out = [] if "--out" in words else ["--out", str(tmp_path / "new")]
    assert dossier.command([*words, *out, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "new").exists() and [path.name for path in full.iterdir()] == ["mine"]


def test_without_a_gpu_it_refuses(monkeypatch, tiny: str, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dossier.command(["tiny", "tiny"]) == 2
    assert "expected a CUDA device, found none" in capsys.readouterr().err
