"""Text sources, the held-out split, and the prepared folder."""

import gzip
import json
import lzma
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from niblick.data import corpus, files, prepare, shards
from niblick.data import tokenizer as tokenizers
from niblick.data.errors import DataError

one_line = r"[^\n]*\Z"
WORDS = "a niblick is the golf club for short and precise shots over 42 bunkers".split()
TEXTS = [" ".join(np.random.default_rng(seed).choice(WORDS, 300)) for seed in range(60)]
SMALL = {"vocab_size": 300, "held_out": 0.2}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def test_standard_library_is_the_interpreters_own_sources():
    documents = corpus.documents("stdlib")
    name, text = next(documents)
    names = [name, *(name for name, _ in documents)]
    assert len(names) > 300 and names == sorted(names) and {"os.py", "json/decoder.py"} <= set(names)
    assert Path(sysconfig.get_path("stdlib"), name).read_bytes().decode() == text
    assert all(name.endswith(".py") for name in names)
    assert not [name for name in names if {"test", "site-packages", "dist-packages"} & set(name.split("/"))]


def test_folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    contents = {
        "z.txt": b"last",
        "b/a.md": "é\r\n".encode(),
        "b/bad": b"\xff",
        "b/nul": b"a\0b",
        ".git/x": b"no",
        "e": b"",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    assert list(corpus.documents(tmp_path)) == [("b/a.md", "é\r\n"), ("z.txt", "last")]


def test_folder_without_text(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}: expected UTF-8 text files, found none among 0 files{one_line}"):
        list(corpus.documents(tmp_path))
    (tmp_path / "x").write_bytes(b"\xff")
    with pytest.raises(DataError, match="found none among 1 files"):
        list(corpus.documents(tmp_path))


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_jsonl(tmp_path, suffix, compress):
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(compress(b'{"text": "one", "id": 7}\n\n{"text": "two"}\n{"text": "one"}'))
    names, texts = zip(*corpus.documents(path), strict=True)
    assert texts == ("one", "two", "one") and names[0] == names[2] != names[1]
    whole = path.read_bytes()
    damaged = [whole[:-6], whole[:10] + b"\xff" * 8 + whole[18:]]
    for data in damaged if suffix else []:
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"{path}: cannot read beyond line \d+: {one_line}"):
            list(corpus.documents(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "found a malformed line"),
        (b'{"text": "\xff"}', "found a malformed line"),
        (b'["text"]', "found a list"),
        (b'{"body": "x"}', r"found keys \['body'\]"),
        (b'{"text": 3}', r"found keys \['text'\]"),
        (b'{"text": "\\ud800"}', "expected text that UTF-8 can hold"),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"x.jsonl:2: .*{message}{one_line}"):
        list(corpus.documents(path))


def test_unknown_sources(tmp_path):
    (tmp_path / "x.csv").touch()
    for name, found in ((tmp_path / "x.csv", "a file of another kind"), ("nowhere", "no such file or folder")):
        with pytest.raises(DataError, match=rf'{name}: expected "stdlib", a folder, .*found {found}{one_line}'):
            corpus.documents(name)
        with pytest.raises(DataError, match=f"found {found}"):
            prepare.prepare(name, tmp_path / "out", vocab_size=300)


def test_held_out_fraction_grows_and_is_kept():
    names = [f"file{i}.py" for i in range(2000)]
    small, large = ({n for n in names if corpus.is_held_out(n, f)} for f in (0.05, 0.2))
    assert small < large and 60 < len(small) < 140 and 340 < len(large) < 460
    assert not corpus.is_held_out("abc", 0.7) and corpus.is_held_out("abc", 0.8)  # sha256("abc") = ba78..., 0.7284


def streams(prepared):
    return [np.concatenate([shards.read_shard(path) for path in paths]) for paths in (prepared.train, prepared.val)]


def test_prepare(source, tmp_path):
    prepared = prepare.prepare(source, tmp_path / "out", shard_tokens=5000, **SMALL)
    train, val = streams(prepared)
    assert prepared.vocab_size == 300 and [len(train), len(val)] == [prepared.train_tokens, prepared.val_tokens]
    assert [len(shards.read_shard(path)) for path in prepared.train[:-1]] == [5000] * (len(prepared.train) - 1)
    assert len(prepared.train) > 2
    processor = tokenizers.load(prepared.tokenizer)
    held_out = {text for name, text in corpus.documents(source) if corpus.is_held_out(name, 0.2)}
    for stream, expected in ((train, set(TEXTS) - held_out), (val, held_out)):
        documents = [processor.decode(part.tolist()) for part in np.split(stream, np.flatnonzero(stream == 1))[1:]]
        assert stream[0] == 1 and set(documents) == expected and len(documents) == len(expected) > 0
        assert documents != [text for text in TEXTS if text in expected]  # shuffled
    assert not (tmp_path / "out" / ".building").exists()


def test_no_shard_is_without_a_document_start():
    parts = prepare._cut(np.array([1, 2, 2, 1, 2, 2, 2, 2, 2, 1, 2, 2, 2, 2, 2]), 3)
    assert [part.tolist() for part in parts] == [[1, 2, 2], [1, 2, 2, 2, 2, 2], [1, 2, 2, 2, 2, 2]]


def test_the_tokenizer_sees_training_documents_only(source, tmp_path, monkeypatch):
    seen = []
    train = tokenizers.train
    monkeypatch.setattr(tokenizers, "train", lambda texts, *rest: train(seen.extend(texts) or seen, *rest))
    prepare.prepare(source, tmp_path / "out", **SMALL)
    expected = [text for name, text in corpus.documents(source) if not corpus.is_held_out(name, 0.2)]
    assert seen == expected and len(expected) < len(TEXTS)


def test_prepared_folder_is_kept_until_something_changes(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    builds = []
    build = prepare._build
    monkeypatch.setattr(prepare, "_build", lambda *rest: builds.append(rest) or build(*rest))

    def run(**changes):
        prepared = prepare.prepare(source, out, **(SMALL | changes))
        return len(builds), prepared

    first = run()
    assert first[0] == 1 and run() == first
    contents = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "manifest.json").unlink()  # as after a crash
    assert run()[0] == 2 and contents == {path.name: path.read_bytes() for path in out.iterdir()}
    assert run(max_val_tokens=50)[1].val_tokens == 50 and len(builds) == 3
    run(shard_tokens=1000)
    assert len(builds) == 4 and len(run(shard_tokens=1000)[1].train) > 1
    assert len(run()[1].train) == 1 and len(builds) == 5  # no shard of the earlier preparation is left
    first[1].val[0].unlink()
    assert run()[0] == 6 and first[1].val[0].exists()
    os.utime(source, (0, 0))
    assert run()[0] == 7


def test_given_tokenizer_is_copied(source, tmp_path):
    first = prepare.prepare(source, tmp_path / "a", **SMALL)
    second = prepare.prepare(source, tmp_path / "b", tokenizer=first.tokenizer, **SMALL)
    assert second.tokenizer.read_bytes() == first.tokenizer.read_bytes() and second.tokenizer.parent == tmp_path / "b"
    assert all(map(np.array_equal, streams(first), streams(second)))
    with pytest.raises(DataError, match=rf"{first.tokenizer}: expected a tokenizer of 500 pieces, found 300{one_line}"):
        prepare.prepare(source, tmp_path / "b", tokenizer=first.tokenizer, vocab_size=500)


@pytest.mark.parametrize(("held_out", "side"), [(1e-9, "held-out"), (1 - 1e-9, "training")])
def test_one_empty_side(source, tmp_path, held_out, side):
    kept = prepare.prepare(source, tmp_path / "out", **SMALL)
    message = "expected text to train on" if side == "training" else f"no {side} text: expected at least one document"
    with pytest.raises(DataError, match=message + one_line):
        prepare.prepare(source, tmp_path / "out", vocab_size=300, held_out=held_out)
    with pytest.raises(DataError, match=rf"texts.jsonl: no {side} text: .*found none among 60 documents{one_line}"):
        prepare.prepare(source, tmp_path / "out", vocab_size=300, held_out=held_out, tokenizer=kept.tokenizer)
    assert prepare.ready(tmp_path / "out") == kept and not (tmp_path / "out" / ".building").exists()


def test_full_disk_leaves_the_folder_as_it_was(source, tmp_path, monkeypatch):
    kept = prepare.prepare(source, tmp_path / "out", **SMALL)

    def fsync(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError, match=rf"cannot write .*: No space left on device{one_line}"):
        prepare.prepare(source, tmp_path / "out", shard_tokens=1000, **SMALL)
    assert prepare.ready(tmp_path / "out") == kept and not (tmp_path / "out" / ".building").exists()


@pytest.mark.parametrize("bad", [{"vocab_size": 0}, {"shard_tokens": 0}, {"held_out": 1.0}, {"max_val_tokens": -1}])
def test_bad_settings(source, tmp_path, bad):
    with pytest.raises(DataError, match=f"expected positive sizes and a held-out fraction{one_line}"):
        prepare.prepare(source, tmp_path / "out", **(SMALL | bad))
    with pytest.raises(DataError, match="expected one of name, compressible_first, compressible_last, found 'easy'"):
        prepare.prepare(source, tmp_path / "out", order="easy", **SMALL)


def test_ready_shards(source, tmp_path):
    prepared = prepare.prepare(source, tmp_path / "out", shard_tokens=1000, **SMALL)
    assert prepare.prepare(tmp_path / "out", tmp_path / "unused", vocab_size=300) == prepared
    assert not (tmp_path / "unused").exists()
    with pytest.raises(DataError, match="expected a tokenizer of 8192 pieces, found 300"):
        prepare.prepare(tmp_path / "out", tmp_path / "unused", vocab_size=8192)
    model = prepared.tokenizer.rename(tmp_path / "elsewhere.model")
    with pytest.raises(DataError, match=rf"expected exactly one tokenizer \*.model .*found 0{one_line}"):
        prepare.ready(tmp_path / "out")
    assert prepare.ready(tmp_path / "out", model).train == prepared.train
    shards.write_shard(prepared.val[0], np.array([1, 300]))
    with pytest.raises(DataError, match=r"val_000000.bin: token 1: expected an id below the vocabulary size 300"):
        prepare.ready(tmp_path / "out", model)
    shards.write_shard(prepared.train[1], np.array([5, 6]))
    with pytest.raises(DataError, match=r"train_000001.bin: expected a document start \(BOS, id 1\)"):
        prepare.ready(tmp_path / "out", model)
    prepared.train[0].write_bytes(b"short")
    with pytest.raises(DataError, match=r"train_000000.bin: truncated shard"):
        prepare.ready(tmp_path / "out", model)


def test_order_by_compressibility(tmp_path):
    noise = np.random.default_rng(0).integers(0, 65536, 1000)
    for name, tokens in {"b": noise, "a": noise // 4096, "c": noise * 0}.items():
        shards.write_shard(tmp_path / f"{name}.bin", tokens)
    paths = [tmp_path / f"{name}.bin" for name in "cab"]

    def order(how):
        return "".join(path.stem for path in prepare.order_shards(paths, how))

    assert [order(how) for how in prepare.ORDERS] == ["abc", "cab", "bac"]


def test_compressibility_looks_behind_the_header(tmp_path):
    noise = np.random.default_rng(0).integers(0, 65536, 1 << 19)
    shards.write_shard(tmp_path / "x.bin", np.concatenate([noise, np.zeros(1 << 19, np.int64)]))
    assert prepare.compressibility(tmp_path / "x.bin") > 1


def test_two_processes_prepare_one_folder_once(tmp_path):
    """The second waits for the first and takes its files: neither sees a folder half made."""
    code = (
        "import sys; from niblick.data import prepare; "
        "p = prepare.prepare('stdlib', sys.argv[1], vocab_size=400, max_val_tokens=1000); "
        "print(p.tokenizer.stat().st_ino)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "one")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {run.communicate()[0] for run in runs}
    assert all(run.returncode == 0 for run in runs) and len(found) == 1
