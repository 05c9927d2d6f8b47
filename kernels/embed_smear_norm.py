"""The input of the network in one pass: embedding, smear gate, RMSNorm without weight.

    x_t = table[token_ids_t],    h_t = x_t + g_t x_{t-1},    y_t = r_t h_t,    r_t = 1 / sqrt(mean(h_t²) + eps)
    g_t = m_t λ s_t,    s_t = σ(w · x_t[:W]),    m_t = [t >= 1 and token_ids_t != bos_id]    (no smear: g = 0)

with  c_t = r_t² mean(dy_t h_t),  dh_t = r_t (dy_t - c_t h_t),  a_t = m_t dh_t · x_{t-1},  u_t = λ s_t (1 - s_t) a_t:
dx_t = dh_t + g_{t+1} dh_{t+1}, and on the first W channels + u_t w;    dtable_v = Σ_{t: token_ids_t = v} dx_t;
dw = Σ_t u_t x_t[:W];    dλ = Σ_t s_t a_t

σ is the logistic function, λ the argument `smear_scale`. The mask keeps a document's first token (BOS) from taking in
the last token of the document before it.

The gradient of the table takes the tokens in the order of their ids (a stable sort): x_t and s_t are then the same over
a run of equal ids, and dx, whose rows are made from dy and the table again, is never in memory. A program sums a fixed
number of sorted tokens. A run inside them is stored at once; one that crosses their ends leaves float32 parts, which a
second kernel adds from first to last. So a frequent id is the work of many programs, there are no atomics, all sums
have a fixed order and repeat bitwise, and dtable is rounded once.

Shapes: token_ids (N,) int64 or int32; table (V, D), y (N, D) bfloat16, float16 or float32; channels of the table
adjacent, any row stride; smear_weight (W,), W <= D, and smear_scale (1,) in any of these dtypes. Everything in between
is float32, for a float32 table float64. A float64 table runs on CPU only, in plain PyTorch. An id outside [0, V) makes
its row NaN, and the next one that takes it in; no row of dtable is its own.
Must move: forward reads ids and table, which stays in cache, and writes y; backward reads dy and writes dtable. As each
row of dy is read for two tokens, half of them at random places, it is up to twice that.
Replaces: an embedding, a linear layer, sigmoid, comparison, concatenation, arithmetic, an RMSNorm; atomic additions.
Refuses: other dtypes, channels that are not adjacent, W > D, token ids that are not integers.
From: the embedding of modded-nanogpt, the smear gate of PR #1667 of the challenge with the mask of PR #1851.
"""

import re
from collections.abc import Callable
from functools import wraps

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

# A lifted copy has ops of its own, so that it may stand beside the package.
NAMESPACE = "niblick" if __name__.startswith("niblick.") else "niblick_" + re.sub(r"\W", "_", __name__, flags=re.A)
# NVIDIA H200, 2026-11-20. A warp holds `elements` of a 16-bit row. Forward: rows a program (1: 60 % longer). Backward:
# sorted tokens a program, and a limit on registers for 16-bit rows that lets 12 programs share a multiprocessor: the
# 1,536 programs of 98,304 tokens then run at once (60 tokens, 1,639 programs: 25 % longer; 96: 13 %; no limit: 6 %).
LAUNCH = {
    "forward": {"rows": 2, "elements": 512},
    "backward": {"tokens": 64, "elements": 512, "maxnreg": 168},
}


def embed_smear_norm_ref(
    token_ids: Tensor,
    table: Tensor,
    smear_weight: Tensor | None = None,
    smear_scale: Tensor | None = None,
    bos_id: int | None = 1,
    *,
    eps: float = 2.0**-23,
) -> Tensor:
    """The specification, in float32 or, for a float64 table, in float64."""
    wide = torch.promote_types(table.dtype, torch.float32)
    valid = (token_ids >= 0) & (token_ids < len(table))
    h = torch.where(valid[:, None], table.to(wide)[torch.where(valid, token_ids, 0).long()], torch.nan)
    if smear_weight is not None:
        s = torch.sigmoid(h[:, : len(smear_weight)] @ smear_weight.to(wide))
        m = torch.ones_like(valid) if bos_id is None else token_ids.long() != bos_id
        previous = torch.cat((torch.zeros_like(h[:1]), h[:-1]))
        h = h + torch.where(m[:, None], (smear_scale.to(wide) * s)[:, None] * previous, 0.0)
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(table.dtype)


@triton.jit
def _embed_smear_norm_fwd_kernel(
    token_ids_ptr,  # (N,)
    table_ptr,  # (V, D)
    weight_ptr,  # (W,), or missing: no smear
    scale_ptr,  # (1,)
    y_ptr,  # (N, D), contiguous
    keys_ptr,  # (N,): the id, or V for an id outside [0, V)
    s_ptr,  # (N,) WIDE
    rstd_ptr,  # (N,) WIDE
    stride_token,
    stride_table,
    N,
    V,
    W: tl.constexpr,
    bos_id: tl.constexpr,
    eps: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    here = (rows < N) & (cols < D)
    token = tl.load(token_ids_ptr + rows * stride_token, mask=rows < N, other=0).to(tl.int64)
    valid = (token >= 0) & (token < V)
    x = tl.load(table_ptr + token * stride_table + cols, mask=here & valid, other=0.0).to(WIDE)
    if weight_ptr is not None:
        before = tl.load(token_ids_ptr + (rows - 1) * stride_token, mask=(rows >= 1) & (rows < N), other=0).to(tl.int64)
        takes = rows >= 1
        if bos_id is not None:
            takes = takes & (token != bos_id)
        valid_before = (before >= 0) & (before < V)
        inside = here & takes & valid_before
        previous = tl.load(table_ptr + before * stride_table + cols, mask=inside, other=0.0).to(WIDE)
        # Broadcast pointers give w the layout of x.
        w = tl.load(weight_ptr + tl.broadcast_to(cols, here.shape), mask=here & (cols < W), other=0.0).to(WIDE)
        s = 1.0 / (1.0 + tl.exp(-tl.sum(x * w, axis=1, keep_dims=True)))
        x += tl.load(scale_ptr).to(WIDE) * s * previous
        valid = valid & (valid_before | (takes == 0))
        tl.store(s_ptr + rows, s, mask=rows < N)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps)
    rstd = tl.where(valid, rstd, float("nan"))
    tl.store(y_ptr + rows * D + cols, (x * rstd).to(y_ptr.dtype.element_ty), mask=here)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)
    key = tl.where((token >= 0) & (token < V), token, V)
    tl.store(keys_ptr + rows, key.to(keys_ptr.dtype.element_ty), mask=rows < N)


@triton.jit
def _token(sorted_ptr, order_ptr, position, N):
    """The key at a sorted position, -1 beyond the end, and the token whose it is."""
    key = tl.load(sorted_ptr + position, mask=position < N, other=-1).to(tl.int64)
    return key, tl.load(order_ptr + position, mask=position < N, other=0)


@triton.jit
def _neighbours(keys_ptr, t, N, V):
    """The keys before and after token t, V beyond the ends."""
    before = tl.load(keys_ptr + t - 1, mask=t >= 1, other=V).to(tl.int64)
    after = tl.load(keys_ptr + t + 1, mask=t + 1 < N, other=V).to(tl.int64)
    return before, after


@triton.jit
def _row(ptr, row, stride, cols, inside):
    return tl.load(ptr + row * stride + cols, mask=inside, other=0.0)


@triton.jit
def _surroundings(
    dy_ptr, table_ptr, s_ptr, rstd_ptr, t, key, before, after, stride_dy, stride_table, dy_cols, cols, inside, N, V,
    bos_id: tl.constexpr,
):  # fmt: skip
    """x_{t-1}, x_{t+1}, dy_{t+1}, s_t, s_{t+1} and rstd_{t+1}; zeros where t takes nothing in, or is not taken in."""
    takes, gives = t >= 1, t + 1 < N
    if bos_id is not None:
        takes, gives = takes & (key != bos_id), gives & (after != bos_id)
    x_before = _row(table_ptr, before, stride_table, cols, inside & takes & (before < V))
    x_after = _row(table_ptr, after, stride_table, cols, inside & gives & (after < V))
    dy_after = _row(dy_ptr, t + 1, stride_dy, dy_cols, inside & gives)
    s_after = tl.load(s_ptr + t + 1, mask=gives, other=0.0)
    rstd_after = tl.load(rstd_ptr + t + 1, mask=gives, other=0.0)
    return x_before, x_after, dy_after, tl.load(s_ptr + t), s_after, rstd_after


@triton.jit
def _embed_smear_norm_bwd_kernel(
    dy_ptr,  # (N, D), any strides
    table_ptr,  # (V, D)
    weight_ptr,  # (W,), or missing: no smear
    scale_ptr,  # (1,)
    keys_ptr,  # (N,)
    s_ptr,  # (N,) WIDE
    rstd_ptr,  # (N,) WIDE
    sorted_ptr,  # (N,): the keys in order
    order_ptr,  # (N,) int64: which token each of them is
    dtable_ptr,  # (V, D), contiguous, zeros
    parts_ptr,  # (n_programs, 2, D) float32: of the run that a program does not begin, of the one that it does not end
    shares_ptr,  # (n_programs, W + 1) float32: each program's share of the gradients of weight and scale
    stride_dy,
    stride_dy_col,
    stride_table,
    N,
    V,
    W: tl.constexpr,
    bos_id: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Everything a token needs is loaded while the one before it is worked on, its keys another token earlier, and its
    place in the stream yet another: each load's address is the result of the one before."""
    program = tl.program_id(0)
    first = program * TOKENS
    last = tl.minimum(first + TOKENS, N) - 1
    cols = tl.arange(0, BLOCK_D)
    dy_cols = cols.to(tl.int64) * stride_dy_col
    cols_w = tl.arange(0, BLOCK_W)
    inside = cols < D

    key, t = _token(sorted_ptr, order_ptr, first, N)
    key_next, t_next = _token(sorted_ptr, order_ptr, first + 1, N)
    begun = first == 0
    if first > 0:
        begun = tl.load(sorted_ptr + first - 1).to(tl.int64) != key
    x = _row(table_ptr, key, stride_table, cols, inside & (key < V)).to(WIDE)
    run = tl.zeros((BLOCK_D,), WIDE)
    a = tl.zeros((), WIDE)
    dweight = tl.zeros((BLOCK_W,), WIDE)
    dscale = tl.zeros((), WIDE)

    dy_raw = _row(dy_ptr, t, stride_dy, dy_cols, inside)
    rstd = tl.load(rstd_ptr + t)
    if weight_ptr is not None:
        scale = tl.load(scale_ptr).to(WIDE)
        before, after = _neighbours(keys_ptr, t, N, V)
        before_raw, after_raw, dy_after_raw, s, s_after, rstd_after = _surroundings(
            dy_ptr, table_ptr, s_ptr, rstd_ptr, t, key, before, after, stride_dy, stride_table, dy_cols, cols, inside,
            N, V, bos_id,
        )  # fmt: skip
        before_next, after_next = _neighbours(keys_ptr, t_next, N, V)

    for position in range(first, last + 1):
        key_later, t_later = _token(sorted_ptr, order_ptr, position + 2, N)
        ahead = inside & (position < last)
        x_next = _row(table_ptr, key_next, stride_table, cols, ahead & (key_next != key) & (key_next < V))
        dy_next = _row(dy_ptr, t_next, stride_dy, dy_cols, ahead)
        rstd_next = tl.load(rstd_ptr + t_next)
        dy = dy_raw.to(WIDE)
        if weight_ptr is None:
            run += rstd * (dy - tl.sum(dy * x) / D * rstd * rstd * x)
        else:
            before_later, after_later = _neighbours(keys_ptr, t_later, N, V)
            before_raw_next, after_raw_next, dy_after_next, s_next, s_after_next, rstd_after_next = _surroundings(
                dy_ptr, table_ptr, s_ptr, rstd_ptr, t_next, key_next, before_next, after_next, stride_dy, stride_table,
                dy_cols, cols, ahead, N, V, bos_id,
            )  # fmt: skip
            x_before, dy_after = before_raw.to(WIDE), dy_after_raw.to(WIDE)
            h = x + scale * s * x_before
            h_after = after_raw.to(WIDE) + scale * s_after * x
            dh = rstd * (dy - tl.sum(dy * h) / D * rstd * rstd * h)
            dh_after = rstd_after * (dy_after - tl.sum(dy_after * h_after) / D * rstd_after * rstd_after * h_after)
            a += tl.sum(dh * x_before)
            run += dh + scale * s_after * dh_after

        if (key_next != key) | (position == last):
            if weight_ptr is not None:
                u = scale * s * (1.0 - s) * a  # of the run: s is its tokens' own, and so is x
                run += u * tl.load(weight_ptr + cols, mask=cols < W, other=0.0).to(WIDE)
                dweight += u * _row(table_ptr, key, stride_table, cols_w, (cols_w < W) & (key < V)).to(WIDE)
                dscale += s * a
                a = tl.zeros((), WIDE)
            whole = begun & (key_next != key)
            known = inside & (key < V)
            tl.store(dtable_ptr + key * D + cols, run.to(dtable_ptr.dtype.element_ty), mask=known & whole)
            part = program.to(tl.int64) * 2 + begun.to(tl.int32)
            tl.store(parts_ptr + part * D + cols, run.to(tl.float32), mask=inside & (whole == 0))
            begun = position >= first
            run = tl.zeros((BLOCK_D,), WIDE)
            x = x_next.to(WIDE)
        key, key_next, t_next = key_next, key_later, t_later
        dy_raw, rstd = dy_next, rstd_next
        if weight_ptr is not None:
            before_raw, after_raw, dy_after_raw = before_raw_next, after_raw_next, dy_after_next
            before_next, after_next = before_later, after_later
            s, s_after, rstd_after = s_next, s_after_next, rstd_after_next
    share_ptr = shares_ptr + program.to(tl.int64) * (W + 1)
    tl.store(share_ptr + cols_w, dweight.to(tl.float32), mask=cols_w < W)
    tl.store(share_ptr + W, dscale.to(tl.float32))


@triton.jit
def _join_parts_kernel(
    sorted_ptr,  # (N,)
    parts_ptr,  # (n_programs, 2, D) float32
    shares_ptr,  # (n_programs, W + 1) float32
    dtable_ptr,  # (V, D), contiguous
    dsmear_ptr,  # (W + 1,) float32
    N,
    V,
    W: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The run that a program began but did not end: its part and those of the programs after it, in order.

    And the first programs add the shares of the smear's gradients, one column each."""
    program = tl.program_id(0)
    if tl.program_id(1) == 0:
        for column in range(program, W + 1, tl.num_programs(0)):
            dsmear = tl.zeros((512,), tl.float32)
            for start in range(0, tl.num_programs(0), 512):
                share = start + tl.arange(0, 512)
                here = share < tl.num_programs(0)
                dsmear += tl.load(shares_ptr + share * (W + 1) + column, mask=here, other=0.0)
            tl.store(dsmear_ptr + column, tl.sum(dsmear))
    first = program * TOKENS
    if first + TOKENS < N:
        key = tl.load(sorted_ptr + first + TOKENS - 1).to(tl.int64)
        crosses = (tl.load(sorted_ptr + first + TOKENS).to(tl.int64) == key) & (key < V)
        if first > 0:
            crosses = crosses & (tl.load(sorted_ptr + first - 1).to(tl.int64) != key)
        if crosses:
            cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
            begun = tl.load(parts_ptr + (program.to(tl.int64) * 2 + 1) * D + cols, mask=cols < D, other=0.0)
            total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            others = program + 1 + tl.arange(0, BLOCK_N)
            more = 1
            while more > 0:
                at = others * TOKENS
                same = (at < N) & (tl.load(sorted_ptr + at, mask=at < N, other=-1).to(tl.int64) == key)
                offsets = others.to(tl.int64)[:, None] * (2 * D) + cols[None, :]
                total += tl.load(parts_ptr + offsets, mask=same[:, None] & (cols < D)[None, :], other=0.0)
                more = tl.min(same.to(tl.int32), axis=0)
                others += BLOCK_N
            dtable = (begun + tl.sum(total, axis=0)).to(dtable_ptr.dtype.element_ty)
            tl.store(dtable_ptr + key * D + cols, dtable, mask=cols < D)


def _as_given(launcher: Callable) -> Callable:
    """On the device of the arguments, where Triton takes the current one, and in their dtypes, autocast or not."""

    @wraps(launcher)
    def run(*args, **kwargs):
        flat = (t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else (arg,)))
        tensor = next(t for t in flat if isinstance(t, Tensor))
        with torch.cuda.device_of(tensor), torch.autocast(tensor.device.type, enabled=False):
            return launcher(*args, **kwargs)

    return run


def _refuse_tangents(name: str, *tensors: Tensor | None) -> None:
    """An op has no rule for forward-mode differentiation: tangents would be dropped, as if they were 0."""
    if not torch.compiler.is_compiling() and any(unpack_dual(t).tangent is not None for t in tensors if t is not None):
        raise RuntimeError(f"{name}: expected no forward-mode differentiation, got a tensor with a tangent")


@_as_given
def _forward(
    token_ids: Tensor,
    table: Tensor,
    smear_weight: Tensor | None,
    smear_scale: Tensor | None,
    bos_id: int | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, (V, D) = len(token_ids), table.shape
    y, keys, s, rstd = _results_like(token_ids, table, smear_weight)
    launch, block_d = LAUNCH["forward"], triton.next_power_of_2(D)
    _embed_smear_norm_fwd_kernel[(triton.cdiv(N, launch["rows"]),)](
        token_ids, table, smear_weight, smear_scale, y, keys, s, rstd, token_ids.stride(0), table.stride(0), N, V,
        _width(smear_weight), bos_id, eps, D, launch["rows"], block_d, _wide_type(table),
        num_warps=_warps(launch, table),
    )  # fmt: skip
    return y, keys, s, rstd


@_as_given
def _backward(
    dy: Tensor,
    table: Tensor,
    smear_weight: Tensor | None,
    smear_scale: Tensor | None,
    keys: Tensor,
    s: Tensor,
    rstd: Tensor,
    bos_id: int | None,
) -> tuple[Tensor, Tensor]:
    """dtable, and the gradients of smear_weight and smear_scale as (W + 1,) float32."""
    N, (V, D), W = len(keys), table.shape, _width(smear_weight)
    launch, block_d = LAUNCH["backward"], triton.next_power_of_2(D)
    tokens = 4 if INTERPRETED else launch["tokens"]  # the few tokens of a test shall reach over many programs
    n_programs = triton.cdiv(N, tokens)
    sorted_keys, order = torch.sort(keys, stable=True)
    dtable = torch.zeros((V, D), dtype=table.dtype, device=table.device)
    parts = torch.empty((n_programs, 2, D), dtype=torch.float32, device=table.device)
    shares = torch.empty((n_programs, W + 1), dtype=torch.float32, device=table.device)
    _embed_smear_norm_bwd_kernel[(n_programs,)](
        dy, table, smear_weight, smear_scale, keys, s, rstd, sorted_keys, order, dtable, parts, shares,
        dy.stride(0), dy.stride(1), table.stride(0), N, V, W, bos_id, D, tokens, block_d,
        triton.next_power_of_2(max(W, 1)), _wide_type(table),
        num_warps=_warps(launch, table), maxnreg=launch["maxnreg"] if table.element_size() == 2 else None,
    )  # fmt: skip
    dsmear = (torch.empty if N else torch.zeros)(W + 1, dtype=torch.float32, device=table.device)
    join = min(block_d, 128)
    _join_parts_kernel[(n_programs, triton.cdiv(D, join))](
        sorted_keys, parts, shares, dtable, dsmear, N, V, W, D, tokens, 16, join, num_warps=4
    )
    return dtable, dsmear


def _results_like(token_ids: Tensor, table: Tensor, smear_weight: Tensor | None) -> tuple[Tensor, ...]:
    """Empty y, keys, s and rstd; keys are as narrow as they can be, for they are sorted."""
    N, (V, D) = len(token_ids), table.shape
    wide = torch.float32 if table.dtype in (torch.bfloat16, torch.float16) else torch.float64
    y = table.new_empty((N, D))
    keys = token_ids.new_empty(N, dtype=torch.int16 if V < 2**15 else torch.int32)
    s = table.new_empty(N if smear_weight is not None else 0, dtype=wide)
    return y, keys, s, table.new_empty(N, dtype=wide)


def _width(smear_weight: Tensor | None) -> int:
    return 0 if smear_weight is None else len(smear_weight)


def _warps(launch: dict[str, int], table: Tensor) -> int:
    return min(8, max(1, triton.next_power_of_2(table.shape[1]) * table.element_size() // (2 * launch["elements"])))


def _wide_type(table: Tensor) -> object:
    # What multiplies float32 rows, sums over D and over tokens, must round far below them.
    return tl.float64 if table.dtype == torch.float32 else tl.float32


@_as_given
def _forward_eager(
    token_ids: Tensor,
    table: Tensor,
    smear_weight: Tensor | None,
    smear_scale: Tensor | None,
    bos_id: int | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, keys, s, rstd = _results_like(token_ids, table, smear_weight)
    keys.copy_(torch.where((token_ids >= 0) & (token_ids < len(table)), token_ids, len(table)))
    h, _, gates = _smeared(table, smear_weight, smear_scale, keys, bos_id)
    rstd.copy_(torch.rsqrt(h.square().mean(-1) + eps))
    if smear_weight is not None:
        s.copy_(gates)
    return y.copy_(rstd[:, None] * h), keys, s, rstd


def _smeared(
    table: Tensor, smear_weight: Tensor | None, smear_scale: Tensor | None, keys: Tensor, bos_id: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """h, the rows x_{t-1} that h takes in, and s."""
    wide = torch.float32 if table.dtype in (torch.bfloat16, torch.float16) else torch.float64
    x = torch.cat((table.to(wide), table.new_full((1, table.shape[1]), torch.nan, dtype=wide)))[keys.long()]
    if smear_weight is None:
        return x, torch.zeros_like(x), None
    taken = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
    if bos_id is not None:
        taken = torch.where((keys.long() == bos_id)[:, None], 0.0, taken)
    s = torch.sigmoid(x[:, : len(smear_weight)] @ smear_weight.to(wide))
    return x + (smear_scale.to(wide) * s)[:, None] * taken, taken, s


@_as_given
def _backward_eager(
    dy: Tensor,
    table: Tensor,
    smear_weight: Tensor | None,
    smear_scale: Tensor | None,
    keys: Tensor,
    s: Tensor,
    rstd: Tensor,
    bos_id: int | None,
) -> tuple[Tensor, Tensor]:
    wide, W = rstd.dtype, _width(smear_weight)
    h, taken, _ = _smeared(table, smear_weight, smear_scale, keys, bos_id)
    c = rstd.square() * (dy * h).mean(-1)
    dx = dh = rstd[:, None] * (dy - c[:, None] * h)
    dsmear = rstd.new_zeros(W + 1)
    if W:
        w, λ = smear_weight.to(wide), smear_scale.to(wide)
        a = (dh * taken).sum(-1)
        u = λ * s * (1 - s) * a
        takes = keys.long() != bos_id if bos_id is not None else torch.ones_like(keys, dtype=torch.bool)
        back = torch.where(takes, λ * s, 0.0)[:, None] * dh  # what row t hands to row t - 1
        dx = dh + torch.cat((back[1:], torch.zeros_like(back[:1])))
        dx[:, :W] += u[:, None] * w
        head = torch.cat((table, table[:1]))[keys.long(), :W].to(wide)
        dsmear = torch.cat((u @ head, (s @ a)[None]))
    dtable = rstd.new_zeros(len(table) + 1, table.shape[1]).index_add_(0, keys.long(), dx)
    return dtable[:-1].to(table.dtype, copy=True), dsmear.to(torch.promote_types(table.dtype, torch.float32))


# Under TRITON_INTERPRET=1 the decorator above gave an interpreted function, and the CPU runs the Triton code itself.
INTERPRETED = not isinstance(_embed_smear_norm_fwd_kernel, triton.runtime.JITFunction)

_op = torch.library.custom_op(f"{NAMESPACE}::embed_smear_norm", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    f"{NAMESPACE}::embed_smear_norm_backward", _backward, mutates_args=(), device_types="cuda"
)


@_op.register_kernel("cpu")
def _forward_cpu(token_ids, table, *args):
    narrow = INTERPRETED and table.dtype != torch.float64
    return (_forward if narrow else _forward_eager)(token_ids, table, *args)


@_op_backward.register_kernel("cpu")
def _backward_cpu(dy, *args):
    return (_backward if INTERPRETED and dy.dtype != torch.float64 else _backward_eager)(dy, *args)


@_op.register_fake
def _forward_fake(token_ids, table, smear_weight, *args):
    return _results_like(token_ids, table, smear_weight)


@_op_backward.register_fake
def _backward_fake(dy, table, smear_weight, smear_scale, keys, s, rstd, bos_id):
    wide = torch.promote_types(table.dtype, torch.float32)
    return table.new_empty(table.shape), rstd.new_empty(_width(smear_weight) + 1, dtype=wide)


def _setup_context(ctx, inputs, output):
    _, table, smear_weight, smear_scale, ctx.bos_id, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(table, smear_weight, smear_scale, *output[1:])


def _autograd(ctx, dy, *_):
    smear_weight, smear_scale = ctx.saved_tensors[1:3]
    dtable, dsmear = _op_backward(dy, *ctx.saved_tensors, ctx.bos_id)
    if smear_weight is None:
        return None, dtable, None, None, None, None
    return None, dtable, dsmear[:-1].to(smear_weight.dtype), dsmear[-1:].to(smear_scale.dtype), None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def embed_smear_norm(
    token_ids: Tensor,
    table: Tensor,
    smear_weight: Tensor | None = None,
    smear_scale: Tensor | None = None,
    bos_id: int | None = 1,
    *,
    eps: float = 2.0**-23,
    check_ids: bool = False,
) -> Tensor:
    """RMSNorm of x_t + [token_ids_t != bos_id] λ σ(smear_weight · x_t[:W]) x_{t-1}, x_t = table[token_ids_t].

    token_ids: (N,) int64 or int32, one stream; an id outside [0, V) gives rows of NaN, or with check_ids a ValueError
    that names the first of them, for which the host waits for the device.
    table: (V, D) bfloat16, float16 or float32, channels adjacent; float64 on CPU only.
    smear_weight: (W,), 1 <= W <= D, elements adjacent. smear_scale: (1,), λ. Each in any of these dtypes, but float64
    with float64. Both None: no smear. bos_id: the id that starts a document; None, and only None, is no mask.
    Returns (N, D) in the table's dtype. Differentiable once, in reverse mode, in table, smear_weight and smear_scale.
    eps: a finite number >= 0.
    Raises ValueError for a shape, layout, device, number or id, TypeError for a dtype or an argument of another type.
    """
    named = {"table": table, "token_ids": token_ids, "smear_weight": smear_weight, "smear_scale": smear_scale}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("table", "token_ids")):
            raise TypeError(f"embed_smear_norm: expected {name} to be a tensor, got {tensor!r}")
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"embed_smear_norm: expected table of shape (V, D), got {tuple(table.shape)}")
    if token_ids.ndim != 1:
        raise ValueError(f"embed_smear_norm: expected token_ids of shape (N,), got {tuple(token_ids.shape)}")
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embed_smear_norm: expected token_ids in int64 or int32, got {token_ids.dtype}")
    if (smear_weight is None) != (smear_scale is None):
        missing = "smear_weight" if smear_weight is None else "smear_scale"
        raise ValueError(f"embed_smear_norm: expected both of smear_weight and smear_scale or none, got no {missing}")
    given = [("table", table)]
    if smear_weight is not None:
        given += [("smear_weight", smear_weight), ("smear_scale", smear_scale)]
        if smear_weight.ndim != 1 or not 1 <= len(smear_weight) <= table.shape[1]:
            expected, got = f"(W,), 1 <= W <= {table.shape[1]}", tuple(smear_weight.shape)
            raise ValueError(f"embed_smear_norm: expected smear_weight of shape {expected}, got {got}")
        if smear_scale.shape != (1,):
            raise ValueError(f"embed_smear_norm: expected smear_scale of shape (1,), got {tuple(smear_scale.shape)}")
    for name, tensor in given:
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        if table.dtype == torch.float64 and table.device.type == "cpu":
            dtypes = (torch.float64,)
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype)[6:] for dtype in dtypes)
            raise TypeError(f"embed_smear_norm: expected {name} in {expected}, got {tensor.dtype} on {tensor.device}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"embed_smear_norm: expected {name} with adjacent channels, got strides {tensor.stride()}")
    for name, tensor in (*given, ("token_ids", token_ids)):
        if tensor.device != table.device:
            raise ValueError(f"embed_smear_norm: expected {name} on {table.device}, got {tensor.device}")
    if bos_id is not None and type(bos_id) is not int:
        raise TypeError(f"embed_smear_norm: expected bos_id to be an int, or None for no mask, got {bos_id!r}")
    if bos_id is not None and not -(2**63) <= bos_id < 2**63:
        raise ValueError(f"embed_smear_norm: expected bos_id in 64 bits, got {bos_id}")
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"embed_smear_norm: expected eps to be a number, got {eps!r}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"embed_smear_norm: expected a finite eps >= 0, got {eps}")
    if check_ids:
        bad = ((token_ids < 0) | (token_ids >= len(table))).nonzero()
        if len(bad):
            row = int(bad[0])
            expected, got = f"0 <= id < {len(table)}", int(token_ids[row])
            raise ValueError(f"embed_smear_norm: expected {expected} in token_ids, got {got} in row {row}")
    _refuse_tangents("embed_smear_norm", table, smear_weight, smear_scale)
    return _op(token_ids, table, smear_weight, smear_scale, bos_id, float(eps))[0]


# --- not needed when lifted ---

# (N, D, V)
SIZES = {
    "odd": (25, 83, 7),
    "tile": (14, 128, 50),
    "one": (1, 12, 5),
    "record": (98304, 512, 8192),
    "large": (4194400, 512, 8192),
}


def embed_smear_norm_inputs(size: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    """Ids as frequent as words are, so that a few run over many programs; a document starts on the first row, and
    wherever id 1 comes up, but not on row 1 nor the last."""
    N, D, V = size
    generator = torch.Generator(device).manual_seed(seed)
    table = torch.randn((V, D), generator=generator, device=device).to(dtype)
    smear_weight = torch.randn(min(12, D), generator=generator, device=device)
    token_ids = (V ** torch.rand(N, generator=generator, device=device, dtype=torch.float64)).long() - 1
    token_ids = token_ids.clamp(0, V - 1)  # P(id) ~ 1 / (id + 1)
    token_ids[1:2], token_ids[-1:], token_ids[:1] = 2, 2, 1
    return {
        "token_ids": token_ids,
        "table": table.requires_grad_(),
        "smear_weight": smear_weight.requires_grad_(),
        "smear_scale": torch.full((1,), 0.75, device=device).requires_grad_(),
        "bos_id": 1,
    }


def embed_smear_norm_cost(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    N, D, V = size
    rows, table, ids = N * D * dtype.itemsize, V * D * dtype.itemsize, 8 * N
    return {
        "bytes_forward": rows + table + ids,
        "bytes_backward": rows + 2 * table + ids,
        "flops_forward": 6 * N * D,
        "flops_backward": 20 * N * D,
    }


def _prove(fn: Callable, ref: Callable, make_inputs: Callable, cost: Callable, sizes: dict) -> None:
    """Print the error against float64 beside eager's and, on a GPU, the speed at the record size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{fn.__name__}: largest error against float64, of the largest value (eager's), per result")
    for dtype in (torch.float32, torch.bfloat16):
        for size in list(sizes.values())[:2]:
            inputs = make_inputs(size, dtype, device)
            doubled = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in _floats(inputs).items()}
            truth = _results(ref, inputs | doubled)
            ours, eagers = ([_error(r, t) for r, t in zip(_results(f, inputs), truth, strict=True)] for f in (fn, ref))
            print(f"  {size} {dtype}:", ", ".join(f"{a:.1e} ({b:.1e})" for a, b in zip(ours, eagers, strict=True)))
    if device == "cpu":
        print("no GPU here: nothing timed")
        return
    inputs, work = make_inputs(sizes["record"], torch.bfloat16, device), cost(sizes["record"], torch.bfloat16)
    source = torch.empty(2**30, dtype=torch.uint8, device=device).random_()
    roof = 2 * source.numel() / triton.testing.do_bench(source.clone, return_mode="median")
    leaves = [v for v in _floats(inputs).values() if v.requires_grad]
    ones = [torch.ones_like(output) for output in _outputs(fn, inputs)]
    calls = {"forward": lambda: fn(**inputs)}
    if leaves:
        calls["forward + backward"] = lambda: torch.autograd.grad(_outputs(fn, inputs), leaves, ones)
    for directions, call in calls.items():
        ms = triton.testing.do_bench(call, return_mode="median")
        moved, flops = (sum(work[f"{what}_{d}"] for d in directions.split(" + ")) / ms for what in ("bytes", "flops"))
        speed = f"{moved / 1e9:.2f} TB/s ({moved / roof:.0%} of a copy's), {flops / 1e9:.0f} TFLOP/s"
        print(f"{directions} {sizes['record']}: {ms:.3f} ms, {speed}")


def _floats(inputs: dict[str, object]) -> dict[str, Tensor]:
    return {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}


def _outputs(fn: Callable, inputs: dict[str, object]) -> list[Tensor]:
    outputs = fn(**inputs)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def _results(fn: Callable, inputs: dict[str, object]) -> list[Tensor]:
    outputs, leaves = _outputs(fn, inputs), [v for v in _floats(inputs).values() if v.requires_grad]
    gradients = torch.autograd.grad(sum(output.sum() for output in outputs), leaves) if leaves else ()
    return [output.detach() for output in outputs] + list(gradients)


def _error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).abs().max() / truth.abs().max())


if __name__ == "__main__":
    _prove(embed_smear_norm, embed_smear_norm_ref, embed_smear_norm_inputs, embed_smear_norm_cost, SIZES)
