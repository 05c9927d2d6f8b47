"""Kernels whose backward leaves out what only frozen inputs would get: the rest is the same, bit for bit, and what the
backward op says of itself is right. (leaky_relu_sq_mlp has such a test of its own.)"""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from niblick.kernels import qk_norm_rope, residual_norm, xsa_gate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


x, y, z, addend, *scales = draw(*[(7, 24)] * 4, *[(24,)] * 3)
heads, values, opener, gate, gain = draw((7, 4, 8), (7, 2, 8), (7, 6), (4, 6), (4,))
angle = torch.arange(14.0, device=DEVICE).view(7, 1, 2)
CASES = {
    "residual_norm": (
        residual_norm,
        dict(
            zip(
                ("x", "y", "x_scale", "y_scale", "z", "z_scale", "addend"),
                (x, y, *scales[:2], z, scales[2], addend),
                strict=True,
            )
        ),
        {"return_sum": True},
        ("x", "z", "addend"),
    ),
    "residual_norm, scales": (
        residual_norm,
        {"x": x, "y": y, "x_scale": scales[0], "y_scale": scales[1]},
        {},
        ("x", "x_scale", "y_scale"),
    ),
    "xsa_gate": (xsa_gate, {"y": heads, "v": values, "x": opener, "gate_weight": gate}, {}, ("y", "v", "x")),
    "qk_norm_rope": (
        qk_norm_rope,
        {"q": heads, "k": values, "cos": angle.cos(), "sin": angle.sin(), "gain": gain},
        {},
        ("q", "k"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wanted_is_the_same(case: str) -> None:
    module, tensors, options, wanted = CASES[case]
    name = case.split(",")[0]

    def gradients(trained: set[str]) -> tuple[dict[str, Tensor], tuple]:
        inputs = {key: t.clone().requires_grad_(key in trained) for key, t in tensors.items()}
        outputs = [out for out in getattr(module, name)(**inputs, **options) if out.requires_grad]
        with patch.object(module, "_op_backward", wraps=module._op_backward) as backward:
            found = torch.autograd.grad(outputs, [inputs[key] for key in wanted], [torch.cos(out) for out in outputs])
        return dict(zip(wanted, found, strict=True)), backward.call_args.args

    trainable = {key for key in tensors if key not in ("cos", "sin")}
    whole, _ = gradients(trainable)
    partial, arguments = gradients(set(wanted))
    assert all(torch.equal(partial[key], whole[key]) for key in wanted)
    arguments = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    assert False in arguments[-2:], "nothing was left out"
    torch.library.opcheck(module._op_backward, tuple(arguments))
