"""What to do when a step does not fit into the GPU's memory: say which one would."""

import gc
from collections.abc import Callable

import torch

from niblick.model.config import Preset

PARTS = (4, 16, 64)
"""Of the micro-step's tokens, tried in turn until one fits; one row at least, where the loader makes rows."""
SHARE = 0.95
"""Of the free memory that is counted on: the allocator's blocks do not fill it to the end."""


def micro_step_that_fits(preset: Preset, world_size: int, run: Callable[[int], object], device: torch.device) -> str:
    """One line for the user, after torch.OutOfMemoryError. `run(n)` is forward and backward on n tokens.

    A micro-step's memory beyond what stays is nearly linear in its tokens, so one measurement at fewer tokens tells how
    many would fit. (It holds the gradients too, which do not grow: the estimate errs to the safe side.)
    """
    asked, unit = preset.batch.tokens_per_micro_step, _unit(preset)
    said = f"out of GPU memory at batch.tokens_per_micro_step {asked}"
    fewer = [tokens for part in PARTS if (tokens := max(asked // part // unit, 1) * unit) < asked]
    for tokens in dict.fromkeys(fewer):
        _release()
        try:
            per_token = _peak_bytes(lambda: run(tokens), device) / tokens  # noqa: B023
        except torch.OutOfMemoryError:
            continue
        _release()
        fits = min(asked - 1, int(SHARE * _free_bytes(device) / per_token))
        said += f": about {fits} would fit ({per_token / 1e3:.0f} kB a token, measured at {tokens})"
        found = largest_micro_step(preset, world_size, fits)
        return f"{said}; try --batch.tokens-per-micro-step {found}" if found else said
    either = f", and {fewer[-1]} do not fit either" if fewer else ""
    return f"{said}{either}: expected a larger card or a smaller model"


def largest_micro_step(preset: Preset, world_size: int, limit: int) -> int | None:
    """The most tokens up to `limit` that divide the step evenly and hold whole rows, where the loader makes rows."""
    share, left = divmod(preset.batch.tokens_per_step, world_size)
    counts = (n for n in range(1, share + 1) if share % n == 0 and share // n <= limit)
    found = (share // n for n in counts if share // n % _unit(preset) == 0)
    return None if left else next(found, None)


def _unit(preset: Preset) -> int:
    return 1 if preset.data.loader == "documents" else preset.model.max_segment


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that `run` allocates beyond what was there before."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]
