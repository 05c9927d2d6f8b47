"""Tests that change tokens and look at losses: T1, T2, T3, T11, T13. They believe nothing that the scorer says."""

from collections.abc import Iterator

import numpy as np

from niblick.data.errors import DataError
from niblick.evaluation.audit_case import Case, drawn
from niblick.evaluation.audit_report import Finding, NotChecked

MASS = 1e-4
"""How far the sum of V probabilities, each known from a float32 loss, may be from 1."""
DUMPED = 1e-5
"""The same for probabilities given as such, and how far their logarithm may be from the loss."""


def future_perturbation(case: Case) -> list[Finding]:
    """T1. Tokens not yet scored change; no loss that was final may.

    Of what comes after a cut in the order of scoring, (a) all words change and document starts stay, (b) the document
    in progress ends at once, or its end is taken away, (c) the following documents change, their number and lengths
    included, (d) nothing is left. A scorer that says it goes by the stream's length is spared (d), and that is a
    warning: the rules have not said whether the length of a known validation set is knowledge of it.
    """
    generator, order = np.random.default_rng(case.seed), case.order()
    cuts, tried, findings = 1 + drawn(generator, len(order) - 1, case.cuts), 0, []
    if _uses_length(case):
        evidence = "the scorer goes by the stream's length; no shorter stream was tried"
        findings = [Finding("C1", evidence, warns=True)]
    for cut, what, changed in _all_futures(case, generator, order, cuts):
        tried += 1
        try:
            difference = case.difference(changed)[order[:cut]]
        except Exception as error:
            if len(changed) == len(case.tokens):
                raise
            evidence = f"a stream of {len(changed)} tokens is not scored: {error}"
            findings = [Finding("C1", evidence, warns=True)]
            continue
        if len(changed) < len(case.tokens):
            difference = np.nan_to_num(difference)  # where an incomplete last window is dropped, another one is now
        moved = np.flatnonzero(~(difference <= case.tolerance))
        if len(moved):
            first = np.append(np.flatnonzero(changed != case.tokens[: len(changed)]), len(changed))[0]
            evidence = (
                f"its loss moves by {difference[moved[0]]:.3g} nats when {what}, after the first {cut} targets"
                f" scored (the first token changed is {first}; {len(moved)} scores move)"
            )
            findings = [Finding("C1", evidence, int(order[moved[0]]))]
            break
    case.tried.append(f"{len(cuts)} of {len(order) - 1} cuts, {tried} futures")
    return findings


def _all_futures(
    case: Case, generator: np.random.Generator, order: np.ndarray, cuts: np.ndarray
) -> Iterator[tuple[int, str, np.ndarray]]:
    for cut in cuts.tolist():
        for what, changed in _futures(case, generator, order[:cut]):
            yield cut, what, changed


def _uses_length(case: Case) -> bool:
    return bool(getattr(case.scorer, "uses_length", False))


def _futures(case: Case, generator: np.random.Generator, past: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """What changes, and the changed stream; a token 0 or of the past never does. The stream that ends is shorter."""
    free = np.ones(len(case.tokens), bool)
    free[0] = free[past] = False
    starts = case.tokens == case.bos_id
    words = case.other_ids(generator, case.tokens)
    futures = [("words change", np.where(free & ~starts, words, case.tokens))]

    here = int(past[-1])
    if here + 1 < len(free) and free[here + 1] and not starts[here + 1]:
        ended = case.tokens.copy()
        ended[here + 1] = case.bos_id
        futures.append(("the document ends at once", ended))
    ends = np.flatnonzero(starts & free & (np.arange(len(free)) > here))
    if len(ends):
        longer = case.tokens.copy()
        longer[ends[0]] = words[ends[0]]
        futures.append(("the document's end is taken away", longer))
        later = case.tokens.copy()
        rest = free & (np.arange(len(free)) > ends[0])
        later[rest] = np.where(generator.random(rest.sum()) < 0.2, case.bos_id, words[rest])
        futures.append(("all later documents change", later))
    futures = [(what, changed) for what, changed in futures if (changed != case.tokens).any()]
    last = int(past.max())
    if last + 1 < len(free) and not _uses_length(case):
        futures.append(("the stream ends", case.tokens[: last + 1]))
    return futures


def target_swap(case: Case) -> list[Finding]:
    """T2. Every id takes its turn as the target; what the scorer would give them must sum to 1.

    This sees gates that read the target, tables keyed by it, mixtures of bytes, and the best of several scores.
    """
    findings, positions = [], swap_positions(case)
    case.tried.append(f"{len(positions)} of {len(case.tokens) - 1} targets, {case.vocab_size} ids each")
    for position in positions:
        mass = 0.0
        for candidate in range(case.vocab_size):
            swapped = case.tokens.copy()
            swapped[position] = candidate
            mass += float(np.exp(-case.score(swapped)[position]))
        if not abs(mass - 1) < MASS:
            evidence = f"the probabilities of all {case.vocab_size} ids sum to {mass:.6g}"
            findings.append(Finding("C2", evidence, position))
    return findings


def swap_positions(case: Case) -> list[int]:
    """The last target, the first of a document, and others, from all parts of the stream."""
    generator = np.random.default_rng(case.seed)
    scored = np.flatnonzero(~np.isnan(case.losses))
    scored = scored[scored > 0]
    if not len(scored):
        raise NotChecked("no target is scored")
    after = generator.choice(np.flatnonzero(case.tokens[:-1] == case.bos_id)) + 1
    first = scored[np.abs(scored - after).argmin()]
    others = generator.permutation(scored[drawn(generator, len(scored), case.swaps)])
    wanted = dict.fromkeys(int(position) for position in (scored[-1], first, *others))
    return sorted(list(wanted)[: case.swaps])


def distribution_dump(case: Case) -> list[Finding]:
    """T3. The whole distribution is one, and its target's entry is the loss that counted."""
    distributions = case.offered("distributions")
    positions = np.flatnonzero(~np.isnan(case.losses))
    positions = positions[positions > 0]
    p = np.asarray(distributions(case.tokens.copy(), positions), np.float64)
    if p.shape != (len(positions), case.vocab_size):
        raise DataError(f"audit: expected distributions {(len(positions), case.vocab_size)}, found {p.shape}")
    findings = []
    for name, wrong, value in (
        ("the least probability is {:.3g}", ~(p.min(1) >= 0), p.min(1)),
        ("the probabilities sum to {:.6g}", ~(np.abs(p.sum(1) - 1) <= DUMPED), p.sum(1)),
    ):
        for row in np.flatnonzero(wrong)[:1]:
            findings.append(Finding("C2", name.format(value[row]), int(positions[row])))
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = -np.log(p[np.arange(len(p)), case.tokens[positions].astype(np.int64)])
    for row in np.flatnonzero(~(np.abs(expected - case.losses[positions]) <= DUMPED))[:1]:
        evidence = f"the loss that counted is {case.losses[positions[row]]:.6f}, the distribution's {expected[row]:.6f}"
        findings.append(Finding("C2", evidence, int(positions[row])))
    return findings


def influences(case: Case) -> np.ndarray:
    """bool (K, K): changing the words of document i moves a score of document j."""
    generator, document = np.random.default_rng(case.seed), case.document_of()
    words = case.tokens != case.bos_id
    n_documents = int(document.max()) + 1
    moved = np.zeros((n_documents, n_documents), bool)
    for i in range(n_documents):
        inside = words & (document == i)
        inside[0] = False
        changed = np.where(inside, case.other_ids(generator, case.tokens), case.tokens)
        different = ~(case.difference(changed) <= case.tolerance)
        different[0] = False
        moved[i, np.unique(document[different])] = True
    np.fill_diagonal(moved, False)
    return moved


def cycles(case: Case) -> list[Finding]:
    """T11. Documents that influence each other's scores in a circle have no order in which the chain rule holds."""
    moved = influences(case)
    left = list(range(len(moved)))
    while left:  # take away what nothing left influences; what stays is on a cycle or behind one
        free = [j for j in left if not moved[left, j].any()]
        if not free:
            break
        left = [j for j in left if j not in free]
    pairs = [(i, j) for i in left for j in left if i < j and moved[i, j] and moved[j, i]]
    if not left:
        return []
    circle = (
        f"documents {pairs[0][0]} and {pairs[0][1]} move each other's scores" if pairs else f"among documents {left}"
    )
    return [Finding("C1", f"a cycle: {circle}")]


def document_isolation(case: Case) -> list[Finding]:
    """T13. Where it is claimed that documents do not see each other: the last token of one changes, and no score of the
    next may."""
    if not getattr(case.scorer, "isolates_documents", False):
        raise NotChecked("isolation is not claimed")
    generator = np.random.default_rng(case.seed)
    starts = np.flatnonzero(case.tokens == case.bos_id)
    starts = [start for start in starts[1:] if case.tokens[start - 1] != case.bos_id]
    if not starts:
        raise NotChecked("the stream has no two documents")
    for start in starts[: case.cuts]:
        changed = case.tokens.copy()
        changed[start - 1] = case.other_ids(generator, case.tokens[start - 1 : start])[0]
        difference = case.difference(changed)
        moved = np.flatnonzero(~(difference <= case.tolerance) & (np.arange(len(difference)) > start))
        if len(moved):
            evidence = (
                f"its loss moves by {difference[moved[0]]:.3g} nats with token {start - 1} of the document before"
            )
            return [Finding("C1", evidence, int(moved[0]))]
    return []
