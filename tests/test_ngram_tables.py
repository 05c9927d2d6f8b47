"""N-gram tables against counts in plain Python; as a term of training, of the score, and as bytes of an artifact."""

import json
import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from configs import REFERENCE
from numerics import SCORE_NATS, assert_close_f32
from torch import Tensor

from niblick.artifact import container
from niblick.artifact.container import encode_tables, read_artifact, require_room, require_storable, write_artifact
from niblick.artifact.errors import ArtifactError
from niblick.artifact.ledger import byte_ledger
from niblick.artifact.load import load_model
from niblick.artifact.quantize import quantize
from niblick.data.errors import DataError
from niblick.data.shards import first_tokens, write_shard
from niblick.evaluation.hints import Hints
from niblick.evaluation.score import pack, score, token_nll
from niblick.evaluation.windows import sliding_windows
from niblick.model import ngram_tables
from niblick.model.config import ArtifactConfig, ConfigError, GPTConfig, NgramBiasConfig
from niblick.model.gpt import GPT
from niblick.model.ngram_tables import NgramBias, build, context_rows, count_ngrams

CPU, BOS, V = torch.device("cpu"), 1, 32
SUM = NgramBiasConfig(mode="sum", rows=64, dtype="float32")
BACKOFF = replace(SUM, mode="backoff", thresholds=(-1.2, -1.4))
MODEL = GPTConfig(
    vocab_size=V, num_layers=2, model_dim=128, num_heads=4, num_kv_heads=2, mlp_hidden=128, max_segment=8,
    xsa_last_layers=2, loop_extra_passes=0, parallel="none", **REFERENCE,
)  # fmt: skip


def stream(n: int, seed: int = 0, sharp: float = 24.0) -> Tensor:
    """A chain whose next token hangs on the last, in documents; the higher `sharp`, the surer."""
    generator = torch.Generator().manual_seed(seed)
    chain = torch.softmax(sharp * torch.rand((V, V), generator=torch.Generator().manual_seed(9)), dim=1)
    tokens = [BOS]
    for u in torch.rand(n - 1, generator=generator):
        tokens.append(int(torch.searchsorted(chain[tokens[-1]].cumsum(0), u).clamp(max=V - 1)))
    return torch.tensor(tokens)


def naive_rows(ids: list[int], config: NgramBiasConfig) -> list[tuple[int, ...]]:
    """Of every token, from the definition."""
    rows = []
    for i, c in enumerate(ids):
        b = ids[i - 1] if i and c != BOS else 0
        a = ids[i - 2] if i > 1 and BOS not in (c, ids[i - 1]) else 0
        turn = c % config.partitions * (config.rows // config.partitions)
        hashes = {2: 36313 * c + turn, 3: 36313 * b + 27191 * c, 4: 36313 * a + 27191 * b + 51497 * c}
        rows.append(tuple(hashes[n] % config.rows for n in config.orders))
    return rows


def naive_logs(ids: list[int], config: NgramBiasConfig) -> dict[tuple[int, int], list[float]]:
    """L of every (place of the order, row) that occurs, multipliers included."""
    counts, rows = defaultdict(Counter), naive_rows(ids, config)
    for row, y in zip(rows, ids[1:], strict=False):
        for place, h in enumerate(row):
            counts[place, h][y] += 1
    looked_up = Counter((place, h) for row in rows[: config.log_frequency_tokens] for place, h in enumerate(row))
    logs = {}
    for key, count in counts.items():
        total = sum(count.values()) + config.smoothing * V
        m = 1 / math.log(2 + looked_up[key]) if config.log_frequency_tokens else 1.0
        logs[key] = [m * math.log((count[y] + config.smoothing) / total) for y in range(V)]
    return logs


CASES = {
    "sum": SUM,
    "few rows": replace(SUM, rows=5),
    "two orders": replace(SUM, weights=(0.3, 0.0, 0.2)),
    "partitions": replace(SUM, partitions=16),
    "log frequency": replace(SUM, log_frequency_tokens=100),
    "smoothing": replace(BACKOFF, smoothing=1.5),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_tables_equal_counts_in_python(config: NgramBiasConfig) -> None:
    ids = stream(600)
    bias = build([ids[:1], ids[1:3], ids[3:200], ids[200:]], config, V, BOS, CPU)
    logs = naive_logs(ids.tolist(), config)
    for (place, h), want in logs.items():
        got = bias.table[place * config.rows + h].double()
        assert (got - torch.tensor(want, dtype=torch.float64)).abs().max() <= SCORE_NATS
    unseen = [r for r in range(len(bias.table)) if divmod(r, config.rows) not in logs]
    assert (bias.table[unseen] == bias.table[unseen][:, :1]).all()


def test_counts_stay_whole_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = stream(300)
    whole = count_ngrams([ids], replace(SUM, log_frequency_tokens=77), V, BOS, CPU)
    monkeypatch.setattr(ngram_tables, "CHUNK", 2)
    for got, want in zip(
        count_ngrams([ids.to(torch.int16)], replace(SUM, log_frequency_tokens=77), V, BOS, CPU), whole, strict=True
    ):
        assert torch.equal(got, want)
    assert whole[0].sum() == 3 * 299 and whole[1].sum() == 3 * 77


def test_a_context_ends_with_its_document_and_segment() -> None:
    """No row hangs on a token before the BOS or, at a look-up, before the segment."""
    bias, ids = build([stream(300)], SUM, V, BOS, CPU), torch.tensor([5, 6, 7, BOS, 8, 9, 10, 11])
    cu_seqlens = torch.tensor([0, 6, 8, 8], dtype=torch.int32)
    rows, _ = bias(ids, cu_seqlens)
    expected = [r for part in ([5, 6, 7, BOS, 8, 9], [10, 11]) for r in naive_rows(part, SUM)]
    assert (rows - torch.arange(3) * SUM.rows).tolist() == [list(r) for r in expected]
    changed = ids.clone()
    changed[:3], changed[4:6] = 2, 3
    again, _ = bias(changed, cu_seqlens)
    assert torch.equal(again[3], rows[3]) and torch.equal(again[6:], rows[6:])
    assert not (again[[0, 1, 2, 4, 5]] == rows[[0, 1, 2, 4, 5]]).any()


def test_partitions_are_a_relabelling() -> None:
    """Bigrams do not collide, so turning their rows changes no bias, if counting and look-up turn them alike. The
    published code turned them at the look-up alone, which `mismatched` repeats: it must be caught."""
    plain, turned = (replace(SUM, weights=(0.3, 0.0, 0.0), rows=1 << 14, partitions=s) for s in (1, 16))
    ids, no_start = stream(600), torch.zeros(600, dtype=torch.bool)
    one, two = (build([ids], config, V, BOS, CPU) for config in (plain, turned))
    rows = [context_rows(ids, no_start, config)[:, 0] for config in (plain, turned)]
    assert torch.equal(one.table[rows[0]], two.table[rows[1]]) and not torch.equal(*rows)
    mismatched = one.table[rows[1]]
    assert not torch.equal(mismatched, two.table[rows[1]])


@pytest.mark.parametrize("gate", ["probability", "gap", "published"])
def test_backoff_equals_its_definition(gate: str) -> None:
    config = replace(BACKOFF, gate=gate, thresholds=(4.0, 3.2) if gate == "gap" else BACKOFF.thresholds)
    ids = stream(600)
    bias, logs = build([ids], config, V, BOS, CPU), naive_logs(ids.tolist(), config)
    rows, factors = bias(ids, torch.tensor([0, 600], dtype=torch.int32))
    used = Counter()
    for row, naive, factor in zip(rows[:-1, 0], naive_rows(ids.tolist(), config), factors[:, 0], strict=False):
        order = 0
        for place, threshold in ((1, config.thresholds[0]), (2, config.thresholds[1])):
            row_logs = logs[place, naive[place]]
            peak = max(row_logs) - (sum(row_logs) / V if gate == "gap" else 0.0)
            if peak > (1.0 if gate == "published" else threshold):
                order = place
        assert row == order * config.rows + naive[order]
        assert abs(factor - 0.4 ** (2 - order)) < SCORE_NATS
        used[order] += 1
    assert set(used) == ({0} if gate == "published" else {0, 1, 2}), used


def test_the_default_gate_fires() -> None:
    bias = build([stream(4000)], NgramBiasConfig(mode="backoff", rows=64), V, BOS, CPU)
    _, factors = bias(stream(500, seed=3), torch.tensor([0, 500], dtype=torch.int32))
    assert {round(x, 2) for x in factors.unique().tolist()} == {0.16, 0.4, 1.0}


def test_training_with_the_bias_learns_the_residue() -> None:
    """On a bigram source the loss starts lower, and after a few steps still is. The table is no parameter."""
    config = replace(SUM, weights=(1.0, 0.0, 0.0))
    bias, losses = build([stream(8000)], config, V, BOS, CPU), {}
    ids, cu_seqlens = stream(513, seed=5), torch.arange(0, 513, 8, dtype=torch.int32)
    for name in ("with", "without"):
        model = GPT(MODEL, seed=1)
        names = [name for name, _ in model.named_parameters()]
        model.ngram_bias = bias if name == "with" else None
        assert list(model.state_dict()) == names == [name for name, _ in model.named_parameters()]
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses[name] = []
        for _ in range(6):
            loss = model(ids[:-1], ids[1:], cu_seqlens, False)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert all(a < b for a, b in zip(losses["with"], losses["without"], strict=True)), losses
    assert losses["with"][-1] < losses["with"][0] and losses["without"][-1] < losses["without"][0]


def test_the_kernel_trains_as_the_reference_does() -> None:
    bias, ids, gradients = build([stream(3000)], SUM, V, BOS, CPU), stream(25), []
    for impl in ("kernel", "reference"):
        model = GPT(replace(MODEL, loss_impl=impl))
        model.ngram_bias = bias
        loss = model(ids[:-1], ids[1:], torch.tensor([0, 8, 16, 24], dtype=torch.int32), False)
        gradients.append(torch.autograd.grad(loss, model.embedding)[0])
    assert_close_f32("gradient of the embedding", *gradients)


def naive_bias(bias: NgramBias, row: tuple[int, ...]) -> Tensor:
    places = [place * bias.config.rows + h for place, h in enumerate(row)]
    if bias.config.mode == "sum":
        return sum(w * bias.table[r] for w, r in zip(bias.config.weights, places, strict=True))
    order = max((place for place in (1, 2) if bias.trusted[places[place]]), default=0)
    return bias.config.backoff_factor ** (2 - order) * bias.table[places[order]]


@pytest.mark.parametrize("config", [SUM, BACKOFF], ids=["sum", "backoff"])
def test_the_score_equals_brute_force(config: NgramBiasConfig) -> None:
    model, tokens = GPT(MODEL).eval(), stream(41, seed=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    windows = sliding_windows(40, 8, 3)
    packed = pack(tokens.numpy(), windows, MODEL)
    logits = model.head(model.hidden(packed.ids, packed.cu_seqlens))[packed.rows].double()
    model.ngram_bias = bias = build([stream(3000)], config, V, BOS, CPU)
    seen = [tokens[w.start : row + 1].tolist() for w in windows for row in range(w.first_scored, w.end)]
    added = torch.stack([naive_bias(bias, naive_rows(ids, config)[-1]) for ids in seen])
    p = torch.softmax(30 * torch.tanh(logits / 30) + added.double(), dim=1)
    want = -p[torch.arange(len(p)), tokens[packed.targets]].log()
    got = token_nll(model, packed, tokens.numpy())
    assert (got - want).abs().max() < SCORE_NATS and added.std() > 0.1
    whole = score(model, tokens.numpy(), np.ones(41, np.int16), windows, tokens_per_batch=20)
    assert abs(whole.nats_per_token - want.mean().item()) < SCORE_NATS
    every = [model.token_losses(packed.ids, torch.full_like(packed.ids, y), packed.cu_seqlens) for y in range(V)]
    mass = torch.stack(every).double().neg().exp().sum(0)
    assert (mass - 1).abs().max() < SCORE_NATS


def test_the_tilt_is_refused() -> None:
    model = GPT(MODEL)
    model.ngram_bias = build([stream(300)], SUM, V, BOS, CPU)
    hints = Hints(np.full(41, -1), np.zeros(41, np.float32))
    with pytest.raises(ConfigError, match="tilt expected a model without an n-gram bias"):
        score(model, stream(41).numpy(), np.ones(41), sliding_windows(40, 8, 3), tokens_per_batch=20, hints=hints)


# ---- in an artifact -------------------------------------------------------------------------------------------------

STORED = replace(SUM, rows=16, at_evaluation="artifact", dtype="bfloat16")


def stored() -> NgramBias:
    return build([stream(3000)], STORED, V, BOS, CPU)


def test_an_artifact_gives_the_tables_back_and_counts_them(tmp_path) -> None:
    model, settings = GPT(MODEL), ArtifactConfig(rounding="nearest")
    model.ngram_bias = stored()
    weights = quantize(model.state_dict(), settings).tensors
    without = write_artifact(tmp_path / "without.nbk", weights, MODEL, settings=settings)
    size = write_artifact(tmp_path / "with.nbk", weights, MODEL, settings=settings, ngram_bias=model.ngram_bias)
    artifact = read_artifact(tmp_path / "with.nbk")
    ledger = byte_ledger(artifact, 0, 16_000_000)
    assert artifact.size == size == ledger.total_bytes and size > without
    stream = next(s for s in ledger.streams if s.name == "ngram_bias")
    assert stream.values == 48 * V and 0.5 * stream.entropy_bytes < stream.coded_bytes <= size - without
    loaded, _ = load_model(artifact, CPU, torch.float32)
    assert torch.equal(loaded.ngram_bias.table, model.ngram_bias.table)
    assert loaded.ngram_bias.config == STORED
    plain, _ = load_model(read_artifact(tmp_path / "without.nbk"), CPU, torch.float32)
    assert plain.ngram_bias is None


def test_rounded_tables_stand_for_the_same_probabilities() -> None:
    exact, rounded = (
        build([stream(3000)], replace(STORED, at_evaluation="drop", dtype="float32"), V, BOS, CPU),
        stored(),
    )
    differs = torch.log_softmax(rounded.table.float(), 1) - torch.log_softmax(exact.table, 1)
    assert 0 < differs.abs().max() <= STORED.step
    assert not rounded.integers.amin(1).any()  # what a row has not seen costs next to nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "none"}, "header: expected a mode of the n-gram tables"),
        ({"weights": [0.2, 0.1]}, "header: expected weights to be 3 numbers, found"),
        ({"rows": 17}, "ngram_bias: expected"),
        ({"rows": 1 << 30}, "n-gram tables: expected at most 67,108,864 entries in all, found"),
        ({"hash": 1}, "header: expected only settings of this version's model, found 'hash'"),
        (None, "header: expected the streams"),
    ],
)
def test_a_header_that_does_not_fit_its_tables_is_refused(tmp_path, change: dict | None, message: str) -> None:
    weights = quantize(GPT(MODEL).state_dict(), ArtifactConfig(rounding="nearest")).tensors
    write_artifact(tmp_path / "a.nbk", weights, MODEL, ngram_bias=stored())
    header, data = container._split_body(container._read_body(tmp_path / "a.nbk")[1])
    values = json.loads(header.to_json())
    values["ngram_bias"] = None if change is None else values["ngram_bias"] | change
    (tmp_path / "a.nbk").write_bytes(container.assemble(json.dumps(values).encode(), data))
    with pytest.raises(ArtifactError, match=message):
        read_artifact(tmp_path / "a.nbk")


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    model, tables, settings = GPT(MODEL), stored(), ArtifactConfig(rounding="nearest")
    weights = quantize(model.state_dict(), settings).tensors
    size = write_artifact(tmp_path / "with.nbk", weights, MODEL, settings=settings, ngram_bias=tables)
    write_artifact(tmp_path / "a.nbk", weights, MODEL, settings=replace(settings, cap_bytes=size), ngram_bias=tables)
    for cap, code_bytes in ((size - 1, 0), (size + 99, 100)):
        with pytest.raises(ArtifactError, match=f"at most {size - 1:,} bytes, found {size:,}: fewer ngram_bias.rows"):
            tight = replace(settings, cap_bytes=cap)
            write_artifact(tmp_path / "b.nbk", weights, MODEL, settings=tight, ngram_bias=tables, code_bytes=code_bytes)
    assert not (tmp_path / "b.nbk").exists()
    alone = len(encode_tables(tables, MODEL))
    require_room(tables, MODEL, replace(settings, cap_bytes=alone + 101), 100)
    with pytest.raises(ArtifactError, match=f"less than the {alone:,} bytes that .* may take, found {alone:,}: fewer"):
        require_room(tables, MODEL, replace(settings, cap_bytes=alone + 100), 100)
    with pytest.raises(ArtifactError, match=r"expected artifact\.container niblick, found brotli"):
        write_artifact(
            tmp_path / "b.nbk", weights, MODEL, settings=replace(settings, container="brotli"), ngram_bias=tables
        )
    with pytest.raises(ArtifactError, match="expected at most 67,108,864 entries in all, found 402,653,184"):
        require_storable(replace(STORED, rows=16_384), replace(MODEL, vocab_size=8192), settings)
    with pytest.raises(ConfigError, match=r"ngram_bias\.step 0\.001 makes integers up to"):
        build([stream(300)], replace(STORED, step=0.001), V, BOS, CPU)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "product"}, "ngram_bias.mode must be one of"),
        ({"partitions": 3}, "ngram_bias.partitions must divide ngram_bias.rows 64: got 3"),
        ({"weights": (0.0, 0.0, 0.0)}, "ngram_bias.weights must not all be 0"),
        ({"weights": (float("nan"), 0.0, 0.1)}, "ngram_bias.weights must be within 100"),
        ({"rows": 0}, "ngram_bias.rows must be in"),
        ({"smoothing": 0.0}, "ngram_bias.smoothing must be in"),
    ],
)
def test_settings_are_checked(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SUM, **change)


def test_tokens_come_from_the_first_shards(tmp_path) -> None:
    for i in range(3):
        write_shard(tmp_path / f"{i}.bin", np.arange(10 * i, 10 * i + 10))
    paths = sorted(tmp_path.iterdir())
    assert np.concatenate(list(first_tokens(paths, 32, 17))).tolist() == list(range(17))
    with pytest.raises(DataError, match=r"1\.bin: token 5: expected an id below the vocabulary size 15, found 15"):
        list(first_tokens(paths, 15, 20))
