"""N-gram tables: the log-probability of the next token after each hashed context, and their rows for a token stream.

    h2(a) = 36313 a,  h3(a, b) = 36313 a + 27191 b,  h4(a, b, c) = 36313 a + 27191 b + 51497 c,  all mod H; c is newest
    L_n[h, y] = ln (N_n[h, y] + smoothing) / sum_y (N_n[h, y] + smoothing)

N_n counts how often y follows a context that hashes to h, in training tokens. The tables lie one under the other, so a
row's index says which it is of. 36313 is odd: for V <= H = 2^k no two bigrams share a row.
`context_rows` alone says which row a token reads, when it is counted and when it is looked up. The published code says
it twice, and differently: its partitions turn the rows at the look-up only, so that most tokens read another's row, and
its log-frequency multipliers are counted by hashes that no look-up uses. Neither is reproduced.
A context ends where its document starts: at a BOS, tokens before it count as id 0, as those before the stream do. (The
published contexts run on from document to document and end at the row, since that is all they see.) At a look-up it
also ends where attention does, at the start of a segment, so that no token's score hangs on what it is batched with.

Source: taka6745/paramgolf, a submission to the Parameter Golf challenge.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from niblick.kernels.ngram_bias import ngram_bias, ngram_bias_ref
from niblick.model.config import ConfigError, NgramBiasConfig
from niblick.model.layers import segment_start

MULTIPLIERS = (36_313, 27_191, 51_497)
CHUNK = 1 << 22
"""Tokens counted at a time: some 300 MB of indices."""
BLOCK = 1 << 24
"""Entries whose logarithm is taken at a time."""
MAX_INTEGER = 511
"""Of an artifact's entropy coder."""


def context_rows(ids: Tensor, starts: Tensor, config: NgramBiasConfig) -> Tensor:
    """Rows (N, orders) int64 of the stacked tables for each of the ids (N,) and those before it.

    starts (N,) bool: where no token before belongs to the context. The first id starts one too.
    """
    zero = torch.zeros_like(ids[:1])
    one = torch.where(starts, 0, torch.cat((zero, ids[:-1])))
    two = torch.where(starts, 0, torch.cat((zero, one[:-1])))
    hashes = {2: (ids,), 3: (one, ids), 4: (two, one, ids)}
    H, rows = config.rows, []
    for place, order in enumerate(config.orders):
        row = sum(m * x for m, x in zip(MULTIPLIERS, hashes[order], strict=False))
        if order == 2 and config.partitions > 1:
            row = row + ids % config.partitions * (H // config.partitions)
        rows.append(row % H + place * H)
    return torch.stack(rows, dim=1)


class NgramBias(nn.Module):
    """The tables as a term of the loss: `table` (orders x H, V), on its device, and how its rows are chosen.

    No parameter of the model, nor in its state: an artifact holds the tables only if it is asked to.
    """

    def __init__(self, config: NgramBiasConfig, table: Tensor, bos_id: int) -> None:
        super().__init__()
        self.config, self.bos_id = config, bos_id
        self.integers: Tensor | None = None
        """What an artifact stores of the table (`to_integers`), where it came from integers."""
        self.register_buffer("table", table, persistent=False)
        if config.mode == "backoff":
            powers = torch.tensor([config.backoff_factor**n for n in (2, 1, 0)])
            self.register_buffer("trusted", trusted_rows(table, config), persistent=False)
        else:
            powers = torch.tensor([w for w in config.weights if w != 0])
        self.register_buffer("powers", powers.to(table.device), persistent=False)

    def __deepcopy__(self, memo: dict) -> "NgramBias":
        return self  # nothing here ever changes, and a second table may not fit

    def forward(self, ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (N, K) int64 and factors (N, K) float32 for `ngram_bias`; K is 1 in back-off mode."""
        positions = torch.arange(len(ids), device=ids.device)
        starts = (segment_start(positions, cu_seqlens) == positions) | (ids == self.bos_id)
        rows = context_rows(ids, starts, self.config)
        if self.config.mode != "backoff":
            return rows, self.powers.expand(len(rows), -1)
        last = torch.where(self.trusted[rows[:, 2]], 2, torch.where(self.trusted[rows[:, 1]], 1, 0))
        return rows.gather(1, last[:, None]), self.powers[last][:, None]

    def loss(
        self, logits: Tensor, targets: Tensor, rows: Tensor, factors: Tensor, softcap: float, *,
        reference: bool = False, **options,
    ) -> Tensor:  # fmt: skip
        """Cross-entropy of raw logits (N, V); rows and factors as `forward` gives them; options as of `ngram_bias`."""
        factors = factors.to(torch.promote_types(logits.dtype, torch.float32))
        return (ngram_bias_ref if reference else ngram_bias)(
            logits, targets, self.table, rows, factors, softcap, **options
        )


def build(
    tokens: Iterable[Tensor], config: NgramBiasConfig, vocab_size: int, bos_id: int, device: torch.device
) -> NgramBias:
    """Count a stream of training tokens, given in pieces (n,) of any integer type and any length, and take logarithms.

    With at_evaluation "artifact" the tables are what an artifact would give back. ConfigError for integers that an
    artifact does not hold, or tables that the device does not.
    """
    try:
        counts, looked_up = count_ngrams(tokens, config, vocab_size, bos_id, device)
        table = log_probabilities(counts, looked_up, config)
    except torch.OutOfMemoryError as error:
        size = len(config.orders) * config.rows * vocab_size
        raise ConfigError(f"ngram_bias.rows: no memory for tables of {size:,} entries: got {config.rows}") from error
    if config.at_evaluation == "artifact":
        return from_integers(to_integers(table, config.step), config, bos_id, device)
    return NgramBias(config, table, bos_id)


def count_ngrams(
    tokens: Iterable[Tensor], config: NgramBiasConfig, vocab_size: int, bos_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """How often each token follows each row, int32 (orders x H, V), and how often the first `log_frequency_tokens`
    tokens look each row up, int64 (orders x H,)."""
    n_rows = len(config.orders) * config.rows
    counts = torch.zeros(n_rows * vocab_size, dtype=torch.int32, device=device)
    looked_up = torch.zeros(n_rows, dtype=torch.int64, device=device)
    ones = torch.ones((), dtype=torch.int32, device=device)
    before, sample = torch.zeros(0, dtype=torch.int64, device=device), config.log_frequency_tokens
    for piece in (part for whole in tokens for part in whole.split(CHUNK)):
        ids = torch.cat((before, piece.to(device).long()))
        seen = max(len(before) - 1, 0)  # contexts whose next token was counted with the piece before
        rows = context_rows(ids, ids == bos_id, config)[seen:]
        pairs = rows[:-1] * vocab_size + ids[seen + 1 :, None]
        counts.index_add_(0, pairs.flatten(), ones.expand(pairs.numel()))
        fresh = rows[len(before) - seen :][:sample]
        looked_up += torch.bincount(fresh.flatten(), minlength=n_rows)
        sample -= len(fresh)
        before = ids[-3:]  # the last context, whose next token is to come, is of three tokens
    return counts.view(n_rows, vocab_size), looked_up


def log_probabilities(counts: Tensor, looked_up: Tensor, config: NgramBiasConfig) -> Tensor:
    """L (orders x H, V) in the dtype of the settings, or in float32 if it is yet to be rounded for an artifact."""
    dtype = torch.float32 if config.at_evaluation == "artifact" else getattr(torch, config.dtype)
    table = torch.empty(counts.shape, dtype=dtype, device=counts.device)
    for block in _blocks(counts):
        total = counts[block].sum(1, keepdim=True, dtype=torch.float64) + config.smoothing * counts.shape[1]
        logs = (counts[block] + config.smoothing).log() - total.log().float()
        if config.log_frequency_tokens:
            logs = logs / (2.0 + looked_up[block, None]).log()
        table[block] = logs
    return table


def trusted_rows(table: Tensor, config: NgramBiasConfig) -> Tensor:
    """(orders x H,) bool: the rows below which back-off does not go. Of a bigram's nobody asks.

    The log-probabilities are those that a row stands for as it is added: multiplied and rounded, then normalised.
    """
    thresholds = (1.0, 1.0) if config.gate == "published" else config.thresholds
    limits = torch.tensor([0.0, *thresholds], device=table.device).repeat_interleave(config.rows)
    trusted = torch.empty(len(table), dtype=torch.bool, device=table.device)
    for block in _blocks(table):
        logs = torch.log_softmax(table[block].float(), dim=1)
        floor = logs.mean(1) if config.gate == "gap" else 0.0
        trusted[block] = logs.amax(1) - floor > limits[block]
    return trusted


# ---- tables in an artifact -----------------------------------------------------------------------------------------


def to_integers(table: Tensor, step: float) -> Tensor:
    """int16 (R, V) on the CPU: how many steps an entry lies above the least of its row.

    A constant added to a row changes no probability, so nothing is lost but the rounding; and where a row has unseen
    tokens, which is nearly always, all of them are 0.
    """
    q = torch.empty(table.shape, dtype=torch.int16)
    for block in _blocks(table):
        rows = table[block].float()
        q[block] = ((rows - rows.amin(1, keepdim=True)) / step).round().to(torch.int16).cpu()
    largest = int(q.max())
    if largest > MAX_INTEGER:
        raise ConfigError(f"ngram_bias.step {step:g} makes integers up to {largest}: expected at most {MAX_INTEGER}")
    return q


def from_integers(q: Tensor, config: NgramBiasConfig, bos_id: int, device: torch.device) -> NgramBias:
    """The same tables before they are written and after they are read, bit for bit on one kind of device."""
    table = torch.empty(q.shape, dtype=getattr(torch, config.dtype), device=device)
    for block in _blocks(q):
        table[block] = (q[block].to(device).float() * config.step).to(table.dtype)
    bias = NgramBias(config, table, bos_id)
    bias.integers = q
    return bias


def _blocks(table: Tensor) -> list[slice]:
    n = max(1, BLOCK // table.shape[1])
    return [slice(start, start + n) for start in range(0, len(table), n)]
