"""The search for the clip that fills the cap, on sizes that a formula gives and on real ones."""

import math

import pytest
import torch

from niblick.artifact import fill as module
from niblick.artifact.errors import ArtifactError
from niblick.artifact.fill import SLACK, fill
from niblick.artifact.quantize import Quantization
from niblick.artifact.streams import encode, take_apart
from niblick.model.config import ArtifactConfig

CONFIG = ArtifactConfig(rounding="nearest")
WEIGHTS = 2_000_000


def size_of(quantization: Quantization, config: ArtifactConfig) -> int:
    """Bits a weight fall by one an octave, less where few are left; 50,000 bytes are of another kind."""
    bits = math.log2(1 + 100 / config.attention_clip)
    return 50_000 + int(WEIGHTS * bits / 8)


@pytest.fixture
def formula(monkeypatch):
    trials = []
    monkeypatch.setattr(
        module, "quantize", lambda state, config, hessians: trials.append(config) or Quantization({}, {}, [])
    )
    return trials


@pytest.mark.parametrize("target", [200_000, 500_000, 833_333, 1_200_000])
def test_it_ends_just_under_the_target(formula, target):
    found = fill({"w": torch.empty(WEIGHTS)}, CONFIG, None, size_of, target)
    assert 0 <= target - found.size <= SLACK and len(formula) <= 8
    assert found.size == size_of(found.quantization, found.config)
    ratio = found.config.attention_clip / CONFIG.attention_clip
    assert math.isclose(found.config.mlp_clip, ratio * CONFIG.mlp_clip, rel_tol=1e-12)
    assert math.isclose(found.config.embedding_clip, ratio * CONFIG.embedding_clip, rel_tol=1e-12)


def test_a_target_out_of_reach_is_refused(formula):
    with pytest.raises(ArtifactError, match=r"at most 60,000 bytes, found none: the smallest took [0-9,]+"):
        fill({"w": torch.empty(WEIGHTS)}, CONFIG, None, size_of, 60_000)
    assert len(formula) <= 10


def test_a_size_that_jumps_still_ends_under_the_target(formula):
    def jumps(quantization: Quantization, config: ArtifactConfig) -> int:
        return size_of(quantization, config) // 40_000 * 40_000

    found = fill({"w": torch.empty(WEIGHTS)}, CONFIG, None, jumps, 500_000)
    assert found.size == 480_000


def test_real_sizes():
    state = {"mlp_up_bank": torch.randn((2, 512, 128), generator=torch.Generator().manual_seed(0))}

    def coded(quantization: Quantization, config: ArtifactConfig) -> int:
        return sum(map(len, encode(take_apart(quantization.tensors)[1]).values()))

    found = fill(state, CONFIG, None, coded, 50_000)
    assert 0 <= 50_000 - found.size <= SLACK
