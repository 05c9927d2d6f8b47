"""How long a contender's forward and backward take on the device, contenders taking turns.

events  CUDA events around each direction of a call. A sleep kernel goes ahead of the first event, so that the launches
        are queued before the device reaches them: what is timed is the device, not the pace of the CPU. (A contender
        whose host code waits for the device is timed with its waits.)
graph   For calls below GRAPH_BELOW_S: a CUDA graph of one call on every input set, replayed between events and divided
        by the number of calls; one graph of forwards, one of both directions, whose difference is the backward.
clock   time.perf_counter, on a CPU.
"""

import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

GRAPH_BELOW_S = 1e-4
CYCLES_PER_S = 2e9
"""Of the sleep kernel; that a card's clock is a little slower only lengthens the head start."""
WARM_UP_CALLS = 3

Inputs = dict[str, object]
Outputs = tuple[Tensor, ...]


class Calls:
    """One contender on rotated input sets.

    fn: called with a set's entries as keyword arguments; gives a tensor, a tuple, or None.
    overwrites: it destroys its inputs, so each call gets a fresh copy (made outside the time).
    direct: it returns the gradients itself, so that there is no backward to call.
    """

    def __init__(self, fn: Callable, sets: list[Inputs], *, overwrites: bool = False, direct: bool = False) -> None:
        self.fn, self.sets = fn, sets
        self._scratch = _copy(sets[0]) if overwrites else None
        self._direct = direct
        self._cotangents: dict[int, list[Tensor]] = {}

    def inputs(self, turn: int) -> Inputs:
        chosen = self.sets[turn % len(self.sets)]
        if self._scratch is None:
            return chosen
        with torch.no_grad():
            for key, value in chosen.items():
                if isinstance(value, Tensor):
                    self._scratch[key].copy_(value)
        return self._scratch

    def forward(self, inputs: Inputs) -> Outputs:
        outputs = self.fn(**inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def has_backward(self, inputs: Inputs) -> bool:
        return not self._direct and bool(_leaves(inputs))

    def backward(self, inputs: Inputs, outputs: Outputs, turn: int) -> Outputs:
        sources = [output for output in outputs if output.requires_grad]
        return torch.autograd.grad(sources, _leaves(inputs), self.cotangents(sources, turn))

    def cotangents(self, sources: list[Tensor], turn: int) -> list[Tensor]:
        """The same for every contender: 1 for a loss, noise otherwise, another for every input set."""
        key = turn % len(self.sets)
        if key not in self._cotangents:
            self._cotangents[key] = [_cotangent(output, 100 * key + i) for i, output in enumerate(sources)]
        return self._cotangents[key]

    def results(self, turn: int = 0) -> list[Tensor]:
        """Outputs, then gradients."""
        inputs = self.inputs(turn)
        outputs = self.forward(inputs)
        gradients = self.backward(inputs, outputs, turn) if self.has_backward(inputs) else ()
        return [result.detach() for result in (*outputs, *gradients)]


class Timer(Protocol):
    method: str
    seconds: dict[str, list[float]]

    def measure(self, turn: int) -> None:
        """One call (or one replay), noted in `seconds` by direction."""


def timer_for(calls: Calls, device: torch.device, *, graph: bool) -> Timer:
    """The timer of one contender, warmed up. Whatever the contender raises, it raises here."""
    with_cotangents = len(calls.sets) if calls.has_backward(calls.sets[0]) else 0  # every set's are made here
    for turn in range(max(WARM_UP_CALLS, with_cotangents)):
        calls.results(turn)
    if device.type != "cuda":
        return ClockTimer(calls)
    return GraphTimer(calls) if graph else EventTimer(calls)


def interleave(timers: dict[str, Timer], rounds: int) -> None:
    """Every contender once a round, the order turned by one each round; each call on the next input set, not on the one
    that the contender before has just brought into the L2."""
    names = list(timers)
    for turn in range(rounds):
        first = turn % len(names)
        for i, name in enumerate(names[first:] + names[:first]):
            timers[name].measure(turn * len(names) + i)


class ClockTimer:
    method = "clock"

    def __init__(self, calls: Calls) -> None:
        self._calls, self.seconds = calls, {}

    def measure(self, turn: int) -> None:
        inputs = self._calls.inputs(turn)
        times = [time.perf_counter()]
        outputs = self._calls.forward(inputs)
        times.append(time.perf_counter())
        if self._calls.has_backward(inputs):
            self._calls.backward(inputs, outputs, turn)
            times.append(time.perf_counter())
        _note(self.seconds, times[1] - times[0], times[-1] - times[0], backward=len(times) == 3)


class EventTimer:
    method = "events"

    def __init__(self, calls: Calls) -> None:
        self._calls, self.seconds = calls, {}
        torch.cuda.synchronize()
        start = time.perf_counter()
        calls.results(WARM_UP_CALLS)
        self._head_start_s = 2 * (time.perf_counter() - start)
        torch.cuda.synchronize()
        self._head_start_s = min(self._head_start_s, 0.02)  # of those that wait for the device, it is device time

    def measure(self, turn: int) -> None:
        inputs = self._calls.inputs(turn)
        events = _events()
        torch.cuda._sleep(int(self._head_start_s * CYCLES_PER_S))
        times = [next(events)]
        outputs = self._calls.forward(inputs)
        times.append(next(events))
        if self._calls.has_backward(inputs):
            self._calls.backward(inputs, outputs, turn)
            times.append(next(events))
        forward, both = _elapsed(times[0], times[1]), _elapsed(times[0], times[-1])
        _note(self.seconds, forward, both, backward=len(times) == 3)


class GraphTimer:
    method = "graph"

    def __init__(self, calls: Calls) -> None:
        self._calls, self.seconds = calls, {}
        self._has_backward = calls.has_backward(calls.sets[0])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for turn in range(len(calls.sets)):  # cotangents are made here, and lazy libraries start
                calls.results(turn)
        torch.cuda.current_stream().wait_stream(stream)
        self._forward = self._capture(backward=False)
        self._both = self._capture(backward=True) if self._has_backward else None

    def _capture(self, backward: bool) -> torch.cuda.CUDAGraph:
        graph, kept = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            for turn, inputs in enumerate(self._calls.sets):
                outputs = self._calls.forward(inputs)
                # Kept, or a few buffers would serve all calls, and their writes would stay in the L2.
                kept.append((outputs, self._calls.backward(inputs, outputs, turn) if backward else ()))
        return graph

    def measure(self, turn: int) -> None:
        events = _events()
        torch.cuda._sleep(int(1e-3 * CYCLES_PER_S))
        times = [next(events)]
        self._forward.replay()
        times.append(next(events))
        both = 0.0
        if self._both:
            self._both.replay()
            times.append(next(events))
            both = _elapsed(times[1], times[2])
        n = len(self._calls.sets)
        _note(self.seconds, _elapsed(times[0], times[1]) / n, both / n, backward=self._both is not None)


def _note(seconds: dict[str, list[float]], forward: float, both: float, *, backward: bool) -> None:
    noted = {"forward": forward} | ({"backward": both - forward, "both": both} if backward else {})
    for direction, value in noted.items():
        seconds.setdefault(direction, []).append(value)


def _events() -> Iterator[torch.cuda.Event]:
    while True:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        yield event


def _elapsed(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _leaves(inputs: Inputs) -> list[Tensor]:
    return [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]


def _copy(inputs: Inputs) -> Inputs:
    def copy(value: object) -> object:
        return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    return {key: copy(value) for key, value in inputs.items()}


def _cotangent(output: Tensor, seed: int) -> Tensor:
    if output.ndim == 0:
        return torch.ones_like(output)
    generator = torch.Generator(output.device).manual_seed(seed)
    return torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
