"""The audit's command: its exit status says what was found, and nothing that other people's code does can change it."""

import json
from pathlib import Path

import audit_cheats as cheats
import pytest

from niblick.evaluation import audit


def test_command_on_other_peoples_code(tmp_path, capsys):
    source = (Path(__file__).parent / "audit_cheats.py").read_text()
    (tmp_path / "theirs.py").write_text(source + "\nhonest, gate, three = Honest(), TargetGate(), 3\n")
    out = tmp_path / "report.json"
    words = ["--vocab-size", str(cheats.V), "--swaps", "2", "--out", str(out)]
    assert audit.command([f"{tmp_path}/theirs.py:honest", *words]) == 0
    assert "nothing found" in capsys.readouterr().out and "cannot certify" in json.loads(out.read_text())["worth"]
    assert audit.command([f"{tmp_path}/theirs.py:gate", *words]) == 1
    assert "refuted by T2" in capsys.readouterr().out
    for words, message in (
        ([f"{tmp_path}/theirs.py:three"], "expected a scorer 'three', a callable, found int"),
        ([f"{tmp_path}/none.py:honest"], "expected a Python file, found none"),
        (["slyding"], "expected a method plain, sliding, score-first, phased or FILE.py:NAME, found 'slyding'"),
        (["plain", "--swops", "3"], "unknown option '--swops' (nearest: --swaps)"),
        (["plain", "--n-tokens", "2"], "--n-tokens: expected 3 or more"),
        (["plain", "--vocab-size", "-5"], "--vocab-size: expected 3 or more, below 2^32, found -5"),
        (["plain", "--seed", "-1"], "--seed: expected 0 or more"),
        (["plain", "--tolerance", "nan"], "--tolerance: expected 0.0 or more"),
        (["plain", "--data", f"{tmp_path}/none"], f"--data: expected a folder, found none at {tmp_path}/none"),
        (["plain", "--sequence-length", "0"], "sequence_length must be in 1..1e+06: got 0"),
    ):
        assert audit.command(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import sys; sys.exit(0)", "theirs.py, line 1: expected a scorer that can be called, found SystemExit: 0"),
        ("import no_such_library", "line 1: expected a scorer that can be called, found ModuleNotFoundError"),
        ("def f(:", "found SyntaxError: invalid syntax (theirs.py, line 1)"),
        ("def f(tokens):\n    exit(0)", "theirs.py, line 2: expected a scorer that can be called, found SystemExit"),
        ("def f(tokens):\n    raise RuntimeError('two\\nlines')", "line 2: expected a scorer that can be called, "),
        ("def f(tokens):\n    return 'x'", "expected losses, numbers, from the scorer, found str"),
        ("def f(tokens):\n    return tokens[1:] * 1.0", "expected losses of shape (96,)"),
        ("def f(tokens):\n    return tokens * 1.0\nf.clock = lambda: [1]", "found TypeError"),
    ],
)
def test_code_that_cannot_be_audited_is_bad_input(source, message, tmp_path, capsys):
    """No exit status of its own: 0 would say that nothing was found, 1 that the scorer is refuted."""
    (tmp_path / "theirs.py").write_text(source)
    assert audit.command([f"{tmp_path}/theirs.py:f", "--swaps", "1"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err


def test_an_interrupt_is_none_of_the_scorers(tmp_path):
    (tmp_path / "theirs.py").write_text("raise KeyboardInterrupt")
    assert audit.command([f"{tmp_path}/theirs.py:f"]) == 130
