"""Every rung of the attention ladder against float64 softmax attention written out, and the choice of the rung."""

import builtins

import pytest
import torch
from numerics import assert_rms_like_eager, assert_same_f64

from niblick.model import attention
from niblick.model.attention import LADDER, attend_plain, choose_attention
from niblick.model.config import ConfigError

CPU = torch.device("cpu")
STARTS = [0, 1, 40, 41, 200]  # one-token segments, and one that crosses a tile of 128


def inputs(n: int, device, dtype) -> tuple:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, heads, 64, generator=generator) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([*STARTS, n, n, n], dtype=torch.int32, device=device)
    return *(x.to(device, dtype).requires_grad_() for x in (q, k, v)), cu_seqlens


def naive(q, k, v, cu_seqlens) -> torch.Tensor:
    """softmax(q kᵀ / √d) v over earlier tokens of the same segment, query head h with key head h // (H / G)."""
    n, heads, d = q.shape
    positions = torch.arange(n, device=q.device)
    segment = torch.searchsorted(cu_seqlens[: len(STARTS) + 1].long(), positions, right=True)
    seen = (segment[:, None] == segment[None, :]) & (positions[:, None] >= positions[None, :])
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / d**0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


def with_gradients(fn, tensors: tuple) -> list[torch.Tensor]:
    y = fn(*tensors)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
    return [y, *torch.autograd.grad(y, tensors[:3], cotangent)]


def test_plain_is_softmax_attention_inside_segments() -> None:
    tensors = inputs(300, CPU, torch.float64)
    got = with_gradients(lambda *t: attend_plain(*t, 2048), tensors)
    for name, g, w in zip(("y", "dq", "dk", "dv"), got, with_gradients(naive, tensors), strict=True):
        assert_same_f64(name, g, w)


def test_backward_by_turns_is_the_whole_backward() -> None:
    """Each turn sees its query heads and writes into views; the turns' gradients of k and v sum to the whole ones."""
    q, k, v, cu_seqlens = inputs(300, CPU, torch.float64)
    seen = []

    def backward(q, k, v, y, dy, lse, dq, dk, dv):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        mine = attend_plain(*leaves, cu_seqlens, 2048)
        assert torch.equal(mine, y) and torch.equal(lse, y[..., 0].T)
        for into, gradient in zip((dq, dk, dv), torch.autograd.grad(mine, leaves, dy), strict=True):
            into.copy_(gradient)
        seen.append(q.shape[1])

    y = attend_plain(q, k, v, cu_seqlens, 2048)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    lse = y[..., 0].T.contiguous()  # any number a head and token, to see that the right heads arrive
    k_turns, v_turns = (x[:, :, None].expand(-1, -1, 2, -1) for x in (k, v))
    dq, dk, dv = attention._backward_by_turns(backward, dy, q, k_turns, v_turns, y.detach(), lse)
    assert seen == [2, 2] and dk.shape == k_turns.shape
    got = dq, *attention._sums_of_turns(dk, dv)
    for name, g, w in zip(("dq", "dk", "dv"), got, torch.autograd.grad(y, (q, k, v), dy), strict=True):
        assert_same_f64(name, g, w)


@pytest.mark.gpu
@pytest.mark.parametrize("rung", LADDER)
def test_rung_is_as_accurate_as_plain(rung: str) -> None:
    device = torch.device("cuda")
    try:
        _, attend = choose_attention(rung, device, torch.bfloat16)
    except ConfigError as error:
        pytest.skip(str(error))
    tensors = inputs(300, device, torch.bfloat16)
    wide = tuple(t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors)
    got, eager = (with_gradients(lambda *t, f=f: f(*t, 2048), tensors) for f in (attend, attend_plain))
    for name, g, e, w in zip(("y", "dq", "dk", "dv"), got, eager, with_gradients(naive, wide), strict=True):
        assert_rms_like_eager(f"{rung} {name}", g, e, w)


def test_cpu_takes_plain_and_refuses_flash() -> None:
    assert choose_attention("auto", CPU, torch.float32)[0] == "plain"
    with pytest.raises(ConfigError, match="fa3 needs a CUDA device"):
        choose_attention("fa3", CPU, torch.bfloat16)


def test_ladder_takes_the_first_that_is_there_and_says_why_not(monkeypatch) -> None:
    def missing(device, deterministic):
        raise ImportError("not installed")

    cuda = torch.device("cuda")
    rungs = dict.fromkeys(LADDER, missing) | {"fa2": lambda *_: builtins.id, "torch": lambda *_: builtins.len}
    monkeypatch.setattr(attention, "_LOADERS", rungs)
    assert choose_attention("auto", cuda, torch.bfloat16) == ("fa2", builtins.id)
    with pytest.raises(ConfigError, match=r"fa4 is not available here \(fa4: not installed\)"):
        choose_attention("fa4", cuda, torch.bfloat16)
