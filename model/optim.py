"""Muon for the banks, AdamW for the rest, and the exponential moving average."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from niblick.kernels.newton_schulz import newton_schulz, newton_schulz_ref
from niblick.model.config import OptimConfig
from niblick.model.distributed import ReplicatedGradients, clip_averaged, share_bank
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
    """Each row divided by its 2-norm, taken in float32 (or float64) and floored."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).clamp_min(floor).to(x.dtype)


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
    W <- W (1 - lr·decay) - lr · sqrt(max(1, m/n)) · X. `state` holds a momentum (and second moment) a bank, of
    a rank's own matrices where there are several. On a GPU, G, M and U are bfloat16 if the preset says so, and so is G
    between ranks.
    """

    def __init__(self, banks: dict[str, nn.Parameter], config: OptimConfig, rank: int = 0, world_size: int = 1) -> None:
        self.config = config
        self.banks = dict(sorted(banks.items(), key=lambda item: -item[1].numel()))
        self.shares = {
            name: share_bank(bank, self._half(bank) if config.momentum_bf16 else torch.float32, rank, world_size)
            for name, bank in self.banks.items()
        }
        self.state: dict[str, Tensor] = {}

    def start(self) -> None:
        """Take in the banks' gradients and start their way to the rank that needs them, the largest first."""
        for share in self.shares.values():
            share.start()

    def gradients(self) -> list[Tensor]:
        """Those of the own matrices, averaged over ranks; what is done to them in place counts in `step`."""
        return [share.gradient() for share in self.shares.values()]

    @torch.no_grad()
    def step(self, lr: float, momentum: float, meanwhile: Callable[[], object] = lambda: None) -> None:
        """After `start`. An update travels while the next bank's is computed, the last one during `meanwhile`."""
        travelling = None
        for name, share in self.shares.items():
            share.send(self._direction(name, share.gradient(), momentum))
            if travelling:
                self._apply(travelling, lr)
            travelling = name
        meanwhile()
        self._apply(travelling, lr)

    def _apply(self, name: str, lr: float) -> None:
        bank, update = self.banks[name], self.shares[name].update()
        rows, columns = bank.shape[-2:]
        bank.mul_(1 - lr * self.config.matrix_decay).add_(update, alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def _direction(self, name: str, gradient: Tensor, momentum: float) -> Tensor:
        c = self.config
        buffer = self._buffer(f"{name}.momentum", gradient, gradient.dtype)
        buffer.mul_(momentum).add_(gradient)
        update = gradient.add(buffer, alpha=momentum)
        if c.row_normalize:
            update = normalize_rows(update, 1e-7)
        update = self._orthogonalize(update.to(self._half(update)))
        if c.normuon == "rows":
            update = normalize_rows(update, 1e-8)
        if c.normuon == "adaptive":
            tall = update.shape[-2] >= update.shape[-1]
            moment = self._buffer(f"{name}.second_moment", update[..., :1] if tall else update[:, :1], torch.float32)
            update = adaptive_rescale(update, moment, c.normuon_beta2)
        return update

    def _orthogonalize(self, update: Tensor) -> Tensor:
        function = newton_schulz if self.config.newton_schulz_impl == "kernel" else newton_schulz_ref
        return function(update, COEFFICIENTS[self.config.newton_schulz])

    @staticmethod
    def _half(like: Tensor) -> torch.dtype:
        return torch.bfloat16 if like.is_cuda else torch.float32  # bf16 products are slow on most CPUs

    def _buffer(self, key: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        if key not in self.state:
            self.state[key] = torch.zeros(like.shape, dtype=dtype, device=like.device)
        return self.state[key]

    def rehearsals(self) -> list[Callable[[], object]]:
        """A function a bank that launches its Newton-Schulz once, on zeros, so that its kernels are compiled."""

        def launch(name: str) -> Tensor:
            bank = self.banks[name]
            shape = (self.shares[name].matrices, *bank.shape[1:])
            return self._orthogonalize(torch.zeros(shape, dtype=self._half(bank), device=bank.device))

        return [lambda name=name: launch(name) for name in self.banks]

    def state_dict(self) -> dict[str, Tensor]:
        """The state of all matrices, whatever the number of ranks, each of which must call this."""
        return {key: self._share_of(key).gather(tensor) for key, tensor in self.state.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.state = {key: self._share_of(key).own(tensor).clone() for key, tensor in tensors.items()}

    def _share_of(self, key: str):
        return self.shares[key.rsplit(".", 1)[0]]


class Optimizers:
    """The three groups of a GPT, stepped together: embedding and scalars by AdamW, banks by Muon.

    Between ranks, gradients are averaged here and, where the preset clips the average, clipped.
    """

    def __init__(self, model: GPT, config: OptimConfig, rank: int = 0, world_size: int = 1) -> None:
        self.config, self.world_size = config, world_size
        named = dict(model.named_parameters())
        self.muon = Muon({name: named[name] for name in BANKS}, config, rank, world_size)
        self._adam = {name: p for name, p in named.items() if name not in BANKS}
        scalars = [p for name, p in self._adam.items() if name != "embedding"]
        self._replicated = ReplicatedGradients([named["embedding"]], scalars, world_size)
        groups = [
            {"params": [named["embedding"]], "lr": config.embedding_lr, "weight_decay": config.embedding_decay},
            {"params": scalars, "lr": config.scalar_lr, "weight_decay": config.scalar_decay},
        ]
        self.adamw = torch.optim.AdamW(
            groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=named["embedding"].is_cuda
        )

    def step(self, lr_factor: float, momentum: float) -> None:
        """From this rank's gradients in `.grad` to new weights, the same on every rank."""
        c = self.config
        self.muon.start()
        self._replicated.start()
        if c.clip == "global":
            clip_averaged(self.muon.gradients(), self._replicated.finish(), c.grad_clip, self.world_size)
        self.muon.step(c.matrix_lr * lr_factor, momentum, meanwhile=lambda: self._step_adamw(lr_factor))

    def _step_adamw(self, lr_factor: float) -> None:
        self._replicated.finish()
        for group, base in zip(self.adamw.param_groups, (self.config.embedding_lr, self.config.scalar_lr), strict=True):
            group["lr"] = base * lr_factor
        self.adamw.step()

    def state_dict(self) -> dict[str, Tensor]:
        """Every state tensor under one flat name, empty before the first step. Every rank must call it.

        One rank: the tensors themselves, not copies.
        """
        adam = {
            f"adamw.{name}.{key}": tensor
            for name, p in self._adam.items()
            for key, tensor in self.adamw.state.get(p, {}).items()
        }
        return adam | {f"muon.{key}": tensor for key, tensor in self.muon.state_dict().items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Exactly the given state, dtypes included (torch's own loader would cast bf16 momenta to float32)."""
        self.adamw.state.clear()
        of_muon = {}
        for name, tensor in tensors.items():
            kind, rest = name.split(".", 1)
            if kind == "muon":
                of_muon[rest] = tensor
            else:
                parameter, key = rest.rsplit(".", 1)
                self.adamw.state[self._adam[parameter]][key] = tensor.clone()
        self.muon.load_state_dict(of_muon)


class EMA:
    """Float32 running average of every parameter, no bias correction: Ē <- δ Ē + (1 - δ) p after each step.

    Every rank keeps all of it: the weights are the same on every rank, and so is their average, without a word.
    """

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
