"""The JSON header of an artifact: what the model is, which tensors the file holds, which streams they lie in.

Its layout is part of `container`; here it is made, parsed and checked. Errors name what was expected and found; the
file's path is added by the reader.
"""

import dataclasses
import json
import math
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

from niblick.artifact.errors import ArtifactError
from niblick.model.config import ConfigError, GPTConfig

MAX_BYTES = 1 << 20
MAX_WEIGHTS = 1 << 31
"""Of one artifact: 2^31 six-bit weights are a hundred times the cap, and still fit a machine's memory."""


class Entry(NamedTuple):
    """One tensor: bits 0 is stored as float16, other bits as rows of integers."""

    name: str
    bits: int
    shape: tuple[int, ...]


class Header(NamedTuple):
    config: GPTConfig
    entries: list[Entry]
    coded_bytes: dict[str, int]
    """By stream, in the order of the file."""
    tokenizer_sha256: str
    """Of the SentencePiece model file that the model's ids belong to; empty: not recorded."""

    def to_json(self) -> bytes:
        config, streams = dataclasses.asdict(self.config), list(self.coded_bytes.items())
        return json.dumps(
            {
                "config": config,
                "tensors": self.entries,
                "streams": streams,
                "tokenizer_sha256": self.tokenizer_sha256,
            },
            separators=(",", ":"),
        ).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "Header":
        """ArtifactError for anything but a header whose parts agree with one another."""
        try:
            values = json.loads(text)
            config, tensors, streams = (values[key] for key in ("config", "tensors", "streams"))
            entries = [Entry(name, bits, tuple(shape)) for name, bits, shape in tensors]
            coded_bytes = {name: size for name, size in streams}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(f"header: expected JSON of config, tensors, streams: {error!r}") from error
        tokenizer = values.get("tokenizer_sha256", "")
        require(isinstance(tokenizer, str), f"header: expected a tokenizer's SHA-256, found {tokenizer!r}")
        header = cls(_config(config), entries, coded_bytes, tokenizer)
        header._check()
        return header

    def raw_bytes(self) -> dict[str, int]:
        """Size before coding of every stream, from the shapes."""
        rows = [e for e in self.entries if e.bits]
        scales = sum(math.prod(e.shape[:-1]) for e in rows)
        halves = sum(math.prod(e.shape) for e in self.entries if not e.bits)
        return {e.name: math.prod(e.shape) for e in rows} | {"scales": 2 * scales, "float16": 2 * halves}

    def _check(self) -> None:
        for entry in self.entries:
            require(_is_sound(entry), f"header: expected a tensor's name, bits and shape, found {list(entry)}")
        names = [e.name for e in self.entries] + ["scales", "float16"]
        require(len(set(names)) == len(names), f"header: expected distinct names of tensors and streams, found {names}")
        weights = sum(math.prod(e.shape) for e in self.entries)
        require(weights <= MAX_WEIGHTS, f"header: expected at most {MAX_WEIGHTS} weights, found {weights}")
        expected, found = list(self.raw_bytes()), list(self.coded_bytes)
        require(expected == found, f"header: expected the streams {expected} for its tensors, found {found}")
        for name, size in self.coded_bytes.items():
            require(_is_natural(size), f"header: expected the size of stream {name}, found {size!r}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ArtifactError(message)


def _is_sound(entry: Entry) -> bool:
    return (
        isinstance(entry.name, str)
        and _is_natural(entry.bits)
        and entry.bits in (0, *range(2, 9))
        and 1 <= len(entry.shape) <= 4
        and all(_is_natural(n) and 0 < n <= MAX_WEIGHTS for n in entry.shape)
    )


def _is_natural(value: object) -> bool:
    return type(value) is int and value >= 0


def _config(values: object) -> GPTConfig:
    require(isinstance(values, dict), f"header: expected settings in a dictionary, found {type(values).__name__}")
    types = get_type_hints(GPTConfig)
    for name in values:
        require(name in types, f"header: expected only settings of this version's model, found {name!r}")
    for name, kind in types.items():
        value = values.get(name, getattr(GPTConfig, name))  # a setting added later must default to what was before it
        require(_is_a(kind, value), f"header: expected {name} to be {_describe(kind)}, found {value!r}")
    try:
        return GPTConfig(**values)
    except (ConfigError, ArithmeticError) as error:
        raise ArtifactError(f"header: expected settings that agree: {error}") from error


def _is_a(kind: type, value: object) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) is kind or (kind is float and type(value) is int)


def _describe(kind: type) -> str:
    return f"one of {list(get_args(kind))}" if get_origin(kind) is Literal else kind.__name__
