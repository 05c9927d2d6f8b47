"""Artifact -> model, ready to score."""

from typing import Literal

import torch
from torch import Tensor

from niblick.artifact.container import Container
from niblick.artifact.errors import ArtifactError
from niblick.artifact.matrices import ROLES
from niblick.artifact.records import Quantized, RowIntegers, dequantize, matrix
from niblick.kernels.int6_linear import int6_pack
from niblick.model.attention import choose_attention
from niblick.model.gpt import BANKS, GPT, PackedMatrix
from niblick.model.ngram_tables import from_integers

Weights = Literal["dense", "packed"]


def load_model(
    artifact: Container, device: torch.device, dtype: torch.dtype, weights: Weights = "dense", attention: str = "auto"
) -> tuple[GPT, str]:
    """The model of an artifact that was read, in eval mode, and the rung of the attention ladder it uses.

    `attention` is this machine's choice, not that of the training run. `dense` keeps the matrices as float32, `packed`
    in six bits, as `int6_linear` reads them. ArtifactError for weights of another model, ConfigError for a rung that
    is not available.
    """
    model = GPT(artifact.config, dtype=dtype)
    try:
        set_weights(model, artifact.quantized)
    except ArtifactError as error:
        raise ArtifactError(f"{artifact.path}: {error}") from error
    model.to(device)
    if artifact.ngram_bias:
        settings, integers = artifact.ngram_bias
        model.ngram_bias = from_integers(integers, settings, artifact.config.bos_id, device)
    rung, model.attend = choose_attention(attention, device, dtype)
    if weights == "packed":
        use_packed_weights(model, artifact.quantized)
    return model.eval(), rung


def set_weights(model: GPT, quantized: Quantized) -> None:
    """Give a model the dequantised weights; before writing and after reading they are the same, bit for bit."""
    state = dequantize(quantized)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in state.items()}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise ArtifactError(f"{name}: expected shape {expected.get(name)}, found {found.get(name)}")
    model.load_state_dict(state)


def use_packed_weights(model: GPT, quantized: Quantized) -> None:
    """Replace the model's banks by six-bit ones on its device. ArtifactError for more bits or an odd width."""
    device = model.embedding.device
    for bank, matrices in pack_for_inference(quantized).items():
        model.use_packed(bank, [_to(matrix, device) for matrix in matrices])


def pack_for_inference(quantized: Quantized) -> dict[str, list[PackedMatrix | Tensor]]:
    """Every bank as packed six-bit matrices, for `GPT.use_packed`; those with a correction dequantised, in float32.

    ArtifactError for more bits or an odd width.
    """
    return {
        bank: [packed for role, (name, _) in ROLES.items() if name == bank for packed in _packed(role, quantized[role])]
        for bank in BANKS
    }


def _packed(role: str, rows: RowIntegers) -> list[PackedMatrix | Tensor]:
    if rows.bits > 6:
        raise ArtifactError(f"packed weights: expected {role} in at most 6 bits, found {rows.bits}")
    corrected = {correction.matrix for correction in rows.low_rank}
    try:
        return [
            matrix(rows, i) if i in corrected else PackedMatrix(int6_pack(rows.q[i]), rows.scale[i].float())
            for i in range(len(rows.q))
        ]
    except ValueError as error:
        raise ArtifactError(f"packed weights: {role}: {error}") from error


def _to(weight: PackedMatrix | Tensor, device: torch.device) -> PackedMatrix | Tensor:
    return weight.to(device) if isinstance(weight, Tensor) else PackedMatrix(*(t.to(device) for t in weight))
