"""Where steps are best fine and where coarse: the same loss for every weight.

A bit more for each of a row's C weights halves its step and takes three quarters of what the row costs, sensitivity x
step^2 (`sensitivity`). At equal bits in all, the total cost is least where a bit buys the same everywhere: where cost
over C is equal. `ArtifactConfig.allocation` says over what costs are evened out: whole roles, matrices, or rows. The
clips then say how many bits there are in all, no longer where.
"""

from torch import Tensor

from niblick.artifact.errors import ArtifactError

PRIOR = 0.3
"""What the mean of its matrix weighs in the cost of a row, which is measured on little text: rare tokens' rows of the
embedding may not occur in it at all."""
LEAST = 1 / 256
"""Of the mean cost a weight, the least that is believed; its steps are sixteen times those of the mean."""


def allocate(
    steps: dict[str, Tensor], sensitivity: dict[str, Tensor], widths: dict[str, int], level: str
) -> dict[str, Tensor]:
    """Steps (n, R) by role, of the same geometric mean over all weights as those given.

    sensitivity (n, R) by role, widths: weights a row. level: "roles", "matrices" or "rows".
    """
    for role in steps:
        if role not in sensitivity:
            raise ArtifactError(f"artifact.allocation {level}: expected the sensitivity of {role}, found none")
    costs = {role: _evened(sensitivity[role] * step.square(), level) / widths[role] for role, step in steps.items()}
    weights = sum(widths[role] * step.numel() for role, step in steps.items())
    mean = sum(widths[role] * cost.sum() for role, cost in costs.items()) / weights
    if not mean > 0:
        raise ArtifactError(f"artifact.allocation {level}: expected a loss that depends on the weights, found none")
    logs = {role: -(cost / mean).clamp(min=LEAST).log() / 2 for role, cost in costs.items()}
    excess = sum(widths[role] * log.sum() for role, log in logs.items()) / weights
    return {role: step * (logs[role] - excess).exp() for role, step in steps.items()}


def _evened(cost: Tensor, level: str) -> Tensor:
    """The cost (n, R) that a row is taken to have."""
    if level == "roles":
        return cost.mean().expand_as(cost)
    matrix = cost.mean(-1, keepdim=True).expand_as(cost)
    return matrix if level == "matrices" else (cost + PRIOR * matrix) / (1 + PRIOR)
