"""The scorer equals brute force: for every target, one forward over the whole stream before it, and the definitions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from configs import REFERENCE
from numerics import SCORE_NATS

from niblick.evaluation.hints import Hints
from niblick.evaluation.score import pack, score, token_nll
from niblick.evaluation.windows import plain_windows, sliding_windows
from niblick.model.config import ConfigError, GPTConfig
from niblick.model.gpt import GPT

DOCUMENTS = GPTConfig(
    vocab_size=64, num_layers=4, model_dim=128, num_heads=4, num_kv_heads=2, mlp_hidden=256, max_segment=8,
    xsa_last_layers=4, loop_start=1, loop_end=2, loop_extra_passes=1, parallel_start=3, norm_dropout_quantile=0.9,
    **REFERENCE,
)  # fmt: skip
ROWS = replace(DOCUMENTS, attention_span="rows", smear="channel", rope_positions_bf16=True)
CONFIGS = {
    "documents": DOCUMENTS,
    "documents, smear across": replace(DOCUMENTS, smear_bos_mask=False),
    "rows": ROWS,
    "rows, smear gate": replace(ROWS, smear="window"),
    "two softcaps": replace(DOCUMENTS, asymmetric_softcap=True),
}
N = 41
WINDOWS = {
    "plain": plain_windows(N - 1, 8),
    "plain, ragged, beyond max_segment": plain_windows(N - 1, 11),
    "sliding": sliding_windows(N - 1, 8, 2),
    "sliding, ragged": sliding_windows(N - 1, 11, 4),
}


def make_model(config: GPTConfig) -> GPT:
    """A model in which nothing is zero: each mechanism moves the score."""
    model, generator = GPT(config), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def make_stream() -> tuple[np.ndarray, np.ndarray]:
    """Tokens with documents of many lengths, one of them empty, and bytes per token."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(2, 64, N).astype(np.uint16)
    tokens[[0, 6, 7, 20, 33]] = 1
    return tokens, generator.integers(0, 9, N).astype(np.int16)


def make_hints(tokens: np.ndarray) -> Hints:
    """No hint, a right one and a wrong one in turn, of several strengths."""
    hints = np.where(np.arange(N) % 3 == 1, tokens, np.where(np.arange(N) % 3 == 2, 5, -1)).astype(np.int64)
    return Hints(hints, np.linspace(0.5, 3, N, dtype=np.float32))


def segments(ids: np.ndarray, window_start: int, config: GPTConfig) -> list[int]:
    """cu_seqlens of the stream `ids` as the definition says, for a target in the window."""
    cuts, start = [0], -1
    for i in range(window_start, len(ids)):
        at_bos = config.attention_span == "documents" and ids[i] == config.bos_id
        if i == window_start or at_bos or i - start == config.max_segment:
            start = i
            cuts.append(i)
    return [*cuts, len(ids)]


@torch.no_grad()
def brute_force(model: GPT, tokens: np.ndarray, windows, hints: Hints | None = None) -> torch.Tensor:
    """Negative log-likelihood of every target in float64, from the looped model's logits over all tokens before it."""
    nll = torch.full((len(tokens),), float("nan"), dtype=torch.float64)
    for window in windows:
        for row in range(window.first_scored, window.end):
            ids = tokens[: row + 1]
            cu_seqlens = torch.tensor(segments(ids, window.start, model.config), dtype=torch.int32)
            logits = model.head(model.hidden(torch.from_numpy(ids.astype(np.int64)), cu_seqlens))[-1].double()
            p = torch.softmax(softcapped(model, logits), dim=0)
            target = int(tokens[row + 1])
            if hints is not None and hints.tokens[row + 1] >= 0:
                p[hints.tokens[row + 1]] *= float(np.exp(np.float64(hints.betas[row + 1])))
                p /= p.sum()
            assert torch.isnan(nll[row + 1])
            nll[row + 1] = -p[target].log()
    return nll[1:]


def softcapped(model: GPT, logits: torch.Tensor) -> torch.Tensor:
    if not model.config.asymmetric_softcap:
        return 30 * torch.tanh(logits / 30)
    positive, negative = model.softcap_positive.double(), model.softcap_negative.double()
    return torch.where(logits > 0, positive * torch.tanh(logits / positive), negative * torch.tanh(logits / negative))


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equal_to_brute_force(config, windows):
    model = make_model(config).eval()
    tokens, byte_counts = make_stream()
    expected = brute_force(model, tokens, windows)
    found = token_nll(model, pack(tokens, windows, config), tokens)
    assert found.dtype == torch.float32 and (found - expected).abs().max() < SCORE_NATS
    result = score(model, tokens, byte_counts, windows, tokens_per_batch=20)
    assert abs(result.nats_per_token - expected.mean().item()) < SCORE_NATS
    assert (result.n_targets, result.n_bytes) == (N - 1, int(byte_counts[1:].sum()))
    assert result.bits_per_byte == result.nll / np.log(2) / result.n_bytes


def test_tilt_equals_brute_force():
    tokens, byte_counts = make_stream()
    model, windows, hints = make_model(DOCUMENTS).eval(), WINDOWS["sliding, ragged"], make_hints(tokens)
    expected = brute_force(model, tokens, windows, hints)
    assert (expected - brute_force(model, tokens, windows)).abs().max() > 0.1, "hints that change nothing test nothing"
    found = token_nll(model, pack(tokens, windows, DOCUMENTS), tokens, hints)
    assert (found - expected).abs().max() < SCORE_NATS
    result = score(model, tokens, byte_counts, windows, tokens_per_batch=1, hints=hints)
    assert abs(result.nats_per_token - expected.mean().item()) < SCORE_NATS


def test_a_model_in_training_is_scored_in_eval_mode_and_goes_on_training():
    tokens, byte_counts = make_stream()
    model = make_model(DOCUMENTS)
    seen: list[tuple[int, int]] = []
    options = {"tokens_per_batch": 16, "progress": lambda done, total: seen.append((done, total))}
    training = score(model.train(), tokens, byte_counts, WINDOWS["plain"], **options)
    assert model.training
    assert training.nll == score(model.eval(), tokens, byte_counts, WINDOWS["plain"], tokens_per_batch=16).nll
    assert not model.training
    assert seen == [(done, N - 1) for done in (16, 32, 40)]


def test_what_cannot_be_scored_is_refused():
    tokens, byte_counts = make_stream()
    with pytest.raises(ConfigError, match="expected at least one target, found none in 41 tokens"):
        score(make_model(DOCUMENTS), tokens, byte_counts, [], tokens_per_batch=16)
    model = make_model(CONFIGS["two softcaps"])
    with pytest.raises(ConfigError, match="expected one softcap"):
        score(model, tokens, byte_counts, WINDOWS["plain"], tokens_per_batch=16, hints=make_hints(tokens))
    model = make_model(replace(DOCUMENTS, softcap=50.0))
    with pytest.raises(ConfigError, match=r"expected a softcap of at most 37\.92: got 50\.0"):
        score(model, tokens, byte_counts, WINDOWS["plain"], tokens_per_batch=16, hints=make_hints(tokens))
    assert score(model, tokens, byte_counts, WINDOWS["plain"], tokens_per_batch=16).nll > 0
