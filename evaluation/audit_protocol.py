"""What the audit asks of a scorer. One thing is needed; each of the others lets a further test speak.

    scorer(tokens) -> losses    tokens (N,) of an integer type: a whole validation stream, the first one a document
                                start. losses (N,): nats of each token as a target; losses[0] is ignored (token 0 is no
                                target), NaN marks a target that is not scored. Every call starts from the artifact.
                                The streams tried have other tokens and any number of them from two on.

Optional, as attributes or methods of the scorer:

    log: Log                              what the last call did, in order
    distributions(tokens, positions)      probabilities (n, V) that the positions' targets were scored with
    total(tokens) -> Total                what would be submitted
    byte_counts(tokens) -> (N,)           bytes of text that each token stands for
    artifact(validation) -> bytes         the artifact that training makes where `validation` are the validation tokens,
                                          (N,) or None where there are none
    state(stage, tokens) -> {name: array} parameters, optimizer and random state, after the stage "loaded", "warm"
                                          (ready to score `tokens`) or "scored"
    warms_up: bool                        False: nothing lies between "loaded" and "warm"
    levers: names                         entries of the state that are said to be trained while scoring
    uses_length: bool                     said: the number of tokens sets a schedule, so no shorter stream is tried
    isolates_documents: bool              claimed: no score depends on another document
    ranked(tokens, n_ranks) -> float      sum of the losses when n_ranks processes share the work
    clock() -> [Interval]                 what the last call spent its time on
    runs() -> [Run]                       the runs behind a submission
    files: paths                          what a call may open: the artifact (the tokens are given)

A log is the scorer's own word. So what it says is compared with the losses, and the tests that only look at how losses
answer to changed tokens (T1, T2, T5, T11, T13) need none.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Scorer(Protocol):
    """The part that is needed; see above for the rest."""

    def __call__(self, tokens: np.ndarray) -> np.ndarray: ...


class Total(NamedTuple):
    """A submission's claim: the summed loss in nats, the targets and bytes it is spread over."""

    nll: float
    n_targets: int
    n_bytes: int | None = None


class Interval(NamedTuple):
    """Seconds of one part of an evaluation ("load", "compile", "precompute", "score", "adapt"), and whether the claimed
    evaluation time counts them."""

    name: str
    seconds: float
    inside: bool = True


class Run(NamedTuple):
    """One seed: a hash of its resolved configuration, bits per byte by its log and as submitted."""

    seed: int
    configuration: str
    logged: float
    submitted: float


class Scored(NamedTuple):
    """Targets (n,), as indices into the stream, were graded by this state; losses (n,) in nats."""

    targets: np.ndarray
    losses: np.ndarray
    state: int


class Updated(NamedTuple):
    """State `made` came from state `base`, with a step that used these targets; warm_up: before scoring, as a rehearsal
    said to have no effect."""

    targets: np.ndarray
    base: int
    made: int
    warm_up: bool = False


class Log:
    """Events in the order in which they happened. State 0 is the artifact."""

    def __init__(self) -> None:
        self.events: list[Scored | Updated] = []

    def scored(self, targets: Sequence[int] | np.ndarray, losses: Sequence[float] | np.ndarray, state: int = 0) -> None:
        """Losses have become final. Within one event, targets come in the order of the chain rule."""
        self.events.append(Scored(np.array(targets, np.int64), np.array(losses, np.float64), state))

    def updated(self, targets: Sequence[int] | np.ndarray, base: int, made: int, *, warm_up: bool = False) -> None:
        """A state was made; any state, n-gram tables as well as parameters."""
        self.events.append(Updated(np.array(targets, np.int64), base, made, warm_up))

    def order(self) -> np.ndarray:
        """Scored targets in order, int64; more than once where they were scored more than once."""
        scored = [event.targets for event in self.events if isinstance(event, Scored)]
        return np.concatenate(scored) if scored else np.empty(0, np.int64)
