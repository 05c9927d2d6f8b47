"""Forward and backward as a CUDA graph against the same without; and that accumulation copies what a graph reuses."""

import contextlib
from dataclasses import replace
from itertools import cycle

import pytest
import torch

from niblick.data.loaders import Batch
from niblick.model.attention import choose_attention
from niblick.model.cuda_graph import GraphedMicroStep
from niblick.model.gpt import GPT
from niblick.model.presets import PRESETS
from niblick.model.training import Trainer

CPU = torch.device("cpu")


class FakeGraph:
    """Fills the same gradients at every replay, as a graph does; without one."""

    captured = True

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.static = trainer, [torch.zeros_like(p) for p in trainer.parameters]
        self.replayed = 0

    def fits(self, cu_seqlens: torch.Tensor, looping: bool) -> bool:
        return len(cu_seqlens) <= 4

    def replay(self, ids, targets, cu_seqlens, looping) -> torch.Tensor:
        self.replayed += 1
        loss = self.trainer.model(ids, targets, cu_seqlens, looping)
        for p, static, gradient in zip(
            self.trainer.parameters, self.static, torch.autograd.grad(loss, self.trainer.parameters), strict=True
        ):
            p.grad = static.copy_(gradient)
        return loss.detach()


def batches(n: int = 64) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(4):
        ids = torch.randint(2, 64, (n + 1,), generator=generator)
        cu_seqlens = torch.tensor([0, n // 3, n, n], dtype=torch.int32)
        made.append(Batch(ids[:-1].clone(), ids[1:].clone(), cu_seqlens, {}))
    return made


def make_trainer(device: torch.device, dtype: torch.dtype, accumulation: int = 1, **run) -> Trainer:
    demo = PRESETS["demo"]
    model = replace(demo.model, vocab_size=64, num_layers=6, loop_start=1, loop_end=1, parallel_start=4)
    model = replace(model, model_dim=128, num_heads=2, num_kv_heads=1, mlp_hidden=128, rope_dims=16, max_segment=32)
    preset = replace(
        demo,
        model=model,
        batch=replace(demo.batch, tokens_per_step=64 * accumulation, tokens_per_micro_step=64),
        run=replace(demo.run, **run),
    )
    gpt = GPT(model, dtype=dtype).to(device)
    gpt.attend = choose_attention("auto", device, dtype)[1]
    return Trainer(gpt, preset, device, 1, compile=device.type == "cuda")


def gradients(trainer: Trainer, source: list[Batch], looping: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss, _ = trainer._gradients(iter(source), looping)
    found = [p.grad.clone() for p in trainer.parameters]
    trainer._clear_gradients()
    return loss, found


@pytest.mark.parametrize("accumulation", [1, 3])
def test_replayed_micro_steps_give_the_same_gradients(accumulation: int) -> None:
    trainer = make_trainer(CPU, torch.float64, accumulation)
    loss, plain = gradients(trainer, batches(), True)
    trainer.graphed = FakeGraph(trainer)
    again, replayed = gradients(trainer, batches(), True)
    assert trainer.graphed.replayed == accumulation and torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))


def test_more_segments_than_a_graph_holds_are_launched() -> None:
    trainer = make_trainer(CPU, torch.float64)
    trainer.graphed = FakeGraph(trainer)
    source = batches()
    source[0] = replace(source[0], cu_seqlens=torch.tensor([0, 9, 30, 64, 64, 64], dtype=torch.int32))
    gradients(trainer, source, False)
    assert trainer.graphed.replayed == 0


def test_graphs_make_room_for_a_micro_step_that_none_of_them_fits(monkeypatch) -> None:
    """Graphs keep the memory of a whole micro-step; one that is launched needs as much again."""
    trainer = make_trainer(CPU, torch.float64, 3)
    source = batches()
    source[1] = replace(source[1], cu_seqlens=torch.tensor([0, 9, 30, 64, 64, 64], dtype=torch.int32))
    loss, plain = gradients(trainer, source, True)
    trainer.graphed = FakeGraph(trainer)
    forward = trainer.forward

    def lack(*words) -> torch.Tensor:
        if trainer.graphed:
            raise torch.OutOfMemoryError
        return forward(*words)

    monkeypatch.setattr(trainer, "forward", lack)
    with pytest.warns(UserWarning, match="no memory for a CUDA graph beside the step"):
        again, found = gradients(trainer, source, True)
    assert trainer.graphed is None and torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_a_cpu_has_no_graphs() -> None:
    assert make_trainer(CPU, torch.float32).graphed is None


def with_segments(batch: Batch, n: int) -> Batch:
    """The same, and empty segments at its end."""
    whole = batch.cu_seqlens[-1]
    return replace(batch, cu_seqlens=torch.cat([batch.cu_seqlens, whole.expand(n + 1 - len(batch.cu_seqlens))]))


def captures(step: GraphedMicroStep, batch: Batch, looping: bool, device: torch.device = CPU) -> None:
    step.capture(*(x.to(device) for x in (batch.ids, batch.targets, batch.cu_seqlens)), looping)


def test_a_capture_makes_room_for_more_segments(monkeypatch) -> None:
    """A graph of before would read the inputs of before."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    trainer, few = make_trainer(CPU, torch.float64), batches()[0]
    step, many = GraphedMicroStep(trainer.forward, trainer.parameters), with_segments(few, 70)
    captures(step, few, False)
    captures(step, few, True)
    assert step.fits(few.cu_seqlens, False) and step.fits(few.cu_seqlens, True)
    assert not step.fits(many.cu_seqlens, True)
    captures(step, many, True)
    assert step.fits(many.cu_seqlens, True) and step.fits(few.cu_seqlens, True)
    assert not step.fits(few.cu_seqlens, False)


@pytest.mark.gpu
def test_a_later_capture_gives_the_same_bits() -> None:
    device, few = torch.device("cuda"), batches()[0]
    trainer, many = make_trainer(device, torch.bfloat16), with_segments(few, 70)
    graph, trainer.graphed = trainer.graphed, None
    gradients(trainer, [many], True)
    loss, plain = gradients(trainer, [many], True)
    for batch in (few, many):
        captures(graph, batch, True, device)
    trainer.graphed = graph
    for batch in (many, few):
        again, replayed = gradients(trainer, [batch], True)
        assert torch.equal(loss, again)
        assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_graph_gives_the_same_bits(accumulation: int) -> None:
    device = torch.device("cuda")
    source = batches()
    trainer = make_trainer(device, torch.bfloat16, accumulation)
    assert make_trainer(device, torch.bfloat16, cuda_graphs=False).graphed is None
    for looping in (False, True):
        graph, trainer.graphed = trainer.graphed, None
        gradients(trainer, source, looping)
        loss, plain = gradients(trainer, source[1:], looping)
        trainer.graphed = graph
        trainer._capture(source[0], looping)  # on another batch than it is replayed with
        for _ in range(2):
            again, replayed = gradients(trainer, source[1:], looping)
            assert torch.equal(loss, again)
            assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))


@pytest.mark.gpu
def test_warm_up_captures_every_mode_and_training_replays() -> None:
    trainer = make_trainer(torch.device("cuda"), torch.bfloat16)
    trainer.warm_up(cycle(batches()))
    assert all(trainer.graphed.fits(batches()[0].cu_seqlens, looping) for looping in (False, True))
    assert not trainer.graphed.fits(torch.zeros(1000, dtype=torch.int32), True)
