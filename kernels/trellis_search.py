"""The best path of a trellis code through a row of targets: the search of dependent (trellis) quantisation.

Along a row each integer's parity is forced by a state of v = log2(states) bits b_0 .. b_{v-1}, and the integer moves it
(Ungerboeck's rate-1/2 codes, h0 and h1 the parity polynomials); from the state 0,

    z mod 2 = b_0,   z1 = floor(z / 2) mod 2,   b_i <- b_{i+1} xor h0_{i+1} b_0 xor h1_{i+1} z1   (b_v = 0)

Of all rows of integers |z| <= largest that obey this, the one with the least sum of (t - z)^2 is returned, t the row of
targets, limited to largest + 4. Of two ways into a state that are as good the one with z1 = 0 is taken, and in the end
the lowest of equal states, so the answer is unique, and the arithmetic is in integers: every machine gives the same.

targets (n_rows, T) int32, in 1/128 of a step, contiguous, T <= 512. Returns (n_rows, T) int8, without gradient.

Must move: 4 bytes in and 1 out a target. Time is latency: T turns of a recurrence (Viterbi's algorithm) and T more on
the way back, each a few dozen cycles, so a launch should have as many rows as there are; one warp a row, a state a
thread. Way back: a turn's decisions, one bit a state, are an int32 in scratch memory. A state's two predecessors follow
from it (h0_v = 1 and h1_v = 0, so its highest bit is the b_0 before), and no table is read:

    b_0 = b'_{v-1},    b_{i+1} = b'_i xor h0_{i+1} b_0 xor h1_{i+1} z1

Distances: at most 8 steps, 2^10; a square 2^20, a row's sum 2^29. Replaces a loop of T small kernels.
Refuses: other code sizes than 8 and 32 states, longer rows, another layout.

Source: Viterbi 1967, Ungerboeck 1982; as dependent quantisation Marcellin and Fischer 1990 (TCQ).
"""

import re
from collections.abc import Callable
from functools import wraps

import torch
import triton
import triton.language as tl
from torch import Tensor

# A lifted copy has ops of its own, so that it may stand beside the package.
NAMESPACE = "niblick" if __name__.startswith("niblick.") else "niblick_" + re.sub(r"\W", "_", __name__, flags=re.A)
POLYNOMIALS = {8: (0o13, 0o04), 32: (0o45, 0o10)}  # states -> h0, h1
FRACTION = 7  # bits behind the point of a target
MARGIN = 4  # steps beyond largest to which a target is limited
MAX_TARGETS = 512  # a row's: its sum of squares stays below UNREACHED
UNREACHED = 1 << 29  # of a state that no path has reached yet


def trellis_search_ref(targets: Tensor, largest: int = 31, states: int = 8) -> Tensor:
    """The formula above in plain PyTorch, all rows at once."""
    n_rows, T = targets.shape
    h0, h1 = POLYNOMIALS[states]
    limit = (largest + MARGIN) << FRACTION
    state = torch.arange(states, device=targets.device)
    z0 = state // (states // 2)  # the forced parity on the way into each state
    before = [((state ^ (h0 >> 1) * z0 ^ (h1 >> 1) * z1) % (states // 2)) * 2 + z0 for z1 in (0, 1)]
    total = torch.full((n_rows, states), UNREACHED, dtype=torch.int32, device=targets.device)
    total[:, 0] = 0
    ways, integers = [], []
    for t in targets.clamp(-limit, limit).int().unbind(1):
        z = torch.stack([_nearest(t[:, None], z0 + 2 * z1, largest) for z1 in (0, 1)])  # (2, n_rows, states)
        cost = (t[:, None] - (z << FRACTION)).square() + torch.stack([total[:, b] for b in before])
        ways.append((cost[1] < cost[0]).long())
        integers.append(z)
        total = cost.amin(0).int()
    row = torch.arange(n_rows, device=targets.device)
    last = total.min(1, keepdim=True).values
    place = (total == last).int().argmax(1)  # the first of equals
    path = []
    for way, z in zip(reversed(ways), reversed(integers), strict=True):
        z1 = way[row, place]
        path.append(z[z1, row, place])
        place = torch.stack(before)[z1, place]
    return torch.stack(path[::-1], 1).to(torch.int8) if T else targets.to(torch.int8)


def _nearest(t: Tensor, coset: Tensor, largest: int) -> Tensor:
    """The integer z = coset (mod 4), |z| <= largest, nearest to t."""
    z = coset + 4 * ((t - (coset << FRACTION) + (2 << FRACTION)) >> (FRACTION + 2))
    low, high = -largest + (coset + largest) % 4, largest - (largest - coset) % 4
    return torch.minimum(torch.maximum(z, low), high)


@triton.jit
def _nearest_in_coset(t, coset, LARGEST: tl.constexpr, FRACTION: tl.constexpr):
    # Both remainders are of numbers that are not negative: |coset| <= 3 and 4 LARGEST is added to the second.
    z = coset + 4 * ((t - (coset << FRACTION) + (2 << FRACTION)) >> (FRACTION + 2))
    low = -LARGEST + (coset + LARGEST) % 4
    high = LARGEST - (5 * LARGEST - coset + 4) % 4
    return tl.minimum(tl.maximum(z, low), high)


@triton.jit
def _trellis_search_kernel(
    targets_ptr,  # (n_rows, T) int32
    ways_ptr,  # (n_rows, T) int32: bit s is set where state s is better reached with z1 = 1
    z_ptr,  # (n_rows, T) int8
    T: tl.constexpr,
    LARGEST: tl.constexpr,
    LIMIT: tl.constexpr,
    FRACTION: tl.constexpr,
    UNREACHED: tl.constexpr,
    H0: tl.constexpr,
    H1: tl.constexpr,
    STATES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * T
    HALF: tl.constexpr = STATES // 2
    state = tl.arange(0, STATES)
    z0 = state // HALF
    before0 = ((state ^ (H0 >> 1) * z0) % HALF) * 2 + z0
    before1 = ((state ^ (H0 >> 1) * z0 ^ (H1 >> 1)) % HALF) * 2 + z0
    total = tl.where(state == 0, 0, UNREACHED)
    t = tl.load(targets_ptr + first)
    for turn in range(T):
        following = tl.load(targets_ptr + first + turn + 1, mask=turn + 1 < T, other=0)  # its way here takes a turn
        t = tl.minimum(tl.maximum(t, -LIMIT), LIMIT)
        distance0 = t - (_nearest_in_coset(t, z0, LARGEST, FRACTION) << FRACTION)
        distance1 = t - (_nearest_in_coset(t, z0 + 2, LARGEST, FRACTION) << FRACTION)
        cost0 = tl.gather(total, before0, axis=0) + distance0 * distance0
        cost1 = tl.gather(total, before1, axis=0) + distance1 * distance1
        ways = tl.sum(tl.where(cost1 < cost0, 1, 0) << state, axis=0)
        tl.store(ways_ptr + first + turn, ways)
        total = tl.minimum(cost0, cost1)
        t = following
    tl.debug_barrier()  # the way back reads what other threads of the warp may have stored
    best = tl.min(total, axis=0)
    place = tl.min(tl.where(total == best, state, STATES), axis=0)
    for back in range(T):
        turn = T - 1 - back
        t = tl.minimum(tl.maximum(tl.load(targets_ptr + first + turn), -LIMIT), LIMIT)
        z1 = (tl.load(ways_ptr + first + turn) >> place) & 1
        parity = place // HALF
        z = _nearest_in_coset(t, parity + 2 * z1, LARGEST, FRACTION)
        tl.store(z_ptr + first + turn, z.to(tl.int8))
        place = ((place ^ (H0 >> 1) * parity ^ (H1 >> 1) * z1) % HALF) * 2 + parity


# Under TRITON_INTERPRET=1 the decorator above gave an interpreted function, and the CPU runs the Triton code itself.
INTERPRETED = not isinstance(_trellis_search_kernel, triton.runtime.JITFunction)


def _as_given(launcher: Callable) -> Callable:
    """On the device of the arguments, where Triton takes the current one, and in their dtypes, autocast or not."""

    @wraps(launcher)
    def run(*args, **kwargs):
        flat = (t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else (arg,)))
        tensor = next(t for t in flat if isinstance(t, Tensor))
        with torch.cuda.device_of(tensor), torch.autocast(tensor.device.type, enabled=False):
            return launcher(*args, **kwargs)

    return run


@_as_given
def _forward(targets: Tensor, largest: int, states: int) -> Tensor:
    n_rows, T = targets.shape
    z = torch.empty((n_rows, T), dtype=torch.int8, device=targets.device)
    if n_rows and T:
        h0, h1 = POLYNOMIALS[states]
        ways = torch.empty((n_rows, T), dtype=torch.int32, device=targets.device)
        _trellis_search_kernel[(n_rows,)](
            targets, ways, z, T, largest, (largest + MARGIN) << FRACTION, FRACTION, UNREACHED, h0, h1, states,
            num_warps=1,
        )  # fmt: skip
    return z


@_as_given
def _forward_eager(targets: Tensor, largest: int, states: int) -> Tensor:
    return trellis_search_ref(targets, largest, states)


_op = torch.library.custom_op(f"{NAMESPACE}::trellis_search", _forward, mutates_args=(), device_types="cuda")
_op.register_kernel("cpu")(_forward if INTERPRETED else _forward_eager)


@_op.register_fake
def _forward_fake(targets, largest, states):
    return targets.new_empty(targets.shape, dtype=torch.int8)


def trellis_search(targets: Tensor, largest: int = 31, states: int = 8) -> Tensor:
    """The integers of the best path through each row of targets; see the top of the file.

    Args:
        targets: (n_rows, T) int32, in 1/128 of a step, contiguous, T <= 512.
        largest: 2 to 127, of |z|.
        states: 8 or 32.

    Returns: (n_rows, T) int8, without gradient.
    Raises: TypeError for a dtype or an argument of another type, ValueError for a shape, strides or a number out of
    range.
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"trellis_search: targets must be a tensor, got {targets!r}")
    if targets.dtype != torch.int32:
        raise TypeError(f"trellis_search: targets must be torch.int32, got {targets.dtype}")
    if targets.ndim != 2 or targets.shape[1] > MAX_TARGETS:
        raise ValueError(
            f"trellis_search: targets must be (n_rows, T) with T <= {MAX_TARGETS}, got {tuple(targets.shape)}"
        )
    if not targets.is_contiguous():
        raise ValueError(f"trellis_search: targets must be contiguous, got strides {targets.stride()}")
    for name, value in (("largest", largest), ("states", states)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"trellis_search: {name} must be an integer, got {value!r}")
    if not 2 <= largest <= 127:
        raise ValueError(f"trellis_search: largest must be in [2, 127], got {largest}")
    if states not in POLYNOMIALS:
        raise ValueError(f"trellis_search: states must be one of {list(POLYNOMIALS)}, got {states}")
    return _op(targets, largest, states)


# --- not needed when lifted ---

# (n_rows, T, largest, states). A column of the up-projections of eleven layers is 44 rows of 512; the record sizes are
# of more, as a card takes 1024 rows in the time of one.
SIZES = {
    "odd": (3, 19, 31, 8),
    "more states": (2, 13, 127, 32),
    "narrow": (3, 12, 2, 8),
    "one": (1, 1, 5, 32),
    "record": (1024, 512, 31, 8),
    "record, 32 states": (1024, 512, 31, 32),
}


def trellis_search_inputs(size: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, object]:
    """Targets of a standard deviation of a third of `largest`; the first row reaches far beyond it, the second lies on
    integers and halves, where distances are equal. dtype plays no part."""
    n_rows, T, largest, states = size
    generator = torch.Generator(device).manual_seed(seed)
    targets = torch.randn((n_rows, T), generator=generator, device=device) * (largest / 3 * 2**FRACTION)
    targets[0] *= 5
    targets[1:2] = (targets[1:2] / 2 ** (FRACTION - 1)).round() * 2 ** (FRACTION - 1)
    return {"targets": targets.round().int(), "largest": largest, "states": states}


def trellis_search_cost(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    """Targets and integers once; two candidates a state and target, of some 12 operations each."""
    n_rows, T, _, states = size
    return {
        "bytes_forward": 5 * n_rows * T,
        "bytes_backward": 0,
        "flops_forward": 24 * n_rows * T * states,
        "flops_backward": 0,
    }


def _prove(fn: Callable, ref: Callable, make_inputs: Callable, cost: Callable, sizes: dict) -> None:
    """Print the error against float64 beside eager's and, on a GPU, the speed at the record size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{fn.__name__}: largest error against float64, of the largest value (eager's), per result")
    for dtype in (torch.float32, torch.bfloat16):
        for size in list(sizes.values())[:2]:
            inputs = make_inputs(size, dtype, device)
            doubled = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in _floats(inputs).items()}
            truth = _results(ref, inputs | doubled)
            ours, eagers = ([_error(r, t) for r, t in zip(_results(f, inputs), truth, strict=True)] for f in (fn, ref))
            print(f"  {size} {dtype}:", ", ".join(f"{a:.1e} ({b:.1e})" for a, b in zip(ours, eagers, strict=True)))
    if device == "cpu":
        print("no GPU here: nothing timed")
        return
    inputs, work = make_inputs(sizes["record"], torch.bfloat16, device), cost(sizes["record"], torch.bfloat16)
    source = torch.empty(2**30, dtype=torch.uint8, device=device).random_()
    roof = 2 * source.numel() / triton.testing.do_bench(source.clone, return_mode="median")
    leaves = [v for v in _floats(inputs).values() if v.requires_grad]
    ones = [torch.ones_like(output) for output in _outputs(fn, inputs)]
    calls = {"forward": lambda: fn(**inputs)}
    if leaves:
        calls["forward + backward"] = lambda: torch.autograd.grad(_outputs(fn, inputs), leaves, ones)
    for directions, call in calls.items():
        ms = triton.testing.do_bench(call, return_mode="median")
        moved, flops = (sum(work[f"{what}_{d}"] for d in directions.split(" + ")) / ms for what in ("bytes", "flops"))
        speed = f"{moved / 1e9:.2f} TB/s ({moved / roof:.0%} of a copy's), {flops / 1e9:.0f} TFLOP/s"
        print(f"{directions} {sizes['record']}: {ms:.3f} ms, {speed}")


def _floats(inputs: dict[str, object]) -> dict[str, Tensor]:
    return {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}


def _outputs(fn: Callable, inputs: dict[str, object]) -> list[Tensor]:
    outputs = fn(**inputs)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def _results(fn: Callable, inputs: dict[str, object]) -> list[Tensor]:
    outputs, leaves = _outputs(fn, inputs), [v for v in _floats(inputs).values() if v.requires_grad]
    gradients = torch.autograd.grad(sum(output.sum() for output in outputs), leaves) if leaves else ()
    return [output.detach() for output in outputs] + list(gradients)


def _error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).abs().max() / truth.abs().max())


if __name__ == "__main__":
    _prove(trellis_search, trellis_search_ref, trellis_search_inputs, trellis_search_cost, SIZES)
