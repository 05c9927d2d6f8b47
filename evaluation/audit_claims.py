"""Tests of what surrounds the scores: artifact (T6), bytes (T8), split (T9), clock (T10), ranks (T15), logs (T16)."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np

from niblick.data.errors import DataError
from niblick.evaluation.audit_case import Case
from niblick.evaluation.audit_protocol import Interval, Run
from niblick.evaluation.audit_report import Finding, NotChecked

CLAIM_BITS = 5e-5
"""How far a submitted score, of four decimals, may be from its log's."""
RANK_NATS = 1e-4
"""How far the summed losses of two numbers of ranks may be apart."""
BUDGET_S = 600.0
REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()
CUT_BYTES = 6
"""How far the last document's bytes may be off where the stream's end cuts it within a character: up to three bytes
then decode to as many replacement characters, of three each."""


def artifact_invariance(case: Case) -> list[Finding]:
    """T6. Training with the validation tokens absent, or replaced by noise, makes the same artifact, bit for bit."""
    artifact = case.offered("artifact")
    noise = np.random.default_rng(case.seed).integers(0, case.vocab_size, len(case.tokens)).astype(case.tokens.dtype)
    given = _digest(artifact(case.tokens.copy()))
    findings = []
    for what, validation in (("absent", None), ("noise", noise)):
        found = _digest(artifact(validation))
        if found != given:
            evidence = f"the artifact is {given[:12]} with the validation tokens, {found[:12]} where they are {what}"
            findings.append(Finding("C1", evidence))
    return findings


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def byte_audit(case: Case) -> list[Finding]:
    """T8. The bytes counted for a document are those of its text, by a tokenizer that is not the scorer's."""
    if case.decode is None:
        raise NotChecked("no tokenizer without case operators was given; for those see niblick.data.byte_audit")
    tokens = case.tokens if case.data is None else case.data
    counts = np.asarray(case.offered("byte_counts")(tokens.copy()), np.int64)
    if counts.shape != tokens.shape:
        raise DataError(f"audit: expected byte counts of shape {tokens.shape}, found {counts.shape}")
    starts = np.flatnonzero(tokens == case.bos_id)
    case.tried.append(f"{len(starts)} documents, {counts.sum()} bytes")
    findings = []
    for start, end in pairwise([*starts.tolist(), len(tokens)]):
        text, found = case.decode(tokens[start:end]), int(counts[start:end].sum())
        slack = CUT_BYTES if end == len(tokens) and text.endswith(REPLACEMENT) else 0
        if abs(len(text) - found) > slack:
            evidence = f"the document of tokens {start} to {end - 1} counts {found} bytes: its text has {len(text)}"
            findings.append(Finding("R2", evidence, start))
    return findings[:3]


def documents(shards: Iterable[np.ndarray], bos_id: int = 1) -> Iterator[np.ndarray]:
    """The documents of shards end to end, each with its BOS; one may cross the end of a shard."""
    open_document: list[np.ndarray] = []
    for shard in shards:
        starts = np.flatnonzero(shard == bos_id)
        parts = np.split(shard, starts)
        open_document.append(parts[0])
        for part in parts[1:]:
            yield from _joined(open_document)
            open_document = [part]
    yield from _joined(open_document)


def _joined(parts: list[np.ndarray]) -> Iterator[np.ndarray]:
    document = np.concatenate(parts) if parts else np.empty(0)
    if len(document):
        yield document


def split_audit(case: Case) -> list[Finding]:
    """T9. No validation document is a training document, token for token."""
    if case.train_documents is None:
        raise NotChecked("no training documents were given")
    held_out, leaks, index = {}, [], -1
    for index, document in enumerate(documents([case.tokens if case.data is None else case.data], case.bos_id)):
        held_out.setdefault(_fingerprint(document), index)
    case.tried.append(f"{index + 1} documents")
    for index, document in enumerate(case.train_documents):
        if (found := held_out.get(_fingerprint(document))) is not None:
            leaks.append((found, index))
    case.tried.append(f"{index + 1} of training")
    if not leaks:
        return []
    evidence = f"validation document {leaks[0][0]} is training document {leaks[0][1]}; {len(leaks)} are"
    return [Finding("R2", evidence)]


def _fingerprint(document: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(document, "<u4").tobytes()).digest()


def clock(case: Case) -> list[Finding]:
    """T10. All parts of the evaluation together are inside the budget. What the claimed time leaves out is a warning:
    the rules have not said."""
    intervals = [Interval(*interval) for interval in case.offered("clock")()]
    findings = []
    total = sum(part.seconds for part in intervals)
    if not total <= BUDGET_S:
        parts = ", ".join(f"{part.name} {part.seconds:.1f}" for part in intervals)
        findings.append(Finding("R1", f"{total:.1f} s of {BUDGET_S:.0f}: {parts}"))
    outside = ", ".join(f"{part.name} {part.seconds:.1f} s" for part in intervals if not part.inside)
    if outside:
        findings.append(Finding("R1", f"outside the claimed time: {outside}", warns=True))
    return findings


def rank_invariance(case: Case) -> list[Finding]:
    """T15. One, two and eight ranks come to the same sum."""
    ranked = case.offered("ranked")
    sums = {n_ranks: float(ranked(case.tokens.copy(), n_ranks)) for n_ranks in (1, 2, 8)}
    if max(sums.values()) - min(sums.values()) <= RANK_NATS:
        return []
    return [Finding("C4", "the losses sum to " + ", ".join(f"{nll:.6f} on {n} ranks" for n, nll in sums.items()))]


def claim_consistency(case: Case) -> list[Finding]:
    """T16. Three seeds of one configuration, and the scores submitted are those of their logs."""
    runs = [Run(*run) for run in case.offered("runs")()]
    findings = []
    if len({run.seed for run in runs}) < 3:
        findings.append(Finding("R2", f"three seeds are asked for: there are {sorted({run.seed for run in runs})}"))
    configurations = sorted({run.configuration for run in runs})
    if len(configurations) > 1:
        findings.append(
            Finding("R2", f"the runs have {len(configurations)} configurations: {', '.join(configurations)}")
        )
    for run in runs:
        if not abs(run.submitted - run.logged) <= CLAIM_BITS:
            evidence = f"seed {run.seed}: submitted {run.submitted:.6f}, its log says {run.logged:.6f}"
            findings.append(Finding("R2", evidence))
    return findings
