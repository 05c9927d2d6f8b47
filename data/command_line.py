"""What every command shares: options from a dataclass, and bad input as one line and exit status 2.

It lies in this room because this is the lowest one that has a command.
"""

import contextlib
import dataclasses
import difflib
import io
import re
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from niblick.data.errors import DataError

T = TypeVar("T")


def guarded(script: str, main: Callable[[list[str]], None], words: list[str], *errors: type[Exception]) -> int:
    """The exit status of `main(words)`: 0, or after one line on stderr 2 for bad input and 130 for Ctrl-C.

    Bad input is an error of this room, one of `errors` (those of other rooms), or a file that fails.
    """
    try:
        main(words)
    except (DataError, OSError, *errors) as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        return 130
    return 0


def parse(cls: type[T], words: list[str], *, script: str, default: T | None = None, about: str | None = None) -> T:
    """The options laid over `default`. DataError for an unknown one, naming the nearest, and for a bad value."""
    import tyro

    _refuse_unknown(words, cls)  # before tyro, which would speak of missing options first
    options = {"args": words, "prog": script, "description": about}
    if default is not None:
        options["default"] = default
    explanation = io.StringIO()
    try:
        with contextlib.redirect_stderr(explanation):
            return tyro.cli(cls, **options)
    except SystemExit as exit:
        if not exit.code:
            raise  # --help
        raise DataError(_without_box(explanation.getvalue())) from None


def _refuse_unknown(words: list[str], cls: type) -> None:
    known = ["--help", *(f"--{path.replace('_', '-')}" for path in _field_paths(cls))]
    for word in words:
        option = word.split("=")[0].replace("_", "-")
        if option.startswith("--") and option not in known:
            raise DataError(f"unknown option {word!r}{nearest(option, known)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """' (nearest: X)' for the closest known word."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)
    return f" (nearest: {close[0]})" if close else ""


def _without_box(text: str) -> str:
    """tyro's message on one line: what stands in its box above the inner rule."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # it is coloured on a terminal
    lines = [line.strip(" │╭╮╰╯") for line in text.splitlines()]
    inside = [line for line in lines[1:] if line]
    end = next((i for i, line in enumerate(inside) if set(line) == {"─"}), len(inside))
    return " ".join(inside[:end]) or " ".join(text.split())


def _field_paths(cls: type, prefix: str = "") -> list[str]:
    paths = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            paths += _field_paths(field.type, f"{prefix}{field.name}.")
        else:
            paths += [f"{prefix}{field.name}"] + [f"{prefix}no_{field.name}"] * (field.type is bool)
    return paths
