"""The byte ledger: where an artifact's bytes go, by role and stream, and what is left under the cap.

What counts is the artifact plus the file of code that is shipped with it (`bundle`), each as it lies on disk. The
tokenizer does not, by the challenge's rules.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from niblick.artifact.container import Container
from niblick.artifact.header import TABLES
from niblick.artifact.records import RowIntegers
from niblick.artifact.streams import Parts, shuffled, take_apart
from niblick.artifact.trellis import parities


@dataclass(frozen=True)
class StreamBytes:
    """One stream: how many values of how many bits, their order-0 entropy and their coded size, in bytes.

    Of a stream that mixes several things (the published containers have such) only the coded size is known: values 0.
    """

    name: str
    values: int
    raw_bits: int
    entropy_bytes: float
    coded_bytes: int


@dataclass(frozen=True)
class Ledger:
    """All sizes in bytes. Streams and container add up to the model, model and code to the total."""

    streams: tuple[StreamBytes, ...]
    container_bytes: int
    model_bytes: int
    code_bytes: int
    tokenizer_bytes: int
    cap_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.model_bytes + self.code_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.cap_bytes


def byte_ledger(container: Container, code_bytes: int, cap_bytes: int, tokenizer: str | Path | None = None) -> Ledger:
    """The ledger of an artifact that was read, and of so many bytes of code beside it."""
    bits = {name: t.bits for name, t in container.quantized.items() if isinstance(t, RowIntegers)}
    _, parts = take_apart(container.quantized, container.steps_per_octave)
    if container.ngram_bias:
        parts.stacks[TABLES], bits[TABLES] = container.ngram_bias.integers.numpy(), 16
    streams = tuple(
        _stream_bytes(name, parts, bits.get(name, 8), coded) for name, coded in container.coded_bytes.items()
    )
    return Ledger(
        streams=streams,
        container_bytes=container.size - sum(s.coded_bytes for s in streams),
        model_bytes=container.size,
        code_bytes=code_bytes,
        tokenizer_bytes=Path(tokenizer).stat().st_size if tokenizer else 0,
        cap_bytes=cap_bytes,
    )


def table_rows(ledger: Ledger) -> list[tuple[str, str, str, str, str]]:
    """(what, values, bits a value before coding, order-0 entropy in bytes, bytes), ready to print."""
    rows = [
        (s.name, f"{s.values:,}", f"{s.raw_bits}", f"{s.entropy_bytes:,.0f}", f"{s.coded_bytes:,}")
        if s.values
        else (s.name, "", "", "", f"{s.coded_bytes:,}")
        for s in ledger.streams
    ]
    sums = {
        "container": ledger.container_bytes,
        "model": ledger.model_bytes,
        "code": ledger.code_bytes,
        "total": ledger.total_bytes,
        f"left of {ledger.cap_bytes:,}": ledger.cap_bytes - ledger.total_bytes,
        "not counted: tokenizer": ledger.tokenizer_bytes,
    }
    return rows + [(name, "", "", "", f"{size:,}") for name, size in sums.items()]


def _stream_bytes(name: str, parts: Parts, bits: int, coded_bytes: int) -> StreamBytes:
    """A trellis forces one bit of every integer: what counts is the rest, given that bit. Of float16 the two byte
    planes have an entropy each, as the coder sees them."""
    if name == "float16":
        planes = np.frombuffer(shuffled(parts.float16), "u1").reshape(2, -1)
        return StreamBytes(name, planes.shape[1], 16, sum(map(entropy_bytes, planes)), coded_bytes)
    if name not in parts.stacks:
        return StreamBytes(name, 0, 0, 0.0, coded_bytes)
    q, states = parts.stacks[name], parts.states.get(name, 0)
    if states:
        odd = parities(q, states)
        entropy = sum(entropy_bytes((q >> 1)[odd == parity]) for parity in (False, True))
    else:
        entropy = entropy_bytes(q)
    return StreamBytes(name, q.size, 16 if name.endswith(".steps") else bits, entropy, coded_bytes)


def entropy_bytes(symbols: np.ndarray) -> float:
    """Bytes that an ideal coder needs for integers if it knows only how often each occurs."""
    if symbols.size == 0:
        return 0.0
    flat = symbols.ravel().astype(np.int64)
    counts = np.bincount(flat - flat.min())
    counts = counts[counts > 0]
    return float((counts * np.log2(flat.size / counts)).sum() / 8)
