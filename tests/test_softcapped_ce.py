"""Edge cases of kernels/softcapped_ce.py, and the faults its contract must reject."""

import subprocess
import sys

import numerics
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from niblick.kernels import softcapped_ce as module
from niblick.kernels.softcapped_ce import softcapped_ce, softcapped_ce_and_grad, softcapped_ce_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FAULTS = [
    ("slope = s * (E * s)\n", "slope = 1.0 + 0.0 * E\n"),  # no derivative of the cap
    ("(LOG2E / C) + (B * LOG2E / C)", "(LOG2E / C)"),  # the sigmoid not shifted
    ("w = (positive - cap) + 2 * cap * s", "w = 2 * cap * s"),  # the negative logits too near their cap
    ("(E * s - s) - (2.0 / LOG2E) * u * slope", "(E * s - s)"),  # the caps' gradient as if x / c were fixed
    ("tl.join(r * b, r * a)", "tl.join(r * a, r * b)"),  # neighbours that share a reciprocal change places
    ("counted = e if V % GROUP == 0 else tl.where(cols < V, e, 0.0)", "counted = e"),  # columns beyond V counted
    ("(groups != group) & (groups * GROUP < V)", "groups != group"),  # whole groups of them
    ("total + some[1], up", "tl.maximum(total, some[1]), up"),  # the sums of the blocks not added
    ("inside & (cols == target)", "inside & (cols == target + 1)"),  # the subtracted one in the next column
    ("beside = inside & (cols == target), inside & (cols != target)", "beside = inside & (cols == target), inside"),
    ("known = (target >= 0) & (target < V)", "known = (target > 0) & (target < V)"),  # no column 0
    ("    if far:\n", "    if far and V < 0:\n"),  # sums overflow under a high cap
    ("far & (gap > REACH)", "far & (gap > 2 * V)"),  # the target's term underflows under a high cap
    ("lse = top - ref + tl.log(total)", "lse = tl.log(total)"),  # z-loss of a shifted lse
    ("+ z_loss * lse * lse)", ")"),  # no z-loss
    ("(1.0 + 2.0 * z_loss * lse) / total", "1.0 / total"),  # nor its gradient
    ("loss = tl.where(ignored, 0.0, weight", "loss = tl.where(ignored, 0.0, 1.0"),  # weights ignored
    ("    loss = tl.where(ignored, 0.0,", "    loss = tl.where(False, 0.0,"),  # ignored rows count
    ("dloss = tl.where(ignored, 0.0, dloss * weight)", "dloss = dloss * weight"),  # and get a gradient
    ("dloss = tl.where(ignored, 0.0, dloss * weight)", "dloss = tl.where(ignored, 0.0, dloss)"),
    ("dloss = tl.where(ignored, 0.0, dloss * weight)", "dloss = tl.where(ignored, 0.0, weight)"),  # not upstream's
    ("row * stride_dloss", "row"),  # expanded dloss read as if contiguous
    ("row * stride_weight", "row"),
    ("row_ptr = logits_ptr + row * stride_row", "row_ptr = logits_ptr + row * V"),
    ("lse * (e_target / total) - others / total)", "lse * (e_target / total) - (others / total).to(tl.bfloat16))"),
    ("block = first + start + tl", "block = first + tl"),  # no gradient after the first block
    ("(block < V) & (block // GROUP", "(block < V - 1) & (block // GROUP"),  # last column never written
    ("dz * slope * SLOPE, inside)", "dz * slope * SLOPE, here)"),  # nor the target's neighbours
    ("tl.store(dcaps_ptr + row * 2 + 1, down)", "tl.store(dcaps_ptr + row * 2 + 1, up)"),
    ("up = tl.sum(up, axis=0) * factor + ", "up = tl.sum(up, axis=0) * factor + 0.0 * "),  # the caps without the target
    ("n_rows, V), device = logits.shape", "n_rows, V), device = logits.detach().mul_(0.5).shape"),  # overwrites x
    ("logits.shape, dtype=grad_dtype or logits.dtype)\n    dcaps =", "logits.shape, dtype=wide)\n    dcaps ="),
    ("return logits.new_empty(logits.shape[0], dtype=wide), d", "return logits.new_empty(logits.shape[0]), d"),
]  # fmt: skip


def logits_and_targets(n_rows: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(n_rows, V, generator=generator) * 15).to(DEVICE, dtype)
    return logits.requires_grad_(), torch.randint(V, (n_rows,), generator=generator).to(DEVICE)


def weights_of(n_rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return 0.5 + torch.rand(n_rows, generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype)


def two_caps(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    caps = {"softcap": 27.0, "softcap_negative": 21.0}
    return {key: torch.full((1,), c, dtype=dtype, device=DEVICE, requires_grad=True) for key, c in caps.items()}


def results(fn, logits: Tensor, *args, upstream: float = 1.0, **kwargs) -> dict[str, Tensor]:
    """The loss, and the gradients of the logits and of tensor caps for a gradient of upstream."""
    caps = {key: value for key, value in kwargs.items() if "cap" in key and isinstance(value, Tensor)}
    leaves = {"logits": logits} | caps
    loss = fn(logits, *args, **kwargs)
    gradients = torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, upstream))
    return {"loss": loss.detach()} | {f"d_{key}": g for key, g in zip(leaves, gradients, strict=True)}


def assert_as_reference(logits: Tensor, targets: Tensor, fn=softcapped_ce, upstream: float = 1.0, **kwargs) -> None:
    def double(value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    got = results(fn, logits, targets, upstream=upstream, **kwargs)
    eager = results(softcapped_ce_ref, logits, targets, upstream=upstream, **kwargs)
    doubled = {key: double(value) for key, value in kwargs.items()}
    f64 = results(softcapped_ce_ref, double(logits), targets, upstream=upstream, **doubled)
    for key in got:
        numerics.assert_matches_f64(key, got[key], eager[key], f64[key])


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for key in want:
        assert torch.equal(got[key], want[key]), key


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_count_only_rows_not_ignored(reduction: str) -> None:
    logits, targets = logits_and_targets(7, 600)
    targets[2:4] = -100
    assert_as_reference(logits, targets, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [30.0, (23.0, 5.0, 7.5), "two caps"])
@pytest.mark.parametrize("upstream", [None, 1.0, 0.125])
def test_weights_z_loss_and_every_cap(upstream: float | None, softcap: object, reduction: str) -> None:
    logits, targets = logits_and_targets(6, 300, torch.bfloat16)
    targets[2] = -100
    with torch.no_grad():
        logits[1, targets[1]] = -9.0
    caps = two_caps() if softcap == "two caps" else {"softcap": softcap}
    promise = {} if upstream is None else {"fn": promising(upstream), "upstream": upstream}
    assert_as_reference(logits, targets, reduction=reduction, weights=weights_of(6), z_loss=1e-3, **caps, **promise)


def promising(upstream: float):
    return lambda *args, **kwargs: softcapped_ce(*args, upstream=upstream, **kwargs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_promise_changes_no_bit_of_the_gradient(reduction: str) -> None:
    logits, targets = logits_and_targets(6, 300, torch.bfloat16)
    for caps in ({}, two_caps()):
        arguments = {"reduction": reduction, "weights": weights_of(6), **caps}
        want = results(softcapped_ce, logits, targets, **arguments)
        del want["loss"]  # whose sums were taken in other company: see SHARED
        assert_equal(results(promising(1.0), logits, targets, **arguments), want)
        whole = torch.compile(promising(1.0), fullgraph=True, backend="aot_eager")
        assert_equal(results(whole, logits, targets, **arguments), want)


def test_a_kept_promise_serves_two_backwards() -> None:
    logits, targets = logits_and_targets(6, 300)
    loss = softcapped_ce(logits, targets, upstream=1.0)
    loss.backward(retain_graph=True)
    loss.backward()
    want = results(softcapped_ce, logits, targets)["d_logits"]
    assert torch.equal(logits.grad, want + want)


@pytest.mark.parametrize("upstream", [None, 1.0])
def test_differentiable_once(upstream: float | None) -> None:
    """A gradient written in advance would count as a constant, and a penalty on it would be without effect."""
    logits, targets = logits_and_targets(6, 300)
    loss = softcapped_ce(logits, targets, upstream=upstream)
    with pytest.raises(RuntimeError, match="no autograd formula" if upstream is None else "create_graph=True"):
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), logits)


class Sizes(TorchDispatchMode):
    """Notes the ops whose result has a given shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.ops = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape == self.shape:
            self.ops.append(func.name())
        return result


def test_a_kept_promise_moves_no_logits() -> None:
    """Autograd would fill a gradient with zeros for every result without one; dlogits is such a result."""
    logits, targets = logits_and_targets(6, 300)
    loss = softcapped_ce(logits, targets, upstream=1.0)
    with Sizes(logits.shape) as seen:
        torch.autograd.grad(loss, logits)
    assert set(seen.ops) <= {"aten::detach"}


BROKEN = """
import torch
from niblick.kernels.softcapped_ce import softcapped_ce
x = torch.randn(4, 64, device=DEVICE, requires_grad=True)
f = lambda x, t: {factor} * softcapped_ce(x, t, upstream=1.0, reduction="{reduction}").sum()
if "{compiled}" == "compiled":
    f = torch.compile(f, fullgraph=True, backend="aot_eager")
loss = f(x, torch.arange(4, device=DEVICE))
loss.backward()
x.grad.sum().item()
"""


@pytest.mark.parametrize("compiled", ["eager", "compiled"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_broken_promise_is_loud(reduction: str, compiled: str) -> None:
    if compiled == "compiled" and not module.PROMISES_COMPILE:
        pytest.skip("no promise is needed there: any gradient is right")
    kept, broken = (BROKEN.format(factor=f, reduction=reduction, compiled=compiled) for f in (1.0, 0.5))
    if DEVICE == "cpu":
        torch._dynamo.reset()
        exec(kept, {"DEVICE": DEVICE})
        with pytest.raises(RuntimeError, match="another gradient than upstream had promised"):
            exec(broken, {"DEVICE": DEVICE})
    elif reduction == "mean":  # in a process of its own, as no CUDA context outlives an assertion on the device
        done = subprocess.run([sys.executable, "-c", "DEVICE = 'cuda'" + broken], capture_output=True, text=True)
        assert done.returncode != 0 and "another gradient than upstream had promised" in done.stderr, done.stderr


def test_no_gradient_is_written_where_none_is_wanted() -> None:
    logits, targets = logits_and_targets(6, 300)
    want = softcapped_ce(logits, targets)
    with torch.no_grad():
        assert torch.equal(softcapped_ce(logits, targets, upstream=1.0), want)
    assert not softcapped_ce(logits.detach(), targets, upstream=1.0).requires_grad


def loss_and_grad_arguments(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, dict[str, object]]:
    logits, targets = logits_and_targets(6, 300, dtype)
    targets[2] = -100
    return logits, targets, {"weights": weights_of(6), "z_loss": 1e-3, "softcap": (23.0, 5.0, 7.5)}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_and_grad(whole: bool, inplace: bool) -> None:
    """The same bits as through autograd, the logits overwritten on request alone, eagerly and in a compiled graph."""
    logits, targets, arguments = loss_and_grad_arguments()
    want = results(promising(4.0), logits, targets, reduction="none", upstream=4.0, **arguments)
    own = logits.detach().clone()

    def call(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return softcapped_ce_and_grad(x, t, grad_scale=4.0, inplace=inplace, **arguments)

    losses, dlogits = (torch.compile(call, fullgraph=True, backend="aot_eager") if whole else call)(own, targets)
    assert_equal({"loss": losses, "d_logits": dlogits}, want)
    assert torch.equal(own, dlogits if inplace else logits)


def test_and_grad_in_8_bits() -> None:
    """A rounding from the float32 gradient, and saturating. The interpreter loses the carry of a rounding up to a power
    of two, and so half the number, 4 codes."""
    logits, targets, arguments = loss_and_grad_arguments()
    _, wide = softcapped_ce_and_grad(logits.float(), targets, grad_scale=1e3, **arguments)
    _, got = softcapped_ce_and_grad(logits, targets, grad_scale=1e3, grad_dtype=torch.float8_e5m2, **arguments)
    rounded = wide.to(torch.float8_e5m2)
    ours, theirs = (x.view(torch.uint8).int() & 127 for x in (got, rounded))
    assert (ours - theirs).abs().max() <= (4 if module.INTERPRETED else 1)
    assert (got.float() * rounded.float() >= 0).all() and (ours > 0).any(1).tolist() == [True, True, False, *[True] * 3]
    _, got = softcapped_ce_and_grad(logits, targets, grad_scale=1e7, grad_dtype=torch.float8_e5m2, **arguments)
    assert got.float().abs().max() == 57344 and got.float().isfinite().all()


@pytest.mark.parametrize("op", ["softcapped_ce", "softcapped_ce_in_place"])
def test_opcheck_of_one_pass(op: str) -> None:
    logits, targets, _ = loss_and_grad_arguments(torch.float32)
    numbers = ([60.0, 0.0, 15.0, -30.0], 1e-3, -100)
    ones = torch.ones((), device=DEVICE).expand(6)
    caps = (torch.tensor([27.0, 21.0], device=DEVICE),) if op == "softcapped_ce" else ()
    last = (None,) if op == "softcapped_ce" else ()
    arguments = (logits.detach(), targets, weights_of(6), *caps, ones, *numbers, *last)
    torch.library.opcheck(getattr(torch.ops.niblick, op).default, arguments)


def test_one_cap_to_learn() -> None:
    logits, targets = logits_and_targets(5, 300, torch.bfloat16)
    assert_as_reference(logits, targets, softcap=torch.full((1,), 25.0, device=DEVICE, requires_grad=True))


def test_caps_to_learn_that_reach_far() -> None:
    """Where exp(c) is beyond float32, the sums need the row's maximum; only the device knows."""
    logits, targets = logits_and_targets(5, 300, torch.bfloat16)
    caps = two_caps()
    assert_as_reference((logits.detach() * 6).requires_grad_(), targets, **{k: c * 4 for k, c in caps.items()})


def test_a_cap_that_is_not_positive_is_nan() -> None:
    logits, targets = logits_and_targets(3, 40)
    for bad in (0.0, -1.0):
        caps = two_caps()
        with torch.no_grad():
            caps["softcap_negative"].fill_(bad)
        assert softcapped_ce(logits, targets, **caps, reduction="none").isnan().all()


def test_nan_logits_are_not_hidden_by_the_cap() -> None:
    logits, targets = logits_and_targets(3, 600, torch.bfloat16)
    with torch.no_grad():
        logits[1, 17] = float("nan")
    assert softcapped_ce(logits, targets, reduction="none").isnan().tolist() == [False, True, False]
    assert softcapped_ce_and_grad(logits, targets)[1].isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("inf", [float("inf"), -float("inf")])
def test_infinite_logits_are_at_the_cap(inf: float) -> None:
    logits, targets = logits_and_targets(3, 600, torch.bfloat16)
    far = logits.detach().clone()
    far[:, 5], logits = inf, logits.detach()
    logits[:, 5] = 3e4 if inf > 0 else -3e4
    assert torch.equal(softcapped_ce(far, targets), softcapped_ce(logits, targets))
    assert torch.equal(softcapped_ce_and_grad(far, targets)[1], softcapped_ce_and_grad(logits, targets)[1])


@pytest.mark.parametrize("V", [1000, 8192, 50257, 50304, 131072])
def test_vocabularies_in_use(V: int) -> None:
    logits, targets = logits_and_targets(2, V, torch.bfloat16)
    assert_as_reference(logits, targets, reduction="sum")


def test_all_rows_ignored() -> None:
    logits, targets = logits_and_targets(3, 50)
    targets[:] = 7
    got = results(softcapped_ce, logits, targets, ignore_index=7, reduction="sum")
    assert got["loss"] == 0 and not got["d_logits"].any()
    for upstream in (None, 1.0):  # no row to take the mean of, as in torch
        got = results(softcapped_ce if upstream is None else promising(1.0), logits, targets, ignore_index=7)
        assert got["loss"].isnan()


@pytest.mark.parametrize("V", [1, 2, 3, 257])
@pytest.mark.parametrize("softcap", [15.0, 60.0])
def test_any_vocabulary_and_softcap(V: int, softcap: float) -> None:
    """Under softcap 60 logits near -40 lie some 95 below the cap, beyond the range of exp in float32."""
    logits, targets = logits_and_targets(5, V, torch.bfloat16)
    logits = (logits.detach() / 4 - 40).requires_grad_()
    assert_as_reference(logits, targets, softcap=softcap, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    if dtype == torch.float64 and DEVICE != "cpu":
        pytest.skip("float64 is refused on a GPU")
    logits, targets = logits_and_targets(4, 300, dtype)
    assert softcapped_ce(logits, targets).dtype == torch.promote_types(dtype, torch.float32)
    assert_as_reference(logits, targets)


def test_float64_is_the_reference_itself() -> None:
    logits, targets = logits_and_targets(5, 300, torch.float64)
    targets[1] = -100
    logits, targets = logits.cpu().detach().requires_grad_(), targets.cpu()
    weights = weights_of(5, torch.float64).cpu()
    for softcap in (30.0, (23.0, 5.0, 7.5), two_caps(torch.float64)):
        caps = softcap if isinstance(softcap, dict) else {"softcap": softcap}
        arguments = {key: c.cpu().detach().requires_grad_() if isinstance(c, Tensor) else c for key, c in caps.items()}
        arguments |= {"weights": weights, "z_loss": 1e-2}
        want = results(softcapped_ce_ref, logits, targets, **arguments)
        for fn in (softcapped_ce, promising(1.0)):
            got = results(fn, logits, targets, **arguments)
            for key in want:
                numerics.assert_same_f64(key, got[key], want[key])


def test_confident_row_keeps_its_gradient() -> None:
    """p = 0.999: p - 1 rounded before the subtraction would be wrong by 100 % in bfloat16."""
    logits = torch.zeros(1, 1000, device=DEVICE, dtype=torch.bfloat16)
    logits[0, 3] = 15.0  # capped to 13.86, so p = 1 / (1 + 999 exp(-13.86)) = 0.99904
    targets = torch.tensor([3], device=DEVICE)
    want = results(softcapped_ce_ref, logits.double().requires_grad_(), targets)["d_logits"]
    for fn in (softcapped_ce, promising(1.0)):
        got = results(fn, logits.requires_grad_(), targets)["d_logits"]
        assert abs(got[0, 3].item() / want[0, 3].item() - 1) < numerics.CONFIDENT_ROW


def test_rows_of_a_wider_tensor_and_int32_targets() -> None:
    wide, targets = logits_and_targets(5, 210)
    columns, targets = wide.detach()[:, 3:203], targets.clamp(max=199)
    got = results(softcapped_ce, columns.requires_grad_(), targets.int())
    assert_equal(got, results(softcapped_ce, columns.detach().clone().requires_grad_(), targets))
    want = softcapped_ce_and_grad(columns, targets)[1]
    softcapped_ce_and_grad(columns.detach(), targets, inplace=True)
    assert torch.equal(wide.detach()[:, 3:203], want)
    assert torch.equal(wide.detach()[:, :3], logits_and_targets(5, 210)[0].detach()[:, :3])  # not what lies beside


@pytest.mark.parametrize("bad", [40, -1, 2**40])
def test_target_out_of_range_is_nan_in_its_row_alone(bad: int) -> None:
    logits, targets = logits_and_targets(3, 40)
    targets[1] = bad
    got = results(softcapped_ce, logits, targets, reduction="none")
    assert got["loss"].isnan().tolist() == [False, True, False]
    assert got["d_logits"].isnan().any(1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match=rf"targets in \[0, 40\), got {bad} in row 1"):
        softcapped_ce(logits, targets, check_targets=True)
    with pytest.raises(ValueError, match=rf"targets in \[0, 40\), got {bad} in row 1"):
        softcapped_ce_and_grad(logits, targets, check_targets=True)


@pytest.mark.parametrize("upstream", [None, 1.0])
def test_nan_in_an_ignored_row_stays_out_of_the_others(upstream: float | None) -> None:
    """Its loss is 0, and so is its gradient in plain PyTorch; the kernel multiplies what it has read by 0."""
    logits, targets = logits_and_targets(4, 300)
    targets[1] = -100
    with torch.no_grad():
        logits[1, 17] = float("nan")
    fn = softcapped_ce if upstream is None else promising(upstream)
    in_pytorch = DEVICE == "cpu" and not module.INTERPRETED
    for arguments in ({}, {"z_loss": 1e-3}, two_caps() if in_pytorch else {}):
        got = results(fn, logits, targets, reduction="none", **arguments)
        assert got["loss"][1] == 0 and got["loss"].isfinite().all()
        others = got["d_logits"][[0, 2, 3]]
        assert others.isfinite().all() and others.any(1).all()
        if in_pytorch:
            assert not got["d_logits"][1].any()
            assert all(value.isfinite().all() for value in got.values())


def test_compiles_with_numbers_that_change() -> None:
    """dynamic=True makes symbols of the sizes and of the caps and z_loss alike."""

    def call(x: Tensor, t: Tensor, softcap: object, z_loss: float) -> Tensor:
        return softcapped_ce(x, t, softcap, z_loss=z_loss)

    torch._dynamo.reset()
    whole = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for n_rows, softcap, z_loss in ((5, 30.0, 1e-3), (6, 15.0, 1e-4), (7, (23.0, 5.0, 7.5), 0.5), (8, 20, 0)):
        logits, targets = logits_and_targets(n_rows, 40 + n_rows)
        got, want = (results(fn, logits, targets, softcap, z_loss) for fn in (whole, call))
        assert_equal(got, want)


def test_no_rows() -> None:
    logits, targets = logits_and_targets(0, 40)
    for fn in (softcapped_ce, promising(1.0)):
        got = results(fn, logits, targets, reduction="none")
        assert got["loss"].shape == (0,) and got["d_logits"].shape == (0, 40)
    assert softcapped_ce(logits, targets, reduction="sum") == 0
    assert softcapped_ce_and_grad(logits, targets)[1].shape == (0, 40)


REFUSED = {
    "one dimension": ({"logits": torch.zeros(5)}, ValueError, r"expected logits of shape \(n_rows, V\), got \(5,\)"),
    "no columns": ({"logits": torch.zeros(4, 0)}, ValueError, r"got \(4, 0\)"),
    "integers": ({"logits": torch.zeros(4, 5, dtype=torch.int32)}, TypeError, "got torch.int32"),
    "columns apart": ({"logits": torch.zeros(5, 4).t()}, ValueError, r"stride 1, got \(1, 4\)"),
    "too few targets": ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"shape \(4,\).*got \(3,\)"),
    "float targets": ({"targets": torch.zeros(4)}, TypeError, "int64 or int32, got torch.float32"),
    "targets elsewhere": ({"targets": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "got meta"),
    "logits in numpy": ({"logits": torch.zeros(4, 5).numpy()}, TypeError, "logits as a tensor, got ndarray"),
    "targets in a list": ({"targets": [0, 1, 2, 3]}, TypeError, "targets as a tensor, got list"),
    "weights in a list": ({"weights": [1.0]}, TypeError, "weights as a tensor, got list"),
    "softcap 0": ({"softcap": 0.0}, ValueError, "0 < softcap <= 10000, got 0.0"),
    "softcap nan": ({"softcap": float("nan")}, ValueError, "0 < softcap <= 10000, got nan"),
    "softcap inf": ({"softcap": float("inf")}, ValueError, "0 < softcap <= 10000, got inf"),
    "softcap 20000": ({"softcap": 20000}, ValueError, "0 < softcap <= 10000, got 20000"),
    "softcap in a list": ({"softcap": [30.0]}, TypeError, "softcap as a number, .* got list"),
    "no softcap": ({"softcap": None}, TypeError, "softcap as a number, .* got NoneType"),
    "softcap true": ({"softcap": True}, TypeError, "softcap as a number, .* got bool"),
    "A to learn": ({"softcap": (torch.ones(1), 5.0, 7.5)}, TypeError, "softcap as a number, .* got Tensor"),
    "A = 20000": ({"softcap": (2e4, 5.0, 7.5)}, ValueError, r"0 < A <= 10000 .* got \(20000.0, 5.0, 7.5\)"),
    "B infinite": ({"softcap": (23.0, float("-inf"), 7.5)}, ValueError, r"finite .* got \(23.0, -inf, 7.5\)"),
    "C infinite": ({"softcap": (23.0, 5.0, float("inf"))}, ValueError, r"finite .* got \(23.0, 5.0, inf\)"),
    "two numbers": ({"softcap": (23.0, 5.0)}, ValueError, r"\(A, B, C\) .* got \(23.0, 5.0\)"),
    "C = 0": ({"softcap": (23.0, 5.0, 0.0)}, ValueError, r"C > 0, got \(23.0, 5.0, 0.0\)"),
    "many caps": ({"softcap": torch.ones(2)}, ValueError, r"one float, got torch.float32 of shape \(2,\)"),
    "integer cap": ({"softcap": torch.ones(1).int()}, ValueError, "one float, got torch.int32"),
    "cap elsewhere": ({"softcap": torch.ones(1, device="meta")}, ValueError, "softcap on cpu, got meta"),
    "second cap alone": ({"softcap_negative": torch.ones(1)}, TypeError, "as a tensor beside .* got 30.0"),
    "second cap a number": (
        {"softcap": torch.ones(1), "softcap_negative": 30.0},
        TypeError,
        "softcap_negative as a tensor, got float",
    ),
    "weights in bfloat16": ({"weights": torch.ones(4).bfloat16()}, TypeError, "float32, got torch.bfloat16"),
    "too few weights": ({"weights": torch.ones(3)}, ValueError, r"weights of shape \(4,\).*got \(3,\)"),
    "weights to learn": ({"weights": torch.ones(4).requires_grad_()}, ValueError, "require no grad"),
    "z_loss < 0": ({"z_loss": -1.0}, ValueError, "z_loss >= 0, got -1.0"),
    "z_loss a tensor": ({"z_loss": torch.ones(())}, TypeError, "z_loss as a number, got Tensor"),
    "z_loss true": ({"z_loss": True}, TypeError, "z_loss as a number, got bool"),
    "ignore_index a float": ({"ignore_index": -100.0}, TypeError, "ignore_index as an int, got float"),
    "ignore_index 2^70": ({"ignore_index": 2**70}, ValueError, "ignore_index in 64 bits, got 1180591620717411303424"),
    "upstream in text": ({"upstream": "1.0"}, TypeError, "upstream as a number, got str"),
    "upstream a tensor": ({"upstream": torch.ones(())}, TypeError, "upstream as a number, got Tensor"),
    "upstream 1e300": ({"upstream": 1e300}, ValueError, r"a finite upstream in torch.float32, got 1e\+300"),
    "upstream nan": ({"upstream": float("nan")}, ValueError, "a finite upstream in torch.float32, got nan"),
    "upstream -inf": ({"upstream": float("-inf")}, ValueError, "a finite upstream in torch.float32, got -inf"),
    "reduction": ({"reduction": "average"}, ValueError, "got 'average'"),
}
REFUSED_AND_GRAD = {
    "cap to learn": ({"softcap": torch.ones(1)}, TypeError, "in numbers .* got a tensor"),
    "other dtype": ({"grad_dtype": torch.float16}, TypeError, "torch.float32 or torch.float8_e5m2, got torch.float16"),
    "8 bits in place": ({"grad_dtype": torch.float8_e5m2, "inplace": True}, TypeError, "inplace, got torch.float8"),
    "leaf in place": ({"logits": torch.zeros(4, 5).requires_grad_(), "inplace": True}, ValueError, "not require grad"),
    "one row": ({"logits": torch.zeros(1, 5).expand(4, 5), "inplace": True}, ValueError, r"strides \(0, 1\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    change, error, message = REFUSED[case]
    arguments = {"logits": torch.zeros(4, 5), "targets": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        softcapped_ce(**arguments)


@pytest.mark.parametrize("case", REFUSED_AND_GRAD)
def test_and_grad_refuses(case: str) -> None:
    change, error, message = REFUSED_AND_GRAD[case]
    arguments = {"logits": torch.zeros(4, 5), "targets": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        softcapped_ce_and_grad(**arguments)


def test_the_way_taken() -> None:
    for V, dtype, simple, way in (
        (8192, torch.bfloat16, True, "gradient"),
        (8191, torch.float8_e5m2, True, "gradient in 8 bits"),
        (8192, torch.bfloat16, False, "gradient in loops"),
        (50304, torch.bfloat16, False, "gradient in loops"),
        (50257, torch.bfloat16, True, "gradient in loops"),
        (50304, torch.bfloat16, True, "gradient in loops" if module.INTERPRETED else "gradient by a team"),
    ):
        assert module._softcapped_ce_way(torch.empty(2, V, dtype=torch.bfloat16), dtype, simple) == way


@pytest.mark.gpu
@pytest.mark.parametrize("V", [50257, 50304, 131072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teams(dtype: torch.dtype, V: int) -> None:
    """More rows than run at once, some ignored, weighted: as the reference, twice the same bits, and in place."""
    logits, targets = logits_and_targets(1000, V, dtype)
    targets[::7] = -100
    assert_as_reference(logits, targets, reduction="sum", weights=weights_of(1000), z_loss=1e-4)
    first, second = (softcapped_ce_and_grad(logits, targets) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    own = logits.detach().clone()
    softcapped_ce_and_grad(own, targets, inplace=True)
    assert torch.equal(own, first[1])


@pytest.mark.gpu
def test_refuses_float64_on_a_gpu() -> None:
    logits, targets = logits_and_targets(2, 8, torch.float64)
    with pytest.raises(TypeError, match=r"float64 on CPU only\), got torch.float64 on cuda"):
        softcapped_ce(logits, targets)
