"""Score-first SGD equals a brute-force scorer and trainer, on any number of ranks, and ends where it diverges."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from configs import REFERENCE
from numerics import RANK_NATS, SCORE_NATS
from ranks import one_thread, run_ranks  # noqa: F401

from niblick.evaluation import score as score_module
from niblick.evaluation import score_first as score_first_module
from niblick.evaluation.clock import Clock
from niblick.evaluation.hints import Hints
from niblick.evaluation.run import evaluate_model, rehearse, settings_of
from niblick.evaluation.score import score
from niblick.evaluation.score_first import SCORE_FIRST, ScoreFirstConfig, chunks_of, score_first
from niblick.evaluation.validation import ValidationSet
from niblick.evaluation.windows import Window, sliding_windows
from niblick.kernels.ngram_tilt import ngram_tilt_ref
from niblick.kernels.softcapped_ce import softcapped_ce_ref
from niblick.model.config import ConfigError, EvalConfig, GPTConfig
from niblick.model.gpt import GPT

ROWS = GPTConfig(
    vocab_size=32, num_layers=3, model_dim=128, num_heads=4, num_kv_heads=2, mlp_hidden=128, max_segment=8,
    attention_span="rows", smear="none", gate="none", loop_start=1, loop_end=1, loop_extra_passes=1, parallel="single",
    parallel_start=2, **REFERENCE,
)  # fmt: skip
"""The published systems' kind."""
DOCUMENTS = replace(ROWS, attention_span="documents", smear="window", gate="sparse", parallel="cross_lane")
TWO_CAPS = replace(DOCUMENTS, asymmetric_softcap=True)
N, L, STRIDE, CHUNK = 55, 8, 2, 16
EVALUATION = EvalConfig(method="score-first", sequence_length=L, stride=STRIDE, tokens_per_batch=20)
SETTINGS = ScoreFirstConfig(learning_rate=0.3, chunk_rows=CHUNK, stop_above=1e9)


@pytest.fixture(autouse=True)
def _references(monkeypatch):
    """The kernels, interpreted, take a second a call, and have tests of their own."""
    monkeypatch.setattr(score_module, "softcapped_ce", softcapped_ce_ref)
    monkeypatch.setattr(score_module, "ngram_tilt", ngram_tilt_ref)


def make_model(config: GPTConfig = ROWS) -> GPT:
    model, generator = GPT(config), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def make_data() -> ValidationSet:
    generator = np.random.default_rng(0)
    tokens = generator.integers(2, 32, N).astype(np.uint16)
    tokens[[0, 6, 7, 20, 33]] = 1
    return ValidationSet(tokens, generator.integers(0, 9, N).astype(np.int16))


def make_hints(tokens: np.ndarray) -> Hints:
    hints = np.where(np.arange(N) % 3 == 1, tokens, np.where(np.arange(N) % 3 == 2, 5, -1)).astype(np.int64)
    return Hints(hints, np.linspace(0.5, 3, N, dtype=np.float32))


class Recorder:
    """Losses by target, and the events in order."""

    def __init__(self, n: int = N) -> None:
        self.losses, self.events = np.full(n, np.nan), []

    def __call__(self, targets, losses):
        assert np.isnan(self.losses[targets]).all(), "scored twice"
        self.losses[targets] = losses
        self.events.append(("scored", targets.tolist()))

    def updated(self, targets):
        assert not np.isnan(self.losses[targets]).any(), "trained on before it was scored"
        self.events.append(("updated", targets.tolist()))


# ---- the definitions -------------------------------------------------------------------------------------------------


def logits_of(model: GPT, tokens: np.ndarray, start: int, end: int) -> torch.Tensor:
    """Capped logits of rows start .. end - 1, read from a forward over the stream up to there, attention cut where the
    window begins and then where the model cuts it."""
    c, cuts, last = model.config, [0], start
    for i in range(start, end):
        if i == start or (c.attention_span == "documents" and tokens[i] == c.bos_id) or i - last == c.max_segment:
            cuts, last = [*cuts, i], i
    ids = torch.from_numpy(tokens[:end].astype(np.int64))
    z = model.head(model.hidden(ids, torch.tensor([*cuts, end], dtype=torch.int32)))[start:]
    if c.asymmetric_softcap:
        p, q = model.softcap_positive, model.softcap_negative
        return torch.where(z > 0, p * torch.tanh(z / p), q * torch.tanh(z / q))
    return 30 * torch.tanh(z / 30)


def row_loss(model: GPT, tokens: np.ndarray, start: int, row: int, hints: Hints | None) -> float:
    p = torch.softmax(logits_of(model, tokens, start, row + 1)[-1].detach().double(), dim=0)
    if hints is not None and hints.tokens[row + 1] >= 0:
        p[hints.tokens[row + 1]] *= math.exp(hints.betas[row + 1])
        p /= p.sum()
    return -p[int(tokens[row + 1])].log().item()


def brute_force(model: GPT, tokens: np.ndarray, s: ScoreFirstConfig, hints: Hints | None = None) -> np.ndarray:
    """The loss of every target; the model is left trained."""
    T, losses = len(tokens) - 1, np.full(len(tokens), np.nan)
    M, parameters = math.ceil(T / s.chunk_rows), list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    for c in range(M):
        for w in range(0, max(T - L + STRIDE, 1), STRIDE):
            rows = range(w if w == 0 else w + L - STRIDE, min(w + L, T))
            if rows[0] // s.chunk_rows == c:
                for row in rows:
                    losses[row + 1] = row_loss(model, tokens, w, row, hints)
        if c == M - 1:
            break
        rate = s.learning_rate / 2 * (1 + math.cos(math.pi * c / (M - 1)))
        for _ in range(s.epochs):
            first = [c * s.chunk_rows + j * L for j in range(s.chunk_rows // L)]
            each = [
                F.cross_entropy(logits_of(model, tokens, f, f + L), torch.tensor(tokens[f + 1 : f + L + 1].tolist()))
                for f in first
            ]
            gradients = torch.autograd.grad(torch.stack(each).mean(), parameters)
            norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
            for p, g, v in zip(parameters, gradients, velocity, strict=True):
                v.mul_(s.momentum).add_(g * min(1.0, s.clip / (norm + 1e-6)))
                p.data.sub_(rate * v)
    return losses


@pytest.mark.parametrize(
    ("config", "hinted"),
    [(ROWS, False), (ROWS, True), (DOCUMENTS, False), (DOCUMENTS, True), (TWO_CAPS, False)],
    ids=["rows", "rows, tilt", "documents", "documents, tilt", "two softcaps"],
)
def test_equal_to_brute_force(config, hinted):
    data, settings = make_data(), replace(SETTINGS, clip=0.5)
    hints = make_hints(data.tokens) if hinted else None
    trained = make_model(config)
    expected = brute_force(trained, data.tokens, settings, hints)
    model, recorder = make_model(config), Recorder()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    found = score_first(model, data, EVALUATION, settings, hints=hints, record=recorder)
    assert np.abs(recorder.losses - expected)[1:].max() < SCORE_NATS
    assert abs(found.nats_per_token - expected[1:].mean()) < SCORE_NATS
    assert found.n_targets == N - 1 and found.n_bytes == data.byte_counts[1:].sum() and not found.partial
    assert found.notes == ("adaptation: 3 of 4 chunks trained on, the last one never is",)
    frozen = Recorder()
    windows = sliding_windows(N - 1, L, STRIDE)
    score(model, data.tokens, data.byte_counts, windows, tokens_per_batch=50, hints=hints, record=frozen)
    moved = np.abs(frozen.losses - recorder.losses)[1:]
    assert moved[:CHUNK].max() < SCORE_NATS and moved[CHUNK:].max() > 0.05, "what changes nothing tests nothing"
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name]), f"{name} is not what it was"
    assert all(p.grad is None for p in model.parameters()) and not model.training


def test_scores_come_before_steps_and_the_last_chunk_is_never_trained_on():
    class InTraining(Recorder):
        def updated(self, targets):
            assert model.training
            super().updated(targets)

    recorder, model = InTraining(), make_model()
    score_first(model, make_data(), EVALUATION, SETTINGS, record=recorder)
    updates = [targets for kind, targets in recorder.events if kind == "updated"]
    assert len(updates) == 9 and recorder.events[-1][0] == "scored"
    assert updates[::3] == [list(range(c * CHUNK + 1, (c + 1) * CHUNK + 1)) for c in range(3)]


def test_progress_goes_up_to_all_targets():
    seen = []
    score_first(make_model(), make_data(), EVALUATION, SETTINGS, progress=lambda *counts: seen.append(counts))
    assert seen == sorted(seen) and seen[-1] == (N - 1, N - 1) and len({done for done, _ in seen}) == len(seen)


def test_learned_softcaps_move():
    caps = []

    class Watcher(Recorder):
        def updated(self, targets):
            caps.append((model.softcap_positive.item(), model.softcap_negative.item()))

    model = make_model(TWO_CAPS)
    before = model.softcap_positive.item(), model.softcap_negative.item()
    score_first(model, make_data(), EVALUATION, replace(SETTINGS, clip=1e6), record=Watcher())
    assert all(abs(caps[-1][i] - before[i]) > 1e-6 for i in (0, 1)), (before, caps)
    assert (model.softcap_positive.item(), model.softcap_negative.item()) == before


def test_frozen_blocks_stay():
    moved = {}

    class Watcher(Recorder):
        def updated(self, targets):
            moved.update({name: (p - start[name]).abs() for name, p in model.state_dict().items()})

    model = make_model(DOCUMENTS)
    start = {name: p.clone() for name, p in model.state_dict().items()}
    score_first(model, make_data(), EVALUATION, replace(SETTINGS, frozen_blocks=2), record=Watcher())
    for name in ("attn_scale", "mlp_up_bank", "resid_mix", "lane_post"):
        assert moved[name][:2].max() == 0 < moved[name][2:].max(), name
    bank = moved["qo_bank"]  # W_q of three blocks, then W_o of three
    assert bank[[0, 1, 3, 4]].max() == 0 and bank[2].max() > 0 and bank[5].max() > 0
    assert moved["embedding"].max() > 0


def in_a_rank(rank: int, config: GPTConfig) -> tuple:
    score_module.softcapped_ce = softcapped_ce_ref
    settings, mine = replace(SETTINGS, chunk_rows=24), []  # three sequences: the ranks have one and two
    total = score_first(make_model(config), make_data(), EVALUATION, settings, record=lambda t, _: mine.extend(t))
    return total.nll, total.n_targets, total.n_bytes, len(mine)


def test_two_ranks_are_one():
    one = in_a_rank(0, DOCUMENTS)
    for rank in run_ranks(in_a_rank, 2, DOCUMENTS):
        assert abs(rank[0] - one[0]) < RANK_NATS and rank[1:3] == one[1:3]
        assert 0 < rank[3] < one[3], "each rank scores a share"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"learning_rate": 30.0, "stop_above": 0.5}, "stopped at chunk 0 of 4: the adapted model is "),
        ({"learning_rate": 0.3, "stop_above": 0.0, "probe_windows": 2}, "on text new to it"),
    ],
    ids=["blown up", "worse"],
)
def test_divergence_is_detected_and_the_rest_scored_without(settings, reason):
    """After the stop each loss is that of the model as it was given; before it, what was counted stays."""
    data, model = make_data(), make_model()
    recorder, adapted, frozen = Recorder(), Recorder(), Recorder()
    settings = replace(SETTINGS, **settings)
    found = score_first(model, data, EVALUATION, settings, record=recorder)
    assert reason in found.notes[0] and "from there on scored without it" in found.notes[0]
    chunk = int(found.notes[0].split("chunk ")[1].split()[0])
    score_first(model, data, EVALUATION, replace(settings, stop_above=1e9), record=adapted)
    score(model, data.tokens, data.byte_counts, sliding_windows(N - 1, L, STRIDE), tokens_per_batch=20, record=frozen)
    seam = (chunk + 1) * CHUNK + 1
    assert np.array_equal(recorder.losses[1:seam], adapted.losses[1:seam])
    assert np.abs(recorder.losses - frozen.losses)[seam:].max() < SCORE_NATS
    assert found.n_targets == N - 1 and np.isfinite(found.nll)


def test_a_loss_that_is_not_finite_stops_the_adaptation(monkeypatch):
    def spoil(model, packed, *arguments):
        losses = token_nll(model, packed, *arguments)
        return torch.where(torch.from_numpy(packed.targets) == 45, torch.nan, losses)

    token_nll = score_module.token_nll
    monkeypatch.setattr(score_module, "token_nll", spoil)
    found = score_first(make_model(), make_data(), EVALUATION, replace(SETTINGS, probe_windows=1))
    assert "stopped at chunk 2 of 4: its loss is nan" in found.notes[0] and math.isnan(found.nll)


def test_a_probe_that_is_not_finite_is_beyond_every_limit():
    guard = SimpleNamespace(settings=SETTINGS)
    assert "nan nats a token worse" in score_first_module._Adaptation._beyond(guard, math.nan, "here")
    assert score_first_module._Adaptation._beyond(guard, -1.0, "here") == ""


def test_a_gradient_that_is_not_finite_stops_before_its_step(monkeypatch):
    def spoil(model, *arguments):
        gradients(model, *arguments)
        model.embedding.grad[0, 0] = float("nan")

    gradients = score_first_module.mean_gradients
    monkeypatch.setattr(score_first_module, "mean_gradients", spoil)
    found = score_first(make_model(), make_data(), EVALUATION, SETTINGS)
    assert "stopped at chunk 0 of 4: its gradient's norm is nan" in found.notes[0] and np.isfinite(found.nll)


def test_windows_of_chunks():
    windows = sliding_windows(40, 8, 4)
    chunks = chunks_of(windows, 40, 16)
    assert [sum(w.end - w.first_scored for w in chunk) for chunk in chunks] == [16, 16, 8]
    assert [w for chunk in chunks for w in chunk] == windows
    assert chunks_of([Window(0, 40, 0)], 40, 16) == [[Window(0, 40, 0)], [], []]


def test_one_chunk_is_scored_as_it_is():
    data = make_data()
    found = score_first(make_model(), data, EVALUATION, ScoreFirstConfig())
    frozen = evaluate_model(make_model(), data, replace(EVALUATION, method="sliding"))
    assert abs(found.nll - frozen.nll) < SCORE_NATS and found.notes[0].startswith("adaptation: 0 of 1 chunks")


def test_published_variants_and_settings_over_them():
    rates = {name: (s.learning_rate, s.frozen_blocks) for name, s in SCORE_FIRST.items()}
    assert rates == {
        "pr1413": (0.005, 0), "pr1477": (0.005, 0), "pr1514": (0.005, 0), "pr549": (0.002, 0), "pr461": (0.002, 2)
    }  # fmt: skip
    assert all((s.chunk_rows, s.epochs, s.momentum, s.clip) == (32768, 3, 0.9, 1.0) for s in SCORE_FIRST.values())
    assert settings_of(EVALUATION) == SCORE_FIRST["pr1413"]
    laid_over = replace(EVALUATION, variant="pr549", set=("chunk_rows=64", "clip=0.5"))
    assert settings_of(laid_over) == replace(SCORE_FIRST["pr549"], chunk_rows=64, clip=0.5)


def test_what_cannot_be_adapted_is_refused():
    data = make_data()
    model = make_model()
    model.use_packed("kv_bank", list(model.kv_bank.detach()))
    with pytest.raises(ConfigError, match="score-first: expected dense weights, which it trains: got packed ones"):
        evaluate_model(model, data, EVALUATION)
    with pytest.raises(ConfigError, match="epochs must be in 1"):
        ScoreFirstConfig(epochs=0)
    with pytest.raises(ConfigError, match="expected at least one target, found none in 55 tokens"):
        evaluate_model(make_model(), data, replace(EVALUATION, sequence_length=64, tail="drop"))


def test_a_rehearsal_leaves_no_trace():
    model, state = make_model(DOCUMENTS), torch.get_rng_state()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    rehearse(model, replace(EVALUATION, set=("chunk_rows=16",)), tilted=True)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())


def test_a_stop_is_marked_and_leaves_the_model_as_it_was():
    data, model = make_data(), make_model()
    clock, recorder = Clock(), Recorder()

    def interrupt(done, total):
        clock.interrupted = done >= 20

    found = score_first(model, data, EVALUATION, SETTINGS, record=recorder, clock=clock, progress=interrupt)
    assert found.partial == "interrupted" and 20 <= found.n_targets < 30
    assert found.n_targets == np.isfinite(recorder.losses).sum()
    again = score_first(model.requires_grad_(False), data, EVALUATION, SETTINGS)
    assert again.nll == score_first(make_model(), data, EVALUATION, SETTINGS).nll and not again.partial
    assert not any(p.requires_grad for p in model.parameters())
