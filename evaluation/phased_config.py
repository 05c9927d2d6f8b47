"""The published variants of phased test-time training, as differences from one another (spec: PR numbers of the
Parameter Golf challenge)."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from niblick.model.config import ConfigError, GPTConfig

Order = Literal["longest-first", "corpus"]
Target = Literal["q", "k", "v", "o", "mlp", "head"]
ALL_TARGETS: tuple[Target, ...] = get_args(Target)
MOST = 1e6
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("documents", "chunk", "rank", "sgd_epochs", "sgd_chunk", "sgd_row", "patience"), (1, MOST)),
    **dict.fromkeys(("window", "tokens_per_forward"), (1, 1e9)),
    **dict.fromkeys(("seed", "prefix"), (0, 1e9)),
    **dict.fromkeys(("alpha", "weight_decay", "sgd_segment"), (0, MOST)),
    **dict.fromkeys(("beta2", "sgd_momentum"), (0, 0.999999)),
    **dict.fromkeys(("eps", "sgd_clip"), (1e-30, 1e30)),
    **dict.fromkeys(("lr", "sgd_lr", "diverged", "suspicious"), (0, 1e30)),
    "phases": (0, 1000),
}
"""What the numbers among the settings may be."""


@dataclass(frozen=True)
class PhasedConfig:
    """Sizes in tokens and documents, learning rates a step."""

    order: Order = "longest-first"
    """`longest-first`: as published. Documents are sorted by length, so which batch, phase and chunk length scores a
    token follows from ends of documents that lie ahead of it: a permutation of the corpus that the challenge never
    ruled on. `corpus`: left to right. Nothing that a token is scored with depends on a later token, ends included."""
    seed: int = 0
    """Of the matrices A."""

    # Documents, in chunks.
    documents: int = 64
    """A batch."""
    chunk: int = 48
    """Targets scored, then stepped on."""
    short_chunks: tuple[tuple[int, int], ...] = ()
    """(longest, chunk): of batches whose longest document has at most so many tokens. Not in corpus order, where a
    document's length is known only at its end."""
    window: int = 2048
    """The longest context."""

    # LoRA.
    rank: int = 96
    alpha: float = 0.0
    """y += alpha / rank B A x; 0: B A x."""
    targets: tuple[Target, ...] = ALL_TARGETS
    a_at_reset: Literal["redrawn", "kept"] = "redrawn"
    """`kept`: a row's matrix A passes from a document to the next (PR #1767), and so depends on which batches its rank
    had before. In corpus order, where nothing may, every batch begins with the same ones."""
    lr: float = 1e-4
    beta2: float = 0.999
    eps: float = 1e-10
    weight_decay: float = 0.5

    # Steps on all weights.
    phases: int = 3
    prefix: int = 2000
    """Documents scored before the last of them."""
    sgd_lr: float = 1e-3
    sgd_epochs: int = 1
    sgd_momentum: float = 0.9
    sgd_clip: float = 1.0
    sgd_chunk: int = 32_768
    """Tokens a step, over all ranks."""
    sgd_row: int = 4096
    """Tokens that follow one another in the stream of a step."""
    sgd_segment: int = 0
    """Tokens that see one another in a step; 0: the model's longest segment, as in its training."""

    tokens_per_forward: int = 65_536
    """At most, where several documents are scored together: less takes less memory. Activations of 131,072 would take
    twice the memory and no less time a token."""

    # Against divergence, which the published scripts do not look for.
    diverged: float = 0.5
    """An adaptation has failed where a chunk new to it costs so many nats a token more than without it."""
    suspicious: float = 1.5
    """It is compared with none where the loss, the mean of `patience` chunks, has grown so many times; and, whatever
    the loss, at chunks 8, 16, 32 and so on. (By itself a loss says nothing: documents begin with easy titles.)"""
    patience: int = 8

    def __post_init__(self) -> None:
        for name, choices in (("order", get_args(Order)), ("a_at_reset", ("redrawn", "kept"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"phased.{name} must be one of {choices}: got {getattr(self, name)!r}")
        unknown = set(self.targets) - set(ALL_TARGETS)
        if unknown or not self.targets:
            raise ConfigError(f"phased.targets must be some of {ALL_TARGETS}: got {self.targets}")
        for name, (low, high) in RANGES.items():
            if not low <= (value := getattr(self, name)) <= high:  # nor is any number that is none
                raise ConfigError(f"phased.{name} must be in {low:g}..{high:g}: got {value}")
        if not all(limit >= 1 and 1 <= chunk <= MOST for limit, chunk in self.short_chunks):
            raise ConfigError(f"phased.short_chunks must be pairs of at least 1: got {self.short_chunks}")
        if self.window < max(self.chunk, *(chunk for _, chunk in self.short_chunks), 1):
            raise ConfigError(f"phased.window must hold a chunk: got {self.window} and {self.chunk}")
        if self.prefix < self.phases:
            raise ConfigError(f"phased.prefix must hold as many documents as phases: got {self.prefix}, {self.phases}")
        if self.sgd_chunk % self.sgd_row:
            raise ConfigError(f"phased.sgd_chunk must be a multiple of sgd_row: got {self.sgd_chunk}, {self.sgd_row}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.alpha else 1.0

    @property
    def boundaries(self) -> list[int]:
        """Documents after which a phase of steps on all weights comes."""
        return [self.prefix * j // self.phases for j in range(1, self.phases + 1)]

    def segment(self, model: GPTConfig) -> int:
        """Tokens that see one another in a step on all weights."""
        return self.sgd_segment or model.max_segment

    def chunk_for(self, longest: int) -> int:
        """Of a batch whose longest document has so many tokens, the BOS that ends it included."""
        if self.order == "corpus":
            return self.chunk
        return next((chunk for limit, chunk in sorted(self.short_chunks) if longest <= limit), self.chunk)


def check(model: GPTConfig, settings: PhasedConfig) -> None:
    """ConfigError where such a model cannot be trained with these settings."""
    if settings.phases and settings.sgd_segment > model.max_segment:
        found = f"got {settings.sgd_segment}"
        raise ConfigError(f"phased.sgd_segment must be at most the model's {model.max_segment}, or 0 for that: {found}")


PR1530 = PhasedConfig(chunk=32, phases=0)
PR1610 = replace(PR1530, phases=1, sgd_lr=0.005, sgd_epochs=3)
PR1626 = PhasedConfig()
PR1787 = replace(PR1626, alpha=144.0, a_at_reset="kept", weight_decay=1.0)
PR1855 = replace(PR1787, rank=80, beta2=0.99, weight_decay=0.5, prefix=2500)
# Their prefix is not on record; #1855's, on which they build.
PR1953 = replace(PR1855, lr=0.75e-4, documents=24, targets=("k", "o", "mlp", "head"), window=2560)
PR2014 = replace(PR1953, window=3072, short_chunks=((256, 8), (2000, 24)), phases=1)

PHASED: dict[str, PhasedConfig] = {
    "pr1855": PR1855,
    "pr1530": PR1530,
    "pr1610": PR1610,
    **dict.fromkeys(("pr1626", "pr1729", "pr1736"), PR1626),
    **dict.fromkeys(("pr1787", "pr1851", "pr1934"), PR1787),
    "pr1953": PR1953,
    "pr2014": PR2014,
}
"""The default first."""

PHASED_SMALL = (
    *("documents=8", "chunk=4", "window=12", "rank=2", "lr=0.02", "phases=1", "prefix=4"),
    *("sgd_lr=0.05", "sgd_chunk=8", "sgd_row=4", "sgd_segment=4"),
)
"""Settings with which all of it happens within a hundred tokens, for the audit."""
