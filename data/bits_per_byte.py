"""Bits per byte, the challenge's metric, and what simple models of the same text reach, for scale."""

import lzma
import math

import numpy as np

from niblick.data.errors import DataError


def bits_per_byte(nll: float, n_bytes: float) -> float:
    """nll / ln 2 / n_bytes: `nll` the summed negative log-likelihood in nats, `n_bytes` the bytes of text scored."""
    if n_bytes <= 0:
        raise DataError(f"bits per byte: expected at least one byte of scored text, found {n_bytes}")
    return nll / math.log(2) / n_bytes


def token_unigram_bits_per_byte(train_counts: np.ndarray, targets: np.ndarray, n_bytes: float) -> float:
    """Bits per byte of the unigram model p(i) = (c_i + 1) / (Σ c + V), add-one smoothed training counts `train_counts`
    (V,), on the validation targets (n,) that stand for `n_bytes` bytes."""
    log_p = np.log((train_counts + 1.0) / (train_counts.sum() + len(train_counts)))
    target_counts = np.bincount(targets, minlength=len(log_p))
    return bits_per_byte(-float(target_counts @ log_p), n_bytes)


def compressor_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte that `xz -9e` and brotli (quality 11, largest window) reach on `text`: {"xz -9e": ..., ...}."""
    import brotli

    if not text:
        raise DataError("compressors: expected held-out text, found none")
    compressed = {
        "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
        "brotli 11": brotli.compress(text, quality=11, lgwin=24),
    }
    return {name: 8 * len(data) / len(text) for name, data in compressed.items()}
