"""The compact GPT: a small looped transformer over one flat stream of packed documents.

Architecture of PR #1855 / #1934 of the Parameter Golf challenge, with the switches that its relatives (#1477, #1514,
#1423, #1530, #1667, #1736) need. Matrices are stored (out, in). Matrices of one shape live in one bank, which Muon
updates as a batch: qo_bank[i] = W_q and qo_bank[L + i] = W_o of layer i, kv_bank likewise with W_k and W_v.

Precision: banks and control parameters are float32 masters. The matrices of a step are cast to the activations' dtype
at each use, which torch.compile does once for all uses, while a looped layer still sums its gradient in float32; the
tied embedding is kept in the activations' dtype, as published.
Passes over memory: the layer scales are folded into the rows of the projections before them, queries, keys and values
are one projection, and what a block adds last (its MLP) is summed in the next block's first pass (`Stream`).
Sizes in comments: N tokens, D width, H and G query and key/value heads, d head width, F hidden width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from niblick.kernels.int6_linear import int6_linear
from niblick.kernels.linear_softcapped_ce import linear_softcapped_ce
from niblick.kernels.softcapped_ce import softcapped_ce, softcapped_ce_ref
from niblick.model.attention import Attend, attend_plain, attend_some
from niblick.model.config import ConfigError, GPTConfig
from niblick.model.layers import (
    Rotary,
    channel_smear,
    drop_largest_norms,
    leaky_relu_squared,
    mix_lanes,
    mix_skip,
    rms_norm,
)
from niblick.model.ngram_tables import NgramBias
from niblick.model.ops import choose_ops

MAX_GATE_WINDOW = 64  # channels that xsa_gate multiplies by itself; wider gates are a GEMM beforehand
BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")


class PackedMatrix(NamedTuple):
    """A six-bit matrix for inference: packed (R, 3C/4) uint8 and one scale a row (R,)."""

    packed: Tensor
    scale: Tensor


class Stream(NamedTuple):
    """The residual stream x + addend, not yet summed: the next block does so on its way."""

    x: Tensor
    addend: Tensor | None = None

    def sum(self) -> Tensor:
        return self.x if self.addend is None else self.x + self.addend


class Adapter(Protocol):
    """What test-time training puts into the forward: its own version of a layer's three products. `slot` counts the
    executed layers, so each pass of a looped layer may have its own."""

    weights: dict[str, list]
    """As `GPT.weights` gives them."""

    def project(self, slot: int, n: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values of the attention's input n (N, D), and what `output` is to be given."""

    def output(self, slot: int, y: Tensor, weight: Tensor, low: Tensor | None) -> Tensor:
        """The attention's output of its heads y (N, D), in the stream's scale."""

    def mlp(self, slot: int, n: Tensor, mlp: Callable[[Tensor], Tensor]) -> Tensor:
        """The MLP's output of its input n (N, D); `mlp` gives that by the weights alone."""


class Shared(NamedTuple):
    """What every layer reads: the input x0 (N, D), rotary tables, segments and the longest that there may be, the
    step's matrices by role, and the adapter, if any."""

    x0: Tensor
    table: tuple[Tensor, Tensor]
    cu_seqlens: Tensor
    max_segment: int
    weights: dict[str, list]
    adapter: Adapter | None


class Step(NamedTuple):
    """One executed layer: which weights, which skip row it pops (or None), whether its output is pushed, its place in
    the order, and the positions (R, c) that alone are wanted of it, if not all are: of others it makes keys and values
    only. So it is with the last one, where not all are wanted of the model."""

    layer: int
    skip_row: int | None
    push: bool
    slot: int
    wanted: Tensor | None = None

    def cut(self, *streams: Tensor | None) -> list[Tensor | None]:
        """Of streams (N, ...), where there is one, what is wanted, (R c, ...)."""
        if self.wanted is None:
            return list(streams)
        return [x if x is None else x.index_select(0, self.wanted.flatten()) for x in streams]


def execution_order(config: GPTConfig, looping: bool) -> list[Step]:
    """Virtual layers in order: the encoder half pushes its outputs, the decoder half pops them, last in, first out."""
    layers = _virtual_layers(config, looping)
    n_encoder = len(layers) // 2
    depth, steps = 0, []
    for position, layer in enumerate(layers):
        encoder, row = position < n_encoder, position - n_encoder
        pops = config.skips and not encoder and depth > 0 and row < skip_rows(config)
        steps.append(Step(layer, row if pops else None, encoder and config.skips, position))
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
    `fp8`: in training mode the MLP and the head multiply in eight bits (see their kernels).
    Weights are drawn on the CPU from `seed`, the same on every rank.
    """

    def __init__(
        self, config: GPTConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32, fp8: bool = False
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.fp8 = config, dtype, fp8
        self.attend: Attend = attend_plain
        self.packed: dict[str, list[PackedMatrix | Tensor]] = {}
        self.observe: Callable[[str, int, Tensor], None] | None = None
        """Called with (what, layer, x) for every x (N, C) that a layer's matrices multiply: for `artifact.hessians`."""
        self.ngram_bias: NgramBias | None = None
        """Added to the capped logits of every loss, where there is one."""
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

    def forward(
        self, ids: Tensor, targets: Tensor, cu_seqlens: Tensor, looping: bool, row_starts: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy in nats over all N positions, float32 scalar: the training loss."""
        hidden = self.hidden(ids, cu_seqlens, looping, row_starts=row_starts)
        return self._loss(hidden, targets, "mean", ids, cu_seqlens)

    def token_losses(self, ids: Tensor, targets: Tensor, cu_seqlens: Tensor, looping: bool = True) -> Tensor:
        """Cross-entropy of every position in nats, (N,) float32."""
        return self._loss(self.hidden(ids, cu_seqlens, looping), targets, "none", ids, cu_seqlens)

    def head(self, hidden: Tensor) -> Tensor:
        """Raw logits of hidden states, before the softcap: (n, D) -> (n, V)."""
        return F.linear(hidden, self.embedding)

    def _loss(self, hidden: Tensor, targets: Tensor, reduction: str, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        c = self.config
        if self.ngram_bias is not None:
            rows, reference = self.ngram_bias(ids, cu_seqlens), c.loss_impl == "reference"
            return self.ngram_bias.loss(
                self.head(hidden), targets, *rows, c.softcap, reference=reference, reduction=reduction
            )
        # Upstream gradients a token are beyond the fused head: it sums the embedding's gradient on the way.
        if c.loss_impl == "fused" and (reduction == "mean" or not torch.is_grad_enabled()):
            fp8 = self.fp8 and self.training
            return linear_softcapped_ce(hidden, self.embedding, targets, c.softcap, reduction=reduction, fp8=fp8)
        ce = softcapped_ce_ref if c.loss_impl == "reference" else softcapped_ce
        return ce(self.head(hidden), targets, *self.softcaps, reduction=reduction)

    @property
    def softcaps(self) -> tuple[float] | tuple[Tensor, Tensor]:
        """The cap of the logits, or the learned ones for positive and for negative logits."""
        if self.config.asymmetric_softcap:
            return self.softcap_positive, self.softcap_negative
        return (self.config.softcap,)

    def hidden(
        self,
        ids: Tensor,
        cu_seqlens: Tensor,
        looping: bool = True,
        *,
        row_starts: Tensor | None = None,
        max_segment: int | None = None,
        wanted: Tensor | None = None,
        adapter: Adapter | None = None,
    ) -> Tensor:
        """The stream after the final norm, (N, D).

        row_starts: positions (R,) int64 before which the smear gate sees nothing, as at the stream's start.
        max_segment: the longest segment there is, where that is not the model's. wanted: (R, c) int64, the only
        positions whose result is given, (R c, D): c of each segment, where these are R of one width.
        """
        c = self.config
        x0 = self._input(ids, cu_seqlens, row_starts)
        table = self.rotary(ids.shape[0], cu_seqlens, self.dtype, relative=row_starts is not None)
        weights = adapter.weights if adapter else self.weights
        shared = Shared(x0, table, cu_seqlens, max_segment or c.max_segment, weights, adapter)
        *order, last = self.orders[looping]
        one_lane, two_lanes = self._split([*order, last._replace(wanted=wanted)])
        stream, stack = Stream(x0), []
        for step in one_lane:
            stream = self._block(step, stream, stack, shared)
            if step.push:
                stack.append(None)  # the stream itself, which the next block sums
        a = stream.sum()
        if two_lanes:
            a = self._lanes(two_lanes, a, [a if skip is None else skip for skip in stack], shared)
        return rms_norm(a)

    # ---- the parts ---------------------------------------------------------------------------------------------

    def _split(self, order: list[Step]) -> tuple[list[Step], list[Step]]:
        """The steps before and after the stream divides in two lanes, which it does for good (see GPTConfig)."""
        lanes = [
            self.config.parallel in ("two_lane", "cross_lane") and s.layer >= self.config.parallel_start for s in order
        ]
        first = lanes.index(True) if True in lanes else len(order)
        return order[:first], order[first:]

    def _input(self, ids: Tensor, cu_seqlens: Tensor, row_starts: Tensor | None) -> Tensor:
        c = self.config
        gate = (self.smear_weight, self.smear_scale) if c.smear == "window" else (None, None)
        x = self.ops.embed(ids, self.embedding, *gate, c.bos_id if c.smear_bos_mask else None)
        if c.smear == "window" and row_starts is not None:
            x = x.index_copy(0, row_starts, self.ops.embed(ids[row_starts], self.embedding, None, None, None))
        if c.smear == "channel":
            x = channel_smear(x, self.smear_channel, cu_seqlens)
        return x

    def _block(self, step: Step, stream: Stream, stack: list[Tensor | None], shared: Shared) -> Stream:
        """One layer on one lane. What it pops comes off the stack, what it sums goes into its place there."""
        c, layer = self.config, step.layer
        mix, x0_mix = self.resid_mix[layer]
        skip, skip_mix = None, None
        if step.skip_row is not None:
            skip, kept, skip_mix = stack.pop(), *self._skip_mix(step.skip_row)
            mix, skip_mix = mix * kept, mix * skip_mix
            if skip is None:  # the top of the stack is the stream itself
                mix, skip_mix = mix + skip_mix, None
        keep = len(stack) > 0 and stack[-1] is None
        sums = self.ops.residual(
            stream.x, shared.x0, mix, x0_mix, skip, skip_mix,
            addend=stream.addend, return_sum=keep, head=self.gate_head, norm_scale=self._norm_scale(layer),
        )  # fmt: skip
        u, n = sums[:2]
        if keep:
            stack[-1] = sums[2]
        attn = self._attention(step, n, sums[-1] if self.gate_head else None, shared)
        u, n = step.cut(u, n)
        if c.parallel == "single" and layer >= c.parallel_start:
            return Stream(u + attn, self._adapted_mlp(step, n, shared))
        y, n = self.ops.residual(u, attn, norm_scale=self._norm_scale(layer))
        return Stream(y, self._adapted_mlp(step, n, shared))

    def _norm_scale(self, layer: int) -> float:
        return (layer + 1) ** -0.5 if self.config.ln_scale else 1.0

    def _skip_mix(self, row: int) -> tuple[Tensor | float, Tensor]:
        """Per channel, the share of the stream and the share of the popped output, as `lerp` has it or a plain sum."""
        weight = self.skip_weights[row]
        if not self.config.skip_gates:
            return 1.0, weight
        kept = torch.sigmoid(self.skip_gates[row])
        return kept, (1 - kept) * weight

    def _lanes(self, order: list[Step], a: Tensor, stack: list[Tensor], shared: Shared) -> Tensor:
        """The last layers on two lanes: attention reads a, the MLP reads b."""
        c, b = self.config, a
        for place, step in enumerate(order):
            if step.skip_row is not None:
                kept, weight = self._skip_mix(step.skip_row)
                a = mix_skip(a, stack.pop(), kept, weight)
                if not place and c.parallel == "two_lane":
                    b = a  # cross_lane: the skip of the first parallel layer reaches lane a alone
            a, b = self._lane_block(step, a, b, shared)
            if step.push:
                stack.append(a)
        if c.parallel == "two_lane":
            return torch.lerp(b, a, self.lane_merge.to(a.dtype))
        return {"mean": (a + b) / 2, "attn": a, "mlp": b}[c.lane_merge]

    def _lane_block(self, step: Step, a: Tensor, b: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        layer, scale = step.layer, self._norm_scale(step.layer)
        sums = self.ops.residual(a, shared.x0, *self.resid_mix[layer], head=self.gate_head, norm_scale=scale)
        u, n = sums[:2]
        attn = self._attention(step, n, sums[-1] if self.gate_head else None, shared)
        u, a, b = step.cut(u, a, b)
        m = self._adapted_mlp(step, rms_norm(b) * scale, shared)
        if self.config.parallel == "two_lane":
            return u + attn, b + m
        return mix_lanes(a, b, attn, m, self.lane_resid[layer], self.lane_post[layer])

    def _attention(self, step: Step, n: Tensor, head: Tensor | None, shared: Shared) -> Tensor:
        """`head`: the first channels of n, where they open the gates."""
        c, layer, adapter = self.config, step.layer, shared.adapter
        qkv, o = shared.weights["qkv"][layer], shared.weights["o"][layer]
        qkv, low = adapter.project(step.slot, n, qkv) if adapter else (_linear(n, qkv), None)
        heads = qkv.view(-1, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        q, k, v = self.ops.qk(heads, None, *shared.table, self.q_gain[layer], kv_heads=c.num_kv_heads)
        opener = qkv[:, : c.model_dim] if c.gate_input == "query" else n if head is None else head
        q, own, opener, low = step.cut(q, v, opener, low)
        if step.wanted is None:
            y = self.attend(q, k, v, shared.cu_seqlens, shared.max_segment)
        else:
            y = attend_some(q, k, v, step.wanted)
        y = self._exclude_and_gate(layer, y, own, opener).reshape(-1, c.model_dim)
        if self.observe:
            self.observe("attn_in", layer, n)
            self.observe("attn_out", layer, y)
        return adapter.output(step.slot, y, o, low) if adapter else _linear(y, o)

    @property
    def gate_head(self) -> int:
        """Channels of a normed stream that are wanted apart, because a narrow gate reads them; or 0.

        A few more than it reads, where need be: rows of 16 bytes are read in one piece (0.103 instead of 0.124 ms
        for the backward of the gates, NVIDIA H200).
        """
        c = self.config
        narrow = c.gate in ("output", "sparse") and c.gate_input == "hidden" and c.gate_window <= MAX_GATE_WINDOW
        return min(-(-c.gate_window // 8) * 8, c.model_dim) if narrow else 0

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

    def _adapted_mlp(self, step: Step, n: Tensor, shared: Shared) -> Tensor:
        mlp = partial(self._mlp, step.layer, weights=shared.weights)
        return shared.adapter.mlp(step.slot, n, mlp) if shared.adapter else mlp(n)

    def _mlp(self, layer: int, n: Tensor, weights: dict[str, list]) -> Tensor:
        c, up, down = self.config, weights["up"][layer], weights["down"][layer]
        dropout = self.training and c.norm_dropout_quantile
        packed = isinstance(up, PackedMatrix) or isinstance(down, PackedMatrix)
        if not dropout and not packed and not self.observe:
            return self.ops.mlp(n, up.to(n.dtype), down.to(n.dtype), c.leaky_slope, fp8=self.fp8 and self.training)
        h = leaky_relu_squared(_linear(n, up), c.leaky_slope)
        if self.observe:
            self.observe("mlp_in", layer, n)
            self.observe("mlp_hidden", layer, h)
        return _linear(drop_largest_norms(h, c.norm_dropout_quantile) if dropout else h, down)

    # ---- weights -----------------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, list]:
        """Per-role lists of L matrices, the layer scales in the rows of `o` and `down`.

        `unbind` makes the bank's gradient one stack instead of L sparse sums. A fused projection is one matrix, or the
        tuple of its parts where any of them is packed.
        """
        L = self.config.num_layers
        qo, kv, up, down = (self.packed[name] if name in self.packed else getattr(self, name) for name in BANKS)
        if isinstance(qo, Tensor) and isinstance(kv, Tensor):
            qkv = torch.cat((qo[:L], kv[:L], kv[L:]), dim=1).unbind(0)
        else:
            qkv = list(zip(qo[:L], kv[:L], kv[L:], strict=True))
        o, down = _scale_rows(qo[L:], self.attn_scale), _scale_rows(down, self.mlp_scale)
        return {"qkv": qkv, "o": o, "up": up.unbind(0) if isinstance(up, Tensor) else up, "down": down}

    def use_packed(self, bank: str, matrices: list[PackedMatrix | Tensor]) -> None:
        """Replace a bank by packed six-bit matrices, for inference: the products go through `int6_linear`.

        Single ones may stay as they are, (R, C): those whose weights are more than integers and steps.
        """
        if bank not in BANKS or len(matrices) != getattr(self, bank).shape[0]:
            raise ConfigError(f"expected one packed matrix for each of a bank in {BANKS}: got {bank}, {len(matrices)}")
        self.packed[bank] = matrices
        delattr(self, bank)


def _scale_rows(bank: Tensor | list[PackedMatrix | Tensor], scale: Tensor) -> list[PackedMatrix | Tensor]:
    """The L matrices of a bank, the rows of each times its row of `scale` (L, R)."""
    if isinstance(bank, Tensor):
        return list((bank * scale[:, :, None]).unbind(0))
    return [
        m * s[:, None] if isinstance(m, Tensor) else PackedMatrix(m.packed, m.scale.float() * s)
        for m, s in zip(bank, scale.float(), strict=True)
    ]


def _linear(x: Tensor, weight: Tensor | PackedMatrix | tuple) -> Tensor:
    if isinstance(weight, PackedMatrix):
        return int6_linear(x, *weight)
    if isinstance(weight, tuple):
        return torch.cat([_linear(x, part) for part in weight], dim=-1)
    return F.linear(x, weight.to(x.dtype))
