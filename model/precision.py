"""What a run computes in: the dtype of the activations, and whether the large products are in eight bits."""

import torch

from niblick.model.config import ConfigError


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, bool]:
    """The dtype of the activations and whether training multiplies in fp8, for `run.precision` on a device.

    `auto` is bfloat16 on a GPU and float32 on a CPU; `fp8` is bfloat16 with the MLP's products and the head's in
    e4m3, and needs compute capability 8.9. Raises ConfigError.
    """
    cuda = device.type == "cuda"
    if name == "fp8":
        if not cuda:
            raise ConfigError("run.precision fp8 needs a CUDA device: got the CPU (bf16 and fp32 run on it)")
        found = torch.cuda.get_device_capability(device)
        if found < (8, 9):
            raise ConfigError(f"run.precision fp8 needs compute capability 8.9: the card has {found[0]}.{found[1]}")
        return torch.bfloat16, True
    half = name == "bf16" or (name == "auto" and cuda)
    return torch.bfloat16 if half else torch.float32, False
