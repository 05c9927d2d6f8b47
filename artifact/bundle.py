"""The code of a submission in one file: scripts and all of niblick that they import, packed; Python runs it as it is.

    python niblick.pyz evaluate ARTIFACT --data FOLDER
    torchrun --nproc-per-node 8 niblick.pyz train pr1855

The file is a zip of two members, which any zip reader opens: `__main__.py`, which unpacks the other and runs a script
there, and `source.json.xz`, {path: text} under LZMA. The folder (Triton wants its kernels in files) lies in the
temporary one, is named after the content, and serves all ranks. Comments, docstrings and what kernels hold only for
tests and benches are left out; the scripts keep their docstrings, which are what --help says. Names stay, so that a
traceback reads as in the repository. Third-party packages are imported, not packed. Python runs it under any name,
train_gpt.py too; it should be the version that packed it, or a later one.
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
LIFTED_ENDS = "\n# --- not needed when lifted ---"
"""A line of a kernel's file: what follows is for tests and benches."""
MAIN = """\
import hashlib, json, lzma, os, pathlib, runpy, sys, tempfile, zipfile
if sys.argv[1:2] and sys.argv[1] in {scripts!r}:
    script = sys.argv.pop(1)
else:
    print(f"expected one of {{', '.join({scripts!r})}} first, got {{sys.argv[1:2] or 'nothing'}}", file=sys.stderr)
    sys.exit(2)
with zipfile.ZipFile(sys.argv[0]) as packed:
    source = packed.read({source!r})
folder = pathlib.Path(tempfile.gettempdir(), f"niblick-{{os.getuid()}}-{{hashlib.sha256(source).hexdigest()[:16]}}")
folder.mkdir(mode=0o700, exist_ok=True)
if folder.stat().st_uid != os.getuid():
    print(f"{{folder}}: expected a folder of one's own, found another user's (set TMPDIR)", file=sys.stderr)
    sys.exit(2)
for name, text in json.loads(lzma.decompress(source)).items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{{path.name}}.{{os.getpid()}}")
    half.write_text(text, encoding="utf-8")
    half.replace(path)
sys.path.insert(0, str(folder))
runpy.run_path(str(folder / f"{{script}}.py"), run_name="__main__")
"""


def bundle(*scripts: str | Path) -> bytes:
    """The file that runs each of the scripts by its name. The same sources give the same bytes, and so does a bundle
    made from within one; under one version of Python."""
    scripts = tuple(Path(script) for script in scripts)
    source = {
        _packed_name(path, scripts): stripped(path.read_text("utf-8"), documented=path in scripts)
        for path in source_files(*scripts)
    }
    text = json.dumps(dict(sorted(source.items())), ensure_ascii=False, separators=(",", ":")).encode()
    main = MAIN.format(source=SOURCE, scripts=tuple(script.stem for script in scripts))
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w") as file:
        for name, data in (
            ("__main__.py", main.encode()),
            (SOURCE, lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
        ):
            file.writestr(zipfile.ZipInfo(name), data)  # of a fixed date
    return found.getvalue()


def source_files(*scripts: str | Path) -> list[Path]:
    """The scripts and every file of niblick that they import, directly or not.

    Imports are read from the source, those inside functions too, so the list does not depend on what was run before.
    """
    found, pending = {}, [Path(script) for script in scripts]
    while pending:
        path = pending.pop()
        if path not in found:
            found[path] = None
            pending += _imports(path)
    return list(found)


def stripped(text: str, documented: bool = False) -> str:
    """The same program without comments, a kernel's part for tests and, unless they are wanted, docstrings."""
    tree = ast.parse(text.partition(LIFTED_ENDS)[0])
    for node in () if documented else ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [line for line in node.body if not _is_text(line)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def _packed_name(path: Path, scripts: tuple[Path, ...]) -> str:
    return path.name if path in scripts else f"niblick/{path.parent.name}/{path.name}"


def _imports(path: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            is_room = module.count(".") < 2  # `from niblick.data import shards`; deeper, the names are not modules
            names = [f"{module}.{name}" for name in names] if is_room else [module]
        yield from (Path(find_spec(name).origin) for name in names if name.startswith("niblick."))
