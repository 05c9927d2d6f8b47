"""Every tolerance of the tests, each with its reason; no other file under tests/ may hold one."""

import torch
from torch import Tensor

MODEL_F64 = 1e-9  # of the row's largest magnitude, float64 code against a float64 reference: real faults are far above
SCORE_NATS = 1e-5  # a scorer's negative log-likelihood against brute force over the vocabulary, float32, per token
RANK_NATS = 1e-4  # a stream's summed loss on several ranks against one, where each rounds other sums, float32
IDENTITY_F64 = 1e-9  # relative, of a sum of float64 products that equals another by algebra; H's condition is below 1e5
EQUAL_ERROR_DB = 0.1  # of two quantisers brought to one error in two corrections; a sixteenth of an octave is 0.4 dB
CONFIDENT_ROW = 1e-2  # relative error of p - 1 at p = 0.999: storing it in bfloat16 alone may cost 2^-7

_CHUNK = 1 << 26  # elements compared at once: the float64 copies of a tensor beyond 2^31 elements would not fit a card


def assert_matches_f64(name: str, kernel: Tensor, eager: Tensor, f64: Tensor) -> None:
    """|kernel - f64| <= 2 |eager - f64| + 4 eps |f64| + 1e-6 rowmax |f64|, element by element, all finite.

    `eager` is the reference in the kernel's dtype and `f64` the reference in float64; a row is the last dimension.
    The budget is twice what eager loses on the same element, so no tolerance is picked by hand; 4 eps covers the
    rounding of the result, and the row term a sum taken in another order. Integers must be equal.
    """
    assert kernel.shape == eager.shape == f64.shape, (
        f"{name}: shape {tuple(kernel.shape)}, eager {tuple(eager.shape)}, float64 {tuple(f64.shape)}"
    )
    assert kernel.dtype == eager.dtype, f"{name}: dtype {kernel.dtype}, eager {eager.dtype}"
    if not kernel.is_floating_point():
        assert torch.equal(kernel, eager) and torch.equal(eager, f64), f"{name}: integers differ from the reference"
        return
    first = 0
    for k, e, f in zip(*(_chunks(t) for t in (kernel, eager, f64)), strict=True):
        _assert_chunk(name, first, k, e, f, torch.finfo(kernel.dtype).eps)
        first += len(k)


def assert_same_f64(name: str, got: Tensor, want: Tensor) -> None:
    """Two float64 results agree to `MODEL_F64` of the largest magnitude in the row (the last dimension).

    Rows that are zero but for rounding are judged by 1e-3 of the largest magnitude in the whole tensor instead.
    """
    assert got.dtype == want.dtype == torch.float64, f"{name}: dtypes {got.dtype} and {want.dtype}, expected float64"
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return
    got, want = got.detach(), want.detach()
    scale = torch.maximum(_row_max(want), 1e-3 * want.abs().max())
    _fail_at_worst(name, got, want, (got - want).abs(), MODEL_F64 * scale.expand_as(want), extra="")


def _assert_chunk(name: str, first: int, kernel: Tensor, eager: Tensor, f64: Tensor, eps: float) -> None:
    kernel, eager, f64 = kernel.double(), eager.double(), f64.double()
    budget = 2 * (eager - f64).abs() + 4 * eps * f64.abs() + 1e-6 * _row_max(f64)
    _fail_at_worst(name, kernel, f64, (kernel - f64).abs(), budget, extra=eager, first=first)


def _fail_at_worst(
    name: str, got: Tensor, want: Tensor, error: Tensor, budget: Tensor, extra: Tensor | str, first: int = 0
) -> None:
    bad = ~(error <= budget)  # a NaN compares false, so it is bad
    bad |= ~torch.isfinite(got)
    if not bad.any():
        return
    excess = torch.where(torch.isfinite(got), error / budget.clamp_min(1e-300), torch.inf).nan_to_num(torch.inf)
    worst = torch.where(bad, excess, -1.0).argmax()
    index = [int(i) for i in torch.unravel_index(worst, got.shape)]
    if index:
        index[0] += first
    eager = f", eager {extra.reshape(-1)[worst].item():.9g}" if isinstance(extra, Tensor) else ""
    raise AssertionError(
        f"{name}{index}: got {got.reshape(-1)[worst].item():.9g}{eager}, float64 {want.reshape(-1)[worst].item():.9g}; "
        f"error {error.reshape(-1)[worst].item():.3g}, allowed {budget.reshape(-1)[worst].item():.3g}; "
        f"{int(bad.sum())} of {bad.numel()} elements are out"
    )


def _row_max(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True) if x.ndim and x.numel() else x.abs()


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    x = x.detach()
    if x.ndim < 2 or x.numel() <= _CHUNK:
        return (x.reshape(-1) if x.ndim == 0 else x,)
    return x.split(max(1, _CHUNK // x[0].numel()))


CLOSE_F32 = 2e-4  # float32 code through tens of dependent operations against float64, of the largest magnitude


def assert_close_f32(name: str, got: Tensor, want: Tensor) -> None:
    """A float32 result of a long computation agrees with float64 to `CLOSE_F32` of the largest magnitude."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    worst = (got.detach().double() - want.double()).abs().max().item()
    allowed = CLOSE_F32 * want.abs().max().item()
    assert worst <= allowed, f"{name}: error {worst:.3g}, allowed {allowed:.3g}"


def assert_rms_like_eager(name: str, kernel: Tensor, eager: Tensor, f64: Tensor) -> None:
    """The root mean square error is at most twice eager's, plus a rounding of the result.

    For library code that rounds its intermediates elsewhere than eager does (flash attention), so that single
    elements can differ while the whole is as accurate.
    """
    assert kernel.shape == f64.shape and torch.isfinite(kernel).all(), f"{name}: shape or not finite"

    def rms(x: Tensor) -> float:
        return x.detach().double().square().mean().sqrt().item()

    error, allowed = rms(kernel - f64), 2 * rms(eager - f64) + torch.finfo(kernel.dtype).eps * rms(f64)
    assert error <= allowed, f"{name}: rms error {error:.3g}, allowed {allowed:.3g}"


def assert_like_eager(name: str, kernel: Tensor, eager: Tensor, f64: Tensor) -> None:
    """For chains of GEMMs: where 16-bit intermediates are rounded, two right answers differ on single elements.

    Errors are taken relative to the row's root mean square (the last dimension; at least 1e-3 of the tensor's). Their
    root mean square may be twice eager's plus half a rounding, the worst of them twice eager's worst plus a rounding;
    and 1e-6, as in `assert_matches_f64`, for sums in another order.
    """
    assert kernel.shape == eager.shape == f64.shape and kernel.dtype == eager.dtype, (
        f"{name}: {kernel.dtype} {tuple(kernel.shape)}, expected {eager.dtype} {tuple(f64.shape)}"
    )
    assert torch.isfinite(kernel).all(), f"{name}: not finite"
    if kernel.numel() == 0:
        return
    truth = f64.detach().double()
    size = truth.square().mean(-1, keepdim=True).sqrt() if truth.ndim else truth.abs()
    size = size.maximum(1e-3 * truth.square().mean().sqrt()).clamp_min(1e-300)
    ours, theirs = (((x.detach().double() - truth) / size).abs() for x in (kernel, eager))
    eps = torch.finfo(kernel.dtype).eps
    for what, error, allowed in (
        ("root mean square", ours.square().mean().sqrt(), 2 * theirs.square().mean().sqrt() + eps / 2 + 1e-6),
        ("worst", ours.max(), 2 * theirs.max() + eps + 1e-6),
    ):
        assert error <= allowed, f"{name}: {what} error {error:.3g} of the row's size, allowed {allowed:.3g}"


def assert_fp8_logits(name: str, kernel: Tensor, f64: Tensor) -> None:
    """The root mean square error is at most a tenth of the result's size, for logits of standard deviation up to 4.

    e4m3 has 3 bits behind the point: each operand is off by 2^-4 / sqrt(12) to 2^-4 / sqrt(3) of itself, 2.6 % on
    average, so a logit by 3.7 % of the logits' standard deviation, 0.15 at 4, and exp(logit) by 15 %. Sums of thousands
    of such terms, and the target's own term, which is known, lie well below that.
    """
    assert kernel.shape == f64.shape and torch.isfinite(kernel).all(), f"{name}: shape or not finite"
    error = (kernel.detach().double() - f64).square().mean().sqrt() / f64.square().mean().sqrt()
    assert error <= 0.1, f"{name}: rms error {error:.3g} of the result's"


FP8_MLP = 0.1  # root mean square error of the 8-bit MLP, of the result's: 6 to 8 % expected, see below
FP8_MLP_TRUNCATED = 0.25  # in Triton's interpreter, which casts to 8 bits towards zero: every cast shrinks by 3 %


def assert_fp8_mlp(name: str, kernel: Tensor, f64: Tensor) -> None:
    """The root mean square error is at most `FP8_MLP` of the result's, all finite.

    A cast to e4m3 is off by 2.6 %. h carries two of them and counts twice in a, a's own and a weight's follow: 6 % for
    y; 7 % for the gradients, whose factors were cast once more.
    """
    assert kernel.shape == f64.shape and torch.isfinite(kernel).all(), f"{name}: shape or not finite"
    error = (kernel.detach().double() - f64).square().mean().sqrt() / f64.square().mean().sqrt()
    allowed = FP8_MLP if kernel.is_cuda else FP8_MLP_TRUNCATED
    assert error <= allowed, f"{name}: rms error {error:.3g} of the result's, allowed {allowed:.3g}"
