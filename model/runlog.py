"""The JSON-lines log of a run: the first record says exactly what ran where, the others what happened."""

import contextlib
import itertools
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch


class RunLog:
    """One JSON object a line, with seconds since the log was opened. Earlier logs are moved aside, not lost.

    A disk that fills up later costs the log, not the run: one line on stderr says so.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._start = path, time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.rename(_free_name(path))
        self._file = open(path, "w", buffering=1)

    def write(self, event: str, **fields: object) -> None:
        if self._file.closed:
            return
        record = {"event": event, "t": round(time.perf_counter() - self._start, 3)} | fields
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            print(f"cannot write {self._path}: {error.strerror}; going on without it", file=sys.stderr)
            with contextlib.suppress(OSError):
                self._file.close()


def _free_name(path: Path) -> Path:
    """log.jsonl -> log.1.jsonl, or the first number after it that is free."""
    names = (path.with_name(f"{path.stem}.{i}{path.suffix}") for i in itertools.count(1))
    return next(name for name in names if not name.exists())


def environment(device: torch.device) -> dict[str, object]:
    """Versions, card and commit."""
    import numpy
    import triton

    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _commit() -> str | None:
    """The commit of the checkout this file lies in, marked when there are uncommitted changes; None elsewhere."""
    root = Path(__file__).resolve().parents[1]
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed inside somebody else's repository
        return _git(root, "describe", "--always", "--dirty", "--abbrev=40")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
