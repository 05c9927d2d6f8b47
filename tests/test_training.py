"""The step, the warm-up, checkpoints and the loop, on a tiny model on the CPU."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_close_f32
from test_optim import SMALL

from niblick.data.loaders import DocumentLoader
from niblick.data.shards import write_shard
from niblick.model.checkpoint import load_checkpoint, save_checkpoint
from niblick.model.config import BatchConfig, ConfigError, OptimConfig, Preset, ScheduleConfig
from niblick.model.gpt import GPT
from niblick.model.schedule import Clock
from niblick.model.training import Position, Trainer, train

CPU = torch.device("cpu")


def preset(micro_steps: int = 1, **changes) -> Preset:
    base = Preset(
        model=SMALL,
        optim=OptimConfig(grad_clip=0.01),
        schedule=ScheduleConfig(budget_s=1e6, max_steps=4, loop_at=0.0, warmup_steps=2),
        batch=BatchConfig(tokens_per_step=64 * micro_steps, tokens_per_micro_step=64),
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    tokens = np.random.default_rng(0).integers(2, SMALL.vocab_size, 20_000, dtype=np.uint16)
    tokens[::37] = 1
    path = tmp_path_factory.mktemp("shards") / "small_train_000000.bin"
    write_shard(path, tokens)
    return path


def loader(shard: Path, cursor: dict | None = None, **options) -> DocumentLoader:
    return DocumentLoader([shard], 64, max_document=16, cursor=cursor, **options)


def trainer(p: Preset, seed: int = 0) -> Trainer:
    return Trainer(GPT(p.model, seed=seed), p, CPU, 1, compile=False)


def run(t: Trainer, shard: Path, position: Position | None = None) -> Position:
    position = position or Position()
    with loader(shard, position.cursor) as batches:
        return train(t, batches, Clock(CPU, 1, position.elapsed_s), position, lambda _: None)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def copy(state: dict) -> dict:
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("where", ["micro", "global"])
def test_gradient_is_the_mean_of_clipped_or_the_clip_of_the_mean(shard: Path, where: str) -> None:
    p = preset(3, optim=OptimConfig(grad_clip=0.01, clip=where))
    t = trainer(p)
    with loader(shard) as batches:
        got, _ = t._gradients(batches, looping=True)
    gradients = {name: q.grad for name, q in t.model.named_parameters()}
    want = {name: torch.zeros_like(g) for name, g in gradients.items()}
    losses = []
    with loader(shard) as batches:
        for _ in range(3):
            batch = next(batches)
            t.model.zero_grad()
            loss = t.model(batch.ids, batch.targets, batch.cu_seqlens, True)
            loss.backward()
            losses.append(loss.detach())
            norm = torch.cat([q.grad.reshape(-1) for q in t.parameters]).norm()
            factor = min(1.0, 0.01 / (norm.item() + 1e-6)) if where == "micro" else 1.0
            for name, q in t.model.named_parameters():
                want[name] += q.grad * factor / 3
    assert torch.equal(got, torch.stack(losses).mean())
    for name in want:
        if want[name].any():
            assert_close_f32(name, gradients[name], want[name])


def test_clip_bites_in_these_tests(shard: Path) -> None:
    t = trainer(preset())
    with loader(shard) as batches:
        t._gradients(batches, looping=True)
    norm = torch.cat([q.grad.reshape(-1) for q in t.parameters]).norm()
    assert abs(norm.item() - 0.01) < 1e-6


def test_warm_up_leaves_no_trace(shard: Path) -> None:
    t, untouched = trainer(preset()), trainer(preset())
    before = copy(t.state_dict())
    with loader(shard) as batches:
        t.warm_up(batches)
    assert equal(t.state_dict(), before), "weights, average or optimizer state differ after the warm-up"
    run(t, shard)
    run(untouched, shard)
    assert equal(t.state_dict(), untouched.state_dict()), "training after the warm-up is not training without it"


def test_warm_up_does_step(shard: Path, monkeypatch) -> None:
    t, modes = trainer(preset()), []
    step = t.step
    monkeypatch.setattr(t, "step", lambda b, **k: (modes.append(k["looping"]), step(b, **k))[1])
    with loader(shard) as batches:
        t.warm_up(batches)
    assert modes == [False, False, True, True]


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(shard: Path, tmp_path: Path) -> None:
    p = preset()
    whole = trainer(p)
    run(whole, shard)
    first = trainer(replace(p, schedule=replace(p.schedule, max_steps=2)))
    position = run(first, shard)
    save_checkpoint(tmp_path / "c", first.state_dict(), position, p)
    second = trainer(p, seed=99)
    tensors, position = load_checkpoint(tmp_path / "c", p)
    second.load_state_dict(tensors)
    assert position.step == 2 and position.elapsed_s > 0
    position = run(second, shard, position)
    assert position.step == 4
    assert equal(second.state_dict(), whole.state_dict())


def test_checkpoint_of_another_configuration_is_refused_by_field(shard: Path, tmp_path: Path) -> None:
    p = preset()
    save_checkpoint(tmp_path / "c", trainer(p).state_dict(), Position(), p)
    other = replace(p, optim=replace(p.optim, matrix_lr=0.5))
    with pytest.raises(ConfigError, match=r"optim\.matrix_lr = 0\.026: expected 0\.5"):
        load_checkpoint(tmp_path / "c", other)


@pytest.mark.parametrize("damage", ["cut", "foreign", "missing"])
def test_damaged_checkpoint_is_one_line(tmp_path: Path, damage: str) -> None:
    p, path = preset(), tmp_path / "c"
    save_checkpoint(path, trainer(p).state_dict(), Position(), p)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:5000] if damage == "cut" else b"not a checkpoint")
    with pytest.raises(ConfigError, match="expected a checkpoint") as caught:
        load_checkpoint(path, p)
    assert "\n" not in str(caught.value)


def test_a_failed_checkpoint_keeps_the_one_before(shard: Path, tmp_path: Path, monkeypatch) -> None:
    p, path = preset(), tmp_path / "c"
    save_checkpoint(path, trainer(p).state_dict(), Position(step=7), p)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"cannot write .*c: No space left on device"):
        save_checkpoint(path, trainer(p, seed=1).state_dict(), Position(step=8), p)
    monkeypatch.undo()
    assert load_checkpoint(path, p)[1].step == 7
    assert [f.name for f in tmp_path.iterdir()] == ["c"]


def test_budget_ends_the_run_and_one_too_short_for_a_step_is_refused(shard: Path) -> None:
    p = preset()
    t = trainer(replace(p, schedule=ScheduleConfig(budget_s=1.0, reserve_s=0.0)))
    position = run(t, shard)
    assert position.step > 1 and 1.0 <= position.elapsed_s < 10
    t = trainer(replace(p, schedule=ScheduleConfig(budget_s=1e-4, reserve_s=0.0)))
    with pytest.raises(ConfigError, match="at least one step"):
        run(t, shard)


def test_accumulation_must_come_out_whole() -> None:
    assert BatchConfig(786_432, 98_304).accumulation(8) == 1
    assert BatchConfig(786_432, 98_304).accumulation(2) == 4
    with pytest.raises(ConfigError, match="98304 x 3"):
        BatchConfig(786_432, 98_304).accumulation(3)


class CountingClock(Clock):
    """A second a step, whatever the machine does."""

    def tick(self, loss: torch.Tensor) -> None:
        self.elapsed_s += 1.0

    def start(self) -> None: ...

    def pause(self) -> None: ...


def test_loop_and_learning_rate_follow_the_clock(shard: Path, monkeypatch) -> None:
    schedule = ScheduleConfig(budget_s=10.0, reserve_s=2.0, loop_at=0.5, warmdown=0.5, min_lr=0.1)
    t, seen = trainer(preset(schedule=schedule)), []
    step = t.step
    monkeypatch.setattr(t, "step", lambda b, **k: (seen.append((k["looping"], k["factor"])), step(b, **k))[1])
    with loader(shard) as batches:
        train(t, batches, CountingClock(CPU, 1), Position(), lambda _: None)
    assert [mode for mode, _ in seen] == [False] * 4 + [True] * 4
    assert [factor for _, factor in seen] == [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def dense_attention(q, k, v, cu_seqlens, max_segment):
    """Traceable stand-in for the flash kernels, which a CPU does not have."""
    positions = torch.arange(q.shape[0])
    segment = torch.searchsorted(cu_seqlens, positions.int(), right=True)
    seen = (segment[:, None] == segment[None, :]) & (positions[:, None] >= positions[None, :])
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, enable_gqa=True)
    return y[0].transpose(0, 1)


@pytest.mark.parametrize("span", ["documents", "rows"])
def test_one_full_graph_a_loop_mode_serves_any_number_of_documents(shard: Path, span: str) -> None:
    torch._dynamo.reset()
    p = preset(model=replace(SMALL, attention_span=span, max_segment=16, norm_dropout_quantile=0.9))
    t = trainer(p)
    t.model.attend = dense_attention
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    t.forward = torch.compile(t.model, fullgraph=True, backend=backend)
    with loader(shard) as batches:
        first = next(batches)
    for looping in t.loop_modes():
        t._micro_step(first, looping).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for entries in (7, 23, 64):
            starts = torch.arange(0, 64, 64 // min(entries, 32), dtype=torch.int32)
            cu_seqlens = torch.cat((starts, torch.full((entries,), 64, dtype=torch.int32)))
            for looping in t.loop_modes():
                t._micro_step(replace(first, cu_seqlens=cu_seqlens), looping)
    assert len(graphs) == 2
