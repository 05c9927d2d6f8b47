"""The artifact file: what is written is read, and nothing else is."""

import dataclasses
import hashlib
import json
import struct
import tracemalloc
from dataclasses import replace

import brotli
import numpy as np
import pytest
import torch
from configs import REFERENCE
from numerics import SCORE_NATS

from niblick.artifact.container import (
    HEADER_SIZES,
    MAGIC,
    PROLOGUE,
    assemble,
    read_artifact,
    read_container,
    write_artifact,
)
from niblick.artifact.errors import ArtifactError
from niblick.artifact.load import load_model, set_weights
from niblick.artifact.quantize import RowIntegers, quantize
from niblick.evaluation.score import score
from niblick.evaluation.windows import sliding_windows
from niblick.model.config import ArtifactConfig, GPTConfig
from niblick.model.gpt import GPT

CONFIG = GPTConfig(
    vocab_size=64, num_layers=4, model_dim=128, num_heads=4, num_kv_heads=2, mlp_hidden=128, max_segment=8,
    xsa_last_layers=4, loop_start=1, loop_end=2, loop_extra_passes=1, parallel_start=3, qk_gain_init=1.0 / 3,
    **REFERENCE,
)  # fmt: skip
CPU = torch.device("cpu")


def make_model() -> GPT:
    model, generator = GPT(CONFIG), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def quantized():
    return quantize(make_model().state_dict(), ArtifactConfig())


@pytest.fixture(scope="module")
def artifact(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "model.nbk"
    write_artifact(path, quantized, CONFIG)
    return path


def refused(path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_artifact(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line and "expected" in line


# ---- what is written is read ---------------------------------------------------------------------------------------


def test_read_back_bit_for_bit(artifact, quantized):
    config, found = read_artifact(artifact)
    assert config == CONFIG and list(found) == list(quantized)
    for name, expected in quantized.items():
        if isinstance(expected, RowIntegers):
            assert torch.equal(found[name].q, expected.q) and torch.equal(found[name].scale, expected.scale)
            assert found[name].bits == expected.bits
        else:
            assert found[name].dtype == torch.float16 and torch.equal(found[name], expected)


def test_the_same_weights_give_the_same_file(artifact, quantized, tmp_path):
    size = write_artifact(tmp_path / "again.nbk", quantized, CONFIG)
    assert (tmp_path / "again.nbk").read_bytes() == artifact.read_bytes()
    assert size == artifact.stat().st_size


def test_the_layout_is_the_documented_one(artifact, quantized):
    """Parsed here from the description alone."""
    data = artifact.read_bytes()
    assert data[:12] == b"NIBLICK\0" + struct.pack("<HH", 1, 1)
    assert struct.unpack_from("<Q", data, 12)[0] == len(data) - 52
    plain, coded = struct.unpack_from("<II", data, 52)
    text = brotli.decompress(data[60 : 60 + coded])
    header, position, streams = json.loads(text), 60 + coded, {}
    assert len(text) == plain and header["config"] == dataclasses.asdict(CONFIG)
    for name, size in header["streams"]:
        streams[name] = brotli.decompress(data[position : position + size])
        position += size
    assert position == len(data)
    scales = np.frombuffer(streams["scales"], "u1").reshape(2, -1).T.copy().view("<f2").ravel()
    rows = [t for t in quantized.values() if isinstance(t, RowIntegers)]
    assert torch.equal(torch.from_numpy(scales.astype(np.float16)), torch.cat([t.scale.ravel() for t in rows]))
    q = np.frombuffer(streams["kv_bank"], "i1").reshape(8, 64, 128)
    assert torch.equal(torch.from_numpy(q.copy()), quantized["kv_bank"].q)
    assert ["embedding", 7, [64, 128]] in header["tensors"] and ["skip_weights", 0, [3, 128]] in header["tensors"]


def scored(model: GPT) -> float:
    tokens = np.random.default_rng(1).integers(1, 64, 25).astype(np.uint16)
    return score(model, tokens, np.ones(25, np.int16), sliding_windows(24, 8, 3), tokens_per_batch=1000).nll


def test_the_reloaded_model_scores_the_same_to_the_bit(artifact, quantized):
    model = make_model()
    unquantised = scored(model)
    set_weights(model, quantized)
    before = scored(model)
    reloaded, rung = load_model(artifact, CPU, torch.float32)
    assert rung == "plain" and not reloaded.training
    assert scored(reloaded) == before != unquantised


def test_packed_weights_score_as_dense_ones(artifact):
    dense, _ = load_model(artifact, CPU, torch.float32)
    packed, _ = load_model(artifact, CPU, torch.float32, "packed")
    assert not hasattr(packed, "qo_bank") and sum(p.numel() for p in packed.parameters()) < 20_000
    assert abs(scored(packed) - scored(dense)) / 24 < SCORE_NATS


def test_a_failed_write_leaves_nothing(quantized, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_artifact(tmp_path / "taken", quantized, CONFIG)
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"] and not list((tmp_path / "taken").iterdir())


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_refused(artifact, tmp_path):
    """All bits of prologue and header sizes, and of every 97th byte after them."""
    good = artifact.read_bytes()
    front = PROLOGUE.size + HEADER_SIZES.size
    for position in [*range(front), *range(front, len(good), 97), len(good) - 1]:
        for bit in range(8) if position < front else (position % 8,):
            data = bytearray(good)
            data[position] ^= 1 << bit
            refused(tmp_path / "flipped.nbk", bytes(data), "expected")


def test_every_length_but_the_right_one_is_refused(artifact, tmp_path):
    good = artifact.read_bytes()
    for length in [*range(PROLOGUE.size + 20), *range(PROLOGUE.size + 20, len(good), 997), len(good) - 1]:
        refused(tmp_path / "short.nbk", good[:length], f"expected .*, found {length}$")
    refused(tmp_path / "long.nbk", good + b"\0", f"expected {len(good)} bytes .*, found {len(good) + 1}$")


@pytest.mark.parametrize(
    ("offset", "field", "message"),
    [
        (0, b"NIBLICK\1", "expected an artifact, which begins with"),
        (8, struct.pack("<H", 2), "expected artifact version 1, found 2"),
        (8, struct.pack("<H", 65535), "expected artifact version 1, found 65535"),
        (10, struct.pack("<H", 9), "expected codec 1 .brotli., found 9"),
        (12, struct.pack("<Q", 2**64 - 1), f"expected {2**64 + 51} bytes as its prologue says"),
        (12, struct.pack("<Q", 0), "expected 52 bytes as its prologue says"),
        (20, bytes(32), "damaged: expected a body with SHA-256 0000"),
    ],
)
def test_a_wrong_prologue_is_refused(artifact, tmp_path, offset, field, message):
    data = bytearray(artifact.read_bytes())
    data[offset : offset + len(field)] = field
    refused(tmp_path / "wrong.nbk", bytes(data), message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "header: expected at least 8 bytes, found 0"),
        (struct.pack("<II", 10, 2**32 - 1), "header: expected 4294967295 coded bytes, found 0"),
        (struct.pack("<II", 2**32 - 1, 1) + b"x", "header: expected at most 1048576 bytes, found 4294967295"),
        (struct.pack("<II", 10, 3) + b"\xff\xff\xff", "header: expected one brotli stream"),
        (struct.pack("<II", 9, 14) + brotli.compress(b"0123456789"), "header: expected 9 bytes decoded"),
        (struct.pack("<II", 0, 0), "header: expected 0 bytes decoded, found at least 0, unfinished"),
    ],
)
def test_lengths_at_extremes_under_a_right_checksum_are_refused(tmp_path, body, message):
    sealed = PROLOGUE.pack(MAGIC, 1, 1, len(body), hashlib.sha256(body).digest()) + body
    refused(tmp_path / "extreme.nbk", sealed, message)


# ---- a header that does not describe the streams, under a right checksum --------------------------------------


def take_apart(artifact) -> tuple[dict, bytes]:
    data = artifact.read_bytes()
    _, coded = HEADER_SIZES.unpack_from(data, PROLOGUE.size)
    start = PROLOGUE.size + HEADER_SIZES.size
    return json.loads(brotli.decompress(data[start : start + coded])), data[start + coded :]


def set_config(name, value):
    return lambda header: header["config"].__setitem__(name, value)


def set_tensor(index, place, value):
    return lambda header: header["tensors"][index].__setitem__(place, value)


FAULTS = {
    "unknown field": (set_config("depth", 3), "expected only settings of this version's model, found 'depth'"),
    "field of another type": (set_config("num_layers", "4"), "expected num_layers to be int, found '4'"),
    "bool for an integer": (set_config("num_layers", True), "expected num_layers to be int, found True"),
    "unknown choice": (set_config("smear", "left"), r"expected smear to be one of \['none'.*\], found 'left'"),
    "contradiction": (set_config("num_heads", 3), "model.num_heads: got 128 and 3"),
    "no heads": (set_config("num_heads", 0), "expected settings that agree"),
    "settings in a list": (lambda h: h.__setitem__("config", []), "expected settings in a dictionary, found list"),
    "part missing": (lambda h: h.pop("tensors"), "expected JSON of config, tensors, streams: KeyError"),
    "shape too large": (set_tensor(1, 2, [8, 128, 129]), "qo_bank: expected 132096 bytes decoded, found 131072"),
    "shape too small": (set_tensor(1, 2, [8, 128, 127]), "qo_bank: expected 130048 bytes decoded"),
    "immense shape": (set_tensor(1, 2, [1 << 31, 1 << 31]), "expected at most 2147483648 weights"),
    "beyond immense": (set_tensor(1, 2, [1 << 99]), "expected a tensor's name, bits and shape"),
    "empty dimension": (set_tensor(1, 2, [0, 128]), "expected a tensor's name, bits and shape"),
    "no dimension": (set_tensor(1, 2, []), "expected a tensor's name, bits and shape"),
    "fractional dimension": (set_tensor(1, 2, [1.5]), "expected a tensor's name, bits and shape"),
    "nine bits": (set_tensor(1, 1, 9), "expected a tensor's name, bits and shape, found ..qo_bank., 9"),
    "fewer bits than the integers": (set_tensor(1, 1, 3), r"qo_bank: expected integers in \[-3, 3\], found -"),
    "integers said to be float16": (set_tensor(1, 1, 0), r"expected the streams \['embedding', 'kv_bank'"),
    "renamed": (set_tensor(1, 0, "oq_bank"), "expected the streams"),
    "twice": (lambda h: h["tensors"].append(h["tensors"][1]), "expected distinct names"),
    "reserved name": (set_tensor(1, 0, "scales"), "expected distinct names"),
    "stream size": (lambda h: h["streams"][0].__setitem__(1, h["streams"][0][1] + 1), "streams: expected"),
    "negative size": (lambda h: h["streams"][0].__setitem__(1, -1), "expected the size of stream embedding, found -1"),
    "sizes shifted": (
        lambda h: (h["streams"][0].__setitem__(1, h["streams"][0][1] + 1),
                   h["streams"][1].__setitem__(1, h["streams"][1][1] - 1)),
        "embedding: expected one brotli stream",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), FAULTS.values(), ids=FAULTS)
def test_a_header_that_lies_is_refused(artifact, tmp_path, spoil, message):
    header, streams = take_apart(artifact)
    spoil(header)
    refused(tmp_path / "lie.nbk", assemble(json.dumps(header).encode(), streams), message)


@pytest.mark.parametrize("text", [b"", b"[", b"[" * 100_000, b"\xff", b"3", b"9" * 5000])
def test_a_header_that_is_not_json_is_refused(artifact, tmp_path, text):
    refused(tmp_path / "text.nbk", assemble(text, b""), "header: expected JSON of config, tensors, streams")


def test_a_bomb_is_refused_before_it_goes_off(artifact, tmp_path):
    header, streams = take_apart(artifact)
    bomb = brotli.compress(bytes(200_000_000), quality=3)
    streams = bomb + streams[header["streams"][0][1] :]
    header["streams"][0][1] = len(bomb)
    tracemalloc.start()
    refused(tmp_path / "bomb.nbk", assemble(json.dumps(header).encode(), streams), "expected 8192 bytes decoded")
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


def test_values_that_are_not_finite_are_refused(quantized, tmp_path):
    spoiled = dict(quantized)
    spoiled["q_gain"] = torch.full_like(quantized["q_gain"], float("inf"))
    write_artifact(tmp_path / "inf.nbk", spoiled, CONFIG)
    with pytest.raises(ArtifactError, match=r"inf\.nbk: scales and float16 tensors: expected finite values"):
        read_artifact(tmp_path / "inf.nbk")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(CONFIG, vocab_size=65), r"embedding: expected shape \[65, 128\], found \[64, 128\]"),
        (replace(CONFIG, smear="none"), r"smear_weight: expected shape None, found \[12\]"),
        (replace(CONFIG, gate="dense_bias"), r"gate_weight: expected shape \[4, 4, 128\], found \[4, 4, 12\]"),
    ],
)
def test_weights_of_another_model_are_refused(quantized, tmp_path, config, message):
    path = tmp_path / "other.nbk"
    write_artifact(path, quantized, config)
    with pytest.raises(ArtifactError, match=f"{path}: {message}"):
        load_model(path, CPU, torch.float32)


def test_container_reports_its_streams(artifact):
    container = read_container(artifact)
    assert container.size == artifact.stat().st_size
    assert list(container.raw) == list(container.coded_bytes)
    assert [len(container.raw[name]) for name in ("embedding", "mlp_up_bank")] == [64 * 128, 4 * 128 * 128]
