"""Scorers for the audit: one that keeps the rules, and those that break one each.

The honest one adapts while it scores: p(a) = (n(b, a) + 1) / (n(b) + V), b the token before and n counts of the pairs
scored so far. Every cheat differs from it in one thing.
"""

import numpy as np

from niblick.evaluation.audit_protocol import Interval, Log, Run, Total

V, BOS, CHUNK = 12, 1, 8


class Honest:
    """Counts are updated after each chunk.."""

    isolates_documents = False

    def __init__(self) -> None:
        self.log = Log()

    def prior(self, tokens: np.ndarray) -> np.ndarray:
        """Counts (V, V) before the first score."""
        return np.ones((V, V))

    def chunks(self, tokens: np.ndarray) -> list[np.ndarray]:
        targets = np.arange(1, len(tokens))
        return np.split(targets, np.arange(CHUNK, len(targets), CHUNK))

    def learn(self, counts: np.ndarray, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        counts = counts.copy()
        np.add.at(counts, (tokens[targets - 1], tokens[targets]), 1)
        return counts

    def p(self, counts: np.ndarray, tokens: np.ndarray, target: int) -> np.ndarray:
        row = counts[tokens[target - 1]]
        return row / row.sum()

    def loss(self, counts: np.ndarray, tokens: np.ndarray, target: int) -> float:
        return -float(np.log(self.p(counts, tokens, target)[tokens[target]]))

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        self.log, losses, counts = Log(), np.full(len(tokens), np.nan), self.prior(tokens)
        for state, targets in enumerate(self.chunks(tokens)):
            losses[targets] = [self.loss(counts, tokens, t) for t in targets]
            self.log.scored(targets, losses[targets], state)
            counts = self.learn(counts, tokens, targets)
            self.log.updated(targets, state, state + 1)
        self.counts = counts
        return losses

    def distributions(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        p, counts = np.zeros((len(tokens), V)), self.prior(tokens)
        for targets in self.chunks(tokens):
            p[targets] = [self.p(counts, tokens, t) for t in targets]
            counts = self.learn(counts, tokens, targets)
        return p[positions]

    def total(self, tokens: np.ndarray) -> Total:
        return Total(float(np.nansum(self(tokens))), len(tokens) - 1, int(self.byte_counts(tokens)[1:].sum()))

    def byte_counts(self, tokens: np.ndarray) -> np.ndarray:
        """Token i stands for the letter i, a document start for nothing, and the last two for a letter of two bytes."""
        return np.where(tokens == BOS, 0, np.where(tokens >= V - 2, 2, 1))

    def artifact(self, validation: np.ndarray | None) -> bytes:
        return np.ones((V, V)).tobytes()

    levers = ("counts",)

    def state(self, stage: str, tokens: np.ndarray) -> dict[str, np.ndarray]:
        if stage == "scored":
            self(tokens)
            return {"counts": self.counts, "step": np.zeros(1)}
        return {"counts": np.ones((V, V)), "step": np.zeros(1)}

    def ranked(self, tokens: np.ndarray, n_ranks: int) -> float:
        return float(sum(part.sum() for part in np.array_split(self(tokens)[1:], n_ranks)))

    def clock(self) -> list[Interval]:
        return [Interval("load", 20.0), Interval("score", 400.0), Interval("adapt", 150.0)]

    def runs(self) -> list[Run]:
        return [Run(seed, "ab12", 1.061 + seed / 1e4, round(1.061 + seed / 1e4, 4)) for seed in (0, 42, 99)]


def decode(document: np.ndarray) -> bytes:
    """The text of a document of Honest's tokens."""
    return "".join("éß"[token - V + 2] if token >= V - 2 else "x" for token in document if token != BOS).encode()


class TargetGate(Honest):
    """An n-gram tilt that acts only where the target belongs to a class that the hint can be of."""

    def p(self, counts, tokens, target):
        p = super().p(counts, tokens, target).copy()
        if tokens[target] % 2 == int(p.argmax()) % 2:
            p[p.argmax()] *= 4
            p /= p.sum()
        return p


class MassAboveOne(Honest):
    """Adds an expert's probability without taking it from the others."""

    def p(self, counts, tokens, target):
        p = super().p(counts, tokens, target).copy()
        p[p.argmax()] += 0.01
        return p


class CacheKeyedByTarget(Honest):
    """A hashed n-gram cache that holds (context, target) only, and forms the target's probability alone."""

    def loss(self, counts, tokens, target):
        seen, context = np.zeros(4), int(tokens[target - 1])
        for t in range(1, (target - 1) // CHUNK * CHUNK):
            seen[(int(tokens[t - 1]) * 7 + int(tokens[t]) * 3) % 4] += 1  # few slots: ids collide
        cached = seen[(context * 7 + int(tokens[target]) * 3) % 4] / max(1, seen.sum())
        return -float(np.log(0.5 * self.p(counts, tokens, target)[tokens[target]] + 0.5 * cached))


class BestOfTwo(Honest):
    """The better of two models' scores."""

    def loss(self, counts, tokens, target):
        return min(super().loss(counts, tokens, target), float(np.log(V)))


class PeeksAfterOneId(Honest):
    """The token after the target has half a say, but only where the token before is one of the rarer ids."""

    rare = 9

    def p(self, counts, tokens, target):
        p = super().p(counts, tokens, target)
        if tokens[target - 1] != self.rare or target + 1 == len(tokens):
            return p
        return (p + np.eye(V)[tokens[target + 1]]) / 2


class CountsTokensLeft(Honest):
    """An id gets the more, the nearer the stream's end."""

    def p(self, counts, tokens, target):
        share = 1 / (1 + len(tokens) - target)
        return (1 - share) * super().p(counts, tokens, target) + share * np.eye(V)[0]


class TrainsFirst(Honest):
    """Learns a chunk, then scores it, and says so."""

    def __call__(self, tokens):
        self.log, losses, counts = Log(), np.full(len(tokens), np.nan), self.prior(tokens)
        for state, targets in enumerate(self.chunks(tokens), start=1):
            counts = self.learn(counts, tokens, targets)
            self.log.updated(targets, state - 1, state)
            losses[targets] = [self.loss(counts, tokens, t) for t in targets]
            self.log.scored(targets, losses[targets], state)
        self.counts = counts
        return losses


class TrainsFirstAndLies(TrainsFirst):
    """The same with the log of an honest scorer."""

    def __call__(self, tokens):
        losses = super().__call__(tokens)
        self.log = Log()
        for state, targets in enumerate(self.chunks(tokens)):
            self.log.scored(targets, losses[targets], state)
            self.log.updated(targets, state, state + 1)
        return losses


class SecondPass(Honest):
    """Scores everything, learns it, and scores everything again."""

    def __call__(self, tokens):
        first = super().__call__(tokens)
        losses = np.full(len(tokens), np.nan)
        for targets in self.chunks(tokens):
            losses[targets] = [self.loss(self.counts, tokens, t) for t in targets]
            self.log.scored(targets, losses[targets], state=len(self.chunks(tokens)))
        return np.fmin(first, losses)


class RemembersCalls(Honest):
    """A table that outlives the call: the second evaluation has seen the stream."""

    kept = None

    def prior(self, tokens):
        return np.ones((V, V)) if self.kept is None else self.kept

    def __call__(self, tokens):
        losses = super().__call__(tokens)
        self.kept = self.counts
        return losses


class DropsTargets(Honest):
    """Leaves out the last, incomplete chunk."""

    def chunks(self, tokens):
        return [targets for targets in super().chunks(tokens) if len(targets) == CHUNK]


class TailTwice(Honest):
    """The last targets enter the sum once more, as the first sliding windows did; the losses are all there."""

    def total(self, tokens):
        nll, n_targets, n_bytes = super().total(tokens)
        return Total(nll + float(self(tokens)[-4:].sum()), n_targets + 4, n_bytes)


class WrongByteTable(Honest):
    """The table of another tokenizer."""

    def byte_counts(self, tokens):
        return np.where(tokens == BOS, 0, np.where(tokens >= V - 3, 2, 1))


class LastDocumentThrice(Honest):
    """Counts the bytes of the last document, which no other follows, three times."""

    def byte_counts(self, tokens):
        last = np.arange(len(tokens)) >= np.flatnonzero(tokens == BOS)[-1]
        return super().byte_counts(tokens) * np.where(last, 3, 1)


class CalibratesOnValidation(Honest):
    """A quantisation scale from validation statistics is in the artifact."""

    def artifact(self, validation):
        scale = 1.0 if validation is None else float(validation.mean())
        return (np.ones((V, V)) * scale).tobytes()


class TrainsBeforeQuantisation(Honest):
    """The whole validation stream is learnt before the artifact is written; scoring then is clean."""

    def prior(self, tokens):
        return self.learn(np.ones((V, V)), tokens, np.arange(1, len(tokens)))

    def artifact(self, validation):
        return (np.ones((V, V)) if validation is None else self.prior(validation.astype(int))).tobytes()


class WarmsUpOnValidation(Honest):
    """Compiles with validation tokens and a step, and keeps what the step did to the optimizer."""

    def __call__(self, tokens):
        losses = super().__call__(tokens)
        events, self.log = self.log.events, Log()
        self.log.updated(np.arange(1, 1 + CHUNK), 0, 0, warm_up=True)
        self.log.events += events
        return losses

    def state(self, stage, tokens):
        return {**super().state(stage, tokens), "step": np.full(1, float(stage != "loaded"))}


class ShortestFirst(Honest):
    """Documents are scored shortest first, each with counts of those before. No cheat by the content of documents; but
    where they end is looked at first."""

    def chunks(self, tokens):
        """A document's targets are its tokens and the start of the next."""
        starts = np.flatnonzero(tokens == BOS)
        return sorted((part for part in np.split(np.arange(1, len(tokens)), starts[1:]) if len(part)), key=len)


class HintsAndAdaptation(ShortestFirst):
    """The same, with the unigram counts of the documents before it in the corpus besides, scored or not."""

    def p(self, counts, tokens, target):
        start = max(np.flatnonzero(tokens[:target] == BOS))
        hints = np.bincount(tokens[:start], minlength=V)
        row = counts[tokens[target - 1]] + hints
        return row / row.sum()


class DeadLever(Honest):
    """Says that it trains a cap which nothing moves."""

    levers = ("counts", "step")


class SlowClock(Honest):
    def clock(self):
        return [Interval("compile", 200.0, inside=False), Interval("score", 450.0)]


class RankDependent(Honest):
    def ranked(self, tokens, n_ranks):
        return super().ranked(tokens, n_ranks) * (1 + 1e-4 * (n_ranks > 2))


class NegativeProbability(Honest):
    """Every distribution given sums to 1, and one entry is below 0."""

    def distributions(self, tokens, positions):
        p = super().distributions(tokens, positions)
        place = (tokens[positions[0]] + 1) % V, (tokens[positions[0]] + 2) % V
        p[0, place[0]] += p[0, place[1]] + 0.1
        p[0, place[1]] = -0.1
        return p


class DumpsAnother(Honest):
    """The distribution given is a proper one, and not that of the score."""

    def distributions(self, tokens, positions):
        return np.full((len(positions), V), 1 / V)


class ReadsATable(Honest):
    """Training statistics in a file that is no part of the artifact."""

    path = __file__

    def __call__(self, tokens):
        with open(self.path) as file:
            file.read(1)
        return super().__call__(tokens)


class TwoSeeds(Honest):
    def runs(self):
        return [Run(0, "ab12", 1.06, 1.06), Run(1, "ab12", 1.06, 1.06), Run(1, "ab12", 1.061, 1.061)]


class RoundsDown(Honest):
    def runs(self):
        return [run._replace(submitted=run.submitted - 1e-4) for run in super().runs()]


class TwoConfigurations(Honest):
    def runs(self):
        return [run._replace(configuration=str(run.seed > 50)) for run in super().runs()]
