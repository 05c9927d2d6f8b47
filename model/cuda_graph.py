"""Forward and backward of one micro-step as a CUDA graph a loop mode: one launch instead of a thousand.

A compiled step still launches each kernel from the host, and loses some 2 µs between two of them and more where the
host falls behind. A graph replays all of them; only the input buffers and the gradients lie outside it.
"""

import gc
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

ROOM = 1.25
"""A graph's cu_seqlens hold so many times the segments of the batch it was captured with; the rest are empty."""
STEP = 64
"""Their number is rounded up to a multiple of this."""


class Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    loss: Tensor
    gradients: tuple[Tensor | None, ...]


class GraphedMicroStep:
    """`forward(ids, targets, cu_seqlens, looping)` -> loss, and its backward, captured once a mode and then replayed.

    The graphs share their memory, so what one leaves behind (loss, gradients) is overwritten by its next replay alone,
    and everything else by the next replay of any. `forward` must have run backward in the mode before its capture, so
    that everything is compiled. The gradients are always the same tensors: who accumulates must copy them.
    """

    def __init__(self, forward: Callable[..., Tensor], parameters: list[nn.Parameter]) -> None:
        self._forward, self._parameters = forward, parameters
        self._captured: dict[bool, Captured] = {}
        self._inputs: list[Tensor] = []

    @property
    def captured(self) -> bool:
        """Whether any mode was, so that memory is kept for it."""
        return bool(self._captured)

    def fits(self, cu_seqlens: Tensor, looping: bool) -> bool:
        """Whether the mode was captured, with room for so many segments."""
        return looping in self._captured and len(cu_seqlens) <= len(self._inputs[2])

    def capture(self, ids: Tensor, targets: Tensor, cu_seqlens: Tensor, looping: bool) -> None:
        """Records the mode on this batch (on the device). Nothing is computed yet. Where the batch has more segments
        than there is room for, room is made, and the modes recorded before are forgotten.

        No other thread may launch anything meanwhile, and nobody may hold a loss of an earlier step with its graph: its
        nodes for the parameters belong to the stream of that step, and would draw it into the capture.
        """
        if not self._inputs or len(cu_seqlens) > len(self._inputs[2]):
            self._make_room(ids, targets, cu_seqlens)
        self._fill(ids, targets, cu_seqlens)
        graph = torch.cuda.CUDAGraph()
        # thread_local: a loader's thread may pin memory meanwhile, which is an error for every other mode.
        with without_garbage(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = self._forward(*self._inputs, looping)
            # Not backward(), which would put gradients that the caller owns into .grad.
            gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        self._captured[looping] = Captured(graph, loss.detach(), gradients)

    def _make_room(self, ids: Tensor, targets: Tensor, cu_seqlens: Tensor) -> None:
        self._captured.clear()  # they read the inputs that there were
        self._pool = torch.cuda.graph_pool_handle()  # one without a graph cannot be used again
        segments = -(-int(ROOM * (len(cu_seqlens) - 1)) // STEP) * STEP
        self._inputs = [ids.clone(), targets.clone(), cu_seqlens.new_empty(segments + 1)]

    def replay(self, ids: Tensor, targets: Tensor, cu_seqlens: Tensor, looping: bool) -> Tensor:
        """The loss, a copy; the gradients are left in `.grad`. The inputs may lie on the CPU."""
        self._fill(ids, targets, cu_seqlens)
        captured = self._captured[looping]
        captured.graph.replay()
        for p, gradient in zip(self._parameters, captured.gradients, strict=True):
            p.grad = gradient
        return captured.loss.clone()

    def _fill(self, ids: Tensor, targets: Tensor, cu_seqlens: Tensor) -> None:
        for static, given in zip(self._inputs[:2], (ids, targets), strict=True):
            static.copy_(given, non_blocking=True)
        n, segments = len(cu_seqlens), self._inputs[2]
        segments[:n].copy_(cu_seqlens, non_blocking=True)
        segments[n:].fill_(len(self._inputs[0]))


@contextmanager
def without_garbage():
    """The collector may free another graph or stream in the middle of a capture, which breaks it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
