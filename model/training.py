"""One rank's training: the step, the warm-up that leaves no trace, and the loop inside the clock."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from niblick.model.config import ConfigError, Preset
from niblick.model.cuda_graph import GraphedMicroStep
from niblick.model.errors import TrainingStopped
from niblick.model.gpt import GPT
from niblick.model.memory import micro_step_that_fits
from niblick.model.optim import EMA, Optimizers
from niblick.model.rehearsal import alongside
from niblick.model.schedule import Clock, lr_factor, momentum, progress

REHEARSAL_SEGMENTS = 4
"""A kernel is compiled for dtypes, widths and whether counts are multiples of 16; so few tokens stand for all."""


class Batch(Protocol):
    """What a loader yields: ids, targets (N,) int64 and cu_seqlens int32 on the CPU, and the position after it."""

    ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    cursor: dict


@dataclass
class Position:
    """Where a run stands: optimizer steps done, seconds on the clock, the loader's cursor after the last batch."""

    step: int = 0
    elapsed_s: float = 0.0
    cursor: dict | None = None


class Trainer:
    """Model, optimizers and average of one rank. `device` and `world_size` are facts of the launch."""

    def __init__(self, model: GPT, preset: Preset, device: torch.device, world_size: int, compile: bool) -> None:
        self.model, self.preset = model, preset
        self.device, self.world_size = device, world_size
        self.rank = dist.get_rank() if world_size > 1 else 0
        self.accumulation = preset.batch.accumulation(world_size)
        if compile and not preset.schedule.warmup_steps:
            raise ConfigError(
                "schedule.warmup_steps must be at least 1 with run.compile: nothing compiles on the clock"
            )
        self.optimizers = Optimizers(model, preset.optim, self.rank, world_size)
        self.ema = EMA(model, preset.optim.ema_decay)
        options = _compiler_options(preset.run.deterministic)
        self.forward = torch.compile(model, fullgraph=True, options=options) if compile else model
        self.parameters = list(model.parameters())
        graphs = compile and device.type == "cuda" and preset.run.cuda_graphs
        self.graphed = GraphedMicroStep(self.forward, self.parameters) if graphs else None

    # ---- one step ------------------------------------------------------------------------------------------------

    def step(self, batches: Iterator[Batch], *, factor: float, momentum: float, looping: bool) -> tuple[Tensor, dict]:
        """Micro-steps, optimizers, average. Returns this rank's mean loss (on the device) and the loader's cursor."""
        loss, cursor = self._gradients(batches, looping)
        self.optimizers.step(factor, momentum)
        self._clear_gradients()
        self.ema.update(self.model)
        return loss, cursor

    def _gradients(self, batches: Iterator[Batch], looping: bool) -> tuple[Tensor, dict]:
        """The mean over micro-steps of (clipped) gradients, left in `.grad`.

        Clipping each micro-step before averaging makes one GPU with accumulation equal to as many ranks without.
        """
        losses, total = [], None
        for _ in range(self.accumulation):
            batch = next(batches)
            losses.append(self._forward_backward(batch, looping))
            if self.preset.optim.clip == "micro":
                torch.nn.utils.clip_grad_norm_(self.parameters, self.preset.optim.grad_clip)
            if self.accumulation == 1:
                break
            gradients = [p.grad for p in self.parameters]
            self._clear_gradients()
            if total is None:  # a graph fills the same tensors again
                total = [g.clone() for g in gradients] if self.graphed else gradients
            else:
                torch._foreach_add_(total, gradients)
        if total is not None:
            torch._foreach_div_(total, self.accumulation)
            for p, gradient in zip(self.parameters, total, strict=True):
                p.grad = gradient
        return torch.stack(losses).mean(), batch.cursor

    def _forward_backward(self, batch: Batch, looping: bool) -> Tensor:
        """The loss; the gradients are left in `.grad`."""
        if self.graphed and self.graphed.fits(batch.cu_seqlens, looping):
            return self.graphed.replay(batch.ids, batch.targets, batch.cu_seqlens, looping)
        try:
            return self._launched(batch, looping)
        except torch.OutOfMemoryError:
            if not (self.graphed and self.graphed.captured):
                raise
        self._clear_gradients()  # on here, where the error no longer holds the tensors of the micro-step
        self._give_up_graphs()
        return self._launched(batch, looping)

    def _launched(self, batch: Batch, looping: bool) -> Tensor:
        loss = self._micro_step(batch, looping)
        loss.backward()
        return loss.detach()

    def _give_up_graphs(self) -> None:
        """They keep the memory of a micro-step for themselves, and the step goes on without."""
        self.graphed = None
        warnings.warn("no memory for a CUDA graph beside the step: training launches every kernel", stacklevel=2)

    def _micro_step(self, batch: Batch, looping: bool) -> Tensor:
        ids, targets, cu_seqlens = (
            x.to(self.device, non_blocking=True) for x in (batch.ids, batch.targets, batch.cu_seqlens)
        )
        # Its length varies with the number of documents; one graph must serve all lengths.
        torch._dynamo.mark_dynamic(cu_seqlens, 0)
        return self.forward(ids, targets, cu_seqlens, looping)

    def _clear_gradients(self) -> None:
        for p in self.parameters:
            p.grad = None

    # ---- before the clock ------------------------------------------------------------------------------------------

    def loop_modes(self) -> tuple[bool, ...]:
        return (False, True) if self.preset.model.loop_extra_passes else (False,)

    def warm_up(self, batches: Iterator[Batch]) -> None:
        """Full steps in every loop mode, so that nothing compiles inside the clock; then everything is put back.

        Put back are weights, average and all optimizer state, Muon's momentum included (the published multi-GPU
        scripts forget the latter and start with momentum from the warm-up). The caller discards `batches`.
        ConfigError for a step that does not fit into the GPU's memory, or cannot be deterministic.
        """
        before = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        first = next(batches)
        batches = chain([first], batches)
        with alongside(self._rehearsals(first)):
            for looping in self.loop_modes():
                for step in range(self.preset.schedule.warmup_steps):
                    self._warm_up_step(batches, first, momentum(step, self.preset.optim), looping)
        for looping in self.loop_modes():
            self._capture(first, looping)
        self.load_state_dict(before)

    def _capture(self, batch: Batch, looping: bool) -> None:
        if not self.graphed:
            return
        try:
            self.graphed.capture(*(x.to(self.device) for x in (batch.ids, batch.targets, batch.cu_seqlens)), looping)
        except torch.OutOfMemoryError:
            self._give_up_graphs()

    def _warm_up_step(self, batches: Iterator[Batch], first: Batch, momentum: float, looping: bool) -> None:
        try:
            self.step(batches, factor=1.0, momentum=momentum, looping=looping)
            return
        except torch.OutOfMemoryError:
            pass  # and on below, where the error no longer holds the tensors of the step
        except RuntimeError as error:
            if "does not have a deterministic implementation" not in str(error):
                raise
            raise ConfigError(f"run.deterministic: {str(error).split(',')[0]}") from error
        self._clear_gradients()

        def run(tokens: int) -> None:
            self._micro_step(_cut(first, tokens), looping).backward()
            self._clear_gradients()

        raise ConfigError(micro_step_that_fits(self.preset, self.world_size, run, self.device))

    def _rehearsals(self, batch: Batch) -> list[Callable[[], object]]:
        """What launches each Triton and flash kernel once while Inductor compiles; nothing where nothing compiles."""
        if self.forward is self.model or self.device.type != "cuda":
            return []
        return [lambda: self._rehearse_model(batch), *self.optimizers.muon.rehearsals()]

    def _rehearse_model(self, batch: Batch) -> None:
        """Forward and backward without Inductor on a few segments. On a copy: training changes the weights meanwhile.

        With the loop off, as the loop adds no kernel.
        """
        model = copy.deepcopy(self.model)
        part = _cut(batch, min(len(batch.ids), REHEARSAL_SEGMENTS * self.preset.model.max_segment))
        loss = model(*(x.to(self.device) for x in (part.ids, part.targets, part.cu_seqlens)), False)
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, average and optimizer state under flat names, the same whatever the number of ranks.

        Every rank must call it. On one rank these are the tensors themselves, not copies.
        """
        return (
            {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
            | {f"ema.{name}": tensor for name, tensor in self.ema.average.items()}
            | {f"optimizer.{name}": tensor for name, tensor in self.optimizers.state_dict().items()}
        )

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """What `state_dict` gave, on this number of ranks or another."""
        for name, p in self.model.named_parameters():
            p.copy_(tensors[f"model.{name}"])
        for name, tensor in self.ema.average.items():
            tensor.copy_(tensors[f"ema.{name}"])
        prefix = "optimizer."
        self.optimizers.load_state_dict(
            {name.removeprefix(prefix): t.to(self.device) for name, t in tensors.items() if name.startswith(prefix)}
        )


def _cut(batch: Batch, tokens: int) -> Batch:
    """The batch's first tokens; segments beyond them become empty."""
    return replace(
        batch, ids=batch.ids[:tokens], targets=batch.targets[:tokens], cu_seqlens=batch.cu_seqlens.clamp(max=tokens)
    )


def _compiler_options(deterministic: bool) -> dict[str, object]:
    """Without Inductor's mixed-order reductions: torch 2.11 stops in an assertion (FusedMixOrderReductions) where they
    meet opaque ops, and where it compiles, PR #1420 of the challenge measured 6 ms a step lost to them.
    `deterministic`: no choice among kernels by timing them."""
    wanted = {"triton.mix_order_reduction": False} | ({"deterministic": True} if deterministic else {})
    return {name: value for name, value in wanted.items() if name in torch._inductor.list_options()}


def train(
    trainer: Trainer, batches: Iterator[Batch], clock: Clock, position: Position, on_step: Callable[[Position], None]
) -> Position:
    """Steps until the clock or the step count runs out: a step starts if all before it end inside the budget.

    TrainingStopped for a recompilation inside the clock, and without memory for a step. `on_step` is called after every
    step, on the clock.
    """
    schedule, optim = trainer.preset.schedule, trainer.preset.optim
    limit_s, start = schedule.budget_s - schedule.reserve_s, position.step
    clock.start()
    with _what_stops_it(position):
        while clock.ahead_s < limit_s and position.step < schedule.max_steps:
            fraction = _progress(trainer.preset, position, clock)
            loss, position.cursor = trainer.step(
                batches,
                factor=lr_factor(fraction, schedule),
                momentum=momentum(position.step, optim),
                looping=len(trainer.loop_modes()) > 1 and fraction >= schedule.loop_at,
            )
            position.step += 1
            clock.tick(position.step, loss)
            if position.step == start + 1:
                clock.drain()  # from here on the clock knows what a step takes
            if position.step == 1:
                _require_room_for_a_step(clock.elapsed_s, limit_s)
            position.elapsed_s = clock.elapsed_s
            on_step(position)
        clock.drain()
    position.elapsed_s = clock.elapsed_s
    trainer.graphed = None  # the memory of the graphs is for what follows
    return position


def _progress(preset: Preset, position: Position, clock: Clock) -> float:
    if preset.run.deterministic:  # no two runs take the same time
        return position.step / preset.schedule.max_steps
    return progress(clock.ahead_s, preset.schedule)


@contextmanager
def _what_stops_it(position: Position) -> Iterator[None]:
    with torch._dynamo.config.patch(error_on_recompile=True):
        try:
            yield
        except torch._dynamo.exc.RecompileError as error:
            reason = " ".join(str(error).split())
            raise TrainingStopped(f"step {position.step + 1} would compile inside the clock ({reason})") from error
        except torch.OutOfMemoryError as error:
            reason = str(error).split("\n")[0]
            raise TrainingStopped(f"step {position.step + 1} ran out of GPU memory ({reason})") from error


def _require_room_for_a_step(took_s: float, limit_s: float) -> None:
    if took_s > limit_s:
        raise ConfigError(
            f"schedule.budget_s less reserve_s must hold at least one step: expected more than the "
            f"{took_s:.2f} s that the first step took, got {limit_s:.2f} s"
        )
