"""The step, the warm-up, checkpoints and the loop, on a tiny model on the CPU."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from numerics import assert_close_f32
from ranks import one_thread  # noqa: F401
from safetensors import safe_open
from safetensors.torch import save_file
from test_optim import SMALL

from niblick.data.loaders import DocumentLoader
from niblick.data.shards import write_shard
from niblick.model.checkpoint import load_checkpoint, save_checkpoint
from niblick.model.config import BatchConfig, ConfigError, OptimConfig, Preset, RunConfig, ScheduleConfig
from niblick.model.gpt import GPT
from niblick.model.schedule import Clock
from niblick.model.training import Position, Trainer, train

CPU = torch.device("cpu")


def preset(micro_steps: int = 1, **changes) -> Preset:
    base = Preset(
        model=SMALL,
        optim=OptimConfig(grad_clip=0.01, newton_schulz_impl="reference"),
        schedule=ScheduleConfig(budget_s=1e6, max_steps=4, loop_at=0.0, warmup_steps=2),
        batch=BatchConfig(tokens_per_step=64 * micro_steps, tokens_per_micro_step=64),
    )
    return replace(base, **changes)


def small_shard(folder: Path) -> Path:
    tokens = np.random.default_rng(0).integers(2, SMALL.vocab_size, 20_000, dtype=np.uint16)
    tokens[::37] = 1
    path = folder / "small_train_000000.bin"
    write_shard(path, tokens)
    return path


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    return small_shard(tmp_path_factory.mktemp("shards"))


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
    p = preset(3, optim=OptimConfig(grad_clip=0.01, clip=where, newton_schulz_impl="reference"))
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
    save_checkpoint(tmp_path / "c", first, run(first, shard))
    second = trainer(p, seed=99)
    position = load_checkpoint(tmp_path / "c", second)
    assert position.step == 2 and position.elapsed_s > 0
    position = run(second, shard, position)
    assert position.step == 4
    assert equal(second.state_dict(), whole.state_dict())


OTHERS = {
    "optim.matrix_lr": lambda p: trainer(replace(p, optim=replace(p.optim, matrix_lr=0.5))),
    "run.seed": lambda p: trainer(replace(p, run=replace(p.run, seed=7))),
    "run.precision": lambda p: Trainer(GPT(p.model, dtype=torch.float64), p, CPU, 1, compile=False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_checkpoint_of_another_run_is_refused_by_setting(tmp_path: Path, name: str) -> None:
    p = preset()
    save_checkpoint(tmp_path / "c", trainer(p), Position())
    with pytest.raises(ConfigError, match=rf"c was written with {name} = .*: expected "):
        load_checkpoint(tmp_path / "c", OTHERS[name](p))


def test_schedule_and_cache_may_change_on_resume(tmp_path: Path) -> None:
    p = preset()
    save_checkpoint(tmp_path / "c", trainer(p), Position(step=3))
    changed = replace(p, schedule=ScheduleConfig(budget_s=7.0), data=replace(p.data, cache="elsewhere"))
    assert load_checkpoint(tmp_path / "c", trainer(changed)).step == 3


@pytest.mark.parametrize("damage", ["cut", "foreign", "missing"])
def test_damaged_checkpoint_is_one_line(tmp_path: Path, damage: str) -> None:
    p, path = preset(), tmp_path / "c"
    save_checkpoint(path, trainer(p), Position())
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:5000] if damage == "cut" else b"not a checkpoint")
    with pytest.raises(ConfigError, match="expected a checkpoint") as caught:
        load_checkpoint(path, trainer(p))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.q_gain", "ema.q_gain"])
@pytest.mark.parametrize("shape", [None, (1,)])
def test_checkpoint_of_other_tensors_is_one_line(tmp_path: Path, name: str, shape: tuple[int] | None) -> None:
    """Another version may name its parameters otherwise; a shape of 1 would be broadcast without a word."""
    p, path = preset(), tmp_path / "c"
    save_checkpoint(path, trainer(p), Position())
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys() if key != name}
    save_file(tensors if shape is None else tensors | {name: torch.ones(shape)}, path, metadata)
    found = "none" if shape is None else r"\(1,\)"
    with pytest.raises(ConfigError, match=rf"c: expected {name} of shape \(4, 2\), found {found}$"):
        load_checkpoint(path, trainer(p))


def test_a_failed_checkpoint_keeps_the_one_before(shard: Path, tmp_path: Path, monkeypatch) -> None:
    p, path = preset(), tmp_path / "c"
    save_checkpoint(path, trainer(p), Position(step=7))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"cannot write .*c: No space left on device"):
        save_checkpoint(path, trainer(p, seed=1), Position(step=8))
    monkeypatch.undo()
    assert load_checkpoint(path, trainer(p)).step == 7
    assert [f.name for f in tmp_path.iterdir()] == ["c"]


def test_budget_ends_the_run_and_one_too_short_for_a_step_is_refused(shard: Path) -> None:
    p = preset()
    t = trainer(replace(p, schedule=ScheduleConfig(budget_s=1.0, reserve_s=0.0)))
    readings = []
    with loader(shard) as batches:
        position = train(t, batches, Clock(CPU, 1, on_reading=readings.append), Position(), lambda _: None)
    assert position.step > 1 and 1.0 <= position.elapsed_s < 10
    assert [r.step for r in readings] == list(range(1, position.step + 1))
    assert readings[-2].elapsed_s < 1.0 <= readings[-1].elapsed_s, "the step that was running at the end is the last"
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

    def start(self) -> None: ...

    def refresh(self, stop: bool = False) -> bool:
        self.elapsed_s += 1.0
        return stop


def test_loop_and_learning_rate_follow_the_clock(shard: Path, monkeypatch) -> None:
    schedule = ScheduleConfig(budget_s=10.0, reserve_s=2.0, loop_at=0.5, warmdown=0.5, min_lr=0.1)
    t, seen = trainer(preset(schedule=schedule)), []
    step = t.step
    monkeypatch.setattr(t, "step", lambda b, **k: (seen.append(k), step(b, **k))[1])
    with loader(shard) as batches:
        train(t, batches, CountingClock(CPU, 1), Position(), lambda _: None)
    assert [k["looping"] for k in seen] == [False] * 4 + [True] * 4
    assert [k["factor"] for k in seen] == [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert [round(k["momentum"], 9) for k in seen] == [round(0.92 + 0.05 * i / 1500, 9) for i in range(8)]


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


def test_average_takes_in_the_weights_after_the_step(shard: Path) -> None:
    t = trainer(preset(optim=OptimConfig(ema_decay=0.75, newton_schulz_impl="reference")))
    before = {name: p.detach().clone() for name, p in t.model.named_parameters()}
    with loader(shard) as batches:
        t.step(batches, factor=1.0, momentum=0.9, looping=True)
    for name, p in t.model.named_parameters():
        assert_close_f32(name, t.ema.average[name], 0.75 * before[name].double() + 0.25 * p.detach().double())
    assert not torch.equal(t.model.embedding, before["embedding"])


def test_ranks_take_the_latest_of_their_clocks(monkeypatch) -> None:
    latest = torch.tensor([1000.0, 0.0], dtype=torch.float64)
    monkeypatch.setattr("torch.distributed.new_group", lambda backend, timeout: backend)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda now, op, group: now.copy_(now.maximum(latest)))
    readings = []
    clock = Clock(CPU, 2, on_reading=readings.append)
    clock.start()
    clock.tick(1, torch.tensor(2.5))
    assert clock.elapsed_s == 1000.0 and readings == [(1, 2.5, 1000.0)]


class FakeEvent:
    """A CUDA event on a machine without CUDA: has happened when it is asked for the second time."""

    waited: ClassVar[list] = []

    def record(self) -> None: ...

    def query(self) -> bool:
        FakeEvent.waited.append(self)
        return FakeEvent.waited.count(self) == 2


def test_on_a_gpu_one_step_stays_in_flight_and_each_loss_keeps_its_number(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    empty = torch.empty
    monkeypatch.setattr("torch.empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    readings = []
    clock = Clock(torch.device("cuda"), 1, on_reading=readings.append)
    for step in (1, 2, 3):
        clock.tick(step, torch.tensor(float(step)))
        assert [r.step for r in readings] == list(range(1, step)), "the step just enqueued is not waited for"
    assert clock.ahead_s > clock.elapsed_s
    clock.drain()
    assert [(r.step, r.loss) for r in readings] == [(1, 1.0), (2, 2.0), (3, 3.0)] and len(FakeEvent.waited) == 6
    assert clock.ahead_s == clock.elapsed_s


@pytest.mark.parametrize("deterministic", [False, True])
def test_training_compiles_without_mixed_order_reductions(monkeypatch, deterministic: bool) -> None:
    """Inductor of torch 2.11 stops at them beside opaque ops. Deterministic: it does not choose by timing either."""
    seen = {}
    monkeypatch.setattr(torch, "compile", lambda model, **options: seen.update(options) or model)
    Trainer(GPT(SMALL), preset(run=RunConfig(deterministic=deterministic)), CPU, 1, compile=True)
    wanted = {"triton.mix_order_reduction": False} | ({"deterministic": True} if deterministic else {})
    known = torch._inductor.list_options()
    assert seen["fullgraph"] and seen["options"] == {name: on for name, on in wanted.items() if name in known}
