"""Results as JSON lines: DATE-CARD-KIND.jsonl, every run a "start" record and then its figures. Runs are appended."""

import json
import re
import time
from pathlib import Path

import torch

from niblick.model.runlog import environment

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bench" / "results"


def start_record(device: torch.device, **fields: object) -> dict[str, object]:
    """What ran where: card, driver, versions, commit (marked when dirty), date, and the fields given."""
    facts = environment(device)
    return {"event": "start", "card": facts["device"], "driver": driver_version(device)} | facts | fields


def driver_version(device: torch.device) -> str | None:
    """NVIDIA's driver; None without a card or without nvidia-ml-py."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        found = pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # the library's own error class is in the module that may be missing
        return None
    return found.decode() if isinstance(found, bytes) else found


def default_path(kind: str, device: torch.device) -> Path:
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", card.removeprefix("NVIDIA ").lower()).strip("-")
    return FOLDER / f"{time.strftime('%Y-%m-%d')}-{slug}-{kind}.jsonl"


def append(path: Path, records: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(json.dumps(rounded(record)) + "\n" for record in records)


def rounded(value: object) -> object:
    """Floats to six significant digits, inside records and lists too."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
