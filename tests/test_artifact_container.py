"""The artifact file: what is written is read, and nothing else is."""

import dataclasses
import json
import shutil
import struct
import tracemalloc
from dataclasses import replace

import brotli
import numpy as np
import pytest
import torch
from configs import REFERENCE
from numerics import SCORE_NATS

from niblick.artifact.coder import decode_integers
from niblick.artifact.container import (
    HEADER_SIZES,
    PROLOGUE,
    assemble,
    read_artifact,
    seal,
    write_artifact,
)
from niblick.artifact.errors import ArtifactError
from niblick.artifact.hessians import collect_hessians
from niblick.artifact.load import load_model, pack_for_inference, set_weights
from niblick.artifact.published import encode_groups
from niblick.artifact.quantize import quantize
from niblick.artifact.records import RowIntegers, SmallIntegers, dequantize
from niblick.evaluation.score import score
from niblick.evaluation.windows import sliding_windows
from niblick.kernels.int6_linear import int6_linear_ref, int6_unpack
from niblick.model import gpt
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


NEAREST = ArtifactConfig(rounding="nearest")


@pytest.fixture(scope="module")
def quantized():
    return quantize(make_model().state_dict(), NEAREST).tensors


@pytest.fixture(scope="module")
def artifact(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "model.nbk"
    write_artifact(path, quantized, CONFIG)
    return path


def assert_same(found, expected) -> None:
    """Every tensor of two quantised models, bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert type(found[name]) is type(tensor), name
        for got, want in zip(_flat(found[name]), _flat(tensor), strict=True):
            same = torch.equal(got, want) and got.dtype == want.dtype if isinstance(want, torch.Tensor) else got == want
            assert same, name


def _flat(value):
    return [x for part in value for x in _flat(part)] if isinstance(value, tuple) else [value]


def refused(path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_artifact(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line and "expected" in line


# ---- what is written is read ---------------------------------------------------------------------------------------


def test_read_back_bit_for_bit(artifact, quantized):
    container = read_artifact(artifact)
    assert container.config == CONFIG
    assert_same(container.quantized, quantized)


def test_the_same_weights_give_the_same_file(artifact, quantized, tmp_path):
    size = write_artifact(tmp_path / "again.nbk", quantized, CONFIG)
    assert (tmp_path / "again.nbk").read_bytes() == artifact.read_bytes()
    assert size == artifact.stat().st_size


def test_the_layout_is_the_documented_one(artifact, quantized):
    """Parsed here from the description alone."""
    data = artifact.read_bytes()
    assert data[:12] == b"NIBLICK\0" + struct.pack("<HH", 2, 1)
    assert struct.unpack_from("<Q", data, 12)[0] == len(data) - 52
    plain, coded = struct.unpack_from("<II", data, 52)
    text = brotli.decompress(data[60 : 60 + coded])
    header, position, streams = json.loads(text), 60 + coded, {}
    assert len(text) == plain and header["config"] == dataclasses.asdict(CONFIG)
    for name, size in header["streams"]:
        streams[name] = data[position : position + size]
        position += size
    assert position == len(data)
    halves = brotli.decompress(streams["float16"])
    halves = np.frombuffer(halves, "u1").reshape(2, -1).T.copy().view("<f2").ravel()
    expected = [t.scale if isinstance(t, RowIntegers) else t for t in quantized.values()]
    assert np.array_equal(halves, np.concatenate([t.numpy().ravel() for t in expected]))
    assert np.array_equal(decode_integers(streams["attn_k"], (4, 64, 128)), quantized["attn_k"].q.numpy())
    assert ["embedding", "rows", 7, 0, 0, 0, []] in header["tensors"]


def scored(model: GPT) -> float:
    tokens = np.random.default_rng(1).integers(1, 64, 25).astype(np.uint16)
    return score(model, tokens, np.ones(25, np.int16), sliding_windows(24, 8, 3), tokens_per_batch=1000).nll


def test_the_reloaded_model_scores_the_same_to_the_bit(artifact, quantized):
    model = make_model()
    unquantised = scored(model)
    set_weights(model, quantized)
    before = scored(model)
    reloaded, rung = load_model(read_artifact(artifact), CPU, torch.float32)
    assert rung == "plain" and not reloaded.training
    assert scored(reloaded) == before != unquantised


def test_packed_weights_score_as_dense_ones(artifact, monkeypatch):
    monkeypatch.setattr(gpt, "int6_linear", int6_linear_ref)  # interpreted, the kernel takes a minute here
    dense, _ = load_model(read_artifact(artifact), CPU, torch.float32)
    packed, _ = load_model(read_artifact(artifact), CPU, torch.float32, "packed")
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
        (8, struct.pack("<H", 1), "expected artifact version 2, found 1$"),
        (8, struct.pack("<H", 3), "expected artifact version 2, found 3: a newer niblick reads it"),
        (10, struct.pack("<H", 9), "expected a kind of body from 1 to 3, found 9"),
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
    refused(tmp_path / "extreme.nbk", seal(1, body), message)


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
    "another model": (set_config("vocab_size", 65), "attn|embedding|expected"),
    "a larger model": (set_config("vocab_size", 131_072), "float16: expected .* bytes decoded, found"),
    "beyond immense": (set_config("mlp_hidden", 1_000_000), "expected at most 67108864 weights, found"),
    "endless loop": (set_config("loop_extra_passes", 10**6), "expected at most 4096 executed layers, found 4000004"),
    "other tensors": (set_config("smear", "none"), r"expected the tensors of its model.*smear_scale"),
    "nine bits": (set_tensor(1, 2, 9), "expected a tensor and how it is stored, found ..attn_q., .rows., 9"),
    "fewer bits than the integers": (set_tensor(1, 2, 3), r"attn_[qo]: expected integers in \[-3, 3\], found -"),
    "integers said to be float16": (set_tensor(1, 1, "float16"), "expected a tensor and how it is stored"),
    "a matrix said to be float16": (
        lambda h: h["tensors"].__setitem__(1, [h["tensors"][1][0], "float16", 16, 0, 0, 0, []]),
        "expected rows, found float16",
    ),
    "another trellis": (set_tensor(1, 3, 7), "expected a tensor and how it is stored"),
    "a trellis where there was none": (set_tensor(1, 3, 8), "attn_[qo]"),
    "a kind that is a list": (set_tensor(1, 1, []), "expected a tensor and how it is stored"),
    "a grid where there was none": (set_tensor(1, 4, 16), "expected the streams"),
    "correction of no matrix": (
        set_tensor(1, 6, [[99, 4, 1, 8]]), r"expected a correction of a matrix of \(4, 128, 128\), found \[99, 4"
    ),
    "renamed": (set_tensor(1, 0, "oq_bank"), "expected the tensors of its model"),
    "twice": (lambda h: h["tensors"].append(h["tensors"][1]), "expected the tensors of its model"),
    "stream size": (lambda h: h["streams"][0].__setitem__(1, h["streams"][0][1] + 1), "streams: expected"),
    "negative size": (lambda h: h["streams"][0].__setitem__(1, -1), "expected the size of stream .*, found -1"),
    "sizes shifted": (
        lambda h: (h["streams"][0].__setitem__(1, h["streams"][0][1] + 1),
                   h["streams"][1].__setitem__(1, h["streams"][1][1] - 1)),
        "attn|embedding|expected",
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
    streams = streams[: -header["streams"][-1][1]] + bomb
    header["streams"][-1][1] = len(bomb)
    tracemalloc.start()
    refused(tmp_path / "bomb.nbk", assemble(json.dumps(header).encode(), streams), "float16: expected .* bytes decoded")
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


def test_values_that_are_not_finite_are_refused(quantized, tmp_path):
    spoiled = dict(quantized)
    spoiled["q_gain"] = torch.full_like(quantized["q_gain"], float("inf"))
    write_artifact(tmp_path / "inf.nbk", spoiled, CONFIG)
    with pytest.raises(ArtifactError, match=r"inf\.nbk: float16: expected finite values"):
        read_artifact(tmp_path / "inf.nbk")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            replace(CONFIG, smear="none"),
            r"header: expected the tensors of its model, found other ones: \['smear_scale'",
        ),
        (replace(CONFIG, gate="dense_bias"), r"header: expected the tensors of its model, found .*'gate_bias'"),
    ],
)
def test_weights_of_another_model_are_refused(quantized, tmp_path, config, message):
    path = tmp_path / "other.nbk"
    write_artifact(path, quantized, config)
    with pytest.raises(ArtifactError, match=f"{path}: {message}"):
        read_artifact(path)


def test_container_reports_its_streams(artifact):
    container = read_artifact(artifact)
    assert container.size == artifact.stat().st_size
    assert {"embedding", "mlp_up", "float16"} < set(container.coded_bytes)


# ---- every kind of tensor, every container -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def hessians():
    rows = torch.randint(64, (256,), generator=torch.Generator().manual_seed(5)), torch.arange(0, 257, 8).int()
    return collect_hessians(make_model(), [rows])


OWN = {
    "gptq": {},
    "trellis8": {"rounding": "trellis8", "steps_per_octave": 16, "small_bits": 8, "gate_bits": 8},
    "trellis32": {"rounding": "trellis32", "low_rank_matrices": 3},
    "low rank": {"low_rank_matrices": 9, "low_rank_asymmetric": False, "steps_per_octave": 32},
    "dedup": {"value_dedup": 2, "row_exponent": 0.0},
}
PUBLISHED = {
    "whole": {"container": "brotli", "low_rank_matrices": 3, "gate_bits": 8},
    "groups": {"container": "groups_brotli", "low_rank_matrices": 3},
    "groups unsorted": {"container": "groups_brotli", "sort_rows": False},
    "lrzip": {"container": "lrzip", "gate_bits": 8},
}


@pytest.mark.parametrize("options", [*OWN.values(), *PUBLISHED.values()], ids=[*OWN, *PUBLISHED])
def test_every_pipeline_is_read_back_bit_for_bit(hessians, tmp_path, options):
    if options.get("container") == "lrzip" and shutil.which("lrzip") is None:
        pytest.skip("needs lrzip")
    settings, path = ArtifactConfig(**options), tmp_path / "model.nbk"
    quantized = quantize(make_model().state_dict(), settings, hessians).tensors
    size = write_artifact(path, quantized, CONFIG, settings=settings)
    container = read_artifact(path)
    assert container.config == CONFIG and container.size == size == path.stat().st_size
    assert_same(container.quantized, quantized)
    assert isinstance(quantized["gate_weight"], SmallIntegers) == (settings.gate_bits == 8)
    assert sum(len(t.low_rank) for t in quantized.values() if isinstance(t, RowIntegers)) == settings.low_rank_matrices
    dense = dequantize(quantized)
    for bank, matrices in pack_for_inference(quantized).items():
        weights = [m if isinstance(m, torch.Tensor) else int6_unpack(m.packed) * m.scale[:, None] for m in matrices]
        assert torch.equal(torch.stack(weights), dense[bank])


def test_lrzip_that_is_missing_or_fails_is_named_and_nothing_is_written(quantized, tmp_path, monkeypatch):
    settings, path = ArtifactConfig(container="lrzip", sort_rows=False), tmp_path / "out" / "model.nbk"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArtifactError, match="expected the program lrzip on PATH, found none: apt install lrzip"):
        write_artifact(path, quantized, CONFIG, settings=settings)
    (tmp_path / "lrzip").write_text("#!/bin/sh\necho no space >&2; exit 3\n")
    (tmp_path / "lrzip").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ArtifactError, match="lrzip: expected it to succeed, found exit status 3: no space"):
        write_artifact(path, quantized, CONFIG, settings=settings)
    assert not path.parent.exists()


@pytest.mark.parametrize("kind", [2, 3])
@pytest.mark.parametrize("body", [b"", b"PGRP", b"x" * 100, brotli.compress(b"BSHF\2" + bytes(1000))])
def test_a_published_body_that_is_none_is_refused(tmp_path, kind, body):
    refused(tmp_path / "body.nbk", seal(kind, body), "expected")


def test_a_published_body_that_lies_is_refused(hessians, tmp_path):
    """Byte changes under a right checksum: refused with one line, or read."""
    settings = ArtifactConfig(container="groups_brotli", low_rank_matrices=2)
    body, _ = encode_groups(
        quantize(make_model().state_dict(), settings, hessians).tensors, CONFIG, "", sort_rows=True, lrzip=False
    )
    generator, path, outcomes = np.random.default_rng(0), tmp_path / "lie.nbk", set()
    for _ in range(150):
        data = bytearray(body)
        data[int(generator.integers(len(data)) ** generator.random())] ^= int(generator.integers(1, 256))
        path.write_bytes(seal(3, bytes(data)))
        try:
            outcomes.add(bool(read_artifact(path)))
        except ArtifactError as error:
            assert "\n" not in str(error) and "expected" in str(error)
            outcomes.add(False)
    assert False in outcomes
