"""The house's rules about source text: who imports whom, who reads the environment, what importing does, and that what
is copied between files stays the same.

Each rule is a function from source text to a list of complaints, so that it can be shown to complain.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS_SEEN_BY = {
    "kernels": set(),
    "data": {"data"},
    "model": {"model", "kernels"},
    "artifact": {"artifact", "model", "kernels"},
    "evaluation": {"evaluation", "model", "kernels", "data", "artifact"},
    "bench": {"bench", "kernels", "model", "data", "artifact", "evaluation"},
    "scripts": {"kernels", "model", "data", "artifact", "evaluation"},
}
# The libraries a room may import (rooms not named: any), and those that single functions of it may, when called.
LIBRARIES = {"kernels": {"torch", "triton"}, "data": {"numpy", "sentencepiece", "torch"}}
WHEN_CALLED = {"data": {"brotli", "huggingface_hub", "tyro"}}  # a yardstick, the download and its command line
LOOK_IN = {"bench", "tests", "train", "evaluate"}  # they import; nothing imports them
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
SETTING_OF_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # a deterministic run must set it, before CUDA starts
# Parts that every kernel file has under the same name, for its own operation. All other functions that two kernel files
# share are copies, and must stay the same.
PARTS_OF_A_KERNEL_FILE = {
    "_forward", "_backward", "_forward_eager", "_backward_eager", "_forward_cpu", "_backward_cpu",
    "_forward_fake", "_backward_fake", "_setup_context", "_autograd", "_launch",
}  # fmt: skip


def sources(room: str) -> list[Path]:
    if room == "scripts":
        return [path for path in (ROOT / "train.py", ROOT / "evaluate.py") if path.exists()]
    return sorted((ROOT / room).rglob("*.py"))


FILES = [pytest.param(room, path, id=str(path.relative_to(ROOT))) for room in ROOMS_SEEN_BY for path in sources(room)]


# ------------------------------------------------------------------------------------------------------------- rules


def import_complaints(room: str, text: str) -> list[str]:
    complaints = []
    tree = ast.parse(text)
    inside = {inner for outer in ast.walk(tree) if isinstance(outer, ast.FunctionDef) for inner in ast.walk(outer)}
    for node in ast.walk(tree):
        libraries = LIBRARIES.get(room, set()) | (WHEN_CALLED.get(room, set()) if node in inside else set())
        if isinstance(node, ast.ImportFrom) and node.level:
            complaints.append(f"line {node.lineno}: relative import; import by the full name")
            continue
        for name in _imported(node):
            first, *rest = name.split(".")
            if first in sys.stdlib_module_names:
                continue
            elif first in LOOK_IN:
                complaints.append(f"line {node.lineno}: imports {name}, which nothing imports")
            elif first == "niblick" and (not rest or rest[0] not in ROOMS_SEEN_BY[room]):
                complaints.append(f"line {node.lineno}: {room} may not import {name}")
            elif first != "niblick" and room in LIBRARIES and first not in libraries:
                complaints.append(f"line {node.lineno}: {room} may not import the library {name}")
    return complaints


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def environment_complaints(text: str, allowed: set[str]) -> list[str]:
    """Statements that touch the environment, except those that name some of the allowed variables and no others."""
    complaints = []
    for statement in ast.walk(ast.parse(text)):
        nodes = list(_of_statement(statement)) if isinstance(statement, ast.stmt) else []
        if not any(map(_is_environment, nodes)):
            continue
        strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        variables = {string for string in strings if string.isupper()}
        if not variables or not variables <= allowed:
            complaints.append(f"line {statement.lineno}: touches the environment: {sorted(variables)}")
    return complaints


def _of_statement(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it, but not the statements below it."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.stmt):
            yield from _of_statement(child)


def _is_environment(node: ast.AST) -> bool:
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    if isinstance(node, ast.ImportFrom) and node.module == "os":
        return any(alias.name in names for alias in node.names)
    return isinstance(node, ast.Attribute) and node.attr in names


def functions(text: str) -> dict[str, str]:
    """The top-level functions of a file, as their syntax."""
    return {node.name: ast.dump(node) for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def copy_complaints(files: dict[str, dict[str, str]], own: set[str]) -> list[str]:
    """Functions of one name in several files, which differ and are not in own."""
    complaints, seen = [], {}
    for file, bodies in files.items():
        for name, body in bodies.items():
            first, first_body = seen.setdefault(name, (file, body))
            if body != first_body and name not in own:
                complaints.append(f"{name} differs between {first} and {file}")
    return complaints


def tolerance_complaints(text: str) -> list[str]:
    keywords = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.keyword))
    return [f"line {node.value.lineno}: {node.arg}=" for node in keywords if node.arg in ("atol", "rtol")]


def union_complaints(text: str) -> list[str]:
    """isinstance(x, int | float): torch 2.9's Dynamo cannot trace a union, in a function that must compile whole."""
    calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and len(node.args) == 2)
    asked = (node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "isinstance")
    return [f"line {node.lineno}: a union" for node in asked if isinstance(node.args[1], ast.BinOp)]


# ------------------------------------------------------------------------------------------------ the rules, applied


@pytest.mark.parametrize(("room", "path"), FILES)
def test_imports_point_one_way(room: str, path: Path) -> None:
    assert not import_complaints(room, path.read_text())


@pytest.mark.parametrize(("room", "path"), FILES)
def test_environment_is_left_alone(room: str, path: Path) -> None:
    allowed = {*LAUNCHER, SETTING_OF_CUBLAS} if path == ROOT / "train.py" else set()
    assert not environment_complaints(path.read_text(), allowed)


def test_rooms_are_namespace_portions() -> None:
    """A top-level package named kernels would shadow Hugging Face's, with which the field loads FlashAttention-3."""
    assert sources("kernels"), f"no kernels under {ROOT}"
    assert not [path for room in ROOMS_SEEN_BY for path in sources(room) if path.name == "__init__.py"]


def test_copies_in_kernel_files_agree() -> None:
    files = {path.name: functions(path.read_text()) for path in sources("kernels")}
    assert not copy_complaints(files, PARTS_OF_A_KERNEL_FILE)


def test_copies_in_data_and_model_agree() -> None:
    """Neither may import the other; what both need is copied, into files of the same name."""
    for path in sources("data"):
        twin = ROOT / "model" / path.name
        if twin.exists():
            files = {f"{file.parent.name}/{file.name}": functions(file.read_text()) for file in (path, twin)}
            assert not copy_complaints(files, set())


@pytest.mark.parametrize("path", sorted(path for path in (ROOT / "tests").glob("*.py") if path.name != "numerics.py"),
                         ids=lambda path: path.name)  # fmt: skip
def test_tolerances_live_in_numerics(path: Path) -> None:
    assert not tolerance_complaints(path.read_text())


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda path: path.name)
def test_kernels_ask_for_no_union(path: Path) -> None:
    assert not union_complaints(path.read_text())


def test_importing_does_nothing() -> None:
    """No print, no warning, no thread, no GPU."""
    names = [f"niblick.{room}.{path.stem}" for room in ROOMS_SEEN_BY if room != "scripts" for path in sources(room)]
    script = f"""
import importlib, sys, threading
sys.path.insert(0, {str(ROOT)!r})
for name in {names + [path.stem for path in sources("scripts")]!r}:
    importlib.import_module(name)
    assert threading.active_count() == 1, f"{{name}} starts a thread: {{threading.enumerate()}}"
    torch = sys.modules.get("torch")
    assert torch is None or not torch.cuda.is_initialized(), f"{{name}} touches the GPU"
"""
    done = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == "", done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------- the rules can complain


@pytest.mark.parametrize(
    ("room", "text"),
    [
        ("kernels", "import numpy"),
        ("kernels", "from niblick.kernels.other import f"),
        ("kernels", "def f():\n    from niblick.model.gpt import GPT"),
        ("kernels", "from . import other"),
        ("data", "import niblick.model.gpt"),
        ("data", "import brotli"),
        ("data", "def f():\n    import rich"),
        ("model", "from niblick import data"),
        ("model", "from niblick.bench import run"),
        ("artifact", "from niblick.evaluation.score import score"),
        ("evaluation", "import evaluate"),
        ("scripts", "from tests import numerics"),
        ("bench", "import train"),
    ],
)
def test_import_rule_complains(room: str, text: str) -> None:
    assert len(import_complaints(room, text)) == 1


def test_import_rule_accepts_what_it_should() -> None:
    assert not import_complaints("kernels", "import math\nimport torch.nn.functional as F\nfrom triton import language")
    assert not import_complaints("data", "import numpy\ndef f():\n    import brotli")
    assert not import_complaints("model", "from niblick.kernels.smear_gate import smear_gate\nimport niblick.model.gpt")
    assert not import_complaints("evaluation", "from niblick.artifact import load\nimport brotli")


@pytest.mark.parametrize(
    "text",
    [
        "import os\nx = os.environ['HOME']",
        "import os\ndef f():\n    return os.getenv('RANK', os.getenv('HOME'))",
        "from os import environ",
        "import os\nfor name in os.environ:\n    print(name)",
        "import os\nif os.environ.get('DEBUG'):\n    pass",
    ],
)
def test_environment_rule_complains(text: str) -> None:
    assert environment_complaints(text, LAUNCHER)


def test_environment_rule_knows_the_launcher() -> None:
    text = "import os\nrank = int(os.environ.get('RANK', '0'))"
    assert not environment_complaints(text, LAUNCHER)
    assert environment_complaints(text, set())


def test_other_rules_complain() -> None:
    assert union_complaints("isinstance(x, int | float)") and not union_complaints("isinstance(x, (int, float))")
    a, b = (functions(f"def f():\n    return {n}\ndef g():\n    return {n}") for n in (1, 2))
    assert copy_complaints({"a": a, "b": b}, {"g"}) == ["f differs between a and b"]
    assert not copy_complaints({"a": a, "b": a}, set())
    assert tolerance_complaints("torch.allclose(a, b, rtol=1)") and not tolerance_complaints("f(total=1)")
