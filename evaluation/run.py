"""One evaluation: a model, held-out tokens, a method, and the score."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from niblick.data.command_line import nearest, parse
from niblick.evaluation.clock import Clock
from niblick.evaluation.hints import Hints, token_hints
from niblick.evaluation.phased import phased_score
from niblick.evaluation.phased_config import PHASED, PHASED_SMALL, PhasedConfig, check
from niblick.evaluation.score import Progress, Record, Score, score
from niblick.evaluation.score_first import SCORE_FIRST, score_first
from niblick.evaluation.validation import ValidationSet
from niblick.evaluation.windows import Window, plain_windows, rows_kept, sliding_windows
from niblick.model.config import ConfigError, EvalConfig, GPTConfig, TiltVersion
from niblick.model.gpt import GPT

WINDOWS = ("sequence_length", "tail", "tokens_per_batch")
REHEARSED_DOCUMENT = 600
RAGGED = 7
"""Tokens beyond whole windows: kernels are compiled apart for counts that are no multiples of 16."""


class EvaluationMethod(NamedTuple):
    """score(model, data, config, settings, *, hints, progress, record, clock) -> Score. variants: its settings by name,
    the default first; empty where EvalConfig says everything. rehearsal(config, settings): tokens of a stream whose
    evaluation launches all that the real one will; None: the method sees to that itself. adapts: it trains the model,
    and puts it back. small: settings with which it does all that it ever does within a hundred tokens, for the audit.
    reads: what it takes from EvalConfig, the method's own settings apart. check(model's config, settings): ConfigError
    for a model that it cannot score."""

    score: Callable[..., Score]
    rehearsal: Callable[[EvalConfig, object], int] | None
    variants: Mapping[str, object] = MappingProxyType({})
    adapts: bool = False
    small: tuple[str, ...] = ()
    reads: tuple[str, ...] = WINDOWS
    check: Callable[[GPTConfig, object], None] = lambda model, settings: None


def _score_windows(model: GPT, data: ValidationSet, config: EvalConfig, settings: None, **options: object) -> Score:
    windows = windows_of(config, len(data.tokens))
    return score(model, data.tokens, data.byte_counts, windows, tokens_per_batch=config.tokens_per_batch, **options)


def _phased(model: GPT, data: ValidationSet, config: EvalConfig, settings: PhasedConfig, **options: object) -> Score:
    return phased_score(model, data, settings, **options)


METHODS = {
    "plain": EvaluationMethod(_score_windows, lambda config, _: config.tokens_per_batch),
    "sliding": EvaluationMethod(
        _score_windows,
        lambda config, _: config.sequence_length + config.stride * (config.tokens_per_batch // config.sequence_length),
        reads=(*WINDOWS, "stride"),
    ),
    "score-first": EvaluationMethod(
        score_first,
        lambda config, settings: settings.chunk_rows + config.sequence_length,
        SCORE_FIRST,
        adapts=True,
        small=("chunk_rows=32", "learning_rate=0.1"),
        reads=(*WINDOWS, "stride"),
    ),
    "phased": EvaluationMethod(_phased, None, PHASED, adapts=True, small=PHASED_SMALL, reads=(), check=check),
}
"""A method is an entry here, and its name one of `model.config.Method`."""


def evaluate_model(
    model: GPT,
    data: ValidationSet,
    config: EvalConfig,
    *,
    tilt: TiltVersion | None = None,
    progress: Progress | None = None,
    record: Record | None = None,
    clock: Clock | None = None,
) -> Score:
    """Score every target once; the seconds are those of everything done here, the hints of `tilt` included. The model
    is afterwards what it was before.

    tilt: the version of the n-gram hints, made on the model's device; None: no hints. clock: is told what the time is
    spent on, and may end the evaluation early.

    `progress` and `record` are called as in `score`. ConfigError for sizes that leave no target, a stream that hints
    refuse, settings that the method lacks, or packed weights where they are to be trained.
    """
    began, clock = time.perf_counter(), clock or Clock(config.budget_s)
    settings, method = settings_of(config), METHODS[config.method]
    if method.rehearsal and _compiles(model):
        with clock.part("compile"):
            rehearse(model, config, tilted=tilt is not None)
    hints = None
    if tilt:
        with clock.part("precompute"):
            hints = token_hints(data.tokens, tilt, device=model.embedding.device)
    with clock.part("score"):
        result = method.score(model, data, config, settings, hints=hints, progress=progress, record=record, clock=clock)
    return dataclasses.replace(result, seconds=time.perf_counter() - began)


def settings_of(config: EvalConfig, model: GPTConfig | None = None) -> object:
    """The method's own settings: the variant named, with config.set laid over it; None for a method that has none.

    ConfigError or DataError for a method, variant or setting that there is not, or that cannot score such a model.
    """
    settings = _settings(config)
    if model:
        METHODS[config.method].check(model, settings)
    return settings


def variant_of(config: EvalConfig) -> str:
    """The name of the settings that are the method's own, before config.set; "" for a method that has none."""
    return config.variant or next(iter(METHODS[config.method].variants), "")


def _settings(config: EvalConfig) -> object:
    if config.method not in METHODS:
        raise ConfigError(f"evaluation.method: expected one of {', '.join(METHODS)}, found {config.method}")
    variants = METHODS[config.method].variants
    if not variants:
        if config.variant or config.set:
            found = config.variant or config.set[0]
            raise ConfigError(f"evaluation.method {config.method}: expected no variant or settings, found {found}")
        return None
    name = variant_of(config)
    if name not in variants:
        raise ConfigError(
            f"evaluation.variant: expected one of {', '.join(variants)} for {config.method}, found {name}"
            f"{nearest(name, variants)}"
        )
    settings, words = variants[name], [f"--{word}" for word in config.set]
    return parse(type(settings), words, script=config.method, default=settings) if words else settings


def windows_of(config: EvalConfig, n_tokens: int) -> list[Window]:
    """The method's windows for a stream of n_tokens."""
    n_rows = rows_kept(n_tokens, config.sequence_length, config.tail)
    if config.method == "plain":
        return plain_windows(n_rows, config.sequence_length)
    return sliding_windows(n_rows, config.sequence_length, config.stride)


def _compiles(model: GPT) -> bool:
    return model.embedding.is_cuda


def rehearse(model: GPT, config: EvalConfig, *, tilted: bool = False) -> None:
    """The method itself on a short stream of random ids, so that what compiles when it is first used has compiled.

    No token of the validation stream is touched, and no parameter is changed afterwards.
    """
    settings, method = settings_of(config), METHODS[config.method]
    n, vocabulary = method.rehearsal(config, settings) + RAGGED, model.config.vocab_size
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, vocabulary, n)
    tokens[::REHEARSED_DOCUMENT] = model.config.bos_id
    hints = Hints(generator.integers(-1, vocabulary, n), np.ones(n, np.float32)) if tilted else None
    stream = ValidationSet(tokens, np.zeros(n, np.int16))
    method.score(model, stream, config, settings, hints=hints, progress=None, record=None, clock=Clock())
