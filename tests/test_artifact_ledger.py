"""The byte ledger adds up, and counts the code that is really run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from configs import REFERENCE

from niblick.artifact.container import read_artifact, write_artifact
from niblick.artifact.ledger import byte_ledger, entropy_bytes, table_rows
from niblick.artifact.quantize import quantize
from niblick.model.config import ArtifactConfig, GPTConfig
from niblick.model.gpt import GPT

ROOT = Path(__file__).parents[1]
CONFIG = GPTConfig(vocab_size=64, num_layers=4, model_dim=128, num_heads=4, num_kv_heads=2, mlp_hidden=128,
                   xsa_last_layers=4, loop_start=1, loop_end=2, parallel_start=3, **REFERENCE)  # fmt: skip


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ledger")
    settings = ArtifactConfig(rounding="nearest")
    write_artifact(folder / "model.nbk", quantize(GPT(CONFIG).state_dict(), settings).tensors, CONFIG)
    (folder / "tokenizer.model").write_text("#" * 77)
    container = read_artifact(folder / "model.nbk")
    return container, byte_ledger(container, 1234, 300_000, folder / "tokenizer.model")


def test_the_parts_add_up_to_the_file(ledger):
    container, ledger = ledger
    assert sum(s.coded_bytes for s in ledger.streams) + ledger.container_bytes == ledger.model_bytes == container.size
    assert ledger.container_bytes > 60
    assert (ledger.code_bytes, ledger.tokenizer_bytes) == (1234, 77)
    assert ledger.total_bytes == container.size + 1234


def test_the_cap_is_inclusive_and_the_tokenizer_does_not_count(ledger):
    _, ledger = ledger
    assert ledger.fits
    assert replace(ledger, cap_bytes=ledger.total_bytes).fits
    assert not replace(ledger, cap_bytes=ledger.total_bytes - 1).fits


def test_streams_hold_every_weight_once(ledger):
    _, ledger = ledger
    values = {s.name: (s.values, s.raw_bits) for s in ledger.streams}
    assert values["embedding"] == (64 * 128, 7) and values["mlp_up"] == (4 * 128 * 128, 6)
    steps = 64 + 8 * 128 + 8 * 64 + 4 * 128 + 4 * 128
    assert sum(n for n, _ in values.values()) == sum(p.numel() for p in GPT(CONFIG).parameters()) + steps


def test_entropy():
    assert entropy_bytes(np.arange(256, dtype=np.uint8)) == 256
    assert entropy_bytes(np.zeros(100, np.uint8)) == entropy_bytes(np.zeros(0, np.int8)) == 0
    assert entropy_bytes(np.arange(-128, 128).reshape(4, 64)) == 256
    assert entropy_bytes(np.array([3, 3, 3, 3, 250, 250, 7, 9], np.uint8)) == 8 * 1.75 / 8


def test_rows_for_the_table(ledger):
    _, ledger = ledger
    rows = table_rows(ledger)
    assert all(len(row) == 5 for row in rows)
    assert ("total", "", "", "", f"{ledger.total_bytes:,}") in rows
    assert ("left of 300,000", "", "", "", f"{300_000 - ledger.total_bytes:,}") in rows
