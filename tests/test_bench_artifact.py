"""The table of containers and quantisers: rows at equal error and at equal bytes, on a small model."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from configs import REFERENCE
from numerics import EQUAL_ERROR_DB
from safetensors.torch import save_file

from niblick.artifact.fill import SLACK
from niblick.artifact.matrices import ROLES, split_roles
from niblick.bench import artifact as bench
from niblick.bench.divergence import Divergence
from niblick.data.command_line import guarded
from niblick.evaluation.validation import ValidationSet
from niblick.model.config import ArtifactConfig, ConfigError, GPTConfig
from niblick.model.gpt import GPT

CONFIG = GPTConfig(vocab_size=512, num_layers=4, model_dim=64, num_heads=2, num_kv_heads=1, mlp_hidden=128,
                   rope_dims=4, xsa_last_layers=2, loop_start=1, loop_end=1, parallel_start=2, **REFERENCE)  # fmt: skip


def test_rows_at_equal_error_and_at_equal_bytes():
    subject = bench.simulated(CONFIG)
    scored = []
    subject = subject._replace(score=lambda quantization: scored.append(quantization) or bench.Scored(len(scored), 0.5))
    names = ("brotli", "range coder", "trellis, 8 states")
    rows = list(bench.compare(subject, ArtifactConfig(), {name: bench.WAYS[name] for name in names}, True))
    assert [row.way for row in rows] == [*names, "range coder", "trellis, 8 states"]
    equal, full = rows[:3], rows[3:]
    assert equal[0].error_db == equal[1].error_db == 0 and abs(equal[2].error_db) < EQUAL_ERROR_DB
    assert equal[0].model_bytes > equal[1].model_bytes > equal[2].model_bytes
    assert all(0 <= equal[0].model_bytes - row.model_bytes <= SLACK for row in full)
    assert full[1].error_db < full[0].error_db <= 0, "bytes to spare buy precision"
    assert scored[0] is None and [row.lost for row in rows] == [1, 2, 3, 4, 5]
    assert bench.rendered("x", rows).row_count == 5


def test_ways_that_choose_where_bits_go_are_compared_at_equal_bytes():
    subject = bench.simulated(CONFIG)
    sensitivity = {
        role: torch.rand(tensor.shape[:2]) * 1e-3
        for role, tensor in split_roles(subject.state).items()
        if role in ROLES
    }
    subject = subject._replace(calibration=subject.calibration | sensitivity)
    ways = {name: bench.WAYS[name] for name in ("range coder, small parts", "bits by row")}
    rows = list(bench.compare(subject, ArtifactConfig(), ways, True))
    assert [(row.table, row.way) for row in rows] == [
        ("equal error", "range coder, small parts"), ("equal bytes", "range coder, small parts"),
        ("equal bytes", "bits by row"),
    ]  # fmt: skip
    assert 0 <= rows[0].model_bytes - rows[2].model_bytes <= SLACK
    smaller = rows[0].model_bytes * 9 // 10
    *_, last = bench.compare(subject, ArtifactConfig(), ways, True, smaller)
    assert 0 <= smaller - last.model_bytes <= SLACK and last.error_db > rows[2].error_db
    assert "bits by row" in bench.chosen_ways((), real=True)
    assert not any("allocation" in way for way in bench.chosen_ways((), real=False).values())


def test_divergence_is_of_the_predictions():
    """None of the same model; of another, the sum over rows of p log(p / q), per byte."""
    model, other = GPT(CONFIG).eval(), GPT(CONFIG, seed=1).eval()
    with torch.no_grad():
        for m in (model, other):
            m.embedding *= 20
    n = 3 * CONFIG.max_segment // 2
    tokens = np.random.default_rng(0).integers(2, 512, n)
    held_out = ValidationSet(tokens, np.full(n, 3, np.int16))
    diverged = Divergence(model, held_out)
    assert diverged(model) == 0
    row = torch.from_numpy(tokens[: CONFIG.max_segment])
    starts = torch.tensor([0, len(row)]).int()
    with torch.no_grad():
        p, q = ((30 * torch.tanh(m.head(m.hidden(row, starts)) / 30)).double().softmax(-1) for m in (model, other))
    expected = (p * (p / q).log2()).sum() / (3 * len(row))
    assert expected > 0.01 and diverged(other) == pytest.approx(expected.item(), rel=1e-3)


def test_a_checkpoint_of_training_is_read(tmp_path):
    model = GPT(CONFIG)
    tensors = {f"ema.{name}": tensor + 1 for name, tensor in model.state_dict().items()}
    tensors |= {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    settings = {f"model.{name}": value for name, value in dataclasses.asdict(CONFIG).items() if name != "attention"}
    record = {"niblick": json.dumps({"identity": settings | {"optim.beta1": 0.9}, "position": {}})}
    save_file(tensors, tmp_path / "checkpoint.safetensors", record)
    config, state = bench.read_checkpoint(tmp_path / "checkpoint.safetensors")
    assert config == CONFIG
    assert all(torch.equal(state[name], tensor + 1) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "--data: expected the folder"),
        (["nowhere", "--data", "."], "nowhere: expected a checkpoint of train.py, found none"),
        (["simulated", "--preset", "pr1"], "--preset: expected one of demo"),
        (["simulated", "--ways", "zip"], "--ways: expected some of"),
        (["simulated", "--ways", "bits by row"], "--ways: expected first one whose bytes the others get"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert guarded("niblick.bench.artifact", bench.main, words, ConfigError) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
