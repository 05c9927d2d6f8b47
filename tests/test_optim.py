"""Muon, AdamW grouping, the average and the schedule against plain statements of their formulas."""

import math
from dataclasses import replace

import pytest
import torch
from configs import REFERENCE
from numerics import assert_close_f32, assert_same_f64
from ranks import one_thread  # noqa: F401

from niblick.kernels.newton_schulz import newton_schulz
from niblick.model.config import OptimConfig, ScheduleConfig
from niblick.model.gpt import BANKS, GPT
from niblick.model.optim import (
    COEFFICIENTS,
    EMA,
    Muon,
    Optimizers,
    adaptive_rescale,
    normalize_rows,
)
from niblick.model.presets import PRESETS
from niblick.model.schedule import lr_factor, momentum, progress

SMALL = replace(
    PRESETS["demo"].model,
    vocab_size=64,
    num_layers=4,
    model_dim=32,
    num_heads=2,
    num_kv_heads=1,
    mlp_hidden=64,
    loop_start=1,
    loop_end=2,
    parallel_start=3,
    smear_window=8,
    gate_window=8,
    **REFERENCE,
)


def naive_newton_schulz(g: torch.Tensor, name: str) -> torch.Tensor:
    """One matrix, float64, loops spelled out."""
    x = g.double()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (math.sqrt(float((x * x).sum())) + 1e-7)
    for a, b, c in COEFFICIENTS[name]:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if tall else x


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 6, 6)])
def test_newton_schulz_is_the_polynomial_of_each_matrix(name: str, shape: tuple[int, ...]) -> None:
    g = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = torch.stack([naive_newton_schulz(one, name) for one in g])
    assert_same_f64(name, newton_schulz(g, COEFFICIENTS[name]), want)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_newton_schulz_brings_singular_values_near_one(name: str) -> None:
    g = torch.randn(4, 16, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(newton_schulz(g, COEFFICIENTS[name]))
    assert values.min() > 0.6 and values.max() < 1.3


def naive_muon(w, gradients, config: OptimConfig, lr: float, momentum: float):
    """One matrix through several steps in float64, straight from the update rule."""
    w, m = w.double().clone(), torch.zeros_like(w, dtype=torch.float64)
    v = None
    rows, columns = w.shape
    for g in gradients:
        m = momentum * m + g.double()
        u = g.double() + momentum * m
        if config.row_normalize:
            u = torch.stack([row / max(float(row.norm()), 1e-7) for row in u])
        x = naive_newton_schulz(u, config.newton_schulz)
        if config.normuon == "rows":
            x = torch.stack([row / max(float(row.norm()), 1e-8) for row in x])
        if config.normuon == "adaptive":
            mean = x.square().mean(1, keepdim=True) if rows >= columns else x.square().mean(0, keepdim=True)
            v = (1 - config.normuon_beta2) * mean + (0 if v is None else config.normuon_beta2 * v)
            y = x / v.clamp_min(1e-10).sqrt()
            x = y * x.norm() / y.norm()
        w = w * (1 - lr * config.matrix_decay) - lr * math.sqrt(max(1, rows / columns)) * x
    return w


@pytest.mark.parametrize("normuon", ["none", "rows", "adaptive"])
@pytest.mark.parametrize("row_normalize", [True, False])
@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_muon_updates_every_matrix_of_a_bank_by_its_rule(normuon: str, row_normalize: bool, shape) -> None:
    config = OptimConfig(normuon=normuon, row_normalize=row_normalize, momentum_bf16=False)
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(3, *shape, generator=generator)
    bank = torch.nn.Parameter(start.clone())
    muon = Muon({"bank": bank}, config)
    gradients = [torch.randn(bank.shape, generator=generator) for _ in range(3)]
    for g in gradients:
        bank.grad = g
        muon.start()
        muon.step(lr=0.05, momentum=0.9)
    for i in range(3):
        want = naive_muon(start[i], [g[i] for g in gradients], config, 0.05, 0.9)
        assert_close_f32(f"matrix {i}", bank[i], want)


def test_a_zero_gradient_row_or_matrix_stays_finite() -> None:
    bank = torch.nn.Parameter(torch.randn(2, 8, 8))
    bank.grad = torch.zeros_like(bank)
    muon = Muon({"bank": bank}, OptimConfig(normuon="adaptive"))
    muon.start()
    muon.step(lr=0.1, momentum=0.9)
    assert torch.isfinite(bank).all()


def test_adaptive_rescale_keeps_the_frobenius_norm() -> None:
    o = torch.randn(2, 8, 12)
    out = adaptive_rescale(o, torch.zeros(2, 1, 12), 0.9)
    assert_close_f32("norm", out.norm(dim=(1, 2)), o.double().norm(dim=(1, 2)))
    assert not torch.equal(out, o)


def test_normalize_rows_floors_the_norm() -> None:
    assert torch.equal(normalize_rows(torch.zeros(2, 3), 1e-7), torch.zeros(2, 3))


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = GPT(SMALL)
    optimizers = Optimizers(model, OptimConfig())
    adam = [p for group in optimizers.adamw.param_groups for p in group["params"]]
    grouped = [id(p) for p in (*adam, *optimizers.muon.banks.values())]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert set(optimizers.muon.banks) == set(BANKS)
    assert optimizers.adamw.param_groups[0]["params"] == [model.embedding]
    assert optimizers.adamw.param_groups[0]["weight_decay"] == OptimConfig().embedding_decay


def test_average_follows_its_recurrence_and_replaces_the_weights() -> None:
    model = torch.nn.Linear(3, 2)
    ema = EMA(model, 0.75)
    want = model.weight.detach().double().clone()
    for _ in range(4):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update(model)
        want = 0.75 * want + 0.25 * model.weight.detach().double()
    ema.copy_to(model)
    assert_close_f32("weight", model.weight, want)


def test_schedule_constants_of_the_records() -> None:
    p1855, p1934 = (PRESETS[name].schedule for name in ("pr1855", "pr1934"))
    assert progress(599.5 / 2, p1934) == 0.5
    assert lr_factor(0.1, p1855) == 1.0
    assert round(lr_factor(0.915, p1855), 9) == 0.1  # the floor is reached at 0.915 and 0.925 of the clock
    assert round(lr_factor(0.925, p1934), 9) == 0.1
    assert lr_factor(1.0, p1934) == 0.1
    assert round(lr_factor(0.625, p1934), 9) == 0.5
    assert lr_factor(1.0, PRESETS["pr1477"].schedule) == 0.0
    assert lr_factor(0.5, ScheduleConfig(warmdown=1.0, min_lr=0.0)) == 0.5


def test_momentum_ramp() -> None:
    config = PRESETS["pr1855"].optim
    assert [round(momentum(step, config), 9) for step in (0, 750, 1500, 9000)] == [0.92, 0.945, 0.97, 0.97]


def naive_adamw(p, gradients, lr: float, decay: float, config: OptimConfig) -> torch.Tensor:
    p, m, v = p.double().clone(), 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        m = config.beta1 * m + (1 - config.beta1) * g.double()
        v = config.beta2 * v + (1 - config.beta2) * g.double().square()
        p = p * (1 - lr * decay)
        p = p - lr * (m / (1 - config.beta1**t)) / ((v / (1 - config.beta2**t)).sqrt() + config.eps)
    return p


def test_all_groups_step_by_their_own_rates_and_decays() -> None:
    """Constants are all distinct, and the factor is not 1, so that none can stand in for another."""
    config = OptimConfig(
        matrix_lr=0.011, embedding_lr=0.023, scalar_lr=0.037, beta1=0.8, beta2=0.9,
        matrix_decay=0.5, embedding_decay=0.7, scalar_decay=0.3, momentum_bf16=False,
    )  # fmt: skip
    model, generator = GPT(SMALL, seed=1), torch.Generator().manual_seed(4)
    optimizers = Optimizers(model, config)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: [torch.randn(p.shape, generator=generator) for _ in range(3)] for name, p in start.items()}
    for i in range(3):
        for name, p in model.named_parameters():
            p.grad = gradients[name][i]
        optimizers.step(0.4, momentum=0.85)
    for name, p in model.named_parameters():
        if name in BANKS:
            lr, gs = 0.4 * config.matrix_lr, gradients[name]
            want = torch.stack(
                [naive_muon(start[name][j], [g[j] for g in gs], config, lr, 0.85) for j in range(len(p))]
            )
        elif name == "embedding":
            want = naive_adamw(start[name], gradients[name], 0.4 * config.embedding_lr, config.embedding_decay, config)
        else:
            want = naive_adamw(start[name], gradients[name], 0.4 * config.scalar_lr, config.scalar_decay, config)
        assert_close_f32(name, p, want)
