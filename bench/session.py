"""One run of the bench: its options, and what it has found out so far, each thing when it is first asked for."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import pytest
import torch

from niblick.bench import measure
from niblick.bench.ceilings import Ceilings, ceiling_dtypes, measure_ceilings
from niblick.bench.gate import Verdict, run_contract
from niblick.bench.measure import Outcome
from niblick.data.command_line import nearest
from niblick.data.errors import DataError


@dataclass(frozen=True)
class Options:
    kernels: tuple[str, ...] = ()
    """Names of kernels; default: all of them."""
    sizes: tuple[str, ...] = ()
    """Names of a kernel's SIZES, the first dimension divided or multiplied at will (record/4, large, record*2).
    Default: record/16, record/4, and all whose names begin with record. Without a GPU: one small size."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    rounds: int = 30
    """Calls of every contender, in turns."""
    contract: bool = True
    """Run a kernel's contract before timing it. --no-contract: the figures are marked as ungated."""
    workers: int = 0
    """Processes that share the contract (pytest-xdist); 0: one, without it."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    out: Path | None = None
    """JSON-lines file to append to; default on a GPU: bench/results/DATE-CARD-kernels.jsonl, without one: none."""
    readme: bool = True
    """Write the table of README.md (only by a whole, gated run on a GPU, with the default dtype and rounds)."""
    plots: bool = True
    """Draw bench/results/plots/KERNEL.svg (only on a GPU)."""
    commit: str | None = None
    """The commit measured, where the files do not lie in a git checkout."""


@dataclass
class Session:
    options: Options
    say: Callable[[str], None] = lambda text: print(text, flush=True)
    outcomes: dict[tuple[str, str], dict[str, Outcome]] = field(default_factory=dict)
    keep: Callable[[str, str], None] = lambda kernel, size_name: None
    """Called with each kernel and size as soon as its outcome is known."""

    def __post_init__(self) -> None:
        known = measure.kernels()
        for kernel in self.options.kernels:
            if kernel not in known:
                raise DataError(f"--kernels: expected some of {', '.join(known)}: got {kernel}{nearest(kernel, known)}")
        if self.options.device == "cuda" and not torch.cuda.is_available():
            raise DataError("--device cuda: expected a CUDA device, found none (--device cpu runs the eager paths)")
        if self.options.rounds < 1:
            raise DataError(f"--rounds: expected at least 1, got {self.options.rounds}")
        for kernel in self.kernels:
            self.sizes(kernel)  # refuses a size before anything starts

    @property
    def device(self) -> torch.device:
        here = self.options.device != "cpu" and torch.cuda.is_available()
        return torch.device("cuda", 0) if here else torch.device("cpu")

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        default = "bfloat16" if self.cuda else "float32"
        return getattr(torch, default if self.options.dtype == "auto" else self.options.dtype)

    @property
    def kernels(self) -> list[str]:
        return sorted(set(self.options.kernels)) or measure.kernels()

    @property
    def whole(self) -> bool:
        """Whether this run may speak for the repository: all was looked at, behind the contract, as by default."""
        options, everything = self.options, set(self.kernels) == set(measure.kernels())
        usual = not options.sizes and options.dtype in ("auto", "bfloat16") and options.rounds >= Options.rounds
        wanted = {(kernel, size) for kernel in self.kernels for size in self.sizes(kernel)}
        return self.cuda and options.contract and everything and usual and wanted <= self.outcomes.keys()

    def sizes(self, kernel: str) -> list[str]:
        """The names of the sizes to time, those that come to the same left out."""
        if measure.defect(kernel):
            return ["record"]
        module = measure.load(kernel)
        distinct = {}
        for name in self.options.sizes or measure.default_sizes(module):
            try:
                distinct[measure.size_of(module, name)] = name
            except (KeyError, ValueError):
                expected = ", ".join(module.SIZES)
                raise DataError(f"--sizes: expected {expected}, as record/4 or record*2: got {name}") from None
        return list(distinct.values()) if self.cuda else [measure.small_size(kernel, module)]

    @cached_property
    def ceilings(self) -> Ceilings:
        return measure_ceilings(self.device, ceiling_dtypes(self.device, self.dtype))

    @cached_property
    def verdicts(self) -> dict[str, Verdict]:
        if not self.options.contract:
            self.say("NO CONTRACT WAS RUN: these figures are ungated, of kernels that may be wrong.")
            return dict.fromkeys(self.kernels, Verdict(True, "ungated"))
        start = time.perf_counter()
        verdicts = run_contract(self.kernels, self.cuda, self.options.workers)
        for kernel, verdict in verdicts.items():
            self.say(f"{kernel}: {'green' if verdict.green else 'RED, not timed'}, {verdict.reason}")
        self.say(f"contract: {time.perf_counter() - start:.0f} s")
        return verdicts

    def red(self, kernel: str) -> str | None:
        """Why the kernel may not be timed."""
        defect = measure.defect(kernel)
        return defect or (None if self.verdicts[kernel].green else self.verdicts[kernel].reason)

    def outcome(self, kernel: str, size_name: str) -> dict[str, Outcome]:
        """By contender; measured once. Of a red kernel nothing is measured."""
        key = (kernel, size_name)
        if key not in self.outcomes:
            reason = self.red(kernel)
            if reason is None:
                self.outcomes[key] = self._measure(kernel, size_name)
            else:
                self.outcomes[key] = {"niblick": Outcome(f"red: {reason}")}
            self.keep(*key)
        return self.outcomes[key]

    def _measure(self, kernel: str, size_name: str) -> dict[str, Outcome]:
        ceilings, start = self.ceilings, time.perf_counter()
        try:
            found = measure.measure(kernel, size_name, self.dtype, self.device, ceilings, self.options.rounds)
        except Exception as error:  # inputs that do not fit the card, for example; the other sizes go on
            found = {"niblick": Outcome(f"failed: {measure.first_line(error)}")}
        self.say(f"{kernel} {size_name}: {time.perf_counter() - start:.1f} s")
        if self.cuda:
            torch.cuda.empty_cache()
        for outcome in found.values():
            for record in outcome.records.values():
                record["gated"] = self.options.contract
        return found


KEY = pytest.StashKey[Session]()


def session_of(config: pytest.Config) -> Session:
    """The session that `run` stashed; pytest started by hand gets one with the default options."""
    if KEY not in config.stash:
        config.stash[KEY] = Session(Options())
    return config.stash[KEY]
