"""One chunk of many documents on the device: scores, and the gradients of their adapters from the same forward.

Documents are rows of one width in one flat stream, attention cut at each row. Head and loss see the columns of the
chunk only. The whole stream of tokens lies on the device, so a step is told no more than five numbers a row; everything
else, ids included, is gathered inside. On a GPU a step is one CUDA graph for each number of rows and width: without, it
would wait for the host, which takes longer to launch 48 columns of 64 documents than they take to compute. Nothing is
compiled for a shape, so a new width costs one launched step and one capture.
"""

import gc
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from niblick.evaluation.documents import Chunk
from niblick.evaluation.hints import Hints
from niblick.evaluation.lora import LoRA
from niblick.kernels.ngram_tilt import ngram_tilt
from niblick.kernels.softcapped_ce import softcapped_ce, softcapped_ce_ref
from niblick.model.cuda_graph import without_garbage
from niblick.model.gpt import GPT

LAUNCH_TOKENS = 4096
"""What a step costs besides its tokens, in tokens."""
OFTEN = 8
"""Times that a shape makes do with the graph of a larger one, up to twice its cost, before it gets its own."""


class Shape(NamedTuple):
    """rows of `width` tokens, of each of which `chunk` columns are looked at; steps: with gradients; adapted: with the
    adapters."""

    rows: int
    width: int
    chunk: int
    steps: bool
    adapted: bool = True

    @property
    def cost(self) -> int:
        """In tokens, steps or not."""
        return self.rows * self.width + LAUNCH_TOKENS

    def serves(self, other: "Shape") -> bool:
        """Whether a step of this shape can do what one of the other does: rows and columns more are padding, and
        gradients that nobody asked for are left alone."""
        same = self.chunk == other.chunk and self.adapted == other.adapted
        return same and all(a >= b for a, b in zip(self, other, strict=True))


class Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    plan: Tensor
    losses: Tensor


class Fetched:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        self._host = tensor.detach()
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> np.ndarray:
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


class ChunkStep:
    """tokens (N,): the stream. The adapters' gradients are left in `lora.gradients`."""

    def __init__(self, model: GPT, lora: LoRA, n_tokens: int, *, hints: bool = False) -> None:
        self.model, self.lora = model, lora
        self.device = model.embedding.device
        generator = torch.Generator(self.device).manual_seed(0)
        ids = {"dtype": torch.int32, "device": self.device}
        # For the warm-up: it never sees the stream.
        self.tokens = torch.randint(model.config.vocab_size, (n_tokens,), generator=generator, **ids)
        self.hints = (torch.full((n_tokens,), -1, **ids), torch.zeros(n_tokens, device=self.device)) if hints else ()
        self._anchor = torch.zeros((), device=self.device, requires_grad=True)
        self._graphs = self.device.type == "cuda"
        self._captured: dict[Shape, Captured] = {}
        self._met: Counter[Shape] = Counter()
        self._pool = torch.cuda.graph_pool_handle() if self._graphs else None

    def load(self, tokens: np.ndarray, hints: Hints | None = None) -> None:
        """The stream, into the memory that the graphs read."""
        given = (tokens.astype(np.int32), *((hints.tokens, hints.betas) if hints else ()))
        for into, values in zip((self.tokens, *self.hints), given, strict=True):
            into.copy_(torch.from_numpy(np.ascontiguousarray(values)))

    def warm_up(self, shapes: list[Shape]) -> None:
        """Launches and captures them, on random ids. The adapters' gradients are left in disorder."""
        for shape in shapes:
            self.rehearse(shape)
        if not self._graphs:
            return
        gc.freeze()  # each capture collects garbage, and would look through all that there is
        for shape in shapes:
            self._capture(shape)
        gc.unfreeze()
        torch.cuda.empty_cache()  # the graphs have memory of their own

    def rehearse(self, shape: Shape) -> None:
        """One step on random ids."""
        whole = torch.full((shape.rows,), shape.width)
        scored = whole - shape.chunk
        plan = torch.stack([torch.zeros_like(whole), whole, scored, scored, torch.ones_like(whole)])
        self._launch(plan.to(self.device), shape)

    def __call__(self, chunk: Chunk, shape: Shape) -> Fetched:
        """Losses (rows, chunk), of which those of the last rows mean something; rows before are padding."""
        self._met[shape] += 1
        best = self._captured_for(shape)
        plan = self._plan(chunk, (best or shape).rows)
        if best:
            captured = self._captured[best]
            captured.plan.copy_(plan, non_blocking=True)
            captured.graph.replay()
            return Fetched(captured.losses)
        losses = Fetched(self._launch(plan.to(self.device, non_blocking=True), shape))
        if self._graphs and shape.adapted:  # without is rare
            self._capture(shape)  # its kernels are compiled now
        return losses

    def _plan(self, chunk: Chunk, rows: int) -> Tensor:
        plan = np.zeros((len(chunk), rows), np.int64)
        plan[:, rows - len(chunk.start) :] = chunk
        plan = torch.from_numpy(plan)
        return plan.pin_memory() if self.device.type == "cuda" else plan

    def _captured_for(self, shape: Shape) -> Shape | None:
        if shape in self._captured:
            return shape
        best = min((s for s in self._captured if s.serves(shape)), key=lambda s: s.cost, default=None)
        fits = best is not None and best.cost <= 2 * shape.cost and self._met[shape] <= OFTEN
        return best if fits else None

    def _capture(self, shape: Shape) -> None:
        plan = torch.zeros(5, shape.rows, dtype=torch.int64, device=self.device)
        graph = torch.cuda.CUDAGraph()
        with without_garbage(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            losses = self._launch(plan, shape)
        self._captured[shape] = Captured(graph, plan, losses)

    def _launch(self, plan: Tensor, shape: Shape) -> Tensor:
        """By documents that fit into a forward together."""
        n_groups = -(-shape.rows * shape.width // self.lora.config.tokens_per_forward)
        size = -(-shape.rows // n_groups)
        firsts = range(0, shape.rows, size)
        return torch.cat([self._group(plan[:, first : first + size], shape, shape.rows - first) for first in firsts])

    def _group(self, plan: Tensor, shape: Shape, last: int) -> Tensor:
        """Rows that begin `last` rows from the end: their losses (rows, chunk), float32."""
        start, length, first, scored, steps = plan[:, :, None]  # (rows, 1) each
        n, width = plan.shape[1], shape.width
        columns = torch.arange(width, device=self.device)
        ids = torch.where(columns < length, self._at(self.tokens, start + columns), 0).to(torch.int64)
        columns = first + torch.arange(shape.chunk, device=self.device)
        scored = (columns >= scored) & (columns < length)
        row_starts = width * torch.arange(n + 1, device=self.device)
        view = self.lora.view(last, n, self._anchor) if shape.adapted else None
        with torch.set_grad_enabled(shape.steps):
            hidden = self.model.hidden(
                ids.view(-1),
                row_starts.to(torch.int32),
                row_starts=row_starts[:-1],
                max_segment=width,
                wanted=row_starts[:-1, None] + columns if shape.chunk < width else None,
                adapter=view,
            )
            logits = (view or self.model).head(hidden)
            targets = torch.where(scored, self._at(self.tokens, start + columns + 1), 0).to(torch.int64).view(-1)
            losses = self._cross_entropy(logits, targets).view(n, -1)
            if shape.steps:
                weights = scored * steps / shape.chunk
                torch.autograd.grad((losses * weights).sum(), self._anchor, allow_unused=True)
        if not self.hints:
            return losses.detach()
        hint = [self._at(x, start + columns + 1).view(-1) for x in self.hints]
        return self._tilted(logits.detach(), targets, *hint).view(n, -1)

    def _at(self, values: Tensor, positions: Tensor) -> Tensor:
        return values[positions.clamp(0, len(values) - 1)]

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        ce = softcapped_ce_ref if self.model.config.loss_impl == "reference" else softcapped_ce
        return ce(logits, targets, *self.model.softcaps, reduction="none")

    def _tilted(self, logits: Tensor, targets: Tensor, hints: Tensor, betas: Tensor) -> Tensor:
        return ngram_tilt(logits, targets, hints.to(torch.int64), betas, self.model.config.softcap)
