"""Steps by what they cost the loss: the measurement against the cost itself, and the rule on costs that are given."""

from dataclasses import replace

import pytest
import torch
from configs import REFERENCE
from torch.nn.functional import kl_div, log_softmax

from niblick.artifact.allocation import LEAST, allocate
from niblick.artifact.calibration import calibrate
from niblick.artifact.errors import ArtifactError
from niblick.artifact.hessians import softcapped
from niblick.artifact.matrices import HESSIANS, ROLES, join_roles, split_roles
from niblick.artifact.quantize import quantize
from niblick.artifact.records import dequantize
from niblick.artifact.sensitivity import collect_sensitivities
from niblick.artifact.steps import all_steps
from niblick.model.config import ArtifactConfig, ConfigError, GPTConfig
from niblick.model.gpt import GPT

CONFIG = GPTConfig(
    vocab_size=64, num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2, mlp_hidden=48, max_segment=16, rope_dims=4,
    xsa_last_layers=3, loop_start=1, loop_end=2, loop_extra_passes=1, parallel_start=3, **REFERENCE,
)  # fmt: skip
SETTINGS = ArtifactConfig(allocation="rows", calibration_batches=8, matrix_bits=8, embedding_bits=8)
"""At eight bits what quantisation costs is quadratic in the steps."""


class Text:
    def __init__(self, ids: torch.Tensor) -> None:
        self.ids, self.cu_seqlens = ids, torch.arange(0, len(ids) + 1, CONFIG.max_segment).int()


def texts() -> list[Text]:
    ids = torch.randint(64, (8, 8 * CONFIG.max_segment), generator=torch.Generator().manual_seed(1))
    return [Text(row) for row in ids]


@pytest.fixture(scope="module")
def model() -> GPT:
    model, generator = GPT(CONFIG), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def calibration(model) -> dict[str, torch.Tensor]:
    hessians = calibrate(model, replace(SETTINGS, allocation="clips"), texts(), 0)
    return hessians | sensitivities(model, hessians)


def sensitivities(model: GPT, hessians: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    batches = [(text.ids, text.cu_seqlens) for text in texts()]
    return collect_sensitivities(model, batches, hessians, damping=SETTINGS.damping, seed=0, texts=32)


@torch.no_grad()
def divergence(model: GPT, state: dict[str, torch.Tensor]) -> float:
    """From the model's predictions to the quantised model's, nats a token."""
    other = GPT(CONFIG).eval()
    other.load_state_dict(state)
    logs = [
        log_softmax(softcapped(m, m.head(m.hidden(text.ids, text.cu_seqlens))), -1)
        for text in texts() for m in (model, other)
    ]  # fmt: skip
    pairs = zip(logs[1::2], logs[::2], strict=True)
    return sum(kl_div(found, given, log_target=True, reduction="batchmean").item() for found, given in pairs) / 8


def test_sensitivities_predict_the_divergence_of_every_role(model, calibration):
    state = model.state_dict()
    quantized = quantize(state, replace(SETTINGS, allocation="clips"), calibration).tensors
    exact, rounded = split_roles(state), split_roles(dequantize(quantized))
    for role in ROLES:
        predicted = (calibration[role] * quantized[role].scale.float().square()).sum().item()
        measured = divergence(model, join_roles(exact | {role: rounded[role]}))
        assert predicted == pytest.approx(measured, rel=0.25), role


def test_costs_become_equal_and_bits_stay():
    generator = torch.Generator().manual_seed(0)
    shapes, widths = {"attn_q": (3, 8), "mlp_down": (2, 4)}, {"attn_q": 16, "mlp_down": 64}
    steps = {role: torch.rand(shape, generator=generator) + 0.5 for role, shape in shapes.items()}
    sensitivity = {role: torch.rand(step.shape, generator=generator) + 0.1 for role, step in steps.items()}
    for level in ("roles", "matrices", "rows"):
        found = allocate(steps, sensitivity, widths, level)
        assert sum_of_bits(found, widths) == pytest.approx(sum_of_bits(steps, widths), abs=1e-3)
        axes = {"roles": (0, 1), "matrices": (1,)}.get(level)
        if axes:
            costs = torch.cat([(sensitivity[r] * found[r].square()).mean(axes).view(-1) / widths[r] for r in steps])
            assert costs.max() / costs.min() < 1 + 1e-5
    total = {
        level: sum((sensitivity[r] * allocate(steps, sensitivity, widths, level)[r].square()).sum() for r in steps)
        for level in ("roles", "matrices", "rows")
    }
    given = sum((sensitivity[r] * steps[r].square()).sum() for r in steps)
    assert total["rows"] < total["matrices"] < total["roles"] < given


def sum_of_bits(steps: dict[str, torch.Tensor], widths: dict[str, int]) -> float:
    return sum(widths[role] * step.log2().sum().item() for role, step in steps.items())


def test_rows_without_effect_are_not_given_up():
    steps, sensitivity = {"attn_q": torch.ones(2, 4)}, {"attn_q": torch.ones(2, 4)}
    sensitivity["attn_q"][0] = 0
    found = allocate(steps, sensitivity, {"attn_q": 8}, "matrices")["attn_q"]
    assert found[0, 0] / found[1, 0] == pytest.approx((2 / LEAST) ** 0.5, rel=1e-4)


def test_fine_steps_widen_the_range_instead_of_clipping(calibration):
    weight = torch.randn((4, 32, 32), generator=torch.Generator().manual_seed(2))
    known = {"attn_q": torch.full((4, 32), 1e-3), "attn_in": calibration["attn_in"]}
    known["attn_q"][0] = 10.0
    settings = replace(SETTINGS, matrix_bits=4, attention_clip=3.0, allocation="matrices")
    scale, bits = all_steps({"attn_q": weight}, settings, known)["attn_q"]
    assert bits > 4 and (weight.abs().amax(-1) / scale.float()).max() <= 1.001 * (2 ** (bits - 1) - 1)
    assert all_steps({"attn_q": weight}, replace(settings, allocation="clips"), known)["attn_q"].bits == 4


def test_it_pays_at_equal_steps_in_the_mean(model, calibration):
    state, coarse = model.state_dict(), replace(SETTINGS, matrix_bits=5, embedding_bits=5)
    found = {
        level: divergence(model, dequantize(quantize(state, replace(coarse, allocation=level), calibration).tensors))
        for level in ("clips", "matrices")
    }
    assert found["matrices"] < found["clips"]


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.embedding.grad = torch.ones_like(model.embedding)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, SETTINGS, texts()[:1], 0)
    assert model.training and (model.embedding.grad == 1).all() and model.qo_bank.grad is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.embedding.grad = None
    model.eval()


def test_ranks_take_their_mean(model, calibration, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor.mul_(2))
    both = sensitivities(model, {name: calibration[name] for name in HESSIANS.values()})
    for role in ROLES:
        torch.testing.assert_close(both[role], calibration[role])
        assert calibration[role].shape == quantize(model.state_dict(), SETTINGS, calibration).tensors[role].scale.shape


def test_what_is_missing_is_refused(model, calibration):
    hessians = {name: tensor for name, tensor in calibration.items() if name != "attn_v"}
    with pytest.raises(ArtifactError, match="expected the sensitivity of attn_v, found none"):
        quantize(model.state_dict(), SETTINGS, hessians)
    with pytest.raises(ConfigError, match="rows needs artifact"):
        ArtifactConfig(allocation="rows", rounding="nearest")
