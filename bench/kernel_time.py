"""Where the device's time goes inside a step: the profiler's kernels by class, idle time, and each class's roof.

Roofs: matrix products and attention by their operations over the best product of this run's ceilings (bf16);
niblick's streaming kernels by the bytes of the tensors that go into and come out of their ops, once each, over a copy's
bandwidth.
Kernels of a file of niblick's that multiplies matrices (`tl.dot`) count as products, as do the library's.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import niblick.kernels
from niblick.bench.ceilings import Ceilings
from niblick.bench.workload import make_trainer, synthetic_batches, take_step
from niblick.data.loaders import Batch
from niblick.model.config import Preset
from niblick.model.gpt import execution_order
from niblick.model.training import Trainer

PRODUCTS, STREAMS, ATTENTION, GEMM = "niblick, products", "niblick, streams", "attention", "GEMM"
OTHER = "other"
NAMES = (
    (ATTENTION, "flash|fmha|sdpa|attention"),
    ("collectives", "nccl"),
    (GEMM, "nvjet|cutlass|gemm|cublas|splitk"),
    ("Inductor", "^triton_"),
    ("memcpy, memset", "^mem(cpy|set)"),
)
"""Class and what the name of its kernels holds, the first that fits; case does not matter. niblick's own go before."""
SMALL = 2048
"""Tokens of the eager step whose ops are weighed; bytes grow linearly with tokens, so two sizes give them all."""


class Kernel(NamedTuple):
    """One kernel, copy or fill on the device; microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Account:
    """Of one step, on average: ms and number of kernels by class, the span, and its part without any kernel."""

    ms: dict[str, float]
    count: dict[str, float]
    span_ms: float
    idle_ms: float

    @property
    def idle_share(self) -> float:
        return self.idle_ms / self.span_ms

    @property
    def overlap_ms(self) -> float:
        """By how much the classes' sum exceeds the time in which anything ran."""
        return sum(self.ms.values()) - (self.span_ms - self.idle_ms)


# ---- classes --------------------------------------------------------------------------------------------------------


@cache
def own_kernels() -> dict[str, str]:
    """niblick's Triton functions and the class of the file that they stand in."""
    found = {}
    for path in sorted(path for folder in niblick.kernels.__path__ for path in Path(folder).glob("*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in node.decorator_list):
                found[node.name] = _class_of(path)
    return found


def _class_of(path: Path) -> str:
    return PRODUCTS if "tl.dot(" in path.read_text() else STREAMS


def classify(name: str) -> str:
    """The class of a kernel by its name. Triton may append the specialisation: `name_0d1d2de`."""
    own = own_kernels()
    plain = re.sub(r"_\d\w*$", "", name)
    if name in own or plain in own:
        return own.get(name) or own[plain]
    return next((label for label, pattern in NAMES if re.search(pattern, name, re.IGNORECASE)), OTHER)


# ---- time -----------------------------------------------------------------------------------------------------------


def profile_steps(trainer: Trainer, batches: Iterator[Batch], looping: bool, steps: int) -> list[Kernel]:
    """What ran on the GPU during so many steps, by torch.profiler (CUPTI), in order of start."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            take_step(trainer, batches, looping)
        torch.cuda.synchronize()
    on_device = (event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return sorted((Kernel(e.name, e.time_range.start, e.time_range.end) for e in on_device), key=lambda k: k.start)


def account(kernels: list[Kernel], steps: int) -> Account:
    """Of kernels in order of start: idle is the span less the union of their intervals."""
    ms: dict[str, float] = {}
    count: dict[str, float] = {}
    idle, end = 0.0, kernels[0].start
    for kernel in kernels:
        label = classify(kernel.name)
        ms[label] = ms.get(label, 0.0) + (kernel.end - kernel.start) / 1e3 / steps
        count[label] = count.get(label, 0.0) + 1 / steps
        idle += max(0.0, kernel.start - end)
        end = max(end, kernel.end)
    ordered = dict(sorted(ms.items(), key=lambda item: -item[1]))
    return Account(ordered, count, (end - kernels[0].start) / 1e3 / steps, idle / 1e3 / steps)


def longest(kernels: list[Kernel], steps: int, label: str, most: int = 8) -> list[tuple[str, float]]:
    """Names of a class and their ms a step, the longest first."""
    ms: dict[str, float] = {}
    for kernel in kernels:
        if classify(kernel.name) == label:
            ms[kernel.name] = ms.get(kernel.name, 0.0) + (kernel.end - kernel.start) / 1e3 / steps
    return sorted(ms.items(), key=lambda item: -item[1])[:most]


# ---- roofs ----------------------------------------------------------------------------------------------------------


def product_flops(preset: Preset, looping: bool) -> float:
    """Operations of all matrix products of one micro-step and of Muon.

    A product costs 2 m k n forward and twice that backward. Newton-Schulz takes XXᵀ and the square of it as symmetric:
    half the operations; five iterations.
    """
    c, n = preset.model, preset.batch.tokens_per_micro_step
    layer = 2 * c.model_dim**2 + 2 * c.model_dim * c.kv_dim + 2 * c.model_dim * c.mlp_hidden
    weights = len(execution_order(c, looping)) * layer + c.vocab_size * c.model_dim
    D, F, L = c.model_dim, c.mlp_hidden, c.num_layers
    banks = [(2 * L, D, D), (2 * L, c.kv_dim, D), (L, F, D), (L, D, F)]
    muon = 0.0
    for matrices, *shape in banks:
        short, long = sorted(shape)
        muon += 5 * matrices * (short**2 * long + short**3 + 2 * short**2 * long)
    return 6.0 * n * weights + muon


def attention_flops(preset: Preset, looping: bool, batch: Batch) -> float:
    """Operations of causal attention inside the batch's segments: QKᵀ and PV forward, five products backward, each
    over half of a segment's square."""
    lengths = batch.cu_seqlens.diff().double()
    forward = 2 * preset.model.model_dim * float((lengths**2).sum())
    return 3.5 * forward * len(execution_order(preset.model, looping))


class _Weigher(TorchDispatchMode):
    """Adds up the bytes of tensors that go into and out of niblick's streaming ops."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if _is_stream(op):
            tensors = (x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor))
            self.n_bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


@cache
def _is_stream(op: object) -> bool:
    """Whether it is one of niblick's ops, named after its file and, backward, a suffix, whose file has no product."""
    if getattr(op, "namespace", "") != "niblick":
        return False
    files = [path for folder in niblick.kernels.__path__ for path in Path(folder).glob("*.py")]
    own = [path for path in files if op._schema.name.partition("::")[2].startswith(path.stem)]
    return bool(own) and _class_of(max(own, key=lambda path: len(path.stem))) == STREAMS


def stream_bytes(preset: Preset, looping: bool, device: torch.device) -> float:
    """Bytes that the streaming ops of one step of `preset` move, from two small eager steps."""
    tokens = preset.batch.tokens_per_micro_step
    found = []
    for n in (SMALL, 2 * SMALL):
        batch = replace(preset.batch, tokens_per_step=n, tokens_per_micro_step=n)
        trainer = make_trainer(replace(preset, batch=batch), device, compile=False)
        with _Weigher() as weigher:
            take_step(trainer, iter(synthetic_batches(trainer.preset, device)), looping)
        found.append(weigher.n_bytes)
    return found[0] + (found[1] - found[0]) * (tokens - SMALL) / SMALL


def roofs(
    preset: Preset, looping: bool, device: torch.device, batch: Batch, ceilings: Ceilings
) -> dict[str, tuple[tuple[str, ...], float]]:
    """Of products, attention and streams: the classes that they are spent in, and the ms that they need at least."""
    rate = ceilings.flops_per_s["bfloat16"]
    return {
        "matrix products": ((GEMM, PRODUCTS), 1e3 * product_flops(preset, looping) / rate),
        "attention": ((ATTENTION,), 1e3 * attention_flops(preset, looping, batch) / rate),
        "niblick's streams": ((STREAMS,), 1e3 * stream_bytes(preset, looping, device) / ceilings.bytes_per_s),
    }
