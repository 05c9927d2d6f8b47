"""The model against an independent float64 reference: losses, every gradient, and what no parameter may do."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from configs import KERNELS, REFERENCE
from numerics import MODEL_F64, SCORE_NATS, assert_close_f32, assert_same_f64
from reference_gpt import (
    cross_entropy,
    exclude_self,
    inverse_frequencies,
    layer_order,
    reference_input,
    reference_logits,
    reference_losses,
    rms_norm,
    segment_starts,
    skip_rows,
)
from torch import Tensor

from niblick.model.config import GPTConfig
from niblick.model.gpt import GPT
from niblick.model.presets import PRESETS

BOS = 1
FELT = 1e-6  # nats: a loss that moves by more has felt the change; float64 rounding is 1e-13
# The first document lost its BOS to the cut of the stream; then 18 tokens (more than a segment), 1, 33 (more than
# two segments), 2, and a BOS at the end.
DOCUMENT_LENGTHS = (7, 18, 1, 33, 2, 1)

SMALL = dict(
    vocab_size=61,
    num_layers=5,
    model_dim=64,
    num_heads=4,
    num_kv_heads=2,
    mlp_hidden=80,
    softcap=8.0,
    rope_dims=8,
    max_segment=16,
    xsa_last_layers=5,
    loop_start=1,
    loop_end=2,
    loop_extra_passes=2,
    parallel_start=3,
    **REFERENCE,
)
BASE = GPTConfig(**SMALL)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only lose by threads, and lose much when other tests run beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(**changes: object) -> GPTConfig:
    return replace(BASE, **changes)


LAYER_COUNTS = ("num_layers", "xsa_last_layers", "loop_start", "loop_end", "loop_extra_passes", "parallel_start")


def shrunk_preset(name: str) -> GPTConfig:
    """The preset's own layers, loops and switches at toy widths."""
    widths = {key: value for key, value in SMALL.items() if key not in LAYER_COUNTS}
    return replace(PRESETS[name].model, **widths)


LOOPED = {
    "base": BASE,
    "smear_none": small(smear="none"),
    "smear_window_without_bos_mask": small(smear_bos_mask=False),
    "smear_window_5": small(smear_window=5),
    "smear_channel": small(smear="channel", smear_bos_mask=False),
    "smear_channel_rows": small(smear="channel", smear_bos_mask=False, attention_span="rows"),
    "gate_none": small(gate="none"),
    "gate_output": small(gate="output"),
    "gate_output_query": small(gate="output", gate_input="query"),
    "gate_sparse_1": small(gate_scale=1.0),
    "gate_sparse_query": small(gate_input="query", gate_window=20),
    "gate_dense": small(gate="dense"),
    "gate_dense_bias": small(gate="dense_bias"),
    "xsa_none": small(xsa_last_layers=0),
    "xsa_last_2": small(xsa_last_layers=2),
    "skips_off": small(skips=False),
    "skip_gates_off": small(skip_gates=False),
    "ln_scale_off": small(ln_scale=False),
    "rope_exact_frequencies": small(rope_frequencies_bf16=False, rope_base=22_081.8),
    "rope_whole_head": small(rope_dims=16),
    "rows": small(attention_span="rows", smear="none"),
    "asymmetric_softcap": small(asymmetric_softcap=True),
    "leaky_slope": small(leaky_slope=0.25),
    "own_kv_head_each": small(num_kv_heads=4),
    "one_kv_head": small(num_kv_heads=1),
    "loop_first_layer": small(loop_start=0, loop_end=0, loop_extra_passes=1),
    "loop_last_layers": small(loop_start=3, loop_end=4, parallel="none"),
}
BOTH_WAYS = {
    "parallel_none": small(parallel="none"),
    "parallel_single": small(parallel="single"),
    "parallel_single_in_encoder": small(parallel="single", parallel_start=1),
    "parallel_two_lane": small(parallel="two_lane"),
    "parallel_cross_lane": BASE,
    "merge_attn": small(lane_merge="attn"),
    "merge_mlp": small(lane_merge="mlp"),
    "one_lane_layer": small(parallel_start=4, num_layers=6, xsa_last_layers=3),
}
UNLOOPED = {
    "no_recurrence": small(loop_extra_passes=0),
}
CASES = (
    [pytest.param(config, True, id=name) for name, config in LOOPED.items()]
    + [
        pytest.param(config, looping, id=f"{name}-{'looped' if looping else 'plain'}")
        for name, config in BOTH_WAYS.items()
        for looping in (True, False)
    ]
    + [pytest.param(config, False, id=name) for name, config in UNLOOPED.items()]
    + [pytest.param(shrunk_preset(name), True, id=name) for name in PRESETS if name != "demo"]
)


def stream(config: GPTConfig, lengths: tuple[int, ...] = DOCUMENT_LENGTHS) -> tuple[Tensor, Tensor]:
    """Random ids and targets (N,): documents of the given lengths, each but the first opened by BOS."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, config.vocab_size, (sum(lengths) + 1,), generator=generator)
    start = 0
    for length in lengths[:-1]:
        start += length
        ids[start] = BOS
    return ids[:-1], ids[1:]


def boundaries(ids: Tensor, config: GPTConfig) -> Tensor:
    """cu_seqlens (int32): the segments' starts, then N up to a multiple of 64."""
    starts = sorted(set(segment_starts(ids.tolist(), config)))
    padding = 64 - len(starts) % 64
    return torch.tensor(starts + [len(ids)] * padding, dtype=torch.int32)


def parameter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    L, D, H, F = config.num_layers, config.model_dim, config.num_heads, config.mlp_hidden
    shapes = {
        "embedding": (config.vocab_size, D),
        "qo_bank": (2 * L, D, D),
        "kv_bank": (2 * L, config.kv_dim, D),
        "mlp_up_bank": (L, F, D),
        "mlp_down_bank": (L, D, F),
        "q_gain": (L, H),
        "attn_scale": (L, D),
        "mlp_scale": (L, D),
        "resid_mix": (L, 2, D),
    }
    if config.skips:
        shapes["skip_weights"] = (skip_rows(config), D)
        if config.skip_gates:
            shapes["skip_gates"] = (skip_rows(config), D)
    if config.parallel == "cross_lane":
        shapes |= {"lane_post": (L, 2, 2), "lane_resid": (L, 2)}
    if config.parallel == "two_lane":
        shapes["lane_merge"] = (1,)
    if config.gate in ("output", "sparse"):
        shapes["gate_weight"] = (L, H, config.gate_window)
    if config.gate in ("dense", "dense_bias"):
        shapes["gate_weight"] = (L, H, D)
    if config.gate == "dense_bias":
        shapes["gate_bias"] = (L, H)
    if config.smear == "window":
        shapes |= {"smear_weight": (config.smear_window,), "smear_scale": (1,)}
    if config.smear == "channel":
        shapes["smear_channel"] = (D,)
    if config.asymmetric_softcap:
        shapes |= {"softcap_positive": (1,), "softcap_negative": (1,)}
    return shapes


AROUND_ONE = ("attn_scale", "mlp_scale", "skip_weights", "lane_post", "lane_resid", "lane_merge", "smear_scale")
AROUND_ZERO = ("skip_gates", "gate_bias", "smear_channel")


def random_parameters(config: GPTConfig) -> dict[str, Tensor]:
    """Every parameter far from its initial value, so that no mechanism is an identity."""
    generator = torch.Generator().manual_seed(11)
    params = {}
    for name, shape in parameter_shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name in AROUND_ONE:
            value = 1 + 0.3 * noise
        elif name in AROUND_ZERO:
            value = 0.3 * noise
        elif name == "resid_mix":
            value = 0.3 * noise
            value[:, 0] += 1
        elif name == "q_gain":
            value = 2 + 0.3 * noise
        elif name == "softcap_positive":
            value = config.softcap * (1 + 0.1 * noise.abs())
        elif name == "softcap_negative":
            value = config.softcap * (1 - 0.1 * noise.abs())
        elif name == "embedding":
            value = noise
        else:
            value = noise / math.sqrt(shape[-1])
        params[name] = value
    return params


def product(config: GPTConfig, params: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> GPT:
    """The model in evaluation mode with these parameters."""
    model = GPT(config, seed=0, dtype=dtype).eval()
    own = dict(model.named_parameters())
    assert {name: tuple(p.shape) for name, p in own.items()} == {name: tuple(p.shape) for name, p in params.items()}
    with torch.no_grad():
        for name, value in params.items():
            own[name].copy_(value)
    return model


def losses_and_gradients(losses: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(N,) losses and the gradient of their mean to every parameter; zero for one that takes no part."""
    grads = torch.autograd.grad(losses.mean(), list(params.values()), allow_unused=True, materialize_grads=True)
    return losses.detach(), dict(zip(params, grads, strict=True))


def run_reference(
    config: GPTConfig, ids: Tensor, targets: Tensor, looping: bool, training: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    params = {name: value.requires_grad_() for name, value in random_parameters(config).items()}
    return losses_and_gradients(reference_losses(params, config, ids, targets, looping, training), params)


def run_product(model: GPT, ids: Tensor, targets: Tensor, looping: bool) -> tuple[Tensor, dict[str, Tensor]]:
    losses = model.token_losses(ids, targets, boundaries(ids, model.config), looping=looping)
    return losses_and_gradients(losses, dict(model.named_parameters()))


def evaluate(model: GPT, ids: Tensor, targets: Tensor, looping: bool = True) -> Tensor:
    with torch.no_grad():
        return model.token_losses(ids, targets, boundaries(ids, model.config), looping=looping)


def assert_same(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert_same_f64("losses", got[0], want[0])
    for name, gradient in want[1].items():
        assert_same_f64(f"gradient of {name}", got[1][name], gradient)


# The reference's own foundations, against published tables.


@pytest.mark.parametrize(
    "preset, looping, encoder, decoder, rows",
    [
        ("pr1855", True, [0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10], 8),
        ("pr1477", True, [0, 1, 2, 3, 4, 5, 4], [5, 4, 5, 6, 7, 8, 9, 10], 7),
        ("pr1855", False, [0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10], 8),
        ("pr1423", True, [0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10], 5),
    ],
)
def test_layer_order(preset: str, looping: bool, encoder: list[int], decoder: list[int], rows: int) -> None:
    config = PRESETS[preset].model
    assert layer_order(config, looping) == (encoder, decoder)
    assert skip_rows(config) == rows


def test_published_frequencies() -> None:
    published = [1, 0.31640625, 0.10009765625, 0.03173828125, 0.010009765625, 0.0031585693359375, 0.00099945068359375]
    assert inverse_frequencies(GPTConfig()).tolist() == [*published, 0.000316619873046875]


def test_segments() -> None:
    ids = stream(BASE)[0].tolist()
    assert sorted(set(segment_starts(ids, BASE))) == [0, 7, 23, 25, 26, 42, 58, 59, 61]
    assert sorted(set(segment_starts(ids, small(attention_span="rows")))) == [0, 16, 32, 48]


# The model against the reference.


@pytest.mark.parametrize("config, looping", CASES)
def test_losses_and_gradients(config: GPTConfig, looping: bool) -> None:
    """With every operation's reference, and with every kernel (in float64: its eager implementation)."""
    ids, targets = stream(config)
    want = run_reference(config, ids, targets, looping)
    for choice in (config, replace(config, **KERNELS)):
        model = product(choice, random_parameters(choice))
        assert_same(run_product(model, ids, targets, looping), want)


@pytest.mark.parametrize("loss_impl", ["fused", "kernel", "reference"])
def test_training_loss_is_the_mean_of_token_losses(loss_impl: str) -> None:
    config = small(loss_impl=loss_impl)
    ids, targets = stream(config)
    model = product(config, random_parameters(config))
    loss = model(ids, targets, boundaries(ids, config), True)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    want = run_reference(config, ids, targets, True)
    assert_same((loss, dict(zip(want[1], gradients, strict=True))), (want[0].mean(), want[1]))


@pytest.mark.parametrize("bos_mask", [True, False])
def test_kernels_in_float32(bos_mask: bool) -> None:
    config = small(smear_bos_mask=bos_mask, **KERNELS)
    ids, targets = stream(config)
    losses, gradients = run_product(product(config, random_parameters(config), torch.float32), ids, targets, True)
    want = run_reference(config, ids, targets, True)
    assert_close_f32("losses", losses, want[0])
    for name, gradient in want[1].items():
        assert_close_f32(f"gradient of {name}", gradients[name], gradient)


@pytest.mark.parametrize("config, looping", CASES)
def test_every_parameter_matters(config: GPTConfig, looping: bool) -> None:
    ids, targets = stream(config)
    model = product(config, random_parameters(config))
    before = evaluate(model, ids, targets, looping)
    generator = torch.Generator().manual_seed(13)
    idle = []
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(kept.shape, generator=generator, dtype=kept.dtype))
            moved = (evaluate(model, ids, targets, looping) - before).abs().max()
            parameter.copy_(kept)
        if not moved > FELT:
            idle.append(name)
    assert idle == []


def test_bf16_positions_restart_in_every_row() -> None:
    """Two rows of 264: rounding shows from position 257 on, and only there."""
    config = small(
        num_layers=2,
        loop_extra_passes=0,
        parallel="none",
        xsa_last_layers=0,
        smear="none",
        attention_span="rows",
        max_segment=264,
        rope_positions_bf16=True,
    )
    ids, targets = stream(config, (528,))
    params = random_parameters(config)
    model = product(config, params)
    assert_same(run_product(model, ids, targets, False), run_reference(config, ids, targets, False))
    exact = evaluate(product(replace(config, rope_positions_bf16=False), params), ids, targets, False)
    rounded = evaluate(model, ids, targets, False)
    changed = (exact != rounded).nonzero().flatten() % 264
    assert changed.min() == 257


@pytest.mark.parametrize("quantile, lengths", [(0.9, DOCUMENT_LENGTHS), (0.5, (7, 18, 36))])
def test_norm_dropout_in_training_alone(quantile: float, lengths: tuple[int, ...]) -> None:
    """Of 61 tokens the quantile 0.5 is one token's own norm, and that token is dropped too."""
    config = small(norm_dropout_quantile=quantile)
    ids, targets = stream(config, lengths)
    model = product(config, random_parameters(config))
    evaluated = run_product(model, ids, targets, True)
    assert_same(evaluated, run_reference(config, ids, targets, True))
    trained = run_product(model.train(), ids, targets, True)
    assert_same(trained, run_reference(config, ids, targets, True, training=True))
    assert not torch.equal(trained[0], evaluated[0])


# Who may influence whom.


def changed_by(model: GPT, ids: Tensor, targets: Tensor, where: slice | int) -> list[int]:
    """The tokens whose loss moves at all when the input ids at `where` are replaced (the targets are kept)."""
    other = ids.clone()
    other[where] = (ids[where] - 2 + 17) % (model.config.vocab_size - 2) + 2
    return (evaluate(model, ids, targets) != evaluate(model, other, targets)).nonzero().flatten().tolist()


def documents() -> list[tuple[int, int]]:
    ends = [sum(DOCUMENT_LENGTHS[: k + 1]) for k in range(len(DOCUMENT_LENGTHS))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def test_documents_never_see_each_other() -> None:
    ids, targets = stream(BASE)
    model = product(BASE, random_parameters(BASE))
    for k, (start, end) in enumerate(documents()):
        first = start + (k > 0)  # BOS itself stays
        if first < end:
            changed = changed_by(model, ids, targets, slice(first, end))
            assert changed and first <= min(changed) and max(changed) < end


def test_without_bos_mask_the_smear_alone_crosses() -> None:
    """The last token of a document reaches the next document through its BOS, and goes no further."""
    ids, targets = stream(BASE)
    config = small(smear_bos_mask=False)
    model = product(config, random_parameters(config))
    (_, end), (_, next_end) = documents()[:2]
    assert max(changed_by(model, ids, targets, slice(0, end - 1))) < end
    changed = changed_by(model, ids, targets, end - 1)
    assert end in changed and max(changed) < next_end


@pytest.mark.parametrize("looping", [True, False])
def test_no_token_sees_the_future(looping: bool) -> None:
    config = small(max_segment=64)
    ids, targets = stream(config, (40,))
    model = product(config, random_parameters(config))
    changed = changed_by(model, ids, targets, 20)
    assert min(changed) == 20 and max(changed) == 39


def test_segments_of_a_document_are_apart() -> None:
    config = small(smear="none")
    ids, targets = stream(config, (48,))
    model = product(config, random_parameters(config))
    changed = changed_by(model, ids, targets, slice(16, 32))
    assert min(changed) == 16 and max(changed) == 31


@pytest.mark.parametrize("xsa", [True, False])
def test_exclusive_attention_silences_first_tokens(xsa: bool) -> None:
    """The first token of a segment attends to itself alone, so its output projections do not matter."""
    value = torch.randn(4, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert exclude_self(value, value).abs().max() < MODEL_F64
    config = small(xsa_last_layers=5 if xsa else 0)
    ids, targets = stream(config)
    params = random_parameters(config)
    before = evaluate(product(config, params), ids, targets)
    params["qo_bank"][config.num_layers :] *= 2
    after = evaluate(product(config, params), ids, targets)
    first = sorted(set(segment_starts(ids.tolist(), config)))
    rest = [t for t in range(len(ids)) if t not in first]
    assert ((before - after)[rest].abs() > FELT).all()
    if xsa:
        assert_same_f64("first tokens", after[first], before[first])
    else:
        assert ((before - after)[first].abs() > FELT).all()


# The presets at their own size.


@pytest.mark.parametrize(
    "preset, count",
    [
        ("pr1934", 35_945_671),
        ("pr1855", 35_945_671),
        ("pr1514", 35_944_536),
        ("pr1477", 35_943_513),
        ("pr1423", 35_941_976),
    ],
)
def test_size_and_first_loss_of_presets(preset: str, count: int) -> None:
    """Output projections start at zero, so the first loss is that of softcap(norm(x⁰) Eᵀ), near ln 8192 = 9.011."""
    config = replace(PRESETS[preset].model, **REFERENCE)
    model = GPT(config, seed=42, dtype=torch.float32).eval()
    assert sum(p.numel() for p in model.parameters()) == count
    ids = torch.randint(2, config.vocab_size, (64,), generator=torch.Generator().manual_seed(3))
    targets = ids.roll(-1)
    losses = evaluate(model, ids, targets).double()
    start = {name: p.detach().double() for name, p in model.named_parameters() if p.numel() < 1 << 23}
    logits = reference_logits(rms_norm(reference_input(start, config, ids)), start, config)
    expected = cross_entropy(logits, targets)
    assert (losses - expected).abs().max() < SCORE_NATS
    any_target = (torch.logsumexp(logits, -1) - logits.mean(-1)).mean()  # over every target, not only 64
    assert 9.001 < any_target < 9.021
