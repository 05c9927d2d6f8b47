"""What every kernel file signs: found by listing niblick.kernels, judged by the same checks.

The checks are plain functions of a module, because they must also reject the planted faults: `tests/test_X.py` lists
in FAULTS pairs (text, replacement), each is applied to a copy of kernels/X.py, and the checks must fail on the copy.
"""

import gc
import importlib
import importlib.util
import math
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import numerics
import pytest
import torch
import triton
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd.forward_ad import dual_level, make_dual
from torch.testing._internal.optests import OpCheckError
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

import niblick.kernels

FOLDER = Path(niblick.kernels.__path__[0])
KERNELS = sorted(module.name for module in pkgutil.iter_modules([str(FOLDER)]))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON_RUNS = DEVICE == "cuda" or triton.knobs.runtime.interpret
ONCE = pytest.mark.skipif(
    TRITON_RUNS and not torch.cuda.is_available(),
    reason="the same with TRITON_INTERPRET=0, the second half of make test",
)
MAX_BYTES, MAX_FLOPS = (2e9, 2e12) if DEVICE == "cuda" else (2e6, 2e9)
DTYPES = (torch.float32, torch.bfloat16)


def kernel_module(name: str) -> ModuleType:
    return importlib.import_module(f"niblick.kernels.{name}")


def admissible(module: ModuleType, name: str, dtype: torch.dtype) -> list[str]:
    """The names of the sizes small enough to test here; "large" is for the test of offsets alone."""
    sizes = ((key, size) for key, size in module.SIZES.items() if key != "large")
    return [key for key, size in sizes if _fits(getattr(module, f"{name}_cost")(size, dtype))]


def _fits(work: dict[str, int]) -> bool:
    """By bytes, and by operations: a head's float64 logits take no part in its bytes and fill a card all the same."""
    moved, flops = (work[f"{kind}_forward"] + work[f"{kind}_backward"] for kind in ("bytes", "flops"))
    return moved < MAX_BYTES and flops < MAX_FLOPS


def inputs_of(module: ModuleType, name: str, size_name: str, dtype: torch.dtype, seed: int = 0) -> dict[str, object]:
    return getattr(module, f"{name}_inputs")(module.SIZES[size_name], dtype, DEVICE, seed=seed)


# ----------------------------------------------------------------------------------------------------- running an op


@contextmanager
def nan_filled_empties():
    """Uninitialised memory holds NaN (integers: their maximum), so that an element never written is seen."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def noise(output: Tensor, seed: int) -> Tensor:
    """A cotangent whose values every dtype under test holds exactly; of another stream than any input's, with which it
    would share whole rows."""
    generator = torch.Generator(output.device).manual_seed(1000 + seed)
    values = torch.randn(output.shape, generator=generator, device=output.device, dtype=torch.float32)
    return values.bfloat16().to(output.dtype)


def run(
    fn: Callable, inputs: dict[str, object], dtype: torch.dtype | None = None, cotangent: Callable = noise
) -> dict[str, Tensor]:
    """The outputs of fn, as "out0", "out1", ..., and the gradients of its float inputs, as "d_" + their name.

    dtype: cast every floating input to it first (the references). cotangent: (output, index) -> its gradient.
    """
    leaves = {key: _leaf(value, dtype) for key, value in inputs.items()}
    outputs = fn(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"out{i}": output.detach() for i, output in enumerate(outputs)}
    wanted = {key: leaf for key, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
    if wanted:
        sources = [(i, output) for i, output in enumerate(outputs) if output.requires_grad]
        assert sources, "no output carries a gradient although X_inputs asks for one"
        cotangents = [cotangent(output, i) for i, output in sources]
        gradients = torch.autograd.grad([output for _, output in sources], list(wanted.values()), cotangents)
        results |= {f"d_{key}": gradient for key, gradient in zip(wanted, gradients, strict=True)}
    return results


def _leaf(value: object, dtype: torch.dtype | None = None) -> object:
    if not isinstance(value, Tensor):
        return value
    leaf = value.detach()
    return (leaf.to(dtype) if dtype and leaf.is_floating_point() else leaf).requires_grad_(value.requires_grad)


def judge(
    module: ModuleType, what: str, got: dict[str, Tensor], eager: dict[str, Tensor], f64: dict[str, Tensor]
) -> None:
    """Element by element, but for a file that says ROUNDS_BETWEEN: its results hang on 16-bit intermediates."""
    verdict = numerics.assert_like_eager if getattr(module, "ROUNDS_BETWEEN", False) else numerics.assert_matches_f64
    assert got.keys() == eager.keys(), f"{what} gives {list(got)}, the reference {list(eager)}"
    for key in got:
        verdict(f"{what}: {key}", got[key], eager[key], f64[key])


def assert_equal(what: str, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys(), f"{what}: results {list(got)}, expected {list(want)}"
    for key in want:
        same = torch.equal(got[key].nan_to_num(nan=1e30), want[key].nan_to_num(nan=1e30))
        assert same and got[key].dtype == want[key].dtype, f"{what}: {key} differs"


# --------------------------------------------------------------------- the checks, also run on modules with a fault


def check_numerics(module: ModuleType, name: str, size_name: str, dtype: torch.dtype) -> None:
    """Forward and every gradient against float64; every element written; no input changed."""
    inputs = inputs_of(module, name, size_name, dtype)
    reference = getattr(module, f"{name}_ref")
    before = {key: value.detach().clone() for key, value in inputs.items() if isinstance(value, Tensor)}
    with nan_filled_empties():
        got = run(getattr(module, name), inputs)
    for key, value in before.items():
        assert torch.equal(inputs[key].detach(), value), f"{name} changed its input {key}"
    judge(module, f"{name} {size_name} {dtype}", got, run(reference, inputs), run(reference, inputs, torch.float64))


def check_cotangents(module: ModuleType, name: str, size_name: str, dtype: torch.dtype) -> None:
    """An expanded (as from .sum()), strided or transposed grad_output is right."""
    inputs = inputs_of(module, name, size_name, dtype)
    if not any(isinstance(value, Tensor) and value.requires_grad for value in inputs.values()):
        return
    fn, reference = getattr(module, name), getattr(module, f"{name}_ref")
    layouts: dict[str, Callable] = {
        "expanded": lambda output, i: torch.full((), 0.75, dtype=output.dtype, device=DEVICE).expand_as(output),
        "strided": lambda output, i: _strided(noise(output, i)),
        "transposed": lambda output, i: noise(output.mT, i).mT if output.ndim == 2 else noise(output, i),
    }
    for layout, cotangent in layouts.items():
        got, eager = (run(f, inputs, cotangent=cotangent) for f in (fn, reference))
        judge(module, f"{name}, {layout} grad_output", got, eager, run(reference, inputs, torch.float64, cotangent))


def check_inputs(module: ModuleType, name: str, size_name: str, dtype: torch.dtype) -> None:
    """An input in another layout (rows of a wider tensor, every second element) is right, or refused."""
    inputs = inputs_of(module, name, size_name, dtype)
    fn, reference = getattr(module, name), getattr(module, f"{name}_ref")
    eager, f64 = run(reference, inputs), run(reference, inputs, torch.float64)
    for key, value in inputs.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue
        for layout in (_padded, _strided):
            other = layout(value.detach()).requires_grad_(value.requires_grad)
            try:
                got = run(fn, inputs | {key: other})
            except (ValueError, TypeError):
                continue
            judge(module, f"{name}, {layout.__name__[1:]} {key}", got, eager, f64)


def _padded(x: Tensor) -> Tensor:
    """Each row (or the vector) followed by garbage."""
    return torch.cat((x, torch.full_like(x[..., :1], _garbage(x.dtype))), -1)[..., :-1]


def _strided(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, _garbage(x.dtype))), -1)[..., 0]


def _garbage(dtype: torch.dtype) -> float | int:
    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).max


def check_ops(module: ModuleType, name: str, size_name: str, dtype: torch.dtype) -> None:
    """torch.library.opcheck on the calls that the forward and the backward really make; no value read on the host."""
    inputs = inputs_of(module, name, size_name, dtype)
    with _RecordCalls(module.NAMESPACE, name) as recorded:
        results = run(getattr(module, name), inputs)
    assert not recorded.reads, f"{name} makes the host wait for the device: {recorded.reads}"
    has_gradient = any(key.startswith("d_") for key in results)
    ops = sorted(str(op) for op, _, _ in recorded.calls)
    assert len(set(ops)) >= 1 + has_gradient, f"{name} ran the ops {ops}: each direction must be an op of its own"
    for op, args, kwargs in recorded.calls:
        try:
            torch.library.opcheck(op, args, kwargs)
        except OpCheckError as error:
            raise AssertionError(f"opcheck of {op}: {error}") from error


class _RecordCalls(TorchDispatchMode):
    """Notes each call of an op of one namespace (of the forward op, with arguments that ask for their gradients), and
    each op that reads a tensor on the host."""

    def __init__(self, namespace: str, name: str) -> None:
        super().__init__()
        self.namespace, self.forward = namespace, f"{namespace}::{name}"
        self.calls, self.reads = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == self.namespace:
            keep = _leaf if func.name() == self.forward else _detached
            self.calls.append((func, tuple(map(keep, args)), {key: keep(value) for key, value in kwargs.items()}))
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):  # .item(), if tensor:, ...
            self.reads.append(func.name())
        return func(*args, **kwargs)


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value


CHECKS = (check_numerics, check_cotangents, check_inputs)


def every_case() -> list:
    return [
        pytest.param(name, size, dtype, id=f"{name}-{size}-{str(dtype)[6:]}")
        for name in KERNELS
        for dtype in DTYPES
        for size in admissible(kernel_module(name), name, dtype)
    ]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
@pytest.mark.parametrize(("name", "size", "dtype"), every_case())
def test_check(name: str, size: str, dtype: torch.dtype, check: Callable) -> None:
    check(kernel_module(name), name, size, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available() and TRITON_RUNS != (dtype == torch.float32):
        pytest.skip("what is registered is the same in both halves of make test: one dtype in each")
    module = kernel_module(name)
    check_ops(module, name, admissible(module, name, dtype)[0], dtype)


# --------------------------------------------------------------------------------------------- the shape of the file


@pytest.mark.parametrize("name", KERNELS)
def test_sizes_inputs_and_cost(name: str) -> None:
    module = kernel_module(name)
    assert "record" in module.SIZES, f"{name}.SIZES has no record size"
    for key, size in module.SIZES.items():
        assert all(type(n) is int and n >= 0 for n in size), f"{name}.SIZES[{key!r}] = {size}"
    for dtype in DTYPES:
        assert len(admissible(module, name, dtype)) >= 2, f"{name} has fewer than two sizes below {MAX_BYTES:.0e} bytes"
    size_name = admissible(module, name, torch.float32)[0]
    inputs = inputs_of(module, name, size_name, torch.float32)
    again, other = (inputs_of(module, name, size_name, torch.float32, seed) for seed in (0, 1))
    tensors = [key for key, value in inputs.items() if isinstance(value, Tensor)]
    assert all(torch.equal(inputs[key], again[key]) for key in tensors), f"{name}_inputs ignores its seed"
    assert any(not torch.equal(inputs[key], other[key]) for key in tensors), f"{name}_inputs ignores its seed"
    work = getattr(module, f"{name}_cost")(module.SIZES[size_name], torch.float32)
    kinds, directions = ("bytes", "flops"), ("forward", "backward")
    assert work.keys() == {f"{kind}_{direction}" for kind in kinds for direction in directions}
    assert all(type(n) is int for n in work.values())
    has_gradient = any(inputs[key].requires_grad for key in tensors)
    for kind in kinds:
        assert work[f"{kind}_forward"] > 0 and (work[f"{kind}_backward"] > 0) == has_gradient, work


@pytest.mark.parametrize("name", KERNELS)
def test_autocast_changes_nothing(name: str) -> None:
    """An op computes in the dtypes that it is given: autocast reaches into the body of a custom op."""
    module = kernel_module(name)
    inputs = inputs_of(module, name, admissible(module, name, torch.float32)[0], torch.float32)
    fn = getattr(module, name)
    want = run(fn, inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_equal(f"{name} under autocast", run(fn, inputs), want)


@ONCE
@pytest.mark.parametrize("name", KERNELS)
def test_refuses_forward_mode(name: str) -> None:
    """An op without a rule for tangents drops them: the derivative would be 0."""
    module = kernel_module(name)
    inputs = inputs_of(module, name, admissible(module, name, torch.float32)[0], torch.float32)
    primals = {key: _detached(value) for key, value in inputs.items()}
    for key in (key for key, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad):
        with dual_level(), pytest.raises(RuntimeError, match=f"{name}: expected no forward-mode"):
            getattr(module, name)(**primals | {key: make_dual(primals[key], primals[key])})


# ----------------------------------------------------------------------------------------------------- torch.compile


@ONCE
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_whole(name: str) -> None:
    """fullgraph of the public function, both directions; each direction's graph holds the kernel's op."""
    module = kernel_module(name)
    seen: dict[str, set[str]] = {"forward": set(), "backward": set()}

    def note(direction: str) -> Callable:
        def compiler(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
            targets = (node.target for node in graph.graph.nodes)
            seen[direction] |= {target.name() for target in targets if isinstance(target, torch._ops.OpOverload)}
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(fw_compiler=note("forward"), bw_compiler=note("backward"))
    has_gradient = _compare_compiled(module, name, backend)
    op = f"{module.NAMESPACE}::{name}"
    assert op in seen["forward"], f"the forward graph calls {seen['forward']}"
    if has_gradient:
        assert f"{op}_backward" in seen["backward"], f"the backward graph calls {seen['backward']}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_with_inductor(name: str) -> None:
    _compare_compiled(kernel_module(name), name, "inductor")


def _compare_compiled(module: ModuleType, name: str, backend: str | Callable) -> bool:
    torch._dynamo.reset()
    inputs = inputs_of(module, name, admissible(module, name, torch.float32)[0], torch.float32)
    got = run(torch.compile(getattr(module, name), fullgraph=True, backend=backend), inputs)
    reference = getattr(module, f"{name}_ref")
    judge(module, f"compiled {name}", got, run(reference, inputs), run(reference, inputs, torch.float64))
    return any(key.startswith("d_") for key in got)


@pytest.mark.skipif(TRITON_RUNS, reason="needs TRITON_INTERPRET=0; on a card every test compiles")
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_triton_code_compiles_without_a_card(name: str, dtype: torch.dtype, arch: int, tmp_path: Path) -> None:
    """Every launch of both directions, compiled for a compute capability (Ampere, Hopper, Blackwell), not launched."""
    module = load_copy(name, tmp_path, f"sm{arch}")
    card = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    launch = triton.JITFunction.run
    compiled = []

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    with _RecordCalls(module.NAMESPACE, name) as recorded:
        run(getattr(module, name), inputs_of(module, name, admissible(module, name, dtype)[0], dtype))
    triton.runtime.driver.set_active(card)
    try:
        with patch.object(triton.JITFunction, "run", compile_only):
            for op, args, kwargs in recorded.calls:
                launcher = module._backward if op.name().endswith("_backward") else module._forward
                launcher(*args, **kwargs)
    finally:
        triton.runtime.driver.set_active(None)  # as it was: Triton looks for a card when it first needs one
    assert compiled and all(kernel.asm["cubin"] for kernel in compiled), f"{name} launched no Triton kernel"


# -------------------------------------------------------------------------------------------------------------- lift


def load_copy(name: str, folder: Path, prefix: str, *edits: tuple[str, str]) -> ModuleType:
    """kernels/<name>.py, copied alone and imported as <prefix>_<name>, with texts replaced."""
    source = (FOLDER / f"{name}.py").read_text()
    for old, new in edits:
        assert source.count(old) == 1, f"{name}.py holds the text to edit {source.count(old)} times: {old!r}"
        assert old != new, f"the edit changes nothing: {old!r}"
        source = source.replace(old, new)
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"{prefix}_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TWICE = """
def _twice(launcher):
    @wraps(launcher)
    def run(*args):
        return torch.utils._pytree.tree_map(lambda t: 2 * t, launcher(*args))

    return run
"""


@ONCE
@pytest.mark.parametrize("name", KERNELS)
def test_lifts(name: str, tmp_path: Path) -> None:
    """The file alone, niblick out of reach, gives the same bits; and neither it nor an edited copy, whose forward op
    gives twice the results, disturbs another file's op."""
    module = kernel_module(name)
    inputs = {dtype: inputs_of(module, name, admissible(module, name, dtype)[0], dtype) for dtype in DTYPES}
    want = {dtype: run(getattr(module, name), inputs[dtype]) for dtype in DTYPES}
    out_of_reach = {key: None for key in sys.modules if key.split(".")[0] == "niblick"}
    with patch.dict(sys.modules, out_of_reach):
        lifted = load_copy(name, tmp_path, "lifted")
        edited = load_copy(
            name, tmp_path, "edited-é",  # no identifier, which the name of an op must be
            ("\n_op = torch.library", f"{TWICE}\n_op = torch.library"),
            (f'::{name}", _forward,', f'::{name}", _twice(_forward),'),
            ('_op.register_kernel("cpu")', '(lambda kernel: _op.register_kernel("cpu")(_twice(kernel)))'),
        )  # fmt: skip
    for dtype in DTYPES:
        for who, file in {"lifted": lifted, "niblick's": module}.items():
            assert_equal(f"{who} {name}", run(getattr(file, name), inputs[dtype]), want[dtype])
        forward = {key: _detached(value) for key, value in inputs[dtype].items()}  # a backward may index by its results
        twice = {key: 2 * value for key, value in want[dtype].items() if key.startswith("out")}
        assert_equal(f"edited {name}", run(getattr(edited, name), forward), twice)


@ONCE
@pytest.mark.parametrize("name", KERNELS)
def test_proves_itself_when_run(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_bytes((FOLDER / f"{name}.py").read_bytes())
    (tmp_path / "niblick.py").write_text("raise ImportError('a lifted file must not need niblick')\n")
    eager = os.environ | {"TRITON_INTERPRET": "0"}  # interpreted, it would only repeat test_check, slowly
    words = [sys.executable, f"{name}.py"]
    done = subprocess.run(words, cwd=tmp_path, env=eager, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout and "float64" in done.stdout, f"expected the error against float64, got {done.stdout!r}"


# ---------------------------------------------------------------------------------------------------- planted faults


@cache
def faults_of(name: str) -> list[tuple[str, str]]:
    if importlib.util.find_spec(f"test_{name}") is None:
        return []  # test_lists_faults says so
    return importlib.import_module(f"test_{name}").FAULTS  # which must not import this module: it would be half read


@pytest.mark.parametrize("name", KERNELS)
def test_lists_faults(name: str) -> None:
    assert len(faults_of(name)) >= 3, f"tests/test_{name}.py must list planted faults in FAULTS"


@pytest.mark.skipif(not TRITON_RUNS, reason="the eager CPU path: a fault in Triton code is not executed")
@pytest.mark.parametrize(("name", "number"), [(name, i) for name in KERNELS for i in range(len(faults_of(name)))])
def test_planted_fault_is_rejected(name: str, number: int, tmp_path: Path) -> None:
    old, new = faults_of(name)[number]
    faulty = load_copy(name, tmp_path, f"fault{number}", (old, new))
    assert rejected(faulty, name), f"the contract accepts {name}.py with {old!r} replaced by {new!r}"


def rejected(module: ModuleType, name: str) -> bool:
    """Whether a check fails, and by its assertion: a fault that crashes would prove nothing about the tolerances.

    The trials are among those of the tests above, the likeliest and cheapest first.
    """
    sizes = {size: None for dtype in DTYPES for size in admissible(module, name, dtype)}
    trials = [
        (check_numerics, dtype, size) for size in sizes for dtype in DTYPES if size in admissible(module, name, dtype)
    ]
    small = [(dtype, admissible(module, name, dtype)[0]) for dtype in DTYPES]
    trials += [(check, *case) for check in (check_ops, check_cotangents, check_inputs) for case in small]
    for check, dtype, size in trials:
        try:
            check(module, name, size, dtype)
        except AssertionError:
            return True
    return False


# ---------------------------------------------------------------------------------------------------- only on a card


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_repeats_bitwise(name: str) -> None:
    module = kernel_module(name)
    inputs = inputs_of(module, name, admissible(module, name, torch.bfloat16)[-1], torch.bfloat16)
    fn = getattr(module, name)
    assert_equal(f"{name} run twice", run(fn, inputs), run(fn, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_cuda_graph_replays(name: str) -> None:
    """Captured on one input, replayed on another: the same bits as eager."""
    module = kernel_module(name)
    fn = getattr(module, name)
    size = admissible(module, name, torch.bfloat16)[0]
    first, second = (inputs_of(module, name, size, torch.bfloat16, seed) for seed in (0, 1))
    outputs = fn(**first)
    cotangents = [noise(output, i) for i, output in enumerate(outputs if isinstance(outputs, tuple) else (outputs,))]

    def step(inputs: dict[str, object]) -> dict[str, Tensor]:
        return run(fn, inputs, cotangent=lambda output, i: cotangents[i])

    want = step(second)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(first)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(first)
    with torch.no_grad():
        for key, value in second.items():
            if isinstance(value, Tensor):
                first[key].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(f"replayed {name}", got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in KERNELS if "large" in kernel_module(name).SIZES])
def test_offsets_beyond_int32(name: str) -> None:
    """More than 2^31 elements: the first rows and the last, whose offsets are beyond, against the same rows by
    themselves. What is summed over all rows, such as a weight's gradient, is left out."""
    module = kernel_module(name)
    size, n = module.SIZES["large"], module.SIZES["large"][0]
    assert math.prod(size[:2]) > 2**31, f"{name}.SIZES['large'] has fewer than 2^31 elements"
    needed = 24 * math.prod(size[:2])  # six float32 copies
    gc.collect()  # what the test before holds would count as taken
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs about {needed / 2**30:.0f} GiB of free GPU memory")
    inputs = inputs_of(module, name, "large", torch.bfloat16)
    got = run(getattr(module, name), inputs)
    # A row may see its neighbours: the one at the cut is not compared.
    for rows, inner in ((slice(0, END), slice(0, -1)), (slice(n - END, n), slice(1, None))):
        part = {key: _rows_of(value, n, rows) for key, value in inputs.items()}
        eager, f64 = (
            run(getattr(module, f"{name}_ref"), part, dtype, lambda _, i: noise(got[f"out{i}"], i)[rows])  # noqa: B023
            for dtype in (None, torch.float64)
        )
        for key in (key for key in got if got[key].shape[:1] == (n,)):
            here = f"{name} large, rows from {rows.start}: {key}"
            numerics.assert_matches_f64(here, got[key][rows][inner], eager[key][inner], f64[key][inner])


END = 4000  # rows compared at either end


def _rows_of(value: object, n: int, rows: slice) -> object:
    if not isinstance(value, Tensor) or value.shape[:1] != (n,):
        return value
    return value.detach()[rows].requires_grad_(value.requires_grad)
