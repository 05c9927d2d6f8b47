"""Weights to integers: the definition, its edges, and what is refused."""

import pytest
import torch

from niblick.artifact.errors import ArtifactError
from niblick.artifact.quantize import RowIntegers, dequantize, pack_for_inference, quantize
from niblick.kernels.int6_linear import int6_unpack
from niblick.model.config import ArtifactConfig
from niblick.model.gpt import BANKS

CONFIG = ArtifactConfig(
    matrix_bits=6, embedding_bits=7, attention_clip=13.0, mlp_clip=11.5, embedding_clip=14.0
)  # fmt: skip
CLIPS = {"qo_bank": 13.0, "kv_bank": 13.0, "mlp_up_bank": 11.5, "mlp_down_bank": 11.5, "embedding": 14.0}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.03


def one_row(row: torch.Tensor, step: float, bits: int) -> RowIntegers:
    """Quantise one row with the clip that makes its step the given power of two."""
    clip = step * (2 ** (bits - 1) - 1) / row.std().item()
    quantized = quantize({"qo_bank": row.view(1, 1, -1)}, ArtifactConfig(matrix_bits=bits, attention_clip=clip))
    assert quantized["qo_bank"].scale.item() == step
    return quantized["qo_bank"]


@pytest.mark.parametrize("name", CLIPS)
def test_steps_and_integers_follow_the_definition(name):
    weight = random(3, 8, 128) if name != "embedding" else random(24, 128).bfloat16()
    q, scale, bits = quantize({name: weight}, CONFIG)[name]
    Q = 63 if name == "embedding" else 31
    assert (bits, q.dtype, scale.dtype) == (7 if name == "embedding" else 6, torch.int8, torch.float16)
    w = weight.double()
    deviation = ((w - w.mean(-1, keepdim=True)).square().sum(-1) / 127).sqrt()
    assert torch.equal(scale, (CLIPS[name] * deviation / Q).half())
    expected = (weight.float() / scale.float()[..., None]).double()
    assert ((q.double() - expected).abs() <= 0.5).all() and q.abs().max() <= Q
    assert torch.equal(dequantize({name: RowIntegers(q, scale, bits)})[name], q.float() * scale.float()[..., None])


def test_ties_round_to_even_and_large_values_are_clipped():
    row = torch.tensor([-99.0, -3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 99.0])
    q = one_row(row * 2.0**-5, 2.0**-5, bits=4).q.view(-1)
    assert q.tolist() == [-7, -4, -2, -2, 0, 0, 2, 2, 4, 7]


def test_the_float16_step_is_the_one_divided_by():
    """With a coarse step the float32 one would round some weights to a neighbouring integer."""
    q, scale, _ = quantize({"qo_bank": random(1, 64, 512)}, CONFIG)["qo_bank"]
    exact = 13.0 * random(1, 64, 512).std(-1) / 31
    assert torch.equal(q, (random(1, 64, 512) / scale.float()[..., None]).round().to(torch.int8))
    assert not torch.equal(q, (random(1, 64, 512) / exact[..., None]).round().to(torch.int8))


@pytest.mark.parametrize("row", [torch.zeros(128), torch.full((128,), 1e-9), random(128) * 1e-7])
def test_a_row_without_spread_stays_finite_and_near_zero(row):
    state = {"mlp_down_bank": row.expand(1, 2, 128)}
    quantized = quantize(state, CONFIG)
    assert (quantized["mlp_down_bank"].scale > 0).all(), "0 / 0 has no integer"
    weight = dequantize(quantized)["mlp_down_bank"]
    assert torch.isfinite(weight).all() and (weight - state["mlp_down_bank"]).abs().max() <= 2.0**-24


def test_everything_else_is_float16():
    weight = random(2, 12)
    quantized = quantize({"gate_weight": weight}, CONFIG)
    assert torch.equal(quantized["gate_weight"], weight.half())
    assert torch.equal(dequantize(quantized)["gate_weight"], weight.half().float())


@pytest.mark.parametrize("name", ["qo_bank", "embedding", "q_gain"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(name, value):
    weight = random(4, 128)
    weight[2, 17] = value
    with pytest.raises(ArtifactError, match=rf"{name}\[2, 17\]: expected a finite weight, found {value}"):
        quantize({name: weight}, CONFIG)


def test_what_float16_cannot_hold_is_refused():
    with pytest.raises(ArtifactError, match=r"q_gain\[1\]: expected a weight within float16's range, found 70000.0"):
        quantize({"q_gain": torch.tensor([1.0, 7e4])}, CONFIG)
    with pytest.raises(ArtifactError, match=r"qo_bank\[0, 1\]: expected a row whose step is within"):
        quantize({"qo_bank": torch.stack([random(128), random(128) * 1e9])[None]}, CONFIG)


def test_packing_keeps_the_integers():
    state = {bank: random(2, 8, 128, seed=i) for i, bank in enumerate(BANKS)}
    quantized = quantize(state, CONFIG)
    for bank, matrices in pack_for_inference(quantized).items():
        assert torch.equal(torch.stack([int6_unpack(m.packed) for m in matrices]), quantized[bank].q)
        assert torch.equal(torch.stack([m.scale for m in matrices]), quantized[bank].scale.float())


@pytest.mark.parametrize(
    ("bits", "width", "message"),
    [(7, 128, "expected qo_bank in at most 6 bits, found 7"), (6, 96, "multiple of 128, got .8, 96.")],
)
def test_what_cannot_be_packed_is_refused(bits, width, message):
    state = {bank: random(2, 8, width) for bank in BANKS}
    with pytest.raises(ArtifactError, match=message):
        pack_for_inference(quantize(state, ArtifactConfig(matrix_bits=bits)))
