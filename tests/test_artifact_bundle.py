"""The file of code that is shipped: it runs by itself, what it runs is the repository's, and little else is in it."""

import io
import json
import lzma
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from niblick.artifact.bundle import SOURCE, bundle, source_files, stripped

ROOT = Path(__file__).parents[1]
SCRIPTS = (ROOT / "train.py", ROOT / "evaluate.py")
LOSS = """
\"\"\"A kernel's own code, from the file.\"\"\"
import sys
import torch
from niblick.kernels import ngram_tilt, softcapped_ce

logits = torch.linspace(-40, 40, 300).view(3, 100)
losses = softcapped_ce.softcapped_ce(logits, torch.arange(3), 30.0, reduction="none")
assert torch.allclose(losses, softcapped_ce.softcapped_ce_ref(logits, torch.arange(3), 30.0, reduction="none"))
assert not hasattr(softcapped_ce, "SIZES") and softcapped_ce.__doc__ is None
print(softcapped_ce.__file__, *sys.argv[1:])
"""


def run(file: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TRITON_INTERPRET": "1", "TMPDIR": str(file.parent)}
    return subprocess.run([sys.executable, str(file), *words], env=environment, capture_output=True, text=True)


def unpacked(data: bytes) -> dict[str, str]:
    return json.loads(lzma.decompress(zipfile.ZipFile(io.BytesIO(data)).read(SOURCE)))


def test_runs_by_itself(tmp_path):
    (tmp_path / "loss.py").write_text(LOSS)
    file = tmp_path / "train_gpt.py"  # under any name
    file.write_bytes(bundle(tmp_path / "loss.py"))
    done = run(file, "loss", "--data", "x")
    assert done.returncode == 0, done.stderr
    path, *words = done.stdout.split()
    assert words == ["--data", "x"] and Path(path).parts[-3:] == ("niblick", "kernels", "softcapped_ce.py")
    folder = Path(path).parents[2]
    assert not path.startswith(str(ROOT)) and folder.stat().st_mode & 0o777 == 0o700
    written = {file for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"}
    assert run(file, "loss").stdout.split() == [path], "the next process finds the same folder"
    assert {file for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"} == written
    for wrong in ([], ["evaluate"]):
        done = run(file, *wrong)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "expected one of loss first, got" in done.stderr


def test_holds_what_both_scripts_import_and_again_from_within(tmp_path):
    data = bundle(*SCRIPTS)
    source = unpacked(data)
    files = source_files(*SCRIPTS)
    expected = {path.name if path in SCRIPTS else f"niblick/{path.parent.name}/{path.name}" for path in files}
    assert source.keys() == expected and {"train.py", "evaluate.py", "niblick/kernels/ngram_tilt.py"} <= expected
    assert len(data) < sum(path.stat().st_size for path in files) / 5
    for name, text in source.items():
        assert stripped(text, documented="/" not in name) == text  # so that a bundle made from within one is the same
    assert '"""Artifact -> bits per byte.' in source["evaluate.py"]


def test_stripped_is_the_same_program():
    text = '"""Doc."""\nx: int = 1  # why\n"""of x"""\ndef f():\n    "Doc."\nclass A:\n    "Doc."\n    y = """kept"""\n'
    lean = stripped(text + "# --- not needed when lifted ---\nz = 1\n")
    assert lean == "x: int = 1\n\ndef f():\n    pass\n\nclass A:\n    y = 'kept'"


def test_source_files_are_those_that_evaluation_runs():
    """The list read from the source holds every file of niblick that is loaded, and none of training alone."""
    listed = source_files(ROOT / "evaluate.py")
    script = "import sys, evaluate\nfor n, m in sys.modules.items():\n  if n.startswith('niblick.'): print(m.__file__)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    loaded = {Path(line).resolve() for line in output.stdout.split("\n") if line.endswith(".py")}
    listed_paths = {path.resolve() for path in listed}
    assert loaded < listed_paths and len(listed) == len(listed_paths)
    assert ROOT / "evaluate.py" in listed_paths and ROOT / "kernels/ngram_tilt.py" in listed_paths
    assert not {ROOT / "model/optim.py", ROOT / "data/prepare.py", ROOT / "train.py"} & listed_paths
