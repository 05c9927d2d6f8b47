"""The JSON header of an artifact: what the model is, how each tensor is stored, which streams the file holds.

Its layout is part of `container`; here it is made, parsed and checked. Shapes are not in it: they follow from the
settings. Errors name what was expected and found; the file's path is added by the reader.
"""

import dataclasses
import json
import math
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import nn

from niblick.artifact.errors import ArtifactError, require
from niblick.artifact.matrices import ROLES
from niblick.artifact.records import is_matrix
from niblick.artifact.streams import Correction, Entry, stream_names
from niblick.artifact.trellis import POLYNOMIALS
from niblick.model.config import ConfigError, GPTConfig, NgramBiasConfig
from niblick.model.gpt import GPT

MAX_BYTES = 1 << 20
MAX_WEIGHTS = 1 << 26
"""Of one artifact: 2^26 weights fill the cap at two bits each, and are decoded in seconds."""
MAX_ENTRIES = 1 << 26
"""Of its n-gram tables, for the same reasons."""
TABLES = "ngram_bias"
"""Their stream, and what the header calls their settings."""
MAX_LAYERS = 4096
"""Executed, loops included."""


class Header(NamedTuple):
    config: GPTConfig
    entries: list[Entry]
    coded_bytes: dict[str, int]
    """By stream, in the order of the file."""
    tokenizer_sha256: str
    """Of the SentencePiece model file that the model's ids belong to; empty: not recorded."""
    ngram_bias: NgramBiasConfig | None = None
    """Of the n-gram tables, where there are some."""

    def to_json(self) -> bytes:
        values = {
            "config": dataclasses.asdict(self.config),
            "tensors": self.entries,
            "streams": list(self.coded_bytes.items()),
            "tokenizer_sha256": self.tokenizer_sha256,
        }
        if self.ngram_bias:
            values[TABLES] = dataclasses.asdict(self.ngram_bias)
        return json.dumps(values, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "Header":
        """ArtifactError for anything but a header whose parts agree with one another and with the model."""
        try:
            values = json.loads(text)
            config, tensors, streams = (values[key] for key in ("config", "tensors", "streams"))
            entries = [Entry(*tensor[:6], tuple(Correction(*c) for c in tensor[6])) for tensor in tensors]
            coded_bytes = {name: size for name, size in streams}
            tokenizer, tables = values.get("tokenizer_sha256", ""), values.get(TABLES)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"header: expected JSON of config, tensors, streams: {error!r}"[:500]) from error
        require(isinstance(tokenizer, str), f"header: expected a tokenizer's SHA-256, found {tokenizer!r}")
        tables = None if tables is None else parse_config(tables, NgramBiasConfig)
        header = cls(parse_config(config), entries, coded_bytes, tokenizer, tables)
        header._check()
        return header

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return role_shapes(self.config)

    def _check(self) -> None:
        require(
            self.ngram_bias is None or self.ngram_bias.mode != "none", "header: expected a mode of the n-gram tables"
        )
        shapes = self.shapes()
        for entry in self.entries:
            require(_is_sound(entry), f"header: expected a tensor and how it is stored, found {list(entry)}"[:500])
        names = [entry.name for entry in self.entries]
        require(
            sorted(names) == sorted(shapes),
            f"header: expected the tensors of its model, found other ones: {sorted(set(names) ^ set(shapes))}"[:500],
        )
        for entry in self.entries:
            problem = _misfit(entry, shapes[entry.name])
            require(not problem, f"header: {entry.name}: {problem}")
        expected = stream_names(self.entries) + ([TABLES] if self.ngram_bias else [])
        found = list(self.coded_bytes)
        require(expected == found, f"header: expected the streams {expected} for its tensors, found {found}"[:1000])
        for name, size in self.coded_bytes.items():
            require(_is_natural(size), f"header: expected the size of stream {name}, found {size!r}")


def role_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model, matrices by role; no model is built. ArtifactError for one too large."""
    c = config
    layers = c.num_layers * (1 + c.loop_extra_passes)
    require(layers <= MAX_LAYERS, f"header: expected at most {MAX_LAYERS} executed layers, found {layers}")
    skeleton = GPT.__new__(GPT)
    nn.Module.__init__(skeleton)
    skeleton.config, skeleton.dtype = config, torch.float32
    with torch.device("meta"):
        skeleton._create_parameters(torch.float32)
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    weights = sum(map(math.prod, shapes.values()))
    require(weights <= MAX_WEIGHTS, f"header: expected at most {MAX_WEIGHTS} weights, found {weights}")
    return {role: _role_shape(shapes[bank], half) for role, (bank, half) in ROLES.items()} | {
        name: shape for name, shape in shapes.items() if name not in {bank for bank, _ in ROLES.values()}
    }


def table_shape(settings: NgramBiasConfig, config: GPTConfig) -> tuple[int, int, int]:
    """Of all n-gram tables, one under the other, as a stack of one; ArtifactError where they are too large."""
    shape = (1, len(settings.orders) * settings.rows, config.vocab_size)
    found = math.prod(shape)
    require(found <= MAX_ENTRIES, f"n-gram tables: expected at most {MAX_ENTRIES:,} entries in all, found {found:,}")
    return shape


def parse_config(values: object, kind: type = GPTConfig) -> GPTConfig | NgramBiasConfig:
    """ArtifactError for anything but settings of this version's model that agree."""
    require(isinstance(values, dict), f"header: expected settings in a dictionary, found {type(values).__name__}")
    types, make = get_type_hints(kind), kind
    for name in values:
        require(name in types, f"header: expected only settings of this version's model, found {name!r}")
    for name, kind in types.items():
        value = values.get(name, getattr(make, name))  # a setting added later must default to what was before it
        require(_is_a(kind, value), f"header: expected {name} to be {_describe(kind)}, found {value!r}"[:500])
    try:
        return make(**{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()})
    except (ConfigError, ArithmeticError) as error:
        raise ArtifactError(f"header: expected settings that agree: {error}") from error


def _role_shape(shape: tuple[int, ...], half: int | None) -> tuple[int, ...]:
    if half is None:
        return shape if len(shape) == 3 else (1, *shape)
    return (shape[0] // 2, *shape[1:])


def _misfit(entry: Entry, shape: tuple[int, ...]) -> str:
    if is_matrix(entry.name) != (entry.kind == "rows"):
        return f"expected {'rows' if is_matrix(entry.name) else 'bytes or float16'}, found {entry.kind}"
    for c in entry.corrections:
        n, R, C = shape
        sound = c.matrix < n and 0 < c.rank <= min(R, C) and c.a_steps in (1, R) and 0 < c.b_steps <= c.rank * C
        if not (sound and c.rank * C % c.b_steps == 0):
            return f"expected a correction of a matrix of {shape}, found {list(c)}"
    return ""


def _is_sound(entry: Entry) -> bool:
    naturals = (entry.bits, entry.states, entry.steps_per_octave, *(x for c in entry.corrections for x in c))
    return (
        isinstance(entry.name, str)
        and all(map(_is_natural, naturals))
        and type(entry.exponent) is int
        and abs(entry.exponent) <= 1 << 16
        and entry.steps_per_octave <= 1024
        and len(entry.corrections) <= 64
        and {"rows": entry.bits in range(2, 9), "bytes": entry.bits == 8, "float16": entry.bits == 16}.get(
            entry.kind if isinstance(entry.kind, str) else "", False
        )
        and (entry.states == 0 or (entry.kind == "rows" and entry.states in POLYNOMIALS))
        and (entry.kind == "rows" or not (entry.corrections or entry.steps_per_octave))
    )


def _is_natural(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_a(kind: type, value: object) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(get_args(kind)) and all(map(_is_number, value))
    return type(value) is kind or (kind is float and type(value) is int)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _describe(kind: type) -> str:
    if get_origin(kind) is tuple:
        return f"{len(get_args(kind))} numbers"
    return f"one of {list(get_args(kind))}" if get_origin(kind) is Literal else kind.__name__
