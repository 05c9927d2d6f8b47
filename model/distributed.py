"""What several ranks (one process, one GPU each) tell each other: gradients, updates, settings.

A bank's matrices are dealt out over R ranks (PR #1530): its gradient is reduce-scattered, Muon's momentum and
Newton-Schulz exist for a rank's own matrices only, and the updates are all-gathered, 16-bit where Muon computes so.
One rank runs the same steps without a collective (`WholeBank`).

What overlaps: the reduce-scatters are all started at once, largest bank first, and each is waited for only when its
bank's turn comes, so all but the first run under the Newton-Schulz before them; each gather runs under the
Newton-Schulz, the last under AdamW, that follows it. The backward pass itself hides nothing: a bank's gradient is one
stack over all layers, complete only when the first layer's is, and a compiled backward hands over all gradients at its
end. So hooks on the parameters would start nothing earlier than `start` does after the backward.

On a GPU a wait is one stream waiting for another; the host goes on.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from niblick.model.config import ConfigError
from niblick.model.errors import RankLost, TrainingStopped

# torch 2.13 deprecates the old names; versions before may lack the new.
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@contextmanager
def contact():
    """RankLost for what the transport raises when a rank has gone."""
    try:
        yield
    except TrainingStopped:
        raise  # a signal that came meanwhile
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise RankLost(f"lost contact with another rank ({reason})") from error


class Pending:
    """A collective under way, whose handle `start` returns. Its tensors must live until `wait`."""

    def __init__(self, start: Callable[[], dist.Work]) -> None:
        with contact():
            self._work: dist.Work | None = start()

    def wait(self) -> None:
        """Further calls do nothing more."""
        if self._work is not None:
            with contact():
                self._work.wait()
        self._work = None


# ---- banks ---------------------------------------------------------------------------------------------------------


class WholeBank:
    """A bank (B, m, n) on the only rank: gradients and updates are passed on as they are."""

    def __init__(self, bank: nn.Parameter, dtype: torch.dtype) -> None:
        self.bank, self.dtype = bank, dtype
        self.matrices = len(bank)

    def start(self) -> None:
        self._gradient = self.bank.grad.to(self.dtype)

    def gradient(self) -> Tensor:
        return self._gradient

    def send(self, update: Tensor) -> None:
        self._update, self._gradient = update, None

    def update(self) -> Tensor:
        update, self._update = self._update, None
        return update

    def gather(self, state: Tensor) -> Tensor:
        return state

    def own(self, state: Tensor) -> Tensor:
        return state


class ShardedBank:
    """A bank (B, m, n) of which each of R ranks updates ceil(B / R) matrices, in rank order, the end padded with zeros.

    Zero matrices stay zero in every form of Muon here. `start`, then `gradient`: the mean over ranks of the own
    matrices' gradients, summed in `dtype`. `send`, then `update`: every rank's updates, (B, m, n).
    """

    def __init__(self, bank: nn.Parameter, dtype: torch.dtype, rank: int, world_size: int) -> None:
        self.bank, self.world_size = bank, world_size
        self.matrices = -(-len(bank) // world_size)
        self._own = slice(rank * self.matrices, (rank + 1) * self.matrices)
        self._padded = torch.zeros(self._all_matrices(bank), dtype=dtype, device=bank.device)
        # Gloo reduces the whole in place and NCCL the own part elsewhere; see `_reduce_scatter`.
        own = self._padded[self._own]
        self._gradient = torch.empty_like(own) if bank.is_cuda else own
        self._gathered: Tensor | None = None

    def _all_matrices(self, like: Tensor) -> tuple[int, ...]:
        return self.matrices * self.world_size, *like.shape[1:]

    def start(self) -> None:
        # Divided before the sum, in the same pass that rounds to the wire's dtype.
        torch.mul(self.bank.grad, 1 / self.world_size, out=self._padded[: len(self.bank)])
        self._reduction = Pending(lambda: _reduce_scatter(self._gradient, self._padded))

    def gradient(self) -> Tensor:
        self._reduction.wait()
        return self._gradient

    def send(self, update: Tensor) -> None:
        if self._gathered is None:
            self._gathered = update.new_empty(self._all_matrices(update))
        self._sent = update.contiguous()
        self._gathering = Pending(lambda: _all_gather_single(self._gathered, self._sent, async_op=True))

    def update(self) -> Tensor:
        self._gathering.wait()
        self._sent = None
        return self._gathered[: len(self.bank)]

    def gather(self, state: Tensor) -> Tensor:
        """State of the own matrices -> of all, (B, ...). Every rank must call it."""
        whole = state.new_empty(self._all_matrices(state))
        with contact():
            _all_gather_single(whole, state.contiguous())
        return whole[: len(self.bank)]

    def own(self, state: Tensor) -> Tensor:
        """State of all matrices -> of the own ones, padded."""
        padded = state.new_zeros(self._all_matrices(state))
        padded[: len(state)] = state
        return padded[self._own]


def _reduce_scatter(own: Tensor, padded: Tensor) -> dist.Work:
    """Sums `padded` over ranks into `own`. Gloo has no reduce-scatter everywhere; there `own` is a view of `padded`."""
    if padded.is_cuda:
        return _reduce_scatter_single(own, padded, async_op=True)
    return dist.all_reduce(padded, async_op=True)


def share_bank(bank: nn.Parameter, dtype: torch.dtype, rank: int, world_size: int) -> WholeBank | ShardedBank:
    return WholeBank(bank, dtype) if world_size == 1 else ShardedBank(bank, dtype, rank, world_size)


# ---- what every rank keeps whole -----------------------------------------------------------------------------------


class ReplicatedGradients:
    """Mean over ranks of the gradients of parameters that all keep: `large` one by one in their own dtype (the
    embedding in bf16, as published), all `small` ones in one float32 buffer."""

    def __init__(self, large: list[nn.Parameter], small: list[nn.Parameter], world_size: int) -> None:
        self._large, self._small, self._world_size = large, small, world_size
        self._pending: list[Pending] = []

    def start(self) -> None:
        if self._world_size == 1:
            return
        large = [p.grad for p in self._large]
        self._flat = torch.cat([p.grad.float().reshape(-1) for p in self._small])
        wires = [*large, self._flat]
        torch._foreach_mul_(wires, 1 / self._world_size)
        self._pending = [Pending(lambda wire=wire: dist.all_reduce(wire, async_op=True)) for wire in wires]

    def finish(self) -> list[Tensor]:
        """The gradients, averaged; further calls do nothing more."""
        for pending in self._pending:
            pending.wait()
        small = [p.grad for p in self._small]
        if self._pending:
            parts = self._flat.split([g.numel() for g in small])
            torch._foreach_copy_(small, [part.view_as(g) for part, g in zip(parts, small, strict=True)])
        self._pending = []
        return [*(p.grad for p in self._large), *small]


def clip_averaged(own: list[Tensor], replicated: list[Tensor], limit: float, world_size: int) -> None:
    """Scales all gradients by min(1, limit / (norm + 1e-6)), the norm over the banks of all ranks and the rest.

    `own` are a rank's matrices (with padding, which is zero), `replicated` what every rank holds alike.
    """
    squares = _sum_of_squares(own)
    if world_size > 1:
        with contact():
            dist.all_reduce(squares)
    norm = (squares + _sum_of_squares(replicated)).sqrt()
    for group in _by_dtype(own + replicated):
        torch._foreach_mul_(group, (limit / (norm + 1e-6)).clamp(max=1.0))


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    norms = [norm for group in _by_dtype(tensors) for norm in torch._foreach_norm(group, dtype=torch.float32)]
    return torch.stack(norms).square().sum()


def _by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    """One launch handles a list of one dtype; a mixed one takes a launch a tensor."""
    return [[t for t in tensors if t.dtype == dtype] for dtype in dict.fromkeys(t.dtype for t in tensors)]


# ---- agreement -----------------------------------------------------------------------------------------------------


def require_agreement(facts: dict[str, object]) -> None:
    """ConfigError, on every rank, naming the first rank and the first fact that is not as on rank 0."""
    if not dist.is_initialized():
        return
    everyone: list[dict[str, object]] = [{}] * dist.get_world_size()
    with contact():
        dist.all_gather_object(everyone, facts)
    expected = everyone[0]
    for rank, found in enumerate(everyone):
        for name in expected | found:
            if found.get(name) != expected.get(name):
                raise ConfigError(
                    f"rank {rank} has {name} = {found.get(name)!r}: expected {expected.get(name)!r} as on rank 0"
                )
