"""The compact GPT once more, slowly: one small function per mechanism, loops over layers, heads and tokens.

Written from the formulas alone, to be compared with `niblick.model.gpt` in float64. Parameters come in as a dictionary
of float64 tensors under the model's own parameter names; autograd differentiates what is written here.

Notation: N tokens, D width, H query heads, G key/value heads, d head width, F hidden width, V vocabulary, L layers,
P skip rows; i a layer, t a token, h a head; matrices are (out, in). Nothing is rounded, except rotary frequencies and
positions where the configuration asks for it. Architecture: PR #1855 of the challenge and its relatives.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from niblick.model.config import GPTConfig

EPS = 2.0**-23
Parameters = dict[str, Tensor]


# Segments, positions, order of layers.


def segment_starts(ids: list[int], config: GPTConfig) -> list[int]:
    """For each of the N tokens, where its segment starts.

    "rows": a segment is max_segment tokens. "documents": a document starts at token 0 and at every BOS, and is cut
    every max_segment tokens, counted from its own start.
    """
    starts: list[int] = []
    for t, token in enumerate(ids):
        opens = t == 0 or t - starts[-1] == config.max_segment
        if config.attention_span == "documents" and token == config.bos_id:
            opens = True
        starts.append(t if opens else starts[-1])
    return starts


def rope_positions(n_tokens: int, config: GPTConfig) -> Tensor:
    """(N,) float64. "documents": the index in the stream; "rows": the index in the row; bf16-rounded if asked."""
    index = [t % config.max_segment if config.attention_span == "rows" else t for t in range(n_tokens)]
    positions = torch.tensor(index, dtype=torch.float64)
    return positions.bfloat16().double() if config.rope_positions_bf16 else positions


def inverse_frequencies(config: GPTConfig) -> Tensor:
    """(r/2,) float64 for r = rope_dims: f_j = base^(-2j/r), bf16-rounded if asked."""
    frequencies = torch.tensor(
        [config.rope_base ** (-2 * j / config.rope_dims) for j in range(config.rope_dims // 2)], dtype=torch.float64
    )
    return frequencies.bfloat16().double() if config.rope_frequencies_bf16 else frequencies


def layer_order(config: GPTConfig, looping: bool) -> tuple[list[int], list[int]]:
    """Encoder and decoder: 0..a-1, then (1 + K) times a..b, then b+1..L-1; the first floor(n/2) steps encode."""
    order = list(range(config.num_layers))
    if looping and config.loop_extra_passes:
        before, after = order[: config.loop_start], order[config.loop_end + 1 :]
        order = before + (1 + config.loop_extra_passes) * order[config.loop_start : config.loop_end + 1] + after
    return order[: len(order) // 2], order[len(order) // 2 :]


def skip_rows(config: GPTConfig) -> int:
    """P = min(encoder steps, decoder steps) of the looped order, whether or not this pass loops."""
    encoder, decoder = layer_order(config, looping=True)
    return min(len(encoder), len(decoder))


# Pieces without layers.


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + 2^-23) over the last dimension."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


def smear_window(e: Tensor, ids: list[int], weight: Tensor, scale: Tensor, config: GPTConfig) -> Tensor:
    """e'_0 = e_0; e'_t = e_t + m_t λ σ(W·e_t[:12]) e_{t-1}, with m_t = 0 at BOS if masked, else 1. (N, D)."""
    smeared = [e[0]]
    for t in range(1, len(ids)):
        gate = scale[0] * torch.sigmoid(weight @ e[t, : config.smear_window])
        masked = config.smear_bos_mask and ids[t] == config.bos_id
        smeared.append(e[t] if masked else e[t] + gate * e[t - 1])
    return torch.stack(smeared)


def smear_channel(x: Tensor, starts: list[int], theta: Tensor) -> Tensor:
    """x'_t = (1 - c) ⊙ x_t + c ⊙ x_{t-1}, c = σ(θ), and x_{-1} = 0 where a segment starts. (N, D).

    Published for rows (PR #1423), where a segment is a row; with documents the model keeps the same rule.
    """
    c = torch.sigmoid(theta)
    before = [torch.zeros_like(x[t]) if starts[t] == t else x[t - 1] for t in range(len(x))]
    return (1 - c) * x + c * torch.stack(before)


def symmetric_softcap(logits: Tensor, cap: float) -> Tensor:
    """l' = c tanh(l / c)."""
    return cap * torch.tanh(logits / cap)


def asymmetric_softcap(logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """l' = c₊ tanh(l / c₊) where l > 0, else c₋ tanh(l / c₋)."""
    return torch.where(logits > 0, positive * torch.tanh(logits / positive), negative * torch.tanh(logits / negative))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(N, V), (N,) -> (N,): log Σ_v exp(l_v) - l_target, in nats."""
    return torch.stack([torch.logsumexp(row, 0) - row[y] for row, y in zip(logits, targets.tolist(), strict=True)])


# Attention.


def rotate(z: Tensor, positions: Tensor, config: GPTConfig) -> Tensor:
    """(N, heads, d). For j < m = rope_dims/2 and θ = p f_j, the pair (z_j, z_{j+m}) turns by -θ:

    z'_j = z_j cos θ + z_{j+m} sin θ,  z'_{j+m} = -z_j sin θ + z_{j+m} cos θ; dimensions from 2m on stay.
    """
    half = config.rope_dims // 2
    columns = list(z.unbind(-1))
    for j, frequency in enumerate(inverse_frequencies(config)):
        cos, sin = torch.cos(positions * frequency)[:, None], torch.sin(positions * frequency)[:, None]
        low, high = z[..., j], z[..., j + half]
        columns[j] = low * cos + high * sin
        columns[j + half] = -low * sin + high * cos
    return torch.stack(columns, dim=-1)


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One token's queries (H, d) over the S keys and values (S, H, d) it sees: Σ_s softmax_s(q·k_s / sqrt(d)) v_s."""
    scores = (keys * query).sum(-1) / math.sqrt(query.shape[-1])  # (S, H)
    return (torch.softmax(scores, dim=0)[..., None] * values).sum(0)


def exclude_self(y: Tensor, value: Tensor) -> Tensor:
    """XSA: y - (y·v̂) v̂, v̂ = v / max(‖v‖, 1e-12), v the token's own value. (H, d)."""
    direction = value / torch.clamp(torch.sqrt((value * value).sum(-1, keepdim=True)), min=1e-12)
    return y - (y * direction).sum(-1, keepdim=True) * direction


def head_gates(n: Tensor, q: Tensor, params: Parameters, i: int, config: GPTConfig) -> Tensor:
    """(N, H). none: 1; output: 2σ(W u[:w]); sparse: σ(κ W u[:w]); dense: σ(W n); dense_bias: σ(W n + b).

    u is the attention's input n (N, D), or with gate_input="query" the raw query projection q (N, D), w = gate_window.
    """
    if config.gate == "none":
        return n.new_ones(len(n), config.num_heads)
    weight = params["gate_weight"][i]
    window = (q if config.gate_input == "query" else n)[:, : config.gate_window]
    if config.gate == "output":
        return 2 * torch.sigmoid(window @ weight.T)
    if config.gate == "sparse":
        return torch.sigmoid(config.gate_scale * (window @ weight.T))
    if config.gate == "dense":
        return torch.sigmoid(n @ weight.T)
    return torch.sigmoid(n @ weight.T + params["gate_bias"][i])


def attention(n: Tensor, params: Parameters, i: int, starts: list[int], config: GPTConfig) -> Tensor:
    """Attn_i(n), (N, D): project, normalise q and k per head, rotate, gain on q, attend, exclude self, gate, project.

    Head h reads key/value head floor(h G / H); token t sees the tokens starts[t]..t.
    """
    L, H, G, d = config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim
    N = len(n)
    raw_q = n @ params["qo_bank"][i].T
    raw_k = n @ params["kv_bank"][i].T
    v = (n @ params["kv_bank"][L + i].T).reshape(N, G, d)
    positions = rope_positions(N, config)
    q = rotate(rms_norm(raw_q.reshape(N, H, d)), positions, config) * params["q_gain"][i][None, :, None]
    k = rotate(rms_norm(raw_k.reshape(N, G, d)), positions, config)
    gates = head_gates(n, raw_q, params, i, config)
    kv_head = [h * G // H for h in range(H)]
    k, v = k[:, kv_head], v[:, kv_head]  # (N, H, d)
    rows = []
    for t in range(N):
        seen = slice(starts[t], t + 1)
        y = attend(q[t], k[seen], v[seen])
        if i >= L - config.xsa_last_layers:
            y = exclude_self(y, v[t])
        rows.append((gates[t][:, None] * y).reshape(H * d))
    return torch.stack(rows) @ params["qo_bank"][L + i].T


# MLP.


def squared_leaky_relu(h: Tensor, slope: float) -> Tensor:
    """ψ(h) = h² where h > 0, else (slope h)²."""
    return torch.where(h > 0, h, slope * h) ** 2


def norm_dropout(a: Tensor, quantile: float) -> Tensor:
    """(N, F): zero the rows whose norm is at or above the quantile of all N norms (linear interpolation)."""
    norms = torch.sqrt((a * a).sum(-1)).tolist()
    ranked = sorted(norms)
    place = quantile * (len(norms) - 1)
    below = math.floor(place)
    above = min(below + 1, len(norms) - 1)
    threshold = ranked[below] + (place - below) * (ranked[above] - ranked[below])
    return torch.stack([torch.zeros_like(row) if nu >= threshold else row for row, nu in zip(a, norms, strict=True)])


def mlp(n: Tensor, params: Parameters, i: int, config: GPTConfig, training: bool) -> Tensor:
    """MLP_i(n) = W_down ψ(W_up n), (N, D); norm dropout on ψ in training."""
    a = squared_leaky_relu(n @ params["mlp_up_bank"][i].T, config.leaky_slope)
    if training and config.norm_dropout_quantile > 0:
        a = norm_dropout(a, config.norm_dropout_quantile)
    return a @ params["mlp_down_bank"][i].T


# Blocks, skips, lanes.


@dataclass
class Pass:
    """What every block of one forward pass needs."""

    params: Parameters
    config: GPTConfig
    starts: list[int]
    x0: Tensor
    training: bool

    def norm(self, x: Tensor, i: int) -> Tensor:
        """s_i RMSNorm(x), s_i = 1/sqrt(i + 1), or 1 without ln_scale."""
        return rms_norm(x) / math.sqrt(i + 1) if self.config.ln_scale else rms_norm(x)

    def mix(self, x: Tensor, i: int) -> Tensor:
        """u = r_0 ⊙ x + r_1 ⊙ x⁰."""
        r = self.params["resid_mix"][i]
        return r[0] * x + r[1] * self.x0

    def attn(self, x: Tensor, i: int) -> Tensor:
        """α_i ⊙ Attn_i(s_i RMSNorm(x))."""
        out = attention(self.norm(x, i), self.params, i, self.starts, self.config)
        return self.params["attn_scale"][i] * out

    def mlp(self, x: Tensor, i: int) -> Tensor:
        """β_i ⊙ MLP_i(s_i RMSNorm(x))."""
        return self.params["mlp_scale"][i] * mlp(self.norm(x, i), self.params, i, self.config, self.training)


def skip(x: Tensor, s: Tensor, j: int, params: Parameters, config: GPTConfig) -> Tensor:
    """a = w_j ⊙ s, ρ = σ(g_j): x' = a + ρ ⊙ (x - a); without skip gates x' = x + a."""
    a = params["skip_weights"][j] * s
    if not config.skip_gates:
        return x + a
    return a + torch.sigmoid(params["skip_gates"][j]) * (x - a)


def block(x: Tensor, i: int, run: Pass) -> Tensor:
    """u = mix(x), y = u + attn(u), x' = y + mlp(y); "single", from parallel_start on: x' = u + attn(u) + mlp(u)."""
    u = run.mix(x, i)
    if run.config.parallel == "single" and i >= run.config.parallel_start:
        return u + run.attn(u, i) + run.mlp(u, i)
    y = u + run.attn(u, i)
    return y + run.mlp(y, i)


def two_lane_block(A: Tensor, B: Tensor, i: int, run: Pass) -> tuple[Tensor, Tensor]:
    """A' = u_A + attn(u_A), u_A = mix(A); B' = B + mlp(B)."""
    u = run.mix(A, i)
    return u + run.attn(u, i), B + run.mlp(B, i)


def cross_lane_block(A: Tensor, B: Tensor, i: int, run: Pass) -> tuple[Tensor, Tensor]:
    """a = attn(mix(A)), m = mlp(B): A' = r_0 A + p_00 a + p_10 m, B' = r_1 B + p_01 a + p_11 m.

    r = lane_resid[i]; p = lane_post[i], indexed by source (0 attention, 1 MLP) and destination lane.
    """
    a, m = run.attn(run.mix(A, i), i), run.mlp(B, i)
    r, p = run.params["lane_resid"][i], run.params["lane_post"][i]
    return r[0] * A + p[0, 0] * a + p[1, 0] * m, r[1] * B + p[0, 1] * a + p[1, 1] * m


def merge_lanes(A: Tensor, B: Tensor, params: Parameters, config: GPTConfig) -> Tensor:
    """two_lane: μ A + (1 - μ) B. cross_lane: mean (A + B) / 2, attn A, mlp B."""
    if config.parallel == "two_lane":
        return params["lane_merge"] * A + (1 - params["lane_merge"]) * B
    return {"mean": (A + B) / 2, "attn": A, "mlp": B}[config.lane_merge]


def decode(x: Tensor, stack: list[Tensor], decoder: list[int], run: Pass) -> Tensor:
    """The decoder steps. Step j < P pops one encoder output (while there is one) and merges it before its block.

    Lanes open at the first decoder step of a layer from parallel_start on: after its skip for two_lane, before it for
    cross_lane (so that only lane A gets it). Later skips go to lane A.
    """
    config, params = run.config, run.params
    stack = list(stack)
    lanes: tuple[Tensor, Tensor] | None = None
    for j, i in enumerate(decoder):
        in_lanes = config.parallel in ("two_lane", "cross_lane") and i >= config.parallel_start
        assert in_lanes or lanes is None, "the lanes, once open, stay open"
        if in_lanes and lanes is None and config.parallel == "cross_lane":
            lanes = (x, x)
        if config.skips and j < skip_rows(config) and stack:
            s = stack.pop()
            if lanes is None:
                x = skip(x, s, j, params, config)
            else:
                lanes = (skip(lanes[0], s, j, params, config), lanes[1])
        if not in_lanes:
            x = block(x, i, run)
        elif config.parallel == "two_lane":
            lanes = two_lane_block(*(lanes or (x, x)), i, run)
        else:
            lanes = cross_lane_block(*lanes, i, run)
    return x if lanes is None else merge_lanes(*lanes, params, config)


# The whole.


def reference_input(params: Parameters, config: GPTConfig, ids: Tensor) -> Tensor:
    """x⁰ (N, D): RMSNorm of the (window-smeared) embedding, then channel-smeared if the model has that instead."""
    e = params["embedding"][ids]
    if config.smear == "window":
        e = smear_window(e, ids.tolist(), params["smear_weight"], params["smear_scale"], config)
    x0 = rms_norm(e)
    if config.smear == "channel":
        return smear_channel(x0, segment_starts(ids.tolist(), config), params["smear_channel"])
    return x0


def reference_hidden(
    params: Parameters, config: GPTConfig, ids: Tensor, looping: bool, training: bool = False
) -> Tensor:
    """ids (N,) -> z (N, D), the final RMSNorm of the last block's output (or of the merged lanes)."""
    x0 = reference_input(params, config, ids)
    run = Pass(params, config, segment_starts(ids.tolist(), config), x0, training)
    encoder, decoder = layer_order(config, looping)
    x, stack = x0, []
    for i in encoder:
        x = block(x, i, run)
        stack.append(x)
    return rms_norm(decode(x, stack, decoder, run))


def reference_logits(z: Tensor, params: Parameters, config: GPTConfig) -> Tensor:
    """(N, D) -> (N, V): softcap(z Eᵀ), E the embedding."""
    logits = z @ params["embedding"].T
    if config.asymmetric_softcap:
        return asymmetric_softcap(logits, params["softcap_positive"], params["softcap_negative"])
    return symmetric_softcap(logits, config.softcap)


def reference_losses(
    params: Parameters, config: GPTConfig, ids: Tensor, targets: Tensor, looping: bool, training: bool = False
) -> Tensor:
    """ids (N,), targets (N,) -> (N,) cross-entropy in nats, of every token."""
    z = reference_hidden(params, config, ids, looping, training)
    return cross_entropy(reference_logits(z, params, config), targets)
