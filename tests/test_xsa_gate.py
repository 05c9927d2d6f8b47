"""Edge cases of kernels/xsa_gate.py, and the faults its contract must reject."""

import math

import numerics
import pytest
import torch
from torch import Tensor

from niblick.kernels.xsa_gate import xsa_gate, xsa_gate_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FAULTS = [
    ("there & (number < H // G)", "there & (number < 1)"),  # only the first head of each group
    ("group * (H // G) + number", "number * G + group"),  # heads of a group taken as if G apart
    ("(token < N) & (group < G)", "(token < N - 1) & (group < G)"),  # last token dropped
    ("(token < N) & (col < W), other", "(token < N) & (col < W - 1), other"),  # the last channel of x unread
    ("y -= tl.sum(y * u, axis=2)[:, :, None] * u", "y = tl.sum(y * u, axis=2)[:, :, None] * u"),  # kept, not excluded
    ("tl.where(z > 0, s, e * s)", "tl.where(z > 0, e * s, s)"),  # sign of the gate
    ("amplitude * tl.where(", "tl.where("),  # the amplitude forgotten
    ("z = gate_scale * z", "z = 1.0 * z"),  # the scale forgotten, in the gate
    ("gate_scale * amplitude * e * s * s", "amplitude * e * s * s"),  # in its derivative
    ("* e * s * s", "* s"),  # no derivative of the sigmoid
    ("        p -= t * u\n", ""),  # dout's component along u not excluded
    ("(a * s) * p + (a * t) * y", "(a * s) * p"),  # the value moved by one of two paths
    ("tl.sum(a * s * t, axis=0)", "tl.sum(s * t, axis=0)"),
    ("tl.where(longer, -along, along)", "-along"),  # values shorter than 1e-12 taken for longer ones
    ("tl.where(longer, -along, along)", "along"),  # and the other way round
    ("dv = -inverse * (both + tl.where", "dv = -(both + tl.where"),  # the value taken for its unit vector
    ("(a * p).to(dy_ptr", "p.to(dy_ptr"),  # no gate on dy
    ("dz = slope * tl.sum(y * p, axis=2)", "dz = slope * tl.sum(y * a * p, axis=2)"),  # gated twice
    ("dweight += dz * x", "dweight = dz * x"),  # only the last step counts
    ("shares.sum(0)", "shares[0]"),  # only the first program
    ("col.to(tl.int64) * stride_dout_d", "col.to(tl.int64)"),  # dout read as if contiguous
    ("token * stride_x + col, mask=here", "token * W + col, mask=here"),  # x read as if contiguous
    ("y.new_empty(y.shape)", "y.new_empty(y.shape, dtype=torch.float64)"),  # fake lies
]


def arguments(
    N: int, H: int, G: int, d: int, W: int, dtype: torch.dtype = torch.float32, logits: bool = False
) -> dict[str, Tensor]:
    """G = 0: no v. W = 0: no gate, or with logits the gate's own."""
    generator = torch.Generator().manual_seed(5)
    accurate = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    tensors = {"y": draw(N, H, d)}
    if G:
        tensors["v"] = draw(N, G, d)
    if W:
        tensors |= {"x": draw(N, W), "gate_weight": draw(H, W, dtype=accurate)}
    return tensors | ({"gate_logits": draw(N, H)} if logits else {})


def results(fn, tensors: dict[str, Tensor], **numbers: float) -> dict[str, Tensor]:
    out = fn(**tensors, **numbers)
    dout = torch.cos(torch.arange(out.numel())).bfloat16().view_as(out).to(out)
    return {"out": out.detach()} | dict(zip(tensors, torch.autograd.grad(out, tensors.values(), dout), strict=True))


def assert_as_reference(tensors: dict[str, Tensor], **numbers: float) -> None:
    got, eager = results(xsa_gate, tensors, **numbers), results(xsa_gate_ref, tensors, **numbers)
    doubles = {key: value.detach().double().requires_grad_() for key, value in tensors.items()}
    f64 = results(xsa_gate_ref, doubles, **numbers)
    for key in got:
        numerics.assert_matches_f64(key, got[key], eager[key], f64[key])


def test_by_hand() -> None:
    """Two query heads share the value (0, 3): both lose their second channel. Logits 0 and ln 3 open the gates by 1/2
    and 3/4, twice that with amplitude 2."""
    y = torch.tensor([[[2.0, 5.0], [4.0, -1.0]]], device=DEVICE)
    v = torch.tensor([[[0.0, 3.0]]], device=DEVICE)
    z = torch.tensor([[0.0, math.log(3)]], device=DEVICE)
    want = torch.tensor([[2.0, 0.0], [6.0, 0.0]], dtype=torch.float64, device=DEVICE)
    got = xsa_gate(y, v, gate_logits=z, amplitude=2.0)
    numerics.assert_matches_f64("by hand", got[0], want.float(), want)
    got = xsa_gate(y, v, torch.ones(1, 1, device=DEVICE), z.mT / 2, 2.0, amplitude=2.0)
    numerics.assert_matches_f64("by hand", got[0], want.float(), want)
    assert xsa_gate(y, gate_logits=z[:, :1].expand(1, 2).clone()).tolist() == (y / 2).tolist()


def test_result_and_gradients_are_contiguous_whatever_the_strides() -> None:
    tensors = arguments(6, 4, 2, 16, 3)
    for name in ("y", "v"):
        tensors[name] = tensors[name].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not tensors["y"].is_contiguous()
    assert xsa_gate(**tensors).is_contiguous()
    got = results(xsa_gate, tensors)
    assert all(gradient.is_contiguous() for gradient in got.values())
    assert_as_reference(tensors)


def test_output_along_its_own_value_vanishes() -> None:
    """As for a document's first token, which attends to itself alone: nothing is left, and all gradients are finite."""
    tensors = arguments(6, 4, 2, 64, 0)
    tensors["y"] = tensors["v"].detach().repeat_interleave(2, dim=1).requires_grad_()
    got = results(xsa_gate, tensors)
    assert got["out"].abs().max() < 1e-5 * tensors["y"].abs().max()
    assert all(value.isfinite().all() for value in got.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_no_length(dtype: torch.dtype) -> None:
    """Nothing is excluded along a zero value; one shorter than 1e-12 counts for less than a unit vector."""
    tensors = arguments(5, 4, 2, 16, 3, dtype)
    v = tensors["v"].detach().clone()
    v[0], v[1, 0], v[2, 1] = 0.0, v[1, 0] * 1e-13, v[2, 1] * 1e-11
    assert_as_reference(tensors | {"v": v.requires_grad_()})
    assert torch.equal(xsa_gate(tensors["y"], v)[0], tensors["y"][0])


SHAPES = [(1, 1, 1, 8, 1), (5, 6, 2, 8, 4), (3, 5, 5, 24, 5), (2, 2, 1, 256, 64), (40, 12, 1, 16, 12), (9, 8, 8, 32, 3)]


@pytest.mark.parametrize("kind", ["both", "logits", "no gate", "gate alone", "logits alone"])
@pytest.mark.parametrize(("N", "H", "G", "d", "W"), SHAPES)
def test_any_shape(N: int, H: int, G: int, d: int, W: int, kind: str) -> None:
    G = 0 if "alone" in kind else G
    W = 0 if "logits" in kind or kind == "no gate" else W
    assert_as_reference(arguments(N, H, G, d, W, logits="logits" in kind), gate_scale=0.5, amplitude=2.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_and_wide_logits(dtype: torch.dtype) -> None:
    tensors = arguments(20, 4, 2, 16, 12, dtype)
    assert_as_reference(tensors)
    assert_as_reference(tensors | {"gate_weight": tensors["gate_weight"].detach().to(dtype).requires_grad_()})
    tensors = arguments(20, 4, 2, 16, 0, dtype, logits=True)
    assert_as_reference(tensors | {"gate_logits": tensors["gate_logits"].detach().float().requires_grad_()})


def test_slices_of_wider_tensors() -> None:
    """Values behind keys in a fused projection, the first channels of the stream: the same bits."""
    tensors = arguments(20, 4, 2, 16, 12)
    want = results(xsa_gate, tensors)
    wide = {key: torch.cat((tensors[key], tensors[key]), 1).detach() for key in ("v", "x")}
    got = results(xsa_gate, tensors | {"v": wide["v"][:, 2:].requires_grad_(), "x": wide["x"][:, :12].requires_grad_()})
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert got["x"].shape == (20, 12)


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is refused on a GPU")
@pytest.mark.parametrize("logits", [True, False])
def test_float64_is_the_reference_itself(logits: bool) -> None:
    tensors = arguments(10, 4, 2, 16, 0 if logits else 3, torch.float64, logits)
    got, want = results(xsa_gate, tensors), results(xsa_gate_ref, tensors)
    for key in want:
        numerics.assert_same_f64(key, got[key], want[key])


def test_no_tokens() -> None:
    empty = results(xsa_gate, arguments(0, 4, 2, 16, 3))
    assert empty["out"].shape == empty["y"].shape == (0, 4, 16) and empty["x"].shape == (0, 3)
    assert empty["gate_weight"].shape == (4, 3) and not empty["gate_weight"].any()


REFUSED = {
    **{
        f"{name} in a list": ({name: [0.0]}, TypeError, f"expected {name} to be a tensor, got list")
        for name in ("y", "v", "x", "gate_weight", "gate_logits")
    },
    "no y": ({"y": None}, TypeError, "expected y to be a tensor, got NoneType"),
    "two dimensions": ({"y": torch.zeros(3, 8)}, ValueError, r"y of shape \(N, H, d\).*got \(3, 8\)"),
    "too wide": ({"y": torch.zeros(3, 4, 257)}, ValueError, r"d <= 256, got \(3, 4, 257\)"),
    "nothing to do": ({"v": None, "x": None, "gate_weight": None}, ValueError, "nothing to do"),
    "x alone": ({"gate_weight": None}, ValueError, "got a mixture"),
    "two gates": ({"gate_logits": torch.zeros(3, 4)}, ValueError, "got a mixture"),
    "other tokens": ({"v": torch.zeros(4, 2, 8)}, ValueError, r"v of shape \(3, G, 8\).*got \(4, 2, 8\)"),
    "three groups": ({"v": torch.zeros(3, 3, 8)}, ValueError, "G dividing 4"),
    "weight per value": ({"gate_weight": torch.zeros(2, 5)}, ValueError, r"shape \(4, W\).*got \(2, 5\)"),
    "weight too wide": ({"gate_weight": torch.zeros(4, 65)}, ValueError, r"W <= 64, else gate_logits; got \(4, 65\)"),
    "whole stream": ({"x": torch.zeros(3, 32)}, ValueError, r"shape \(3, 5\), such as .* got \(3, 32\)"),
    "logits per value": (
        {"x": None, "gate_weight": None, "gate_logits": torch.zeros(3, 2)},
        ValueError,
        r"gate_logits of shape \(3, 4\), got \(3, 2\)",
    ),
    "integers": ({"y": torch.zeros(3, 4, 8, dtype=torch.int32)}, TypeError, "y in .* got torch.int32"),
    "half v": ({"v": torch.zeros(3, 2, 8).half()}, TypeError, "v in float32, got torch.float16"),
    "double weight": ({"gate_weight": torch.zeros(4, 5).double()}, TypeError, "got torch.float64"),
    "double y alone": ({"y": torch.zeros(3, 4, 8).double()}, TypeError, "v in float64, got torch.float32"),
    "channels apart": ({"v": torch.zeros(3, 8, 2).mT}, ValueError, r"v with adjacent.*got strides \(16, 1, 2\)"),
    "weight apart": ({"gate_weight": torch.zeros(4, 6)[:, :5]}, ValueError, r"contiguous gate_weight.*\(6, 1\)"),
    "elsewhere": ({"x": torch.zeros(3, 5, device="meta")}, ValueError, "got meta"),
    "scale as a tensor": ({"gate_scale": torch.ones((), requires_grad=True)}, TypeError, "gate_scale to be a number"),
    "amplitude as a tensor": ({"amplitude": torch.tensor(2.0)}, TypeError, "amplitude to be a number, got tensor"),
    "scale as a bool": ({"gate_scale": True}, TypeError, "gate_scale to be a number, got True"),
    "scale without end": ({"gate_scale": math.inf}, ValueError, "finite gate_scale, got inf"),
    "amplitude not a number": ({"amplitude": math.nan}, ValueError, "finite amplitude, got nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    change, error, message = REFUSED[case]
    good = {"v": torch.zeros(3, 2, 8), "x": torch.zeros(3, 5), "gate_weight": torch.zeros(4, 5)}
    with pytest.raises(error, match=message):
        xsa_gate(**{"y": torch.zeros(3, 4, 8), **good, **change})
