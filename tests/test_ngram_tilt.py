"""Edge cases of ngram_tilt and the faults that its contract must reject."""

import math

import numerics
import pytest
import torch
import triton

from niblick.kernels.ngram_tilt import ngram_tilt, ngram_tilt_inputs, ngram_tilt_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON_RUNS = DEVICE == "cuda" or triton.knobs.runtime.interpret

FAULTS = [
    ("tl.where(first < V, term0, 0.0)", "term0"),  # padding counted
    ("mask=cols < V, other=0.0", "mask=cols < V - 1, other=0.0"),  # last column read as 0
    ("triton.cdiv(V, 4 * block)", "max(1, V // (4 * block))"),  # ragged tail dropped
    ("(same != target)", "(same != target + BLOCK_V)"),  # target counted
    ("(same < V) & (same != target)", "(same != target)"),
    ("tl.where(cols == lane, 0.0, total)", "total"),  # its neighbours counted twice
    ("+ tl.sum(others, axis=0)", ""),  # or not at all
    ("lane = target % BLOCK_V", "lane = (target + 1) % BLOCK_V"),
    ("r01 = r * d23", "r01 = r * d01"),  # the reciprocal of the wrong product
    ("term1 = tl.exp2(r01 * d0)", "term1 = tl.exp2(r01 * d1)"),
    ("_exp2_by_polynomial(r23 * d3)", "_exp2_by_polynomial(r23 * d2)"),
    ("p = p * r + 0.24025216698646545", "p = p * r + 0.25"),  # a digit of the polynomial
    ("<< 23)", "<< 22)"),
    ("1.0 + tl.exp2(exponent)", "tl.exp2(exponent)"),  # no softcap
    ("valid & (hint >= 0)", "valid & (hint > 0)"),  # hint in the first column ignored
    ("valid & (hint >= 0)", "valid"),  # -1 taken for a hint
    ("hint == target", "hint == target + 1"),  # hit off by one
    ("plain * tl.exp(-beta)", "plain"),  # a hit not rewarded
    ("plain + tl.exp2(z_hint - z_target) * (tl.exp(beta) - 1.0)", "plain"),  # a miss not punished
    ("(tl.exp(beta) - 1.0)", "tl.exp(beta)"),  # expm1 without its 1
    ("row * stride_row", "row * V"),  # stride of the caller ignored
    ("logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))", "betas.new_empty(0)"),
]


def call(logits, targets, hints, betas, fn=ngram_tilt, **kwargs):
    """The op on lists: one row of logits is shared by all targets."""
    rows = torch.tensor([logits], dtype=torch.float32, device=DEVICE).expand(len(targets), -1)
    to = lambda values, dtype: torch.tensor(values, dtype=dtype, device=DEVICE)  # noqa: E731
    return fn(rows, to(targets, torch.int64), to(hints, torch.int64), to(betas, torch.float32), **kwargs)


def probabilities(logits: list[float], hint: int, beta: float, softcap: float) -> list[float]:
    """The tilted distribution from its definition, in float64."""
    weights = [math.exp(softcap * math.tanh(x / softcap)) for x in logits]
    if hint >= 0:
        weights[hint] *= math.exp(beta)
    return [weight / math.fsum(weights) for weight in weights]


@pytest.mark.parametrize("softcap", [30.0, 7.5])
@pytest.mark.parametrize(("hint", "beta"), [(-1, 2.0), (0, 2.625), (4, 1e-3), (2, 0.0), (3, 8.0)])
def test_equals_the_definition(hint: int, beta: float, softcap: float) -> None:
    logits = [-3.0, 41.0, 0.5, 8.0, 12.0]
    got = call(logits, range(5), [hint] * 5, [beta] * 5, softcap=softcap)
    want = [-math.log(p) for p in probabilities(logits, hint, beta, softcap)]
    eager = call(logits, range(5), [hint] * 5, [beta] * 5, ngram_tilt_ref, softcap=softcap)
    numerics.assert_matches_f64("ngram_tilt", got, eager, torch.tensor(want, dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize("V", [1, 2, 130])
def test_total_mass_is_one(V: int) -> None:
    row = torch.randn(V, generator=torch.Generator().manual_seed(V)).mul(4).tolist()
    for hint in {-1, 0, V // 2, V - 1}:
        nll = call(row, range(V), [hint] * V, [2.625] * V)
        assert abs(nll.double().neg().exp().sum().item() - 1.0) <= numerics.SCORE_NATS


@pytest.mark.skipif(not TRITON_RUNS, reason="lse - z_t of the eager reference is exact to 1e-7 alone")
@pytest.mark.parametrize("top", [8.0, 10.0, 15.0])
@pytest.mark.parametrize(("hint", "beta"), [(-1, 0.0), (0, 2.0), (1, 2.0), (1, 1e-3)])
def test_a_sure_row_is_relatively_exact(top: float, hint: int, beta: float) -> None:
    logits = [top, -6.0, -7.0]
    want = -math.log1p(-math.fsum(probabilities(logits, hint, beta, 30.0)[1:]))
    assert abs(call(logits, [0], [hint], [beta]).item() / want - 1.0) <= numerics.CONFIDENT_ROW


def test_never_negative() -> None:
    assert call([500.0, -500.0, 3.0], [0, 0, 0], [0, -1, 2], [8.0, 0.0, 1e-3]).min() >= 0


def test_beta_zero_and_no_hint_are_the_plain_loss() -> None:
    inputs = ngram_tilt_inputs((12, 257), torch.float32, DEVICE)
    plain = ngram_tilt(**inputs | {"hints": torch.full_like(inputs["hints"], -1)})
    zero = ngram_tilt(**inputs | {"betas": torch.zeros_like(inputs["betas"])})
    assert torch.equal(zero, plain)
    unused = {"hints": torch.full_like(inputs["hints"], -1), "betas": torch.full_like(inputs["betas"], math.inf)}
    assert torch.equal(ngram_tilt(**inputs | unused), plain)
    assert not torch.equal(ngram_tilt(**inputs), plain)


@pytest.mark.parametrize(("target", "hint"), [(-1, -1), (3, -1), (0, 3), (0, -2), (1 << 32, 0), (0, 1 << 32)])
def test_index_out_of_range_is_never_a_number(target: int, hint: int) -> None:
    for fn in (ngram_tilt, ngram_tilt_ref):
        nll = call([1.0, 2.0, 3.0], [target, 1], [hint, -1], [1.0, 1.0], fn)
        assert nll.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": 9}, r"targets must be in \[0, 9\), got 9 in row 1"),
        ({"targets": -1}, r"targets must be in \[0, 9\), got -1 in row 1"),
        ({"hints": -2}, r"hints must be in \[-1, 9\), got -2 in row 1"),
    ],
)
def test_check_targets_names_the_first_row(change: dict[str, int], message: str) -> None:
    inputs = ngram_tilt_inputs((3, 9), torch.float32, DEVICE)
    assert torch.equal(ngram_tilt(**inputs, check_targets=True), ngram_tilt(**inputs))
    for key, value in change.items():
        inputs[key][1:] = value
    with pytest.raises(ValueError, match=message):
        ngram_tilt(**inputs, check_targets=True)


@pytest.mark.skipif(not TRITON_RUNS, reason="of the Triton code")
@pytest.mark.parametrize("V", [1, 255, 256, 257, 1023, 1024, 1025, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_vocabulary(V: int, dtype: torch.dtype) -> None:
    inputs = ngram_tilt_inputs((24, V), dtype, DEVICE)
    wide = {key: v.double() if v.is_floating_point() else v for key, v in inputs.items()}
    numerics.assert_matches_f64("ngram_tilt", ngram_tilt(**inputs), ngram_tilt_ref(**inputs), ngram_tilt_ref(**wide))


@pytest.mark.skipif(not TRITON_RUNS, reason="of the Triton code")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinite_logits(dtype: torch.dtype) -> None:
    """NaN makes its own row NaN, wherever it stands; infinities are at the cap."""
    inputs = ngram_tilt_inputs((24, 1100), dtype, DEVICE)
    columns = [0, 255, 256, 600, 1023, 1024, 1099]
    for row, column in enumerate(columns):
        inputs["logits"][row, column] = math.nan
    inputs["logits"][8, 5], inputs["logits"][9, 7] = math.inf, -math.inf
    at_cap = inputs | {"logits": inputs["logits"].clamp(-1e4, 1e4)}
    nll = ngram_tilt(**inputs)
    assert nll.isnan().nonzero()[:, 0].tolist() == list(range(len(columns)))
    assert torch.equal(nll[7:], ngram_tilt(**at_cap)[7:])


def test_int32_indices() -> None:
    inputs = ngram_tilt_inputs((12, 65), torch.bfloat16, DEVICE)
    narrow = inputs | {"targets": inputs["targets"].int(), "hints": inputs["hints"].int()}
    assert torch.equal(ngram_tilt(**narrow), ngram_tilt(**inputs))


def test_no_rows() -> None:
    nll = ngram_tilt(**ngram_tilt_inputs((0, 40), torch.bfloat16, DEVICE))
    assert nll.shape == (0,) and nll.dtype == torch.float32


def test_float64_is_computed_in_float64() -> None:
    inputs = ngram_tilt_inputs((12, 65), torch.float64, "cpu")
    nll = ngram_tilt(**inputs)
    assert nll.dtype == torch.float64 and torch.equal(nll, ngram_tilt_ref(**inputs))


def test_no_gradient() -> None:
    inputs = ngram_tilt_inputs((3, 9), torch.float32, DEVICE)
    leaf = inputs | {"logits": inputs["logits"].requires_grad_()}
    with pytest.raises(ValueError, match="no gradient"):
        ngram_tilt(**leaf)
    with torch.no_grad():
        assert not ngram_tilt(**leaf).requires_grad


BAD = {
    "ndim": ({"logits": torch.zeros(3)}, ValueError, r"\(n_rows, V\) with V >= 1, got \(3,\)"),
    "no columns": ({"logits": torch.zeros(3, 0)}, ValueError, r"got \(3, 0\)"),
    "integer logits": ({"logits": torch.zeros(3, 9, dtype=torch.int64)}, TypeError, "got torch.int64"),
    "columns strided": ({"logits": torch.zeros(9, 3).t()}, ValueError, r"last stride 1, got strides \(1, 3\)"),
    "float targets": ({"targets": torch.zeros(3)}, TypeError, "targets must be torch.int64 or torch.int32"),
    "float hints": ({"hints": torch.zeros(3)}, TypeError, "hints must be torch.int64 or torch.int32"),
    "half betas": ({"betas": torch.zeros(3).half()}, TypeError, "betas must be torch.float32, got torch.float16"),
    "targets too many": ({"targets": torch.zeros(4).long()}, ValueError, r"targets must be .*\(3,\).* got \(4,\)"),
    "hints 2-D": ({"hints": torch.zeros(3, 1).long()}, ValueError, r"hints must be .* got \(3, 1\)"),
    "betas strided": (
        {"betas": torch.zeros(6, device=DEVICE)[::2]},
        ValueError,
        r"betas .* contiguous .* strides \(2,\)",
    ),
    "logits as a list": ({"logits": [[1.0]]}, TypeError, r"logits must be a tensor, got \[\[1.0\]\]"),
    "no targets": ({"targets": None}, TypeError, "targets must be a tensor, got None"),
    "a hint": ({"hints": 3}, TypeError, "hints must be a tensor, got 3"),
    "a beta": ({"betas": 1.0}, TypeError, "betas must be a tensor, got 1.0"),
    "softcap to learn": ({"softcap": torch.tensor(30.0)}, TypeError, r"softcap must be a number, got tensor\(30.*\)"),
    "softcap as a bool": ({"softcap": True}, TypeError, "softcap must be a number, got True"),
    "softcap zero": ({"softcap": 0.0}, ValueError, r"softcap must be in \(0, 38.90\] for V = 9, got 0.0"),
    "softcap NaN": ({"softcap": math.nan}, ValueError, "got nan"),
    "softcap too large": ({"softcap": 38.91}, ValueError, "got 38.91"),
    "elsewhere": ({"hints": torch.zeros(3, device="meta").long()}, ValueError, "hints must be on .* got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str) -> None:
    change, error, message = BAD[case]
    change = {key: v.to(DEVICE) if isinstance(v, torch.Tensor) and not v.is_meta else v for key, v in change.items()}
    with pytest.raises(error, match=message):
        ngram_tilt(**ngram_tilt_inputs((3, 9), torch.float32, DEVICE) | change)


def test_largest_softcap_does_not_overflow() -> None:
    logits = [-300.0] + [300.0] * 8
    nll = call(logits, [0, 0, 0], [-1, 0, 1], [0.0, 8.0, 8.0], softcap=38.9)
    want = [-math.log(probabilities(logits, hint, 8.0, 38.9)[0]) for hint in (-1, 0, 1)]
    want = torch.tensor(want, dtype=torch.float64, device=DEVICE)
    numerics.assert_matches_f64("ngram_tilt", nll, want.float(), want)


@pytest.mark.gpu
def test_float64_on_a_gpu_is_refused() -> None:
    with pytest.raises(TypeError, match="CPU only"):
        ngram_tilt(**ngram_tilt_inputs((3, 9), torch.float64, "cuda"))
