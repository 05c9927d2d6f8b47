"""Artifact -> bits per byte.

    python evaluate.py ARTIFACT --data FOLDER [--method sliding] [--tilt] [--tilt-version A] [--weights packed] ...

FOLDER holds validation shards and a tokenizer: what `niblick.data.download` fetched, or what a training run prepared
under cache/. Exit status 2 and one line for anything that cannot be scored.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from niblick.artifact.container import read_artifact, require_tokenizer
from niblick.artifact.errors import ArtifactError
from niblick.artifact.load import Weights, load_model
from niblick.data import tokenizer as tokenizers
from niblick.data.command_line import guarded, parse
from niblick.data.shards import find_shards
from niblick.evaluation.run import ValidationSet, evaluate_model
from niblick.evaluation.score import Score
from niblick.model.config import ConfigError, EvalConfig, Method, Tail, TiltVersion
from niblick.model.files import write_atomically


@dataclass(frozen=True)
class Arguments:
    artifact: tyro.conf.Positional[Path]
    """The file to score."""
    data: Path
    """Folder of *_val_*.bin shards, or a pattern that matches them."""
    tokenizer: Path | None = None
    """SentencePiece model; default: the one *.model in the folder of the data."""
    method: Method = "plain"
    """plain: consecutive windows. sliding: overlapping ones, which give every target a long context."""
    tilt: bool = False
    """Raise the probability of tokens that followed the same tokens before."""
    tilt_version: TiltVersion = "B"
    """Contexts that --tilt compares. A: the 8, 10, 12, 14 and 16 tokens before. B: the 15 tokens before."""
    weights: Weights = "dense"
    """packed: matrices stay in six bits."""
    sequence_length: int | None = None
    """Tokens a window; default: the longest segment of the model's training."""
    stride: int = 64
    """New tokens a sliding window."""
    tokens_per_batch: int = 65_536
    tail: Tail = "keep"
    """drop: leave out the last, shorter window, as the challenge does."""
    max_tokens: int = 0
    """Score only so many tokens of the data; 0: all."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    attention: Literal["auto", "fa4", "fa3", "fa2", "torch", "plain"] = "auto"
    budget_s: float = 600.0
    """Seconds that an evaluation may take, for the share printed."""
    out: Path | None = None
    """Also write the result there, as one line of JSON."""


def main(words: list[str]) -> None:
    began = time.perf_counter()
    arguments = parse(Arguments, words, script="evaluate.py", about=__doc__)
    if arguments.out and not arguments.out.parent.is_dir():
        raise ConfigError(f"--out: expected a folder {arguments.out.parent} to write into, found none")
    device, dtype = choose_device(arguments.device)
    artifact = read_artifact(arguments.artifact)
    model, rung = load_model(artifact, device, dtype, arguments.weights, arguments.attention)
    paths = find_shards(arguments.data, "val")
    tokenizer = arguments.tokenizer or tokenizers.find(arguments.data)
    data = ValidationSet.load(
        paths,
        tokenizer,
        vocab_size=model.config.vocab_size,
        bos_id=model.config.bos_id,
        max_tokens=arguments.max_tokens,
    )
    require_tokenizer(artifact, tokenizer)
    config = EvalConfig(
        method=arguments.method,
        tail=arguments.tail,
        sequence_length=model.config.max_segment if arguments.sequence_length is None else arguments.sequence_length,
        stride=arguments.stride,
        tokens_per_batch=arguments.tokens_per_batch,
        budget_s=arguments.budget_s,
    )
    score = run(model, data, config, arguments)
    report(summary(score, rung, str(device), time.perf_counter() - began, config, arguments), arguments.out)


def choose_device(wanted: str) -> tuple[torch.device, torch.dtype]:
    """bf16 on a GPU, float32 on a CPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: expected a CUDA device, found none (--device cpu scores without one)")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda"), torch.bfloat16


def run(model, data: ValidationSet, config: EvalConfig, arguments: Arguments) -> Score:
    with Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("scoring", total=None)
        return evaluate_model(
            model,
            data,
            config,
            tilt=arguments.tilt_version if arguments.tilt else None,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def summary(
    score: Score, rung: str, device: str, seconds: float, config: EvalConfig, arguments: Arguments
) -> dict[str, object]:
    """Everything the table shows; the share of the budget is that of the whole run, loading included."""
    return {
        "artifact": str(arguments.artifact),
        "bits_per_byte": score.bits_per_byte,
        "nats_per_token": score.nats_per_token,
        "targets": score.n_targets,
        "bytes": score.n_bytes,
        "seconds": seconds,
        "scoring_seconds": score.seconds,
        "share_of_budget": seconds / config.budget_s,
        "tokens_per_second": score.n_targets / score.seconds,
        "method": arguments.method + (f", stride {config.stride}" if arguments.method == "sliding" else ""),
        "tilt": arguments.tilt_version if arguments.tilt else "none",
        "sequence_length": config.sequence_length,
        "tail": arguments.tail,
        "weights": arguments.weights,
        "attention": rung,
        "device": device,
    }


def report(result: dict[str, object], out: Path | None) -> None:
    formats = {"bits_per_byte": ".6f", "nats_per_token": ".6f", "share_of_budget": ".1%"}
    table = Table(show_header=False)
    for name, value in result.items():
        default = ",.1f" if isinstance(value, float) else ",d" if isinstance(value, int) else "s"
        table.add_row(name.replace("_", " "), format(value, formats.get(name, default)))
    Console().print(table)
    if out:
        line = json.dumps(result) + "\n"
        write_atomically(out, lambda file: file.write(line.encode()))


def command(words: list[str]) -> int:
    """`main` with bad input as one line and exit status 2."""
    return guarded("evaluate.py", main, words, ArtifactError, ConfigError)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
