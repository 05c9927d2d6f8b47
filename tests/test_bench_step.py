"""The ledger of the step: its statistics and arithmetic by hand, phases and classes, the command with its history."""

import json
import math
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from configs import REFERENCE

import niblick.kernels
from niblick.bench import kernel_time, ledger, measure, phases, published, step, step_runs, workload
from niblick.bench.intervals import mean_interval, seed_noise, t_quantile
from niblick.bench.kernel_time import Kernel
from niblick.bench.ledger import Projection
from niblick.bench.phases import AVERAGE, CLIP, COLLECTIVES, GRADIENTS, OPTIMIZER, REST, WHOLE
from niblick.data.errors import DataError
from niblick.data.loaders import Batch
from niblick.model.config import ConfigError, Preset, ScheduleConfig
from niblick.model.presets import PRESETS

CPU = torch.device("cpu")
SMALL = {"num_layers": 4, "model_dim": 64, "num_heads": 2, "num_kv_heads": 1, "mlp_hidden": 64, "vocab_size": 128}
SMALL |= {"loop_start": 1, "loop_end": 1, "parallel_start": 2, "max_segment": 64}


@pytest.fixture
def tiny(monkeypatch) -> Preset:
    """A preset named tiny without kernels; few steps before it counts as trained."""
    base = PRESETS["pr1855"]
    optim = replace(base.optim, newton_schulz_impl="reference")
    preset = replace(base, model=replace(base.model, **SMALL, **REFERENCE), optim=optim)
    monkeypatch.setitem(PRESETS, "tiny", preset)
    monkeypatch.setattr(step_runs, "TRAINED_STEPS", 7)
    return preset


def trainer_of(preset: Preset, tokens: int = 64, micro_steps: int = 1):
    one = workload.one_micro_step(preset, tokens, "auto", "cpu")
    batch = replace(one.batch, tokens_per_step=tokens * micro_steps)
    return workload.make_trainer(replace(one, batch=batch), CPU, compile=False)


def run(out: Path, *words: str) -> tuple[int, list[dict]]:
    """The command on the tiny preset; its status and the records of this run."""
    before = len(out.read_text().splitlines()) if out.exists() else 0
    options = ["--device", "cpu", "--tokens", "64", "--rounds", "2", "--steps", "2", "--out", str(out)]
    status = step.command(["tiny", *options, *words])
    return status, [json.loads(line) for line in out.read_text().splitlines()[before:]]


# ------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("dof", "level", "expected"),
    [(1, 0.95, 12.7062), (2, 0.95, 4.3027), (9, 0.95, 2.2622), (30, 0.95, 2.0423), (5, 0.99, 4.0321), (1, 0.5, 1.0)],
)
def test_t_quantiles_are_those_of_the_tables(dof: int, level: float, expected: float) -> None:
    assert t_quantile(dof, level) == pytest.approx(expected, abs=1e-4)


def test_interval_by_hand() -> None:
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.30265 / math.sqrt(3))
    assert seed_noise([1.0, 2.0, 3.0]) == pytest.approx(4.30265 * math.sqrt(2 / 3))
    with pytest.raises(ValueError, match="two values or more"):
        mean_interval([1.0])


def test_intervals_hold_what_they_promise() -> None:
    """Over many draws of four normal values: 95 % of intervals hold the mean, and 95 % of differences the noise."""
    draws = np.random.default_rng(0).normal(3.0, 2.0, (1500, 2, 4))
    held = [abs(mean - 3.0) <= half for mean, half in map(mean_interval, draws[:, 0])]
    assert 0.935 < np.mean(held) < 0.965
    apart = [abs(b.mean() - a.mean()) <= seed_noise(a) for a, b in draws]
    assert 0.935 < np.mean(apart) < 0.965


def test_worth_of_a_step_by_hand() -> None:
    """Slopes 1 and 2 about levels of their own: 1.5, residuals of 0.5, one degree of freedom."""
    runs = {"a": [(0, 0.0), (2, 2.0)], "b": [(0, 10.0), (2, 14.0)]}
    worth = published.worth_of_a_step(runs)
    assert worth.bits_per_step == 1.5 and worth.half_width == pytest.approx(12.7062 * 0.5, abs=1e-3)
    assert (worth.runs, worth.systems, worth.largest_share) == (4, 2, 0.5)
    assert published.without_farthest({"a": [(0, 1.0), (1, 1.0)], "b": [(3, 1.0), (3, 1.0), (9, 2.0)]}) == {
        "a": [(0, 1.0), (1, 1.0)], "b": [(3, 1.0), (3, 1.0)]
    }  # fmt: skip


def test_the_published_runs_say_how_little_they_say() -> None:
    rows = [row for runs in published.RUNS.values() for row in runs]
    assert all(4500 < steps < 5200 and 1.05 < bits < 1.09 for steps, bits in rows)
    worth = published.worth_of_a_step()
    assert worth.bits_per_step + worth.half_width < 0, "more steps are better, beyond the fit's doubt"
    assert worth.largest_share > 0.9
    first, second = published.describe(40.0)
    assert first.startswith(f"{40 * worth.bits_per_step:+.5f} ± {40 * worth.half_width:.5f}")
    assert "one run" in second and "95 % of the evidence" in second


# ------------------------------------------------------------------------------------------------------- projection


def simulated(ms: dict[bool, float], schedule: ScheduleConfig) -> tuple[int, int | None]:
    """The training loop's decisions, step by step."""
    limit, clock, steps, first = schedule.budget_s - schedule.reserve_s, 0.0, 0, None
    while clock < limit and steps < schedule.max_steps:
        looping = True in ms and clock / limit >= schedule.loop_at
        first = steps if looping and first is None else first
        clock += ms[looping] / 1e3
        steps += 1
    return steps, first


def test_steps_in_the_budget_by_hand() -> None:
    schedule = ScheduleConfig(budget_s=10.0, reserve_s=1.0, loop_at=0.5)
    assert ledger.steps_in_budget({False: 100.0, True: 150.0}, schedule) == (75, 45)
    assert ledger.steps_in_budget({False: 100.0}, schedule) == (90, None)
    assert ledger.steps_in_budget({False: 100.0, True: 150.0}, replace(schedule, max_steps=40)) == (40, None)
    assert ledger.steps_per_ms({False: 100.0}, schedule) == pytest.approx(9000 / 99 - 90)
    assert ledger.steps_per_ms({False: 100.0, True: 150.0}, schedule) == pytest.approx(4500 / 99 + 4500 / 149 - 75)


def test_steps_in_the_budget_as_the_loop_takes_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        off, on, budget = rng.uniform(40, 90), rng.uniform(60, 130), rng.uniform(2, 20)
        schedule = ScheduleConfig(budget_s=budget, reserve_s=rng.uniform(0, 1), loop_at=rng.uniform(0, 1))
        for ms in ({False: off, True: on}, {False: off}):
            assert ledger.steps_in_budget(ms, schedule) == simulated(ms, schedule)


def test_published_milliseconds_give_the_published_steps() -> None:
    """PR #1855, seed 42: 4945 steps, the loop from step 2178 on."""
    steps, first = ledger.steps_in_budget({False: 96.34, True: 140.86}, PRESETS["pr1855"].schedule)
    assert abs(steps - 4945) <= 2 and abs(first - 2178) <= 2


def test_projection_by_hand() -> None:
    """Eight micro-steps repeat gradients and their clipping, not the rest; one rank has no collectives."""
    preset = PRESETS["pr1855"]
    of_step = {GRADIENTS: 80.0, CLIP: 1.0, COLLECTIVES: 5.0, OPTIMIZER: 3.0, AVERAGE: 1.0, WHOLE: 90.0}
    eight, one, single = ledger.project({False: of_step}, preset, 98_304, measured_ranks=8)
    assert eight.what == "8 GPUs, 786,432 tokens a step" and eight.ms == {False: 90.0}
    assert eight.steps == math.ceil(599.5 / 0.09)
    assert one.what.startswith("1 GPU, 786,432 tokens a step (measured on 8") and one.ms == {False: 85.0 + 7 * 81.0}
    assert single.ms == {False: 85.0}
    clipped = replace(preset, optim=replace(preset.optim, clip="global"))
    assert ledger.step_ms(of_step, clipped, 8) == 90.0 + 7 * 80.0
    first, *others = ledger.project({False: of_step}, preset, 100_000, measured_ranks=1)
    assert first == "8 GPUs, 786,432 tokens a step: no whole number of micro-steps of 100,000 tokens a GPU"
    assert isinstance(others[-1], Projection)
    few = replace(preset, schedule=replace(preset.schedule, max_steps=50))
    assert [(p.steps, p.steps_per_ms) for p in ledger.project({False: of_step}, few, 98_304, 1)] == [(50, 0.0)] * 3


# ------------------------------------------------------------------------------------------------------- phases


def test_marks_give_each_phase_its_time(monkeypatch) -> None:
    """Two steps; the clip inside the gradients, the wait inside the optimizer."""
    clock = iter([0.0, 2.0, 3.0, 4.0, 4.5, 5.0, 6.0, 10.0, 17.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(clock))
    marks = phases.Marks(CPU)
    marks.start_step()

    def wait() -> str:
        return "waited"

    phases._marking(lambda: None, CLIP, marks)()
    assert phases._marking(phases._marking(wait, COLLECTIVES, marks), OPTIMIZER, marks)() == "waited"
    marks.start_step()
    first, second = marks.read()
    assert first == {GRADIENTS: 3e3, CLIP: 1e3, OPTIMIZER: 1.5e3, COLLECTIVES: 0.5e3, REST: 4e3, WHOLE: 10e3}
    assert second == {GRADIENTS: 7e3, WHOLE: 7e3}


def test_every_phase_of_a_step_is_found(tiny: Preset) -> None:
    """A trainer that changes its ways would leave its phases to the ones before, in silence."""
    trainer = trainer_of(tiny, micro_steps=2)
    before = [getattr(owner, name) for _, owner, name in phases.seams(trainer)]
    found = phases.time_phases(trainer, cycle(workload.synthetic_batches(trainer.preset, CPU)), True, 2)
    for one in found:
        assert set(one) == {GRADIENTS, CLIP, OPTIMIZER, AVERAGE, REST, WHOLE} and min(one.values()) > 0
        assert sum(ms for name, ms in one.items() if name != WHOLE) == pytest.approx(one[WHOLE])
        assert one[GRADIENTS] == max(ms for name, ms in one.items() if name != WHOLE)
    assert [getattr(owner, name) for _, owner, name in phases.seams(trainer)] == before
    globally = trainer_of(replace(tiny, optim=replace(tiny.optim, clip="global")))
    batches = cycle(workload.synthetic_batches(globally.preset, CPU))
    assert CLIP in phases.time_phases(globally, batches, False, 1)[0]


def test_gradients_alone_leave_the_weights_alone(tiny: Preset) -> None:
    trainer = trainer_of(tiny)
    before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    batches = cycle(workload.synthetic_batches(trainer.preset, CPU))
    with phases.gradients_only(trainer):
        (one,) = phases.time_phases(trainer, batches, True, 1)
    after = trainer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert one[GRADIENTS] > 10 * one[OPTIMIZER]
    workload.take_step(trainer, batches, True)
    assert not torch.equal(trainer.state_dict()["model.mlp_down_bank"], before["model.mlp_down_bank"])


def test_settings_lie_over_the_preset() -> None:
    preset = workload.named_preset("pr1855", ("model.mlp_impl=reference", "optim.matrix_lr=0.5", "run.resume=true"))
    assert (preset.model.mlp_impl, preset.optim.matrix_lr, preset.run.resume) == ("reference", 0.5, True)
    assert replace(preset.model, mlp_impl=PRESETS["pr1855"].model.mlp_impl) == PRESETS["pr1855"].model
    assert not workload.with_settings(preset, ("run.resume=False",)).run.resume
    workload.require_same_batches(preset, workload.named_preset("pr1934"))
    with pytest.raises(ConfigError, match=r"same batches: got model\.attention_span documents and rows"):
        workload.require_same_batches(preset, PRESETS["pr1514"])


# ------------------------------------------------------------------------------------------------------- kernels


@pytest.fixture
def two_files(tmp_path: Path, monkeypatch) -> None:
    """A folder of kernels with one file that multiplies matrices and one that does not."""
    (tmp_path / "folded.py").write_text(
        "@triton.jit\ndef _fold_kernel(x):\n    tl.dot(x, x)\n@triton.jit(debug=True)\ndef _sum_kernel(x):\n    pass\n"
    )
    (tmp_path / "strewn.py").write_text("@triton.jit\ndef _strew_kernel(x):\n    pass\n\ndef plain(x):\n    pass\n")
    monkeypatch.setattr(niblick.kernels, "__path__", [str(tmp_path)])
    kernel_time.own_kernels.cache_clear()
    yield
    kernel_time.own_kernels.cache_clear()


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("_fold_kernel", kernel_time.PRODUCTS),
        ("_sum_kernel", kernel_time.PRODUCTS),
        ("_strew_kernel", kernel_time.STREAMS),
        ("_strew_kernel_0d1d2de", kernel_time.STREAMS),
        ("plain", "other"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_tn>", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", "GEMM"),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("triton_poi_fused__to_copy_add_mul_3", "Inductor"),
        ("triton_red_fused_sum_12", "Inductor"),
        ("Memcpy HtoD (Pinned -> Device)", "memcpy, memset"),
        ("Memset (Device)", "memcpy, memset"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "collectives"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "other"),
        ("void at::native::multi_tensor_apply_kernel<>", "other"),
    ],
)
def test_kernels_are_classified_by_name(two_files, name: str, label: str) -> None:
    assert kernel_time.classify(name) == label


def test_the_folder_s_own_kernels_are_known() -> None:
    found = kernel_time.own_kernels()
    assert {name: found[name] for name in ("_symmetric_kernel", "_softcapped_ce_kernel")} == {
        "_symmetric_kernel": kernel_time.PRODUCTS, "_softcapped_ce_kernel": kernel_time.STREAMS
    }  # fmt: skip


def test_account_by_hand(two_files) -> None:
    """Two steps in 20 ms: two kernels side by side for 1 ms, a gap of 2 ms, another of 1."""
    kernels = [
        Kernel("nvjet_1", 0.0, 5000.0),
        Kernel("_strew_kernel", 4000.0, 8000.0),
        Kernel("nvjet_1", 10000.0, 16000.0),
        Kernel("Memset (Device)", 12000.0, 13000.0),
        Kernel("unheard_of", 17000.0, 20000.0),
    ]
    found = kernel_time.account(kernels, steps=2)
    assert found.ms == {"GEMM": 5.5, kernel_time.STREAMS: 2.0, "other": 1.5, "memcpy, memset": 0.5}
    assert next(iter(found.ms)) == "GEMM" and found.count["GEMM"] == 1.0
    assert (found.span_ms, found.idle_ms, found.idle_share) == (10.0, 1.5, 0.15)
    assert found.overlap_ms == pytest.approx(1.0)
    assert kernel_time.longest(kernels, 2, "other") == [("unheard_of", 1.5)]


def test_operations_by_hand(tiny: Preset) -> None:
    """D = F = 64, one of two key heads, four layers or six with the loop's two more passes, 128 pieces, 10 tokens."""
    preset = replace(tiny, batch=replace(tiny.batch, tokens_per_step=10, tokens_per_micro_step=10))
    layer = 64 * 64 + 32 * 64 + 32 * 64 + 64 * 64 + 2 * 64 * 64
    square, oblong = 64**3 + 64**3 + 2 * 64**3, 32**2 * 64 + 32**3 + 2 * 32**2 * 64
    muon = 5 * (8 * square + 8 * oblong + 4 * square + 4 * square)
    assert kernel_time.product_flops(preset, False) == 6 * 10 * (4 * layer + 128 * 64) + muon
    assert kernel_time.product_flops(preset, True) == 6 * 10 * (6 * layer + 128 * 64) + muon
    batch = Batch(torch.zeros(6), torch.zeros(6), torch.tensor([0, 2, 6, 6]), {})
    assert kernel_time.attention_flops(preset, False, batch) == 3.5 * 4 * 2 * 64 * (4 + 16)
    record = replace(PRESETS["pr1855"], batch=replace(tiny.batch, tokens_per_micro_step=98_304))
    assert 31.4e12 < kernel_time.product_flops(record, True) < 31.7e12  # 31.4 in the model, the rest in Muon


def test_bytes_of_streaming_ops_are_those_of_their_cost() -> None:
    """Forward and backward of a streaming kernel, weighed as they run, against its X_cost; a product weighs nothing."""
    module = measure.load("smear_gate")
    size = module.SIZES["tile"]
    inputs = module.smear_gate_inputs(size, torch.float32, CPU)
    cost = module.smear_gate_cost(size, torch.float32)
    with kernel_time._Weigher() as forward:
        y = module.smear_gate(**inputs)
    with kernel_time._Weigher() as backward:
        y.backward(torch.ones_like(y))
    assert forward.n_bytes == pytest.approx(cost["bytes_forward"], rel=0.05)
    assert backward.n_bytes == pytest.approx(cost["bytes_backward"], rel=0.05)
    muon = measure.load("newton_schulz")
    with kernel_time._Weigher() as product:
        muon.newton_schulz(torch.randn(1, 8, 8), ((1.0, 1.0, 1.0),))
    assert product.n_bytes == 0


def test_stream_bytes_grow_linearly_with_tokens(tiny: Preset, monkeypatch) -> None:
    """What two small steps say of a third is what the third says of itself."""
    kernels = replace(tiny, model=replace(tiny.model, xsa_impl="kernel"))
    monkeypatch.setattr(kernel_time, "SMALL", 16)

    def weighed(tokens: int) -> float:
        batch = replace(kernels.batch, tokens_per_step=tokens, tokens_per_micro_step=tokens)
        return kernel_time.stream_bytes(replace(kernels, batch=batch), False, CPU)

    with_kernel = weighed(96)
    monkeypatch.setattr(kernel_time, "SMALL", 48)
    assert with_kernel == weighed(96) > 0


@pytest.mark.gpu
def test_a_profiled_step_on_a_card(tmp_path: Path) -> None:
    """Kernels of every origin are found, the span holds the busy time, and no class beats its roof."""
    out = tmp_path / "a.jsonl"
    words = ["--tokens", "8192", "--rounds", "2", "--steps", "3", "--no-compile", "--out", str(out)]
    assert step.command(["demo", *words]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    profiles = [r for r in records if r["event"] == "profile"]
    assert [r["loop"] for r in profiles] == ["off", "on"]
    for record in profiles:
        assert {kernel_time.STREAMS, kernel_time.ATTENTION, kernel_time.GEMM} <= record["ms"].keys()
        assert 0 <= record["idle_ms"] < record["span_ms"] and "no_roofs" not in record
        assert all(0 < roof["roof_ms"] < roof["ms"] for roof in record["roofs"].values())
    assert all(r["peak_bytes"] > 0 for r in records if r["event"] == "step")


# ------------------------------------------------------------------------------------------------------- history


def a_run(date: str, ms: float, **changes: object) -> list[dict]:
    start = {"event": "start", "card": "C", "preset": "p", "settings": [], "date": date} | changes
    return [start, {"event": "step", "variant": "A", "loop": "off", "phases": {WHOLE: ms}},
            {"event": "step", "variant": "B", "loop": "off", "phases": {WHOLE: 1.0}},
            {"event": "history", "regression": changes.get("slow", False)}]  # fmt: skip


def test_the_latest_comparable_run(tmp_path: Path) -> None:
    """By date, not by place; neither of another card or setting, nor one that was a regression."""
    early, late = "2026-01-02T10:00:00+0000", "2026-01-02T13:00:00+0200"
    first = [*a_run(late, 2.0), *a_run(early, 1.5), *a_run("2027-01-01T00:00:00+0000", 9.0, card="D")]
    later = "2028-01-01T00:00:00+0000"
    second = [*a_run(later, 8.0, slow=True), *a_run(later, 7.0, settings=["x"])]
    for name, records in {"a-step.jsonl": first, "b-step.jsonl": second, "c-price.jsonl": [{"event": "?"}]}.items():
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    facts = {"card": "C", "preset": "p", "settings": []}
    found = ledger.last_comparable(tmp_path / "new-step.jsonl", facts)
    assert found["date"] == late and found["ms"] == {"off": 2.0}
    assert ledger.changes(found["ms"], {"off": 2.1, "on": 3.0}) == {"off": pytest.approx(5.0)}
    assert ledger.last_comparable(tmp_path / "new-step.jsonl", facts | {"card": "E"}) is None


@pytest.mark.parametrize("text", ["{", '{"event": "step"}', '{"event": "start"}', "[]", '{"event": "history"}'])
def test_a_damaged_history_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a-step.jsonl").write_text(text + "\n")
    with pytest.raises(DataError, match=r"expected the JSON lines of niblick\.bench\.step"):
        ledger.last_comparable(tmp_path / "b-step.jsonl", {})


def test_a_regression_is_exit_status_one(tiny: Preset, tmp_path: Path, capsys) -> None:
    """Also when it is measured again: a regression is nothing to compare with."""
    out = tmp_path / "any-step.jsonl"
    status, (start, *records) = run(out)
    assert status == 0 and "no run of the same card" in capsys.readouterr().out
    assert (start["preset"], start["tokens"], start["weights"], start["ranks"]) == ("tiny", 64, "trained", 1)
    assert {r["event"] for r in records} == {"step", "projection", "history"}
    assert [(r["loop"], r["n"]) for r in records if r["event"] == "step"] == [("off", 2), ("on", 2)]
    quick = [json.loads(line) for line in out.read_text().splitlines()]
    for record in quick:
        for name in record.get("phases", {}):
            record["phases"][name] /= 1000
    out.write_text("".join(json.dumps(record) + "\n" for record in quick))
    for _ in range(2):
        status, records = run(out)
        error = capsys.readouterr().err
        assert status == 1 and error.count("\n") == 1 and "expected at most 3 % (--fail-over)" in error
        assert records[-1]["regression"] is True
    assert run(out, "--fail-over", "1e9")[0] == 0
    assert run(out, "--fail-over", "1e9")[1][-1]["percent"]["off"] < 9000, "the accepted run counts from now on"


# ------------------------------------------------------------------------------------------------------- the command


def test_two_presets_take_turns(tiny: Preset, tmp_path: Path, capsys) -> None:
    """Differences are paired by round; a step that sleeps longer is found, whatever the rest does."""
    status, records = run(tmp_path / "a.jsonl", "--versus-set", "optim.ema_decay=0.5", "--rounds", "3")
    versus = [r for r in records if r["event"] == "versus"]
    assert status == 0 and {r["loop"] for r in versus} == {"off", "on"} and versus[0]["phase"] == WHOLE
    assert all(r["rounds"] == 3 and r["half_width_ms"] > 0 for r in versus)
    assert (
        records[0]["versus"] == ["", "optim.ema_decay=0.5"]
        and "B (optim.ema_decay=0.5) less A" in capsys.readouterr().out
    )
    a, b = step_runs.Measured(trainer_of(tiny)), step_runs.Measured(trainer_of(tiny))
    for looping in (False, True):
        drift = (10.0, 30.0, 20.0)
        a.steps[looping] = [[{WHOLE: ms}, {WHOLE: ms}, {WHOLE: 1e6}] for ms in drift]
        b.steps[looping] = [[{WHOLE: ms + more}] for ms, more in zip(drift, (1.0, 2.0, 3.0), strict=True)]
    found = step_runs.differences({"A": a, "B": b})[0]
    assert found["difference_ms"] == 2.0 and found["half_width_ms"] == pytest.approx(4.30265 / math.sqrt(3))


def test_fresh_weights_and_a_real_loader(tiny: Preset, tmp_path: Path, monkeypatch, capsys) -> None:
    status, records = run(tmp_path / "a.jsonl", "--weights", "init")
    assert status == 0 and "forward and backward only" in capsys.readouterr().out
    assert {r["event"] for r in records} == {"start", "step", "history"} and records[0]["weights"] == "init"
    opened = []

    class Loader:
        def __init__(self, preset, *place) -> None:
            opened.append((preset.data.source, place[1:]))
            self.batches = cycle(workload.synthetic_batches(preset, CPU))

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.batches)

        def __enter__(self):
            return self

        def __exit__(self, *exception) -> None:
            pass

    monkeypatch.setattr(step, "prepare_cached", lambda data, vocab_size: None)
    monkeypatch.setattr(step, "open_loader", lambda preset, prepared, *place: Loader(preset, *place))
    status, records = run(tmp_path / "a.jsonl", "--data", "somewhere")
    assert status == 0 and opened == [("somewhere", (0, 1))] and records[0]["data"] == "somewhere"
    waits = [r for r in records if r["event"] == "loader"]
    assert [r["loop"] for r in waits] == ["off", "on"] and all(0 < r["wait_ms"] < r["step_ms"] for r in waits)


def test_without_a_gpu_it_refuses(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert step.command([]) == 2
    error = capsys.readouterr().err
    assert "expected a CUDA device, found none" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pr9"], "unknown preset 'pr9'"),
        (["--versus", "pr185"], "unknown preset 'pr185'"),
        (["--set", "model.mlp_imp=reference"], "(nearest: --model.mlp-impl)"),
        (["--set", "mlp_impl"], "expected a setting as section.field=value: got mlp_impl"),
        (["--set", "run.resume=maybe"], "expected run.resume=true or run.resume=false"),
        (["--versus-set", "model.softcap=-1"], "model.softcap must be in"),
        (["--versus-set", "model.max_segment=32"], "same batches: got model.max_segment 512 and 32"),
        (["--rounds", "1"], "--rounds of 2 or more: got 1"),
        (["--steps", "1"], "--steps of 2 or more"),
        (["--fail-over", "-1"], "--fail-over in percent, 0 or more: got -1"),
        (["--tokens", "-1"], "batch.tokens_per_step"),
        (["--out", "/"], "Is a directory"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
        (["--round", "3"], "unknown option '--round' (nearest: --rounds)"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys) -> None:
    assert step.command([*words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def test_the_measured_step_is_as_deterministic_as_the_preset(monkeypatch) -> None:
    asked = []
    choose = workload.choose_attention

    def note(name, device, dtype, deterministic=False):
        asked.append(deterministic)
        return choose(name, device, dtype, deterministic)

    monkeypatch.setattr(workload, "choose_attention", note)
    preset = workload.one_micro_step(PRESETS["demo"], 64, "auto", "cpu")
    for deterministic in (False, True):
        preset = replace(preset, run=replace(preset.run, deterministic=deterministic))
        workload.make_trainer(preset, torch.device("cpu"), compile=False)
    assert asked == [False, True]
