"""The presets: each published system as its difference from another, and `demo`: small, the records' mechanisms on.

Constants come from the logs of the named pull requests of the Parameter Golf challenge; where a log and its README
disagree, the log is followed.
"""

from dataclasses import replace

from niblick.model.config import (
    ArtifactConfig,
    BatchConfig,
    DataConfig,
    EvalConfig,
    GPTConfig,
    Preset,
    RunConfig,
)

PR1934 = Preset(
    model=GPTConfig(smear_bos_mask=False, gate_scale=1.0),
    artifact=ArtifactConfig(
        attention_clip=12.0, mlp_clip=12.0, embedding_clip=12.0, gate_bits=8, low_rank_matrices=3, container="lrzip"
    ),
    run=RunConfig(device="cuda"),
)

PR1855 = replace(
    PR1934,
    model=replace(PR1934.model, smear_bos_mask=True, gate_scale=0.5),
    optim=replace(PR1934.optim, beta2=0.99, embedding_decay=0.085),
    schedule=replace(PR1934.schedule, warmdown=0.85),
    artifact=replace(PR1934.artifact, attention_clip=13.0, mlp_clip=11.5, embedding_clip=14.0),
)

PR1514 = replace(
    PR1934,
    model=replace(
        PR1934.model,
        smear="none",
        gate="none",
        attention_span="rows",
        rope_positions_bf16=True,
        parallel="single",
        parallel_start=7,
    ),
    optim=replace(
        PR1934.optim,
        matrix_lr=0.02,
        newton_schulz="quintic",
        momentum_bf16=False,
        matrix_decay=0.085,
        embedding_decay=0.085,
        clip="global",
        ema_decay=0.997,
    ),
    schedule=replace(PR1934.schedule, reserve_s=12.0, warmdown=0.667, min_lr=0.0, loop_at=0.5),
    data=DataConfig(loader="sequences"),
    artifact=ArtifactConfig(
        embedding_bits=8,
        attention_clip=12.85,
        mlp_clip=12.85,
        embedding_clip=20.0,
        calibration_batches=64,
        container="brotli",
    ),
)

PR1477 = replace(
    PR1514,
    model=replace(PR1514.model, qk_gain_init=4.0, loop_start=4, parallel="two_lane"),
    optim=replace(PR1514.optim, momentum=0.99),
)

PR1423 = replace(
    PR1477,
    model=replace(
        PR1477.model,
        qk_gain_init=5.0,
        loop_extra_passes=0,
        parallel="none",
        smear="channel",
        rope_base=22_081.8,
        rope_frequencies_bf16=False,
        rope_positions_bf16=False,
    ),
    optim=replace(
        PR1477.optim,
        matrix_lr=0.025,
        embedding_lr=0.035,
        scalar_lr=0.025,
        row_normalize=False,
        momentum_bf16=True,
        clip="micro",
    ),
    schedule=replace(PR1477.schedule, reserve_s=0.0),
    data=DataConfig(loader="stream"),
    artifact=replace(PR1477.artifact, calibration_batches=256),
)

DEMO = replace(
    PR1855,
    model=replace(
        PR1855.model,
        vocab_size=1024,
        num_layers=6,
        model_dim=128,
        num_heads=4,
        num_kv_heads=2,
        mlp_hidden=512,
        max_segment=512,
        loop_start=2,
        loop_end=3,
        loop_extra_passes=1,
        parallel_start=4,
        embedding_std=0.02,
        norm_dropout_quantile=0.99,
    ),
    schedule=replace(PR1855.schedule, budget_s=90.0, reserve_s=3.0, warmup_steps=1),
    optim=replace(PR1855.optim, ema_decay=0.97),  # an average over tens of steps: a run has a few hundred
    batch=BatchConfig(tokens_per_step=2048, tokens_per_micro_step=2048),
    data=DataConfig(max_val_tokens=100_000),
    artifact=replace(PR1855.artifact, container="niblick", calibration_batches=2, calibration_tokens=8192),
    evaluation=EvalConfig(sequence_length=512, stride=128, tokens_per_batch=8192),
    run=RunConfig(checkpoint_every_s=30.0),
)

PRESETS = {
    "demo": DEMO,
    "pr1477": PR1477,
    "pr1423": PR1423,
    "pr1514": PR1514,
    "pr1934": PR1934,
    "pr1855": PR1855,
}
