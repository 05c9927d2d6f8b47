"""What ends a run before its time, and what is done beside the compiler: on one rank, on the CPU."""

import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import one_thread  # noqa: F401
from test_training import SMALL, loader, preset, small_shard, trainer

from niblick.data.loaders import StreamLoader
from niblick.model import memory
from niblick.model.checkpoint import load_checkpoint, remove_half_written, save_checkpoint
from niblick.model.config import BatchConfig, ConfigError, DataConfig, RunConfig, ScheduleConfig
from niblick.model.errors import TrainingStopped
from niblick.model.memory import largest_micro_step
from niblick.model.optim import Muon
from niblick.model.rehearsal import alongside
from niblick.model.run import run_clock
from niblick.model.runlog import RunLog
from niblick.model.training import Position, Trainer
from niblick.model.watchdog import Watchdog

EVERY_STEP = RunConfig(checkpoint_every_s=1e-9)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    return small_shard(tmp_path_factory.mktemp("shards"))


def run_to_the_end(t: Trainer, shard: Path, folder: Path) -> Position:
    with loader(shard) as batches:
        return run_clock(t, batches, Position(), folder / "c", RunLog(folder / "log.jsonl"))


# ---- numbers that are none -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(
    shard: Path,
    tmp_path: Path,
    monkeypatch,
    value: str,
) -> None:
    t = trainer(preset(run=EVERY_STEP))
    step, losses = t.step, iter([1.0, 1.0, float(value)])
    monkeypatch.setattr(t, "step", lambda *a, **k: (torch.tensor(next(losses)), step(*a, **k)[1]))
    with pytest.raises(TrainingStopped) as caught:
        run_to_the_end(t, shard, tmp_path)
    assert str(caught.value) == f"the loss of step 3 is {value}; the last checkpoint is {tmp_path / 'c'}"
    assert load_checkpoint(tmp_path / "c", trainer(t.preset)).step == 2
    assert '"event": "stopped"' in (tmp_path / "log.jsonl").read_text()


def test_weights_that_are_no_numbers_are_not_saved(shard: Path, tmp_path: Path, monkeypatch) -> None:
    """The step's loss was finite: it is that of the weights before."""
    t = trainer(preset(run=EVERY_STEP))
    update, count = t.optimizers.step, 0

    def spoil(*words) -> None:
        nonlocal count
        count += 1
        if count == 2:
            t.model.mlp_up_bank.grad[0, 0, 0] = float("nan")
        update(*words)

    monkeypatch.setattr(t.optimizers, "step", spoil)
    with pytest.raises(TrainingStopped, match=r"^after step 2, mlp_up_bank is not finite; the last checkpoint is "):
        run_to_the_end(t, shard, tmp_path)
    assert load_checkpoint(tmp_path / "c", trainer(t.preset)).step == 1


def test_compiling_inside_the_clock_ends_the_run(shard: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    t = trainer(preset(schedule=ScheduleConfig(budget_s=1e6, max_steps=4, loop_at=0.0)))
    addend = [0.0]
    compiled = torch.compile(lambda loss: loss + addend[0], backend="eager", fullgraph=True)
    t.forward = lambda *words: compiled(t.model(*words))

    def batches():
        with loader(shard) as source:
            for number, batch in enumerate(source):
                addend[0] = float(number > 1)  # the graph was made for another value
                yield batch

    with pytest.raises(TrainingStopped, match=r"^step 3 would compile inside the clock .*; there is no checkpoint$"):
        run_clock(t, batches(), Position(), tmp_path / "c", None)


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """A card on which a micro-step takes 10 kB a token, beside 350 kB that are free; told what it is asked."""
    asked = []

    def forward(ids, targets, cu_seqlens, looping):
        asked.append(len(ids))
        assert cu_seqlens[-1] == len(ids)
        if len(ids) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return torch.ones((), requires_grad=True)

    def peak_bytes(run, device) -> int:
        run()
        return 10_000 * asked[-1]

    monkeypatch.setattr(memory, "_peak_bytes", peak_bytes)
    monkeypatch.setattr(memory, "_release", lambda: None)
    monkeypatch.setattr(memory, "_free_bytes", lambda device: 350_000)
    forward.asked = asked
    return forward


def test_out_of_memory_names_the_micro_step_that_would_fit(shard: Path, card) -> None:
    t = trainer(preset())
    t.forward = card
    with loader(shard) as batches, pytest.raises(ConfigError) as caught:
        t.warm_up(batches)
    assert card.asked == [64, 16]
    assert str(caught.value) == (
        "out of GPU memory at batch.tokens_per_micro_step 64: about 33 would fit (10 kB a token, measured at 16); "
        "try --batch.tokens-per-micro-step 32"
    )


def test_out_of_memory_even_for_a_little(shard: Path, card, monkeypatch) -> None:
    def nothing_fits(run, device):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(memory, "_peak_bytes", nothing_fits)
    t = trainer(preset())
    t.forward = card
    with loader(shard) as batches, pytest.raises(ConfigError, match=r"micro_step 64, and 1 do not fit either: "):
        t.warm_up(batches)


def test_out_of_memory_with_few_rows_is_measured_on_one(shard: Path, card) -> None:
    """A quarter of three rows is none."""
    rows = DataConfig(loader="sequences")
    t = trainer(preset(batch=BatchConfig(48, 48), data=rows, model=replace(SMALL, max_segment=16)))
    t.forward = card
    with StreamLoader([shard], 48, sequence_length=16) as batches, pytest.raises(ConfigError) as caught:
        t.warm_up(batches)
    assert card.asked == [48, 16]
    assert str(caught.value).endswith("measured at 16); try --batch.tokens-per-micro-step 16")
    t = trainer(replace(t.preset, batch=BatchConfig(48, 16)))
    line = "^out of GPU memory at batch.tokens_per_micro_step 16: expected a larger card or a smaller model$"
    assert re.match(line, memory.micro_step_that_fits(t.preset, 1, card, t.device))


def test_out_of_memory_inside_the_clock_is_a_line(shard: Path, tmp_path: Path, monkeypatch) -> None:
    t = trainer(preset(run=EVERY_STEP))
    step, left = t.step, iter([True, True])

    def lack(*words, **options):
        if next(left, False):
            return step(*words, **options)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    monkeypatch.setattr(t, "step", lack)
    line = r"^step 3 ran out of GPU memory \(.*\); the last checkpoint is \S*$"
    with pytest.raises(TrainingStopped, match=line):
        run_to_the_end(t, shard, tmp_path)


def test_the_micro_step_divides_the_step_and_holds_whole_rows() -> None:
    p = preset(batch=BatchConfig(786_432, 98_304))
    assert largest_micro_step(p, 8, 98_303) == 49_152
    assert largest_micro_step(p, 1, 65_535) == 49_152
    assert largest_micro_step(replace(p, batch=BatchConfig(300, 100)), 1, 99) == 75
    rows = replace(p, data=DataConfig(loader="sequences"), model=replace(SMALL, max_segment=2048))
    assert largest_micro_step(replace(rows, batch=BatchConfig(786_432, 98_304)), 1, 40_000) == 32_768
    assert largest_micro_step(rows, 1, 2047) is None


def test_what_cannot_be_deterministic_is_refused_in_a_line(shard: Path, monkeypatch) -> None:
    def refuse(*_):
        raise RuntimeError(
            "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off determinism\njust for this operation"
        )

    t = trainer(preset())
    t.forward = refuse
    line = "^run.deterministic: cumsum_cuda_kernel does not have a deterministic implementation$"
    with loader(shard) as batches, pytest.raises(ConfigError, match=line):
        t.warm_up(batches)


def test_a_checkpoint_that_cannot_be_written_costs_itself_alone(shard: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "c").mkdir()  # which no file can replace
    t = trainer(preset(run=EVERY_STEP))
    position = run_to_the_end(t, shard, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith(f"cannot write {tmp_path / 'c'}: ")]
    assert position.step > 1 and len(told) >= 2 and all(line.endswith("; going on without it") for line in told)
    assert '"event": "end of training"' in (tmp_path / "log.jsonl").read_text()


# ---- other ends ----------------------------------------------------------------------------------------------------


def test_watchdog_barks_once_there_are_no_more_beats() -> None:
    said = []
    with Watchdog(0.4, lambda: "too long", said.append) as watchdog:
        for _ in range(8):
            time.sleep(0.1)
            watchdog.beat()
        assert said == []
        time.sleep(1.0)
    assert said == ["too long"]
    with Watchdog(60.0, lambda: "never", said.append):
        pass
    assert said == ["too long"] and "niblick-watchdog" not in [t.name for t in threading.enumerate()]


def test_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", trainer(preset()), Position())
    (tmp_path / ".c.4711.tmp").write_bytes(b"half")
    remove_half_written(tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_sequences_go_on_with_as_many_ranks_only(tmp_path: Path) -> None:
    p = preset(data=DataConfig(loader="sequences"))
    save_checkpoint(tmp_path / "c", trainer(p), Position())
    t = trainer(p)
    t.world_size = 2
    with pytest.raises(ConfigError, match=r"written by 1 rank\(s\).*sequences.*expected as many, got 2"):
        load_checkpoint(tmp_path / "c", t)


# ---- beside the compiler -------------------------------------------------------------------------------------------


def test_jobs_run_beside_the_body_and_their_errors_come_after_it() -> None:
    started, ended, both = threading.Event(), threading.Event(), []

    def job() -> None:
        started.set()
        both.append(ended.wait(10))

    with alongside([job, job]):
        assert started.wait(10)
        ended.set()
    assert both == [True, True]

    def fail() -> None:
        raise ValueError("broken")

    def lack() -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(ValueError, match="broken"), alongside([lack, fail]):
        pass
    with alongside([lack]):
        pass
    before = threading.active_count()  # the test runner may have threads of its own
    with alongside([]):
        assert threading.active_count() == before


def test_jobs_find_the_device_of_their_rank_current(monkeypatch) -> None:
    """A thread begins on card 0, where a flash kernel would look for the stream of any rank."""
    here = threading.local()
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: setattr(here, "device", device))
    found = []
    with alongside([lambda: found.append(here.device)] * 2):
        pass
    assert found == [3, 3]


def test_rehearsals_launch_what_a_step_launches(shard: Path, monkeypatch) -> None:
    t = trainer(preset(model=replace(SMALL, max_segment=4)))
    launched, rehearsed = [], []
    orthogonalize = Muon._orthogonalize
    monkeypatch.setattr(
        Muon, "_orthogonalize", lambda self, g: (launched.append((g.shape, g.dtype)), orthogonalize(self, g))[1]
    )
    with loader(shard) as batches:
        batch = next(batches)
        t.step(batches, factor=1.0, momentum=0.9, looping=True)
    real, launched[:] = list(launched), []
    for rehearse in t.optimizers.muon.rehearsals():
        rehearse()
    assert launched == real and len(real) == 4
    before = {name: tensor.clone() for name, tensor in t.state_dict().items()}
    forward = t.model.forward
    monkeypatch.setattr(t.model, "forward", lambda *a: (rehearsed.append((len(a[0]), a[3])), forward(*a))[1])
    t._rehearse_model(batch)
    assert rehearsed == [(16, False)]
    assert all(p.grad is None for p in t.parameters)
    assert all(torch.equal(tensor, before[name]) for name, tensor in t.state_dict().items())


def test_only_compiled_runs_on_a_gpu_rehearse(shard: Path) -> None:
    t = trainer(preset())
    with loader(shard) as batches:
        batch = next(batches)
    assert t._rehearsals(batch) == []
    t.device, t.forward = torch.device("cuda"), object()
    assert len(t._rehearsals(batch)) == 5
    t.forward = t.model
    assert t._rehearsals(batch) == []
