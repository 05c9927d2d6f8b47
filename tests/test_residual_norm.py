"""Edge cases of kernels/residual_norm.py, and the faults its contract must reject."""

import math

import numerics
import pytest
import torch
from torch import Tensor

from niblick.kernels.residual_norm import residual_norm, residual_norm_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FAULTS = [
    ("stride_y, 1, D) * _scale(y_scale_ptr, cols, D)\n", "stride_y, 1, D)\n"),  # a scale forgotten
    ("u += _load(z_ptr, row", "u = _load(z_ptr, row"),  # the third term alone
    ("n = u * (norm_scale / tl.sqrt", "n = u * (1.0 / tl.sqrt"),  # no scale of the norm
    ("n = u * (norm_scale / tl.sqrt(tl.sum(u * u) / D + eps))", "n = u * (norm_scale / tl.sqrt(tl.sum(u * u) / D))"),
    ("(norm_scale / tl.sqrt(tl.sum(u * u) / D", "(norm_scale / tl.sqrt(tl.sum(u * u) / BLOCK_D"),
    ("tl.store(u_ptr + row * D + cols, u.to", "tl.store(u_ptr + row * D + cols, n.to"),
    ("g += norm_scale * rstd * (dn", "g = norm_scale * rstd * (dn"),  # gradient of u lost
    ("g += norm_scale * rstd * (dn", "g += rstd * (dn"),
    ("- u * (rstd * rstd * (tl.sum(u * dn) / D)))", ")"),  # rstd taken as a constant
    ("(rstd * rstd * (tl.sum(u * dn) / D))", "(rstd * (tl.sum(u * dn) / D))"),
    ("u += z * z_scale", "u += z"),
    ("(g * x_scale + ds).to", "(g + ds).to"),  # dx without its scale
    ("y_share += g * y", "y_share = g * y"),  # only the last row
    ("x_share += g * s", "x_share += g * y"),
    ("z_share += g * z", "z_share += tl.where(row < N - 1, g * z, 0.0)"),  # last row left out
    ("(first + tl.arange(0, BLOCK_N))", "(first + 1 + tl.arange(0, BLOCK_N))"),  # share of the first program lost
    ("+ columns, mask=cols < D, other", "+ columns, mask=cols < D - 1, other"),  # last channel
    ("u.to(u_ptr.dtype.element_ty), mask=cols < D)", "u.to(u_ptr.dtype.element_ty), mask=cols < D - 1)"),
    ("columns = cols.to(tl.int64) * stride_col", "columns = cols.to(tl.int64)"),  # gradients read as if contiguous
    ("    return _allocate(x, return_sum, head)\n", "    return _allocate(x, return_sum, head + 1)\n"),  # in the fake
    ("(g * x_scale + ds).to", "(g * x_scale).to"),  # gradient of the sum forgotten
    ("(g * x_scale + ds).to", "((g + ds) * x_scale).to"),  # ... or scaled
    ("x_share += g * s", "x_share += g * _load(x_ptr, row, cols, stride_x, 1, D)"),  # without the addend
    ("s += _load(addend_ptr, row, cols, stride_addend, 1, D)\n    u =", "u ="),
    ("tl.store(s_ptr + row * D + cols, s.to", "tl.store(s_ptr + row * D + cols, u.to"),
    ("tl.store(h_ptr + row * HEAD + cols, n.to", "tl.store(h_ptr + row * HEAD + cols, u.to"),
    ("tl.store(h_ptr + row * HEAD + cols, n", "tl.store(h_ptr + row * HEAD + (HEAD - 1 - cols), n"),
    ("dn += _load(dh_ptr, row, cols, HEAD, 1, HEAD)", "dn += _load(dh_ptr, row, cols % HEAD, HEAD, 1, HEAD)"),
    ("dn += _load(dh_ptr, row, cols, HEAD, 1, HEAD)", "dn += _load(dh_ptr, row, cols, HEAD, 1, HEAD - 1)"),
    ("dn += _load(dh_ptr", "g += _load(dh_ptr"),  # joins the gradient of u
    ("dh = None if dh is None else dh.contiguous()", "dh = dh"),  # read as if contiguous
]

CHOICES = [  # which of the terms there are, x first, and which of them have a scale
    ("--", ""),
    ("s-", ""),
    ("-s", ""),
    ("ss", ""),
    ("--", "-"),
    ("ss", "s"),
    ("-s", "s"),
    ("s-", "-"),
]


def arguments(
    N: int,
    D: int,
    terms: str,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype | None = None,
    addend: bool = False,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    scale_dtype = scale_dtype or torch.promote_types(dtype, torch.float32)
    tensors = {}
    for name, scaled in zip("xyz", terms, strict=False):
        tensors[name] = torch.randn(N, D, generator=generator).to(DEVICE, dtype).requires_grad_()
        if scaled == "s":
            scale = 1 + torch.randn(D, generator=generator) / 2
            tensors[f"{name}_scale"] = scale.to(DEVICE, scale_dtype).requires_grad_()
    if addend:
        tensors["addend"] = torch.randn(N, D, generator=generator).to(DEVICE, dtype).requires_grad_()
    return tensors


def results(
    fn, tensors: dict[str, Tensor], used: str = "un", kept: str = "un", head: int = 0, norm_scale: float = 0.6
) -> dict[str, Tensor]:
    """The results named in kept (of u, n, s and h), and the gradients if those named in used take part in a loss."""
    options = {"return_sum": "s" in kept, "head": head if "h" in kept else 0}
    outputs = dict(zip(kept, fn(**tensors, **options, norm_scale=norm_scale), strict=True))
    angles = {name: torch.arange(t.numel(), device=DEVICE).view_as(t) for name, t in outputs.items()}
    cotangents = [torch.cos(angles[name] + i).bfloat16().to(outputs[name]) for i, name in enumerate(used)]
    sources = [outputs[name] for name in used]
    gradients = torch.autograd.grad(sources, list(tensors.values()), cotangents, materialize_grads=True)
    return {name: t.detach() for name, t in outputs.items()} | dict(zip(tensors, gradients, strict=True))


def assert_as_reference(tensors: dict[str, Tensor], used: str = "un", kept: str = "un", head: int = 0) -> None:
    got, eager = (results(fn, tensors, used, kept, head) for fn in (residual_norm, residual_norm_ref))
    doubled = {key: value.detach().double().requires_grad_() for key, value in tensors.items()}
    f64 = results(residual_norm_ref, doubled, used, kept, head)
    for key in got:
        numerics.assert_matches_f64(key, got[key], eager[key], f64[key])


def test_by_hand() -> None:
    """Mean square 25 and 100: n is u over its root mean square, times norm_scale."""
    x = torch.tensor([[1.0, 1.0], [10.0, 10.0]], device=DEVICE)
    y = torch.tensor([[3.0, 2.0], [2.0, -10.0]], device=DEVICE)
    scale = torch.tensor([2.0, 2.0], device=DEVICE)
    u, n = residual_norm(x, y, y_scale=scale, norm_scale=0.5)
    assert u.tolist() == [[7.0, 5.0], [14.0, -10.0]]
    u, n = residual_norm(x, y, scale, z=-y, norm_scale=0.5, eps=0.0)
    assert u.tolist() == [[2.0, 2.0], [20.0, 20.0]] and n.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    u, n, s, h = residual_norm(x, y, scale, addend=-y, z=y, return_sum=True, head=1, eps=0.0)
    assert s.tolist() == [[-2.0, -1.0], [8.0, 20.0]] and u.tolist() == [[2.0, 2.0], [20.0, 20.0]]
    assert n.tolist() == [[1.0, 1.0], [1.0, 1.0]] and h.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("used", ["un", "u", "n"])
@pytest.mark.parametrize("terms", ["".join(choice) for choice in CHOICES])
def test_any_terms_and_scales(terms: str, used: str) -> None:
    assert_as_reference(arguments(11, 24, terms), used)


CHAINS = [  # whether there is an addend, the results, and which of them take part in the loss
    (True, "un", "un"),
    (True, "un", "u"),
    (True, "uns", "uns"),
    (True, "uns", "ns"),
    (True, "uns", "u"),
    (True, "uns", "s"),
    (False, "unh", "unh"),
    (False, "unh", "h"),
    (True, "unh", "uh"),
    (True, "unsh", "unsh"),
    (True, "unsh", "sh"),
]


@pytest.mark.parametrize(("addend", "kept", "used"), CHAINS)
@pytest.mark.parametrize("terms", ["--", "ss", "-s", "s-", "sss", "-s-"])
def test_addend_sum_and_head(terms: str, addend: bool, kept: str, used: str) -> None:
    assert_as_reference(arguments(7, 21, terms, addend=addend), used, kept, head=5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head", [1, 12, 40])
def test_any_head(head: int, dtype: torch.dtype) -> None:
    """Up to all channels, which is a copy none the less."""
    tensors = arguments(9, 40, "sss", dtype, addend=True)
    assert_as_reference(tensors, "unsh", "unsh", head)
    _, n, _, h = residual_norm(**tensors, return_sum=True, head=head)
    assert h.is_contiguous() and h.data_ptr() != n.data_ptr() and torch.equal(h, n[:, :head])


def test_the_sum_has_one_gradient() -> None:
    """x and addend get the same tensor: one write."""
    tensors = arguments(4, 8, "ss", addend=True)
    outputs = residual_norm(**tensors, return_sum=True, head=3)
    dx, daddend = torch.autograd.grad(sum(t.sum() for t in outputs), [tensors["x"], tensors["addend"]])
    assert dx.data_ptr() == daddend.data_ptr()


@pytest.mark.parametrize(("N", "D"), [(1, 1), (3, 2), (2, 768), (9, 512), (50, 83)])
def test_any_shape(N: int, D: int) -> None:
    assert_as_reference(arguments(N, D, "-s", torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_of_the_streams_type(dtype: torch.dtype) -> None:
    assert_as_reference(arguments(40, 32, "sss", dtype, dtype))


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is refused on a GPU")
@pytest.mark.parametrize("terms", ["--", "ss-", "-ss"])
def test_float64_is_the_reference_itself(terms: str) -> None:
    tensors = arguments(30, 16, terms, torch.float64, addend=True)
    got, want = (results(fn, tensors, "unsh", "unsh", 16) for fn in (residual_norm, residual_norm_ref))
    for key in want:
        numerics.assert_same_f64(key, got[key], want[key])


def test_a_row_of_zeros_and_no_rows() -> None:
    tensors = {key: torch.zeros_like(value).requires_grad_() for key, value in arguments(2, 8, "ss").items()}
    assert not residual_norm(**tensors)[1].any()
    assert_as_reference(tensors)
    empty = results(residual_norm, arguments(0, 16, "s-s", addend=True), "unsh", "unsh", head=4)
    assert empty["u"].shape == empty["s"].shape == empty["z"].shape == empty["addend"].shape == (0, 16)
    assert empty["h"].shape == (0, 4)
    assert empty["x_scale"].tolist() == [0.0] * 16


def test_one_tensor_twice() -> None:
    """x as x and as y: both shares of its gradient arrive."""
    x = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    u, _ = residual_norm(x, x)
    assert torch.autograd.grad(u.sum(), x)[0].tolist() == [[2.0] * 8] * 4
    u, _, s = residual_norm(x, x, addend=x, return_sum=True)
    assert torch.autograd.grad(u.sum() + s.sum(), x)[0].tolist() == [[5.0] * 8] * 4


REFUSED = {
    "one dimension": ({"x": torch.zeros(16)}, ValueError, r"x of shape \(N, D\), got \(16,\)"),
    "no channels": ({"x": torch.zeros(4, 0)}, ValueError, r"got \(4, 0\)"),
    "another shape": ({"y": torch.zeros(1, 16)}, ValueError, r"y of shape \(4, 16\), got \(1, 16\)"),
    "another type": ({"y": torch.zeros(4, 16).half()}, TypeError, "y in torch.float32 like x, got torch.float16"),
    "integers": ({"x": torch.zeros(4, 16, dtype=torch.int32)}, TypeError, "x in one of .*, got torch.int32"),
    "channels apart": ({"z": torch.zeros(16, 4).t()}, ValueError, r"z with adjacent channels, got strides \(1, 4\)"),
    "elsewhere": ({"y": torch.zeros(4, 16, device="meta")}, ValueError, "y on cpu, got meta"),
    "one scale for all": ({"x_scale": torch.ones(1)}, ValueError, r"x_scale of shape \(16,\), got \(1,\)"),
    "a wide scale": ({"y_scale": torch.ones(16).double()}, TypeError, "y_scale in .* got torch.float64"),
    "elements apart": ({"y_scale": torch.ones(32)[::2]}, ValueError, "y_scale with adjacent elements, got stride 2"),
    "scale elsewhere": ({"x_scale": torch.ones(16, device="meta")}, ValueError, "x_scale on cpu, got meta"),
    "scale of nothing": ({"z_scale": torch.ones(16)}, ValueError, "no z_scale without z"),
    "negative eps": ({"eps": -1.0}, ValueError, "eps >= 0, got -1.0"),
    "eps of no value": ({"eps": math.nan}, ValueError, "finite eps, got nan"),
    "endless eps": ({"eps": math.inf}, ValueError, "finite eps, got inf"),
    "eps to learn": ({"eps": torch.tensor(1.0)}, TypeError, r"eps to be a number, got tensor\(1.\)"),
    "norm_scale to learn": ({"norm_scale": torch.ones(1)}, TypeError, r"norm_scale to be a number, got tensor"),
    "norm_scale as a bool": ({"norm_scale": True}, TypeError, "norm_scale to be a number, got True"),
    "norm_scale of no value": ({"norm_scale": math.nan}, ValueError, "finite norm_scale, got nan"),
    "x as a list": ({"x": [1.0]}, TypeError, r"x to be a tensor, got \[1.0\]"),
    "no y": ({"y": None}, TypeError, "y to be a tensor, got None"),
    "z as a number": ({"z": 0.0}, TypeError, "z to be a tensor, got 0.0"),
    "addend as a number": ({"addend": 0.0}, TypeError, "addend to be a tensor, got 0.0"),
    "addend of another type": ({"addend": torch.zeros(4, 16).half()}, TypeError, "addend in torch.float32 like x, got"),
    "addend of another shape": ({"addend": torch.zeros(4, 1)}, ValueError, r"addend of shape \(4, 16\), got \(4, 1\)"),
    "sum of one": ({"return_sum": True}, ValueError, "an addend with return_sum, got None"),
    "sum as a number": ({"return_sum": 1}, TypeError, "return_sum to be True or False, got 1"),
    "head beyond the channels": ({"head": 17}, ValueError, "0 <= head <= 16, got 17"),
    "head below zero": ({"head": -1}, ValueError, "0 <= head <= 16, got -1"),
    "head as a bool": ({"head": True}, TypeError, "head to be an int, got True"),
    "half a head": ({"head": 2.5}, TypeError, "head to be an int, got 2.5"),
    "x_scale as a number": ({"x_scale": 0.5}, TypeError, "x_scale to be a tensor, got 0.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    change, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        residual_norm(**{"x": torch.zeros(4, 16), "y": torch.zeros(4, 16), **change})
