"""Tests of what is scored when: T4, T5, T12, T14, and whether two calls agree."""

import hashlib
from collections.abc import Mapping

import numpy as np

from niblick.evaluation.audit_case import Case
from niblick.evaluation.audit_protocol import Scored, Total, Updated
from niblick.evaluation.audit_report import Finding, NotChecked

TOTAL_NATS = 1e-4
"""How far a submitted sum may be from that of its losses, a target: the sum may be in float32."""


def repeatable(case: Case) -> list[Finding]:
    """T0. A second call starts from the artifact too. Where it does not, the stream was seen before it was scored, and
    the other tests compare what cannot be compared."""
    difference = case.difference(case.tokens)[1:]
    case.tried.append(f"{len(case.tokens)} tokens, {(case.tokens == case.bos_id).sum()} documents")
    moved = np.flatnonzero(~(difference <= case.tolerance))
    if not len(moved):
        return []
    evidence = f"a second call's loss differs by {difference[moved[0]]:.3g} nats; {len(moved)} scores move"
    return [Finding("C3", evidence, int(moved[0]) + 1)]


def event_order(case: Case) -> list[Finding]:
    """T4. A step uses only targets whose scores are final, and no score comes from a state that has used its target."""
    findings, is_final, used = [], np.zeros(len(case.tokens), bool), {0: np.zeros(len(case.tokens), bool)}
    for event in case.needed_log().events:
        outside = (event.targets < 0) | (event.targets >= len(case.tokens))
        if outside.any():
            evidence = f"the log names target {event.targets[outside][0]} of a stream of {len(case.tokens)} tokens"
            return [Finding("C3", evidence)]
        state = event.base if isinstance(event, Updated) else event.state
        if state not in used:
            findings.append(Finding("C3", f"state {state} was never made", _first(event.targets)))
            used[state] = np.zeros(len(case.tokens), bool)
        if isinstance(event, Scored):
            early = event.targets[used[state][event.targets]]
            if len(early):
                evidence = f"scored by state {state}, which has used it; {len(early)} targets are"
                findings.append(Finding("C3", evidence, int(early[0])))
            is_final[event.targets] = True
            continue
        early = event.targets[~is_final[event.targets]]
        if len(early):
            evidence = f"the step that makes state {event.made} uses it before its score; {len(early)} targets are"
            findings.append(Finding("C3", evidence, int(early[0])))
        used[event.made] = used[state].copy()
        used[event.made][event.targets] = True
    return findings + _log_is_true(case)


def _log_is_true(case: Case) -> list[Finding]:
    """The log's losses are those that were returned."""
    for event in case.needed_log().events:
        if not isinstance(event, Scored):
            continue
        if event.losses.shape != event.targets.shape:
            return [Finding("C3", f"the log has {len(event.losses)} losses for {len(event.targets)} targets")]
        wrong = np.flatnonzero(~(np.abs(event.losses - case.losses[event.targets]) <= case.tolerance))
        if len(wrong):
            target = int(event.targets[wrong[0]])
            evidence = f"the log says {event.losses[wrong[0]]:.6f} nats, the score is {case.losses[target]:.6f}"
            return [Finding("C3", evidence, target)]
    return []


def _first(targets: np.ndarray) -> int | None:
    return int(targets[0]) if len(targets) else None


def exactly_once(case: Case) -> list[Finding]:
    """T5. Every target counts, once, with a finite loss; the total is that of the losses."""
    n_targets = len(case.tokens) - 1
    scored = ~np.isnan(case.losses)
    findings = []
    if not scored[1:].all():
        dropped = np.flatnonzero(~scored[1:]) + 1
        evidence = f"{len(dropped)} of {n_targets} targets are not scored"
        findings.append(Finding("C4", evidence, int(dropped[0])))
    wrong = np.flatnonzero((np.isinf(case.losses) | (case.losses < 0))[1:]) + 1
    if len(wrong):
        findings.append(Finding("C2", f"its loss is {case.losses[wrong[0]]}", int(wrong[0])))
    return findings + _once_in_the_log(case, scored) + _total(case, scored)


def _once_in_the_log(case: Case, scored: np.ndarray) -> list[Finding]:
    if case.log is None or not case.log.events:
        return []
    logged = case.log.order()
    times = np.bincount(logged[(logged >= 0) & (logged < len(scored))], minlength=len(scored))
    findings = []
    for what, targets in (
        ("scored {} times", np.flatnonzero(times > 1)),
        ("has a loss, but is scored {} times in the log", np.flatnonzero((times == 0) & scored)),
    ):
        targets = targets[targets > 0]
        if len(targets):
            evidence = f"{what.format(times[targets[0]])}; {len(targets)} targets are"
            findings.append(Finding("C4", evidence, int(targets[0])))
    if times[0]:
        findings.append(Finding("C4", "token 0 is scored, and is no target", 0))
    return findings


def _total(case: Case, scored: np.ndarray) -> list[Finding]:
    total = getattr(case.scorer, "total", None)
    if total is None:
        return []
    claimed = Total(*total(case.tokens.copy()))
    nll, n_targets = float(case.losses[1:][scored[1:]].sum()), len(case.tokens) - 1
    findings = []
    if claimed.n_targets != n_targets:
        findings.append(Finding("C4", f"the total is over {claimed.n_targets} targets: the stream has {n_targets}"))
    if not abs(claimed.nll - nll) <= TOTAL_NATS * max(1, n_targets):
        findings.append(Finding("C4", f"the total is {claimed.nll:.6f} nats: the losses sum to {nll:.6f}"))
    counts = getattr(case.scorer, "byte_counts", None)
    if claimed.n_bytes is not None and counts is not None:
        n_bytes = int(np.asarray(counts(case.tokens.copy()))[1:].sum())
        if claimed.n_bytes != n_bytes:
            findings.append(Finding("R2", f"the total is over {claimed.n_bytes} bytes: the targets have {n_bytes}"))
    return findings


def warm_up_purity(case: Case) -> list[Finding]:
    """T12. What is run before scoring leaves no trace, and uses no validation token."""
    findings = []
    for event in case.log.events if case.log is not None else []:
        if isinstance(event, Updated) and event.warm_up and len(event.targets):
            findings.append(
                Finding("R2", f"warm-up uses {len(event.targets)} validation tokens", _first(event.targets))
            )
    if not findings and not getattr(case.scorer, "warms_up", True):
        raise NotChecked("the scorer has no warm-up")
    if getattr(case.scorer, "state", None) is None and not findings:
        raise NotChecked("the scorer offers no state" + (", only a log" if case.log else ""))
    if getattr(case.scorer, "state", None) is not None:
        for name in _changed(case.scorer.state("loaded", case.tokens), case.scorer.state("warm", case.tokens)):
            findings.append(Finding("R2", f"warm-up changes {name}"))
    return findings


def lever_liveness(case: Case) -> list[Finding]:
    """T14. What is said to be trained while scoring changes, and nothing else does."""
    state = case.offered("state")
    changed = set(_changed(state("warm", case.tokens), state("scored", case.tokens)))
    levers = set(getattr(case.scorer, "levers", ()))
    findings = [Finding("C3", f"{name} is said to be trained and does not change") for name in sorted(levers - changed)]
    return findings + [Finding("C3", f"{name} changes and is not declared") for name in sorted(changed - levers)]


def _changed(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    names = sorted({*before, *after})
    return [
        name for name in names if name not in before or name not in after or _hash(before[name]) != _hash(after[name])
    ]


def _hash(value: object) -> str:
    array = np.ascontiguousarray(value)
    return hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).hexdigest()
