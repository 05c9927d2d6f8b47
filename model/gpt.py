"""The compact GPT: a small looped transformer over one flat stream of packed documents.

Architecture of PR #1855 / #1934 of the Parameter Golf challenge, with the switches that its relatives (#1477, #1514,
#1423, #1530, #1667, #1736) need. Matrices are stored (out, in). Matrices of one shape live in one bank, which Muon
updates as a batch: qo_bank[i] = W_q and qo_bank[L + i] = W_o of layer i, kv_bank likewise with W_k and W_v.

Precision: banks and control parameters are float32 masters, cast to the activations' dtype at each use (so a looped
layer accumulates its gradient in float32); the tied embedding is kept in the activations' dtype, as published.
Sizes in comments: N tokens, D width, H and G query and key/value heads, d head width, F hidden width, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from niblick.kernels.int6_linear import int6_linear
from niblick.kernels.linear_softcapped_ce import linear_softcapped_ce
from niblick.kernels.softcapped_ce import softcapped_ce, softcapped_ce_ref
from niblick.model.attention import Attend, attend_plain
from niblick.model.config import ConfigError, GPTConfig
from niblick.model.layers import Rotary, channel_smear, drop_largest_norms, leaky_relu_squared, rms_norm
from niblick.model.ops import choose_ops

MAX_GATE_WINDOW = 64  # channels that xsa_gate multiplies by itself; wider gates are a GEMM beforehand
BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")


class PackedMatrix(NamedTuple):
    """A six-bit matrix for inference: packed (R, 3C/4) uint8 and one scale a row (R,)."""

    packed: Tensor
    scale: Tensor


class Step(NamedTuple):
    """One executed layer: which weights, which skip row it pops (or None), whether its output is pushed."""

    layer: int
    skip_row: int | None
    push: bool


def execution_order(config: GPTConfig, looping: bool) -> list[Step]:
    """Virtual layers in order: the encoder half pushes its outputs, the decoder half pops them, last in, first out."""
    layers = _virtual_layers(config, looping)
    n_encoder = len(layers) // 2
    depth, steps = 0, []
    for position, layer in enumerate(layers):
        encoder, row = position < n_encoder, position - n_encoder
        pops = config.skips and not encoder and depth > 0 and row < skip_rows(config)
        steps.append(Step(layer, row if pops else None, encoder and config.skips))
        depth += 1 if encoder else -1 if pops else 0
    return steps


def skip_rows(config: GPTConfig) -> int:
    """Rows of skip parameters: fixed by the looped order, also while looping is off."""
    n = len(_virtual_layers(config, looping=True))
    return min(n // 2, n - n // 2)


def _virtual_layers(config: GPTConfig, looping: bool) -> list[int]:
    layers = list(range(config.num_layers))
    if not (looping and config.loop_extra_passes):
        return layers
    start, end = config.loop_start, config.loop_end + 1
    return layers[:start] + layers[start:end] * (1 + config.loop_extra_passes) + layers[end:]


class GPT(nn.Module):
    """ids (N,) int64 and cu_seqlens (int32, see `attention`) -> hidden states, logits or per-token losses.

    `dtype` is that of the activations and of the embedding: bfloat16 on a GPU, float32 on a CPU, float64 in tests.
    Weights are drawn on the CPU from `seed`, the same on every rank.
    """

    def __init__(self, config: GPTConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.attend: Attend = attend_plain
        self.packed: dict[str, list[PackedMatrix]] = {}
        self._create_parameters(torch.float64 if dtype == torch.float64 else torch.float32)
        self._initialize(torch.Generator().manual_seed(seed))
        self.rotary = Rotary(config)
        self.ops = choose_ops(config)
        self.orders = {looping: execution_order(config, looping) for looping in (False, True)}

    def _create_parameters(self, master: torch.dtype) -> None:
        c = self.config
        L, D, V, Fh = c.num_layers, c.model_dim, c.vocab_size, c.mlp_hidden

        def new(*shape: int, fill: float = 0.0, dtype: torch.dtype = master) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, fill, dtype=dtype))

        self.embedding = new(V, D, dtype=self.dtype)
        self.qo_bank, self.kv_bank = new(2 * L, D, D), new(2 * L, c.kv_dim, D)
        self.mlp_up_bank, self.mlp_down_bank = new(L, Fh, D), new(L, D, Fh)
        self.q_gain = new(L, c.num_heads, fill=c.qk_gain_init)
        self.attn_scale, self.mlp_scale = new(L, D, fill=1.0), new(L, D, fill=1.0)
        self.resid_mix = new(L, 2, D)
        if c.skips:
            self.skip_weights = new(skip_rows(c), D, fill=1.0)
            if c.skip_gates:
                self.skip_gates = new(skip_rows(c), D)
        if c.parallel == "cross_lane":
            self.lane_post, self.lane_resid = new(L, 2, 2, fill=1.0), new(L, 2, fill=1.1)
        if c.parallel == "two_lane":
            self.lane_merge = new(1, fill=0.5)
        if c.gate != "none":
            self.gate_weight = new(L, c.num_heads, D if c.gate.startswith("dense") else c.gate_window)
        if c.gate == "dense_bias":
            self.gate_bias = new(L, c.num_heads, fill=c.gate_bias_init)
        if c.smear == "window":
            self.smear_weight, self.smear_scale = new(c.smear_window), new(1)
        if c.smear == "channel":
            self.smear_channel = new(D)
        if c.asymmetric_softcap:
            self.softcap_positive, self.softcap_negative = new(1, fill=c.softcap), new(1, fill=c.softcap)

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator) -> None:
        """Orthogonal in-projections, zero out-projections; everything rounded to bf16 once, as the masters start."""
        c, L = self.config, self.config.num_layers
        self.embedding.copy_(torch.randn(self.embedding.shape, generator=generator) * c.embedding_std)
        for layer in range(L):
            for matrix in (self.qo_bank[layer], self.kv_bank[layer], self.kv_bank[L + layer], self.mlp_up_bank[layer]):
                matrix.copy_(nn.init.orthogonal_(torch.empty(matrix.shape), generator=generator))
        self.resid_mix[:, 0] = 1.0
        if c.gate == "dense":
            self.gate_weight.copy_(torch.randn(self.gate_weight.shape, generator=generator) * c.gate_init_std)
        for parameter in self.parameters():
            parameter.copy_(parameter.bfloat16())

    # ---- use ---------------------------------------------------------------------------------------------------

    def forward(self, ids: Tensor, targets: Tensor, cu_seqlens: Tensor, looping: bool) -> Tensor:
        """Mean cross-entropy in nats over all N positions, float32 scalar: the training loss."""
        return self._loss(self.hidden(ids, cu_seqlens, looping), targets, "mean")

    def token_losses(self, ids: Tensor, targets: Tensor, cu_seqlens: Tensor, looping: bool = True) -> Tensor:
        """Cross-entropy of every position in nats, (N,) float32."""
        return self._loss(self.hidden(ids, cu_seqlens, looping), targets, "none")

    def head(self, hidden: Tensor) -> Tensor:
        """Raw logits of hidden states, before the softcap: (n, D) -> (n, V)."""
        return F.linear(hidden, self.embedding)

    def _loss(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        c = self.config
        # Upstream gradients a token are beyond the fused head: it sums the embedding's gradient on the way.
        if c.loss_impl == "fused" and (reduction == "mean" or not torch.is_grad_enabled()):
            return linear_softcapped_ce(hidden, self.embedding, targets, c.softcap, reduction=reduction)
        ce = softcapped_ce_ref if c.loss_impl == "reference" else softcapped_ce
        return ce(self.head(hidden), targets, *self.softcaps, reduction=reduction)

    @property
    def softcaps(self) -> tuple[float] | tuple[Tensor, Tensor]:
        """The cap of the logits, or the learned ones for positive and for negative logits."""
        if self.config.asymmetric_softcap:
            return self.softcap_positive, self.softcap_negative
        return (self.config.softcap,)

    def hidden(self, ids: Tensor, cu_seqlens: Tensor, looping: bool = True) -> Tensor:
        """The stream after the final norm, (N, D)."""
        c = self.config
        x0 = self._input(ids, cu_seqlens)
        table = self.rotary(ids.shape[0], cu_seqlens, self.dtype)
        weights = self._weights()
        a, b, stack = x0, None, []
        for step in self.orders[looping]:
            lanes = c.parallel in ("two_lane", "cross_lane") and step.layer >= c.parallel_start
            if lanes and b is None and c.parallel == "cross_lane":
                b = a  # the skip of this first parallel layer reaches lane a alone
            if step.skip_row is not None:
                a = self._skip(a, stack.pop(), step.skip_row)
            if lanes and b is None:
                b = a
            a, b = self._block(step.layer, a, b, x0, table, cu_seqlens, weights)
            if step.push:
                stack.append(a)
        return rms_norm(self._merge(a, b))

    # ---- the parts ---------------------------------------------------------------------------------------------

    def _input(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        c = self.config
        gate = (self.smear_weight, self.smear_scale) if c.smear == "window" else (None, None)
        x = self.ops.embed(ids, self.embedding, *gate, c.bos_id if c.smear_bos_mask else None)
        if c.smear == "channel":
            x = channel_smear(x, self.smear_channel, cu_seqlens)
        return x

    def _skip(self, x: Tensor, skip: Tensor, row: int) -> Tensor:
        skip = self.skip_weights[row].to(x.dtype) * skip
        if not self.config.skip_gates:
            return x + skip
        return torch.lerp(skip, x, torch.sigmoid(self.skip_gates[row].to(x.dtype)))

    def _block(self, layer: int, a: Tensor, b: Tensor | None, x0: Tensor, table, cu_seqlens: Tensor, weights):
        """One layer on the stream a, or on lanes a and b (attention reads a, the MLP reads b)."""
        c = self.config
        scale = (layer + 1) ** -0.5 if c.ln_scale else 1.0
        attn_scale, mlp_scale = self.attn_scale[layer], self.mlp_scale[layer]
        u, n = self.ops.residual(a, x0, self.resid_mix[layer, 0], self.resid_mix[layer, 1], norm_scale=scale)
        attn = self._attention(layer, n, table, cu_seqlens, weights)
        if b is None and not (c.parallel == "single" and layer >= c.parallel_start):
            y, n = self.ops.residual(u, attn, None, attn_scale, norm_scale=scale)
            return _add(y, mlp_scale, self._mlp(layer, n, weights)), None
        if b is None:
            return _add(_add(u, attn_scale, attn), mlp_scale, self._mlp(layer, n, weights)), None
        attn = attn_scale.to(a.dtype) * attn
        m = mlp_scale.to(b.dtype) * self._mlp(layer, rms_norm(b) * scale, weights)
        if c.parallel == "two_lane":
            return u + attn, b + m
        resid, post = self.lane_resid[layer].to(a.dtype), self.lane_post[layer].to(a.dtype)
        return (
            resid[0] * a + post[0, 0] * attn + post[1, 0] * m,
            resid[1] * b + post[0, 1] * attn + post[1, 1] * m,
        )

    def _merge(self, a: Tensor, b: Tensor | None) -> Tensor:
        if b is None:
            return a
        if self.config.parallel == "two_lane":
            return torch.lerp(b, a, self.lane_merge.to(a.dtype))
        return {"mean": (a + b) / 2, "attn": a, "mlp": b}[self.config.lane_merge]

    def _attention(self, layer: int, n: Tensor, table, cu_seqlens: Tensor, weights) -> Tensor:
        c, N = self.config, n.shape[0]
        q_raw = _linear(n, weights["q"][layer])
        k = _linear(n, weights["k"][layer]).view(N, c.num_kv_heads, c.head_dim)
        v = _linear(n, weights["v"][layer]).view(k.shape)
        q, k = self.ops.qk(q_raw.view(N, c.num_heads, c.head_dim), k, *table, self.q_gain[layer])
        y = self.attend(q, k, v, cu_seqlens, c.max_segment)
        y = self._exclude_and_gate(layer, y, v, n if c.gate_input == "hidden" else q_raw)
        return _linear(y.reshape(N, c.model_dim), weights["o"][layer])

    def _exclude_and_gate(self, layer: int, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """XSA where this layer has it, and the head gates, which x (N, D) opens."""
        c = self.config
        value = v if layer >= c.num_layers - c.xsa_last_layers else None
        if c.gate == "none":
            return y if value is None else self.ops.xsa(y, value)
        weight = self.gate_weight[layer]
        scale, amplitude = (c.gate_scale if c.gate == "sparse" else 1.0), (2.0 if c.gate == "output" else 1.0)
        if weight.shape[1] <= MAX_GATE_WINDOW and c.gate != "dense_bias":
            return self.ops.xsa(y, value, x[:, : weight.shape[1]], weight, scale, amplitude=amplitude)
        logits = F.linear(x[:, : weight.shape[1]], weight.to(x.dtype))
        if c.gate == "dense_bias":
            logits = logits + self.gate_bias[layer].to(x.dtype)
        return self.ops.xsa(y, value, gate_scale=scale, gate_logits=logits, amplitude=amplitude)

    def _mlp(self, layer: int, n: Tensor, weights) -> Tensor:
        c, up, down = self.config, weights["up"][layer], weights["down"][layer]
        dropout = self.training and c.norm_dropout_quantile
        if not dropout and not isinstance(up, PackedMatrix) and not isinstance(down, PackedMatrix):
            return self.ops.mlp(n, up.to(n.dtype), down.to(n.dtype), c.leaky_slope)
        h = leaky_relu_squared(_linear(n, up), c.leaky_slope)
        return _linear(drop_largest_norms(h, c.norm_dropout_quantile) if dropout else h, down)

    # ---- weights -----------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, list[Tensor] | list[PackedMatrix]]:
        """Per-role lists of L matrices. `unbind` makes the bank's gradient one stack instead of L sparse sums."""
        banks = {name: self.packed[name] if name in self.packed else getattr(self, name).unbind(0) for name in BANKS}
        L = self.config.num_layers
        return {
            "q": banks["qo_bank"][:L],
            "o": banks["qo_bank"][L:],
            "k": banks["kv_bank"][:L],
            "v": banks["kv_bank"][L:],
            "up": banks["mlp_up_bank"],
            "down": banks["mlp_down_bank"],
        }

    def use_packed(self, bank: str, matrices: list[PackedMatrix]) -> None:
        """Replace a bank by packed six-bit matrices, for inference: the products go through `int6_linear`."""
        if bank not in BANKS or len(matrices) != getattr(self, bank).shape[0]:
            raise ConfigError(f"expected one packed matrix for each of a bank in {BANKS}: got {bank}, {len(matrices)}")
        self.packed[bank] = matrices
        delattr(self, bank)


def _add(x: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    return x + scale.to(x.dtype) * y


def _linear(x: Tensor, weight: Tensor | PackedMatrix) -> Tensor:
    if isinstance(weight, PackedMatrix):
        return int6_linear(x, *weight)
    return F.linear(x, weight.to(x.dtype))
