"""A stream of tokens as documents, batches of them, and the windows in which their chunks are scored.

Document d is the tokens from its BOS up to and with the next BOS, which is its last target: every target of the stream
belongs to one document. Lengths count that BOS.
"""

from typing import NamedTuple

import numpy as np

from niblick.evaluation.phased_config import PhasedConfig

EXACT_CHUNKS = 8
"""Windows of up to so many chunks get a width of their own."""


class Documents(NamedTuple):
    """starts (K,) int64: places of the BOS tokens. targets (K,): of each document, its length less one."""

    starts: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, bos_id: int) -> "Documents":
        """Of a stream (N,) that begins with a document. A BOS that ends the stream starts none."""
        starts = np.flatnonzero(tokens[:-1] == bos_id)
        return cls(starts, np.diff(starts, append=len(tokens) - 1))


class Batch(NamedTuple):
    """documents (n,): which, in the order of their rows, by length ascending. rows (n,): the row of matrices A that
    each has a claim to, by its place among the batch's documents in the queue. chunk: targets."""

    index: int
    documents: np.ndarray
    rows: np.ndarray
    chunk: int


def queue_of(documents: Documents, config: PhasedConfig) -> list[Batch]:
    """Batches in the order in which they are taken. Their index ascends with length, or along the corpus.

    Published: sorted by length, stable, cut from the short end, the longest first. So the batch of the very longest
    documents, which takes as many steps one after another as the longest has chunks, is the first to be begun.
    """
    by_length = np.argsort(documents.targets, kind="stable")
    corpus = config.order == "corpus"
    everything = np.arange(len(by_length)) if corpus else by_length
    batches = []
    for index, first in enumerate(range(0, len(everything), config.documents)):
        of_batch = everything[first : first + config.documents]
        rows = np.argsort(documents.targets[of_batch], kind="stable")
        chunk = config.chunk_for(int(documents.targets[of_batch].max()) + 1)
        batches.append(Batch(index, of_batch[rows], rows, chunk))
    return batches if corpus else batches[::-1]


class Chunk(NamedTuple):
    """One chunk of each of n documents, as windows of the stream; all int64 (n,).

    start: first token of the window. length: tokens in it. first: where its slice of `chunk` columns begins. scored:
    the first column that is scored, up to length. steps: 1 where the document's adaptation goes on after it.
    """

    start: np.ndarray
    length: np.ndarray
    first: np.ndarray
    scored: np.ndarray
    steps: np.ndarray


def chunk_of(documents: Documents, batch: Batch, number: int, width: int, config: PhasedConfig) -> Chunk:
    """Chunk `number` of the batch's documents; of those that have ended, nothing.

    A window ends with the last scored input and reaches back `window` tokens. In corpus order a document's last chunk
    reaches back as far as it would if it were whole: how much it sees may not tell where it ends.
    """
    start, targets = (x[batch.documents] for x in documents)
    begin = number * batch.chunk
    end = np.minimum(begin + batch.chunk, targets)
    whole = begin + batch.chunk if config.order == "corpus" else end
    left = np.maximum(0, whole - config.window)
    active = begin < targets
    length = np.where(active, end - left, 0)
    scored = np.where(active, begin - left, 0)
    first = np.minimum(scored, width - batch.chunk)
    return Chunk(np.where(active, start + left, 0), length, first, scored, (end < targets) & active)


def chunk_counts(documents: Documents, batch: Batch) -> np.ndarray:
    """How many chunks each of the batch's documents has, (n,)."""
    return -(-documents.targets[batch.documents] // batch.chunk)


def width_for(number: int, chunk: int, window: int) -> int:
    """Tokens of a row that holds a window of chunk `number`. Beyond `EXACT_CHUNKS` chunks they are a multiple of a
    quarter of the power of two below, so that few widths occur: an eighth of a row is padding at most on average."""
    chunks = number + 1
    if chunks > EXACT_CHUNKS:
        step = 1 << ((chunks - 1).bit_length() - 3)
        chunks = -(-chunks // step) * step
    return min(chunks * chunk, window)


def rows_for(n: int, most: int) -> int:
    """Rows of a step for n documents: n rounded up to a power of two or one and a half times one, at most `most`."""
    power = 1 << max(0, (n - 1).bit_length() - 1)
    return min(most, next(rows for rows in (power, power * 3 // 2, 2 * power) if rows >= n))
