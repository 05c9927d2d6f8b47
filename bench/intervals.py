"""Confidence intervals of a mean, by Student's t."""

import math
from functools import cache

import numpy as np


@cache
def t_quantile(dof: int, level: float = 0.95) -> float:
    """The two-sided quantile of Student's t: |t| stays below it with probability `level`.

    With t = √dof · tan θ the density is proportional to cos θ to the power dof - 1 on an interval of finite length,
    where a plain sum gives every quantile to better than 1e-4 of itself.
    """
    step = 0.5 * math.pi / 1_000_000
    theta = np.arange(0.5, 1_000_000) * step
    share = np.cumsum(np.cos(theta) ** (dof - 1))
    return math.sqrt(dof) * math.tan(float(np.interp(level, share / share[-1], theta + 0.5 * step)))


def mean_interval(values: list[float] | np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of its confidence interval, of independent normal values; ValueError for less than two."""
    values = np.asarray(values, float)
    if len(values) < 2:
        raise ValueError(f"expected two values or more for an interval: got {len(values)}")
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()), t_quantile(len(values) - 1, level) * error


def seed_noise(values: list[float] | np.ndarray, level: float = 0.95) -> float:
    """How far the means of two sets of k runs, alike but for their seeds, lie apart in at most `level` of cases.

    values: one a run, of k runs that differ in their seed alone. The variance of such a difference is 2 s² / k.
    """
    return math.sqrt(2) * mean_interval(values, level)[1]
