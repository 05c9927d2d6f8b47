"""Few positions of each segment, where only they are wanted, against the same of all: forward and every gradient."""

import pytest
import torch
from numerics import assert_same_f64
from test_model_reference import CASES, one_thread, product, random_parameters

from niblick.model.config import GPTConfig

__all__ = ["one_thread"]

ROWS, WIDTH = 3, 9
WANTED = torch.tensor([[0, 1], [13, 17], [20, 21]])
"""Two positions of each row: its first, its last, some in between, with a gap."""


@pytest.mark.parametrize(("config", "looping"), CASES)
def test_is_the_same_as_all(config: GPTConfig, looping: bool) -> None:
    gpt = product(config, random_parameters(config))
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, config.vocab_size, (ROWS * WIDTH,), generator=generator)
    dy = torch.randn(WANTED.numel(), config.model_dim, generator=generator, dtype=torch.float64)
    starts = WIDTH * torch.arange(ROWS + 1)

    def results(wanted: torch.Tensor | None) -> list[torch.Tensor]:
        y = gpt.hidden(ids, starts.to(torch.int32), looping, row_starts=starts[:-1], max_segment=WIDTH, wanted=wanted)
        y = y[WANTED.flatten()] if wanted is None else y
        return [y, *torch.autograd.grad(y, list(gpt.parameters()), dy, allow_unused=True)]

    names = ["hidden", *(name for name, _ in gpt.named_parameters())]
    for name, whole, some in zip(names, results(None), results(WANTED), strict=True):
        assert (whole is None) == (some is None), name
        if whole is not None:
            assert_same_f64(name, some, whole)
