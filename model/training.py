"""One rank's training: the step, the warm-up that leaves no trace, and the loop inside the clock."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from niblick.model.config import ConfigError, Preset
from niblick.model.gpt import GPT
from niblick.model.optim import EMA, Optimizers, average_gradients
from niblick.model.schedule import Clock, lr_factor, momentum, progress


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
        self.accumulation = preset.batch.accumulation(world_size)
        if compile and not preset.schedule.warmup_steps:
            raise ConfigError(
                "schedule.warmup_steps must be at least 1 with run.compile: nothing compiles on the clock"
            )
        self.optimizers = Optimizers(model, preset.optim)
        self.ema = EMA(model, preset.optim.ema_decay)
        self.forward = torch.compile(model, fullgraph=True, options=_compiler_options()) if compile else model
        self.parameters = list(model.parameters())

    # ---- one step ------------------------------------------------------------------------------------------------

    def step(self, batches: Iterator[Batch], *, factor: float, momentum: float, looping: bool) -> tuple[Tensor, dict]:
        """Micro-steps, clip, reduction, optimizers, average. Returns the mean loss (on the device) and the cursor."""
        loss, cursor = self._gradients(batches, looping)
        optim = self.preset.optim
        in_bf16 = optim.clip == "micro" and self.device.type == "cuda"
        average_gradients(self.parameters, self.world_size, in_bf16)
        if optim.clip == "global":
            torch.nn.utils.clip_grad_norm_(self.parameters, optim.grad_clip)
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
            loss = self._micro_step(batch, looping)
            loss.backward()
            losses.append(loss.detach())
            if self.preset.optim.clip == "micro":
                torch.nn.utils.clip_grad_norm_(self.parameters, self.preset.optim.grad_clip)
            if self.accumulation == 1:
                break
            gradients = [p.grad for p in self.parameters]
            self._clear_gradients()
            if total is None:
                total = gradients
            else:
                torch._foreach_add_(total, gradients)
        if total is not None:
            torch._foreach_div_(total, self.accumulation)
            for p, gradient in zip(self.parameters, total, strict=True):
                p.grad = gradient
        return torch.stack(losses).mean(), batch.cursor

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
        """
        before = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        for looping in self.loop_modes():
            for step in range(self.preset.schedule.warmup_steps):
                self.step(batches, factor=1.0, momentum=momentum(step, self.preset.optim), looping=looping)
        self.load_state_dict(before)

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, average and optimizer state under flat names (the tensors themselves, not copies)."""
        return (
            {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
            | {f"ema.{name}": tensor for name, tensor in self.ema.average.items()}
            | {f"optimizer.{name}": tensor for name, tensor in self.optimizers.state_dict().items()}
        )

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(tensors[f"model.{name}"])
        for name, tensor in self.ema.average.items():
            tensor.copy_(tensors[f"ema.{name}"])
        prefix = "optimizer."
        self.optimizers.load_state_dict(
            {name.removeprefix(prefix): t.to(self.device) for name, t in tensors.items() if name.startswith(prefix)}
        )


def _compiler_options() -> dict[str, object]:
    """Without Inductor's mixed-order reductions: torch 2.11 stops in an assertion (FusedMixOrderReductions) where they
    meet opaque ops, and where it compiles, PR #1420 of the challenge measured 6 ms a step lost to them."""
    name = "triton.mix_order_reduction"
    return {name: False} if name in torch._inductor.list_options() else {}


def train(
    trainer: Trainer, batches: Iterator[Batch], clock: Clock, position: Position, on_step: Callable[[Position], None]
) -> Position:
    """Steps until the clock or the step count runs out: a step starts if all before it end inside the budget.

    A recompilation inside the clock is an error. `on_step` is called after every step, on the clock.
    """
    schedule, optim = trainer.preset.schedule, trainer.preset.optim
    limit_s, start = schedule.budget_s - schedule.reserve_s, position.step
    batches = chain([next(batches)], batches)  # a resumed loader finds its place before the clock starts
    clock.start()
    with torch._dynamo.config.patch(error_on_recompile=True):
        while clock.ahead_s < limit_s and position.step < schedule.max_steps:
            fraction = progress(clock.ahead_s, schedule)
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
    return position


def _require_room_for_a_step(took_s: float, limit_s: float) -> None:
    if took_s > limit_s:
        raise ConfigError(
            f"schedule.budget_s less reserve_s must hold at least one step: expected more than the "
            f"{took_s:.2f} s that the first step took, got {limit_s:.2f} s"
        )
