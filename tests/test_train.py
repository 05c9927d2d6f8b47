"""train.py as a user runs it: the whole job on a small corpus, several ranks, a kill, and every kind of bad input."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from configs import REFERENCE
from numerics import assert_close_f32
from ranks import one_thread  # noqa: F401
from safetensors.torch import load_file

from niblick.artifact.bundle import bundle
from niblick.artifact.fill import SLACK
from niblick.data import command_line
from niblick.data.errors import DataError
from niblick.data.prepare import prepare
from niblick.data.shards import HEADER_BYTES, write_shard
from niblick.kernels.ngram_bias import ngram_bias_ref
from niblick.kernels.softcapped_ce import softcapped_ce_ref
from niblick.model.config import ConfigError
from niblick.model.runlog import RunLog

ROOT = Path(__file__).resolve().parents[1]
PIECES, HELD_OUT = 300, 150
SMALL = f"""--model.vocab-size {PIECES} --model.num-layers 4 --model.model-dim 128 --model.num-heads 2
    --model.num-kv-heads 1 --model.mlp-hidden 128 --model.loop-start 1 --model.loop-end 1 --model.parallel-start 2
    --model.max-segment 64 --batch.tokens-per-step 256 --batch.tokens-per-micro-step 256
    --evaluation.sequence-length 64 --data.max-val-tokens {HELD_OUT}
    --artifact.calibration-batches 2 --artifact.calibration-tokens 512
    --run.device cpu --schedule.budget-s 3600""".split()


FIELDS = [*(f"--model.{name.replace('_', '-')}" for name in REFERENCE), "--optim.newton-schulz-impl"]
PLAIN = [word for field in FIELDS for word in (field, "reference")]
"""Hundreds of steps of interpreted Triton kernels would take minutes; they have tests of their own."""


bundle_once = cache(bundle)  # most of a second


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Fifty documents with some structure: enough for a tokenizer and for both sides of the split."""
    folder = tmp_path_factory.mktemp("corpus")
    words = "the quick brown fox jumps over a lazy dog while seven small models learn to count bytes".split()
    rng = np.random.default_rng(0)
    for i in range(50):
        lines = [" ".join(rng.choice(words, 12)) + f" {rng.integers(1000)}." for _ in range(12)]
        (folder / f"{i:02}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def train(corpus: Path, tmp_path: Path, capsys, monkeypatch):
    """Runs train.py here; returns status, stdout, stderr."""
    script = load_script("train")
    monkeypatch.setattr("niblick.evaluation.score.softcapped_ce", softcapped_ce_ref)  # or a second a score
    monkeypatch.setattr(script, "bundle", bundle_once)

    def run(*words: str) -> tuple[int, str, str]:
        options = ["--data.source", str(corpus), "--data.cache", str(corpus.parent / "cache")]
        status = script.command(["demo", *SMALL, *PLAIN, *options, "--run.out", str(tmp_path / "out"), *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    run.script = script
    return run


def prepared_folder(corpus: Path) -> Path:
    """The one prepared folder that holds what a run was given: HELD_OUT held-out tokens."""
    size = HEADER_BYTES + 2 * HELD_OUT
    folders = [p.parent for p in (corpus.parent / "cache").glob("*/niblick_val_*.bin") if p.stat().st_size == size]
    assert len(folders) == 1, folders
    return folders[0]


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_whole_job(train, tmp_path: Path) -> None:
    status, out, err = train("--schedule.max-steps", "40", "--optim.ema-decay", "0.5")
    assert (status, err) == (0, "")
    log = records(tmp_path / "out")
    first, last = log[0], log[-1]
    assert first["event"] == "start" and first["config"]["model"]["vocab_size"] == PIECES
    assert {"torch", "triton", "python", "device", "commit"} <= first.keys()
    assert [r["event"] for r in log[:3]] == ["start", "ready", "step"] and log[1]["process_age_s"] > 0
    bits = last["bits_per_byte"]
    assert bits["after reload"] == bits["after quantisation"] != bits["before quantisation"]
    assert bits["after reload"] < last["yardsticks"]["token unigram"] - 0.5
    steps = [r for r in log if r["event"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 41)) and steps[-1]["loss"] < steps[0]["loss"]
    assert last["model_bytes"] == (tmp_path / "out" / "artifact.nbk").stat().st_size
    assert last["code_bytes"] == (tmp_path / "out" / "niblick.pyz").stat().st_size < 200_000
    for heading in (
        "bits per byte",
        "token unigram",
        "xz -9e",
        "ms/step",
        "left of 16,000,000",
        "training and calibration",
    ):
        assert heading in out
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.endswith(".tmp")]


def test_ngram_tables_in_the_artifact(train, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("niblick.model.ngram_tables.ngram_bias", ngram_bias_ref)
    words = "--schedule.max-steps 1 --ngram-bias.mode sum --ngram-bias.rows 64 --ngram-bias.at-evaluation artifact"
    status, out, err = train(*words.split())
    assert (status, err) == (0, "") and "n-gram tables, training and calibration" in out and "ngram_bias" in out
    last = records(tmp_path / "out")[-1]
    bits = last["bits_per_byte"]
    assert bits["after reload"] == bits["after quantisation"] < last["yardsticks"]["token unigram"] - 0.5
    for more, reason in (
        ("--artifact.container brotli", "expected artifact.container niblick, found brotli"),
        (f"--artifact.cap-bytes {len(train.script.code()) + 500}", "that model and tables may take, found"),
        ("--model.asymmetric-softcap", "expected one softcap, found model.asymmetric_softcap"),
        ("--evaluation.method phased", "evaluation.method phased expected ngram_bias.at_evaluation drop: got artifact"),
    ):
        status, _, err = train(*words.split(), *more.split())
        assert status == 2 and err.count("\n") == 1 and reason in err, err


def test_the_end_is_kept_and_packed_again_without_training(train, tmp_path: Path) -> None:
    words = ["--schedule.max-steps", "3", "--run.checkpoint-every-s", "1000"]
    assert train(*words)[0] == 0 and (tmp_path / "out/checkpoint.safetensors").exists()
    first = records(tmp_path / "out")[-1]
    assert train(*words, "--resume", "--artifact.rounding", "trellis8")[0] == 0
    again = records(tmp_path / "out")[-1]
    assert again["step"] == first["step"] == 3 and again["model_bytes"] != first["model_bytes"]
    assert again["bits_per_byte"]["before quantisation"] == first["bits_per_byte"]["before quantisation"]


def test_a_method_that_cannot_score_the_model_is_refused_before_training(train, tmp_path: Path) -> None:
    words = "--schedule.max-steps 1 --evaluation.method phased --evaluation.set sgd_segment=4096"
    status, _, err = train(*words.split())
    assert status == 2 and err.count("\n") == 1 and "sgd_segment must be at most the model's 64" in err
    assert not (tmp_path / "out").exists()


def test_the_target_is_filled_or_refused(train, tmp_path: Path) -> None:
    steps = ["--schedule.max-steps", "1"]
    status, _, err = train(*steps, "--artifact.target-bytes", "1")
    assert status == 2 and err.count("\n") == 1 and "expected a clip for which the model takes at most" in err
    assert not (tmp_path / "out/artifact.nbk").exists()
    code = len(train.script.code())
    target = code + 120_000
    status, out, err = train(*steps, "--artifact.target-bytes", str(target), "--artifact.rounding", "trellis8")
    assert (status, err) == (0, "") and "filling up to the target gained" in out
    assert 0 <= target - code - (tmp_path / "out/artifact.nbk").stat().st_size <= SLACK
    bits = records(tmp_path / "out")[-1]["bits_per_byte"]
    assert bits["with the clips given"] != bits["after quantisation"] == bits["after reload"]


def test_the_average_is_what_is_scored_and_shipped(train, tmp_path: Path) -> None:
    """An average that hardly moves is the initial model, however well the weights themselves have learned."""
    train("--schedule.max-steps", "40", "--optim.ema-decay", "0.999999")
    last = records(tmp_path / "out")[-1]
    assert last["bits_per_byte"]["before quantisation"] > last["yardsticks"]["token unigram"]


def test_score_after_reload_is_that_of_the_file(train, tmp_path: Path, monkeypatch) -> None:
    load_model = train.script.load_model

    def load_and_spoil(path, *words, **options):
        model, rung = load_model(path, *words, **options)
        model.embedding.data.zero_()
        return model, rung

    monkeypatch.setattr(train.script, "load_model", load_and_spoil)
    train("--schedule.max-steps", "3")
    bits = records(tmp_path / "out")[-1]["bits_per_byte"]
    assert bits["after reload"] != bits["after quantisation"]


def test_a_failure_after_training_does_not_lose_the_artifact(train, tmp_path: Path, monkeypatch) -> None:
    def fail(*_, **__):
        raise DataError("no score today")

    monkeypatch.setattr(train.script, "evaluate_model", fail)
    status, _, err = train("--schedule.max-steps", "2")
    assert status == 2 and err == "train.py: no score today\n" and (tmp_path / "out/artifact.nbk").exists()


def test_a_fresh_run_moves_the_files_of_another_aside(train, tmp_path: Path, monkeypatch) -> None:
    words, out = ["--schedule.max-steps", "3", "--run.checkpoint-every-s", "1e-6"], tmp_path / "out"
    files = ("checkpoint.safetensors", "artifact.nbk", "niblick.pyz")
    train(*words)
    assert all((out / file).exists() for file in files)

    def stop(*_):
        raise OSError("stopped before its own files")

    with monkeypatch.context() as changed:
        changed.setattr(train.script, "run_clock", stop)
        assert train(*words)[0] == 2
    assert not any((out / file).exists() for file in files)
    assert all((out / f"previous.{file}").exists() for file in files)
    status, _, err = train(*words, "--resume")
    assert status == 2 and "--resume expected a checkpoint" in err


def test_artifact_scores_the_same_through_evaluate(train, corpus: Path, tmp_path: Path, capsys) -> None:
    train("--schedule.max-steps", "2")
    prepared = prepared_folder(corpus)
    words = [
        str(tmp_path / "out/artifact.nbk"),
        "--data",
        str(prepared),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "score.json"),
    ]
    assert load_script("evaluate").command(words) == 0
    got = json.loads((tmp_path / "score.json").read_text())["bits_per_byte"]
    assert got == records(tmp_path / "out")[-1]["bits_per_byte"]["after reload"]
    prepare(corpus, tmp_path / "other", vocab_size=PIECES, held_out=0.5)
    assert load_script("evaluate").command([*words[:1], "--data", str(tmp_path / "other"), *words[3:]]) == 2
    assert "artifact.nbk: expected its tokenizer, SHA-256" in capsys.readouterr().err


def command(corpus: Path, out: Path, *words: str) -> list[str]:
    return [
        "train.py",
        "demo",
        *SMALL,
        "--data.source",
        str(corpus),
        "--data.cache",
        str(corpus.parent / "cache"),
        "--run.out",
        str(out),
        *words,
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}


STEADY = ["--schedule.budget-s", "600", "--schedule.loop-at", "0", "--schedule.min-lr", "1"]
"""The clock decides nothing: the same steps give the same weights however long they take."""


def start(words: list[str]) -> None:
    subprocess.run(words, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=300)


def test_two_ranks_equal_one_that_accumulates(train, corpus: Path, tmp_path: Path) -> None:
    """The whole job under torchrun; test_distributed.py has the rest. (Deterministic algorithms give the same.)"""
    shared = ["--batch.tokens-per-step", "512", "--schedule.max-steps", "4", "--run.checkpoint-every-s", "1e-6"]
    shared += ["--optim.grad-clip", "0.02", *STEADY]
    assert train(*shared)[0] == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start([sys.executable, *torchrun, *command(corpus, tmp_path / "two", *PLAIN, *shared, "--run.deterministic")])
    one, two = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("out", "two"))
    assert one.keys() == two.keys()
    for name in one:
        if name.startswith(("model.", "ema.")):
            assert_close_f32(name, two[name], one[name])


def two_ranks(words: list[list[str]]) -> list[subprocess.Popen]:
    """One process a list of words, without torchrun, which would end the one when the other ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} | place for r in range(2)]
    return [
        subprocess.Popen([sys.executable, *w], env=environment() | r, **options)
        for w, r in zip(words, ranks, strict=True)
    ]


def wait_for(path: Path) -> None:
    deadline = time.time() + 120
    while time.time() < deadline and not path.exists():
        time.sleep(0.1)


def test_a_rank_that_is_ended_ends_the_other_with_a_line_each(corpus: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "out/checkpoint.safetensors"
    words = command(corpus, tmp_path / "out", "--batch.tokens-per-step", "512", "--run.checkpoint-every-s", "0.01")
    first, second = two_ranks([words, words])
    wait_for(checkpoint)
    second.send_signal(signal.SIGTERM)
    end = time.time()
    left = f"the last checkpoint is {checkpoint}\n"
    assert second.communicate(timeout=60)[1] == f"train.py: rank 1: terminated; {left}" and second.returncode == 1
    err = first.communicate(timeout=60)[1]
    assert err.startswith("train.py: rank 0: lost contact with another rank (") and err.endswith(left)
    assert err.count("\n") == 1 and first.returncode == 1 and time.time() - end < 20
    assert load_file(checkpoint)
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.endswith(".tmp")]


def test_ranks_with_other_settings_or_data_never_start(corpus: Path, tmp_path: Path) -> None:
    words = command(corpus, tmp_path / "out", "--batch.tokens-per-step", "512")
    first, second = two_ranks([words, [*words, "--optim.matrix-lr", "0.5"]])
    line = "train.py: rank 1 has optim.matrix_lr = 0.5: expected 0.026 as on rank 0\n"
    assert (first.communicate(timeout=60)[1], first.returncode) == (line, 2)
    assert (second.communicate(timeout=60)[1], second.returncode) == ("", 2)
    assert not (tmp_path / "out").exists()


def test_the_listing_of_the_data_is_compared(train, monkeypatch) -> None:
    facts = []
    monkeypatch.setattr(train.script, "require_agreement", facts.append)
    assert train("--schedule.max-steps", "1")[0] == 0
    assert facts[0]["optim.matrix_lr"] == 0.026 and not {"run.out", "data.cache"} & facts[0].keys()
    assert re.fullmatch(r"\d+ bytes", facts[1]["data file niblick_train_000000.bin"]) and "tokenizer" in facts[1]


def test_ranks_that_resume_from_different_checkpoints_are_refused(train, monkeypatch) -> None:
    """`run.out` may be another folder on another machine, with a checkpoint of another step."""
    words = ["--schedule.max-steps", "2", "--run.checkpoint-every-s", "1e-6"]
    assert train(*words)[0] == 0
    facts = []
    monkeypatch.setattr(train.script, "require_agreement", facts.append)
    assert train(*words, "--resume")[0] == 0
    assert facts[-1]["step of the checkpoint"] == 2 and "cursor of the checkpoint" in facts[-1]


UNFORESEEN = """
import atexit, runpy, sys
import torch.distributed as dist
from niblick.data import command_line

def fail(*_):
    raise ValueError("unforeseen")

command_line.guarded = fail
dist.is_initialized = lambda: True
atexit.register(print, "teardown")
sys.argv = ["train.py"]
runpy.run_path("train.py", run_name="__main__")
"""


def test_an_unforeseen_error_leaves_the_other_ranks_at_once() -> None:
    """With its traceback, and without the teardown of the group, which would wait for them."""
    done = subprocess.run(
        [sys.executable, "-c", UNFORESEEN], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stderr.endswith("ValueError: unforeseen\n") and not done.stdout


def test_killed_run_goes_on_from_its_checkpoint_to_the_same_artifact(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = [sys.executable, *command(corpus, out, *STEADY, "--run.checkpoint-every-s", "0.05")]
    process = subprocess.Popen(run, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    wait_for(out / "checkpoint.safetensors")
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = [r["step"] for r in records(out) if r["event"] == "checkpoint"]
    assert saved, "the run was killed before it wrote a checkpoint"
    end = ["--schedule.max-steps", str(saved[-1] + 3)]
    start([*run, *end, "--resume"])
    start([sys.executable, *command(corpus, tmp_path / "whole", *STEADY, *end)])
    # The record is written after the file: a kill in between leaves a checkpoint further on than the log says.
    steps = [r["step"] for r in records(out) if r["event"] == "step"]
    assert steps[0] > saved[-1] and steps == list(range(steps[0], saved[-1] + 4))
    assert (out / "artifact.nbk").read_bytes() == (tmp_path / "whole/artifact.nbk").read_bytes()
    assert len(list(out.glob("log*.jsonl"))) == 2, "the log of the killed run is kept"


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(train, corpus: Path, tmp_path: Path) -> Path:
    """A folder of ready shards with their tokenizer."""
    prepared = prepare(corpus, corpus.parent / "for_shards", vocab_size=PIECES)
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in (*prepared.train, *prepared.val, prepared.tokenizer):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edit_header(path: Path, index: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[4 * index : 4 * index + 4] = value.to_bytes(4, "little")
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def replace_tokens(path: Path, value: int, everywhere: bool) -> None:
    tokens = np.fromfile(path, np.uint16, offset=HEADER_BYTES)
    tokens[:: 1 if everywhere else 400] = value
    write_shard(path, tokens)


DAMAGE = {
    "truncated": (cut, "train_000000.bin: expected .* bytes"),
    "magic": (lambda p: edit_header(p, 0, 7), "20240520"),
    "count": (lambda p: edit_header(p, 2, 5), "expected"),
    "no BOS": (lambda p: replace_tokens(p, 9, True), "train_000000.bin: expected .*BOS"),
    "id beyond the vocabulary": (lambda p: replace_tokens(p, 5000, False), "5000"),
}


def assert_refused(result: tuple[int, str, str], pattern: str, out: Path) -> None:
    status, _, err = result
    assert status == 2, err
    assert err.count("\n") == 1 and err.startswith("train.py: ") and "Traceback" not in err, err
    assert re.search(pattern, err), err
    left = [p.name for p in out.iterdir()] if out.exists() else []
    assert "artifact.nbk" not in left and not [name for name in left if name.endswith(".tmp")], left


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_shard(train, shards: Path, tmp_path: Path, kind: str) -> None:
    damage, pattern = DAMAGE[kind]
    damage(shards / "niblick_train_000000.bin")
    result = train("--data.source", str(shards), "--schedule.max-steps", "2", "--run.checkpoint-every-s", "0")
    assert_refused(result, pattern, tmp_path / "out")


def test_empty_folder(train, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(train("--data.source", str(tmp_path / "empty")), "empty.*found none", tmp_path / "out")


def test_tokenizer_of_another_size(train, shards: Path, tmp_path: Path) -> None:
    result = train("--data.source", str(shards), "--model.vocab-size", "512")
    assert_refused(result, f"tokenizer.model.*512.*{PIECES}", tmp_path / "out")


def test_no_held_out_text(train, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "only one document " * 300}) + "\n")
    result = train(
        "--data.source",
        str(tmp_path / "one.jsonl"),
        "--model.vocab-size",
        "280",
        "--data.cache",
        str(tmp_path / "cache"),
    )
    assert_refused(result, "held-out", tmp_path / "out")


def test_full_disk_keeps_what_was_there(train, tmp_path: Path, monkeypatch) -> None:
    train("--schedule.max-steps", "1")
    before = (tmp_path / "out/artifact.nbk").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    status, _, err = train("--schedule.max-steps", "1", "--run.checkpoint-every-s", "0")
    assert status == 2 and err.count("\n") == 1 and "artifact.nbk: No space left on device" in err
    assert (tmp_path / "out/previous.artifact.nbk").read_bytes() == before
    assert not list((tmp_path / "out").glob("artifact.nbk*"))


def test_unknown_option_and_preset_name_the_nearest(train, tmp_path: Path) -> None:
    assert_refused(train("--optim.matrx-lr", "1"), "nearest: --optim.matrix-lr", tmp_path / "out")
    assert_refused(train("--run.device", "gpu"), "'gpu'.*--run.device.*cuda", tmp_path / "out")
    with pytest.raises(ConfigError, match="nearest: pr1855"):
        train.script.parse_preset(["pr1885"])
    with pytest.raises(ConfigError, match="expected the preset before all options: got pr1855"):
        train.script.parse_preset(["--run.seed", "1", "pr1855"])
    assert train.script.parse_preset(["--run.seed", "1", "--run.out", "pr1855"])[1].run.out == "pr1855"


def test_messages_are_one_line_on_a_terminal_too() -> None:
    coloured = "\x1b[31m╭─\x1b[0m Invalid ─╮\n\x1b[31m│\x1b[0m bad value \x1b[31m│\x1b[0m\n│ ───── │\n│ help │\n╰─╯"
    assert command_line._without_box(coloured) == "bad value"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_preset_without_gpu(tmp_path: Path, capsys) -> None:
    assert load_script("train").command(["pr1855", "--run.out", str(tmp_path / "out")]) == 2
    assert "expected a CUDA device, found none" in capsys.readouterr().err


def test_budget_shorter_than_a_step(train, tmp_path: Path) -> None:
    result = train("--schedule.budget-s", "0.001", "--schedule.reserve-s", "0")
    assert_refused(result, "at least one step", tmp_path / "out")


def test_impossible_settings_never_start(train, tmp_path: Path) -> None:
    assert_refused(train("--evaluation.sequence-length", "0"), "sequence_length must be in 1", tmp_path / "out")
    assert_refused(train("--run.compile", "on"), "run.compile expected flash attention", tmp_path / "out")


def test_malformed_line_is_named_while_the_tokenizer_trains(train, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "one line of text"}) + "\nnot json\n")
    result = train("--data.source", str(tmp_path / "bad.jsonl"), "--data.cache", str(tmp_path / "cache"))
    assert_refused(result, r"^train.py: \S*bad.jsonl:2: ", tmp_path / "out")


def test_interruption_is_one_line_and_status_130(train, monkeypatch) -> None:
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.script, "prepare_data", interrupt)
    assert train() == (130, "", "train.py: interrupted\n")


class FullDisk:
    closed = False

    def write(self, _: str) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        self.closed = True


def test_full_disk_for_the_log_costs_the_log_alone(tmp_path: Path, capsys) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.write("start")
    log._file = FullDisk()
    log.write("step")
    log.write("step")
    err = capsys.readouterr().err
    assert err == f"cannot write {tmp_path / 'log.jsonl'}: No space left on device; going on without it\n"


def test_batch_that_does_not_divide(train, tmp_path: Path) -> None:
    assert_refused(train("--batch.tokens-per-step", "300"), "multiple of .*256 x 1.*300", tmp_path / "out")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_do_not_divide_the_batch(train, tmp_path: Path, monkeypatch, rank: str) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    words = ["--batch.tokens-per-step", "1024"]
    if rank == "0":
        assert_refused(train(*words), "multiple of .*256 x 3.*1024", tmp_path / "out")
        return
    with pytest.raises(SystemExit) as ended:  # rank 0 says why
        train(*words)
    assert ended.value.code == 2
