"""Muon for the banks, AdamW for the rest, the exponential moving average, and gradient transport between ranks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from niblick.kernels.newton_schulz import newton_schulz, newton_schulz_ref
from niblick.model.config import OptimConfig
from niblick.model.gpt import BANKS, GPT

QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5

# Polar Express, five degree-5 steps (the numbers of PR #1787; there without the 1.02 safety factor in the norm).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

COEFFICIENTS = {"quintic": QUINTIC, "polar_express": POLAR_EXPRESS}


def normalize_rows(x: Tensor, floor: float) -> Tensor:
    """Each row divided by its 2-norm, taken in float32 and floored."""
    return x / x.float().norm(dim=-1, keepdim=True).clamp_min(floor).to(x.dtype)


def adaptive_rescale(o: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """Published NorMuon: o (B, m, n) over the root of running mean squares of rows or columns, Frobenius norm kept.

    The mean is taken over columns if m >= n, else over rows; `second_moment` (float32, kept dimension) is updated.
    """
    wide = o.float()
    over = -1 if o.shape[-2] >= o.shape[-1] else -2
    second_moment.lerp_(wide.square().mean(over, keepdim=True), 1 - beta2)
    scaled = wide * second_moment.clamp_min(1e-10).rsqrt()
    before, after = (x.norm(dim=(-2, -1), keepdim=True) for x in (wide, scaled))
    return (scaled * (before / after.clamp_min(1e-30))).to(o.dtype)


class Muon:
    """Momentum, orthogonalised, over banks (B, m, n): every matrix of a bank is updated independently.

    Nesterov in sum form, M <- μM + G, U = G + μM; optional row normalisation (MuonEq-R); Newton-Schulz;
    W <- W (1 - lr·decay) - lr · sqrt(max(1, m/n)) · X. `state` holds a momentum (and second moment) a bank.
    """

    def __init__(self, banks: dict[str, nn.Parameter], config: OptimConfig) -> None:
        self.banks, self.config = banks, config
        self.state: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        for name, bank in self.banks.items():
            update = self._direction(name, bank, momentum)
            rows, columns = bank.shape[-2:]
            bank.mul_(1 - lr * self.config.matrix_decay)
            bank.add_(update.to(bank.dtype), alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def _direction(self, name: str, bank: nn.Parameter, momentum: float) -> Tensor:
        c = self.config
        half = torch.bfloat16 if bank.is_cuda else torch.float32  # bf16 products are slow on most CPUs
        buffer = self._buffer(f"{name}.momentum", bank, half if c.momentum_bf16 else torch.float32)
        gradient = bank.grad.to(buffer.dtype)
        buffer.mul_(momentum).add_(gradient)
        update = gradient.add(buffer, alpha=momentum)
        if c.row_normalize:
            update = normalize_rows(update, 1e-7)
        orthogonal = newton_schulz if c.newton_schulz_impl == "kernel" else newton_schulz_ref
        update = orthogonal(update.to(half), COEFFICIENTS[c.newton_schulz])
        if c.normuon == "rows":
            update = normalize_rows(update, 1e-8)
        if c.normuon == "adaptive":
            tall = bank.shape[-2] >= bank.shape[-1]
            moment = self._buffer(f"{name}.second_moment", bank[..., :1] if tall else bank[:, :1], torch.float32)
            update = adaptive_rescale(update, moment, c.normuon_beta2)
        return update

    def _buffer(self, key: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        if key not in self.state:
            self.state[key] = torch.zeros(like.shape, dtype=dtype, device=like.device)
        return self.state[key]


class Optimizers:
    """The three groups of a GPT, stepped together: embedding and scalars by AdamW, banks by Muon."""

    def __init__(self, model: GPT, config: OptimConfig) -> None:
        self.config = config
        named = dict(model.named_parameters())
        self.muon = Muon({name: named[name] for name in BANKS}, config)
        self._adam = {name: p for name, p in named.items() if name not in BANKS}
        scalars = [p for name, p in self._adam.items() if name != "embedding"]
        groups = [
            {"params": [named["embedding"]], "lr": config.embedding_lr, "weight_decay": config.embedding_decay},
            {"params": scalars, "lr": config.scalar_lr, "weight_decay": config.scalar_decay},
        ]
        self.adamw = torch.optim.AdamW(
            groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=named["embedding"].is_cuda
        )

    def step(self, lr_factor: float, momentum: float) -> None:
        c = self.config
        for group, base in zip(self.adamw.param_groups, (c.embedding_lr, c.scalar_lr), strict=True):
            group["lr"] = base * lr_factor
        self.adamw.step()
        self.muon.step(c.matrix_lr * lr_factor, momentum)

    def state_dict(self) -> dict[str, Tensor]:
        """Every state tensor under one flat name, empty before the first step. (The tensors, not copies.)"""
        adam = {
            f"adamw.{name}.{key}": tensor
            for name, p in self._adam.items()
            for key, tensor in self.adamw.state.get(p, {}).items()
        }
        return adam | {f"muon.{name}": tensor for name, tensor in self.muon.state.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Exactly the given state, dtypes included (torch's own loader would cast bf16 momenta to float32)."""
        self.adamw.state.clear()
        self.muon.state.clear()
        for name, tensor in tensors.items():
            kind, rest = name.split(".", 1)
            if kind == "muon":
                self.muon.state[rest] = tensor.clone()
            else:
                parameter, key = rest.rsplit(".", 1)
                self.adamw.state[self._adam[parameter]][key] = tensor.clone()


class EMA:
    """Float32 running average of every parameter, no bias correction: Ē <- δ Ē + (1 - δ) p after each step."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        current = [p.float() for p in model.parameters()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Replace the weights by their average, cast to each parameter's dtype."""
        for name, p in model.named_parameters():
            p.copy_(self.average[name])


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter], world_size: int, in_bf16: bool) -> None:
    """Mean over ranks: large gradients one by one (bf16 on the wire if asked), all small ones in one buffer."""
    if world_size == 1:
        return
    small = [p for p in parameters if p.grad.numel() <= 32_768]
    flat = torch.cat([p.grad.float().reshape(-1) for p in small])
    for p in parameters:
        if p.grad.numel() > 32_768:
            wire = p.grad.bfloat16() if in_bf16 else p.grad
            dist.all_reduce(wire)
            p.grad.copy_(wire / world_size)
    dist.all_reduce(flat)
    for p, mean in zip(small, (flat / world_size).split([p.numel() for p in small]), strict=True):
        p.grad.copy_(mean.view_as(p))
