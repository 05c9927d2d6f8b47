"""Weights to integers: the definition, its edges, and what is refused."""

from dataclasses import replace

import pytest
import torch

from niblick.artifact.errors import ArtifactError
from niblick.artifact.load import pack_for_inference
from niblick.artifact.quantize import quantize
from niblick.artifact.records import RowIntegers, SmallIntegers, dequantize
from niblick.artifact.steps import all_steps
from niblick.kernels.int6_linear import int6_unpack
from niblick.model.config import ArtifactConfig
from niblick.model.gpt import BANKS

CONFIG = ArtifactConfig(
    matrix_bits=6, embedding_bits=7, attention_clip=13.0, mlp_clip=11.5, embedding_clip=14.0, rounding="nearest"
)  # fmt: skip
CLIPS = {"qo_bank": 13.0, "kv_bank": 13.0, "mlp_up_bank": 11.5, "mlp_down_bank": 11.5, "embedding": 14.0}
ROLE = {"qo_bank": "attn_q", "kv_bank": "attn_k", "mlp_up_bank": "mlp_up", "mlp_down_bank": "mlp_down"}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.03


def one_row(row: torch.Tensor, step: float, bits: int) -> RowIntegers:
    """Quantise one row with the clip that makes its step the given power of two."""
    clip = step * (2 ** (bits - 1) - 1) / row.std().item()
    config = replace(CONFIG, matrix_bits=bits, mlp_clip=clip)
    quantized = quantize({"mlp_up_bank": row.view(1, 1, -1)}, config).tensors
    assert quantized["mlp_up"].scale.item() == step
    return quantized["mlp_up"]


@pytest.mark.parametrize("name", CLIPS)
def test_steps_and_integers_follow_the_definition(name):
    weight = random(4, 8, 128) if name != "embedding" else random(24, 128).bfloat16()
    found = quantize({name: weight}, CONFIG).tensors
    q, scale, bits, states, low_rank = found[ROLE.get(name, name)]
    if name in ("qo_bank", "kv_bank"):
        second = found["attn_o" if name == "qo_bank" else "attn_v"]
        q, scale = torch.cat([q, second.q]), torch.cat([scale, second.scale])
    if name == "embedding":
        q, scale = q[0], scale[0]
    assert states == 0 and low_rank == ()
    Q = 63 if name == "embedding" else 31
    assert (bits, q.dtype, scale.dtype) == (7 if name == "embedding" else 6, torch.int8, torch.float16)
    w = weight.double()
    deviation = ((w - w.mean(-1, keepdim=True)).square().sum(-1) / 127).sqrt()
    assert torch.equal(scale, (CLIPS[name] * deviation / Q).half())
    expected = (weight.float() / scale.float()[..., None]).double()
    assert ((q.double() - expected).abs() <= 0.5).all() and q.abs().max() <= Q
    assert torch.equal(dequantize(found)[name], q.float() * scale.float()[..., None])


def test_ties_round_to_even_and_large_values_are_clipped():
    row = torch.tensor([-99.0, -3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 99.0])
    q = one_row(row * 2.0**-5, 2.0**-5, bits=4).q.view(-1)
    assert q.tolist() == [-7, -4, -2, -2, 0, 0, 2, 2, 4, 7]


def test_the_float16_step_is_the_one_divided_by():
    """With a coarse step the float32 one would round some weights to a neighbouring integer."""
    q, scale, *_ = quantize({"mlp_up_bank": random(1, 64, 512)}, CONFIG).tensors["mlp_up"]
    exact = 11.5 * random(1, 64, 512).std(-1) / 31
    assert torch.equal(q, (random(1, 64, 512) / scale.float()[..., None]).round().to(torch.int8))
    assert not torch.equal(q, (random(1, 64, 512) / exact[..., None]).round().to(torch.int8))


@pytest.mark.parametrize("row", [torch.zeros(128), torch.full((128,), 1e-9), random(128) * 1e-7])
def test_a_row_without_spread_stays_finite_and_near_zero(row):
    state = {"mlp_down_bank": row.expand(1, 2, 128)}
    quantized = quantize(state, CONFIG).tensors
    assert (quantized["mlp_down"].scale > 0).all(), "0 / 0 has no integer"
    weight = dequantize(quantized)["mlp_down_bank"]
    assert torch.isfinite(weight).all() and (weight - state["mlp_down_bank"]).abs().max() <= 2.0**-24


def test_everything_else_is_float16():
    weight = random(2, 12)
    quantized = quantize({"gate_weight": weight}, CONFIG).tensors
    assert torch.equal(quantized["gate_weight"], weight.half())
    assert torch.equal(dequantize(quantized)["gate_weight"], weight.half().float())


@pytest.mark.parametrize("name", ["mlp_up_bank", "embedding", "q_gain"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(name, value):
    weight = random(4, 128)
    weight[2, 17] = value
    place = {"mlp_up_bank": r"mlp_up\[0, 2, 17\]", "embedding": r"embedding\[0, 2, 17\]"}.get(name, r"q_gain\[2, 17\]")
    with pytest.raises(ArtifactError, match=rf"{place}: expected a finite weight, found {value}"):
        quantize({name: weight}, CONFIG)


def test_what_float16_cannot_hold_is_refused():
    with pytest.raises(ArtifactError, match=r"q_gain\[1\]: expected a weight within float16's range, found 70000.0"):
        quantize({"q_gain": torch.tensor([1.0, 7e4])}, CONFIG)
    with pytest.raises(ArtifactError, match=r"mlp_up\[0, 1\]: expected a step within float16"):
        quantize({"mlp_up_bank": torch.stack([random(128), random(128) * 1e9])[None]}, CONFIG)


def test_packing_keeps_the_integers():
    state = {bank: random(2, 8, 128, seed=i) for i, bank in enumerate(BANKS)}
    quantized = quantize(state, CONFIG).tensors
    dense = dequantize(quantized)
    for bank, matrices in pack_for_inference(quantized).items():
        assert torch.equal(torch.stack([int6_unpack(m.packed) * m.scale[:, None] for m in matrices]), dense[bank])


@pytest.mark.parametrize(
    ("bits", "width", "message"),
    [(7, 128, "expected attn_q in at most 6 bits, found 7"), (6, 96, "multiple of 128, got .8, 96.")],
)
def test_what_cannot_be_packed_is_refused(bits, width, message):
    state = {bank: random(2, 8, width) for bank in BANKS}
    with pytest.raises(ArtifactError, match=message):
        pack_for_inference(quantize(state, replace(CONFIG, matrix_bits=bits)).tensors)


def test_small_tensors_in_bytes_are_right_to_half_a_step():
    state = {"attn_scale": 1 + random(3, 512), "gate_weight": random(2, 8, 12), "smear_weight": random(12)}
    quantized = quantize(state, replace(CONFIG, small_bits=8, gate_bits=8)).tensors
    assert isinstance(quantized["attn_scale"], SmallIntegers) and isinstance(quantized["gate_weight"], SmallIntegers)
    assert quantized["smear_weight"].dtype == torch.float16, "twelve values are not worth a stream"
    for name in ("attn_scale", "gate_weight"):
        error = (dequantize(quantized)[name] - state[name]).abs()
        assert (error <= 0.501 * quantized[name].scale.float()[..., None]).all()
    published = quantize(state, replace(CONFIG, gate_bits=8)).tensors
    assert isinstance(published["gate_weight"], SmallIntegers) and published["attn_scale"].dtype == torch.float16


def test_steps_on_a_grid_equal_steps_and_finer_steps():
    state = {"mlp_up_bank": random(2, 64, 128) * torch.linspace(0.5, 2, 64)[:, None]}
    steps = {
        name: quantize(state, replace(CONFIG, **options)).tensors["mlp_up"].scale.double()
        for name, options in {
            "plain": {}, "grid": {"steps_per_octave": 16}, "equal": {"row_exponent": 0.0}
        }.items()
    }  # fmt: skip
    exponents = steps["grid"].log2() * 16
    assert (exponents - exponents.round()).abs().max() < 16 * 2**-10, "float16 rounds a power by at most 2^-11"
    assert (steps["grid"] / steps["plain"]).log2().abs().max() < 1 / 32 + 2**-9
    assert (
        steps["equal"].std(-1).max() == 0
        and (steps["equal"][0, 0].log2() - steps["plain"][0].log2().mean()).abs() < 2**-9
    )


def test_value_dedup_floors():
    state = {"mlp_up_bank": random(1, 8, 128)}
    plain = quantize(state, CONFIG).tensors["mlp_up"].q
    assert torch.equal(quantize(state, replace(CONFIG, value_dedup=2)).tensors["mlp_up"].q, 2 * (plain // 2))
    clipped = quantize(state, replace(CONFIG, value_dedup=2, matrix_bits=4, mlp_clip=2.0)).tensors["mlp_up"].q
    assert clipped.min() == -6, "-7 would floor to -8, which four bits do not have"


def test_gptq_needs_hessians():
    with pytest.raises(ArtifactError, match=r"artifact\.rounding gptq: expected Hessians"):
        quantize({"mlp_up_bank": random(1, 8, 128)}, ArtifactConfig())


def test_the_hessian_aware_clip_follows_its_definition():
    weight = random(2, 8, 128).double()
    hessian = torch.diag_embed(random(2, 128, seed=1).square().double() + 0.1)
    plain, found = (
        all_steps({"mlp_up": weight}, replace(CONFIG, hessian_clip=lam), {"mlp_in": hessian})["mlp_up"].scale
        for lam in (0.0, 0.175)
    )
    for i in range(2):
        diagonal = hessian[i].diagonal() / hessian[i].diagonal().mean()
        rows = (weight[i].abs() * diagonal).mean(-1)
        factor = 1 + 0.175 * (rows / rows.mean() - 1)
        assert torch.equal(found[i], (11.5 * weight[i].std(-1) / 31 * factor).half())
    assert not torch.equal(plain, found)
