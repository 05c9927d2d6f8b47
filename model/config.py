"""The typed, frozen configuration of a run: architecture, optimizers, schedule, batch, data, artifact, evaluation.

Validation is in `__post_init__`, so that no object with contradictory settings exists. Sizes are in tokens, times
in seconds, learning rates per step. Presets (`model/presets.py`) are differences from one another.
"""

from dataclasses import dataclass, field
from typing import Literal


class ConfigError(ValueError):
    """A setting that cannot work; the message is one line."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of the compact GPT (PR #1855 of the challenge and its relatives)."""

    vocab_size: int = 8192
    num_layers: int = 11
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_hidden: int = 2048
    embedding_std: float = 0.005
    qk_gain_init: float = 5.0

    softcap: float = 30.0
    asymmetric_softcap: bool = False
    """One learned cap for positive and one for negative logits (PR #1923), used in training and scoring alike."""

    rope_dims: int = 16
    rope_base: float = 10_000.0
    rope_frequencies_bf16: bool = True
    """The published scripts keep the inverse frequencies in a buffer that is cast to bf16 with the module."""
    rope_positions_bf16: bool = False
    """PR #1394 and its descendants also round the positions inside a row."""

    attention_span: Literal["documents", "rows"] = "documents"
    """`documents`: segments start at BOS and every `max_segment` tokens after it; `rows`: every `max_segment`."""
    max_segment: int = 2048
    bos_id: int = 1
    xsa_last_layers: int = 11
    """Exclusive self attention in so many last layers: the output loses its component along the token's own value."""
    ln_scale: bool = True

    smear: Literal["none", "window", "channel"] = "window"
    smear_window: int = 12
    smear_bos_mask: bool = True

    gate: Literal["none", "output", "dense", "sparse", "dense_bias"] = "sparse"
    gate_input: Literal["hidden", "query"] = "hidden"
    gate_window: int = 12
    gate_scale: float = 0.5
    gate_init_std: float = 0.005
    gate_bias_init: float = 2.0

    skips: bool = True
    skip_gates: bool = True
    loop_start: int = 3
    loop_end: int = 5
    loop_extra_passes: int = 2
    """0 switches depth recurrence off; otherwise layers loop_start..loop_end run 1 + loop_extra_passes times."""

    parallel: Literal["none", "single", "two_lane", "cross_lane"] = "cross_lane"
    """`single`: GPT-J style (PR #1412); `two_lane`: PR #1477; `cross_lane`: PR #1530 and later."""
    parallel_start: int = 8
    lane_merge: Literal["mean", "attn", "mlp"] = "mean"

    leaky_slope: float = 0.5
    norm_dropout_quantile: float = 0.0
    """Training only: MLP activations of tokens at or above this quantile of norms are zeroed; 0 is off."""

    attention: Literal["auto", "fa4", "fa3", "fa2", "torch", "plain"] = "auto"
    ce: Literal["kernel", "reference"] = "kernel"
    smear_impl: Literal["kernel", "reference"] = "kernel"

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    def __post_init__(self) -> None:
        _require(
            self.model_dim % self.num_heads == 0,
            f"model.model_dim must be a multiple of model.num_heads: got {self.model_dim} and {self.num_heads}",
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads must be a multiple of model.num_kv_heads: got {self.num_heads} and {self.num_kv_heads}",
        )
        _require(
            0 <= self.rope_dims <= self.head_dim and self.rope_dims % 2 == 0,
            f"model.rope_dims must be even and at most the head width {self.head_dim}: got {self.rope_dims}",
        )
        _require(1 < self.vocab_size <= 131_072, f"model.vocab_size must be in 2..131072: got {self.vocab_size}")
        _require(self.softcap > 0, f"model.softcap must be positive: got {self.softcap}")
        _require(self.loop_extra_passes >= 0, f"model.loop_extra_passes must be >= 0: got {self.loop_extra_passes}")
        if self.loop_extra_passes:
            _require(
                0 <= self.loop_start <= self.loop_end < self.num_layers,
                f"model.loop_start..loop_end must lie in 0..{self.num_layers - 1}: "
                f"got {self.loop_start}..{self.loop_end}",
            )
        if self.parallel in ("two_lane", "cross_lane"):
            # Lanes never close again, and the encoder half pushes one stream: so lanes open after both.
            first = max(self.num_layers // 2, self.loop_end + 1 if self.loop_extra_passes else 0)
            _require(
                self.parallel_start >= first,
                f"model.parallel_start must be at least {first}, in the decoder half and after the loop, for "
                f"model.parallel {self.parallel}: got {self.parallel_start}",
            )
        _require(
            0.0 <= self.norm_dropout_quantile < 1.0,
            f"model.norm_dropout_quantile must be in [0, 1): got {self.norm_dropout_quantile}",
        )
        _require(
            not (self.asymmetric_softcap and self.ce == "kernel"),
            "model.asymmetric_softcap needs model.ce reference: the kernel has one cap",
        )
        _require(
            max(self.smear_window, self.gate_window) <= self.model_dim,
            f"model.smear_window and model.gate_window must be at most model.model_dim {self.model_dim}",
        )


@dataclass(frozen=True)
class OptimConfig:
    """Muon for the banks, AdamW for the embedding and for everything else; decay is decoupled."""

    matrix_lr: float = 0.026
    embedding_lr: float = 0.03
    scalar_lr: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.97
    momentum_start: float = 0.92
    momentum_warmup_steps: int = 1500
    momentum_bf16: bool = True
    newton_schulz: Literal["polar_express", "quintic"] = "polar_express"
    row_normalize: bool = True
    normuon: Literal["none", "rows", "adaptive"] = "none"
    """`rows`: stateless row normalisation after Newton-Schulz; `adaptive`: the published second-moment form."""
    normuon_beta2: float = 0.9
    matrix_decay: float = 0.095
    embedding_decay: float = 0.06
    scalar_decay: float = 0.02
    grad_clip: float = 0.3
    clip: Literal["micro", "global"] = "micro"
    """`micro`: each rank's micro-step gradient before any averaging (PR #1530 on); `global`: the averaged gradient."""
    ema_decay: float = 0.9965

    def __post_init__(self) -> None:
        _require(self.grad_clip > 0, f"optim.grad_clip must be positive: got {self.grad_clip}")
        _require(0 <= self.ema_decay < 1, f"optim.ema_decay must be in [0, 1): got {self.ema_decay}")


@dataclass(frozen=True)
class ScheduleConfig:
    """All fractions are of the training clock, `budget_s - reserve_s` seconds."""

    budget_s: float = 600.0
    reserve_s: float = 0.5
    max_steps: int = 20_000
    warmdown: float = 0.75
    min_lr: float = 0.1
    loop_at: float = 0.35
    warmup_steps: int = 20
    """Full steps per loop mode before the clock starts; weights, optimizers and data position are then restored."""

    def __post_init__(self) -> None:
        _require(
            self.budget_s > self.reserve_s >= 0,
            f"schedule.budget_s must exceed schedule.reserve_s: got {self.budget_s} and {self.reserve_s}",
        )
        _require(0 < self.warmdown <= 1, f"schedule.warmdown must be in (0, 1]: got {self.warmdown}")
        _require(self.max_steps > 0, f"schedule.max_steps must be positive: got {self.max_steps}")


@dataclass(frozen=True)
class BatchConfig:
    tokens_per_step: int = 786_432
    tokens_per_micro_step: int = 98_304
    """Per rank. Accumulation is tokens_per_step / (tokens_per_micro_step x ranks) and must come out whole."""

    def accumulation(self, world_size: int) -> int:
        once = self.tokens_per_micro_step * world_size
        _require(
            self.tokens_per_step % once == 0 and self.tokens_per_step >= once,
            f"batch.tokens_per_step must be a multiple of tokens_per_micro_step x ranks = "
            f"{self.tokens_per_micro_step} x {world_size}: got {self.tokens_per_step}",
        )
        return self.tokens_per_step // once


@dataclass(frozen=True)
class DataConfig:
    source: str = "stdlib"
    """`stdlib` (the interpreter's own library), a folder of text, a .jsonl[.gz|.xz] file, or a folder of shards."""
    tokenizer: str = ""
    """A ready SentencePiece model; empty: one is trained on the training documents (text) or found (shards)."""
    loader: Literal["documents", "sequences", "stream"] = "documents"
    order: Literal["name", "compressible_first", "compressible_last"] = "name"
    held_out: float = 0.05
    max_val_tokens: int = 0
    """Cuts the held-out stream; 0 keeps all of it."""
    shard_tokens: int = 10_000_000
    cache: str = "cache"
    prefetch: int = 2


@dataclass(frozen=True)
class ArtifactConfig:
    """SDClip (PR #1394): a row's step is clip x standard deviation / (2^(bits-1) - 1)."""

    matrix_bits: int = 6
    embedding_bits: int = 7
    attention_clip: float = 13.0
    mlp_clip: float = 11.5
    embedding_clip: float = 14.0
    cap_bytes: int = 16_000_000

    def __post_init__(self) -> None:
        for name in ("matrix_bits", "embedding_bits"):
            bits = getattr(self, name)
            _require(2 <= bits <= 8, f"artifact.{name} must be in 2..8: got {bits}")
        for name in ("attention_clip", "mlp_clip", "embedding_clip"):
            _require(getattr(self, name) > 0, f"artifact.{name} must be positive: got {getattr(self, name)}")


@dataclass(frozen=True)
class EvalConfig:
    sequence_length: int = 2048
    stride: int = 64
    tokens_per_batch: int = 65_536
    budget_s: float = 600.0


@dataclass(frozen=True)
class RunConfig:
    """Where and how; nothing here changes the mathematics, except the seed."""

    seed: int = 42
    out: str = "runs/latest"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 on a GPU, fp32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """`auto`: torch.compile on a GPU, eager on a CPU."""
    checkpoint_every_s: float = 0.0
    """Seconds of the training clock between checkpoints, 0: none. Writing one counts against the budget."""
    resume: bool = False
    """Go on from the checkpoint in `out`."""


@dataclass(frozen=True)
class Preset:
    model: GPTConfig = field(default_factory=GPTConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    artifact: ArtifactConfig = field(default_factory=ArtifactConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
