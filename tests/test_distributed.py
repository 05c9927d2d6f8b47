"""Several ranks against one: sharded Muon, clips, checkpoints between numbers of ranks, and what ends a run."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_close_f32
from ranks import one_thread, run_ranks  # noqa: F401
from test_optim import SMALL
from test_training import small_shard

from niblick.data.loaders import DocumentLoader, StreamLoader
from niblick.model.checkpoint import load_checkpoint, save_checkpoint
from niblick.model.config import BatchConfig, ConfigError, OptimConfig, Preset, RunConfig, ScheduleConfig
from niblick.model.distributed import ShardedBank, require_agreement
from niblick.model.errors import TrainingStopped
from niblick.model.gpt import GPT
from niblick.model.run import run_clock
from niblick.model.schedule import Clock
from niblick.model.training import Position, Trainer, train

CPU = torch.device("cpu")
MICRO_STEPS, STEPS = 4, 3
PRESET = Preset(
    model=SMALL,
    optim=OptimConfig(grad_clip=0.01, newton_schulz_impl="reference", normuon="adaptive"),
    schedule=ScheduleConfig(budget_s=1e6, max_steps=STEPS, loop_at=0.0, min_lr=1.0),
    batch=BatchConfig(tokens_per_step=64 * MICRO_STEPS, tokens_per_micro_step=64),
)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    return small_shard(tmp_path_factory.mktemp("shards"))


def open_loader(preset: Preset, shard: Path, rank: int, world_size: int, cursor: dict | None):
    options = dict(rank=rank, world_size=world_size, cursor=cursor)
    if preset.data.loader == "stream":
        return StreamLoader([shard], 64, sequence_length=16, **options)
    return DocumentLoader([shard], 64, max_document=16, **options)


def trained(
    rank: int, world_size: int, preset: Preset, shard: Path, resume: Path | None = None, save: Path | None = None
) -> dict[str, torch.Tensor]:
    """The state after training on this rank."""
    trainer = Trainer(GPT(preset.model), preset, CPU, world_size, compile=False)
    position = load_checkpoint(resume, trainer) if resume else Position()
    with open_loader(preset, shard, rank, world_size, position.cursor) as batches:
        clock = Clock(CPU, world_size, position.elapsed_s)
        position = train(trainer, batches, clock, position, lambda _: None)
    if save:
        save_checkpoint(save / str(rank), trainer, position)
    return {name: tensor.clone() for name, tensor in trainer.state_dict().items()}


def assert_same_training(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert_close_f32(name, got[name], want[name])


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("clip", ["micro", "global"])
def test_ranks_equal_one_that_accumulates(shard: Path, clip: str, world_size: int) -> None:
    preset = replace(PRESET, optim=replace(PRESET.optim, clip=clip))
    alone = trained(0, 1, preset, shard)
    together = run_ranks(trained, world_size, world_size, preset, shard)
    assert any(name.endswith("mlp_up_bank.second_moment") for name in alone)
    for state in together:
        assert_same_training(state, alone)
        for name in alone:
            assert torch.equal(state[name], together[0][name]), f"{name} differs between ranks"


def test_the_clips_differ_and_bite(shard: Path) -> None:
    """Else the test above would hold with no clip at all."""
    states = [
        trained(0, 1, replace(PRESET, optim=replace(PRESET.optim, clip=clip, grad_clip=limit)), shard)
        for clip, limit in (("micro", 0.01), ("global", 0.01), ("micro", 1e9))
    ]
    name = "optimizer.muon.kv_bank.momentum"
    a, b, c = (state[name].norm().item() for state in states)
    assert a < 0.9 * b < 0.5 * c


def test_a_rank_holds_its_share_of_the_momentum_alone() -> None:
    sizes = [run_ranks(_shapes, 3, 3)[rank] for rank in range(3)]
    # 4 layers: 8 matrices of queries and outputs, 3 a rank, the last has two and a zero one
    assert sizes == [(3, 32, 32)] * 3


def _shapes(rank: int, world_size: int) -> tuple[int, ...]:
    bank = torch.nn.Parameter(torch.ones(8, 32, 32))
    bank.grad = torch.full((8, 32, 32), float(rank))
    share = ShardedBank(bank, torch.float32, rank, world_size)
    share.start()
    mine = share.gradient()
    assert (mine[: 2 if rank == 2 else 3] == 1.0).all(), "the mean of 0, 1 and 2"
    assert rank < 2 or not mine[2].any()
    share.send(mine * (rank + 1))
    assert share.update()[:, 0, 0].tolist() == [1, 1, 1, 2, 2, 2, 3, 3]
    whole = torch.arange(8.0)[:, None, None].expand(8, 2, 2)
    assert torch.equal(share.gather(share.own(whole)), whole)
    return tuple(mine.shape)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["documents", "stream"])
def test_a_run_goes_on_with_another_number_of_ranks(shard: Path, tmp_path: Path, kind: str) -> None:
    preset = replace(PRESET, data=replace(PRESET.data, loader=kind))
    first = replace(preset, schedule=replace(preset.schedule, max_steps=2))
    run_ranks(trained, 2, 2, first, shard, None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0"], "rank 0 alone writes"
    whole = trained(0, 1, preset, shard)
    assert_same_training(trained(0, 1, preset, shard, tmp_path / "0"), whole)
    for state in run_ranks(trained, 4, 4, preset, shard, tmp_path / "0"):
        assert_same_training(state, whole)


# ---- agreement -----------------------------------------------------------------------------------------------------


def _agree(rank: int, facts: list[dict]) -> str:
    try:
        require_agreement(facts[rank])
    except ConfigError as error:
        return str(error)
    return "agreed"


def test_ranks_that_disagree_are_named_with_what_differs() -> None:
    same = replace(PRESET).settings()
    other = replace(PRESET, optim=replace(PRESET.optim, matrix_lr=0.5)).settings()
    line = "rank 1 has optim.matrix_lr = 0.5: expected 0.026 as on rank 0"
    assert run_ranks(_agree, 3, [same, other, same]) == [line] * 3
    files = {"data file a.bin": "12 bytes"}
    line = "rank 1 has data file b.bin = '1 bytes': expected None as on rank 0"
    assert run_ranks(_agree, 2, [files, files | {"data file b.bin": "1 bytes"}]) == [line] * 2
    assert run_ranks(_agree, 2, [same, same]) == ["agreed"] * 2


# ---- what ends a run -----------------------------------------------------------------------------------------------


class Stricken:
    """Batches, the third of which one rank does not live to see."""

    def __init__(self, batches, number: int | None) -> None:
        self._batches, self._left, self._signal = batches, 4, number

    def __iter__(self):
        return self

    def __next__(self):
        self._left -= 1
        if not self._left and self._signal:
            os.kill(os.getpid(), self._signal)
        return next(self._batches)


def _struck(rank: int, preset: Preset, shard: Path, checkpoint: Path, number: int) -> tuple[str, float]:
    trainer = Trainer(GPT(preset.model), preset, CPU, 2, compile=False)
    start = time.monotonic()
    with open_loader(preset, shard, rank, 2, None) as batches:
        batches = Stricken(batches, number if rank else None)
        try:
            run_clock(trainer, batches, Position(), checkpoint, None)
        except TrainingStopped as stopped:
            return str(stopped), time.monotonic() - start
    return "went on", 0.0


def struck_preset(patience_s: float) -> Preset:
    return replace(
        PRESET,
        schedule=replace(PRESET.schedule, max_steps=100),
        batch=BatchConfig(128, 64),
        run=RunConfig(checkpoint_every_s=1e-9, patience_s=patience_s),
    )


def test_when_a_rank_dies_the_others_stop_and_name_the_checkpoint(shard: Path, tmp_path: Path) -> None:
    preset, path = struck_preset(60.0), tmp_path / "c"
    (line, seconds), dead = run_ranks(_struck, 2, preset, shard, path, signal.SIGKILL)
    assert dead is None and seconds < 10
    assert line.startswith("rank 0: lost contact with another rank (") and "\n" not in line
    assert line.endswith(f"the last checkpoint is {path}")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    alone = replace(preset, batch=BatchConfig(128, 64))
    assert load_checkpoint(path, Trainer(GPT(SMALL), alone, CPU, 1, compile=False)).step == 3


def test_when_a_rank_hangs_the_others_leave_after_their_patience(shard: Path, tmp_path: Path) -> None:
    """The watchdog ends the process: there is no result, and it comes long before the group's own timeout."""
    start = time.monotonic()
    assert run_ranks(_struck, 2, struck_preset(1.0), shard, tmp_path / "c", signal.SIGSTOP) == [None, None]
    assert time.monotonic() - start < 20


def _slow(rank: int, preset: Preset, shard: Path, checkpoint: Path) -> int:
    trainer = Trainer(GPT(preset.model), preset, CPU, 2, compile=False)
    with open_loader(preset, shard, rank, 2, None) as batches:
        slow = (time.sleep(0.25) or batch for batch in batches)
        return run_clock(trainer, slow, Position(), checkpoint, None).step


def test_a_run_longer_than_its_patience_goes_on_while_steps_end(shard: Path, tmp_path: Path) -> None:
    preset = struck_preset(2.0)
    preset = replace(preset, schedule=replace(preset.schedule, max_steps=12))
    assert run_ranks(_slow, 2, preset, shard, tmp_path / "c") == [12, 12]


def _finds_its_place(rank: int, preset: Preset, shard: Path, checkpoint: Path) -> tuple[int, bool]:
    trainer = Trainer(GPT(preset.model), preset, CPU, 2, compile=False)
    with open_loader(preset, shard, rank, 2, None) as batches:
        slow = (time.sleep(0 if number else 3.0 * rank) or batch for number, batch in enumerate(batches))
        position = run_clock(trainer, slow, Position(), checkpoint, None)
    return position.step, position.elapsed_s < 2.0


def test_a_rank_that_is_late_to_find_its_place_costs_neither_patience_nor_budget(shard: Path, tmp_path: Path) -> None:
    preset = struck_preset(1.5)
    preset = replace(preset, schedule=replace(preset.schedule, max_steps=2))
    assert run_ranks(_finds_its_place, 2, preset, shard, tmp_path / "c") == [(2, True)] * 2


def _loses_a_number(rank: int, preset: Preset, shard: Path, checkpoint: Path) -> str:
    trainer = Trainer(GPT(preset.model), preset, CPU, 2, compile=False)
    step, count = trainer.step, 0

    def poisoned(*words, **options):
        nonlocal count
        loss, cursor = step(*words, **options)
        count += 1
        return (loss * float("nan") if count == 3 and rank == 1 else loss), cursor

    trainer.step = poisoned
    with open_loader(preset, shard, rank, 2, None) as batches:
        try:
            run_clock(trainer, batches, Position(), checkpoint, None)
        except TrainingStopped as stopped:
            return str(stopped)
    return "went on"


def test_a_loss_that_is_no_number_on_one_rank_stops_all_at_once(shard: Path, tmp_path: Path) -> None:
    path = tmp_path / "c"
    first, second = run_ranks(_loses_a_number, 2, struck_preset(60.0), shard, path)
    assert first.startswith("rank 0: the loss of step 3 is not finite on another rank, 4.")
    assert second == f"rank 1: the loss of step 3 is nan; the last checkpoint is {path}"


# ---- determinism ---------------------------------------------------------------------------------------------------


def _twice(rank: int, world_size: int, preset: Preset, shard: Path) -> list[list[float]]:
    torch.use_deterministic_algorithms(True)
    runs = []
    for _ in range(2):
        trainer, losses = Trainer(GPT(preset.model), preset, CPU, world_size, compile=False), []
        with open_loader(preset, shard, rank, world_size, None) as batches:
            clock = Clock(CPU, world_size, 0.0, lambda reading: losses.append(reading.loss))  # noqa: B023
            train(trainer, batches, clock, Position(), lambda _: time.sleep(0.02 * np.random.rand()))
        runs.append(losses)
    return runs


@pytest.mark.parametrize("world_size", [1, 2])
def test_deterministic_runs_have_the_same_losses_bit_for_bit(shard: Path, world_size: int) -> None:
    """The budget is so short that a schedule by the clock would differ."""
    schedule = ScheduleConfig(budget_s=30.0, reserve_s=0.0, max_steps=8, warmdown=1.0, loop_at=0.5, min_lr=0.0)
    preset = replace(PRESET, schedule=schedule, run=RunConfig(deterministic=True))
    for first, second in run_ranks(_twice, world_size, world_size, preset, shard):
        assert first == second and len(first) == 8
