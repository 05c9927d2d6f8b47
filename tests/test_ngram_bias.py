"""Edge cases of kernels/ngram_bias.py, and the faults its contract must reject."""

import math

import numerics
import pytest
import torch
from torch import Tensor

from niblick.kernels import ngram_bias as module
from niblick.kernels.ngram_bias import ngram_bias, ngram_bias_inputs, ngram_bias_ref
from niblick.kernels.softcapped_ce import softcapped_ce

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FAULTS = [
    ("return tl.where(inside, z, float(\"-inf\")), s * (E * s)", "return tl.where(inside, z, float(\"-inf\")), s"),
    ("return tl.where(inside, z, float(\"-inf\"))", "return z"),  # columns beyond V counted
    ("z = bias * LOG2E - (2.0 * LOG2E * softcap) * s", "z = -(2.0 * LOG2E * softcap) * s"),  # no bias
    ("z = bias * LOG2E -", "z = bias -"),  # nats taken for bits
    ("bias += factor * tl", "bias = factor * tl"),  # the last row alone
    ("index_ptr + k * stride_index", "index_ptr"),  # the first row K times
    ("factor_ptr + k * stride_factor", "factor_ptr"),
    ("index * stride_table + cols", "(index - index % 2) * stride_table + cols"),
    ("mask=inside & known, other=0.0", "mask=inside, other=0.0"),  # -1 reads what lies before the table
    ("rows_ptr + row * stride_rows", "rows_ptr + row * K * stride_index"),
    ("factors_ptr + row * stride_factors", "factors_ptr"),  # the first token's factors for all
    ("logits_ptr + row * stride_row", "logits_ptr + row * V"),
    ("row * stride_dloss", "row"),  # expanded dloss read as if contiguous
    ("known = (target >= 0) & (target < V)", "known = (target > 0) & (target < V)"),  # no column 0
    ("others = tl.sum(tl.where(cols == target, 0.0, e), axis=0)", "others = tl.sum(e, axis=0)"),  # target counted twice
    ("others = others * tl.exp2(top - higher) + e", "others = others + e"),  # blocks of different tops added
    ("higher = tl.maximum(top, tl.max(z, axis=0))", "higher = top * 0 + 20.0"),  # sums overflow
    ("loss = tl.where(gap > 60.0, 0.6931471805599453 * gap", "loss = tl.where(gap > 1e6, gap"),  # e_target underflows
    ("0.6931471805599453 * gap", "gap"),
    ("tl.where(ignored, 0.0, weight * loss)", "weight * loss"),  # ignored rows count
    ("tl.where(ignored, 0.0, weight * loss)", "tl.where(ignored, 0.0, loss)"),
    ("tl.where(ignored, 0.0, 4.0 * dloss * weight)", "4.0 * dloss * weight"),  # and get a gradient
    ("tl.where(ignored, 0.0, 4.0 * dloss * weight)", "tl.where(ignored, 0.0, 4.0 * dloss)"),
    ("dx_target = -others * slope_target", "dx_target = -total * slope_target"),  # -1 for p_t - 1
    ("dx = tl.where(cols == target, dx_target, unscaled * factor)", "dx = unscaled * factor"),
    ("dx = tl.where(cols == target,", "dx = tl.where(cols == target + 1,"),
    ("unscaled = tl.exp2(z - top) * slope", "unscaled = tl.exp2(z) * slope"),
    ("unscaled = e * slope", "unscaled = e"),
    ("mask=cols < V)\n\n\ndef", "mask=cols < V - 1)\n\n\ndef"),  # last column never written
    ("(n_rows, V), device = logits.shape", "(n_rows, V), device = logits.detach().mul_(0.5).shape"),  # overwrites x
    ("dtype=torch.promote_types(logits.dtype, torch.float32))\n    return", "dtype=logits.dtype)\n    return"),
    ("return logits.new_empty(logits.shape)", "return logits.new_empty(logits.shape, dtype=dloss.dtype)"),
]  # fmt: skip


def inputs_of(V: int = 515, dtype: torch.dtype = torch.float32, n_rows: int = 6, K: int = 3, **change) -> dict:
    return ngram_bias_inputs((n_rows, V, K, 9), dtype, DEVICE) | change


def results(fn, inputs: dict, upstream: float = 1.0) -> dict[str, Tensor]:
    loss = fn(**inputs)
    return {
        "loss": loss.detach(),
        "d_logits": torch.autograd.grad(loss, inputs["logits"], torch.full_like(loss, upstream))[0],
    }


def assert_as_reference(inputs: dict, upstream: float = 1.0, fn=ngram_bias) -> None:
    wide = {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    got, eager = (results(f, inputs, upstream) for f in (fn, ngram_bias_ref))
    f64 = results(ngram_bias_ref, wide | {"logits": wide["logits"].requires_grad_()}, upstream)
    for key in got:
        numerics.assert_matches_f64(key, got[key], eager[key], f64[key])


def test_equals_the_definition() -> None:
    """In plain Python, for one token of three columns and two rows of the table."""
    x, rows, factors = [3.0, -40.0, 12.0], [[-1.0, -2.0, -0.5], [-4.0, -0.1, -3.0]], [0.2, 0.4]
    z = [30 * math.tanh(a / 30) + sum(f * r[j] for f, r in zip(factors, rows, strict=True)) for j, a in enumerate(x)]
    want = [math.log(math.fsum(map(math.exp, z))) - value for value in z]
    got = ngram_bias(
        torch.tensor([x] * 3, device=DEVICE), torch.arange(3, device=DEVICE), torch.tensor(rows, device=DEVICE),
        torch.tensor([[0, 1]] * 3, device=DEVICE), torch.tensor([factors] * 3, device=DEVICE), reduction="none",
    )  # fmt: skip
    assert (got.double().cpu() - torch.tensor(want, dtype=torch.float64)).abs().max() <= numerics.SCORE_NATS


@pytest.mark.parametrize("V", [1, 2, 130, 300])
def test_total_mass_is_one(V: int) -> None:
    one = inputs_of(V, n_rows=4)
    every = {key: value[1:2].expand(V, -1) for key, value in one.items() if key in ("logits", "rows", "factors")}
    nll = ngram_bias(**one | every | {"targets": torch.arange(V, device=DEVICE)})
    assert abs(nll.detach().double().neg().exp().sum().item() - 1.0) <= numerics.SCORE_NATS


def test_no_rows_is_the_plain_loss() -> None:
    inputs = inputs_of()
    inputs["rows"] = torch.full_like(inputs["rows"], -1)
    inputs["table"] = torch.full_like(inputs["table"], 7.0)
    plain = softcapped_ce(inputs["logits"], inputs["targets"], reduction="none")
    assert (ngram_bias(**inputs) - plain).abs().max() <= numerics.SCORE_NATS


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("upstream", [None, 1.0, 0.125])
def test_reductions_weights_and_promises(upstream: float | None, reduction: str) -> None:
    weights = 0.5 + torch.rand(6, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    inputs = inputs_of(300, torch.bfloat16, weights=weights, reduction=reduction, upstream=upstream)
    assert_as_reference(inputs, 1.0 if upstream is None else upstream)


def test_a_kept_promise_changes_no_bit_and_a_broken_one_is_loud() -> None:
    inputs = inputs_of(300, torch.bfloat16)
    want = results(ngram_bias, inputs, 0.5)
    for key, value in results(ngram_bias, inputs | {"upstream": 0.5}, 0.5).items():
        assert torch.equal(value, want[key]), key
    if DEVICE == "cpu":
        with pytest.raises(RuntimeError, match="another gradient than upstream had promised"):
            results(ngram_bias, inputs | {"upstream": 1.0}, 0.5)


@pytest.mark.parametrize("upstream", [None, 1.0])
def test_differentiable_once(upstream: float | None) -> None:
    inputs = inputs_of(130, upstream=upstream)
    with pytest.raises(RuntimeError, match="no autograd formula" if upstream is None else "create_graph=True"):
        (gradient,) = torch.autograd.grad(ngram_bias(**inputs).sum(), inputs["logits"], create_graph=True)
        torch.autograd.grad(gradient.square().sum(), inputs["logits"])


def test_opcheck_of_one_pass() -> None:
    inputs = inputs_of(300, torch.bfloat16)
    tensors = (inputs[key].detach() for key in ("logits", "targets", "table", "rows", "factors"))
    ones = torch.ones((), device=DEVICE).expand(6)
    torch.library.opcheck(torch.ops.niblick.ngram_bias.default, (*tensors, None, ones, 30.0, -100))


@pytest.mark.parametrize("V", [1, 2, 3, 257, 8192, 8200])
def test_any_vocabulary(V: int) -> None:
    assert_as_reference(inputs_of(V, torch.bfloat16, n_rows=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 8])
def test_any_table(K: int, dtype: torch.dtype) -> None:
    inputs = inputs_of(130, K=K)
    narrow = {"table": inputs["table"].to(dtype), "rows": inputs["rows"].int(), "factors": inputs["factors"] / K}
    assert_as_reference(inputs | narrow)


@pytest.mark.parametrize("scale", [30.0, -30.0])
def test_a_bias_far_beyond_the_cap(scale: float) -> None:
    inputs = inputs_of(130)
    assert_as_reference(inputs | {"factors": inputs["factors"] * scale})


@pytest.mark.parametrize(("target", "row"), [(-1, 0), (130, 0), (1 << 32, 0), (0, -2), (0, 9), (0, 1 << 40)])
def test_index_out_of_range_is_never_a_number(target: int, row: int) -> None:
    inputs = inputs_of(130)
    inputs["targets"][1], inputs["rows"][1, 1] = target, row
    for fn in (ngram_bias, ngram_bias_ref):
        assert fn(**inputs).isnan().tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("targets", 130, r"targets in \[0, 130\), got 130 in row 1"),
        ("rows", 9, r"rows in \[-1, 9\), got 9 in row 1"),
        ("rows", -2, r"rows in \[-1, 9\), got -2 in row 1"),
    ],
)
def test_check_targets_names_the_first_row(what: str, value: int, message: str) -> None:
    inputs = inputs_of(130)
    assert torch.equal(ngram_bias(**inputs, check_targets=True), ngram_bias(**inputs))
    inputs[what][1:] = value
    with pytest.raises(ValueError, match=message):
        ngram_bias(**inputs, check_targets=True)


def test_all_rows_ignored_or_none_there() -> None:
    inputs = inputs_of(50)
    got = results(ngram_bias, inputs | {"targets": torch.full_like(inputs["targets"], 7), "ignore_index": 7})
    assert not got["loss"].any() and not got["d_logits"].any()
    empty = {k: v[:0] if k in ("logits", "targets", "rows", "factors") else v for k, v in inputs.items()}
    assert ngram_bias(**empty).shape == (0,)


def test_nan_and_infinite_logits() -> None:
    inputs = inputs_of(130)
    logits = inputs["logits"].detach()
    logits[1, 7], logits[3, 5], logits[4, 5] = math.nan, math.inf, -math.inf
    at_cap = inputs | {"logits": logits.clamp(-1e4, 1e4)}
    loss = ngram_bias(**inputs | {"logits": logits})
    assert loss.isnan().tolist() == [False, True, False, False, False, False]
    assert torch.equal(loss[2:], ngram_bias(**at_cap)[2:])


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is refused on a GPU")
def test_float64_is_computed_in_float64() -> None:
    inputs = {k: v.detach().double() if v.is_floating_point() else v
              for k, v in inputs_of(65).items() if isinstance(v, Tensor)}  # fmt: skip
    inputs["logits"].requires_grad_()
    inputs["reduction"] = "none"
    got, want = (results(fn, inputs) for fn in (ngram_bias, ngram_bias_ref))
    for key in want:
        numerics.assert_same_f64(key, got[key], want[key])


BAD = {
    "ndim": ({"logits": torch.zeros(3)}, ValueError, r"logits of shape \(n_rows, V\), got \(3,\)"),
    "columns strided": ({"logits": torch.zeros(40, 6).t()}, ValueError, "logits with adjacent columns"),
    "table strided": ({"table": torch.zeros(40, 9).t()}, ValueError, "table with adjacent columns"),
    "table of another width": ({"table": torch.zeros(9, 41)}, ValueError, r"table of shape \(9, 40\), got \(9, 41\)"),
    "empty table": ({"table": torch.zeros(0, 40)}, ValueError, r"R >= 1, got \(0, 40\)"),
    "integer table": ({"table": torch.zeros(9, 40).long()}, TypeError, "expected table in torch.bfloat16 or"),
    "table wider than the logits": ({"table": torch.zeros(9, 40).double()}, TypeError, "got torch.float64"),
    "table to learn": ({"table": torch.zeros(9, 40, requires_grad=True)}, ValueError, "table that require no grad"),
    "rows 1-D": ({"rows": torch.zeros(6).long()}, ValueError, r"1 <= K <= 8, got \(6,\)"),
    "too many rows": ({"rows": torch.zeros(6, 9).long()}, ValueError, r"1 <= K <= 8, got \(6, 9\)"),
    "float rows": ({"rows": torch.zeros(6, 3)}, TypeError, "expected rows in torch.int64 or torch.int32"),
    "factors of another K": ({"factors": torch.zeros(6, 2)}, ValueError, r"factors of shape \(6, 3\), got \(6, 2\)"),
    "half factors": ({"factors": torch.zeros(6, 3).half()}, TypeError, "expected factors in torch.float32"),
    "elsewhere": ({"rows": torch.zeros(6, 3, device="meta").long()}, ValueError, "expected rows on .* got meta"),
    "weights": ({"weights": torch.zeros(5)}, ValueError, r"weights of shape \(6,\), got \(5,\)"),
    **{f"{what} in a list": ({what: [[0]]}, TypeError, f"{what} as a tensor, got list")
       for what in ("logits", "targets", "table", "rows", "factors", "weights")},
    "no table": ({"table": None}, TypeError, "table as a tensor, got NoneType"),
    "ignore_index": ({"ignore_index": -(2**63) - 1}, ValueError, "ignore_index in 64 bits, got -9223372036854775809"),
    "upstream in text": ({"upstream": "1.0"}, TypeError, "upstream as a number, got str"),
    "upstream 1e300": ({"upstream": 1e300}, ValueError, r"a finite upstream in torch.float32, got 1e\+300"),
    "upstream nan": ({"upstream": math.nan}, ValueError, "a finite upstream in torch.float32, got nan"),
    "softcap": ({"softcap": 0.0}, ValueError, "expected 0 < softcap <= 10000, got 0.0"),
    "softcap to learn": ({"softcap": torch.tensor(30.0)}, TypeError, "softcap as a number, got Tensor"),
    "reduction": ({"reduction": "max"}, ValueError, "got 'max'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str) -> None:
    change, error, message = BAD[case]
    change = {key: v.to(DEVICE) if isinstance(v, Tensor) and not v.is_meta else v for key, v in change.items()}
    with pytest.raises(error, match=message):
        ngram_bias(**inputs_of(40) | change)


@pytest.mark.gpu
def test_table_beyond_int32() -> None:
    """Its last rows lie beyond 2^31 elements, as with 131,072 columns and 16,384 rows."""
    R, V = 16_400, 131_072
    table = torch.zeros((R, V), dtype=torch.bfloat16, device="cuda")
    table[-1, 5] = 10.0
    inputs = inputs_of(V, torch.bfloat16, n_rows=3, K=1)
    inputs |= {
        "table": table,
        "rows": torch.full((3, 1), R - 1, device="cuda"),
        "targets": torch.tensor([5, 6, 7]).cuda(),
    }
    small = inputs | {"table": table[-1:].clone(), "rows": torch.zeros((3, 1), dtype=torch.int64, device="cuda")}
    assert torch.equal(module.ngram_bias(**inputs), module.ngram_bias(**small))
