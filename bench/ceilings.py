"""What the card in hand can do, measured in the run that is judged by it: a copy's bandwidth and matrix products.

The matrix products are those of the training step (N tokens, width 512, hidden width 2048, vocabulary 8192), with the
operands lying in memory as they do there; a roof takes the best of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from niblick.bench.timing import Calls, interleave, timer_for

N = 98_304
PRODUCTS = [(N, 512, 2048), (N, 2048, 512), (N, 512, 8192), (2048, N, 512), (512, N, 2048), (8192, N, 512)]
"""(m, k, n) of (m, k) @ (k, n): three forward products and the gradients of their weights."""
SMALL_PRODUCT = (512, 512, 512)
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Ceilings:
    """bytes/s of a copy, read + written, and the best FLOP/s by dtype; `products` holds every product measured."""

    bytes_per_s: float
    flops_per_s: dict[str, float] = field(default_factory=dict)
    products: list[dict[str, object]] = field(default_factory=list)

    def roof(self, n_bytes: int, flops: int, dtype: str) -> tuple[float, str]:
        """The shortest time in seconds that the work can take, and which of the two bounds it.

        A dtype whose products were not measured is bounded by its bytes.
        """
        moving = n_bytes / self.bytes_per_s
        computing = flops / self.flops_per_s[dtype] if dtype in self.flops_per_s else 0.0
        return (computing, "flops") if computing > moving else (moving, "bytes")


def measure_ceilings(device: torch.device, dtypes: list[torch.dtype], rounds: int = 20) -> Ceilings:
    """The copy, then the products in each dtype (fp8 where the card has it). On a CPU all of it is small."""
    cuda = device.type == "cuda"
    bytes_per_s = _copy_bandwidth(2**30 if cuda else 2**24, device, rounds)
    products = []
    for shape in PRODUCTS if cuda else [SMALL_PRODUCT]:
        calls = {str(dtype)[6:]: _product(shape, dtype, device) for dtype in dtypes}
        for dtype, seconds in _median(calls, device, rounds).items():
            tflops = 2 * math.prod(shape) / seconds / 1e12
            products.append({"dtype": dtype, "mkn": shape, "ms": 1e3 * seconds, "tflops": tflops})
    best = {
        str(dtype)[6:]: max(p["tflops"] for p in products if p["dtype"] == str(dtype)[6:]) * 1e12 for dtype in dtypes
    }
    return Ceilings(bytes_per_s, best, products)


def ceiling_dtypes(device: torch.device, dtype: torch.dtype) -> list[torch.dtype]:
    """The dtype under test, and on a card bf16 and, from compute capability 8.9 on, fp8."""
    if device.type != "cuda":
        return [dtype]
    fp8 = [FP8] if torch.cuda.get_device_capability(device) >= (8, 9) else []
    return list(dict.fromkeys([dtype, torch.bfloat16, *fp8]))


def _copy_bandwidth(size: int, device: torch.device, rounds: int) -> float:
    source, target = (torch.randint(256, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / _median({"copy": lambda: target.copy_(source)}, device, rounds)["copy"]


def _product(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """A forward product is x @ w.T with both row-major; the gradient of a weight is dy.T @ x. fp8 units take only the
    former layout."""
    m, k, n = shape
    if dtype == FP8:
        a, b = (torch.randn(size, device=device).to(FP8) for size in ((m, k), (n, k)))
        one = torch.ones((), device=device)
        options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
        return lambda: torch._scaled_mm(a, b.t(), **options)
    if k > m:
        dy, x = (torch.randn(size, device=device, dtype=dtype) for size in ((k, m), (k, n)))
        return lambda: dy.t() @ x
    x, weight = (torch.randn(size, device=device, dtype=dtype) for size in ((m, k), (n, k)))
    return lambda: F.linear(x, weight)


def _median(calls: dict[str, Callable[[], Tensor]], device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds of each call, interleaved."""
    timers = {name: timer_for(Calls(call, [{}]), device, graph=False) for name, call in calls.items()}
    interleave(timers, rounds)
    return {name: float(np.median(timer.seconds["forward"])) for name, timer in timers.items()}
