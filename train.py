"""The main job: preset -> data -> training inside the budget -> quantised artifact -> reloaded -> bits per byte.

    python train.py [PRESET] [--section.option value ...] [--resume] [--illegal-train-on-validation]

Presets are in model/presets.py (default: demo); every field of model/config.py is an option. Under torchrun every
process is one rank and one GPU; rank 0 prepares the data, writes, scores and prints.
"""

import dataclasses
import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from niblick.artifact.bundle import bundle
from niblick.artifact.calibration import calibrate
from niblick.artifact.container import (
    ILLEGAL,
    Container,
    pack,
    read_artifact,
    require_room,
    require_storable,
    write_artifact,
)
from niblick.artifact.errors import ArtifactError
from niblick.artifact.fill import fill
from niblick.artifact.ledger import byte_ledger, table_rows
from niblick.artifact.load import load_model, set_weights
from niblick.artifact.published import require_lrzip
from niblick.artifact.quantize import Quantization, quantize
from niblick.artifact.records import Quantized
from niblick.data import loaders
from niblick.data import tokenizer as tokenizers
from niblick.data.bits_per_byte import compressor_bits_per_byte, token_unigram_bits_per_byte
from niblick.data.command_line import guarded, nearest, parse
from niblick.data.errors import DataError
from niblick.data.prepare import Prepared, prepare_cached
from niblick.data.shards import count_tokens, first_tokens
from niblick.evaluation.clock import Clock, process_age_s
from niblick.evaluation.prequantization import train_on_validation
from niblick.evaluation.run import METHODS, evaluate_model, settings_of
from niblick.evaluation.score import Score
from niblick.evaluation.validation import ValidationSet
from niblick.model.attention import attention_version, choose_attention
from niblick.model.checkpoint import load_checkpoint, remove_half_written
from niblick.model.config import ArtifactConfig, ConfigError, EvalConfig, Preset
from niblick.model.distributed import contact, require_agreement
from niblick.model.errors import TrainingStopped
from niblick.model.files import write_atomically
from niblick.model.gpt import GPT
from niblick.model.launch import Launch, launch, said_once
from niblick.model.ngram_tables import NgramBias, build
from niblick.model.presets import PRESETS
from niblick.model.run import position_fields, run_clock
from niblick.model.runlog import RunLog, environment
from niblick.model.training import Position, Trainer

CHECKPOINT, ARTIFACT, CODE, LOG = "checkpoint.safetensors", "artifact.nbk", "niblick.pyz", "log.jsonl"
SHORT = {"--resume": "--run.resume", "--illegal-train-on-validation": "--evaluation.illegal-train-on-validation"}
PLACES = ("data.cache", "run.out")
"""Settings in which the ranks may differ: folders of several machines."""
YARDSTICK_TOKENS = 10_000_000
"""xz -9e codes some 2.5 MB a second: on all of FineWeb's 40 million held-out tokens it would run for minutes."""


# ---- command line --------------------------------------------------------------------------------------------------


def parse_preset(words: list[str]) -> tuple[str, Preset]:
    """The preset named first (demo if none is) with the options laid over it. Unknown names are refused."""
    name, rest = ("demo", words)
    if words and not words[0].startswith("-"):
        name, rest = words[0], words[1:]
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
    for before, word in pairwise(rest):
        if word in PRESETS and not before.startswith("--"):  # after an option it is that option's value
            raise ConfigError(f"expected the preset before all options: got {word} after {before}")
    rest = [SHORT.get(word, word) for word in rest]
    about = f"{__doc__}\nThe presets are {', '.join(PRESETS)}; these are the defaults of {name}."
    return name, parse(Preset, rest, script=f"train.py {name}", default=PRESETS[name], about=about)


# ---- launch --------------------------------------------------------------------------------------------------------


def join(preset: Preset) -> Launch:
    """This process's place in the launch."""
    if preset.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    rank, local_rank, world_size = (
        int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    with said_once(rank):
        preset.batch.accumulation(world_size)
    here = launch(preset, rank, local_rank, world_size)
    with said_once(rank):
        require_agreement({name: value for name, value in preset.settings().items() if name not in PLACES})
    return here


def prepare_data(preset: Preset, here: Launch) -> Prepared:
    """Rank 0 prepares while the others wait; then all read the same folder."""

    def run() -> Prepared:
        return prepare_cached(preset.data, preset.model.vocab_size)

    prepared = run() if here.world_size == 1 else prepare_once(run, here.rank)
    files = {f"data file {path.name}": f"{path.stat().st_size} bytes" for path in (*prepared.train, *prepared.val)}
    with said_once(here.rank):
        require_agreement(files | {"tokenizer": hashlib.sha256(Path(prepared.tokenizer).read_bytes()).hexdigest()})
    return prepared


def prepare_once(run: Callable[[], Prepared], rank: int) -> Prepared:
    prepared, refusal = None, [None]
    if rank == 0:
        try:
            prepared = run()
        except (DataError, OSError) as error:
            refusal = [error]
    with contact():
        dist.broadcast_object_list(refusal)
    if refusal[0] and rank == 0:
        raise refusal[0]
    if refusal[0]:
        sys.exit(2)  # rank 0 says why
    return prepared or run()


def make_loader(preset: Preset, prepared: Prepared, here: Launch, cursor: dict | None):
    return loaders.open_loader(
        preset.data.loader,
        prepared.train,
        preset.batch.tokens_per_micro_step,
        bos_id=preset.model.bos_id,
        max_segment=preset.model.max_segment,
        rank=here.rank,
        world_size=here.world_size,
        prefetch=preset.data.prefetch,
        vocab_size=preset.model.vocab_size,
        pin_memory=here.device.type == "cuda",
        cursor=cursor,
    )


# ---- the job -------------------------------------------------------------------------------------------------------


class Stages:
    """Seconds a stage, printed as each ends."""

    def __init__(self, show: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._show = show

    @contextmanager
    def stage(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        if self._show:
            print(f"{name}: {self.seconds[name]:.1f} s", flush=True)


def main(words: list[str]) -> None:
    name, preset = parse_preset(words)
    if preset.artifact.container == "lrzip":
        require_lrzip()  # now, not after ten minutes of training
    settings_of(preset.evaluation, preset.model)
    here = join(preset)
    with said_once(here.rank):
        code()  # of the files as they are now: they may be edited while it trains
    out = Path(preset.run.out)
    stages = Stages(here.rank == 0)
    with stages.stage("data"):
        prepared = prepare_data(preset, here)
    with stages.stage("model"):
        model, rung = build_model(preset, here)
        trainer = Trainer(model, preset, here.device, here.world_size, here.compile)
        position = resume(out / CHECKPOINT, trainer) if preset.run.resume else Position()
    if preset.ngram_bias.mode != "none":
        with stages.stage("n-gram tables"):
            model.ngram_bias = ngram_tables(preset, prepared, here)
    log = RunLog(out / LOG) if here.rank == 0 else None
    if log:
        remove_half_written(out / CHECKPOINT)
        for file in (CHECKPOINT, ARTIFACT, CODE) if not preset.run.resume else ():
            if (out / file).exists():
                (out / file).replace(out / f"previous.{file}")  # or it would be taken for this run's
        announce(name, trainer, rung, here, position, log)
        steps, modes = preset.schedule.warmup_steps, len(trainer.loop_modes())
        print(f"compile and warm-up: {steps} step(s) in each of {modes} loop mode(s)", flush=True)
    with stages.stage("compile and warm-up"), make_loader(preset, prepared, here, None) as batches:
        trainer.warm_up(batches)
    if log and (age_s := process_age_s()):
        log.write("ready", process_age_s=age_s)
        print(f"ready {age_s:.1f} s after the start of the process", flush=True)
    with stages.stage("training"), make_loader(preset, prepared, here, position.cursor) as batches:
        position = run_clock(trainer, batches, position, out / CHECKPOINT, log)
    trainer.ema.copy_to(trainer.model)
    if preset.evaluation.illegal_train_on_validation:
        with stages.stage("training on validation (ILLEGAL)"):
            break_the_rules(trainer, prepared, log)
    with stages.stage("calibration"):
        hessians = collect(trainer, prepared, here)
    if here.world_size > 1:  # what follows is rank 0's alone and may take longer than the others would wait
        with contact():
            dist.barrier()
        dist.destroy_process_group()
    if log:
        finish(trainer, prepared, here, position, stages, log, hessians)


def resume(checkpoint: Path, trainer: Trainer) -> Position:
    """Where the checkpoint was written, the same on every rank: folders of several machines may hold different ones."""
    position = load_checkpoint(checkpoint, trainer)
    facts = {f"{name} of the checkpoint": value for name, value in dataclasses.asdict(position).items()}
    with said_once(trainer.rank):
        require_agreement(facts)
    return position


def announce(name: str, trainer: Trainer, rung: str, here: Launch, position: Position, log: RunLog) -> None:
    n_parameters = sum(p.numel() for p in trainer.parameters)
    log.write(
        "start",
        preset=name,
        config=dataclasses.asdict(trainer.preset),
        **environment(here.device),
        attention=f"{rung} {attention_version(rung)}",
        world_size=here.world_size,
        dtype=str(here.dtype),
        compile=here.compile,
        parameters=n_parameters,
        **position_fields(position),
    )
    start = f"resumed at step {position.step}, {position.elapsed_s:.1f} s" if position.step else "from the start"
    print(
        f"{name}: {n_parameters:,} parameters, attention {rung}, {here.world_size} x {here.device.type}, "
        f"{trainer.accumulation} micro-step(s) a step, {start}",
        flush=True,
    )


def build_model(preset: Preset, here: Launch) -> tuple[GPT, str]:
    rung, attend = choose_attention(preset.model.attention, here.device, here.dtype, preset.run.deterministic)
    if rung == "plain" and here.compile:
        raise ConfigError(
            "run.compile expected flash attention, whose segments stay on the GPU: got plain attention "
            f"({here.device.type}, {here.dtype}; --run.compile off)"
        )
    model = GPT(preset.model, seed=preset.run.seed, dtype=here.dtype, fp8=here.fp8).to(here.device)
    model.attend = attend
    return model, rung


def ngram_tables(preset: Preset, prepared: Prepared, here: Launch) -> NgramBias:
    """Every rank counts the same tokens by itself. ConfigError, or ArtifactError where tables will not fit."""
    settings, model = preset.ngram_bias, preset.model
    with said_once(here.rank):
        if model.asymmetric_softcap:
            raise ConfigError(f"ngram_bias.mode {settings.mode} expected one softcap, found model.asymmetric_softcap")
        if settings.at_evaluation == "artifact" and preset.evaluation.method == "phased":
            raise ConfigError("evaluation.method phased expected ngram_bias.at_evaluation drop: got artifact")
        if settings.at_evaluation == "artifact":
            require_storable(settings, model, preset.artifact)
        tokens = first_tokens(prepared.train, model.vocab_size, settings.tokens)
        pieces = (torch.from_numpy(piece.astype(np.int32)) for piece in tokens)
        bias = build(pieces, settings, model.vocab_size, model.bos_id, here.device)
        if settings.at_evaluation == "artifact":
            require_room(bias, model, preset.artifact, len(code()))
    return bias


@cache
def code() -> bytes:
    """The file that is shipped with the artifact, and counts beside it."""
    return bundle(Path(__file__), Path(__file__).with_name("evaluate.py"))


# ---- after the clock -----------------------------------------------------------------------------------------------


def load_held_out(preset: Preset, prepared: Prepared) -> ValidationSet:
    return ValidationSet.load(
        prepared.val,
        prepared.tokenizer,
        vocab_size=preset.model.vocab_size,
        bos_id=preset.model.bos_id,
        max_tokens=preset.data.max_val_tokens,
    )


def break_the_rules(trainer: Trainer, prepared: Prepared, log: RunLog | None) -> None:
    """All ranks train on what will be scored. The log says so."""
    preset = trainer.preset
    said = print if log else lambda line: None
    losses = train_on_validation(trainer.model, load_held_out(preset, prepared).tokens, preset.evaluation, said=said)
    if log:
        log.write("training on validation", illegal=ILLEGAL, losses=losses)


def collect(trainer: Trainer, prepared: Prepared, here: Launch) -> dict[str, Tensor] | None:
    """All ranks sum what the matrices of the averaged weights see."""
    preset, artifact = trainer.preset, trainer.preset.artifact
    trainer.model.eval()
    row, enough = preset.model.max_segment, len(prepared.train) >= here.world_size
    rows = loaders.SequenceLoader(
        prepared.train,
        max(artifact.calibration_tokens // row, 1) * row,
        sequence_length=row,
        rank=here.rank if enough else 0,  # with fewer shards than ranks, all see the same rows
        world_size=here.world_size if enough else 1,
        prefetch=preset.data.prefetch,
        vocab_size=preset.model.vocab_size,
        pin_memory=False,
        cursor=None,
    )
    with rows as batches:
        return calibrate(trainer.model, artifact, batches, preset.run.seed)


def finish(
    trainer: Trainer,
    prepared: Prepared,
    here: Launch,
    position: Position,
    stages: Stages,
    log: RunLog,
    hessians: dict[str, Tensor] | None,
) -> None:
    """Quantise -> write -> score, reload, score -> the tables. The model holds the averaged weights."""
    preset = trainer.preset
    path, illegal = Path(preset.run.out) / ARTIFACT, preset.evaluation.illegal_train_on_validation
    versions = make_artifact(trainer, prepared, path, stages, hessians)
    held_out = load_held_out(preset, prepared)
    bits = score_weights(trainer.model, versions, held_out, preset.evaluation, stages)
    artifact, final, evaluation_s = score_artifact(path, preset, here, held_out, stages)
    method = preset.evaluation.method
    bits[f"after reload, {method}" if METHODS[method].adapts else "after reload"] = final.bits_per_byte
    with stages.stage("yardsticks"):
        yardsticks = baselines(prepared, held_out)
    ledger = byte_ledger(artifact, len(code()), preset.artifact.cap_bytes, prepared.tokenizer)
    log.write(
        "end of run",
        bits_per_byte=bits,
        **({"illegal": ILLEGAL} if illegal else {}),
        notes=final.notes,
        evaluation_seconds=evaluation_s,
        yardsticks=yardsticks,
        model_bytes=ledger.model_bytes,
        code_bytes=ledger.code_bytes,
        fits=ledger.fits,
        seconds=stages.seconds,
        **position_fields(position),
    )
    report(bits, yardsticks, ledger, position, stages, path, prepared.val[0].parent, ILLEGAL if illegal else "")
    for note in final.notes:
        print(note)
    print_shares(preset, position, stages, evaluation_s)


def make_artifact(
    trainer: Trainer, prepared: Prepared, path: Path, stages: Stages, hessians: dict[str, Tensor] | None
) -> dict[str, Quantized | None]:
    """Writes artifact and code. The weights to be scored, by what the table calls them; None: as they are."""
    preset, model = trainer.preset, trainer.model
    if preset.ngram_bias.at_evaluation == "drop":
        model.ngram_bias = None
    with stages.stage("quantise"):
        quantized, _, notes = quantize(model.state_dict(), preset.artifact, hessians)
    for note in notes:
        print(note)
    versions, settings = {"before quantisation": None}, preset.artifact
    if settings.target_bytes:
        versions["with the clips given"] = quantized
        with stages.stage("fill"):
            quantized, settings = fill_up(trainer, prepared, hessians)
    with stages.stage("write"):
        tables, illegal = model.ngram_bias, preset.evaluation.illegal_train_on_validation
        write_artifact(path, quantized, preset.model, prepared.tokenizer, settings, illegal, tables, len(code()))
        write_atomically(path.with_name(CODE), lambda file: file.write(code()))
    return versions | {"after quantisation": quantized}


def score_weights(
    model: GPT, versions: dict[str, Quantized | None], held_out: ValidationSet, config: EvalConfig, stages: Stages
) -> dict[str, float]:
    """Bits per byte of each, in turn; plain where the run's method would adapt them."""
    adapts = METHODS[config.method].adapts
    frozen = dataclasses.replace(config, method="plain", variant="", set=()) if adapts else config
    bits = {}
    for name, weights in versions.items():
        if weights is not None:
            set_weights(model, weights)
        with stages.stage(f"score {name}"):
            bits[name] = evaluate_model(model, held_out, frozen).bits_per_byte
    return bits


def score_artifact(
    path: Path, preset: Preset, here: Launch, held_out: ValidationSet, stages: Stages
) -> tuple[Container, Score, dict[str, float]]:
    """The file as evaluate.py would score it, and the seconds of each part of that."""
    clock = Clock(preset.evaluation.budget_s)
    with stages.stage("reload"):
        artifact = read_artifact(path)
        model, _ = load_model(artifact, here.device, here.dtype, attention=preset.model.attention)
    with stages.stage("score after reload"):
        final = evaluate_model(model, held_out, preset.evaluation, clock=clock)
    return artifact, final, clock.seconds


def print_shares(preset: Preset, position: Position, stages: Stages, evaluation_s: dict[str, float]) -> None:
    """Of the two budgets."""
    beside = ("n-gram tables", "training on validation (ILLEGAL)", "calibration")
    outside = sum(stages.seconds.get(stage, 0.0) for stage in beside)
    tables = "n-gram tables, " if "n-gram tables" in stages.seconds else ""
    print_share(f"{tables}training and calibration", position.elapsed_s + outside, preset.schedule.budget_s)
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in evaluation_s.items() if seconds >= 0.05)
    print_share(f"evaluation ({parts})", sum(evaluation_s.values()), preset.evaluation.budget_s)


def print_share(what: str, seconds: float, budget_s: float) -> None:
    print(f"{what}: {seconds:.1f} s of {budget_s:.0f} s{'' if seconds <= budget_s else ': OVER THE BUDGET'}")


def fill_up(
    trainer: Trainer, prepared: Prepared, hessians: dict[str, Tensor] | None
) -> tuple[Quantized, ArtifactConfig]:
    """The weights with the finest clip for which they and the code come to at most `target_bytes`."""
    preset = trainer.preset
    target = preset.artifact.target_bytes

    def size_of(quantization: Quantization, settings: ArtifactConfig) -> int:
        illegal, tables = preset.evaluation.illegal_train_on_validation, trainer.model.ngram_bias
        return len(pack(quantization.tensors, preset.model, prepared.tokenizer, settings, illegal, tables))

    found = fill(trainer.model.state_dict(), preset.artifact, hessians, size_of, target - len(code()))
    factor = found.config.mlp_clip / preset.artifact.mlp_clip
    print(f"clips x {factor:.4f}: {found.size + len(code()):,} bytes of model and code, {target:,} wanted")
    return found.quantization.tensors, found.config


def baselines(prepared: Prepared, held_out: ValidationSet) -> dict[str, float]:
    """Bits per byte that far simpler means reach: the unigram and the compressors, on the first YARDSTICK_TOKENS.

    The unigram's counts are those of the first training shards up to as many tokens.
    """
    counts = count_tokens(prepared.train, prepared.vocab_size, YARDSTICK_TOKENS)
    tokens, n_bytes = held_out.tokens[:YARDSTICK_TOKENS], held_out.byte_counts[:YARDSTICK_TOKENS].sum(dtype=np.int64)
    text = tokenizers.decode_documents(tokenizers.load(prepared.tokenizer, prepared.vocab_size), tokens)
    unigram = token_unigram_bits_per_byte(counts, tokens[1:], float(n_bytes))
    # The score's bytes are more than the decoded text's where CaseOps counts the white space that a token stands for.
    compressors = {name: bits * len(text) / float(n_bytes) for name, bits in compressor_bits_per_byte(text).items()}
    return {"token unigram": unigram} | compressors


def report(bits, yardsticks, ledger, position: Position, stages: Stages, path: Path, data: Path, warning: str) -> None:
    console = Console()
    scores = Table("bits per byte", "", title="Score on the held-out text", caption=warning or None)
    for name, value in (bits | yardsticks).items():
        scores.add_row(name, f"{value:.4f}")
    size = Table("stream", "values", "bits", "entropy B", "bytes", title="Bytes")
    for row in table_rows(ledger):
        size.add_row(*row)
    ms = 1e3 * position.elapsed_s / position.step
    run = Table("stage", "seconds", title=f"{position.step} steps, {ms:.1f} ms/step")
    for name, seconds in stages.seconds.items():
        run.add_row(name, f"{seconds:.1f}")
    for table in (run, size, scores):
        console.print(table)
    print(f"artifact: {path}; to score it again: evaluate.py {path} --data {data}")
    print(f"code: {path.with_name(CODE)}; by itself: {CODE} evaluate {path.name} --data FOLDER, {CODE} train PRESET")
    if "with the clips given" in bits:
        gained = bits["with the clips given"] - bits["after quantisation"]
        print(f"filling up to the target gained {gained:.5f} bits per byte")
    if not ledger.fits:
        print(
            f"OVER THE CAP: expected at most {ledger.cap_bytes:,} bytes of model and code, found {ledger.total_bytes:,}"
        )


def command(words: list[str]) -> int:
    """`main` with bad input as one line and exit status 2, and a run that cannot go on as one line and 1."""
    try:
        return guarded("train.py", main, words, ArtifactError, ConfigError)
    except TrainingStopped as stopped:
        print(f"train.py: {stopped}", file=sys.stderr)
        return 1


def terminate(*_: object) -> None:
    """What a launcher asks of the ranks that are left: an exception, so that no file stays half-written."""
    raise TrainingStopped("terminated")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    try:
        status = command(sys.argv[1:])
    except SystemExit as ended:  # --help, or a refusal that rank 0 words
        status = ended.code or 0
    except BaseException:  # a fault of the program
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    if dist.is_initialized():  # the group has lost a rank, or loses this one: its teardown would wait
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
