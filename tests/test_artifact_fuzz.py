"""Artifacts that were tampered with: each is refused with one line or read, quickly, in little memory.

`python tests/test_artifact_fuzz.py 10000` runs as many; the suite runs a few hundred of the same.
"""

import json
import struct
import sys
import time
import traceback
from collections import Counter
from itertools import pairwise
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from tempfile import TemporaryDirectory

import brotli
import numpy as np
import torch
from configs import REFERENCE

from niblick.artifact.container import HEADER_SIZES, PROLOGUE, assemble, pack, read_artifact, seal
from niblick.artifact.errors import ArtifactError
from niblick.artifact.hessians import collect_hessians
from niblick.artifact.load import load_model
from niblick.artifact.quantize import quantize
from niblick.model.config import ArtifactConfig, GPTConfig
from niblick.model.gpt import GPT

CONFIG = GPTConfig(vocab_size=16, num_layers=3, model_dim=16, num_heads=2, num_kv_heads=1, mlp_hidden=24, max_segment=8,
                   rope_dims=4, xsa_last_layers=2, loop_start=1, loop_end=1, parallel_start=2, **REFERENCE)  # fmt: skip
SECONDS, KILOBYTES = 10, 2_000_000
EXTREMES = [0, -1, 1, 7, 255, 2**31 - 1, 2**32, 2**63, 10**30, 1e308, -1e-300, True, None, "", "x", [], {}, [[1]]]


def artifacts() -> list[bytes]:
    """Our container with a trellis, a grid and corrections, and plain; the published ones."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    hessians = collect_hessians(model, [(torch.randint(16, (64,)), torch.arange(0, 65, 8).int())])
    rich = {"rounding": "trellis8", "steps_per_octave": 16, "small_bits": 8, "gate_bits": 8, "low_rank_matrices": 3}
    settings = [
        ArtifactConfig(**options) for options in (rich, {}, {"container": "brotli"}, {"container": "groups_brotli"})
    ]
    return [pack(quantize(model.state_dict(), s, hessians).tensors, CONFIG, settings=s) for s in settings]


def mutate(good: bytes, rng: np.random.Generator) -> bytes:
    """Half the time the checksum is made right again, so that the reader behind it is what is tried."""
    kind = struct.unpack_from("<H", good, 10)[0]
    if kind == 1 and rng.random() < 0.4:
        return tamper(good, rng)
    data = bytearray(good)
    how = rng.integers(4)
    if how == 0:
        data = data[: rng.integers(len(data))]
    elif how == 1:
        first, second = sorted(rng.integers(PROLOGUE.size, len(data), 2))
        data = data[:first] + data[second:] + data[first:second]
    else:
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return seal(kind, bytes(data[PROLOGUE.size :])) if rng.random() < 0.7 else bytes(data)


def tamper(good: bytes, rng: np.random.Generator) -> bytes:
    """A header whose values, or streams whose order and first bytes, are others; the checksum is right."""
    _, coded = HEADER_SIZES.unpack_from(good, PROLOGUE.size)
    start = PROLOGUE.size + HEADER_SIZES.size
    header, body = json.loads(brotli.decompress(good[start : start + coded])), good[start + coded :]
    ends = np.cumsum([0, *(size for _, size in header["streams"])])
    streams = [body[a:b] for a, b in pairwise(ends)]
    how = rng.integers(4)
    if how == 0:
        spoil(header, rng)
    elif how == 1:
        a, b = rng.integers(len(streams), size=2)
        streams[a], streams[b] = streams[b], streams[a]
    elif how == 2:
        i = rng.integers(len(streams))
        spoiled = bytearray(streams[i])
        width = int(rng.choice([1, 2, 4]))
        at = int(rng.integers(max(min(len(spoiled), 14) - width, 1)))
        spoiled[at : at + width] = bytes([int(rng.choice([0, 0x7F, 0x80, 0xFF]))]) * width
        streams[i] = bytes(spoiled)
    else:
        i = rng.integers(len(streams))
        streams[i] = rng.bytes(len(streams[i])) if rng.random() < 0.5 else b""
    if rng.random() < 0.8 and isinstance(header["streams"], list):
        header["streams"] = [[entry[0] if isinstance(entry, list) and entry else "", len(s)]
                             for entry, s in zip(header["streams"], streams, strict=False)]  # fmt: skip
    return assemble(json.dumps(header).encode(), b"".join(streams))


def spoil(value, rng: np.random.Generator) -> None:
    """Put an extreme value somewhere inside."""
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        if not keys:
            return
        key = keys[int(rng.integers(len(keys)))]
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.95:
            value = value[key]
            continue
        value[key] = EXTREMES[int(rng.integers(len(EXTREMES)))]
        return


def run(count: int, seed: int = 0) -> Counter:
    """How many were refused, and how many read and then loaded into a model. AssertionError for anything else."""
    rng, good, outcomes = np.random.default_rng(seed), artifacts(), Counter()
    before = getrusage(RUSAGE_SELF).ru_maxrss
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.nbk"
        for i in range(count):
            data = mutate(good[i % len(good)], rng)
            path.write_bytes(data)
            start = time.perf_counter()
            try:
                load_model(read_artifact(path), torch.device("cpu"), torch.float32, attention="plain")
                outcomes["read"] += 1
            except ArtifactError as error:
                assert "\n" not in str(error) and "expected" in str(error), f"{i}: {error!r}"
                assert len(str(error)) < 2000, f"{i}: a line of {len(str(error))} characters"
                outcomes["refused"] += 1
            except BaseException as error:  # constriction's panics are no Exceptions
                raise AssertionError(f"artifact {i}: {error!r}\n{traceback.format_exc()}") from error
            seconds = time.perf_counter() - start
            assert seconds < SECONDS, f"artifact {i} took {seconds:.1f} s"
    grown = getrusage(RUSAGE_SELF).ru_maxrss - before
    assert grown < KILOBYTES, f"{grown} KB"
    return outcomes


def test_tampered_artifacts_are_refused_or_read():
    outcomes = run(400)
    assert outcomes["refused"] > 250 and outcomes["read"] > 5, outcomes


if __name__ == "__main__":
    began = time.perf_counter()
    print(run(int(sys.argv[1])), f"{time.perf_counter() - began:.0f} s")
