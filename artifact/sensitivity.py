"""How the loss depends on each row's step: what coarser steps cost, measured where `allocation` then saves.

GPTQ leaves a row the error  E = d U / diag(U)  (columns in its order), d uniform in half a step s on either side. To
second order, with gradients g of the loss whose labels the model itself draws (so that their mean square is Fisher's
matrix, the loss's curvature where the model is right), the row adds to the mean loss of a token

    E[(E g)^2] / 2  =  s^2 / 24  x  mean over tokens of |(U / diag(U)) g|^2

in nats; the factor of s^2 is what is found here. Labels are independent given the text, so the gradient of a whole row
of text has the sum over its tokens for its mean square, and one backward pass serves them all.
On a trained `pr1855` the sums of these predict 86 % of the divergence that quantisation causes (bench/NOTES.md).
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from niblick.artifact.errors import ArtifactError
from niblick.artifact.gptq import Factor, factorise
from niblick.artifact.hessians import Rows, softcapped, sum_over_ranks
from niblick.artifact.matrices import HESSIANS, ROLES, split_roles
from niblick.model.gpt import GPT

TEXTS = 8
"""Backward passes a rank, each of one row of text: 1.1 s on an H200. 32 leave 1.5 % less divergence, 128 2.2 % less."""


def collect_sensitivities(
    model: GPT, batches: Iterable[Rows], hessians: dict[str, Tensor], *, damping: float, seed: int, texts: int = TEXTS
) -> dict[str, Tensor]:
    """By role (n, R), float32 on the device: nats a token and squared step, from the first `texts` rows of `batches`.

    `hessians` and `damping` are those that GPTQ will use. In a process group the mean is over all ranks, which must all
    call this. The model's parameters and their gradients are left as they are. ArtifactError without a row.
    """
    factors = {name: factorise(name, hessian, damping) for name, hessian in hessians.items()}
    shapes = {role: tensor.shape[:2] for role, tensor in _matrices(dict(model.named_parameters())).items()}
    found = {role: torch.zeros(shape, device=model.embedding.device) for role, shape in shapes.items()}
    count = torch.zeros((), device=model.embedding.device)
    generator = torch.Generator(model.embedding.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        for ids in islice(_texts(batches, model.config.max_segment), texts):
            for role, gradient in _gradients(model, ids.to(model.embedding.device), generator).items():
                found[role] += _square_sums(gradient.float(), factors[HESSIANS[role]])
            count += ids.numel()
    finally:
        model.train(was_training)
    sum_over_ranks((*found.values(), count))
    if not count:
        raise ArtifactError("calibration: expected at least one row of text, found none")
    return {role: sums / (24 * count) for role, sums in found.items()}


def _texts(batches: Iterable[Rows], length: int) -> Iterator[Tensor]:
    """The rows (length,) of calibration batches, which hold nothing but whole ones."""
    for ids, _ in batches:
        yield from ids.view(-1, length)


@torch.enable_grad()
def _gradients(model: GPT, ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """By role (n, R, C): of the summed loss over a row of text whose labels are drawn from the model."""
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32, device=ids.device)
    logits = softcapped(model, model.head(model.hidden(ids, cu_seqlens, looping=True)).float())
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    matrices = {name: p for name, p in model.named_parameters() if name in {place for place, _ in ROLES.values()}}
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), list(matrices.values()))
    return _matrices(dict(zip(matrices, gradients, strict=True)))


def _matrices(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {role: tensor for role, tensor in split_roles(parameters).items() if role in ROLES}


def _square_sums(gradient: Tensor, factor: Factor) -> Tensor:
    """(n, R): |(U / diag(U)) g|^2 of each row g of gradient (n, R, C), dead columns left out."""
    g = gradient.masked_fill(factor.dead[:, None], 0.0)
    g = g.gather(2, factor.order[:, None].expand_as(g))
    unit = factor.upper / factor.upper.diagonal(dim1=-2, dim2=-1)[..., None]
    return (g @ unit.mT).square().sum(-1)
