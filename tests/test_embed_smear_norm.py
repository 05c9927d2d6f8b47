"""Edge cases of kernels/embed_smear_norm.py, and the faults its contract must reject."""

import math

import numerics
import pytest
import torch
from torch import Tensor

from niblick.kernels import embed_smear_norm as module
from niblick.kernels.embed_smear_norm import embed_smear_norm, embed_smear_norm_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOS = 1
TOKENS = 4 if module.INTERPRETED else module.LAUNCH["backward"]["tokens"]

FAULTS = [
    ("(token != bos_id)", "(token != bos_id + 1)"),  # the mask on another id
    ("takes = rows >= 1\n", "takes = rows >= 2\n"),  # row 1 takes nothing in
    ("s = 1.0 / (1.0 + tl.exp(-", "s = 1.0 / (1.0 + tl.exp("),  # sign of the gate
    ("mask=here & (cols < W), other", "mask=here & (cols < W - 1), other"),
    ("keep_dims=True) / D + eps)", "keep_dims=True) / D + 0.01)"),
    ("(rows < N) & (cols < D)", "(rows < N - 1) & (cols < D)"),  # last row
    ("(rows < N) & (cols < D)", "(rows < N) & (cols < D - 1)"),  # last channel
    ("(dy - tl.sum(dy * h) / D * rstd * rstd * h)", "dy"),  # rstd taken as a constant
    ("dh = rstd * (dy", "dh = (dy"),
    ("run += dh + scale * s_after * dh_after", "run += dh"),  # nothing from the token after
    ("/ D * rstd_after * rstd_after * h_after", "/ D * rstd_after * h_after"),
    ("(key != bos_id)", "(key == key)"),  # masked rows move weight and scale
    ("(after != bos_id)", "(after == after)"),  # gradient leaks over a document's start
    ("tl.load(s_ptr + t + 1, mask", "tl.load(s_ptr + t, mask"),  # gate of the wrong row
    ("s * (1.0 - s) * a ", "s * a "),  # no derivative of the sigmoid
    ("dscale += s * a", "dscale += a"),
    ("dweight += u *", "dweight = u *"),  # only a program's last run
    ("run += u * tl.load(weight_ptr", "run += 0.0 * tl.load(weight_ptr"),  # gradient through the gate missing
    ("begun = first == 0\n", "begun = first < 0\n"),
    ("begun = position >= first", "begun = position > last"),
    ("whole = begun & (key_next != key)", "whole = key_next != key"),  # a run's beginning is lost
    ("whole = begun & (key_next != key)", "whole = begun & (position >= first)"),  # a run's end is lost
    ("ahead & (key_next != key)", "ahead & (key_next == key)"),  # not the next run's row
    ("before_next, after_next = before_later", "before_next, after_later = before_later"),  # stale neighbours
    ("s, s_after, rstd_after = s_next, s_after_next,", "s, s_after, rstd_after = s_next, s_next,"),
    ("others = program + 1 +", "others = program + 2 +"),  # a program's part left out
    ("(begun + tl.sum(total, axis=0))", "tl.sum(total, axis=0)"),
    ("here = share < tl.num_programs(0)", "here = share < 4"),  # shares of later programs lost
    ("dy_cols = cols.to(tl.int64) * stride_dy_col", "dy_cols = cols.to(tl.int64)"),  # dy read as if contiguous
    ("dtable = torch.zeros(", "dtable = torch.empty("),  # rows of ids that do not occur
]


def arguments(
    ids: Tensor, V: int = 40, D: int = 16, W: int = 5, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    accurate = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "token_ids": ids.to(DEVICE),
        "table": torch.randn(V, D, generator=generator).to(DEVICE, dtype).requires_grad_(),
        "smear_weight": torch.randn(W, generator=generator).to(DEVICE, accurate).requires_grad_(),
        "smear_scale": torch.full((1,), 0.75, device=DEVICE, dtype=accurate, requires_grad=True),
    }


def random_ids(N: int, V: int = 40) -> Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(4))


def without_smear(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if not key.startswith("smear")}


def results(fn, tensors: dict[str, Tensor], bos_id: int | None = BOS) -> dict[str, Tensor]:
    y = fn(**tensors, bos_id=bos_id)
    wanted = [key for key, value in tensors.items() if value.requires_grad]
    dy = (torch.cos(torch.arange(y.numel())) + torch.arange(y.shape[1]).repeat(len(y)) % 3).bfloat16().view_as(y).to(y)
    gradients = torch.autograd.grad(y, [tensors[key] for key in wanted], dy)
    return {"y": y.detach()} | dict(zip(wanted, gradients, strict=True))


def double(value: Tensor) -> Tensor:
    return value.detach().double().requires_grad_() if value.is_floating_point() else value


def assert_as_reference(tensors: dict[str, Tensor], bos_id: int | None = BOS) -> None:
    got, eager = results(embed_smear_norm, tensors, bos_id), results(embed_smear_norm_ref, tensors, bos_id)
    f64 = results(embed_smear_norm_ref, {key: double(value) for key, value in tensors.items()}, bos_id)
    for key in got:
        numerics.assert_matches_f64(key, got[key], eager[key], f64[key])


def test_by_hand() -> None:
    """Weight 0 opens the gate by one half, scale 2 makes it one: h is the sum of neighbours, but not over BOS."""
    table = torch.tensor([[3.0, 0.0], [0.0, 7.0], [0.0, 4.0]], device=DEVICE)
    tensors = {"table": table, "smear_weight": table.new_zeros(1), "smear_scale": table.new_full((1,), 2.0)}
    ids = torch.tensor([0, 2, BOS, 0], device=DEVICE)
    for bos_id, h in ((BOS, [[3, 0], [3, 4], [0, 7], [3, 7]]), (None, [[3, 0], [3, 4], [0, 11], [3, 7]])):
        want = torch.tensor(h, dtype=torch.float64)
        want /= want.square().mean(1, keepdim=True).sqrt()
        got = embed_smear_norm(ids, **tensors, bos_id=bos_id, eps=0.0)
        numerics.assert_close_f32("y", got.cpu(), want)


def test_without_smear_it_is_an_embedding_and_a_norm() -> None:
    ids = random_ids(50)
    tensors = without_smear(arguments(ids))
    y = embed_smear_norm(**tensors)
    want = torch.nn.functional.rms_norm(tensors["table"][ids.to(DEVICE)].double(), (16,), eps=2.0**-23)
    numerics.assert_close_f32("y", y, want.detach())
    assert_as_reference(tensors)


IDS = {
    "one id": torch.full((3 * TOKENS + 5,), 7),
    "one id, whole programs": torch.full((2 * TOKENS,), 7),
    "the last id": torch.full((TOKENS + 1,), 39),
    "all different": torch.randperm(40, generator=torch.Generator().manual_seed(1)),
    "one token": torch.tensor([3]),
    "two tokens": torch.tensor([3, 3]),
    "fewer than a program": random_ids(TOKENS - 3),
    "runs that end where programs do": torch.arange(4).repeat_interleave(TOKENS // 2),
    "BOS alone": torch.full((TOKENS + 2,), BOS),
}


@pytest.mark.parametrize("case", IDS)
def test_any_ids(case: str) -> None:
    """One id alone makes h parallel to x, and the smear's gradients nothing but rounding: then without it."""
    tensors = arguments(IDS[case])
    assert_as_reference(without_smear(tensors))
    if len(IDS[case].unique()) > 1:
        assert_as_reference(tensors)


def test_more_programs_share_an_id_than_are_added_at_once() -> None:
    ids = torch.full((40 * TOKENS,), 2)
    ids[: 3 * TOKENS] = 0
    assert_as_reference(without_smear(arguments(ids, V=4, D=5)))


@pytest.mark.parametrize("bos_id", [None, 0, 39, -1])
@pytest.mark.parametrize(("D", "W"), [(2, 1), (5, 5), (40, 1), (512, 3), (768, 12)])
def test_any_width_and_bos(D: int, W: int, bos_id: int | None) -> None:
    assert_as_reference(arguments(random_ids(9, 4) % 40, D=D, W=W), bos_id)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    tensors = arguments(random_ids(40), dtype=dtype)
    tensors |= {key: tensors[key].detach().to(dtype).requires_grad_() for key in ("smear_weight", "smear_scale")}
    assert_as_reference(tensors)


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is refused on a GPU")
@pytest.mark.parametrize("bos_id", [None, BOS])
@pytest.mark.parametrize("smear", [True, False])
def test_float64_is_the_reference_itself(smear: bool, bos_id: int | None) -> None:
    tensors = arguments(random_ids(60), dtype=torch.float64)
    if not smear:
        tensors = without_smear(tensors)
    got, want = results(embed_smear_norm, tensors, bos_id), results(embed_smear_norm_ref, tensors, bos_id)
    for key in want:
        numerics.assert_same_f64(key, got[key], want[key])


@pytest.mark.parametrize("bos_id", [(1 << 16) + 3, (1 << 32) + 3, 3 - (1 << 16)])
def test_a_bos_id_is_not_cut_to_the_ids_bits(bos_id: int) -> None:
    for ids in (torch.tensor([1, 2, 3, 2, 3]), torch.tensor([1, 2, 3, 2, 3], dtype=torch.int32)):
        tensors = arguments(ids)
        got, want = results(embed_smear_norm, tensors, bos_id), results(embed_smear_norm, tensors, None)
        assert all(torch.equal(got[key], want[key]) for key in want)
        assert torch.equal(embed_smear_norm_ref(**tensors, bos_id=bos_id), embed_smear_norm_ref(**tensors, bos_id=None))


def test_int32_ids_a_large_table_and_no_tokens() -> None:
    tensors = arguments(random_ids(30))
    assert torch.equal(
        embed_smear_norm(**tensors), embed_smear_norm(**tensors | {"token_ids": tensors["token_ids"].int()})
    )
    assert_as_reference(arguments(torch.tensor([39999, 3, 32768, 3, 32767]), V=40000, D=2, W=1))
    empty = results(embed_smear_norm, arguments(torch.zeros(0, dtype=torch.int64)))
    assert empty["y"].shape == (0, 16) and empty["table"].shape == (40, 16)
    assert not any(empty[key].any() for key in ("table", "smear_weight", "smear_scale"))


@pytest.mark.parametrize("bad", [-1, 40, 2**15, 2**16 + 3, 2**40])
def test_ids_out_of_range(bad: int) -> None:
    """NaN in that row and in the one that takes it in, everywhere else as if a fresh document began."""
    ids = torch.tensor([3, 4, bad, 5, 6, bad, BOS, 7])
    tensors = arguments(ids)
    y = embed_smear_norm(**tensors)
    assert (
        y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [False, False, True, True, False, True, False, False]
    )
    plain = embed_smear_norm(**without_smear(tensors))
    assert plain.isnan().any(1).tolist() == [False, False, True, False, False, True, False, False]
    gradient = torch.autograd.grad(plain[[0, 1, 3]].sum(), tensors["table"])[0]
    assert not gradient[7:].any() and gradient[3].any()
    with pytest.raises(ValueError, match=rf"expected 0 <= id < 40 in token_ids, got {bad} in row 2"):
        embed_smear_norm(**tensors, check_ids=True)


def test_gradients_repeat_bitwise() -> None:
    tensors = arguments(random_ids(200, 5), dtype=torch.bfloat16)
    first, second = results(embed_smear_norm, tensors), results(embed_smear_norm, tensors)
    assert all(torch.equal(first[key], second[key]) for key in first)


REFUSED = {
    "a vector as table": ({"table": torch.zeros(16)}, ValueError, r"table of shape \(V, D\), got \(16,\)"),
    "an empty table": ({"table": torch.zeros(0, 16)}, ValueError, r"got \(0, 16\)"),
    "rows of ids": ({"token_ids": torch.zeros(2, 2).long()}, ValueError, r"token_ids of shape \(N,\), got \(2, 2\)"),
    "float ids": ({"token_ids": torch.zeros(4)}, TypeError, "int64 or int32, got torch.float32"),
    "scale alone": ({"smear_weight": None}, ValueError, "both of smear_weight and smear_scale"),
    "weight alone": ({"smear_scale": None}, ValueError, "both of smear_weight and smear_scale"),
    "weight too wide": ({"smear_weight": torch.zeros(17)}, ValueError, r"1 <= W <= 16, got \(17,\)"),
    "no weight": ({"smear_weight": torch.zeros(0)}, ValueError, r"got \(0,\)"),
    "scale without shape": ({"smear_scale": torch.tensor(1.0)}, ValueError, r"smear_scale of shape \(1,\), got \(\)"),
    "an integer table": ({"table": torch.zeros(4, 16).int()}, TypeError, "expected table in .* got torch.int32"),
    "float64 weight alone": (
        {"smear_weight": torch.zeros(3).double()},
        TypeError,
        "smear_weight in .* got torch.float64",
    ),
    "float64 table alone": (
        {"table": torch.zeros(4, 16).double()},
        TypeError,
        "smear_weight in float64, got torch.float32",
    ),
    "channels apart": (
        {"table": torch.zeros(16, 4).t()},
        ValueError,
        r"table with adjacent channels, got strides \(1, 4\)",
    ),
    "weight apart": ({"smear_weight": torch.zeros(6)[::2]}, ValueError, r"smear_weight with adjacent .* \(2,\)"),
    "ids elsewhere": ({"token_ids": torch.zeros(4, device="meta").long()}, ValueError, "token_ids on cpu, got meta"),
    "bos of no kind": ({"bos_id": True}, TypeError, "None for no mask, got True"),
    "bos of many bits": ({"bos_id": 1 << 63}, ValueError, "bos_id in 64 bits, got 9223372036854775808"),
    "negative eps": ({"eps": -1.0}, ValueError, "eps >= 0, got -1.0"),
    "endless eps": ({"eps": math.inf}, ValueError, "finite eps >= 0, got inf"),
    "eps to learn": ({"eps": torch.tensor(1.0)}, TypeError, r"eps to be a number, got tensor\(1.\)"),
    "eps as a bool": ({"eps": True}, TypeError, "eps to be a number, got True"),
    "ids as a list": ({"token_ids": [1, 2]}, TypeError, r"token_ids to be a tensor, got \[1, 2\]"),
    "no table": ({"table": None}, TypeError, "table to be a tensor, got None"),
    "weight as a number": ({"smear_weight": 1.0}, TypeError, "smear_weight to be a tensor, got 1.0"),
    "scale as a number": ({"smear_scale": 1.0}, TypeError, "smear_scale to be a tensor, got 1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    change, error, message = REFUSED[case]
    good = {"table": torch.zeros(4, 16), "smear_weight": torch.zeros(3), "smear_scale": torch.ones(1)}
    with pytest.raises(error, match=message):
        embed_smear_norm(**{**good, "token_ids": torch.zeros(4, dtype=torch.int64), **change})
