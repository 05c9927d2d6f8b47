"""What an audit says: which condition is broken, where, and by what evidence. It refutes or finds nothing."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from niblick.evaluation.audit_case import Case

CONDITIONS = {
    "C1": "a score depends on the artifact and on earlier tokens only",
    "C2": "each target is scored by a distribution over the whole vocabulary, complete before the target is looked at",
    "C3": "a target's score is final before any state has used the target",
    "C4": "one pass: no target is scored twice, none is left out, no score is chosen",
    "R1": "the artifact holds all that training knew; both budgets are kept",
    "R2": "no validation data before it is graded; the bytes are those of the text",
}
"""The rules, from the challenge's README (R1, R2) and its guide for participants (C1 to C4), in own words."""

Status = Literal["refuted", "nothing found", "not checked"]
CANNOT_CERTIFY = "An audit of samples refutes or finds nothing. It cannot certify that the rules are kept."


class NotChecked(Exception):
    """Raised by a test that could not be made; the message says what was missing."""


@dataclass(frozen=True)
class Finding:
    """A breach of `condition`, at a target (an index into the stream) where it has a place; or, where it `warns`, what
    the rules leave open."""

    condition: str
    evidence: str
    position: int | None = None
    warns: bool = False

    def __str__(self) -> str:
        place = "" if self.position is None else f" at target {self.position}"
        return f"{'warning, ' * self.warns}{self.condition}{place}: {self.evidence}"


@dataclass(frozen=True)
class Result:
    test: str
    title: str
    status: Status
    findings: list[Finding] = field(default_factory=list)
    note: str = ""
    """What was covered, or what was missing."""


@dataclass(frozen=True)
class Report:
    results: list[Result]

    @property
    def refuted(self) -> list[str]:
        """The tests that found something."""
        return [result.test for result in self.results if result.status == "refuted"]

    @property
    def findings(self) -> list[Finding]:
        return [finding for result in self.results for finding in result.findings]

    def __getitem__(self, test: str) -> Result:
        return next(result for result in self.results if result.test == test)

    def text(self) -> str:
        """Lines for a person: every test, its findings, the conditions broken, and what this is worth."""
        lines = []
        for result in self.results:
            lines.append(f"{result.test:4}{result.title:30}{result.status}{result.note and f' ({result.note})'}")
            lines += [f"      {finding}" for finding in result.findings]
        broken = sorted({finding.condition for finding in self.findings if not finding.warns})
        lines += [f"{name}, broken: {CONDITIONS[name]}" for name in broken]
        verdict = f"refuted by {', '.join(self.refuted)}" if broken else "nothing found"
        unchecked = [result.test for result in self.results if result.status == "not checked"]
        lines.append(f"{verdict}; not checked: {', '.join(unchecked) or 'none'}. {CANNOT_CERTIFY}")
        return "\n".join(lines)

    def json(self) -> str:
        return json.dumps({"results": [asdict(result) for result in self.results], "worth": CANNOT_CERTIFY})


def run_test(test: str, title: str, function: Callable[["Case"], list[Finding]], case: "Case") -> Result:
    """The result of one test function, which returns findings or raises NotChecked, and notes what it has covered."""
    case.tried.clear()
    try:
        findings = function(case)
    except NotChecked as reason:
        return Result(test, title, "not checked", note=str(reason))
    refuted = any(not finding.warns for finding in findings)
    return Result(test, title, "refuted" if refuted else "nothing found", findings, note=", ".join(case.tried))
