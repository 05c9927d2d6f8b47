"""Settings of phased test-time training: what is refused, in one line, and what suits a smaller card or model."""

from dataclasses import fields, replace

import numpy as np
import pytest
from numerics import SCORE_NATS
from ranks import one_thread
from test_evaluation_phased import VARIANTS, model, scores, small, stream

from niblick.evaluation.phased import PHASED, PhasedConfig, phased_score
from niblick.evaluation.phased_config import RANGES
from niblick.evaluation.phased_config import check as check_settings
from niblick.evaluation.validation import ValidationSet
from niblick.model.config import ConfigError

__all__ = ["one_thread"]


def test_refuses() -> None:
    tokens = stream()
    with pytest.raises(ConfigError, match="begins with a document"):
        phased_score(model(), ValidationSet(tokens[1:], np.ones(len(tokens) - 1, np.int16)), small("pr1855"))
    with pytest.raises(ConfigError, match=f"sgd_segment must be at most the model's {model().config.max_segment}"):
        phased_score(model(), ValidationSet(tokens, np.ones(len(tokens), np.int16)), small("pr1855", sgd_segment=17))


@pytest.mark.parametrize(
    "wrong",
    [
        {"targets": ()}, {"order": "shortest"}, {"window": 7}, {"prefix": 2}, {"sgd_chunk": 5}, {"sgd_momentum": -1.0},
        {"sgd_lr": -1.0}, {"lr": float("nan")}, {"beta2": 1.0}, {"beta2": 2.0}, {"sgd_clip": 0.0}, {"alpha": -3.0},
        {"short_chunks": ((256, 0),)}, {"short_chunks": ((0, 8),)}, {"eps": 0.0}, {"weight_decay": float("inf")},
        {"tokens_per_forward": 0}, {"phases": -1}, {"seed": -1}, {"diverged": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=rf"phased\.{next(iter(wrong))} must [^\n]*$"):
        replace(PHASED["pr1855"], **wrong)


def test_every_number_has_a_range() -> None:
    numbers = {field.name for field in fields(PhasedConfig) if field.type in (int, float)}
    assert numbers == set(RANGES)


@pytest.mark.parametrize("name", PHASED)
def test_published_settings_suit_a_model_of_short_segments(name: str) -> None:
    """Of segments without a length of their own, which are then as long as the model's."""
    shape = model().config
    check_settings(shape, PHASED[name])
    assert PHASED[name].segment(shape) == shape.max_segment and small("pr1855").segment(shape) == 3


def test_fewer_tokens_a_forward_change_no_score() -> None:
    """Several documents a forward, and one; and steps on all weights in one forward, and one for each row."""
    config, forwards = VARIANTS["pr1855"], []
    tiny = model()
    whole, hidden = scores(tiny, config), tiny.hidden
    for most in (14, 4):
        tiny.hidden = lambda ids, *words, **options: forwards.append(len(ids)) or hidden(ids, *words, **options)
        found = scores(tiny, replace(config, tokens_per_forward=most))
        assert np.abs(found - whole)[1:].max() < SCORE_NATS
        assert max(forwards) <= max(most, config.window)
        forwards.clear()
