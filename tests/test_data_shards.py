"""Shards, atomic files, bits per byte."""

import errno
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from niblick.data import bits_per_byte, files, shards
from niblick.data.errors import DataError

one_line = r"[^\n]*\Z"


def test_layout_is_the_challenges(tmp_path):
    path = tmp_path / "a_train_000000.bin"
    shards.write_shard(path, np.array([1, 513, 65535], np.uint16))
    raw = path.read_bytes()
    assert len(raw) == 1024 + 6
    assert np.frombuffer(raw[:1024], "<i4").tolist() == [20240520, 1, 3] + [0] * 253
    assert raw[1024:] == bytes([1, 0, 1, 2, 255, 255])


@given(st.lists(st.integers(0, 131_071) | st.sampled_from([65535, 65536]), max_size=3))
@settings(max_examples=50, deadline=None)
def test_round_trip_at_both_widths(tmp_path_factory, ids):
    path = tmp_path_factory.mktemp("shard") / "x_val_0.bin"
    shards.write_shard(path, np.array(ids, np.int64))
    tokens = shards.read_shard(path)
    assert tokens.tolist() == ids
    assert shards.read_header(path) == (1 if max(ids, default=0) < 65536 else 2, len(ids))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], r"expected 1032 bytes for the header's 4 tokens, found 1031 bytes"),
        (lambda raw: raw + b"\0\0", r"expected 1032 bytes for the header's 4 tokens, found 1034 bytes"),
        (lambda raw: raw[:100], r"expected a header of 1024 bytes, found 100 bytes"),
        (lambda raw: b"\0" + raw[1:], r"expected magic 20240520, found 20240384"),
        (lambda raw: raw[:4] + b"\3" + raw[5:], r"expected shard version 1 or 2, found 3"),
        (lambda raw: raw[:8] + b"\5" + raw[9:], r"expected 1034 bytes for the header's 5 tokens, found 1032 bytes"),
        (lambda raw: raw[:11] + b"\x80" + raw[12:], r"expected a token count in \[0, 2\^31\), found -"),
    ],
)
def test_damaged_shard_is_one_line(tmp_path, damage, message):
    path = tmp_path / "a_train_000000.bin"
    shards.write_shard(path, np.arange(4, dtype=np.uint16))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{path}: .*{message}{one_line}"):
        shards.read_shard(path)


def test_missing_shard():
    with pytest.raises(DataError, match=rf"nowhere.bin: cannot read the shard: No such file{one_line}"):
        shards.read_shard("nowhere.bin")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([3, -1]), r"expected ids in \[0, 2\^32\), found -1"),
        (np.array([2**32]), r"expected ids in \[0, 2\^32\), found 4294967296"),
        (np.array([0.5]), "expected a 1-D integer array"),
        (np.zeros((2, 2), np.uint16), "expected a 1-D integer array"),
        (np.broadcast_to(np.uint16(0), 2**31), r"at most 2147483647 tokens \(int32 count\), found 2147483648"),
    ],
)
def test_what_a_shard_cannot_hold_is_refused(tmp_path, tokens, message):
    with pytest.raises(DataError, match=message + one_line):
        shards.write_shard(tmp_path / "x.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def test_more_tokens_than_int32_bytes_can_be_read(tmp_path):
    path = tmp_path / "big_train_0.bin"
    count = 2**30 + 5  # offsets in bytes pass 2^31
    with open(path, "wb") as file:  # sparse: takes no room
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, count
        file.write(header.tobytes())
        file.truncate(1024 + 2 * count)
        file.seek(1024 + 2 * (count - 1))
        file.write(b"\7\0")
    tokens = shards.read_shard(path)
    assert len(tokens) == count and tokens[-1] == 7


def test_find_shards(tmp_path):
    for name in (
        "b_train_000001.bin",
        "a_train_000002.bin",
        "d_train_0.bin",
        "c_train_0.bin",
        "a_val_000000.bin",
        "a_val_bytes_000000.bin",
        "x.txt",
    ):
        (tmp_path / name).touch()
    names = [path.name for path in shards.find_shards(tmp_path, "train")]
    assert names == ["a_train_000002.bin", "b_train_000001.bin", "c_train_0.bin", "d_train_0.bin"]
    assert [path.name for path in shards.find_shards(tmp_path, "val")] == ["a_val_000000.bin"]
    assert [path.name for path in shards.find_shards(f"{tmp_path}/a_val_*", "val")] == ["a_val_000000.bin"]
    with pytest.raises(DataError, match=rf"no test shards: expected files \*_test_\*.bin, found none{one_line}"):
        shards.find_shards(tmp_path, "test")


def test_check_ids_names_the_first_offender(monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 4)
    tokens = np.array([0, 1, 2, 3, 4, 9, 10, 0], np.uint16)
    shards.check_ids(tokens, 11, "x.bin")
    message = rf"x.bin: token 105: expected an id below the vocabulary size 9, found 9{one_line}"
    with pytest.raises(DataError, match=message):
        shards.check_ids(tokens, 9, "x.bin", offset=100)
    with pytest.raises(DataError, match="found 10"):
        shards.check_ids(tokens, 10, "x.bin")


def test_first_bos_beyond_the_first_block(monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 128)  # blocks of two
    assert shards.first_bos(np.array([5, 5, 5, 1, 1], np.uint16), 1, "x.bin") == 3
    with pytest.raises(DataError, match=rf"x.bin: expected a document start .*found none in 2 tokens{one_line}"):
        shards.first_bos(np.array([5, 5], np.uint16), 1, "x.bin")


def test_count_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 2)
    for index, tokens in enumerate([[0, 1, 1, 3, 3], [3]]):
        shards.write_shard(tmp_path / f"a_train_{index}.bin", np.array(tokens))
    paths = shards.find_shards(tmp_path, "train")
    assert shards.count_tokens(paths, 5, 100).tolist() == [1, 2, 0, 3, 0]
    assert shards.count_tokens(paths, 5, 4).tolist() == [1, 2, 0, 1, 0]
    assert shards.count_tokens(paths, 3, 100).tolist() == [1, 2, 0], "ids beyond the vocabulary count for none"


class FullDisk:
    """A file whose disk takes `room` bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return self.file.write(data)


def test_full_disk_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "kept"
    files.write_atomically(path, lambda file: file.write(b"old"))

    def write(file):
        disk = FullDisk(file, room=4)
        disk.write(b"half")
        disk.write(b"more")

    with pytest.raises(OSError, match=rf"cannot write {path}: No space left on device{one_line}") as caught:
        files.write_atomically(path, write)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_other_failures_leave_nothing_either(tmp_path):
    def write(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(tmp_path / "new" / "file", write)
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "plain").touch()
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/plain/x: "):
        files.write_atomically(tmp_path / "plain" / "x", write)


def test_bits_per_byte():
    assert bits_per_byte.bits_per_byte(8 * math.log(2), 4) == 2
    with pytest.raises(DataError, match="at least one byte"):
        bits_per_byte.bits_per_byte(1.0, 0)


def test_unigram_by_hand():
    counts = np.array([1, 3, 0, 0])  # add-one: 2/8, 4/8, 1/8, 1/8, that is 2, 1, 3 and 3 bits
    targets = np.array([0, 1, 1, 3], np.uint16)
    assert round(bits_per_byte.token_unigram_bits_per_byte(counts, targets, 7), 12) == 1


def test_compressors_reach_less_on_noise_than_on_repetition():
    noise = np.random.default_rng(0).bytes(4000)
    on_noise, on_text = (bits_per_byte.compressor_bits_per_byte(x) for x in (noise, b"niblick " * 500))
    assert set(on_noise) == {"xz -9e", "brotli 11"}
    assert all(8 < bits < 8.3 for bits in on_noise.values())
    assert all(bits < 0.3 for bits in on_text.values())
