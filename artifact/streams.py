"""Quantised weights as named streams of bytes, and back. Part of the container's format; see `container`.

In the tensors' order, for a stack of matrices of role R

    "R"            its integers, by `coder.encode_integers`
    "R.steps"      where its steps are powers of 2^(1/n): their exponents, less the exponent in the entry, likewise

for a tensor T in eight bits

    "T"            its integers, less its row's centre, as a stack (1, rows, columns)
    "T.centres"    the centres, (1, 1, rows)

and at the end, if there is anything in them

    "low_rank.a", "low_rank.b"   the integers of all corrections, in order, as (1, ?, 64), filled up with zeros
    "float16"      every float16 in order: tensors, steps that are not powers, steps of tensors in eight bits, of
                   corrections A, then B; low bytes of all, then high bytes, under brotli
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import brotli
import numpy as np
import torch
from torch import Tensor

from niblick.artifact.coder import decode_integers, encode_integers
from niblick.artifact.errors import ArtifactError, require
from niblick.artifact.records import (
    LowRank,
    Quantized,
    RowIntegers,
    SmallIntegers,
    grid_steps,
    largest_integer,
)

FLAT = 64


class Correction(NamedTuple):
    """Of a matrix by its index: the rank, and how many steps A and B have."""

    matrix: int
    rank: int
    a_steps: int
    b_steps: int


class Entry(NamedTuple):
    """How one tensor is stored. bits 16: float16; "bytes": eight bits with centres; otherwise rows of integers."""

    name: str
    kind: str  # "rows", "bytes" or "float16"
    bits: int = 16
    states: int = 0
    steps_per_octave: int = 0
    exponent: int = 0
    corrections: tuple[Correction, ...] = ()


@dataclass
class Parts:
    """What the streams hold, uncoded: stacks of integers by stream, and the trellis's states; all float16 values."""

    stacks: dict[str, np.ndarray] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)
    halves: list[np.ndarray] = field(default_factory=list)
    a: list[np.ndarray] = field(default_factory=list)
    b: list[np.ndarray] = field(default_factory=list)

    def finish(self) -> "Parts":
        for name, integers in (("low_rank.a", self.a), ("low_rank.b", self.b)):
            if integers:
                flat = np.concatenate([x.ravel() for x in integers]).astype(np.int16)
                self.stacks[name] = np.pad(flat, (0, -len(flat) % FLAT)).reshape(1, -1, FLAT)
        return self

    @property
    def float16(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.float16), *(half.ravel() for half in self.halves)])


def take_apart(quantized: Quantized, steps_per_octave: int = 0) -> tuple[list[Entry], Parts]:
    """The entries and uncoded streams of quantised weights; steps that all lie on the grid are stored as exponents."""
    parts = Parts()
    entries = [_add(parts, name, tensor, steps_per_octave) for name, tensor in quantized.items()]
    return entries, parts.finish()


def encode(parts: Parts) -> dict[str, bytes]:
    coded = {name: encode_integers(stack, parts.states.get(name, 0)) for name, stack in parts.stacks.items()}
    if parts.float16.size:
        coded["float16"] = brotli.compress(shuffled(parts.float16), quality=11)
    return coded


def stream_names(entries: list[Entry]) -> list[str]:
    """The streams that these tensors lie in, in the order of the file."""
    names = []
    for entry in entries:
        if entry.kind == "rows":
            names += [entry.name] + ([f"{entry.name}.steps"] if entry.steps_per_octave else [])
        if entry.kind == "bytes":
            names += [entry.name, f"{entry.name}.centres"]
    if any(entry.corrections for entry in entries):
        names += ["low_rank.a", "low_rank.b"]
    halves = any(entry.corrections or not entry.steps_per_octave for entry in entries)
    return names + (["float16"] if halves else [])


def decode(entries: list[Entry], shapes: dict[str, tuple[int, ...]], coded: dict[str, bytes]) -> Quantized:
    """The weights, given the shape of every tensor. ArtifactError, naming the stream, for bytes that are not theirs."""
    low_rank = {name: _flat(coded, entries, shapes, name) for name in ("low_rank.a", "low_rank.b") if name in coded}
    halves = _Halves(coded.get("float16", b""), sum(_count_halves(e, shapes[e.name]) for e in entries))
    return {e.name: _tensor(e, shapes[e.name], coded, halves, low_rank) for e in entries}


def shuffled(halves: np.ndarray) -> bytes:
    """Low bytes of all, then high bytes."""
    return halves.astype("<f2").view("u1").reshape(-1, 2).T.tobytes()


# ---- one tensor ----------------------------------------------------------------------------------------------------


def _add(parts: Parts, name: str, tensor: RowIntegers | SmallIntegers | Tensor, per_octave: int) -> Entry:
    if isinstance(tensor, Tensor):
        parts.halves.append(tensor.numpy())
        return Entry(name, "float16")
    if isinstance(tensor, SmallIntegers):
        q = tensor.q.numpy().reshape(-1, tensor.q.shape[-1]).astype(np.int16)
        centres = np.median(q, axis=1).astype(np.int16)
        parts.stacks[name] = (q - centres[:, None])[None]
        parts.stacks[f"{name}.centres"] = centres[None, None]
        parts.halves.append(tensor.scale.numpy())
        return Entry(name, "bytes", 8)
    parts.stacks[name], parts.states[name] = tensor.q.numpy(), tensor.states
    exponents = _exponents(tensor.scale, per_octave)
    middle = 0
    if exponents is None:
        parts.halves.append(tensor.scale.numpy())
    else:
        middle = int(np.median(exponents))
        parts.stacks[f"{name}.steps"] = (exponents - middle).astype(np.int16)[None]
    for correction in tensor.low_rank:
        parts.a.append(correction.a.numpy())
        parts.b.append(correction.b.numpy())
        parts.halves += [correction.a_scale.numpy(), correction.b_scale.numpy()]
    corrections = tuple(
        Correction(c.matrix, c.a.shape[1], len(c.a_scale), len(c.b_scale)) for c in tensor.low_rank
    )  # fmt: skip
    return Entry(name, "rows", tensor.bits, tensor.states, 0 if exponents is None else per_octave, middle, corrections)


def _exponents(scale: Tensor, per_octave: int) -> np.ndarray | None:
    if not per_octave:
        return None
    exponents = (scale.double().log2() * per_octave).round().long()
    exact = torch.equal(grid_steps(exponents, per_octave).half(), scale)
    return exponents.numpy() if exact and int(exponents.max() - exponents.min()) <= 511 else None


def _tensor(
    entry: Entry, shape: tuple[int, ...], coded: dict[str, bytes], halves: "_Halves", low_rank: dict[str, np.ndarray]
) -> RowIntegers | SmallIntegers | Tensor:
    if entry.kind == "float16":
        return halves.take(shape)
    if entry.kind == "bytes":
        rows = int(np.prod(shape[:-1]))
        centres = _stack(coded, f"{entry.name}.centres", (1, 1, rows))[0, 0]
        q = _stack(coded, entry.name, (1, rows, shape[-1]))[0] + centres[:, None]
        return SmallIntegers(_bytes(entry.name, q, 127).view(shape), halves.take(shape[:-1]))
    q = _bytes(entry.name, _stack(coded, entry.name, shape, entry.states), largest_integer(entry.bits))
    if entry.steps_per_octave:
        exponents = _stack(coded, f"{entry.name}.steps", (1, *shape[:2]))[0].astype(np.int64) + entry.exponent
        scale = grid_steps(torch.from_numpy(exponents), entry.steps_per_octave).half()
        finite = bool(torch.isfinite(scale).all())
        require(finite, f"{entry.name}.steps: expected steps within float16's range, found others")
    else:
        scale = halves.take(shape[:2])
    corrections = tuple(_correction(c, shape, halves, low_rank) for c in entry.corrections)
    return RowIntegers(q, scale, entry.bits, entry.states, corrections)


def _correction(c: Correction, shape: tuple[int, ...], halves: "_Halves", low_rank: dict[str, np.ndarray]) -> LowRank:
    _, R, C = shape
    a, b = (_next(low_rank, f"low_rank.{name}", n) for name, n in (("a", R * c.rank), ("b", c.rank * C)))
    a_scale, b_scale = halves.take((c.a_steps,)), halves.take((c.b_steps,))
    return LowRank(
        c.matrix, _bytes("low_rank.a", a.reshape(R, c.rank), 127), a_scale,
        _bytes("low_rank.b", b.reshape(c.rank, C), 127), b_scale,
    )  # fmt: skip


# ---- one stream ----------------------------------------------------------------------------------------------------


class _Halves:
    """The float16 stream, handed out tensor by tensor."""

    def __init__(self, coded: bytes, count: int) -> None:
        data = decompress("float16", coded, 2 * count) if count else b""
        values = np.frombuffer(data, "u1").reshape(2, -1).T.copy().view("<f2").ravel().astype(np.float16)
        require(bool(np.isfinite(values).all()), "float16: expected finite values, found others")
        self.rest = values

    def take(self, shape: tuple[int, ...]) -> Tensor:
        n = int(np.prod(shape))
        taken, self.rest = self.rest[:n], self.rest[n:]
        return torch.from_numpy(taken.reshape(shape).copy())


def _count_halves(entry: Entry, shape: tuple[int, ...]) -> int:
    if entry.kind == "float16":
        return int(np.prod(shape))
    steps = 0 if entry.steps_per_octave else int(np.prod(shape[:-1]))
    return steps + sum(c.a_steps + c.b_steps for c in entry.corrections)


def _flat(coded: dict[str, bytes], entries: list[Entry], shapes: dict[str, tuple[int, ...]], name: str) -> np.ndarray:
    side = 1 if name == "low_rank.a" else 2
    n = sum(c.rank * shapes[e.name][side] for e in entries for c in e.corrections)
    return _stack(coded, name, (1, -(-n // FLAT), FLAT)).ravel()


def _next(flat: dict[str, np.ndarray], name: str, n: int) -> np.ndarray:
    taken, flat[name] = flat[name][:n], flat[name][n:]
    return taken


def _stack(coded: dict[str, bytes], name: str, shape: tuple[int, int, int], states: int = 0) -> np.ndarray:
    try:
        return decode_integers(coded[name], shape, states)
    except ArtifactError as error:
        raise ArtifactError(f"{name}: {error}") from error


def _bytes(name: str, q: np.ndarray, largest: int) -> Tensor:
    low, high = q.min(initial=0), q.max(initial=0)
    require(
        -largest <= low and high <= largest,
        f"{name}: expected integers in [{-largest}, {largest}], found {low} to {high}",
    )
    return torch.from_numpy(q.astype(np.int8))


def decompress(name: str, coded: bytes, expected: int) -> bytes:
    """Exactly `expected` bytes. The decoder stops soon after one more, whatever the stream would expand to."""
    decoder = brotli.Decompressor()
    try:
        data = decoder.process(coded, output_buffer_limit=expected + 1)
    except brotli.error as error:
        raise ArtifactError(f"{name}: expected one brotli stream, found something else") from error
    whole = decoder.is_finished()
    found = f"{len(data)}" if whole else f"at least {len(data)}, unfinished"
    require(whole and len(data) == expected, f"{name}: expected {expected} bytes decoded, found {found}")
    return data
