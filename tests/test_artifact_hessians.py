"""Hessians of a model's inputs: against what the model's own parts were given."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from configs import REFERENCE
from numerics import assert_close_f32

from niblick.artifact.calibration import calibrate
from niblick.artifact.errors import ArtifactError
from niblick.artifact.hessians import collect_hessians, generate_rows
from niblick.artifact.quantize import quantize
from niblick.model.config import ArtifactConfig, GPTConfig
from niblick.model.gpt import GPT
from niblick.model.layers import leaky_relu_squared

CONFIG = GPTConfig(
    vocab_size=64, num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2, mlp_hidden=48, max_segment=8, rope_dims=4,
    xsa_last_layers=3, loop_start=1, loop_end=2, loop_extra_passes=1, parallel_start=3, norm_dropout_quantile=0.5,
    **REFERENCE,
)  # fmt: skip
PASSES, ROWS, LENGTH = (1, 2, 2, 1), 5, 8


@pytest.fixture
def model() -> GPT:
    model, generator = GPT(CONFIG), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def batches(n: int = 2):
    ids = torch.randint(64, (n, ROWS * LENGTH), generator=torch.Generator().manual_seed(1))
    return [(row, torch.arange(0, ROWS * LENGTH + 1, LENGTH).int()) for row in ids]


def test_hessians_are_those_of_the_inputs(model, monkeypatch):
    seen = {"attn_out": {}, "mlp_in": {}, "head": {0: []}}
    exclude, mlp, hidden = model._exclude_and_gate, model._mlp, model.hidden

    def spy_exclude(layer, *rest):
        y = exclude(layer, *rest)
        seen["attn_out"].setdefault(layer, []).append(y.reshape(len(y), -1))
        return y

    def spy_mlp(layer, n, weights):
        seen["mlp_in"].setdefault(layer, []).append(n)
        return mlp(layer, n, weights)

    def spy_hidden(*words, **options):
        seen["head"][0].append(hidden(*words, **options))
        return seen["head"][0][-1]

    for name, spy in (("_exclude_and_gate", spy_exclude), ("_mlp", spy_mlp), ("hidden", spy_hidden)):
        monkeypatch.setattr(model, name, spy)
    hessians = collect_hessians(model.train(), batches())
    assert model.training and model.observe is None
    for name, layers in seen.items():
        for layer, inputs in layers.items():
            x = torch.cat(inputs)
            assert len(x) == 2 * ROWS * LENGTH * (1 if name == "head" else PASSES[layer])
            assert_close_f32(f"{name}[{layer}]", hessians[name][layer], x.T @ x)
    for layer, inputs in seen["mlp_in"].items():
        h = leaky_relu_squared(torch.cat(inputs) @ model.mlp_up_bank[layer].T, CONFIG.leaky_slope)
        assert_close_f32(f"mlp_hidden[{layer}]", hessians["mlp_hidden"][layer], h.T @ h)


def test_normed_inputs_have_the_traces_of_normed_inputs(model):
    """A row after the norm has squares that sum to D / (layer + 1); the loop adds its passes."""
    hessians = collect_hessians(model, batches(1))
    expected = [passes * ROWS * LENGTH * CONFIG.model_dim / (i + 1) for i, passes in enumerate(PASSES)]
    for name in ("attn_in", "mlp_in"):
        traces = hessians[name].diagonal(dim1=1, dim2=2).sum(-1)
        assert_close_f32(name, traces, torch.tensor(expected))


def test_observing_changes_no_output(model):
    model.eval()
    ids, cu_seqlens = batches(1)[0]
    before = model.hidden(ids, cu_seqlens)
    model.observe = lambda *_: None
    assert_close_f32("hidden", model.hidden(ids, cu_seqlens), before)


def test_ranks_add_up(model, monkeypatch):
    alone = collect_hessians(model, batches())
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor.mul_(2))
    both = collect_hessians(model, batches())
    assert all(torch.equal(both[name], 2 * alone[name]) for name in alone)


def test_no_batch_is_refused(model):
    with pytest.raises(ArtifactError, match="calibration: expected at least one batch, found none"):
        collect_hessians(model, [])


def test_generated_rows_are_the_models_own_and_repeat(model):
    with torch.no_grad():
        model.embedding[7] *= 40  # a token that the model then prefers where its logit is positive
    rows = list(generate_rows(model, 5, LENGTH, seed=1, batch=2))
    assert [len(ids) for ids, _ in rows] == [16, 16, 8] and rows[0][1].tolist() == [0, 8, 16]
    again = list(generate_rows(model, 5, LENGTH, seed=1, batch=2))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(rows, again, strict=True))
    ids = torch.cat([ids for ids, _ in rows]).view(5, LENGTH)
    assert (ids[:, 1:] == 7).float().mean() > 0.2, "one of 64 by chance"


def test_calibration_takes_what_the_settings_ask_for(model):
    endless = (SimpleNamespace(ids=ids, cu_seqlens=c) for ids, c in itertools.cycle(batches()))
    settings = ArtifactConfig(calibration_batches=3)
    hessians = calibrate(model, settings, endless, 0)
    trace = hessians["head"][0].trace()
    assert_close_f32("head", trace, torch.tensor(3.0 * ROWS * LENGTH * CONFIG.model_dim))
    assert calibrate(model, replace(settings, rounding="nearest"), endless, 0) is None
    own = calibrate(model, replace(settings, calibration="generated"), iter(()), 0)
    assert_close_f32("head", own["head"][0].trace(), torch.tensor(64.0 * LENGTH * CONFIG.model_dim))


def test_gptq_lowers_the_weighted_error_of_every_role(model):
    hessians = collect_hessians(model, batches(4))
    found = {
        rounding: quantize(model.state_dict(), ArtifactConfig(rounding=rounding, matrix_bits=4), hessians)
        for rounding in ("nearest", "gptq", "trellis8")
    }
    assert found["nearest"].error == {} and found["gptq"].notes == []
    for role, error in found["gptq"].error.items():
        shape = found["gptq"].tensors[role].q.shape
        assert error.shape == shape[:1] and (error > 0).all()
