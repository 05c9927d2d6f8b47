"""Who is timed beside a kernel: the one place of the bench that names kernels.

For every kernel: niblick's function, its reference as it is ("eager") and under torch.compile. For the kernels named
here also niblick's own variants, and other people's kernels for the same operation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contender:
    """call: takes the entries of X_inputs as keyword arguments and returns what X_ref returns.

    package: the distribution it needs. overwrites, direct: see `timing.Calls`. in_graph: a CUDA graph can hold it, the
    host waits for nothing. one_pass: its forward computes the gradients too, so only both directions together mean
    something. gemm_dtype: the dtype of its matrix products, if not that of the inputs. bytes_saved: what it need not
    move of X_cost's bytes, from size and dtype, because its results are smaller.
    """

    who: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    package: str | None = None
    overwrites: bool = False
    direct: bool = False
    in_graph: bool = True
    one_pass: bool = False
    gemm_dtype: str | None = None
    bytes_saved: Callable[[tuple[int, ...], torch.dtype], int] = field(default=lambda size, dtype: 0)

    @property
    def ours(self) -> bool:
        return self.who.startswith("niblick")

    def version(self) -> str | None:
        """None if its package is not installed; torch's for what is torch's; "" for what is ours."""
        if self.package is None:
            return "" if self.ours else torch.__version__
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def contenders(kernel: str, module: ModuleType, device: torch.device) -> list[Contender]:
    """niblick first. Without a GPU only the eager paths: the others have nothing to run on, or too long to compile."""
    reference = getattr(module, f"{kernel}_ref")
    ours = Contender("niblick", getattr(module, kernel), one_pass=kernel in ONE_PASS)
    eager, theirs = Contender("eager", reference, in_graph=kernel not in LOOPS), RIVALS.get(kernel, [])
    if device.type != "cuda":
        return [ours, eager, *theirs]
    variants = VARIANTS[kernel](module) if kernel in VARIANTS else []
    compiled = [] if kernel in LOOPS else [Contender("torch.compile", torch.compile(reference, dynamic=False))]
    return [ours, *variants, eager, *compiled, *theirs]


# ---- the table ------------------------------------------------------------------------------------------------------

TRAINING_INPUTS = {
    "softcapped_ce": {"reduction": "sum"},
    "linear_softcapped_ce": {"reduction": "mean", "weights": None},
}
"""Laid over X_inputs: one loss, as in training, whose gradient is then 1; for that Liger skips a pass."""

ONE_PASS = {"linear_softcapped_ce"}
"""Kernels whose forward computes the gradients, where one is wanted."""

LOOPS = {"trellis_search"}
"""Kernels whose reference loops over hundreds of tokens, in thousands of launches: too many for a CUDA graph of all
input sets, and torch.compile unrolls them for longer than they are worth."""

FP8 = "float8_e4m3fn"


def softcapped_ce_variants(module: ModuleType) -> list[Contender]:
    """The gradient written while the logits are read: promised to be 1, or handed out by a function of its own."""

    def in_fp8(logits: Tensor, targets: Tensor, softcap: float, reduction: str) -> tuple[Tensor, Tensor]:
        losses, dlogits = module.softcapped_ce_and_grad(logits, targets, softcap, grad_dtype=torch.float8_e5m2)
        return losses.sum(), dlogits

    def bytes_saved(size: tuple[int, ...], dtype: torch.dtype) -> int:
        return size[0] * size[1] * (dtype.itemsize - 1)

    return [
        Contender("niblick, upstream=1.0", partial(module.softcapped_ce, upstream=1.0), one_pass=True),
        Contender("niblick, fp8 gradient", in_fp8, direct=True, bytes_saved=bytes_saved),
    ]


def linear_softcapped_ce_variants(module: ModuleType) -> list[Contender]:
    fp8 = partial(module.linear_softcapped_ce, fp8=True)
    return [Contender("niblick, fp8", fp8, one_pass=True, gemm_dtype=FP8)]


def leaky_relu_sq_mlp_variants(module: ModuleType) -> list[Contender]:
    return [Contender("niblick, fp8", partial(module.leaky_relu_sq_mlp, fp8=True), gemm_dtype=FP8)]


VARIANTS: dict[str, Callable[[ModuleType], list[Contender]]] = {
    "softcapped_ce": softcapped_ce_variants,
    "linear_softcapped_ce": linear_softcapped_ce_variants,
    "leaky_relu_sq_mlp": leaky_relu_sq_mlp_variants,
}


def liger_cross_entropy(logits: Tensor, targets: Tensor, softcap: float, reduction: str) -> Tensor:
    from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss(softcap=softcap, reduction=reduction)(logits, targets)


def liger_fused_linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, reduction: str, **_: object
) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(softcap=softcap, reduction=reduction)(weight, x, targets)


def cut_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, reduction: str, **_: object
) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, targets, softcap=softcap, reduction=reduction)


RIVALS = {
    "softcapped_ce": [
        Contender("Liger", liger_cross_entropy, "liger-kernel", overwrites=True, in_graph=False, one_pass=True),
    ],
    "linear_softcapped_ce": [
        Contender("Liger", liger_fused_linear_cross_entropy, "liger-kernel", in_graph=False, one_pass=True),
        Contender("cut-cross-entropy", cut_cross_entropy, "cut-cross-entropy", in_graph=False),
    ],
}
