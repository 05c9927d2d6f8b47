"""Phased test-time training against its definitions, its order of scores and steps, its ranks, and its ways to fail."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numerics import SCORE_NATS
from phased_reference import BruteForce
from ranks import one_thread, run_ranks

from niblick.evaluation.audit_own import tiny_model
from niblick.evaluation.lora import LoRA
from niblick.evaluation.phased import PHASED, PhasedConfig, phased_score
from niblick.evaluation.validation import ValidationSet

V = 10
SHAPE = {
    "num_layers": 2, "loop_start": 0, "loop_end": 0, "parallel_start": 1, "xsa_last_layers": 1, "model_dim": 16,
    "num_heads": 2, "num_kv_heads": 1, "mlp_hidden": 16, "rope_dims": 4, "gate_window": 4, "smear_window": 4,
}  # fmt: skip
SIZES = {
    "documents": 3, "chunk": 3, "window": 7, "rank": 2, "lr": 0.02, "sgd_lr": 0.05, "sgd_chunk": 8, "sgd_row": 4,
    "sgd_segment": 3,
}  # fmt: skip


def stream() -> np.ndarray:
    """Documents of 1 to 13 targets, among them two of one length; neither in order of length, nor in whole batches."""
    generator = np.random.default_rng(0)
    lengths = (5, 1, 13, 4, 8, 5, 2, 11)
    return np.concatenate([[1, *generator.integers(2, V, n - 1)] for n in lengths] + [[1]]).astype(np.uint16)


def small(name: str, **options) -> PhasedConfig:
    published = PHASED[name]
    sizes = dict(SIZES, prefix=6 if published.phases else 0, alpha=published.alpha and 3.6)
    sizes["weight_decay"] = 10 * published.weight_decay  # so that no decay goes unseen
    if published.short_chunks:
        sizes["short_chunks"] = ((5, 1), (8, 2))
    return replace(published, **(sizes | options))


def model(**options):
    """Channels of a layer's output with a negative scale too: for AdamW a positive one makes no difference."""
    tiny = tiny_model(V, **SHAPE, **options)
    with torch.no_grad():
        tiny.attn_scale[:, ::3] *= -1
        tiny.mlp_scale[:, 1::3] *= -1
    return tiny


def scores(model, config, tokens=None, **options) -> np.ndarray:
    """losses (N,), each target once."""
    tokens = stream() if tokens is None else tokens
    losses = np.full(len(tokens), np.nan)

    def record(targets, values):
        assert np.isnan(losses[targets]).all(), "scored twice"
        losses[targets] = values

    total = phased_score(model, ValidationSet(tokens, np.ones(len(tokens), np.int16)), config, record=record, **options)
    assert total.n_targets == total.n_bytes == len(tokens) - 1
    assert np.isclose(total.nll, losses[1:].sum())
    return losses


def drawn(model, config):
    def draw(number: int):
        lora, found = LoRA(model, config), {}
        lora.draw(config.seed * 1_000_003 + number)
        names = {"m": ["mlp"], "h": ["head"], "n": lora.layout.attention}
        for (slot, what), place in lora.layout.places.items():
            if what in names:
                parts = place.of(lora.master).split(config.rank, dim=1)
                found |= {(slot, name): part.clone() for name, part in zip(names[what], parts, strict=True)}
        return found

    return draw


VARIANTS = {name: small(name) for name in ("pr1530", "pr1610", "pr1626", "pr1787", "pr1855", "pr1953", "pr2014")}
VARIANTS["pr1855 corpus"] = small("pr1855", order="corpus")
# Without phases A is handed on from batch to batch.
VARIANTS["pr1855 without phases"] = small("pr1855", phases=0)
VARIANTS["pr1855 corpus without phases"] = small("pr1855", phases=0, order="corpus")
VARIANTS["pr1626 corpus, one batch"] = small("pr1626", order="corpus", documents=20)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_brute_force(name: str) -> None:
    config, tiny = VARIANTS[name], model()
    found = scores(tiny, config)
    wanted = BruteForce(dict(tiny.named_parameters()), tiny.config, stream(), config, drawn(tiny, config)).losses
    assert np.abs(found - wanted)[1:].max() < SCORE_NATS
    still = scores(tiny, replace(config, lr=0.0, sgd_lr=0.0))
    assert np.abs(still - wanted)[1:].max() > 100 * SCORE_NATS, "an adaptation that changes nothing tests nothing"
