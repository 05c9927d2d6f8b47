"""The audit is silent on scorers that keep the rules, and each planted cheat is caught by the test named for it."""

import audit_cheats as cheats
import numpy as np
import pytest

from niblick.data.errors import DataError
from niblick.evaluation import audit
from niblick.evaluation.audit_case import Case, drawn, make_stream
from niblick.evaluation.audit_causal import _futures
from niblick.evaluation.audit_protocol import Log
from niblick.evaluation.audit_report import Finding

V = cheats.V
STREAM = make_stream(V, n=92, seed=3)  # a last chunk of three targets
TRAIN = [np.array([1, 5, 6, 7], np.uint16), np.array([1, 2], np.uint16)]


def check(scorer, tokens=STREAM, **options) -> audit.Report:
    options = {"vocab_size": V, "decode": cheats.decode, "train_documents": TRAIN, "cuts": 8, **options}
    return audit.check(scorer, tokens, **options)


CHEATS = {
    cheats.RemembersCalls: ("T0", "C3"),
    cheats.TrainsFirstAndLies: ("T1", "C1"),
    cheats.CountsTokensLeft: ("T1", "C1"),
    cheats.SecondPass: ("T5", "C4"),
    cheats.TargetGate: ("T2", "C2"),
    cheats.MassAboveOne: ("T2", "C2"),
    cheats.CacheKeyedByTarget: ("T2", "C2"),
    cheats.BestOfTwo: ("T2", "C2"),
    cheats.NegativeProbability: ("T3", "C2"),
    cheats.DumpsAnother: ("T3", "C2"),
    cheats.TrainsFirst: ("T4", "C3"),
    cheats.DropsTargets: ("T5", "C4"),
    cheats.TailTwice: ("T5", "C4"),
    cheats.CalibratesOnValidation: ("T6", "C1"),
    cheats.TrainsBeforeQuantisation: ("T6", "C1"),
    cheats.WrongByteTable: ("T8", "R2"),
    cheats.LastDocumentThrice: ("T8", "R2"),
    cheats.SlowClock: ("T10", "R1"),
    cheats.HintsAndAdaptation: ("T11", "C1"),
    cheats.WarmsUpOnValidation: ("T12", "R2"),
    cheats.DeadLever: ("T14", "C3"),
    cheats.RankDependent: ("T15", "C4"),
    cheats.ReadsATable: ("T7", "R1"),
    cheats.TwoSeeds: ("T16", "R2"),
    cheats.RoundsDown: ("T16", "R2"),
    cheats.TwoConfigurations: ("T16", "R2"),
}
ALONE = (  # caught by that test and by no other
    cheats.CountsTokensLeft,
    cheats.NegativeProbability, cheats.DumpsAnother, cheats.TailTwice, cheats.CalibratesOnValidation,
    cheats.WrongByteTable, cheats.LastDocumentThrice, cheats.SlowClock, cheats.RankDependent, cheats.ReadsATable,
    cheats.TwoSeeds, cheats.RoundsDown, cheats.TwoConfigurations,
)  # fmt: skip
RIGHT_LOSSES = {
    cheats.NegativeProbability, cheats.DumpsAnother, cheats.TailTwice, cheats.CalibratesOnValidation,
    cheats.WrongByteTable, cheats.LastDocumentThrice, cheats.SlowClock, cheats.WarmsUpOnValidation, cheats.DeadLever,
    cheats.RankDependent, cheats.TwoSeeds, cheats.RoundsDown, cheats.TwoConfigurations,
}  # fmt: skip


def test_silent_on_an_honest_scorer():
    report = check(cheats.Honest())
    assert report.findings == [] and report.refuted == [], report.text()
    assert {result.test for result in report.results if result.status == "not checked"} == {"T13"}
    assert "nothing found; not checked: T13. An audit of samples" in report.text()


@pytest.mark.parametrize("seed", range(3))
def test_silent_on_other_streams(seed):
    assert check(cheats.Honest(), make_stream(V, n=60 + seed, seed=seed), seed=seed).refuted == []


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.__name__)
def test_cheat_is_caught_by_the_test_named_for_it(cheat):
    test, condition = CHEATS[cheat]
    report = check(cheat())
    assert report[test].status == "refuted", report.text()
    assert condition in {finding.condition for finding in report[test].findings}
    assert f"{condition}, broken: " in report.text()
    assert cheat not in ALONE or report.refuted == [test], report.text()


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.__name__)
def test_wrong_losses_are_seen_without_a_word_of_the_scorer(cheat):
    scorer = cheat()
    report = check(lambda tokens: scorer(tokens))
    assert {report[test].status for test in ("T3", "T4", "T6", "T8", "T10", "T12", "T14", "T15", "T16")} == {
        "not checked"
    }
    assert bool(report.refuted) == (cheat not in RIGHT_LOSSES), report.text()


def test_an_order_of_documents_by_length_is_refuted_by_their_ends_alone():
    report = check(cheats.ShortestFirst())
    assert report["T11"].status == "nothing found" and "T1" in report.refuted
    assert "end" in report["T1"].findings[0].evidence, report.text()


def test_a_peek_after_one_id_is_seen_where_all_places_are_tried():
    """Few of them miss it, and another seed tries others."""
    places = np.flatnonzero(STREAM[:-2] == cheats.PeeksAfterOneId.rare)
    assert 1 <= len(places) <= 8
    report = check(cheats.PeeksAfterOneId(), cuts=128)
    assert report["T1"].status == "refuted" and report["T1"].note.startswith("90 of 90 cuts, "), report.text()
    by_seed = [check(cheats.PeeksAfterOneId(), cuts=4, swaps=1, seed=seed)["T1"].status for seed in range(8)]
    assert set(by_seed) == {"refuted", "nothing found"}


def test_places_are_drawn_from_all_parts():
    generator = np.random.default_rng(0)
    assert drawn(generator, 7, 9).tolist() == list(range(7)) and drawn(generator, 0, 3).tolist() == []
    found = [drawn(generator, 96, 8) for _ in range(20)]
    assert all((places // 12 == np.arange(8)).all() for places in found)
    assert len({tuple(places) for places in found}) == 20


def test_a_scorer_that_goes_by_the_length_is_warned_of():
    scorer = cheats.CountsTokensLeft()
    scorer.uses_length = True
    report = check(scorer)
    assert report.refuted == [] and "warning, C1: the scorer goes by the stream's length" in report.text()


def test_a_scorer_of_one_length_is_warned_of():
    def of_one_length(tokens):
        if len(tokens) < len(STREAM):
            raise ValueError("too short")
        return cheats.Honest()(tokens)

    report = check(of_one_length)
    assert report.refuted == [] and "tokens is not scored: too short" in report["T1"].findings[0].evidence


def test_findings_name_the_place():
    report = check(cheats.DropsTargets())
    finding = report["T5"].findings[0]
    assert finding.position == 89 and finding.evidence == "3 of 91 targets are not scored"
    finding = check(cheats.TrainsFirst())["T4"].findings[0]
    assert finding.position == 1 and "makes state 1 uses it before its score; 8 targets are" in finding.evidence
    finding = check(cheats.WrongByteTable())["T8"].findings[0]
    assert STREAM[finding.position] == 1 and "bytes: its text has" in finding.evidence


def test_a_training_document_in_the_validation_stream_is_found():
    document = STREAM[: np.flatnonzero(STREAM == 1)[1]]
    report = check(cheats.Honest(), train_documents=[*TRAIN, document])
    assert report.refuted == ["T9"]
    assert report.findings[0].evidence == "validation document 0 is training document 2; 1 are"


def test_time_that_is_left_out_warns_and_does_not_refute(monkeypatch):
    fast = [cheats.Interval("compile", 100.0, inside=False), cheats.Interval("score", 400.0)]
    monkeypatch.setattr(cheats.Honest, "clock", lambda self: fast)
    report = check(cheats.Honest())
    assert report.refuted == [] and report["T10"].status == "nothing found" and "broken" not in report.text()
    assert "warning, R1: outside the claimed time: compile 100.0 s" in report.text()


def test_the_artifact_may_be_opened(tmp_path, monkeypatch):
    (tmp_path / "artifact").write_text("x")
    monkeypatch.setattr(cheats.ReadsATable, "path", str(tmp_path / "artifact"))
    scorer = cheats.ReadsATable()
    assert check(scorer)["T7"].findings[0].evidence == f"open {tmp_path}/artifact while scoring"
    scorer.files = [tmp_path / "artifact"]
    assert check(scorer).refuted == []


class Scripted(cheats.Honest):
    """An honest scorer whose log is written by a test."""

    def __init__(self, script) -> None:
        super().__init__()
        self.script = script

    def __call__(self, tokens):
        losses = super().__call__(tokens)
        self.log = Log()
        self.script(self.log, losses, np.arange(1, len(tokens)))
        return losses


def everything(log, losses, targets):
    log.scored(targets, losses[targets])


SCRIPTS = {
    "a state that nothing made": (
        lambda log, losses, targets: log.scored(targets, losses[targets], state=3),
        "T4", "state 3 was never made",
    ),
    "another loss": (
        lambda log, losses, targets: log.scored(targets, losses[targets] + 1e-3),
        "T4", "the log says",
    ),
    "a step that forks from a state that used the target": (
        lambda log, losses, targets: (
            log.scored(targets[:50], losses[targets[:50]]), log.updated(targets[:50], 0, 1), log.updated([], 1, 2),
            log.scored(targets[49:], losses[targets[49:]], state=2),
        ),
        "T4 T5", "scored by state 2, which has used it; 1 targets are",
    ),
    "a step without a score": (
        lambda log, losses, targets: (
            everything(log, losses, targets[:-1]), log.updated(targets[-1:], 0, 1),
            everything(log, losses, targets[-1:]),
        ),
        "T4", "the step that makes state 1 uses it before its score; 1 targets are",
    ),
    "a target of another stream": (
        lambda log, losses, targets: (everything(log, losses, targets), log.updated([92], 0, 1)),
        "T4", "the log names target 92 of a stream of 92 tokens",
    ),
    "token 0": (
        lambda log, losses, targets: (everything(log, losses, targets), log.scored([0], [np.nan])),
        "T4 T5", "the log says nan nats",
    ),
    "a target too few": (
        lambda log, losses, targets: log.scored(targets[:-1], losses[targets[:-1]]),
        "T5", "has a loss, but is scored 0 times in the log",
    ),
    "a target too many": (
        lambda log, losses, targets: (everything(log, losses, targets), everything(log, losses, targets[-1:])),
        "T5", "scored 2 times; 1 targets are",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_logs_that_break_a_rule(name):
    script, test, evidence = SCRIPTS[name]
    report = check(Scripted(script))
    assert report.refuted == test.split(), report.text()
    assert evidence in report.findings[0].evidence


def test_a_log_of_a_step_that_has_no_part_in_later_scores_is_no_finding():
    """Several steps on targets that are final, and a branch that is dropped: both are allowed."""

    def script(log, losses, targets):
        log.scored(targets[:50], losses[targets[:50]])
        log.updated(targets[:50], 0, 1)
        log.updated(targets[:50], 1, 2)
        log.updated(targets[:50], 0, 3)
        log.scored(targets[50:], losses[targets[50:]], state=2)

    assert check(Scripted(script)).refuted == []


@pytest.mark.parametrize(
    ("change", "evidence"),
    [
        ({"nll": 1.0}, "the total is 1.000000 nats: the losses sum to"),
        ({"n_targets": 90}, "the total is over 90 targets: the stream has 91"),
        ({"n_bytes": 7}, "the total is over 7 bytes: the targets have"),
    ],
)
def test_each_figure_of_the_total_is_compared(change, evidence, monkeypatch):
    total = cheats.Honest().total(STREAM)._replace(**change)
    monkeypatch.setattr(cheats.Honest, "total", lambda self, tokens: total)
    report = check(cheats.Honest())
    assert report.refuted == ["T5"] and [evidence in finding.evidence for finding in report.findings] == [True]


def test_a_change_that_is_not_declared_is_found(monkeypatch):
    monkeypatch.setattr(cheats.Honest, "levers", ())
    report = check(cheats.Honest())
    assert report.refuted == ["T14"] and report.findings[0].evidence == "counts changes and is not declared"


def test_warm_up_is_found_by_its_trace_and_by_its_tokens():
    evidence = [finding.evidence for finding in check(cheats.WarmsUpOnValidation())["T12"].findings]
    assert evidence == ["warm-up uses 8 validation tokens", "warm-up changes step"]


@pytest.mark.parametrize("what", ["absent", "noise"])
def test_an_artifact_is_compared_with_validation_absent_and_replaced(what, monkeypatch):
    def artifact(self, validation):
        other = validation is None if what == "absent" else validation is not None and (validation != STREAM).any()
        return b"other" if other else b"same"

    monkeypatch.setattr(cheats.Honest, "artifact", artifact)
    report = check(cheats.Honest())
    assert report.refuted == ["T6"] and what in report.findings[0].evidence and len(report.findings) == 1


def test_losses_that_are_none_are_found():
    for wrong in (np.inf, -0.1):
        losses = np.where(np.arange(len(STREAM)) == 40, wrong, 1.0)
        report = check(lambda tokens, losses=losses: losses)
        assert Finding("C2", f"its loss is {wrong}", 40) in report["T5"].findings


def test_a_scorer_cannot_change_the_stream():
    def vandal(tokens):
        losses = cheats.Honest()(tokens)
        tokens[:] = 1
        return losses

    before = STREAM.copy()
    assert check(vandal).refuted == [] and (before == STREAM).all()


def test_futures_change_what_they_say_and_keep_the_past():
    case = Case(cheats.Honest(), STREAM, V, 1, np.zeros(len(STREAM)), None)
    past, starts = np.arange(1, 32), STREAM == 1
    futures = dict(_futures(case, np.random.default_rng(0), past))
    assert (futures.pop("the stream ends") == STREAM[:32]).all()
    for changed in futures.values():
        assert (changed[:32] == STREAM[:32]).all() and changed.max() < V
    words, ended, longer, later = futures.values()
    assert ((words == 1) == starts).all() and (words != STREAM)[32:][~starts[32:]].all()
    assert np.flatnonzero(ended != STREAM).tolist() == [32] and ended[32] == 1
    end = int(np.flatnonzero(starts & (np.arange(len(STREAM)) > 31))[0])
    assert np.flatnonzero(longer != STREAM).tolist() == [end]
    assert (later[: end + 1] == STREAM[: end + 1]).all() and ((later == 1) != starts)[end + 1 :].any()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([5, 6, 7], "begins with a document"),
        ([1, 6], "at least 3 tokens"),
        ([1, 6, V], f"expected an id below the vocabulary size {V}, found {V}"),
        ([1.0, 2.0, 3.0], "integers"),
        ([1, -2, 3], "expected ids from 0 on, found -2"),
    ],
)
def test_bad_streams_are_refused(tokens, message):
    with pytest.raises(DataError, match=message):
        check(cheats.Honest(), np.array(tokens))


def test_losses_of_another_shape_are_refused():
    with pytest.raises(DataError, match=r"expected losses of shape \(92,\) from the scorer, found \(91,\)"):
        check(lambda tokens: np.zeros(len(tokens) - 1))
