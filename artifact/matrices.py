"""The matrices of a model by role: what is quantised row by row, under names that say what each does.

A bank of `model.gpt` holds one or two roles; here each is a stack (n, R, C) of n matrices, R outputs and C inputs. The
inputs of a role have one Hessian (C, C) a layer, named by HESSIANS; the queries', keys' and values' is the same.
"""

import torch
from torch import Tensor

ROLES = {
    "embedding": ("embedding", None),
    "attn_q": ("qo_bank", 0),
    "attn_o": ("qo_bank", 1),
    "attn_k": ("kv_bank", 0),
    "attn_v": ("kv_bank", 1),
    "mlp_up": ("mlp_up_bank", None),
    "mlp_down": ("mlp_down_bank", None),
}
"""Role -> parameter, and which half of it."""

HESSIANS = {
    "embedding": "head",
    "attn_q": "attn_in",
    "attn_k": "attn_in",
    "attn_v": "attn_in",
    "attn_o": "attn_out",
    "mlp_up": "mlp_in",
    "mlp_down": "mlp_hidden",
}
"""Role -> what multiplies its matrices."""


def split_roles(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's parameters with every matrix under its role, (n, R, C), and the rest as it is."""
    parameters = {parameter for parameter, _ in ROLES.values()}
    roles = {role: _of_role(state[parameter], half) for role, (parameter, half) in ROLES.items() if parameter in state}
    return roles | {name: tensor for name, tensor in state.items() if name not in parameters}


def join_roles(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split_roles`."""
    state = {name: tensor for name, tensor in tensors.items() if name not in ROLES}
    for role, (parameter, half) in ROLES.items():
        if role in tensors and half is None:
            state[parameter] = tensors[role][0] if role == "embedding" else tensors[role]
        elif role in tensors and half == 0:
            other = next(name for name, place in ROLES.items() if place == (parameter, 1))
            state[parameter] = torch.cat([tensors[role], tensors[other]])
    return state


def _of_role(tensor: Tensor, half: int | None) -> Tensor:
    if half is None:
        return tensor if tensor.ndim == 3 else tensor[None]
    return tensor.chunk(2)[half]
