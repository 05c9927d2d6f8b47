"""Audit a way of scoring: tests T1 to T16 of the legality of a bits-per-byte score.

    python -m niblick.evaluation.audit plain|sliding|score-first|phased [--tilt] [--data FOLDER]
    python -m niblick.evaluation.audit FILE.py:NAME --vocab-size V

A small random model is scored; what is tested is the method. NAME in FILE.py is any scorer, as `audit_protocol`
describes it; from Python: `check(scorer, vocab_size=V)`. Exit status 0: nothing found; 1: refuted; 2: bad input.
"""

import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tyro

from niblick.data import tokenizer as tokenizers
from niblick.data.command_line import guarded, parse
from niblick.data.errors import DataError
from niblick.data.files import write_atomically
from niblick.data.shards import check_ids, find_shards, read_shard
from niblick.evaluation import audit_causal, audit_claims, audit_order
from niblick.evaluation.audit_case import CUTS, SCORE_NATS, Case, make_stream, score
from niblick.evaluation.audit_isolation import isolation
from niblick.evaluation.audit_own import ModelScorer, tiny_model
from niblick.evaluation.audit_phased import PhasedScorer
from niblick.evaluation.audit_protocol import Scorer
from niblick.evaluation.audit_report import Report, run_test
from niblick.evaluation.run import METHODS, settings_of
from niblick.model.config import ConfigError, EvalConfig

TESTS = (
    ("T0", "two calls agree", audit_order.repeatable),
    ("T1", "future perturbation", audit_causal.future_perturbation),
    ("T2", "target swap, total mass", audit_causal.target_swap),
    ("T3", "distribution dump", audit_causal.distribution_dump),
    ("T4", "scores before updates", audit_order.event_order),
    ("T5", "exactly once", audit_order.exactly_once),
    ("T6", "artifact invariance", audit_claims.artifact_invariance),
    ("T7", "files and network", isolation),
    ("T8", "bytes", audit_claims.byte_audit),
    ("T9", "split", audit_claims.split_audit),
    ("T10", "clock", audit_claims.clock),
    ("T11", "cycles between documents", audit_causal.cycles),
    ("T12", "warm-up purity", audit_order.warm_up_purity),
    ("T13", "document isolation", audit_causal.document_isolation),
    ("T14", "levers are live", audit_order.lever_liveness),
    ("T15", "rank invariance", audit_claims.rank_invariance),
    ("T16", "claims and logs", audit_claims.claim_consistency),
)


def check(
    scorer: Scorer,
    tokens: np.ndarray | None = None,
    *,
    vocab_size: int,
    bos_id: int = 1,
    seed: int = 0,
    tolerance: float = SCORE_NATS,
    **options: object,
) -> Report:
    """Test a scorer on a stream (N,), by default one of `make_stream`.

    tolerance: nats by which a score has changed. options: decode, from the ids of a document (n,), BOS included, to the
    bytes of its text, by the tokenizer that is thought right (T8); train_documents, arrays of ids (T9); data, the whole
    stream that tokens are the beginning of (T8, T9); cuts and swaps, how many places T1 and T2 try. T2 calls the scorer
    vocab_size times a place.

    DataError for a stream that does not begin with a document, ids beyond the vocabulary, or losses of another shape.
    """
    if vocab_size < 3:
        raise DataError(f"audit: expected a vocabulary of at least 3 ids, found {vocab_size}")
    tokens = make_stream(vocab_size, bos_id=bos_id, seed=seed) if tokens is None else np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui" or len(tokens) < 3:
        raise DataError(f"audit: expected at least 3 tokens, 1-D integers, found {tokens.shape} {tokens.dtype}")
    if tokens[0] != bos_id:
        raise DataError(f"audit: expected a stream that begins with a document (BOS, id {bos_id}), found {tokens[0]}")
    if tokens.min() < 0:
        raise DataError(f"audit: expected ids from 0 on, found {tokens.min()}")
    if not 0 <= tolerance < np.inf:
        raise DataError(f"audit: expected a tolerance of 0 nats or more, found {tolerance}")
    check_ids(tokens, vocab_size, "audit")
    losses = score(scorer, tokens)
    log = getattr(scorer, "log", None)
    case = Case(scorer, tokens, vocab_size, bos_id, losses, log, seed=seed, tolerance=tolerance, **options)
    return Report([run_test(test, title, function, case) for test, title, function in TESTS])


SCRIPT = "niblick.evaluation.audit"


@dataclass(frozen=True)
class Arguments:
    method: tyro.conf.Positional[str]
    """plain, sliding, score-first, phased, or FILE.py:NAME."""
    variant: str = ""
    """Published settings of an adapting method; its chunks are made small."""
    set: tuple[str, ...] = ()
    """Settings of an adapting method, laid over those."""
    tilt: bool = False
    """With n-gram hints."""
    data: Path | None = None
    """Folder of validation shards (and training shards) with a tokenizer: the beginning of their stream is scored, and
    the bytes and the split of all of it are tested. Default: a stream made for the purpose."""
    vocab_size: int = 64
    """Of the stream that is made without --data."""
    n_tokens: int = 96
    """Length of the stream that is scored. What a scorer does only beyond it is not seen."""
    sequence_length: int = 16
    """Tokens of a window, of this package's own methods."""
    stride: int = 4
    """Targets that each window of an overlapping method adds."""
    cuts: int = CUTS
    """Places at which the future is changed, drawn; all where the stream has no more. Each takes up to five calls of
    the scorer: 16 are quicker for a method that adapts."""
    swaps: int = 6
    """Targets that are swapped, each for the whole vocabulary, drawn."""
    tolerance: float = SCORE_NATS
    """Nats by which a score must move to have changed: what float32 sums of another length may differ by is below
    1e-5."""
    seed: int = 0
    """Of the stream that is made, of the model, and of what is changed where: another seed tries other places."""
    out: Path | None = None
    """Also write the report there, as JSON."""


LEAST = {"vocab_size": 3, "n_tokens": 3, "cuts": 1, "swaps": 1, "tolerance": 0.0, "seed": 0}


def main(words: list[str]) -> int:
    arguments = parse(Arguments, words, script=SCRIPT, about=__doc__)
    for name, least in LEAST.items():
        if not least <= getattr(arguments, name) < 2**32:  # the first false for a nan, too
            option, found = name.replace("_", "-"), getattr(arguments, name)
            raise DataError(f"--{option}: expected {least} or more, below 2^32, found {found}")
    if arguments.data and not arguments.data.is_dir():
        raise DataError(f"--data: expected a folder, found none at {arguments.data}")
    if arguments.out and not arguments.out.parent.is_dir():
        raise DataError(f"--out: expected a folder {arguments.out.parent} to write into, found none")
    tokens, processor, options = _data(arguments)
    vocab_size = processor.vocab_size() if processor else arguments.vocab_size
    is_foreign = ":" in arguments.method
    scorer = foreign(arguments.method) if is_foreign else _own(arguments, vocab_size, processor)
    options |= {name: getattr(arguments, name) for name in ("seed", "cuts", "swaps", "tolerance")}
    with _run_by(arguments.method.rpartition(":")[0]) if is_foreign else nullcontext():
        report = check(scorer, tokens, vocab_size=vocab_size, **options)
    print(report.text())
    if arguments.out:
        write_atomically(arguments.out, lambda file: file.write(report.json().encode() + b"\n"))
    return 1 if report.refuted else 0


def _data(arguments: Arguments):
    """The stream, the tokenizer where there is one, and what `check` makes of them."""
    if arguments.data is None:
        return make_stream(arguments.vocab_size, n=arguments.n_tokens, seed=arguments.seed), None, {}
    processor = tokenizers.load(tokenizers.find(arguments.data))
    stream = np.concatenate([read_shard(path) for path in find_shards(arguments.data, "val")])
    check_ids(stream, processor.vocab_size(), arguments.data)
    # With case operators a token's bytes are not those of the decoded text (data/sidecar.py), and T8 would cry wolf.
    decode = None if tokenizers.has_case_operators(processor) else partial(tokenizers.decode_documents, processor)
    options = {"decode": decode, "data": stream}
    if any(arguments.data.glob("*_train_*.bin")):
        shards = map(read_shard, find_shards(arguments.data, "train"))
        options["train_documents"] = audit_claims.documents(shards, tokenizers.BOS)
    return stream[: arguments.n_tokens], processor, options


def _own(arguments: Arguments, vocab_size: int, processor) -> ModelScorer:
    if arguments.method not in METHODS:
        raise DataError(f"expected a method {', '.join(METHODS)} or FILE.py:NAME, found {arguments.method!r}")
    counted = processor and not tokenizers.has_case_operators(processor)
    table = tokenizers.ByteTable.of(processor) if counted else None
    config = EvalConfig(
        method=arguments.method,
        variant=arguments.variant,
        set=METHODS[arguments.method].small + arguments.set,
        sequence_length=arguments.sequence_length,
        stride=arguments.stride,
        tokens_per_batch=64,
    )
    model, tilt = tiny_model(vocab_size, seed=arguments.seed), "B" if arguments.tilt else None
    if arguments.method == "phased":
        return PhasedScorer(model, settings_of(config), tilt=tilt, table=table)
    return ModelScorer(model, config, tilt=tilt, table=table)


def foreign(where: str) -> Scorer:
    """The scorer that FILE.py:NAME names. DataError where it is none."""
    path, _, name = where.rpartition(":")
    if not Path(path).is_file():
        raise DataError(f"{path}: expected a Python file, found none")
    spec = importlib.util.spec_from_file_location("audited", path)
    if spec is None or spec.loader is None:
        raise DataError(f"{path}: expected a Python file, found another kind")
    module = importlib.util.module_from_spec(spec)
    sys.modules["audited"] = module
    with _run_by(path):
        spec.loader.exec_module(module)
        scorer = getattr(module, name, None)
    if not callable(scorer):
        raise DataError(f"{path}: expected a scorer {name!r}, a callable, found {type(scorer).__name__}")
    return scorer


@contextmanager
def _run_by(path: str) -> Iterator[None]:
    """Whatever the code of `path` raises or returns that cannot be audited is bad input. So is its exit: it would pass
    for an audit that found nothing."""
    try:
        yield
    except (DataError, KeyboardInterrupt):
        raise
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame.lineno for frame in frames if Path(frame.filename).absolute() == Path(path).absolute()]
        place = f"{path}, line {own[-1]}" if own else path
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(f"{place}: expected a scorer that can be called, found {said}") from None


def command(words: list[str]) -> int:
    """`main`, with bad input as one line and exit status 2."""
    status = 0

    def run(words: list[str]) -> None:
        nonlocal status
        status = main(words)

    return guarded(SCRIPT, run, words, ConfigError) or status


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
