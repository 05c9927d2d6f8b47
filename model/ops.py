"""Which implementation of each operation a model runs: niblick's kernel, or its reference in plain PyTorch."""

from collections.abc import Callable
from typing import NamedTuple

from niblick.kernels.embed_smear_norm import embed_smear_norm, embed_smear_norm_ref
from niblick.kernels.leaky_relu_sq_mlp import leaky_relu_sq_mlp, leaky_relu_sq_mlp_ref
from niblick.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from niblick.kernels.residual_norm import residual_norm, residual_norm_ref
from niblick.kernels.xsa_gate import xsa_gate, xsa_gate_ref
from niblick.model.config import GPTConfig


class Ops(NamedTuple):
    embed: Callable
    residual: Callable
    qk: Callable
    xsa: Callable
    mlp: Callable


def choose_ops(config: GPTConfig) -> Ops:
    pairs = {
        "embed": (embed_smear_norm, embed_smear_norm_ref),
        "residual": (residual_norm, residual_norm_ref),
        "qk": (qk_norm_rope, qk_norm_rope_ref),
        "xsa": (xsa_gate, xsa_gate_ref),
        "mlp": (leaky_relu_sq_mlp, leaky_relu_sq_mlp_ref),
    }
    impl = ("kernel", "reference")
    return Ops(**{name: pair[impl.index(getattr(config, f"{name}_impl"))] for name, pair in pairs.items()})
