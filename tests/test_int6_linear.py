"""Layout and edge cases of int6_linear and the faults that its contract must reject."""

import numerics
import pytest
import torch
import triton

from niblick.kernels.int6_linear import (
    SMALL_M,
    int6_linear,
    int6_linear_inputs,
    int6_linear_ref,
    int6_pack,
    int6_unpack,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON_RUNS = DEVICE == "cuda" or triton.knobs.runtime.interpret

FAULTS = [
    ("& 63) - 32)", "& 31) - 32)"),
    ("& 63) - 32)", "& 63) - 31)"),
    ("((p1 >> 4) & 0x0C0C)", "((p1 >> 2) & 0x0C0C)"),
    ("((p2 >> 2) & 0x3030)", "((p2 >> 4) & 0x3030)"),
    ("v >> 8 if HIGH else v", "v if HIGH else v"),
    ("p1 = tl.load(packed_ptrs + E,", "p1 = tl.load(packed_ptrs + 2 * E,"),  # the order of the planes
    (
        "p1 if j < 4 else (p2 if j < 6 else p3))\n            q",
        "p2 if j < 4 else (p1 if j < 6 else p3))\n            q",
    ),
    ("x = tl.load(x_ptrs + j * E, mask=mask", "x = tl.load(x_ptrs + (j ^ 1) * E, mask=mask"),  # strips exchanged
    ("mask = x_mask & inside[:, None]", "mask = x_mask"),  # beyond a strip's end
    ("EVEN: tl.constexpr = E %", "EVEN: tl.constexpr = 0 * E %"),
    ("i = tl.program_id(1) * (TURNS * BLOCK_I)", "i = tl.program_id(1) * BLOCK_I"),  # splits overlap
    (
        "for turn in tl.range(0, TURNS, num_stages=STAGES):\n        if EVEN",
        "for turn in tl.range(1, TURNS, num_stages=STAGES):\n        if EVEN",
    ),
    ("mask=x_mask & (n < N))", "mask=x_mask & (n < N - 1))"),  # last column never written
    ("x_mask = m < M", "x_mask = m < M - 1"),  # last row never written
    ("tl.static_range(SPLITS):", "tl.static_range(1):"),  # one share instead of all
    ("acc *= tl.load(scale_ptr + n, mask=n < N", "acc *= tl.load(scale_ptr + 0 * n, mask=n < N"),
    ("acc = tl.dot(t, b, acc", "acc = tl.dot(t, b"),  # the low-rank term alone
    ("b_ptr + n * RANK", "b_ptr + n"),
    ("p3 = _fourth(p0, p1, p2, None)", "p3 = _fourth(p1, p0, p2, None)"),  # the dequantiser
    ("tl.float32, None) * scale", "tl.float32, None)"),
    (
        "_dequantise(packed, scale, dy.dtype))\n    return dx if a is None else dx + (dy @ b) @ a",
        "_dequantise(packed, scale, dy.dtype))\n    return dx",
    ),
    ("y.addmm_(x_piece, w_piece)", "y = x_piece @ w_piece"),  # the last piece alone, float32
    ("dy.new_empty((dy.shape[0], packed.shape[1] // 3 * 4))", "dy.new_empty((dy.shape[0], packed.shape[1]))"),
]


def random_q(N: int, K: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.randint(-31, 32, (N, K), generator=torch.Generator().manual_seed(N + K)).to(dtype)


def test_layout_bit_by_bit() -> None:
    """Where each bit of q[n, k] + 32 lies, stated bit by bit."""
    q, E = random_q(3, 384), 48
    packed = int6_pack(q)
    assert packed.shape == (3, 288) and packed.dtype == torch.uint8 and packed.is_contiguous()
    want = [[0] * 288 for _ in range(3)]
    for n in range(3):
        for k in range(384):
            strip, i = k // E, k % E
            for bit in range(6):
                # strips 0 to 5 fill the low bits of the bytes of plane strip // 2, the last two the high bits of all
                plane, place = (strip // 2, bit) if strip < 6 else (bit // 2, 6 + bit % 2)
                want[n][2 * E * plane + 2 * i + strip % 2] |= (int(q[n, k]) + 32 >> bit & 1) << place
    assert packed.tolist() == want


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_round_trip(dtype: torch.dtype) -> None:
    extremes = torch.tensor([[-31] * 128, [31] * 128, [0] * 128, [-31, 31] * 64, [-1, 0, 0, 1] * 32])
    every = torch.arange(63).repeat(128 * 3)[: 128 * 3 * 63].view(63, 384) - 31
    for q in (random_q(5, 256), extremes, every, random_q(128, 6).t(), random_q(0, 128)):
        back = int6_unpack(int6_pack(q.to(dtype=dtype, device=DEVICE)))
        assert back.dtype == torch.int8 and torch.equal(back.cpu(), q.to(torch.int8))


@pytest.mark.parametrize("value", [32, -32, 127, -128])
def test_pack_names_the_first_value_out_of_range(value: int) -> None:
    q = random_q(4, 128)
    q[2, 5], q[3, 0] = value, value
    with pytest.raises(ValueError, match=rf"int6_pack: q must be in \[-31, 31\], got {value} at index \(2, 5\)"):
        int6_pack(q.to(DEVICE))


@pytest.mark.parametrize(
    ("q", "error", "message"),
    [
        ([[1]], TypeError, r"q must be a tensor, got \[\[1\]\]"),
        (torch.zeros(2, 128), TypeError, "q must be of signed integers, got torch.float32"),
        (torch.zeros(2, 128, dtype=torch.uint8), TypeError, "signed integers, got torch.uint8"),
        (torch.zeros(2, 128, dtype=torch.uint16), TypeError, "signed integers, got torch.uint16"),
        (torch.zeros(2, 128, dtype=torch.bool), TypeError, "got torch.bool"),
        (torch.zeros(128, dtype=torch.int8), ValueError, r"got \(128,\)"),
        (torch.zeros(2, 192, dtype=torch.int8), ValueError, r"positive multiple of 128, got \(2, 192\)"),
        (torch.zeros(2, 0, dtype=torch.int8), ValueError, r"got \(2, 0\)"),
    ],
)
def test_pack_refuses(q: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"int6_pack: .*{message}"):
        int6_pack(q)


PACKED = torch.zeros(8, 192, dtype=torch.uint8)
BAD_PACKED = [
    (None, TypeError, "packed must be a tensor, got None"),
    (PACKED.to(torch.int8), TypeError, "packed must be torch.uint8, got torch.int8"),
    (PACKED[0], ValueError, r"packed must be \(N, 3K/4\).*got \(192,\)"),
    (PACKED[:, :95].contiguous(), ValueError, r"got \(8, 95\)"),
    (PACKED[:, :0], ValueError, r"got \(8, 0\)"),
    (PACKED[:, :96], ValueError, r"packed must be contiguous, got strides \(192, 1\)"),
]
BAD_LINEAR = [
    ({"x": [1.0]}, TypeError, r"x must be a tensor, got \[1.0\]"),
    ({"scale": 1.0}, TypeError, "scale must be a tensor, got 1.0"),
    ({"lowrank": torch.ones(2, 3, 256)}, TypeError, r"lowrank must be a pair \(A, B\) or None, got tensor"),
    ({"lowrank": (torch.ones(3, 256),)}, TypeError, r"lowrank must be a pair \(A, B\) or None, got \(tensor"),
    ({"lowrank": (torch.ones(3, 256), None)}, TypeError, "lowrank's B must be a tensor, got None"),
    ({"x": torch.zeros(2, 256).double()}, TypeError, "x must be bfloat16, float16 or float32, got torch.float64"),
    ({"x": torch.zeros(2, 128)}, ValueError, r"x must be \(..., 256\) as packed is \(8, 192\), got \(2, 128\)"),
    ({"x": torch.zeros(())}, ValueError, r"got \(\)"),
    ({"x": torch.zeros(256, 2).t()}, ValueError, r"x must be contiguous, got \(2, 256\) with strides \(1, 2\)"),
    ({"scale": torch.ones(8).bfloat16()}, TypeError, "scale must be float16 or float32, got torch.bfloat16"),
    ({"scale": torch.ones(7)}, ValueError, r"scale must be contiguous \(8,\).*got \(7,\)"),
    ({"scale": torch.ones(16)[::2]}, ValueError, r"scale must be contiguous \(8,\).*strides \(2,\)"),
    ({"scale": torch.ones(8, device="meta")}, ValueError, "scale must be on .* as x, got meta"),
    ({"packed": PACKED.to("meta")}, ValueError, "packed must be on .* as x, got meta"),
    ({"scale": torch.ones(8, requires_grad=True)}, ValueError, "scale has no gradient"),
    ({"lowrank": (torch.ones(3, 256), torch.ones(8, 2))}, ValueError, r"1 <= R <= 64, got \(3, 256\) and \(8, 2\)"),
    ({"lowrank": (torch.ones(3, 128), torch.ones(8, 3))}, ValueError, r"A \(R, 256\) and B \(8, R\).*got \(3, 128\)"),
    ({"lowrank": (torch.ones(65, 256), torch.ones(8, 65))}, ValueError, r"got \(65, 256\)"),
    ({"lowrank": (torch.ones(0, 256), torch.ones(8, 0))}, ValueError, r"got \(0, 256\)"),
    ({"lowrank": (torch.ones(3, 256).half(), torch.ones(8, 3))}, TypeError, "torch.float32 as x, got torch.float16"),
    ({"lowrank": (torch.ones(3, 256), torch.ones(3, 8).t())}, ValueError, r"contiguous, got strides .* \(1, 8\)"),
    ({"lowrank": (torch.ones(3, 256), torch.ones(8, 3, device="meta"))}, ValueError, "lowrank's B must be on .* meta"),
    ({"lowrank": (torch.ones(3, 256, requires_grad=True), torch.ones(8, 3))}, ValueError, "A has no gradient"),
]


@pytest.mark.parametrize(("packed", "error", "message"), BAD_PACKED)
def test_unpack_refuses(packed: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"int6_unpack: .*{message}"):
        int6_unpack(packed)


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD_LINEAR + [({"packed": packed}, *rest) for packed, *rest in BAD_PACKED]
)
def test_linear_refuses(change: dict, error: type[Exception], message: str) -> None:
    good = {"x": torch.zeros(2, 256), "packed": PACKED, "scale": torch.ones(8)}
    with pytest.raises(error, match=f"int6_linear: .*{message}"):
        int6_linear(**good | change)


@pytest.mark.parametrize("M", [1, 15, 16, 17, SMALL_M, SMALL_M + 1])
def test_any_number_of_rows(M: int) -> None:
    with torch.no_grad():
        inputs = int6_linear_inputs((M, 35, 256), torch.bfloat16, DEVICE, seed=M)
        wide = {key: v.double() if v.is_floating_point() else v for key, v in inputs.items()}
        got, eager, f64 = int6_linear(**inputs), int6_linear_ref(**inputs), int6_linear_ref(**wide)
    numerics.assert_matches_f64("int6_linear", got, eager, f64)


@pytest.mark.skipif(not TRITON_RUNS, reason="of the Triton code")
def test_refuses_an_odd_address() -> None:
    packed = torch.zeros(1537, dtype=torch.uint8, device=DEVICE)[1:].view(8, 192)
    with pytest.raises(ValueError, match="even byte of its storage, got 1"):
        int6_linear(torch.zeros(2, 256, device=DEVICE), packed, torch.ones(8, device=DEVICE))


@pytest.mark.parametrize("rank", [1, 16, 17, 64])
@pytest.mark.parametrize("M", [1, 17, SMALL_M + 1])
def test_any_rank(M: int, rank: int) -> None:
    inputs = int6_linear_inputs((M, 35, 256, rank), torch.bfloat16, DEVICE, seed=rank)
    results = []
    for fn, dtype in ((int6_linear, None), (int6_linear_ref, None), (int6_linear_ref, torch.float64)):
        x = inputs["x"].detach().to(dtype or torch.bfloat16).requires_grad_()
        y = fn(**inputs | {"x": x})
        results.append((y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]))
    for name, *three in zip(("y", "dx"), *results, strict=True):
        numerics.assert_like_eager(name, *three)  # x A^T is rounded in between


@pytest.mark.parametrize("K", [128, 640, 1152, 2048])
def test_any_depth(K: int) -> None:
    """Strips that no block divides, and splits that leave one of them short."""
    with torch.no_grad():
        inputs = int6_linear_inputs((3, 9, K), torch.bfloat16, DEVICE, seed=K)
        wide = {key: v.double() if v.is_floating_point() else v for key, v in inputs.items()}
        numerics.assert_matches_f64(
            "int6_linear", int6_linear(**inputs), int6_linear_ref(**inputs), int6_linear_ref(**wide)
        )


@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256), (0, 256), (2, 0, 256), (70, 2, 256)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    inputs = int6_linear_inputs((140, 5, 256), torch.float32, DEVICE)
    x = inputs["x"].detach()[: torch.Size(shape[:-1]).numel()]
    y = int6_linear(**inputs | {"x": x.view(shape)})
    assert y.shape == (*shape[:-1], 5) and torch.equal(y.view(-1, 5), int6_linear(**inputs | {"x": x}))


def test_no_output_columns() -> None:
    empty = {"packed": torch.empty(0, 192, dtype=torch.uint8), "scale": torch.empty(0)}
    x = torch.randn(3, 256, device=DEVICE, requires_grad=True)
    y = int6_linear(x, **{key: value.to(DEVICE) for key, value in empty.items()})
    assert y.shape == (3, 0)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.zeros_like(x))


@pytest.mark.skipif(not TRITON_RUNS, reason="the eager reference rounds its weights")
def test_weights_are_not_rounded() -> None:
    """Integers times integers, then one scale that no bfloat16 holds: only y itself is rounded.

    With rounded weights the sums that nearly cancel, a few of the thousand, would be out.
    """
    packed = int6_linear_inputs((4, 64, 512), torch.bfloat16, DEVICE)["packed"]
    x = torch.randint(-99, 100, (16, 512), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    scale = torch.full((64,), 1.005859375, dtype=torch.float16, device=DEVICE)
    exact = x.double() @ int6_unpack(packed).double().t() * scale.double()
    numerics.assert_matches_f64("int6_linear", int6_linear(x, packed, scale), exact.bfloat16(), exact)


@pytest.mark.gpu
def test_offsets_beyond_int32() -> None:
    """Beyond 2^31 packed bytes and elements of y the last columns are those of a small product."""
    M, N, K = SMALL_M, 2**25 + 8, 128
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    packed = torch.randint(0, 256, (N, 3 * K // 4), device="cuda", dtype=torch.uint8)
    scale = torch.rand(N, device="cuda")
    y = int6_linear(x, packed, scale)
    assert y.numel() > 2**31 and packed.numel() > 2**31
    assert torch.equal(y[:, -100:], int6_linear(x, packed[-100:], scale[-100:]))
