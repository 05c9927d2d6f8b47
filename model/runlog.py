"""The JSON-lines log of a run: the first record says exactly what ran where, the others what happened."""

import json
import platform
import subprocess
import time
from pathlib import Path

import torch


class RunLog:
    """One JSON object a line, with seconds since the log was opened. An earlier log is moved aside, not lost."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
            path.rename(path.with_name(f"{path.stem}.{stamp}{path.suffix}"))
        self._file = open(path, "w", buffering=1)
        self._start = time.perf_counter()

    def write(self, event: str, **fields: object) -> None:
        record = {"event": event, "t": round(time.perf_counter() - self._start, 3)} | fields
        self._file.write(json.dumps(record) + "\n")


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
    """The commit of the checkout this file lies in, marked when there are uncommitted changes; None outside git."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
