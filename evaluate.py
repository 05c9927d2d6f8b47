"""Artifact -> bits per byte.

    python evaluate.py ARTIFACT --data FOLDER [--method sliding] [--tilt] [--tilt-version A] [--weights packed] ...
    python evaluate.py ARTIFACT --data FOLDER --method score-first [--variant pr549] [--set learning_rate=0.001] ...

FOLDER holds validation shards and a tokenizer: what `niblick.data.download` fetched, or what a training run prepared
under cache/. Under torchrun every process is one rank and one GPU, and they share the work. Exit status 2 and one line
for anything that cannot be scored, or not within the budget; Ctrl-C keeps what is scored, marked as partial.
"""

import contextlib
import io
import json
import os
import sys
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from niblick.artifact.container import ILLEGAL, Container, read_artifact, require_tokenizer
from niblick.artifact.errors import ArtifactError
from niblick.artifact.load import Weights, load_model
from niblick.data import tokenizer as tokenizers
from niblick.data.command_line import guarded, parse
from niblick.data.shards import find_shards
from niblick.evaluation.clock import Clock, Policy, require_plot
from niblick.evaluation.ranks import place, store
from niblick.evaluation.run import METHODS, evaluate_model, settings_of, variant_of
from niblick.evaluation.score import Score
from niblick.evaluation.validation import ValidationSet, require_own_tokens
from niblick.model.config import ConfigError, EvalConfig, Method, Tail, TiltVersion
from niblick.model.files import write_atomically

ENDED, PATIENCE_S = "evaluate.py/ended", 20.0
VARIANTS = "; ".join(f"{name}: {', '.join(m.variants)}" for name, m in METHODS.items() if m.variants)
TAKEN = ("sequence_length", "stride", "tail", "tokens_per_batch")
"""Of EvalConfig; not every method reads them."""


@dataclass(frozen=True)
class Arguments:
    artifact: tyro.conf.Positional[Path]
    """The file to score."""
    data: Path
    """Folder of *_val_*.bin shards, or a pattern that matches them."""
    tokenizer: Path | None = None
    """SentencePiece model; default: the one *.model in the folder of the data."""
    method: Method = "plain"
    """plain: consecutive windows; of 65536 tokens, they are the challenge's variable-length evaluation. sliding:
    overlapping ones, which give every target a long context. score-first: sliding, and the model is trained on every
    stretch of text after it was scored. phased: each document adapts weights of its own."""
    variant: Annotated[str, tyro.conf.arg(help=f"Published settings of an adapting method ({VARIANTS}).")] = ""
    set: tuple[str, ...] = ()
    """Settings laid over the variant's, as learning_rate=0.001."""
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
    """Seconds that an evaluation may take, from the start of the process."""
    over_budget: Policy = "refuse"
    """refuse: end an evaluation that will not fit, as soon as its rate is known. run: let it take its time."""
    out: Path | None = None
    """Also write the result there, as one line of JSON."""
    plot: Path | None = None
    """Also draw there what the time was spent on (a .png, .svg or .pdf)."""


def main(words: list[str]) -> int:
    arguments = parse(Arguments, words, script="evaluate.py", about=__doc__)
    if arguments.out and not arguments.out.parent.is_dir():
        raise ConfigError(f"--out: expected a folder {arguments.out.parent} to write into, found none")
    if arguments.plot:
        require_plot(arguments.plot)
    clock = Clock.of_process(arguments.budget_s, arguments.over_budget)
    device, dtype = choose_device(arguments.device)
    artifact = read_artifact(arguments.artifact)
    config = eval_config(arguments, artifact)
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
    require_own_tokens(data.tokens, tokenizer, model.config.bos_id, paths[0])
    with clock.interruptible():
        score = run(model, data, config, arguments, clock)
    if not score.n_targets:
        print(f"evaluate.py: {score.partial}, before anything was scored", file=sys.stderr)
    elif place()[0] == 0:
        facts = {"weights": arguments.weights, "attention": rung, "device": str(device), "ranks": place()[1]}
        report(summary(artifact, score, config, arguments, clock) | facts, arguments, clock)
    return (130 if clock.interrupted else 2) if score.partial else 0


def eval_config(arguments: Arguments, artifact: Container) -> EvalConfig:
    """Checked to its last setting before anything is loaded."""
    longest = artifact.config.max_segment
    config = EvalConfig(
        method=arguments.method,
        variant=arguments.variant,
        set=arguments.set,
        tail=arguments.tail,
        sequence_length=longest if arguments.sequence_length is None else arguments.sequence_length,
        stride=arguments.stride,
        tokens_per_batch=arguments.tokens_per_batch,
        budget_s=arguments.budget_s,
    )
    settings_of(config, artifact.config)
    for field in fields(Arguments):
        unread = field.name in TAKEN and field.name not in METHODS[config.method].reads
        if unread and getattr(arguments, field.name) != field.default:
            option = f"--{field.name.replace('_', '-')}"
            raise ConfigError(f"{option}: expected another method, {config.method} has no such setting")
    return config


def choose_device(wanted: str) -> tuple[torch.device, torch.dtype]:
    """bf16 on a GPU, of several ranks each on its own; float32 on a CPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: expected a CUDA device, found none (--device cpu scores without one)")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    torch.set_float32_matmul_precision("high")
    if not dist.is_initialized():
        return torch.device("cuda"), torch.bfloat16
    local, n_cards = dist.get_node_local_rank(place()[0]), torch.cuda.device_count()
    if local >= n_cards:
        raise ConfigError(f"torchrun --nproc-per-node: expected at most {n_cards}, one a CUDA device")
    torch.cuda.set_device(local)
    return torch.device("cuda", local), torch.bfloat16


def run(model, data: ValidationSet, config: EvalConfig, arguments: Arguments, clock: Clock) -> Score:
    with Progress(transient=True, disable=not sys.stdout.isatty() or place()[0] > 0) as bar:
        task = bar.add_task("scoring", total=None)
        return evaluate_model(
            model,
            data,
            config,
            tilt=arguments.tilt_version if arguments.tilt else None,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            clock=clock,
        )


def summary(
    artifact: Container, score: Score, config: EvalConfig, arguments: Arguments, clock: Clock
) -> dict[str, object]:
    """What the table shows and the JSON holds; the share of the budget is that of the whole process."""
    parts = clock.seconds
    total = sum(parts.values())
    read = METHODS[config.method].reads
    stride = (f"stride {config.stride}",) if "stride" in read else ()
    return {
        "artifact": artifact.path,
        "illegal": ILLEGAL if artifact.trained_on_validation else "",
        "partial": score.partial,
        "bits_per_byte": score.bits_per_byte,
        "nats_per_token": score.nats_per_token,
        "targets": score.n_targets,
        "bytes": score.n_bytes,
        "seconds": total,
        "scoring_seconds": score.seconds,
        "clock": {name: round(seconds, 3) for name, seconds in parts.items()},
        "share_of_budget": total / config.budget_s,
        "tokens_per_second": score.n_targets / score.seconds,
        "method": ", ".join([config.method, *filter(None, (variant_of(config), *config.set)), *stride]),
        "notes": list(score.notes),
        "tilt": arguments.tilt_version if arguments.tilt else "none",
        **{name: getattr(config, name) for name in ("sequence_length", "tail") if name in read},
    }


def report(result: dict[str, object], arguments: Arguments, clock: Clock) -> None:
    formats = {"bits_per_byte": ".6f", "nats_per_token": ".6f", "share_of_budget": ".1%"}
    table = Table(show_header=False)
    for name, value in result.items():
        if name in ("illegal", "partial", "clock", "notes"):
            continue
        default = ",.1f" if isinstance(value, float) else ",d" if isinstance(value, int) else "s"
        table.add_row(name.replace("_", " "), format(value, formats.get(name, default)))
    for note in result["notes"]:
        table.add_row("note", note)
    for warning in filter(None, (result["illegal"], result["partial"] and f"PARTIAL: {result['partial']}")):
        table.add_row("WARNING", warning)
    Console().print(table)
    print(clock.text())
    if result["partial"]:
        print(f"evaluate.py: {result['partial']} after {result['targets']:,} targets: no score", file=sys.stderr)
    if arguments.out:
        line = json.dumps(result) + "\n"
        write_atomically(arguments.out, lambda file: file.write(line.encode()))
    if arguments.plot:
        clock.plot(arguments.plot)


# ---- several ranks -------------------------------------------------------------------------------------------------


def join_ranks() -> int:
    """This process's rank, after it has joined the others that torchrun started, if it did."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group()  # gloo for a CPU, NCCL for GPUs
    return place()[0]


def command(words: list[str]) -> int:
    """The exit status of `main`; bad input is one line and status 2. What all ranks have to say, the first one says."""
    status = 0

    def run_main(words: list[str]) -> None:
        nonlocal status
        status = main(words)

    rank, own = join_ranks(), io.StringIO()
    with contextlib.redirect_stderr(own) if rank else contextlib.nullcontext():
        status = guarded("evaluate.py", run_main, words, ArtifactError, ConfigError) or status
    if status and dist.is_initialized() and rank == 0:
        store().set(ENDED, "")
    elif status and dist.is_initialized() and not first_has_ended() and own.getvalue():
        print(f"rank {rank}: {own.getvalue().strip()}", file=sys.stderr)
    return status


def first_has_ended() -> bool:
    """Whether rank 0 also ends with what it has to say; waits for that, as the launcher ends all with the first one."""
    try:
        store().wait([ENDED], timedelta(seconds=PATIENCE_S))
    except dist.DistNetworkError:  # it is gone, and the store with it
        return True
    except RuntimeError:  # the stores word it differently: nothing came in time
        return False
    return True


def leave(status: int) -> None:
    """Ends a process that is one of several. With a failure at once: the others may wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)
    dist.destroy_process_group()


if __name__ == "__main__":
    status = command(sys.argv[1:])
    if dist.is_initialized():
        leave(status)
    sys.exit(status)
