"""Artifact -> model, ready to score."""

from pathlib import Path
from typing import Literal

import torch

from niblick.artifact.container import read_artifact
from niblick.artifact.errors import ArtifactError
from niblick.artifact.quantize import Quantized, dequantize, pack_for_inference
from niblick.model.attention import choose_attention
from niblick.model.gpt import GPT, PackedMatrix

Weights = Literal["dense", "packed"]


def load_model(
    path: str | Path, device: torch.device, dtype: torch.dtype, weights: Weights = "dense", attention: str = "auto"
) -> tuple[GPT, str]:
    """The model of an artifact in eval mode, and the rung of the attention ladder it uses.

    `attention` is this machine's choice, not that of the training run. `dense` keeps the matrices as float32, `packed`
    in six bits, as `int6_linear` reads them. ArtifactError for a file that is not sound, ConfigError for a rung that
    is not available, OSError.
    """
    config, quantized = read_artifact(path)
    model = GPT(config, dtype=dtype)
    try:
        set_weights(model, quantized)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    model.to(device)
    rung, model.attend = choose_attention(attention, device, dtype)
    if weights == "packed":
        use_packed_weights(model, quantized)
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
        model.use_packed(bank, [PackedMatrix(*(t.to(device) for t in matrix)) for matrix in matrices])
