"""Documents: text sources as iterators of (name, text). The embedded corpus is the standard library's own sources."""

import gzip
import hashlib
import json
import lzma
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from niblick.data.errors import DataError

Document = tuple[str, str]  # (name, text)

STANDARD_LIBRARY = "stdlib"
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
# Third-party packages differ from machine to machine; tests, demos and the deliberately broken sources of lib2to3 are
# absent from some distributions' Python.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3", "__pycache__"}


def documents(source: str | Path) -> Iterator[Document]:
    """The documents of a source: "stdlib", a folder of text files, or a JSON-lines file. DataError for any other."""
    if str(source) == STANDARD_LIBRARY:
        return standard_library()
    if Path(source).is_dir():
        return folder(source)
    if str(source).endswith(JSON_LINES) and Path(source).exists():
        return jsonl(source)
    expected = f'"{STANDARD_LIBRARY}", a folder, or a file {", ".join("*" + suffix for suffix in JSON_LINES)}'
    found = "a file of another kind" if Path(source).exists() else "no such file or folder"
    raise DataError(f"{source}: expected {expected}, found {found}")


def source_files(source: str | Path) -> list[Path]:
    """The files that `documents(source)` reads, sorted by their path within the source."""
    if str(source) == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        return [path for path in _files(root, SKIPPED_FOLDERS) if path.suffix == ".py"]
    return _files(Path(source), set()) if Path(source).is_dir() else [Path(source)]


def standard_library() -> Iterator[Document]:
    """The sources of the running interpreter's standard library, without its tests; names are relative paths."""
    root = Path(sysconfig.get_path("stdlib"))
    yield from _texts(root, source_files(STANDARD_LIBRARY))


def folder(path: str | Path) -> Iterator[Document]:
    """All text files (UTF-8 without NUL) under a folder, sorted; hidden files and folders are left out."""
    yield from _texts(Path(path), source_files(path))


def _files(root: Path, skipped: set[str]) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _texts(root: Path, paths: list[Path]) -> Iterator[Document]:
    found = False
    for path in paths:
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        except OSError as error:
            raise DataError(f"{path}: cannot read the text: {error.strerror}") from error
        if text.strip() and "\0" not in text:
            found = True
            yield path.relative_to(root).as_posix(), text
    if not found:
        raise DataError(f"{root}: expected UTF-8 text files, found none among {len(paths)} files")


def jsonl(path: str | Path) -> Iterator[Document]:
    """One document per line, `{"text": ...}` (other keys are ignored), plain or compressed (.gz, .xz).

    The name is the SHA-256 of the text, so that identical documents land on the same side of the held-out split.
    DataError names file and line.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    text = _text(line, f"{path}:{number}")
                    yield hashlib.sha256(text.encode()).hexdigest(), text
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot read beyond line {number}: {reason}") from error


def _open(path: str | Path) -> BinaryIO:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
    return opener(path, "rb")


def _text(line: bytes, where: str) -> str:
    expected = 'expected a JSON object {"text": "..."}'
    try:
        record = json.loads(line)
    except ValueError as error:  # both malformed JSON and malformed UTF-8
        raise DataError(f"{where}: {expected}, found a malformed line ({error})") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"keys {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise DataError(f"{where}: {expected}, found {found}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: expected text that UTF-8 can hold, found {error.reason}") from error
    return text


def hash_key(name: str) -> bytes:
    """SHA-256 of a document's name: decides its side of the split, and its place in the shuffled stream."""
    return hashlib.sha256(name.encode()).digest()


def is_held_out(name: str, fraction: float = 0.05) -> bool:
    """Whether the document belongs to validation: its name's hash, read as a number in [0, 1), is below `fraction`."""
    return int.from_bytes(hash_key(name)[:8], "big") < fraction * 2**64
