"""Phased test-time training against its definitions, its order of scores and steps, its ranks, and its ways to fail."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numerics import SCORE_NATS
from phased_reference import BruteForce
from ranks import one_thread, run_ranks

from niblick.evaluation import audit, phased_batch
from niblick.evaluation.audit_case import make_stream
from niblick.evaluation.audit_own import tiny_model
from niblick.evaluation.audit_phased import PhasedScorer
from niblick.evaluation.claims import Claims
from niblick.evaluation.clock import Clock
from niblick.evaluation.documents import Documents, chunk_counts, chunk_of, queue_of, rows_for, width_for
from niblick.evaluation.hints import Hints
from niblick.evaluation.lora import LoRA
from niblick.evaluation.phased import PHASED, PhasedConfig, phased_score
from niblick.evaluation.validation import ValidationSet
from niblick.kernels.ngram_tilt import ngram_tilt_ref

__all__ = ["one_thread"]

V = 10
SHAPE = {
    "num_layers": 2, "loop_start": 0, "loop_end": 0, "parallel_start": 1, "xsa_last_layers": 1, "model_dim": 16,
    "num_heads": 2, "num_kv_heads": 1, "mlp_hidden": 16, "rope_dims": 4, "gate_window": 4, "smear_window": 4,
}  # fmt: skip
SIZES = {
    "documents": 3, "chunk": 3, "window": 7, "rank": 2, "lr": 0.02, "sgd_lr": 0.05, "sgd_chunk": 8, "sgd_row": 4,
    "sgd_segment": 3,
}  # fmt: skip


def stream() -> np.ndarray:
    """Documents of 1 to 13 targets, among them two of one length; neither in order of length, nor in whole batches."""
    generator = np.random.default_rng(0)
    lengths = (5, 1, 13, 4, 8, 5, 2, 11)
    return np.concatenate([[1, *generator.integers(2, V, n - 1)] for n in lengths] + [[1]]).astype(np.uint16)


def small(name: str, **options) -> PhasedConfig:
    published = PHASED[name]
    sizes = dict(SIZES, prefix=6 if published.phases else 0, alpha=published.alpha and 3.6)
    sizes["weight_decay"] = 10 * published.weight_decay  # so that no decay goes unseen
    if published.short_chunks:
        sizes["short_chunks"] = ((5, 1), (8, 2))
    return replace(published, **(sizes | options))


def model(**options):
    """Channels of a layer's output with a negative scale too: for AdamW a positive one makes no difference."""
    tiny = tiny_model(V, **SHAPE, **options)
    with torch.no_grad():
        tiny.attn_scale[:, ::3] *= -1
        tiny.mlp_scale[:, 1::3] *= -1
    return tiny


def scores(model, config, tokens=None, **options) -> np.ndarray:
    """losses (N,), each target once."""
    tokens = stream() if tokens is None else tokens
    losses = np.full(len(tokens), np.nan)

    def record(targets, values):
        assert np.isnan(losses[targets]).all(), "scored twice"
        losses[targets] = values

    total = phased_score(model, ValidationSet(tokens, np.ones(len(tokens), np.int16)), config, record=record, **options)
    assert total.n_targets == total.n_bytes == len(tokens) - 1
    assert np.isclose(total.nll, losses[1:].sum())
    return losses


def drawn(model, config):
    def draw(number: int):
        lora, found = LoRA(model, config), {}
        lora.draw(config.seed * 1_000_003 + number)
        names = {"m": ["mlp"], "h": ["head"], "n": lora.layout.attention}
        for (slot, what), place in lora.layout.places.items():
            if what in names:
                parts = place.of(lora.master).split(config.rank, dim=1)
                found |= {(slot, name): part.clone() for name, part in zip(names[what], parts, strict=True)}
        return found

    return draw


VARIANTS = {name: small(name) for name in ("pr1530", "pr1610", "pr1626", "pr1787", "pr1855", "pr1953", "pr2014")}
VARIANTS["pr1855 corpus"] = small("pr1855", order="corpus")
# Without phases A is handed on from batch to batch.
VARIANTS["pr1855 without phases"] = small("pr1855", phases=0)
VARIANTS["pr1855 corpus without phases"] = small("pr1855", phases=0, order="corpus")
VARIANTS["pr1626 corpus, one batch"] = small("pr1626", order="corpus", documents=20)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_brute_force(name: str) -> None:
    config, tiny = VARIANTS[name], model()
    found = scores(tiny, config)
    wanted = BruteForce(dict(tiny.named_parameters()), tiny.config, stream(), config, drawn(tiny, config)).losses
    assert np.abs(found - wanted)[1:].max() < SCORE_NATS
    still = scores(tiny, replace(config, lr=0.0, sgd_lr=0.0))
    assert np.abs(still - wanted)[1:].max() > 100 * SCORE_NATS, "an adaptation that changes nothing tests nothing"


# ---- documents and shapes --------------------------------------------------------------------------------------------


def test_every_target_belongs_to_one_chunk_of_the_width() -> None:
    for name, config in VARIANTS.items():
        tokens = stream()
        documents, seen = Documents.of(tokens, 1), np.zeros(len(tokens), int)
        for batch in queue_of(documents, config):
            m = chunk_counts(documents, batch)
            for number in range(m.max()):
                width = width_for(number, batch.chunk, config.window)
                start, length, first, scored, _ = chunk_of(documents, batch, number, width, config)
                assert (length <= width).all() and (first + batch.chunk <= width).all(), name
                assert ((first <= scored) & (length - first <= batch.chunk)).all(), name
                for s, begin, end in zip(start, scored, length, strict=True):
                    seen[s + 1 + begin : s + 1 + end] += 1
        assert seen[0] == 0 and (seen[1:] == 1).all(), name


def test_the_published_queue() -> None:
    """Cut from the short end, equal lengths in order; the longest documents, an incomplete batch, come first."""
    config = replace(PHASED["pr1855"], documents=3)
    queue = queue_of(Documents.of(stream(), 1), config)
    assert [batch.documents.tolist() for batch in queue] == [[7, 2], [0, 5, 4], [1, 6, 3]]
    assert [batch.index for batch in queue] == [2, 1, 0]
    assert config.boundaries == [833, 1666, 2500] and PHASED["pr1934"].boundaries == [666, 1333, 2000]


def test_few_shapes() -> None:
    widths = [width_for(number, 48, 2048) for number in range(100)]
    assert all(min(48 * (n + 1), 2048) <= w <= 2048 for n, w in enumerate(widths)) and len(set(widths)) == 18
    assert {rows_for(n, 64) for n in range(1, 65)} == {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64}
    assert all(n <= rows_for(n, 64) <= 1.5 * n for n in range(1, 65)) and rows_for(5, 5) == 5


# ---- state -----------------------------------------------------------------------------------------------------------


def test_leaves_the_model_as_it_was() -> None:
    tiny = model().train()
    tiny.requires_grad_(False).embedding.requires_grad_(True)
    before = {name: p.clone() for name, p in tiny.named_parameters()}
    scores(tiny, VARIANTS["pr1855"])
    assert tiny.training and all(p.grad is None for p in tiny.parameters())
    assert [name for name, p in tiny.named_parameters() if p.requires_grad] == ["embedding"]
    assert all(torch.equal(p, before[name]) for name, p in tiny.named_parameters())


def test_the_softcaps_learn_in_a_phase(monkeypatch) -> None:
    """The published file leaves them at 30: its phases call a forward without them."""
    config, tiny = small("pr1626"), model(asymmetric_softcap=True)
    with torch.no_grad():
        tiny.softcap_positive.fill_(2.0), tiny.softcap_negative.fill_(3.0)
    caps, renew = [], phased_batch.BatchScorer.renew
    monkeypatch.setattr(
        phased_batch.BatchScorer, "renew", lambda s: (caps.append([c.item() for c in tiny.softcaps]), renew(s))
    )
    found = scores(tiny, config)
    assert caps[0] == [2.0, 3.0] and all(a != b for a, b in zip(caps[0], caps[-1], strict=True))
    wanted = BruteForce(dict(tiny.named_parameters()), tiny.config, stream(), config, drawn(tiny, config)).losses
    assert np.abs(found - wanted)[1:].max() < SCORE_NATS


def test_hints_tilt_the_score_and_not_the_step(monkeypatch) -> None:
    monkeypatch.setattr("niblick.evaluation.chunk_step.ngram_tilt", ngram_tilt_ref)
    tokens, tiny, config = stream(), model(), VARIANTS["pr1855"]
    hints = Hints(np.full(len(tokens), 3, np.int32), np.full(len(tokens), 0.5, np.float32))
    plain, tilted = scores(tiny, config), scores(tiny, config, hints=hints)
    # ln(1 + q (e^beta - 1)) - beta [hit], 0 <= q <= 1, holds if the model's distribution is the same in both.
    difference, hit = tilted - plain + 0.5 * (tokens == 3), tokens[1:] == 3
    q = np.expm1(difference[1:]) / np.expm1(0.5)
    assert ((q > 0) & (q < 1)).all() and np.abs(q - np.exp(-plain[1:]))[hit].max() < SCORE_NATS


# ---- divergence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finite", [True, False])
def test_a_batch_that_diverges_goes_on_without_adapters(finite: bool, monkeypatch) -> None:
    tiny, config = model(), small("pr1855", phases=0, lr=30.0, weight_decay=0.0, suspicious=1.0, patience=1)
    still = scores(tiny, replace(config, lr=0.0))
    if not finite:
        monkeypatch.setattr(LoRA, "step", lambda lora, rows: [x.fill_(np.nan) for x in (lora.master, lora.weights)])
    found = scores(tiny, config)
    assert np.isfinite(found[1:]).all()
    total = phased_score(tiny, ValidationSet(stream(), np.ones(len(stream()), np.int16)), config)
    assert len(total.notes) == 1 and "batches of documents diverged" in total.notes[0], total.notes
    ends = Documents.of(stream(), 1)
    last = ends.starts + ends.targets
    long = ends.targets > 3 * config.chunk
    assert np.abs(found - still)[last[long]].max() < SCORE_NATS
    assert (np.abs(found - still)[1:].max() > 0.1) == finite and ("nan nats" in total.notes[0]) != finite


def test_growing_losses_are_no_divergence() -> None:
    """Documents begin with what is easy. Where the model without adapters does no better, nothing is given up; and to
    look at it changes no score."""
    data, tiny, config = ValidationSet(stream(), np.ones(len(stream()), np.int16)), model(), small("pr1855")
    result = phased_score(tiny, data, replace(config, suspicious=0.01))
    assert result.notes == () and result.nll == phased_score(tiny, data, replace(config, suspicious=1e9)).nll


def test_a_phase_that_diverges_is_undone() -> None:
    tiny, config = model(), small("pr1626", phases=1, prefix=5, sgd_lr=1e3, lr=0.0)
    data = ValidationSet(stream(), np.ones(len(stream()), np.int16))
    found, still = phased_score(tiny, data, config), phased_score(tiny, data, replace(config, sgd_lr=0.0))
    assert abs(found.nll - still.nll) < SCORE_NATS and "undone" in found.notes[0] and not still.notes


# ---- a stop ----------------------------------------------------------------------------------------------------------


class Stops(Clock):
    """Says so after it was asked so many times."""

    def __init__(self, times: float) -> None:
        super().__init__()
        self.times = times

    def stop(self) -> str:
        self.times -= 1
        return "enough" if self.times < 0 else ""


def test_a_stop_keeps_what_is_scored() -> None:
    kept = []
    data = ValidationSet(stream(), np.ones(len(stream()), np.int16))
    result = phased_score(model(), data, VARIANTS["pr1855"], clock=Stops(5), record=lambda t, x: kept.append((t, x)))
    assert result.partial == "enough" and 0 < result.n_targets == sum(len(t) for t, _ in kept) < len(stream()) - 1
    whole = scores(model(), VARIANTS["pr1855"])
    assert all(np.abs(x - whole[t]).max() < SCORE_NATS for t, x in kept)


def test_a_stop_before_the_first_chunk() -> None:
    """While kernels compile, say. No batch is begun."""
    told = []
    data = ValidationSet(stream(), np.ones(len(stream()), np.int16))
    result = phased_score(
        model(), data, VARIANTS["pr1855"], clock=Stops(0), progress=lambda *counts: told.append(counts)
    )
    assert (result.partial, result.n_targets, result.n_bytes, told) == ("enough", 0, 0, [])
    assert np.isnan([result.bits_per_byte, result.nats_per_token]).all()


# ---- ranks -----------------------------------------------------------------------------------------------------------


def _of_rank(rank: int, config: PhasedConfig):
    kept = {}
    data = ValidationSet(stream(), np.arange(len(stream())).astype(np.int16))
    total = phased_score(
        model(), data, config, record=lambda t, x: kept.update(zip(t.tolist(), x.tolist(), strict=True))
    )
    return total, kept


def test_ranks_agree() -> None:
    """Phases included: which batches come before one does not depend on who was faster."""
    for config in (small("pr1855", order="corpus"), small("pr1610")):
        alone = scores(model(), config)
        first, second = run_ranks(_of_rank, 2, config)
        together = first[1] | second[1]
        assert len(first[1]) + len(second[1]) == len(together) == len(stream()) - 1
        assert all(abs(alone[t] - x) < SCORE_NATS for t, x in together.items())
        assert first[0].nll == second[0].nll and first[0].n_bytes == sum(range(len(stream())))


def _stopped_in_the_first_batch(rank: int, config: PhasedConfig):
    """By whichever rank has it."""
    clock, claim = Stops(np.inf), Claims.next

    def claimed(claims: Claims) -> int:
        if (place := claim(claims)) == 0:
            clock.times = 1
        return place

    Claims.next = claimed  # in this process, which ends with the test
    return phased_score(model(), ValidationSet(stream(), np.ones(len(stream()), np.int16)), config, clock=clock)


def test_a_stop_between_phases_is_one_of_all_ranks() -> None:
    """One stops by itself, the other learns of it while it waits for the first phase; both then add up their scores."""
    config = small("pr1855", documents=2, prefix=6)
    assert config.boundaries == [2, 4, 6]
    found = run_ranks(_stopped_in_the_first_batch, 2, config)
    assert {score.partial for score in found} == {"enough", "another rank stopped"}
    assert found[0].n_targets == found[1].n_targets == 2 * config.chunk and found[0].nll == found[1].nll


# ---- audit -----------------------------------------------------------------------------------------------------------

AUDITED = make_stream(V, n=44, seed=1)


def check(config: PhasedConfig, scorer=PhasedScorer) -> audit.Report:
    return audit.check(scorer(model(), config), AUDITED, vocab_size=V, cuts=4, swaps=1)


@pytest.mark.parametrize("name", ["pr1626", "pr1855"])
def test_audit_finds_nothing_in_corpus_order(name: str) -> None:
    report = check(small(name, order="corpus", phases=1, prefix=3))
    assert report.refuted == [], report.text()
    checked = {result.test for result in report.results if result.status == "nothing found"}
    assert {"T0", "T1", "T2", "T4", "T5", "T10", "T11", "T12", "T14", "T15"} <= checked


def test_audit_refutes_the_published_order() -> None:
    report = check(small("pr1626", phases=1, prefix=3))
    assert "T1" in report.refuted and "T4" not in report.refuted, report.text()


def test_audit_sees_a_step_before_the_score(monkeypatch) -> None:
    """By the log, and by what the losses do when later words of the chunk change."""
    score = phased_batch.BatchScorer._score

    def cheat(self, number, chunk, shape):
        if shape.steps:
            self.step(chunk, shape)
            self._step(number, shape.rows)
        return score(self, number, chunk, shape)

    monkeypatch.setattr(phased_batch.BatchScorer, "_score", cheat)
    report = check(small("pr1626", order="corpus", phases=0))
    assert report.refuted == ["T1", "T4"], report.text()
