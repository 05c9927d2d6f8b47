"""Edge cases of kernels/qk_norm_rope.py, and the faults its contract must reject."""

import math

import numerics
import pytest
import torch
from torch import Tensor

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
    ("k.new_empty(k.shape)\n\n", "k.new_empty(q.shape)\n\n"),  # fake lies
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


def results(fn, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    q, k = fn(**tensors)
    wanted = [key for key, value in tensors.items() if value is not None and value.requires_grad]
    cotangents = [torch.cos(torch.arange(z.numel())).bfloat16().view_as(z).to(z) for z in (q, k)]
    gradients = torch.autograd.grad((q, k), [tensors[key] for key in wanted], cotangents)
    return {"q_out": q.detach(), "k_out": k.detach()} | dict(zip(wanted, gradients, strict=True))


def double(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().double().requires_grad_(value.requires_grad)


def assert_as_reference(tensors: dict[str, Tensor | None]) -> None:
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
    assert_as_reference(tensors if gain else tensors | {"gain": None})


@pytest.mark.parametrize("table", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_of_gain_and_tables(dtype: torch.dtype, table: torch.dtype | None) -> None:
    tensors = arguments(20, 4, 2, 16, 4, dtype, table)
    assert_as_reference(tensors)
    assert_as_reference(tensors | {"gain": tensors["gain"].detach().to(dtype).requires_grad_()})


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


def test_one_output_used() -> None:
    tensors = arguments(6, 4, 2, 16, 4)
    _, k_out = qk_norm_rope(**tensors)
    dq, dk, dgain = torch.autograd.grad(k_out.sum(), [tensors[key] for key in ("q", "k", "gain")])
    assert not dq.any() and not dgain.any() and dk.any()
    assert torch.equal(dk, torch.autograd.grad(qk_norm_rope(**tensors)[1].sum(), tensors["k"])[0])


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is refused on a GPU")
def test_float64_is_the_reference_itself() -> None:
    tensors = arguments(10, 4, 2, 16, 4, torch.float64)
    got, want = results(qk_norm_rope, tensors), results(qk_norm_rope_ref, tensors)
    for key in want:
        numerics.assert_same_f64(key, got[key], want[key])


def test_no_tokens() -> None:
    empty = results(qk_norm_rope, arguments(0, 4, 2, 16, 4))
    assert empty["q_out"].shape == empty["q"].shape == (0, 4, 16) and empty["k_out"].shape == (0, 2, 16)
    assert empty["gain"].tolist() == [0.0] * 4


REFUSED = {
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
    "elsewhere": ({"gain": torch.zeros(4, device="meta")}, ValueError, "got meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    change, error, message = REFUSED[case]
    good = {"q": torch.zeros(3, 4, 8), "k": torch.zeros(3, 2, 8), "cos": torch.zeros(3, 2), "sin": torch.zeros(3, 2)}
    with pytest.raises(error, match=message):
        qk_norm_rope(**{**good, **change})
