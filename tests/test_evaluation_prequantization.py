"""Training on the validation stream before quantisation: what it computes, and that nothing it makes hides it."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from configs import REFERENCE
from numerics import SCORE_NATS
from ranks import one_thread  # noqa: F401

from niblick.artifact.container import ILLEGAL, read_artifact
from niblick.evaluation.audit_own import tiny_model
from niblick.evaluation.prequantization import PR1423, PrequantizationConfig, train_on_validation
from niblick.kernels.softcapped_ce import softcapped_ce_ref
from niblick.model.config import ConfigError, EvalConfig
from niblick.model.errors import TrainingStopped

ROOT = Path(__file__).resolve().parents[1]
ROWS = {"attention_span": "rows", "smear": "none", "num_layers": 3, "loop_end": 1, "parallel_start": 2}
L = 8
EVALUATION = EvalConfig(sequence_length=L, tokens_per_batch=20)
SETTINGS = PrequantizationConfig(epochs=3, frozen_blocks=1, sequences_per_step=2, learning_rate=0.01)


def make_tokens(n: int = 45) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(2, 64, n).astype(np.uint16)
    tokens[[0, 11, 20]] = 1
    return tokens


def brute_force(model, tokens: np.ndarray, s: PrequantizationConfig) -> list[float]:
    """The mean loss of each epoch by the definitions; the model is left trained."""
    sequences = [tokens[i : i + L + 1].astype(np.int64) for i in range(0, (len(tokens) - 1) // L * L, L)]
    named, losses, step = list(model.named_parameters()), [], 0
    m, v = ({name: torch.zeros_like(p) for name, p in named} for _ in range(2))
    for epoch in range(s.epochs):
        low = s.last_rate * s.learning_rate
        rate = low + (s.learning_rate - low) * (1 + math.cos(math.pi * epoch / s.epochs)) / 2
        seen = []
        for first in range(0, len(sequences), s.sequences_per_step):
            each = []
            for x in map(torch.from_numpy, sequences[first : first + s.sequences_per_step]):
                z = model.head(model.hidden(x[:-1], torch.tensor([0, L], dtype=torch.int32)))
                each.append(F.cross_entropy(30 * torch.tanh(z / 30), x[1:]))
            seen += [loss.item() for loss in each]
            found = torch.autograd.grad(torch.stack(each).mean(), [p for _, p in named])
            grads = {name: g for (name, _), g in zip(named, found, strict=True)}
            for name, g in grads.items():
                layers = model.config.num_layers
                if name in ("qo_bank", "kv_bank"):
                    g[[0, layers]] = 0
                elif name not in ("embedding", "skip_weights", "skip_gates"):
                    g[0] = 0
            norm = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
            step += 1
            for name, p in named:
                g = grads[name] * min(1.0, s.clip / (norm + 1e-6))
                m[name].mul_(0.9).add_(0.1 * g)
                v[name].mul_(0.999).add_(0.001 * g * g)
                p.data -= rate * (m[name] / (1 - 0.9**step)) / ((v[name] / (1 - 0.999**step)).sqrt() + 1e-8)
        losses.append(sum(seen) / len(seen))
    return losses


def test_equal_to_brute_force():
    tokens, ours, theirs = make_tokens(), tiny_model(**ROWS), tiny_model(**ROWS)
    start, lines = {name: p.clone() for name, p in ours.state_dict().items()}, []
    found = train_on_validation(ours, tokens, EVALUATION, SETTINGS, lines.append)
    expected = brute_force(theirs, tokens, SETTINGS)
    assert np.abs(np.array(found) - expected).max() < SCORE_NATS and found[-1] < found[0] - 0.5
    for name, p in theirs.state_dict().items():
        assert (p - ours.state_dict()[name]).abs().max() < SCORE_NATS, name
    assert torch.equal(ours.mlp_up_bank[0], start["mlp_up_bank"][0])
    assert not torch.equal(ours.mlp_up_bank[1], start["mlp_up_bank"][1])
    assert len(lines) == 3 and all(line.startswith("ILLEGAL training on the validation stream") for line in lines)
    assert not ours.training and ours.embedding.grad is None


def test_published_settings():
    assert PR1423 == PrequantizationConfig(5e-4, 0.1, epochs=6, frozen_blocks=2, clip=1.0)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ConfigError, match="expected at least one target, found none in 8 tokens"):
        train_on_validation(tiny_model(**ROWS), make_tokens(45)[:8], EVALUATION)
    model = tiny_model(**ROWS)
    model.embedding.data[5] = float("inf")
    with pytest.raises(TrainingStopped, match="a gradient's norm is nan"):
        train_on_validation(model, make_tokens(), EVALUATION, SETTINGS)


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_that_asks_for_it_is_marked_everywhere(tmp_path, monkeypatch, capsys):
    """With score-first SGD at its end, which is shown beside the score without."""
    monkeypatch.setattr("niblick.evaluation.score.softcapped_ce", softcapped_ce_ref)
    words = "the quick brown fox jumps over a lazy dog while seven small models learn to count bytes".split()
    generator = np.random.default_rng(0)
    (tmp_path / "corpus").mkdir()
    for i in range(30):
        text = "\n".join(" ".join(generator.choice(words, 12)) + f" {generator.integers(1000)}." for _ in range(12))
        (tmp_path / "corpus" / f"{i:02}.txt").write_text(text)
    options = f"""demo --model.vocab-size 300 --model.num-layers 4 --model.model-dim 128 --model.num-heads 2
        --model.num-kv-heads 1 --model.mlp-hidden 128 --model.loop-start 1 --model.loop-end 1 --model.parallel-start 2
        --model.max-segment 64 --batch.tokens-per-step 256 --batch.tokens-per-micro-step 256 --schedule.max-steps 2
        --data.max-val-tokens 200 --artifact.rounding nearest --artifact.calibration-batches 1
        --artifact.calibration-tokens 64 --run.device cpu --schedule.budget-s 3600 --evaluation.sequence-length 32
        --evaluation.method score-first --evaluation.stride 16 --evaluation.set chunk_rows=64 --data.source
        {tmp_path}/corpus --data.cache {tmp_path}/cache --run.out {tmp_path}/out""".split()
    for name in (*(f"model.{name}" for name in REFERENCE), "optim.newton_schulz_impl"):
        options += [f"--{name.replace('_', '-')}", "reference"]
    train = load_script("train")
    assert train.command(["demo", "--evaluation.variant", "pr12"]) == 2
    assert "evaluation.method plain: expected no variant or settings, found pr12" in capsys.readouterr().err
    assert train.command([*options, "--illegal-train-on-validation"]) == 0
    shown = capsys.readouterr().out
    assert " ".join(ILLEGAL.split()) in " ".join(shown.split()) and "ILLEGAL training on the validation" in shown
    assert "adaptation: 3 of 4 chunks trained on" in shown and "evaluation (load " in shown
    artifact = tmp_path / "out/artifact.nbk"
    assert read_artifact(artifact).trained_on_validation
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    marked = [record["event"] for record in log if record.get("illegal") == ILLEGAL]
    assert marked == ["training on validation", "end of run"]
    bits = log[-1]["bits_per_byte"]
    assert list(bits) == ["before quantisation", "after quantisation", "after reload, score-first"]
    assert bits["after quantisation"] != bits["after reload, score-first"]
    data = str(next((tmp_path / "cache").glob("*/niblick_val_000000.bin")).parent)
    out = tmp_path / "score.json"
    again = [str(artifact), "--data", data, "--device", "cpu", "--sequence-length", "32", "--method", "score-first"]
    assert load_script("evaluate").command([*again, "--stride", "16", "--set", "chunk_rows=64", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["illegal"] == ILLEGAL and found["bits_per_byte"] == bits["after reload, score-first"]
