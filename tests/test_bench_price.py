"""The price list: which fields are priced, the step that is timed, and what is told of the differences."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import torch

from niblick.bench import price, workload
from niblick.model.config import ConfigError, GPTConfig, Preset
from niblick.model.presets import PRESETS

SMALL = {"num_layers": 4, "model_dim": 64, "num_heads": 2, "num_kv_heads": 1, "mlp_hidden": 64, "vocab_size": 128}
SMALL |= {"loop_start": 1, "loop_end": 1, "parallel_start": 2, "max_segment": 64}


@pytest.fixture
def tiny(monkeypatch) -> Preset:
    """A preset named tiny, every choice of it the reference: hundreds of interpreted kernels would take minutes."""
    preset = replace(PRESETS["pr1855"], model=replace(PRESETS["pr1855"].model, **SMALL))
    for label in price.choices(preset):
        section, _, choice = label.partition(".")
        name, _, value = choice.partition("=")
        if value == "reference":
            preset = replace(preset, **{section: replace(getattr(preset, section), **{name: value})})
    monkeypatch.setitem(PRESETS, "tiny", preset)
    return preset


def priced(tmp_path, *words: str) -> tuple[int, list[dict]]:
    out = tmp_path / "price.jsonl"
    status = price.command(["tiny", "--device", "cpu", "--tokens", "48", "--out", str(out), *words])
    return status, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


# ------------------------------------------------------------------------------------------------- which are priced


@pytest.mark.parametrize("name", PRESETS)
def test_every_choice_with_a_reference_is_found(name: str) -> None:
    """Each differs from the preset in its field alone; the values of a field are all there but its own."""
    found = price.choices(PRESETS[name])
    assert found.pop("default") is PRESETS[name]
    assert {"model.mlp_impl", "optim.newton_schulz_impl"} <= {label.partition("=")[0] for label in found}
    for label, preset in found.items():
        section, _, choice = label.partition(".")
        field, _, value = choice.partition("=")
        own = getattr(getattr(PRESETS[name], section), field)
        assert value != own
        assert isinstance(preset, str) or replace(
            preset, **{section: replace(getattr(preset, section), **{field: own})}
        ) == PRESETS[name]  # fmt: skip


def test_fields_are_found_by_their_type(monkeypatch) -> None:
    @dataclass(frozen=True)
    class Model:
        width: int = 4
        mlp: Literal["kernel", "fast", "reference"] = "fast"
        order: Literal["name", "size"] = "name"

    @dataclass(frozen=True)
    class Optim:
        newton_schulz_impl: Literal["kernel", "reference"] = "reference"

    @dataclass(frozen=True)
    class Both:
        model: Model = Model()
        optim: Optim = Optim()

    labels = ["default", "model.mlp=kernel", "model.mlp=reference", "optim.newton_schulz_impl=kernel"]
    found = price.choices(Both())
    assert list(found) == labels
    assert found["model.mlp=kernel"] == Both(model=Model(mlp="kernel"))
    assert price.chosen(found, ()) == labels
    assert price.chosen(found, ("mlp",)) == price.chosen(found, ("model.mlp",)) == labels[1:3]
    assert price.chosen(found, ("mlp=kernel", "default")) == labels[:2]
    with pytest.raises(ConfigError, match=r"got mpl \(nearest: mlp\)"):
        price.chosen(found, ("mpl",))


def test_what_the_preset_refuses_stands_with_the_refusal(tiny: Preset) -> None:
    asymmetric = replace(tiny, model=replace(tiny.model, loss_impl="reference", asymmetric_softcap=True))
    refused = price.choices(asymmetric)["model.loss_impl=fused"]
    assert refused.startswith("refused: model.asymmetric_softcap")


# ------------------------------------------------------------------------------------------------- the step


def test_synthetic_documents() -> None:
    preset = replace(PRESETS["pr1855"], batch=replace(PRESETS["pr1855"].batch, tokens_per_micro_step=98_304))
    batches = workload.synthetic_batches(preset, torch.device("cpu"))
    assert len(batches) == workload.BATCHES and not torch.equal(batches[0].ids, batches[1].ids)
    medians = []
    for batch in batches:
        assert len(batch.ids) == len(batch.targets) == 98_304 and torch.equal(batch.ids[1:], batch.targets[:-1])
        assert batch.ids.min() == 0 and batch.ids.max() == preset.model.vocab_size - 1
        starts = (batch.ids == preset.model.bos_id).nonzero()[:, 0]
        lengths = starts.diff()
        assert starts[0] == 0 and lengths.min() >= 32
        medians.append(lengths.float().median().item())
        assert set(starts.tolist()) <= set(batch.cu_seqlens.tolist())
        assert batch.cu_seqlens.diff().max() <= preset.model.max_segment
    assert 500 < np.mean(medians) < 700


def test_price_on_a_cpu(tmp_path) -> None:
    """The command itself, with the eager implementations of the kernels."""
    out = tmp_path / "price.jsonl"
    command = [sys.executable, "-m", "niblick.bench.price", "--device", "cpu", "--tokens", "48", "--out", str(out)]
    command += ["--rounds", "2", "--steps", "2", "--only", "loss_impl=reference"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing about a kernel" in done.stdout and "model.loss_impl=reference" in done.stdout
    start, *records = [json.loads(line) for line in out.read_text().splitlines()]
    assert start["event"] == "start" and (start["preset"], start["tokens"], start["compile"]) == ("demo", 48, False)
    assert {"card", "driver", "torch", "triton", "commit", "date", "attention"} <= start.keys()
    series = {(record["variant"], record["loop"]): record for record in records}
    assert set(series) == {(v, loop) for v in ("default", "model.loss_impl=reference") for loop in ("off", "on")}
    for record in records:
        assert record["q1_ms"] <= record["ms"] <= record["q3_ms"] and (record["n"], record["rounds"]) == (2, 2)
    reference = series["model.loss_impl=reference", "off"]
    assert reference["value"] == "reference" and reference["default"] == PRESETS["demo"].model.loss_impl != "reference"


def test_variants_take_turns_and_train(tiny: Preset, monkeypatch) -> None:
    """Every variant once a round in each mode, the order turned; its first step in a turn is not counted."""
    seen = []
    preset = replace(tiny, batch=replace(tiny.batch, tokens_per_step=96, tokens_per_micro_step=96))
    variants = {label: price.build(preset, [False], torch.device("cpu"), compile=False) for label in "abc"}
    weights = variants["a"].trainer.model.mlp_down_bank
    assert weights.abs().amax((1, 2)).min() > 0, "a matrix is still zero: timing would be of zeros"
    names = {id(variant.trainer): label for label, variant in variants.items()}

    given = []

    def steps(trainer, batches, looping, steps):
        seen.append(names[id(trainer)])
        given.append(next(batches).ids.tolist())
        return [100.0, 1.0, 2.0][:steps]

    monkeypatch.setattr(price, "_time_steps", steps)
    price.take_turns(variants, [False, True], rounds=3, steps=3)
    assert "".join(seen) == "aabbccbbccaaccaabb"
    assert all(ids == given[turn // 6 * 6] for turn, ids in enumerate(given)), "a round's variants took other batches"
    assert given[0] != given[6] != given[12]
    assert variants["b"].ms == {False: [[1.0, 2.0]] * 3, True: [[1.0, 2.0]] * 3}


def test_what_ends_it_early_costs_one_round(tiny: Preset, monkeypatch, tmp_path, capsys) -> None:
    """The whole rounds before it are told and kept."""
    calls = []

    def steps(trainer, batches, looping, steps):
        calls.append(looping)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return [float(len(calls))] * steps

    monkeypatch.setattr(price, "_time_steps", steps)
    status, (_, *records) = priced(tmp_path, "--rounds", "9", "--only", "loss_impl=kernel", "--loop", "off")
    assert status == 130 and "2 rounds of 2 variants" in capsys.readouterr().out
    assert [(r["variant"], r["rounds"]) for r in records] == [("default", 2), ("model.loss_impl=kernel", 2)]


def test_differences_are_taken_round_by_round() -> None:
    """A drift that both share cancels: 1 ms in each round, whatever the rounds themselves took."""
    drift = np.array([10.0, 20.0, 15.0, 40.0])
    default, other = price.Variant(None), price.Variant(None)
    default.ms[True] = [[ms, ms, ms] for ms in drift]
    other.ms[True] = [[ms + 1, ms + 1, ms + 90] for ms in drift]
    presets = {"default": Preset()}
    first, second = price.records({"default": default, "model.mlp_impl=other": other}, presets)
    assert (first["difference_ms"], first["variant"], first["loop"], first["n"]) == (0.0, "default", "on", 12)
    assert [second[f"difference_{key}ms"] for key in ("", "q1_", "q3_")] == [1.0, 1.0, 1.0]
    assert (second["value"], second["default"], second["ms"]) == ("other", GPTConfig().mlp_impl, 31.0)


# ------------------------------------------------------------------------------------------------- bad input


def test_without_a_gpu_it_refuses(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert price.command([]) == 2
    error = capsys.readouterr().err
    assert "expected a CUDA device, found none" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pr9"], "unknown preset 'pr9'"),
        (["--device", "cpu", "--only", "mlp_imp"], "(nearest: mlp_impl)"),
        (["--device", "cpu", "--steps", "1"], "--steps of 2 or more"),
        (["--device", "cpu", "--out", "/"], "Is a directory"),
        (["--device", "cpu", "--precompile", "-1"], "--precompile of 0 or more: got -1"),
        (["--device", "cpu", "--tokens", "-1"], "batch.tokens_per_step"),
        (["pr1423", "--device", "cpu", "--loop", "on"], "expected a preset whose layers loop"),
        (["--rouns", "3"], "unknown option '--rouns' (nearest: --rounds)"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys) -> None:
    if "--device" not in words:
        words = [*words, "--device", "cpu"]
    assert price.command(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def test_a_variant_that_fails_does_not_stop_the_others(tiny: Preset, monkeypatch, tmp_path, capsys) -> None:
    build = price.build

    def fails(preset, *rest):
        if preset.model.loss_impl == "kernel":
            raise RuntimeError("CUDA out of memory\nand more")
        return build(preset, *rest)

    monkeypatch.setattr(price, "build", fails)
    status, (_, *records) = priced(tmp_path, "--rounds", "1", "--only", "loss_impl=kernel", "--loop", "off")
    assert status == 0 and [record["variant"] for record in records] == ["default"]
    assert "model.loss_impl=kernel: not priced: RuntimeError: CUDA out of memory\n" in capsys.readouterr().out
