"""Edge cases of kernels/qk_norm_rope.py, and the faults its contract must reject."""

import math
from itertools import chain, combinations
from unittest.mock import patch

import numerics
import pytest
import torch
from torch import Tensor

from niblick.kernels import qk_norm_rope as module
from niblick.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FAULTS = [
    ("axis=2) / d + eps)", "axis=2) / z.shape[2] + eps)"),  # the mean over the padded width
    ("axis=2) / d + eps)", "axis=2) / d)"),  # no eps: the zero vector
    ("tl.where(col < h, sin, -sin)", "tl.where(col < h, -sin, sin)"),  # turned the other way
    ("inside = (token < N) & (col < 2 * h)", "inside = (token < N) & (col < 2 * h - 1)"),  # the last channel stays
    ("mask=here & (col < 2 * h)", "mask=here & (col < h)"),  # the second half loses its partners
    ("tl.where(col < h, col + h, col - h)", "tl.where(col < h, col + h, col)"),  # partner is itself
    ("cos_ptr + token * h + j", "cos_ptr + (token % 8) * h + j"),  # every step at the first positions
    ("(q * cos + partners_q * sin) * scale[:, :, None]", "(q * cos + partners_q * sin) * _rstd(q, d, eps)[:, :, None]"),
    ("p_q * cos - partners_q * sin", "p_q * cos + partners_q * sin"),  # R instead of its transpose, queries
    ("p_k * cos - partners_k * sin", "p_k * cos + partners_k * sin"),  # and keys
    ("(p - (r * c / d)[:, :, None] * z)", "p"),  # no gradient through the norm
    ("(r * c / d)", "(c / d)"),  # z for n
    ("        dq *= tl.load", "        tl.load"),  # the gain missing from dq
    ("dgain += c", "dgain = c"),  # only the last step counts for the gain
    ("dgain.sum(0)", "dgain[0]"),  # only the first program
    ("token * stride_token + col.to", "token * stride_head + col.to"),  # raw heads read as if contiguous
    ("partner.to(tl.int64) * stride_d", "partner.to(tl.int64)"),  # partners of dout read as if contiguous
    ("(head < HEADS) & (token < N) & (col < d)", "(head < HEADS) & (token < N - 1) & (col < d)"),  # last token dropped
    ("k.new_empty(k.shape), q.new_empty(v", "k.new_empty(q.shape), q.new_empty(v"),  # fake lies
    ("v[0].shape if v else 0", "v[0].shape if v else 1"),  # and of what is not there
    ("_store_heads(dv_ptr, dv, at_k", "_store_heads(dk_ptr, dv, at_k"),  # dv in the slots of dk
    ("q, k, *(v or [None]), cos", "q, k, *([k] if v else [None]), cos"),  # the values read where the keys are
    ("_load_heads(v_ptr, at_k, stride_k,", "_load_heads(v_ptr, at_k, G * d,"),  # and as if contiguous
    ("G if dv_ptr is None else H + 2 * G", "G"),  # dk and dv written as if contiguous
    ("H if dv_ptr is None else H + 2 * G", "H"),  # and dq
    ("dq_out, dk_out, dv_out, *tensors", "dq_out, dk_out, None, *tensors"),  # dv forgotten
]


def arguments(
    N: int, H: int, G: int, d: int, h: int, dtype: torch.dtype = torch.float32, table: torch.dtype | None = None
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    angle = torch.rand(N, h, generator=generator) * 6
    cos, sin = (t.to(DEVICE, table or dtype) for t in (angle.cos(), angle.sin()))
    q, k = (torch.randn(N, heads, d, generator=generator).to(DEVICE, dtype) for heads in (H, G))
    gain = (1 + torch.randn(H, generator=generator)).to(DEVICE, torch.promote_types(dtype, torch.float32))
    leaves = {"q": q, "k": k, "gain": gain}
    return {"cos": cos, "sin": sin} | {key: leaf.requires_grad_() for key, leaf in leaves.items()}


def results(fn, tensors: dict[str, object]) -> dict[str, Tensor]:
    outputs = fn(**tensors)
    wanted = [key for key, value in tensors.items() if isinstance(value, Tensor) and value.requires_grad]
    cotangents = [torch.cos(torch.arange(z.numel())).bfloat16().view_as(z).to(z) for z in outputs]
    gradients = torch.autograd.grad(outputs, [tensors[key] for key in wanted], cotangents)
    named = zip(("q_out", "k_out", "v_out"), (z.detach() for z in outputs), strict=False)
    return dict(named) | dict(zip(wanted, gradients, strict=True))


def double(value: object) -> object:
    return value.detach().double().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def fused(tensors: dict[str, Tensor]) -> dict[str, object]:
    """The same heads as one projection, with values behind them."""
    k = tensors["k"]
    v = torch.arange(k.numel()).sin().view_as(k).to(k)
    qkv = torch.cat((tensors["q"], k, v), 1).detach().requires_grad_()
    return tensors | {"q": qkv, "k": None, "kv_heads": k.shape[1]}


def assert_as_reference(tensors: dict[str, object]) -> None:
    got, eager = results(qk_norm_rope, tensors), results(qk_norm_rope_ref, tensors)
    f64 = results(qk_norm_rope_ref, {key: double(value) for key, value in tensors.items()})
    for key in got:
        numerics.assert_matches_f64(key, got[key], eager[key], f64[key])


def test_by_hand() -> None:
    """(3, 0, 0, 4) has mean square 25/4, so it becomes (1.2, 0, 0, 1.6); a quarter turn of channels 0 and 1 moves the
    first to minus the second."""
    q = torch.tensor([[[3.0, 0.0, 0.0, 4.0]]], device=DEVICE)
    cos, sin, gain = (torch.tensor(t, device=DEVICE) for t in ([[0.0]], [[1.0]], [2.0]))
    q_out, k_out = qk_norm_rope(q, q, cos, sin, gain, eps=1e-20)
    for got, want in ((q_out, [0.0, -2.4, 0.0, 3.2]), (k_out, [0.0, -1.2, 0.0, 1.6])):
        want = torch.tensor(want, dtype=torch.float64, device=DEVICE)
        numerics.assert_matches_f64("by hand", got[0, 0], want.float(), want)


SHAPES = [(1, 1, 1, 8, 0), (5, 6, 2, 8, 4), (3, 5, 5, 24, 5), (2, 2, 1, 256, 32), (70, 1, 3, 16, 1)]


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize(("N", "H", "G", "d", "h"), SHAPES)
def test_any_shape(N: int, H: int, G: int, d: int, h: int, gain: bool) -> None:
    tensors = arguments(N, H, G, d, h)
    tensors = tensors if gain else tensors | {"gain": None}
    assert_as_reference(tensors)
    assert_as_reference(fused(tensors))


@pytest.mark.parametrize("table", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_of_gain_and_tables(dtype: torch.dtype, table: torch.dtype | None) -> None:
    tensors = arguments(20, 4, 2, 16, 4, dtype, table)
    assert_as_reference(tensors)
    assert_as_reference(tensors | {"gain": tensors["gain"].detach().to(dtype).requires_grad_()})
    assert_as_reference(fused(tensors))


def test_slices_of_a_fused_projection() -> None:
    """Heads behind one another in a row, every second head, tables as Rotary makes them: the same bits."""
    tensors = arguments(20, 4, 2, 16, 4)
    want = results(qk_norm_rope, tensors)
    fused = torch.cat([tensors["q"], tensors["k"], tensors["k"]], 1).detach()
    spread = torch.stack([tensors["k"], torch.full_like(tensors["k"], math.nan)], 2).detach().flatten(1, 2)
    tables = {key: tensors[key][:, None] for key in ("cos", "sin")}
    for k in (fused[:, 4:6], spread[:, ::2]):
        got = results(qk_norm_rope, tensors | tables | {"q": fused[:, :4].requires_grad_(), "k": k.requires_grad_()})
        assert all(torch.equal(got[key], want[key]) for key in want)


# --------------------------------------------------------------------------------------------- a projection taken whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "H", "G", "d", "h"), [*SHAPES, (40, 8, 4, 64, 8)])
def test_whole_projection_is_its_parts(N: int, H: int, G: int, d: int, h: int, dtype: torch.dtype) -> None:
    """To the bit, in both directions; what comes back is contiguous, and v no part of the input."""
    whole = fused(arguments(N, H, G, d, h, dtype))
    q, k, v = (part.detach().requires_grad_() for part in whole["q"].split((H, G, G), 1))
    want = results(qk_norm_rope, {**whole, "q": q, "k": k, "kv_heads": None})
    got = results(qk_norm_rope, whole)
    dv = torch.cos(torch.arange(v.numel())).bfloat16().view_as(v).to(v)
    assert torch.equal(got["q"], torch.cat((want["q"], want["k"], dv), 1)) and torch.equal(got["v_out"], v)
    assert all(torch.equal(got[key], want[key]) for key in ("q_out", "k_out", "gain"))
    assert all(got[key].is_contiguous() for key in ("q_out", "k_out", "v_out", "q"))
    assert got["v_out"].untyped_storage().data_ptr() != whole["q"].untyped_storage().data_ptr()


def test_rows_and_heads_of_something_wider() -> None:
    whole = fused(arguments(20, 4, 2, 16, 4))
    want = results(qk_norm_rope, whole)
    qkv = whole["q"].detach()
    nan = torch.full_like(qkv, math.nan)
    rows, heads = torch.cat((qkv, nan), 1)[:, :8], torch.stack((qkv, nan), 2).flatten(1, 2)[:, ::2]
    for wider in (rows, heads, torch.cat((qkv, nan), 2)[..., :16], qkv.transpose(0, 1).contiguous().transpose(0, 1)):
        got = results(qk_norm_rope, whole | {"q": wider.requires_grad_()})
        assert all(torch.equal(got[key], want[key]) for key in want)


USED = list(chain.from_iterable(combinations(range(3), n) for n in (1, 2)))


@pytest.mark.parametrize("used", USED)
def test_unused_results_count_as_zeros(used: tuple[int, ...]) -> None:
    """And reach the backward as None, not as zeros to be written and read."""
    whole = fused(arguments(20, 4, 2, 16, 4))
    outputs = qk_norm_rope(**whole)
    douts = [torch.cos(torch.arange(z.numel())).view_as(z).to(z) * (i in used) for i, z in enumerate(outputs)]
    leaves = [whole["q"], whole["gain"]]
    want = torch.autograd.grad(outputs, leaves, douts, retain_graph=True)
    with patch.object(module, "_op_backward", wraps=module._op_backward) as backward:
        got = torch.autograd.grad([outputs[i] for i in used], leaves, [douts[i] for i in used])
    assert [dout is not None for dout in backward.call_args.args[:3]] == [i in used for i in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients_of_any_strides() -> None:
    whole = fused(arguments(20, 4, 2, 16, 4))
    outputs, leaves = qk_norm_rope(**whole), [whole["q"], whole["gain"]]
    q, k, v = (torch.cos(torch.arange(z.numel())).view_as(z).to(z) for z in outputs)
    q = q[:1, :, :1].expand_as(q)
    want = torch.autograd.grad(outputs, leaves, (q.contiguous(), k, v), retain_graph=True)
    k, v = k.transpose(0, 1).contiguous().transpose(0, 1), torch.stack((v, torch.full_like(v, math.nan)), 3)[..., 0]
    got = torch.autograd.grad(outputs, leaves, (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("missing", [(), *USED])
def test_ops_on_a_whole_projection(missing: tuple[int, ...]) -> None:
    whole = fused(arguments(6, 4, 2, 16, 4))
    forward = (whole["q"], None, whole["cos"], whole["sin"], whole["gain"], 2, 1e-6)
    torch.library.opcheck(module._op, forward)
    outputs = module._op(*forward)
    douts = [None if i in missing else torch.ones_like(z) for i, z in enumerate(outputs)]
    inputs = (t.detach() if isinstance(t, Tensor) else t for t in forward)
    torch.library.opcheck(module._op_backward, (*douts, *inputs))


@pytest.mark.parametrize("parts", [(0, 1, 2), (0, 1), (2,)])
def test_whole_projection_compiles_whole(parts: tuple[int, ...]) -> None:
    whole = fused(arguments(6, 4, 2, 16, 4))

    def chosen(fn, **tensors) -> tuple[Tensor, ...]:
        outputs = fn(**tensors)
        return tuple(outputs[i] * 2 for i in parts)

    torch._dynamo.reset()
    compiled = torch.compile(lambda **tensors: chosen(qk_norm_rope, **tensors), fullgraph=True, backend="aot_eager")
    got, want = results(compiled, whole), results(lambda **tensors: chosen(qk_norm_rope, **tensors), whole)
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_one_output_used() -> None:
    tensors = arguments(6, 4, 2, 16, 4)
    _, k_out = qk_norm_rope(**tensors)
    dq, dk, dgain = torch.autograd.grad(k_out.sum(), [tensors[key] for key in ("q", "k", "gain")])
    assert not dq.any() and not dgain.any() and dk.any()
    assert torch.equal(dk, torch.autograd.grad(qk_norm_rope(**tensors)[1].sum(), tensors["k"])[0])


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is refused on a GPU")
def test_float64_is_the_reference_itself() -> None:
    tensors = arguments(10, 4, 2, 16, 4, torch.float64)
    for same in (tensors, fused(tensors)):
        got, want = results(qk_norm_rope, same), results(qk_norm_rope_ref, same)
        for key in want:
            numerics.assert_same_f64(key, got[key], want[key])


def test_no_tokens() -> None:
    empty = results(qk_norm_rope, arguments(0, 4, 2, 16, 4))
    assert empty["q_out"].shape == empty["q"].shape == (0, 4, 16) and empty["k_out"].shape == (0, 2, 16)
    assert empty["gain"].tolist() == [0.0] * 4
    empty = results(qk_norm_rope, fused(arguments(0, 4, 2, 16, 4)))
    assert empty["q"].shape == (0, 8, 16) and empty["v_out"].shape == empty["k_out"].shape == (0, 2, 16)
    assert empty["gain"].tolist() == [0.0] * 4


REFUSED = {
    **{
        f"{name} in a list": ({name: [0.0]}, TypeError, f"expected {name} to be a tensor, got list")
        for name in ("q", "k", "cos", "sin", "gain")
    },
    "no cos": ({"cos": None}, TypeError, "expected cos to be a tensor, got NoneType"),
    "two dimensions": ({"q": torch.zeros(3, 8)}, ValueError, r"q of shape \(N, H, d\).*got \(3, 8\)"),
    "other tokens": ({"k": torch.zeros(4, 2, 8)}, ValueError, r"got \(3, 4, 8\) and \(4, 2, 8\)"),
    "other width": ({"k": torch.zeros(3, 2, 4)}, ValueError, r"and \(3, 2, 4\)"),
    "no heads": ({"k": torch.zeros(3, 0, 8)}, ValueError, r"and \(3, 0, 8\)"),
    "too wide": ({"q": torch.zeros(3, 4, 257), "k": torch.zeros(3, 2, 257)}, ValueError, "d <= 256, got 257"),
    "sin of another shape": ({"sin": torch.zeros(3, 1)}, ValueError, r"\(3, 2\) and \(3, 1\)"),
    "half too wide": ({"cos": torch.zeros(3, 5), "sin": torch.zeros(3, 5)}, ValueError, "2h <= 8"),
    "gain per key": ({"gain": torch.zeros(2)}, ValueError, r"gain of shape \(4,\), got \(2,\)"),
    "no eps": ({"eps": 0.0}, ValueError, "finite eps > 0, got 0"),
    "eps not a number": ({"eps": math.nan}, ValueError, "finite eps > 0, got nan"),
    "eps without end": ({"eps": math.inf}, ValueError, "finite eps > 0, got inf"),
    "eps as a tensor": ({"eps": torch.tensor(1e-6)}, TypeError, "eps to be a number, got tensor"),
    "eps as a bool": ({"eps": True}, TypeError, "eps to be a number, got True"),
    "integers": ({"q": torch.zeros(3, 4, 8, dtype=torch.int32)}, TypeError, "q in .* got torch.int32"),
    "half k": ({"k": torch.zeros(3, 2, 8).half()}, TypeError, "k in float32, got torch.float16"),
    "double gain": ({"gain": torch.zeros(4).double()}, TypeError, "gain in float32, got torch.float64"),
    "double q alone": ({"q": torch.zeros(3, 4, 8).double()}, TypeError, "k in float64, got torch.float32"),
    "channels apart": ({"q": torch.zeros(3, 8, 4).mT}, ValueError, r"adjacent channels, got strides \(32, 1, 4\)"),
    "gain apart": ({"gain": torch.zeros(8)[::2]}, ValueError, r"gain with adjacent .*\(2,\)"),
    "cos apart": ({"cos": torch.zeros(2, 3).mT}, ValueError, r"contiguous cos and sin, got strides \(1, 3\)"),
    "sin with a gradient": ({"sin": torch.zeros(3, 2, requires_grad=True)}, ValueError, "without a gradient"),
    "no keys": ({"k": None}, ValueError, "k=None and kv_heads, got neither"),
    "keys twice": ({"kv_heads": 2}, ValueError, "k=None and kv_heads, got both"),
    "kv_heads as a float": ({"k": None, "kv_heads": 1.0}, TypeError, "kv_heads to be an int, got 1.0"),
    "kv_heads as a bool": ({"k": None, "kv_heads": True}, TypeError, "kv_heads to be an int, got True"),
    "no kv_heads": ({"k": None, "kv_heads": 0}, ValueError, r"got \(3, 4, 8\) with kv_heads=0"),
    "no queries left": ({"k": None, "kv_heads": 2}, ValueError, r"\(N, H \+ 2 kv_heads, d\).*got \(3, 4, 8\) with"),
    "flat projection": ({"k": None, "kv_heads": 1, "q": torch.zeros(3, 32)}, ValueError, r"got \(3, 32\) with"),
    "gain per projected head": ({"k": None, "kv_heads": 1, "gain": torch.zeros(4)}, ValueError, r"shape \(2,\), got"),
    "wide projection": ({"k": None, "kv_heads": 1, "q": torch.zeros(3, 4, 257)}, ValueError, "d <= 256, got 257"),
    "apart": ({"k": None, "kv_heads": 1, "q": torch.zeros(3, 8, 4).mT}, ValueError, "q with adjacent channels"),
    "double tables": ({"k": None, "kv_heads": 1, "cos": torch.zeros(3, 2).double()}, TypeError, "cos in float32"),
    "elsewhere": ({"gain": torch.zeros(4, device="meta")}, ValueError, "got meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    change, error, message = REFUSED[case]
    good = {"q": torch.zeros(3, 4, 8), "k": torch.zeros(3, 2, 8), "cos": torch.zeros(3, 2), "sin": torch.zeros(3, 2)}
    with pytest.raises(error, match=message):
        qk_norm_rope(**{**good, **change})
