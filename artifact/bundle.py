"""The code of a submission in one file: a script and all of niblick that it imports, packed, and run by Python as it is.

    python evaluate.pyz ARTIFACT --data FOLDER

The file is a zip of two members, which any zip reader opens: `__main__.py`, which unpacks the other one into a temporary
folder and runs the script there (Triton wants its kernels in files), and `source.json.xz`, {path: text} under LZMA.
Comments, docstrings and what kernels hold only for tests and benches are left out; names stay, so that a traceback reads
as in the repository. Third-party packages are imported, not packed.
"""

import ast
import io
import json
import lzma
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

SOURCE = "source.json.xz"
LIFTED_ENDS = "# --- not needed when lifted ---"
"""In a kernel's file: what follows is for tests and benches."""
MAIN = """\
import atexit, json, lzma, pathlib, runpy, shutil, sys, tempfile, zipfile
folder = pathlib.Path(tempfile.mkdtemp(prefix="niblick-"))
atexit.register(shutil.rmtree, folder, ignore_errors=True)
with zipfile.ZipFile(sys.argv[0]) as packed:
    source = json.loads(lzma.decompress(packed.read({source!r})))
for name, text in source.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
sys.path.insert(0, str(folder))
runpy.run_path(str(folder / {entry!r}), run_name="__main__")
"""


def bundle(entry: str | Path) -> bytes:
    """The file for the script `entry`. The same sources give the same bytes, under one version of Python."""
    entry = Path(entry)
    source = {_packed_name(path, entry): stripped(path.read_text("utf-8")) for path in source_files(entry)}
    text = json.dumps(dict(sorted(source.items())), ensure_ascii=False, separators=(",", ":")).encode()
    packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w") as file:
        for name, data in (("__main__.py", MAIN.format(source=SOURCE, entry=entry.name).encode()), (SOURCE, packed)):
            file.writestr(zipfile.ZipInfo(name), data)  # of a fixed date
    return found.getvalue()


def source_files(entry: str | Path) -> list[Path]:
    """The script `entry` and every file of niblick that it imports, directly or not: the code run to score.

    Imports are read from the source, those inside functions too, so the list does not depend on what was run before.
    """
    found, pending = {}, [Path(entry)]
    while pending:
        path = pending.pop()
        if path not in found:
            found[path] = None
            pending += _imports(path)
    return list(found)


def stripped(text: str) -> str:
    """The same program without comments, docstrings and a kernel's part for tests."""
    tree = ast.parse(text.partition(LIFTED_ENDS)[0])
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [line for line in node.body if not _is_text(line)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def _packed_name(path: Path, entry: Path) -> str:
    return path.name if path == entry else f"niblick/{path.parent.name}/{path.name}"


def _imports(path: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            is_room = module.count(".") < 2  # `from niblick.data import shards`; deeper, the names are not modules
            names = [f"{module}.{name}" for name in names] if is_room else [module]
        yield from (Path(find_spec(name).origin) for name in names if name.startswith("niblick."))
