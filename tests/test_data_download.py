"""The download, against a stand-in for the hub on this machine."""

import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from niblick.data import prepare, shards
from niblick.data import tokenizer as tokenizers
from niblick.data.download import Download, download
from niblick.data.errors import DataError

constants = pytest.importorskip("huggingface_hub.constants")
one_line = r"[^\n]*\Z"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Enough of the hub for its client: HEAD with size, ETag and commit; GET with ranges. Counts what it is asked."""

    daemon_threads = True

    def __init__(self, files):
        self.files = files  # name -> bytes
        self.break_after = {}  # name -> bytes sent before the first GET's connection breaks
        self.claimed_size = {}  # name -> size reported instead of the true one
        self.gets = []  # (name, Range header)
        super().__init__(("127.0.0.1", 0), Answer)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _find(self):
        name = self.path.removeprefix("/datasets/club/golf/resolve/main/")
        data = self.server.files.get(name)
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        return name, data

    def do_HEAD(self):
        name, data = self._find()
        if data is None:
            return
        self.send_response(200)
        self.send_header("ETag", f'"{zlib.crc32(data):08x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(self.server.claimed_size.get(name, len(data))))
        self.end_headers()

    def do_GET(self):
        name, data = self._find()
        if data is None:
            return
        asked = self.headers.get("Range")
        self.server.gets.append((name, asked))
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        stop = self.server.break_after.pop(name, len(data))
        self.wfile.write(data[start:stop])
        self.close_connection = True


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin")
    tokenizers.train(["the niblick is a short club for precise shots " * 50], 290, folder / "t.model")
    files = {"tok/t.model": (folder / "t.model").read_bytes()}
    for split, count in (("train", 2), ("val", 1)):
        for i in range(count):
            shards.write_shard(folder / "x.bin", np.random.default_rng(i).integers(1, 290, 20_000))
            files[f"data/fineweb_{split}_{i:06d}.bin"] = (folder / "x.bin").read_bytes()
    return files


@pytest.fixture
def hub(contents, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server = Hub(dict(contents))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def options(hub, out, **changes):
    where = {"repo": "club/golf", "folder": "data", "tokenizer": "tok/t.model", "endpoint": hub.endpoint}
    return Download(**({"out": out, "shards": 2} | where | changes))


TRAIN = "data/fineweb_train_000001.bin"


def test_everything_arrives_and_is_ready(hub, tmp_path):
    paths = download(options(hub, tmp_path))
    assert {path.name: path.read_bytes() for path in paths} == {k.split("/")[-1]: v for k, v in hub.files.items()}
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    prepared = prepare.ready(tmp_path)
    assert (prepared.vocab_size, prepared.train_tokens, prepared.val_tokens) == (290, 40_000, 20_000)
    hub.gets.clear()
    assert download(options(hub, tmp_path)) == paths and hub.gets == []


def test_bytes_per_token_are_fetched_where_asked_for(hub, tmp_path):
    hub.files["data/fineweb_val_bytes_000000.bin"] = hub.files["data/fineweb_val_000000.bin"]
    assert not any("_bytes_" in path.name for path in download(options(hub, tmp_path, shards=0)))
    fetched = download(options(hub, tmp_path, shards=0, val_bytes=True))
    assert [path.name for path in fetched[1:]] == ["fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"]


def test_a_broken_connection_is_resumed_where_it_broke(hub, tmp_path):
    hub.break_after[TRAIN] = 30_500
    download(options(hub, tmp_path))
    assert (tmp_path / "fineweb_train_000001.bin").read_bytes() == hub.files[TRAIN]
    assert [asked for name, asked in hub.gets if name == TRAIN] == [None, "bytes=30000-"]


def test_an_interrupted_download_goes_on_with_the_missing_files(hub, tmp_path):
    kept = hub.files.pop(TRAIN)
    with pytest.raises(DataError, match=rf"resolve/main/{TRAIN}: not fetched to {tmp_path}.*{one_line}"):
        download(options(hub, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fineweb_train_000000.bin", "t.model"]
    hub.files[TRAIN] = kept
    hub.gets.clear()
    download(options(hub, tmp_path))
    assert [name for name, _ in hub.gets] == [TRAIN, "data/fineweb_val_000000.bin"]


def test_a_cut_file_is_fetched_again(hub, tmp_path):
    path = download(options(hub, tmp_path))[2]
    path.write_bytes(path.read_bytes()[:-2])
    download(options(hub, tmp_path))
    assert path.read_bytes() == hub.files[TRAIN]


@pytest.mark.parametrize("damage", ["count", "size", "magic"])
def test_a_wrong_file_does_not_appear(hub, tmp_path, damage):
    data = hub.files[TRAIN]
    if damage == "count":
        hub.files[TRAIN] = data[:-2]
        message = r"expected 41024 bytes for the header's 20000 tokens, found 41022 bytes"
    elif damage == "size":
        hub.claimed_size[TRAIN] = len(data) + 2
        message = r"of size 41026 but has size 41024"
    else:
        hub.files[TRAIN] = b"<html>" + data[6:]
        message = r"expected magic 20240520, found \d+"
    with pytest.raises(DataError, match=rf"fineweb_train_000001.bin.*{message}{one_line}"):
        download(options(hub, tmp_path))
    assert not (tmp_path / "fineweb_train_000001.bin").exists() and not (tmp_path / ".incoming").exists()


def test_the_size_is_checked_against_the_hubs(hub, tmp_path, monkeypatch):
    """Also where the client has not done it."""
    fetched = tmp_path / "fetched.model"
    fetched.write_bytes(hub.files["tok/t.model"] + b"\0")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(fetched))
    size = len(hub.files["tok/t.model"])
    with pytest.raises(DataError, match=rf"expected the hub's {size} bytes, found {size + 1}{one_line}"):
        download(options(hub, tmp_path / "out"))


def test_no_hub_at_all(tmp_path, hub):
    gone = options(hub, tmp_path, endpoint="http://127.0.0.1:1")
    with pytest.raises(DataError, match=rf"not fetched to {tmp_path}/t.model: {one_line}"):
        download(gone)


def test_command_line(hub, tmp_path):
    command = [sys.executable, "-m", "niblick.data.download", "--out", str(tmp_path), "--endpoint", hub.endpoint]
    command += ["--repo", "club/golf", "--folder", "data", "--tokenizer", "tok/t.model"]
    good = subprocess.run([*command, "--shards", "1"], capture_output=True, text=True)
    assert good.returncode == 0 and len(good.stdout.split()) == 3
    bad = subprocess.run([*command, "--shards", "3"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.splitlines()[-1].startswith("niblick.data.download: http")
    assert "Traceback" not in bad.stderr
