"""The presets against the published constants, typed in here a second time, and the refusals of the configuration."""

import dataclasses

import pytest

from niblick.model.config import ArtifactConfig, BatchConfig, ConfigError, EvalConfig, Preset
from niblick.model.presets import PRESETS

SYSTEMS = ("pr1477", "pr1423", "pr1514", "pr1934", "pr1855")
TABLE = {
    "model.num_layers": (11, 11, 11, 11, 11),
    "model.model_dim": (512, 512, 512, 512, 512),
    "model.num_heads": (8, 8, 8, 8, 8),
    "model.num_kv_heads": (4, 4, 4, 4, 4),
    "model.mlp_hidden": (2048, 2048, 2048, 2048, 2048),
    "model.vocab_size": (8192, 8192, 8192, 8192, 8192),
    "model.softcap": (30.0, 30.0, 30.0, 30.0, 30.0),
    "model.embedding_std": (0.005, 0.005, 0.005, 0.005, 0.005),
    "model.rope_base": (10000.0, 22081.8, 10000.0, 10000.0, 10000.0),
    "model.rope_dims": (16, 16, 16, 16, 16),
    "model.xsa_last_layers": (11, 11, 11, 11, 11),
    "model.ln_scale": (True, True, True, True, True),
    "model.skip_gates": (True, True, True, True, True),
    "model.qk_gain_init": (4.0, 5.0, 5.0, 5.0, 5.0),
    "model.loop_start": (4, None, 3, 3, 3),
    "model.loop_end": (5, None, 5, 5, 5),
    "model.loop_extra_passes": (2, 0, 2, 2, 2),
    "model.parallel": ("two_lane", "none", "single", "cross_lane", "cross_lane"),
    "model.parallel_start": (7, None, 7, 8, 8),
    "model.lane_merge": (None, None, None, "mean", "mean"),
    "model.smear": ("none", "channel", "none", "window", "window"),
    "model.smear_window": (None, None, None, 12, 12),
    "model.smear_bos_mask": (None, None, None, False, True),
    "model.gate": ("none", "none", "none", "sparse", "sparse"),
    "model.gate_scale": (None, None, None, 1.0, 0.5),
    "model.attention_span": ("rows", "rows", "rows", "documents", "documents"),
    "model.max_segment": (2048, 2048, 2048, 2048, 2048),
    "model.leaky_slope": (0.5, 0.5, 0.5, 0.5, 0.5),
    "model.norm_dropout_quantile": (0.0, 0.0, 0.0, 0.0, 0.0),
    "batch.tokens_per_step": (786432,) * 5,
    "batch.tokens_per_micro_step": (98304,) * 5,
    "schedule.max_steps": (20000,) * 5,
    "schedule.budget_s": (600.0,) * 5,
    "schedule.reserve_s": (12.0, 0.0, 12.0, 0.5, 0.5),
    "schedule.warmdown": (0.667, 0.667, 0.667, 0.75, 0.85),
    "schedule.min_lr": (0.0, 0.0, 0.0, 0.1, 0.1),
    "schedule.loop_at": (0.5, None, 0.5, 0.35, 0.35),
    "optim.matrix_lr": (0.02, 0.025, 0.02, 0.026, 0.026),
    "optim.embedding_lr": (0.03, 0.035, 0.03, 0.03, 0.03),
    "optim.scalar_lr": (0.02, 0.025, 0.02, 0.02, 0.02),
    "optim.beta1": (0.9,) * 5,
    "optim.beta2": (0.95, 0.95, 0.95, 0.95, 0.99),
    "optim.eps": (1e-8,) * 5,
    "optim.momentum": (0.99, 0.99, 0.97, 0.97, 0.97),
    "optim.momentum_start": (0.92,) * 5,
    "optim.momentum_warmup_steps": (1500,) * 5,
    "optim.momentum_bf16": (False, True, False, True, True),
    "optim.newton_schulz": ("quintic", "quintic", "quintic", "polar_express", "polar_express"),
    "optim.row_normalize": (True, False, True, True, True),
    "optim.normuon": ("none",) * 5,
    "optim.matrix_decay": (0.085, 0.085, 0.085, 0.095, 0.095),
    "optim.embedding_decay": (0.085, 0.085, 0.085, 0.06, 0.085),
    "optim.scalar_decay": (0.02,) * 5,
    "optim.grad_clip": (0.3,) * 5,
    "optim.clip": ("global", "micro", "global", "micro", "micro"),
    "optim.ema_decay": (0.997, 0.997, 0.997, 0.9965, 0.9965),
    "data.loader": ("sequences", "stream", "sequences", "documents", "documents"),
    "artifact.matrix_bits": (6,) * 5,
    "artifact.embedding_bits": (8, 8, 8, 7, 7),
    "artifact.attention_clip": (12.85, 12.85, 12.85, 12.0, 13.0),
    "artifact.mlp_clip": (12.85, 12.85, 12.85, 12.0, 11.5),
    "artifact.embedding_clip": (20.0, 20.0, 20.0, 12.0, 14.0),
    "artifact.rounding": ("gptq",) * 5,
    "artifact.calibration_batches": (64, 256, 64, 16, 16),
    "artifact.low_rank_matrices": (0, 0, 0, 3, 3),
    "artifact.gate_bits": (16, 16, 16, 8, 8),
    "artifact.container": ("brotli", "brotli", "brotli", "lrzip", "lrzip"),
    "artifact.sort_rows": (True,) * 5,
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_constants_are_those_of_the_published_logs(name: str) -> None:
    column = SYSTEMS.index(name)
    for setting, values in TABLE.items():
        part, field = setting.split(".")
        found = getattr(getattr(PRESETS[name], part), field)
        assert values[column] in (None, found), f"{name} {setting}: {found}, published {values[column]}"


BAD = [
    ("batch", {"tokens_per_micro_step": 0}),
    ("model", {"num_heads": 0}),
    ("model", {"max_segment": -5}),
    ("model", {"mlp_hidden": 0}),
    ("model", {"smear_window": 0}),
    ("model", {"softcap": float("nan")}),
    ("model", {"parallel_start": 5}),
    ("model", {"loop_end": 11}),
    ("model", {"asymmetric_softcap": True}),
    ("model", {"softcap": 65.0}),
    ("model", {"parallel_start": 11}),
    ("model", {"qk_impl": "foo"}),
    ("model", {"bos_id": 9999}),
    ("model", {"leaky_slope": float("nan")}),
    ("optim", {"beta2": 1.5}),
    ("optim", {"matrix_lr": -1.0}),
    ("optim", {"grad_clip": 0.0}),
    ("schedule", {"loop_at": 7.0}),
    ("schedule", {"warmup_steps": -1}),
    ("schedule", {"budget_s": float("inf")}),
    ("schedule", {"reserve_s": 600.0}),
    ("data", {"held_out": 1.0}),
    ("data", {"prefetch": 0}),
    ("evaluation", {"sequence_length": 0}),
    ("evaluation", {"budget_s": 0.0}),
    ("artifact", {"matrix_bits": 9}),
    ("run", {"seed": 2**70}),
]


@pytest.mark.parametrize(("part", "change"), BAD, ids=[f"{part}.{next(iter(change))}" for part, change in BAD])
def test_impossible_settings_are_refused_by_name(part: str, change: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(getattr(PRESETS["pr1855"], part), **change)
    message = str(caught.value)
    assert f"{part}.{next(iter(change))}" in message and "\n" not in message


def test_stride_matters_for_sliding_windows_alone() -> None:
    assert EvalConfig(sequence_length=16, stride=64).stride == 64
    with pytest.raises(ConfigError, match=r"evaluation\.stride must be in 1\.\.16: got 64"):
        EvalConfig(method="sliding", sequence_length=16, stride=64)


def test_defaults_are_sound() -> None:
    assert Preset().artifact == ArtifactConfig() and Preset().batch == BatchConfig()
