"""Hessians of the layers' inputs, from calibration data: H = sum of x^T x over every x that a matrix multiplies.

A looped layer adds up its passes. The embedding's matrix is the head's, whose input is the stream after the last norm;
that the same table is also looked up is left aside. Published runs take 16 or 64 batches of random 2048-token rows of
the training shards, without document borders, through the averaged weights in eval mode with the loop on.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from niblick.artifact.errors import ArtifactError
from niblick.model.distributed import contact
from niblick.model.gpt import GPT

TEMPERATURE = 0.8
"""Of self-generated calibration, as in PR #1019 of the Parameter Golf challenge."""

Rows = tuple[Tensor, Tensor]
"""ids (N,) int64 and cu_seqlens int32, as `GPT.hidden` takes them."""


@torch.no_grad()
def collect_hessians(model: GPT, batches: Iterable[Rows]) -> dict[str, Tensor]:
    """ "attn_in", "attn_out", "mlp_in" (L, D, D), "mlp_hidden" (L, F, F) and "head" (1, D, D), float32 on the device.

    Runs the model in eval mode with the loop on. In a process group the sums are those of all ranks, which must all
    call this; each brings its own batches. ArtifactError without a batch.
    """
    c, device = model.config, model.embedding.device
    L, D = c.num_layers, c.model_dim
    sizes = {"attn_in": (L, D), "attn_out": (L, D), "mlp_in": (L, D), "mlp_hidden": (L, c.mlp_hidden), "head": (1, D)}
    hessians = {name: torch.zeros(n, C, C, device=device) for name, (n, C) in sizes.items()}

    def observe(name: str, layer: int, x: Tensor) -> None:
        x = x.float()
        hessians[name][layer].addmm_(x.mT, x)

    was_training, model.observe = model.training, observe
    model.eval()
    count = torch.zeros((), device=device)
    try:
        for ids, cu_seqlens in batches:
            observe("head", 0, model.hidden(ids.to(device), cu_seqlens.to(device), looping=True))
            count += 1
    finally:
        model.observe = None
        model.train(was_training)
    sum_over_ranks((*hessians.values(), count))
    if not count:
        raise ArtifactError("calibration: expected at least one batch, found none")
    return hessians


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """In place, where there is a process group."""
    if dist.is_available() and dist.is_initialized():
        with contact():
            for tensor in tensors:
                dist.all_reduce(tensor)


@torch.no_grad()
def generate_rows(model: GPT, n_rows: int, row: int, *, seed: int, batch: int = 8) -> Iterator[Rows]:
    """`n_rows` rows of `row` tokens drawn from the model itself at TEMPERATURE, `batch` at a time: no data is touched.

    First tokens are uniform. Every token runs the whole prefix again, so the cost grows with row^2 (PR #1019).
    """
    device = model.embedding.device
    generator = torch.Generator(device).manual_seed(seed)
    model.eval()
    for start in range(0, n_rows, batch):
        n = min(batch, n_rows - start)
        ids = torch.randint(model.config.vocab_size, (n, 1), generator=generator, device=device)
        for length in range(1, row):
            hidden = model.hidden(ids.reshape(-1), _row_starts(n, length, device), looping=True)
            last = hidden.view(n, length, -1)[:, -1]
            logits = softcapped(model, model.head(last).float()) / TEMPERATURE
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
        yield ids.reshape(-1), _row_starts(n, row, device)


def softcapped(model: GPT, logits: Tensor) -> Tensor:
    """Logits after the model's softcap, or after its two."""
    caps = model.softcaps
    if len(caps) == 1:
        return caps[0] * torch.tanh(logits / caps[0])
    return torch.where(logits > 0, caps[0] * torch.tanh(logits / caps[0]), caps[1] * torch.tanh(logits / caps[1]))


def _row_starts(n_rows: int, row: int, device: torch.device) -> Tensor:
    return torch.arange(0, n_rows * row + 1, row, dtype=torch.int32, device=device)
