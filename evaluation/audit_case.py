"""A scorer on a stream: what the tests of an audit look at."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from niblick.data.errors import DataError
from niblick.evaluation.audit_protocol import Log, Scorer
from niblick.evaluation.audit_report import NotChecked

SCORE_NATS = 1e-6
"""A score has changed when it differs by more. Equal sums in another order differ by about 1e-7 in float32."""

CUTS = 128
"""All places of the stream that is made by default."""


@dataclass(frozen=True)
class Case:
    """losses (N,) float64 and log are those of one call; swaps and cuts: how many places are tried. data: the whole
    stream that tokens (N,) are the beginning of, for tests that score nothing. tried: what a test has covered, in words
    for the report."""

    scorer: Scorer
    tokens: np.ndarray
    vocab_size: int
    bos_id: int
    losses: np.ndarray
    log: Log | None
    decode: Callable[[np.ndarray], bytes] | None = None
    train_documents: list[np.ndarray] | None = None
    cuts: int = CUTS
    swaps: int = 6
    seed: int = 0
    tolerance: float = SCORE_NATS
    data: np.ndarray | None = None
    tried: list[str] = field(default_factory=list)

    def score(self, tokens: np.ndarray) -> np.ndarray:
        return score(self.scorer, tokens)

    def difference(self, tokens: np.ndarray) -> np.ndarray:
        """How far each loss (n,) is from this case's when `tokens` (n,), at most N, are scored, NaN where only one
        is."""
        found, losses = self.score(tokens), self.losses[: len(tokens)]
        with np.errstate(invalid="ignore"):
            same = (found == losses) | (np.isnan(found) & np.isnan(losses))
            return np.where(same, 0.0, np.abs(found - losses))

    def offered(self, name: str) -> object:
        """An optional part of the protocol. NotChecked where the scorer lacks it."""
        part = getattr(self.scorer, name, None)
        if part is None:
            raise NotChecked(f"the scorer offers no {name}")
        return part

    def needed_log(self) -> Log:
        if self.log is None or not self.log.events:
            raise NotChecked("the scorer offers no log")
        return self.log

    def order(self) -> np.ndarray:
        """Targets in the order in which they were first scored: the log's, or else the stream's."""
        everything = np.arange(1, len(self.tokens))
        logged = self.log.order() if self.log is not None else everything
        logged = logged[np.isin(logged, everything)]
        _, first = np.unique(logged, return_index=True)
        return logged[np.sort(first)] if len(logged) else everything

    def other_ids(self, generator: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
        """For each token (n,) another id, no document start."""
        words = np.delete(np.arange(self.vocab_size), self.bos_id)
        place = tokens.astype(np.int64) - (tokens > self.bos_id)  # among the words; a document start has any
        return words[(place + generator.integers(1, len(words), len(tokens))) % len(words)].astype(tokens.dtype)

    def document_of(self) -> np.ndarray:
        """The document (N,) that each target belongs to. A document start is what ends the document before."""
        document = np.cumsum(self.tokens == self.bos_id) - 1
        return np.where(self.tokens == self.bos_id, document - 1, document)


def score(scorer: Scorer, tokens: np.ndarray) -> np.ndarray:
    """losses (N,) float64. DataError where the scorer returns another shape."""
    returned = scorer(tokens.copy())
    try:
        losses = np.asarray(returned, np.float64)
    except (TypeError, ValueError):
        raise DataError(f"audit: expected losses, numbers, from the scorer, found {type(returned).__name__}") from None
    if losses.shape != tokens.shape:
        raise DataError(f"audit: expected losses of shape {tokens.shape} from the scorer, found {losses.shape}")
    return losses


def drawn(generator: np.random.Generator, n: int, k: int) -> np.ndarray:
    """One place of each of k equal parts of range(n), int64 (min(k, n),), ascending: all where there are no more."""
    edges = np.linspace(0, n, min(k, n) + 1).astype(np.int64)
    return generator.integers(edges[:-1], edges[1:])


def make_stream(vocab_size: int, *, n: int = 96, bos_id: int = 1, seed: int = 0) -> np.ndarray:
    """Tokens (n,) that make the usual levers act: one passage of documents again and again, so that n-gram tables find
    long contexts that recur, with a few tokens changed. uint16, or uint32 beyond 65,536 ids."""
    generator = np.random.default_rng(seed)
    words = np.delete(np.arange(vocab_size), bos_id)
    passage = generator.choice(words, 25)
    passage[[0, 5, 14]] = bos_id
    tokens = np.resize(passage, n)
    changed = generator.choice(np.arange(1, n), n // 40, replace=False)
    tokens[changed] = generator.choice(words, len(changed))
    return tokens.astype(np.uint16 if vocab_size <= 2**16 else np.uint32)
