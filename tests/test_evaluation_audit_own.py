"""The audit on this package's own methods: silent as they are, and not where one of them is broken."""

from contextlib import nullcontext

import numpy as np
import pytest

from niblick.data import shards, tokenizer
from niblick.data.tokenizer import ByteTable
from niblick.evaluation import adaptation, audit, hints
from niblick.evaluation import run as run_module
from niblick.evaluation import score as score_module
from niblick.evaluation import score_first as score_first_module
from niblick.evaluation.audit_case import make_stream
from niblick.evaluation.audit_own import ModelScorer, tiny_model
from niblick.kernels.ngram_tilt import ngram_tilt_ref
from niblick.kernels.softcapped_ce import softcapped_ce_ref
from niblick.model.config import EvalConfig

V = 12
STREAM = make_stream(V, n=82, seed=1)
SLIDING = EvalConfig(method="sliding", sequence_length=16, stride=8, tokens_per_batch=40)
PLAIN = EvalConfig(sequence_length=16, tokens_per_batch=40)
SCORE_FIRST = EvalConfig(
    method="score-first", sequence_length=8, stride=4, tokens_per_batch=200,
    set=("chunk_rows=16", "learning_rate=0.3", "epochs=1", "stop_above=1e9"),
)  # fmt: skip
SHORT_STREAM = make_stream(V, n=46, seed=1)
ROWS = {"attention_span": "rows", "smear": "window"}


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    """The kernels, interpreted, take a second a call, and have tests of their own."""
    monkeypatch.setattr(score_module, "softcapped_ce", softcapped_ce_ref)
    monkeypatch.setattr(score_module, "ngram_tilt", ngram_tilt_ref)


def scorer(config=PLAIN, *, tilt=None, table=None, ranked=False, **options) -> ModelScorer:
    """ranked: also on several ranks, which takes a second."""
    model = tiny_model(V, num_layers=3, loop_end=1, parallel_start=2, xsa_last_layers=3, mlp_hidden=64, **options)
    made = ModelScorer(model, config, tilt=tilt, table=table)
    if not ranked:
        made.ranked = None
    return made


def check(scorer, **options) -> audit.Report:
    return audit.check(scorer, STREAM, vocab_size=V, cuts=5, swaps=3, **options)


def found_by(test: str, scorer) -> list:
    """What one test of the audit finds on the short stream."""
    losses = scorer(SHORT_STREAM)
    case = audit.Case(scorer, SHORT_STREAM, V, 1, losses, scorer.log, cuts=5)
    return next(function for name, _, function in audit.TESTS if name == test)(case)


CHECKED = {"T0", "T1", "T2", "T3", "T4", "T5", "T7", "T10", "T11", "T12", "T14"}


@pytest.mark.parametrize("tilt", [None, "B"], ids=["", "tilt"])
@pytest.mark.parametrize("options", [{}, ROWS], ids=["documents", "rows"])
@pytest.mark.parametrize("config", [PLAIN, SLIDING], ids=["plain", "sliding"])
def test_silent_on_our_methods(config, options, tilt):
    if tilt:
        hinted = hints.token_hints(STREAM).tokens >= 0
        assert hinted.sum() > 3, "a stream without hints tests nothing"
    report = check(scorer(config, tilt=tilt, **options))
    assert report.refuted == [], report.text()
    isolated = not options and not tilt
    checked = CHECKED | ({"T13"} if isolated else set())
    assert {result.test for result in report.results if result.status == "nothing found"} == checked


@pytest.mark.parametrize(("tilt", "options"), [(None, {}), ("B", ROWS)], ids=["documents", "rows, tilt"])
def test_silent_on_score_first(tilt, options):
    mine = scorer(SCORE_FIRST, tilt=tilt, ranked=bool(tilt), **options)
    report = audit.check(mine, SHORT_STREAM, vocab_size=V, cuts=2, swaps=1)
    assert report.refuted == [], report.text()
    assert {r.test for r in report.results if r.status == "nothing found"} == CHECKED | ({"T15"} if tilt else set())


def test_training_on_a_chunk_before_it_is_scored_is_seen(monkeypatch):
    """The log tells of it, and the scores do without it."""
    windows = score_first_module.training_windows
    monkeypatch.setattr(score_first_module, "training_windows", lambda chunk, *a: windows(min(chunk + 1, 1), *a))
    assert "uses it before its score" in found_by("T4", scorer(SCORE_FIRST))[0].evidence
    assert [finding.condition for finding in found_by("T1", scorer(SCORE_FIRST))] == ["C1"]


def test_an_adaptation_that_outlives_its_evaluation_is_seen(monkeypatch):
    """The second call is scored by parameters that have seen all but the last chunk."""
    monkeypatch.setattr(score_first_module, "parameters_kept", lambda model: nullcontext([*model.parameters()]))
    assert found_by("T0", scorer(SCORE_FIRST))


def test_a_lever_that_does_not_act_is_seen(monkeypatch):
    """The published fault: learned softcaps that the training forward never used."""

    def constant(model, *arguments):
        loss = mean_gradients(model, *arguments)
        model.softcap_positive.grad.zero_()
        return loss

    assert not found_by("T14", scorer(SCORE_FIRST, asymmetric_softcap=True))
    mean_gradients = score_first_module.mean_gradients
    monkeypatch.setattr(score_first_module, "mean_gradients", constant)
    (finding,) = found_by("T14", scorer(SCORE_FIRST, asymmetric_softcap=True))
    assert finding.evidence == "softcap_positive is said to be trained and does not change"


def test_ranks_that_disagree_are_seen(monkeypatch):
    """Each steps by the gradient of its own share."""
    monkeypatch.setattr(adaptation, "sum_over_ranks", lambda tensors: None)
    assert found_by("T15", scorer(SCORE_FIRST, ranked=True))


def test_a_smear_gate_that_reads_across_documents_is_seen_where_isolation_is_claimed():
    leaky = scorer(smear_bos_mask=False)
    assert not leaky.isolates_documents and check(leaky)["T13"].status == "not checked"
    leaky.isolates_documents = True
    report = check(leaky)
    assert report.refuted == ["T13"] and STREAM[report.findings[0].position - 1] == 1, report.text()


def test_a_tail_that_is_dropped_is_seen():
    report = check(scorer(EvalConfig(sequence_length=16, tokens_per_batch=40, tail="drop")))
    assert report.refuted == ["T5"] and report["T5"].findings[0].evidence == "1 of 81 targets are not scored"


def test_hints_that_know_their_target_are_seen(monkeypatch):
    """The published fault: a hint is emitted only where the target can be what it hints at."""

    def gated(tokens, *_, **__):
        found = hints.token_hints(tokens)
        return hints.Hints(np.where(found.tokens % 2 == tokens % 2, found.tokens, -1), found.betas)

    monkeypatch.setattr(run_module, "token_hints", gated)
    report = audit.check(scorer(tilt="B"), STREAM, vocab_size=V, cuts=2, swaps=6)
    assert "T2" in report.refuted and "T1" not in report.refuted, report.text()


def test_hints_of_a_second_pass_are_seen(monkeypatch):
    def whole_stream(tokens, *_, **__):
        return hints.Hints(*(part[len(tokens) :] for part in hints.token_hints(np.concatenate([tokens, tokens]))))

    monkeypatch.setattr(run_module, "token_hints", whole_stream)
    report = check(scorer(tilt="B"))
    assert {"T2", "T3"} <= set(report.refuted), report.text()


def test_windows_scored_twice_are_seen(monkeypatch):
    windows_of = run_module.windows_of
    monkeypatch.setattr(run_module, "windows_of", lambda *a: [*windows_of(*a), windows_of(*a)[-1]])
    report = check(scorer())
    assert report.refuted == ["T5"] and "scored 2 times; 1 targets are" in report.findings[0].evidence


def test_a_model_that_learns_while_it_is_scored_is_seen(monkeypatch):
    """No log tells of it; the second call starts from other parameters."""
    token_nll = score_module.token_nll

    def learning(model, *arguments):
        losses = token_nll(model, *arguments)
        model.embedding.data *= 1.01
        return losses

    monkeypatch.setattr(score_module, "token_nll", learning)
    report = check(scorer())
    assert {"T0", "T14"} <= set(report.refuted), report.text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A shard of each side and their tokenizer."""
    folder = tmp_path_factory.mktemp("audit")
    words = np.random.default_rng(0).choice(["bogey", "par", "eagle", "niblick", "mashie", "spoon", "é"], (40, 12))
    texts = [" ".join(row) for row in words]
    tokenizer.train(texts, 300, folder / "tokenizer.model")
    processor = tokenizer.load(folder / "tokenizer.model")
    documents = [tokenizer.encode_document(processor, text) for text in [*texts[:8], "ß" + texts[8]]]
    shards.write_shard(folder / "toy_val_000000.bin", np.concatenate([documents[8], *documents[:4]]))
    shards.write_shard(folder / "toy_train_000000.bin", np.concatenate(documents[4:8]))
    return folder


def text_stream(folder):
    processor = tokenizer.load(folder / "tokenizer.model")
    stream = np.concatenate([shards.read_shard(path) for path in shards.find_shards(folder, "val")])
    return processor, stream


def test_bytes_of_real_text(folder):
    processor, stream = text_stream(folder)
    ends = np.flatnonzero(stream == 1)
    stream = stream[: ends[3] + 1]
    mine = ModelScorer(tiny_model(300, num_layers=3, loop_end=1, parallel_start=2, xsa_last_layers=3), PLAIN)

    def bytes_found(table):
        mine.table = table
        mine.byte_counts = ModelScorer.byte_counts.__get__(mine)
        losses = np.zeros(len(stream))
        case = audit.Case(
            mine, stream, 300, 1, losses, None, decode=lambda ids: tokenizer.decode_documents(processor, ids)
        )
        return audit.audit_claims.byte_audit(case)

    right = ByteTable.of(processor)
    assert bytes_found(right) == []
    spelled = ByteTable(np.where(right.base == 1, 6, right.base), right.lead, right.boundary)  # "<0xE2>" by its letters
    unmarked = ByteTable(right.base, right.lead & False, right.boundary)
    for wrong in (spelled, unmarked):
        assert bytes_found(wrong)[0].condition == "R2"


def test_command_on_a_folder(folder, capsys):
    words = ["plain", "--data", str(folder), "--n-tokens", "20", "--cuts", "2", "--swaps", "1"]
    assert audit.command(words) == 0
    text = capsys.readouterr().out
    assert "nothing found (20 tokens, 1 documents)" in text and "(2 of 18 cuts, " in text
    assert "(5 documents, " in text and "(5 documents, 4 of training)" in text  # of the whole data
    assert all(f"{test}{what:30}nothing found" in text for test, what in (("T8  ", "bytes"), ("T9  ", "split")))


def test_case_operators_are_not_taken_for_miscounted_bytes(tmp_path, capsys):
    """The bytes of a CaseOps token are not those of the decoded text, so a foreign scorer that counts rightly would be
    accused."""
    texts = ["The Niblick of OLD Prestwick", "a SHORT and Precise Shot", "Eagle and BOGEY at the Spoon"] * 8
    tokenizer.train(texts, 330, tmp_path / "tokenizer.model", case_operators=True)
    processor = tokenizer.load(tmp_path / "tokenizer.model")
    stream = np.concatenate([tokenizer.encode_document(processor, text) for text in texts[:4]])
    shards.write_shard(tmp_path / "toy_val_000000.bin", stream)
    words = ["plain", "--data", str(tmp_path), "--n-tokens", "40", "--cuts", "2", "--swaps", "1"]
    assert audit.command(words) == 0
    assert (
        "T8  bytes                         not checked (no tokenizer without case operators" in capsys.readouterr().out
    )
