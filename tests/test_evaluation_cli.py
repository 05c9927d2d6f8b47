"""evaluate.py as its user meets it: a number from an artifact and a folder, or one line that says what is wrong."""

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from configs import REFERENCE
from numerics import RANK_NATS, SCORE_NATS
from ranks import one_thread, run_ranks  # noqa: F401

from niblick.artifact.container import ILLEGAL, read_artifact, write_artifact
from niblick.artifact.errors import ArtifactError
from niblick.artifact.quantize import quantize
from niblick.data import shards, sidecar, tokenizer
from niblick.data.errors import DataError
from niblick.evaluation import clock as clock_module
from niblick.evaluation import score as score_module
from niblick.evaluation.clock import Clock
from niblick.evaluation.run import evaluate_model
from niblick.evaluation.validation import ValidationSet, require_own_tokens
from niblick.evaluation.windows import plain_windows
from niblick.kernels.int6_linear import int6_linear_ref
from niblick.model import gpt
from niblick.model.config import ArtifactConfig, EvalConfig, GPTConfig
from niblick.model.gpt import GPT

ROOT = Path(__file__).parents[1]
V = 300
CONFIG = GPTConfig(
    vocab_size=V, num_layers=3, model_dim=128, num_heads=4, num_kv_heads=2, mlp_hidden=128, max_segment=16,
    loop_start=1, loop_end=1, parallel_start=2, **REFERENCE,
)  # fmt: skip


@pytest.fixture(scope="module")
def evaluate():
    sys.path.insert(0, str(ROOT))
    import evaluate

    sys.path.remove(str(ROOT))
    return evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two validation shards (the second cut in mid-document), a tokenizer, an artifact."""
    folder = tmp_path_factory.mktemp("evaluation")
    words = np.random.default_rng(0).choice(["bogey", "par", "eagle", "niblick", "mashie", "spoon", "é"], (40, 12))
    texts = [" ".join(row) for row in words]
    tokenizer.train(texts, V, folder / "tokenizer.model")
    processor = tokenizer.load(folder / "tokenizer.model", V)
    stream = np.concatenate([tokenizer.encode_document(processor, text) for text in texts[:6]])
    shards.write_shard(folder / "toy_val_000000.bin", stream[:50])
    shards.write_shard(folder / "toy_val_000001.bin", stream[50:])
    quantized = quantize(GPT(CONFIG, seed=1).state_dict(), ArtifactConfig(rounding="nearest")).tensors
    write_artifact(folder / "model.nbk", quantized, CONFIG)
    return folder


def options(folder, *more: str) -> list[str]:
    return [str(folder / "model.nbk"), "--data", str(folder), "--max-tokens", "45", "--device", "cpu", *more]


def test_validation_set_counts_the_bytes_of_the_text(folder):
    paths = shards.find_shards(folder, "val")
    data = ValidationSet.load(paths, folder / "tokenizer.model", vocab_size=V)
    processor = tokenizer.load(folder / "tokenizer.model")
    text = tokenizer.decode_documents(processor, data.tokens)
    assert len(data.tokens) == len(data.byte_counts) > 100
    assert data.byte_counts.sum() == len(text) and data.byte_counts[0] == 0
    cut = ValidationSet.load(paths, folder / "tokenizer.model", vocab_size=V, max_tokens=60)
    assert cut.tokens.tolist() == data.tokens[:60].tolist()


def test_prints_and_writes_the_score(evaluate, folder, tmp_path, capsys):
    out = tmp_path / "score.json"
    words = options(folder, "--method", "sliding", "--stride", "5", "--tilt", "--tilt-version", "A", "--out", str(out))
    assert evaluate.command(words) == 0
    lines = out.read_text().splitlines()
    result = json.loads(lines[0])
    assert len(lines) == 1 and result["targets"] == 44 and result["sequence_length"] == 16
    assert result["method"] == "sliding, stride 5" and result["attention"] == "plain" and result["tilt"] == "A"
    # At the start the model knows nothing: about the uniform distribution over the vocabulary.
    assert np.log(V - 30) < result["nats_per_token"] < np.log(V + 30)
    nats = result["bits_per_byte"] * np.log(2) * result["bytes"]
    assert abs(nats / 44 - result["nats_per_token"]) < SCORE_NATS
    shown = capsys.readouterr().out
    assert f"{result['bits_per_byte']:.6f}" in shown and "44" in shown


def test_tail_and_weights_reach_the_scorer(evaluate, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(gpt, "int6_linear", int6_linear_ref)  # interpreted, the kernel takes a minute here
    out = tmp_path / "score.json"
    more = ["--tail", "drop", "--weights", "packed", "--sequence-length", "8", "--max-tokens", "15", "--out", str(out)]
    assert evaluate.command(options(folder, *more)) == 0
    result = json.loads(out.read_text())
    assert result["targets"] == 8 and result["weights"] == "packed" and result["sequence_length"] == 8


def test_methods_give_windows_and_hints_to_the_scorer(monkeypatch):
    from niblick.evaluation import run

    seen = {}

    def score(model, tokens, byte_counts, windows, **options):
        seen.update(windows=windows, **options)
        return run.Score(nll=1.0, n_targets=1, n_bytes=1, seconds=0.0)

    monkeypatch.setattr(run, "score", score)
    data = ValidationSet(np.ones(100, np.uint16), np.ones(100, np.int16))
    model = SimpleNamespace(embedding=torch.zeros(1))
    evaluate_model(model, data, EvalConfig(sequence_length=32, tail="drop"), tilt="B")
    assert seen["windows"] == plain_windows(96, 32) and (seen["hints"].tokens[20:] == 1).all()
    assert (seen["hints"].tokens[:16] == -1).all() and seen["hints"].betas[20] == 2.625
    evaluate_model(model, data, EvalConfig(sequence_length=32), tilt="A")
    assert (seen["hints"].tokens[12:] == 1).all() and seen["hints"].betas[20] == 2.0
    evaluate_model(model, data, EvalConfig(method="sliding", sequence_length=32, stride=8))
    assert len(seen["windows"]) == 10 and seen["hints"] is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methd", "plain"], "unknown option '--methd' (nearest: --method)"),
        (["--tilt", "--tilt-version", "C"], "tilt-version"),
        (["--strid=5"], "unknown option '--strid=5' (nearest: --stride)"),
        (["--method", "sliding", "--stride", "17"], "stride must be in 1..16: got 17"),
        (["--method", "sliding", "--stride", "0"], "stride must be in 1..16: got 0"),
        (["--tail", "drop", "--max-tokens", "16"], "expected at least one target, found none in 16 tokens"),
        (["--max-tokens", "1"], "expected at least 2 held-out tokens, found 1"),
        (["--attention", "fa4"], "model.attention fa4 needs a CUDA device"),
        (["--tokenizer", "nowhere.model"], "nowhere.model: cannot read the tokenizer"),
        (["--data", "nowhere"], "nowhere: no val shards: expected"),
        (["--sequence-length", "-3"], "sequence_length must be in 1..1e+06: got -3"),
        (["--method", "score-fast"], "score-first"),
        (
            ["--method", "score-first", "--stride", "4", "--variant", "pr594"],
            "expected one of pr1413, pr1477, pr1514, pr549, pr461",
        ),
        (["--method", "score-first", "--stride", "4", "--variant", "pr594"], "found pr594 (nearest: pr549)"),
        (
            ["--method", "score-first", "--stride", "4", "--set", "epoch=2"],
            "unknown option '--epoch=2' (nearest: --epochs)",
        ),
        (["--method", "score-first", "--stride", "4", "--set", "momentum=1"], "momentum must be in 0..1: got 1.0"),
        (
            ["--method", "score-first", "--stride", "4", "--weights", "packed"],
            "expected dense weights, which it trains: got packed",
        ),
        (["--variant", "pr549"], "method plain: expected no variant or settings, found pr549"),
        (["--plot", "clock.doc"], "--plot: expected a file of"),
        (["--over-budget", "maybe"], "over-budget"),
    ],
)
def test_bad_options_give_one_line_and_status_2(evaluate, folder, capsys, more, message):
    assert evaluate.command(options(folder, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate.py: ") and error.count("\n") == 1 and message in error


def test_bad_files_give_one_line_and_status_2(evaluate, folder, tmp_path, capsys):
    def refused(*words: str) -> str:
        assert evaluate.command([*words, "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("evaluate.py: ") and error.count("\n") == 1
        return error

    artifact, data = str(folder / "model.nbk"), str(folder)
    assert "No such file" in refused("nowhere.nbk", "--data", data)
    (tmp_path / "cut.nbk").write_bytes((folder / "model.nbk").read_bytes()[:-1])
    assert "cut.nbk: expected" in refused(str(tmp_path / "cut.nbk"), "--data", data)
    shards.write_shard(tmp_path / "big_val_0.bin", np.array([1, V, 2], np.uint16))
    model = str(folder / "tokenizer.model")
    assert f"found {V}" in refused(artifact, "--data", str(tmp_path), "--tokenizer", model)
    assert "expected exactly one tokenizer *.model (or its path), found 0" in refused(artifact, "--data", str(tmp_path))
    shards.write_shard(tmp_path / "big_val_0.bin", np.array([3, 4, 5], np.uint16))
    assert "expected a document start" in refused(artifact, "--data", str(tmp_path), "--tokenizer", model)


def test_case_operators_are_scored_over_the_original_bytes(evaluate, folder, tmp_path, capsys):
    texts = ["The  BOGEY\n\nand the OpenPar", "an Eagle, a NIBLICK \ue004 é"]
    tokenizer.train(texts * 20, V, tmp_path / "case.model", True)
    processor = tokenizer.load(tmp_path / "case.model", V)
    ids, counts = zip(*(sidecar.count_bytes(processor, text) for text in texts), strict=True)
    shard, out = tmp_path / "case_val_000000.bin", tmp_path / "score.json"
    shards.write_shard(shard, np.concatenate(ids))
    words = [str(folder / "model.nbk"), "--data", str(tmp_path), "--device", "cpu", "--out", str(out)]
    beside = sidecar.path_beside(shard)

    def refused(message: str) -> None:
        assert evaluate.command(words) == 2 and not out.exists()
        error = capsys.readouterr().err
        assert error.startswith(f"evaluate.py: {beside}: ") and error.count("\n") == 1 and message in error

    refused("expected the byte counts of case_val_000000.bin, found no such file")
    shards.write_shard(beside, np.concatenate(counts[::-1]))
    refused("not the byte counts of these tokens")
    tokenizer.train(texts * 20 + ["zebra"], V, tmp_path / "other", True)
    sidecar.write(shard, np.concatenate(counts), tmp_path / "other")
    refused("byte counts of another tokenizer")
    sidecar.write(shard, np.concatenate(counts), tmp_path / "case.model")
    assert evaluate.command(words) == 0
    assert json.loads(out.read_text())["bytes"] == sum(len(text.encode()) for text in texts)


def test_cuda_without_a_card_is_refused(evaluate, folder, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert evaluate.command(options(folder, "--device", "cuda")) == 2
    assert "--device cuda: expected a CUDA device, found none" in capsys.readouterr().err


def test_another_tokenizer_is_refused(folder, tmp_path):
    tokenizer.train(["bogey par eagle " * 30], 290, tmp_path / "other.model")
    with pytest.raises(DataError, match="expected a tokenizer of 300 pieces, found 290"):
        ValidationSet.load(shards.find_shards(folder, "val"), tmp_path / "other.model", vocab_size=V)


SCORE_FIRST = ["--method", "score-first", "--stride", "4", "--set", "chunk_rows=16", "learning_rate=0.1"]


def test_score_first_by_name(evaluate, folder, tmp_path, capsys):
    out, plot = tmp_path / "score.json", tmp_path / "clock.svg"
    assert evaluate.command(options(folder, *SCORE_FIRST, "--out", str(out), "--plot", str(plot))) == 0
    result = json.loads(out.read_text())
    assert result["targets"] == 44 and result["partial"] == result["illegal"] == ""
    assert result["method"] == "score-first, pr1413, chunk_rows=16, learning_rate=0.1, stride 4"
    assert result["notes"] == ["adaptation: 2 of 3 chunks trained on, the last one never is"]
    assert result["clock"]["adapt"] > 0 and abs(sum(result["clock"].values()) - result["seconds"]) < 0.01
    shown = capsys.readouterr().out
    assert "2 of 3 chunks" in shown and "adapt " in shown and "s of 600 s" in shown and plot.exists()


def test_what_will_not_fit_is_refused_before_its_long_part(evaluate, folder, tmp_path, monkeypatch, capsys):
    token_nll, calls = score_module.token_nll, []

    def slow(*arguments):
        calls.append(time.sleep(0.05))
        return token_nll(*arguments)

    monkeypatch.setattr(score_module, "token_nll", slow)
    monkeypatch.setattr(clock_module, "process_age_s", lambda: None)
    out = tmp_path / "score.json"
    words = ["--method", "sliding", "--stride", "1", "--tokens-per-batch", "16", "--out", str(out)]
    assert evaluate.command(options(folder, *words, "--budget-s", "1")) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("evaluate.py: expected an evaluation within 1 s: ") and shown.err.count("\n") == 1
    assert shown.out == "" and not out.exists() and len(calls) < 10
    monkeypatch.undo()
    assert evaluate.command(options(folder, *words, "--budget-s", "1", "--over-budget", "run")) == 0
    assert "OVER THE BUDGET" in capsys.readouterr().out and json.loads(out.read_text())["targets"] == 44


@pytest.mark.parametrize("interrupted", [True, False], ids=["interrupted", "the budget ends"])
def test_what_is_scored_is_kept_and_marked(evaluate, folder, tmp_path, monkeypatch, capsys, interrupted):
    """Ctrl-C, or a budget that ends though it was foreseen to suffice."""
    token_nll, calls = score_module.token_nll, []

    def later(*arguments):
        calls.append(1)
        if len(calls) == 3 and interrupted:
            signal.raise_signal(signal.SIGINT)
        elif len(calls) == 3:
            monkeypatch.setattr(Clock, "elapsed_s", 1e6)
        return token_nll(*arguments)

    monkeypatch.setattr(score_module, "token_nll", later)
    monkeypatch.setattr(Clock, "foresee", lambda *_: None)
    out = tmp_path / "score.json"
    status = evaluate.command(options(folder, "--tokens-per-batch", "8", "--sequence-length", "8", "--out", str(out)))
    result, shown = json.loads(out.read_text()), capsys.readouterr()
    assert status == (130 if interrupted else 2) and result["targets"] == 24
    assert result["partial"] == ("interrupted" if interrupted else "the budget of 600 s ended")
    assert shown.err == f"evaluate.py: {result['partial']} after 24 targets: no score\n" and "PARTIAL" in shown.out


def in_a_rank(rank: int, folder: Path, out: Path) -> tuple[int, str]:
    sys.path.insert(0, str(ROOT))
    import evaluate

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        status = evaluate.command(options(folder, *SCORE_FIRST, "--out", str(out / f"{rank}.json")))
    with contextlib.redirect_stderr(shown):
        return status + evaluate.command(options(folder, "--stride", "-1", "--method", "sliding")), shown.getvalue()


def test_ranks_share_the_work_and_one_of_them_speaks(evaluate, folder, tmp_path):
    first, second = run_ranks(in_a_rank, 2, folder, tmp_path)
    assert first[0] == second[0] == 2 and "bits per byte" in first[1] and "stride must be in" in first[1]
    assert second[1] == "" and [path.name for path in tmp_path.iterdir()] == ["0.json"]
    evaluate.command(options(folder, *SCORE_FIRST, "--out", str(tmp_path / "alone.json")))
    two, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("0", "alone"))
    assert two["ranks"] == 2 and abs(two["nats_per_token"] - one["nats_per_token"]) < RANK_NATS / 44
    assert [two[name] for name in ("targets", "bytes")] == [one[name] for name in ("targets", "bytes")]


def in_a_rank_whose_file_is_missing(rank: int, folder: Path) -> tuple[int, str]:
    sys.path.insert(0, str(ROOT))
    import evaluate

    evaluate.PATIENCE_S, said = 0.5, io.StringIO()
    if rank == 0:
        return 0, ""
    with contextlib.redirect_stderr(said):
        return evaluate.command(["absent.nbk", "--data", str(folder)]), said.getvalue()


def test_a_rank_that_fails_alone_says_so_itself(folder):
    _, (status, said) = run_ranks(in_a_rank_whose_file_is_missing, 2, folder)
    assert status == 2 and said.startswith("rank 1: evaluate.py: ") and "absent.nbk" in said and said.count("\n") == 1


def test_what_a_method_does_not_read_is_refused(evaluate, folder, capsys):
    for words in (["--tail", "drop"], ["--stride", "8"], ["--sequence-length", "16"], ["--tokens-per-batch", "99"]):
        assert evaluate.command(options(folder, "--method", "phased", *words)) == 2
        error = capsys.readouterr().err
        assert error == f"evaluate.py: {words[0]}: expected another method, phased has no such setting\n"
    assert evaluate.command(options(folder, "--stride", "8")) == 2  # plain has windows, but no stride


def test_an_end_before_the_first_target_is_no_score(evaluate, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "run", lambda *_: score_module.Score(0.0, 0, 0, 1.0, "interrupted"))
    assert evaluate.command(options(folder, "--out", str(tmp_path / "score.json"))) == 2
    assert capsys.readouterr().err == "evaluate.py: interrupted, before anything was scored\n"
    assert not (tmp_path / "score.json").exists()


@pytest.mark.parametrize("container", ["niblick", "brotli", "groups_brotli"])
def test_an_artifact_that_was_trained_on_validation_says_so(evaluate, folder, tmp_path, capsys, container):
    settings = ArtifactConfig(rounding="nearest", container=container)
    path, out = tmp_path / "illegal.nbk", tmp_path / "score.json"
    quantized = quantize(GPT(CONFIG, seed=1).state_dict(), settings).tensors
    write_artifact(path, quantized, CONFIG, None, settings, trained_on_validation=True)
    assert read_artifact(path).trained_on_validation and not read_artifact(folder / "model.nbk").trained_on_validation
    if container == "niblick":
        words = [str(path), *options(folder)[1:], "--out", str(out)]
        assert evaluate.command(words) == 0 and json.loads(out.read_text())["illegal"] == ILLEGAL
        assert "ILLEGAL: trained on the validation stream" in " ".join(capsys.readouterr().out.split())
    unmarked = bytearray(path.read_bytes())
    unmarked[11] &= 0x7F
    path.write_bytes(unmarked)
    with pytest.raises(ArtifactError, match="damaged: expected a body with SHA-256"):
        read_artifact(path)


def test_shards_of_another_tokenizer_are_refused(tmp_path):
    """Of the same size, so that every id is one of its own."""
    lists = ["fairway bunker links putter green caddie driver", "the quick brown fox jumps over a lazy dog again"]
    texts = [[" ".join(row) for row in np.random.default_rng(1).choice(words.split(), (40, 9))] for words in lists]
    mine, other = tmp_path / "mine.model", tmp_path / "other.model"
    for part, path in zip(texts, (mine, other), strict=True):
        tokenizer.train(part, 310, path)
    stream = np.concatenate([tokenizer.encode_document(tokenizer.load(mine), text) for text in texts[0]])
    require_own_tokens(stream, mine, 1, "toy.bin")
    require_own_tokens(stream[:30], other, 1, "toy.bin")  # too short to tell
    with pytest.raises(DataError, match=r"toy\.bin: expected shards of the tokenizer .*other\.model: of their first"):
        require_own_tokens(stream, other, 1, "toy.bin")


def test_streams_of_odd_shapes(evaluate, folder, tmp_path, capsys):
    """Documents of one token, one longer than its shard, and nothing at all."""
    shard, model = tmp_path / "odd_val_000000.bin", str(folder / "tokenizer.model")
    data = [str(folder / "model.nbk"), "--data", str(tmp_path), "--device", "cpu", "--tokenizer", model]
    letters = tokenizer.encode_document(tokenizer.load(model), "bogey par eagle")[1:]
    shards.write_shard(shard, np.concatenate([[1, 1, 1], letters, [1, 1]]).astype(np.uint16))
    shards.write_shard(tmp_path / "odd_val_000001.bin", np.concatenate([letters, letters]).astype(np.uint16))
    out = tmp_path / "score.json"
    for method in (["--method", "plain"], SCORE_FIRST):
        assert evaluate.command([*data, *method, "--out", str(out)]) == 0
        assert json.loads(out.read_text())["targets"] == 4 + 3 * len(letters)
    (tmp_path / "odd_val_000001.bin").unlink()
    for tokens, message in (
        ([], "expected a document start (BOS, id 1), found none in 0 tokens"),
        ([1], "expected at least 2 held-out tokens, found 1"),
        ([1, 1, 1], "bits per byte: expected at least one byte of scored text, found 0"),
    ):
        shards.write_shard(shard, np.array(tokens, np.uint16))
        capsys.readouterr()
        assert evaluate.command(data) == 2
        error = capsys.readouterr().err
        assert error.startswith("evaluate.py: ") and error.count("\n") == 1 and message in error


def test_as_a_command(folder):
    """A process of its own ends with status 2, nothing on stdout and no traceback."""
    command = [sys.executable, str(ROOT / "evaluate.py"), str(folder / "model.nbk"), "--weigths", "packed"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "evaluate.py: unknown option '--weigths' (nearest: --weights)\n"
