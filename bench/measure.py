"""One kernel at one size: rotated random inputs, every contender checked against the reference, then timed in turns."""

import importlib
import math
import pkgutil
import re
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

import niblick.kernels
from niblick.bench import rivals
from niblick.bench.ceilings import Ceilings
from niblick.bench.rivals import Contender
from niblick.bench.timing import GRAPH_BELOW_S, Calls, Inputs, Timer, interleave, timer_for

OTHER_OPERATION = 0.15
"""Relative error (of norms) above which a contender computes something else; fp8 gradients in e5m2 stay at half."""
MOST_SETS = 512
PARTS = ("ref", "inputs", "cost")
SMALL_BYTES = 2e6
"""Of the size that is timed without a GPU, as in the contract."""


@dataclass
class Outcome:
    """Of one contender at one size. status: "timed", or why not; records and seconds by direction."""

    status: str
    records: dict[str, dict[str, object]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)


def kernels() -> list[str]:
    """The names of the kernels: the files of the folder, as the contract finds them."""
    return sorted(module.name for module in pkgutil.iter_modules(niblick.kernels.__path__))


def load(kernel: str) -> ModuleType:
    return importlib.import_module(f"niblick.kernels.{kernel}")


def defect(kernel: str) -> str | None:
    """Why the file cannot be measured at all: it does not import, or lacks a part."""
    try:
        module = load(kernel)
    except Exception as error:  # whatever a half-written file does
        return f"does not import: {first_line(error)}"
    lacking = [part for part in (kernel, *(f"{kernel}_{part}" for part in PARTS), "SIZES") if not hasattr(module, part)]
    if not lacking and "record" not in module.SIZES:
        lacking = ["SIZES['record']"]
    return f"lacks {', '.join(lacking)}" if lacking else None


def directions(kernel: str, module: ModuleType) -> tuple[str, ...]:
    work = getattr(module, f"{kernel}_cost")(module.SIZES["record"], torch.float32)
    return ("forward", "backward", "both") if work["bytes_backward"] else ("forward",)


def size_of(module: ModuleType, name: str) -> tuple[int, ...]:
    """`record`, or `record/4`, `record*2`: the first dimension of that size, divided or multiplied.

    KeyError for a size that the kernel has not, ValueError for what is no positive number.
    """
    base, sign, factor = re.fullmatch(r"([^/*]*)([/*]?)(.*)", name).groups()
    first, *rest = module.SIZES[base]
    n = int(factor) if sign else 1
    if n < 1:
        raise ValueError(f"{name}: expected a positive number, got {n}")
    return (first * n if sign == "*" else max(1, first // n), *rest)


def default_sizes(module: ModuleType) -> list[str]:
    return ["record/16", "record/4", *(name for name in module.SIZES if name.startswith("record"))]


def small_size(kernel: str, module: ModuleType) -> str:
    """The largest of the sizes that a CPU does at once."""
    cost = getattr(module, f"{kernel}_cost")
    moved = {
        name: sum(cost(size, torch.float32)[f"bytes_{d}"] for d in ("forward", "backward"))
        for name, size in module.SIZES.items()
    }
    return max((name for name in moved if moved[name] < SMALL_BYTES), key=moved.get)


def measure(
    kernel: str, size_name: str, dtype: torch.dtype, device: torch.device, ceilings: Ceilings, rounds: int
) -> dict[str, Outcome]:
    """By contender's name. What fails is said in its status; nothing is raised but by the inputs themselves."""
    module = load(kernel)
    size = size_of(module, size_name)
    if device.type == "cuda":
        torch._dynamo.reset()  # else the next size would count against the compilations of this one
    sets = input_sets(kernel, module, size, dtype, device)
    everyone = rivals.contenders(kernel, module, device)
    timers, outcomes, errors, peaks = {}, {}, {}, {}
    reference = Calls(getattr(module, f"{kernel}_ref"), sets).results()
    graph = False
    for contender in everyone:
        who = contender.who
        try:
            calls, errors[who] = _check(contender, sets, reference)
            peaks[who] = _peak_bytes(calls, device)
            timer = timer_for(calls, device, graph=False)
            if who == "niblick":
                graph = device.type == "cuda" and _probe(timer) < GRAPH_BELOW_S
            timers[who] = _graph_timer(calls, device, timer) if graph and contender.in_graph else timer
            outcomes[who] = Outcome("timed")
        except Exception as error:  # of somebody else's code, or of ours: shown, and the others go on
            outcomes[who] = Outcome(_why(contender, error, device))
    del reference
    if timers:
        interleave(timers, rounds)
    work = getattr(module, f"{kernel}_cost")(size, dtype)
    for contender in everyone:
        if contender.who in timers:
            outcome, timer = outcomes[contender.who], timers[contender.who]
            outcome.seconds = _meaningful(contender, timer.seconds)
            facts = {
                "kernel": kernel,
                "size_name": size_name,
                "size": size,
                "dtype": str(dtype)[6:],
                "who": contender.who,
                "version": contender.version(),
                "method": timer.method,
                "input_sets": len(sets),
                "peak_bytes": peaks[contender.who],
                "relative_error": errors[contender.who],
            }
            saved = contender.bytes_saved(size, dtype)
            gemm_dtype = contender.gemm_dtype or str(dtype)[6:]
            outcome.records = {
                direction: facts | figures(direction, seconds, work, ceilings, gemm_dtype, saved)
                for direction, seconds in outcome.seconds.items()
            }
    return outcomes


def figures(
    direction: str, seconds: list[float], work: dict[str, int], ceilings: Ceilings, gemm_dtype: str, saved: int = 0
) -> dict[str, object]:
    """What is told of one series of times: median and quartiles, rates, and the share of the roof that they reach."""
    parts = ("forward", "backward") if direction == "both" else (direction,)
    n_bytes, flops = (sum(work[f"{what}_{part}"] for part in parts) for what in ("bytes", "flops"))
    n_bytes -= saved
    first, median, third = (float(q) for q in np.percentile(seconds, (25, 50, 75)))
    roof, bound = ceilings.roof(n_bytes, flops, gemm_dtype)
    return {
        "direction": direction,
        "ms": median * 1e3,
        "q1_ms": first * 1e3,
        "q3_ms": third * 1e3,
        "n": len(seconds),
        "tb_per_s": n_bytes / median / 1e12,
        "tflops": flops / median / 1e12,
        "roof_ms": roof * 1e3,
        "percent_of_roof": 100 * roof / median,
        "bound": bound,
    }


def input_sets(
    kernel: str, module: ModuleType, size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> list[Inputs]:
    """So many sets that a round over them touches more than three times the L2; at least two."""

    def make(seed: int) -> Inputs:
        inputs = getattr(module, f"{kernel}_inputs")(size, dtype, device.type, seed=seed)
        return inputs | rivals.TRAINING_INPUTS.get(kernel, {})

    first = make(0)
    n_bytes = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    n_sets = min(MOST_SETS, max(2, math.ceil(3 * cache / n_bytes) + 1))
    return [first, *(make(seed) for seed in range(1, n_sets))]


def _check(contender: Contender, sets: list[Inputs], reference: list[Tensor]) -> tuple[Calls, float]:
    """The contender's calls, and its largest relative error; ValueError if it is another operation's."""
    calls = Calls(contender.call, sets, overwrites=contender.overwrites, direct=contender.direct)
    results = calls.results()
    if len(results) != len(reference):
        raise ValueError(f"gives {len(results)} outputs and gradients, the reference {len(reference)}")
    error = max(relative_error(got, want) for got, want in zip(results, reference, strict=True))
    if not error <= OTHER_OPERATION:  # NaN is not
        raise ValueError(f"computes something else: relative error {error:.2g}")
    return calls, error


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖, NaN in the same place counted as equal (the mean over no row)."""
    got, want = got.float(), want.float()
    difference = torch.where(got.isnan() & want.isnan(), 0.0, got - want)
    return float(difference.norm() / want.nan_to_num().norm().clamp_min(1e-30))


def _peak_bytes(calls: Calls, device: torch.device) -> int | None:
    """Device memory beyond the inputs at the worst moment of forward and backward, outputs and gradients included."""
    if device.type != "cuda":
        return None
    calls.results()  # what is allocated once, workspaces and cotangents, is not counted
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    calls.results()
    return torch.cuda.max_memory_allocated() - before


def _probe(timer: Timer) -> float:
    """Seconds of the forward, roughly."""
    interleave({"": timer}, 5)
    seconds = float(np.median(timer.seconds["forward"]))
    timer.seconds.clear()
    return seconds


def _graph_timer(calls: Calls, device: torch.device, otherwise: Timer) -> Timer:
    try:
        return timer_for(calls, device, graph=True)
    except RuntimeError:  # its host code waits for the device; the record says "events"
        torch.cuda.synchronize()
        return otherwise


def _meaningful(contender: Contender, seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    if contender.direct:
        return {"both": seconds["forward"]}
    return {"both": seconds["both"]} if contender.one_pass and "both" in seconds else seconds


def _why(contender: Contender, error: Exception, device: torch.device) -> str:
    if contender.version() is None:
        return f"missing: {contender.package} is not installed"
    if contender.package and device.type != "cuda":
        return "needs a GPU"
    return f"failed: {first_line(error)}"


def first_line(error: Exception) -> str:
    """What went wrong, on one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
