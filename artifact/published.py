"""The published containers: what the records of the Parameter Golf challenge ship, as bodies of an artifact file.

Whole (PR #1394 and its descendants): all tensors in one file, byte-shuffled (4 bytes of magic, the stride 2, then bytes
0, 2, 4, ..., then 1, 3, 5, ...), under brotli, quality 11.

Groups (PR #1855): a magic of 4 bytes, the number of payloads, their lengths (4 bytes each, little-endian), then the
payloads: for every role, in GROUPS' order, its matrices one after the other, each transposed so that the values of an
input column lie together, under `lrzip -z -L 9` (or brotli); then everything else under brotli with a window of 2^24;
then the orders of rows. With sort_rows the rows of the embedding, of queries and of the MLP's up-projection are put so
that similar ones follow each other: from row 0 on always the unused row with the least L1 distance.

The published scripts write tensors with torch.save, a pickle; here it is safetensors, whose header also carries the
model's settings, and which takes a few kilobytes less.
"""

import dataclasses
import json
import shutil
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import brotli
import numpy as np
import torch
from torch import Tensor

from niblick.artifact.errors import ArtifactError, require
from niblick.artifact.header import MAX_WEIGHTS, parse_config, role_shapes
from niblick.artifact.records import LowRank, Quantized, RowIntegers, SmallIntegers, is_matrix, largest_integer
from niblick.model.config import GPTConfig

GROUPS = ("embedding", "attn_k", "attn_q", "attn_v", "attn_o", "mlp_up", "mlp_down")
SORTED = ("embedding", "attn_q", "mlp_up")
SHUFFLE_MAGIC, GROUPS_MAGIC = b"BSHF", b"PGRP"
MAX_TENSORS_BYTES = 3 * MAX_WEIGHTS
LRZIP_SECONDS, LRZIP_KIB = 300, 2 << 20


def require_lrzip() -> None:
    """ArtifactError, with what installs it, unless the program is there."""
    if shutil.which("lrzip") is None:
        raise ArtifactError(
            "artifact.container lrzip: expected the program lrzip on PATH, found none: apt install lrzip, or take "
            "--artifact.container groups_brotli or niblick"
        )


# ---- whole -----------------------------------------------------------------------------------------------------------


def encode_whole(quantized: Quantized, config: GPTConfig, tokenizer_sha256: str) -> bytes:
    data = _save(_tensors(quantized), _metadata(quantized, config, tokenizer_sha256))
    return brotli.compress(shuffle(data), quality=11)


def decode_whole(body: bytes) -> tuple[GPTConfig, Quantized, str]:
    data = unshuffle(_decompress("tensors", body))
    return _restore(*_load(data))


def shuffle(data: bytes) -> bytes:
    return SHUFFLE_MAGIC + b"\2" + data[::2] + data[1::2]


def unshuffle(data: bytes) -> bytes:
    require(data[:5] == SHUFFLE_MAGIC + b"\2", f"expected bytes shuffled by 2, found {data[:5]!r}")
    data = data[5:]
    out, half = bytearray(len(data)), (len(data) + 1) // 2
    out[::2], out[1::2] = data[:half], data[half:]
    return bytes(out)


# ---- groups ----------------------------------------------------------------------------------------------------------


def encode_groups(
    quantized: Quantized, config: GPTConfig, tokenizer_sha256: str, *, sort_rows: bool, lrzip: bool
) -> tuple[bytes, dict[str, int]]:
    """The body, and the bytes of every payload. ArtifactError if lrzip is missing or fails."""
    orders, raw = [], []
    for role in GROUPS:
        q = quantized[role].q.numpy() if role in quantized else np.zeros((0, 0, 0), np.int8)
        if sort_rows and role in SORTED:
            orders += [order := np.stack([similar_rows(x) for x in q])]
            q = np.take_along_axis(q, order[..., None].astype(np.int64), axis=1)
        raw.append(np.ascontiguousarray(q.transpose(0, 2, 1)).tobytes())
    if lrzip:
        require_lrzip()
    code = lrzip_compress if lrzip else _brotli_large
    with ThreadPoolExecutor(2) as pool:
        payloads = list(pool.map(lambda data: code(data) if data else b"", raw))
    matrices = {f"{role}.q" for role in GROUPS}
    rest = {name: t for name, t in _tensors(quantized).items() if name not in matrices}
    metadata = _metadata(quantized, config, tokenizer_sha256) | {"lrzip": json.dumps(lrzip)}
    payloads.append(_brotli_large(_save(rest, metadata)))
    flat = [order.astype("<u2").ravel() for order in orders]
    payloads.append(brotli.compress(np.concatenate(flat).tobytes(), quality=11) if flat else b"")
    head = GROUPS_MAGIC + struct.pack(f"<{1 + len(payloads)}I", len(payloads), *map(len, payloads))
    names = [*GROUPS, "rest", "orders"]
    return head + b"".join(payloads), dict(zip(names, map(len, payloads), strict=True))


def decode_groups(body: bytes) -> tuple[GPTConfig, Quantized, str, dict[str, int]]:
    count = len(GROUPS) + 2
    head = 8 + 4 * count
    require(len(body) >= head and body[:4] == GROUPS_MAGIC, f"expected {GROUPS_MAGIC!r} and lengths: {body[:4]!r}")
    found, *sizes = struct.unpack_from(f"<{1 + count}I", body, 4)
    require(found == count, f"expected {count} payloads, found {found}")
    require(head + sum(sizes) == len(body), f"expected {head + sum(sizes)} bytes as the lengths say, found {len(body)}")
    ends = np.cumsum([head, *sizes]).tolist()
    *payloads, rest, orders = (body[start:end] for start, end in pairwise(ends))
    tensors, metadata = _load(_decompress("rest", rest))
    shapes = role_shapes(_config(metadata))
    lrzip = metadata.get("lrzip") == "true"
    if lrzip:
        require_lrzip()

    def integers(role: str, payload: bytes) -> np.ndarray:
        n, R, C = shapes[role]
        data = lrzip_decompress(payload, n * R * C) if lrzip else _decompress(role, payload, n * R * C)
        return np.frombuffer(data, "i1").reshape(n, C, R).transpose(0, 2, 1)

    with ThreadPoolExecutor(2) as pool:
        stacks = dict(zip(GROUPS, pool.map(integers, GROUPS, payloads), strict=True))
    if orders:
        _unsort(stacks, orders)
    tensors |= {f"{role}.q": torch.from_numpy(q.copy()) for role, q in stacks.items()}
    config, quantized, tokenizer = _restore(tensors, metadata)
    return config, quantized, tokenizer, dict(zip([*GROUPS, "rest", "orders"], sizes, strict=True))


def similar_rows(q: np.ndarray) -> np.ndarray:
    """The order (R,) of the rows of q (R, C) int8: from row 0 the nearest unused one in L1, of equals the first."""
    rows = torch.from_numpy(q).float()
    left, order, current = torch.ones(len(q), dtype=torch.bool), [0], 0
    left[:1] = False
    for step in range(1, len(q)):
        if (step - 1) % 256 == 0:  # rows taken are dropped now and then, so half the work is left
            kept = left.nonzero()[:, 0]
            remaining, used = rows[kept], torch.zeros(len(kept))
        distances = torch.cdist(rows[current][None], remaining, p=1)[0] + used
        nearest = int(distances.numpy().argmin())  # the first of equals
        used[nearest] = torch.inf
        current = int(kept[nearest])
        left[current] = False
        order.append(current)
    return np.array(order[: len(q)], np.uint16)


def _unsort(stacks: dict[str, np.ndarray], coded: bytes) -> None:
    sizes = [stacks[role].shape[:2] for role in SORTED]
    data = _decompress("orders", coded, 2 * sum(n * R for n, R in sizes))
    flat = np.frombuffer(data, "<u2").astype(np.int64)
    for role, (n, R) in zip(SORTED, sizes, strict=True):
        order, flat = flat[: n * R].reshape(n, R), flat[n * R :]
        whole = np.array_equal(np.sort(order, axis=1), np.broadcast_to(np.arange(R), (n, R)))
        require(whole, f"orders: expected every row of {role} once, found others")
        stacks[role] = np.take_along_axis(stacks[role], order.argsort(axis=1)[..., None], axis=1)


# ---- lrzip -----------------------------------------------------------------------------------------------------------


def lrzip_compress(data: bytes) -> bytes:
    return _run_lrzip("", ["-z", "-L", "9"], data, "in", "in.lrz")


def lrzip_decompress(data: bytes, expected: int) -> bytes:
    seconds = 5 + expected // 100_000  # it decodes 0.4 to 2 MB a second
    limits = f"ulimit -f {expected // 512 + 64}; ulimit -v {LRZIP_KIB}; ulimit -t {seconds};"
    found = _run_lrzip(limits, ["-d"], data, "in.lrz", "in")
    require(len(found) == expected, f"lrzip: expected {expected} bytes decoded, found {len(found)}")
    return found


def _run_lrzip(limits: str, options: list[str], data: bytes, source: str, result: str) -> bytes:
    """lrzip works on files; `limits` of the shell keep a foreign one from filling disk, memory or time."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / source).write_bytes(data)
        command = ["sh", "-c", f'{limits} exec lrzip "$@"', "lrzip", "-q", "-p", "1", *options, source]
        try:
            done = subprocess.run(
                command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=LRZIP_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise ArtifactError(f"lrzip: expected an end within {LRZIP_SECONDS} s, found none") from error
        path = Path(folder) / result
        if done.returncode or not path.is_file():
            said = b" ".join((done.stderr + done.stdout).split())[-200:].decode(errors="replace")
            raise ArtifactError(f"lrzip: expected it to succeed, found exit status {done.returncode}: {said}")
        return path.read_bytes()


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _tensors(quantized: Quantized) -> dict[str, Tensor]:
    tensors = {}
    for name, t in quantized.items():
        if isinstance(t, Tensor):
            tensors[name] = t
            continue
        tensors |= {f"{name}.q": t.q, f"{name}.scale": t.scale}
        for c in t.low_rank if isinstance(t, RowIntegers) else ():
            parts = {"a": c.a, "a_scale": c.a_scale, "b": c.b, "b_scale": c.b_scale}
            tensors |= {f"{name}.{c.matrix}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    return tensors


def _metadata(quantized: Quantized, config: GPTConfig, tokenizer_sha256: str) -> dict[str, str]:
    rows = {name: t for name, t in quantized.items() if isinstance(t, RowIntegers)}
    stored = {name: [t.bits, [c.matrix for c in t.low_rank]] for name, t in rows.items()}
    return {
        "config": json.dumps(dataclasses.asdict(config)),
        "rows": json.dumps(stored),
        "tokenizer_sha256": tokenizer_sha256,
    }


def _save(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    from safetensors.torch import save

    return save(tensors, metadata)


def _load(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        (size,) = struct.unpack_from("<Q", data)
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        return load(data), metadata
    except (SafetensorError, struct.error, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ArtifactError(f"tensors: expected safetensors with the model's settings: {error!r}"[:300]) from error


def _config(metadata: dict[str, str]) -> GPTConfig:
    try:
        return parse_config(json.loads(metadata["config"]))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"tensors: expected the model's settings as JSON: {error!r}"[:300]) from error


def _restore(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[GPTConfig, Quantized, str]:
    config = _config(metadata)
    try:
        stored = {name: (bits, list(low)) for name, (bits, low) in json.loads(metadata["rows"]).items()}
        quantized = {
            name: _tensor(name, shape, tensors, *stored.get(name, (0, [])))
            for name, shape in role_shapes(config).items()
        }
        tokenizer = str(metadata["tokenizer_sha256"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"tensors: expected all of the model's, with their shapes: {error!r}"[:300]) from error
    return config, quantized, tokenizer


def _tensor(
    name: str, shape: tuple[int, ...], tensors: dict[str, Tensor], bits: int, corrected: list[int]
) -> RowIntegers | SmallIntegers | Tensor:
    if name in tensors:
        require(not is_matrix(name), f"{name}: expected integers, found a tensor")
        return _checked(name, tensors[name], shape, torch.float16)
    q = _checked(f"{name}.q", tensors[f"{name}.q"], shape, torch.int8)
    scale = _checked(f"{name}.scale", tensors[f"{name}.scale"], shape[:-1], torch.float16)
    if not is_matrix(name):
        return SmallIntegers(q, scale)
    require(type(bits) is int and 2 <= bits <= 8, f"{name}: expected 2 to 8 bits, found {bits!r}")
    Q = largest_integer(bits)
    low, high = int(q.min()), int(q.max())
    require(-Q <= low and high <= Q, f"{name}: expected integers in [{-Q}, {Q}], found {low} to {high}")
    require(len(corrected) <= 64, f"{name}: expected at most 64 corrections, found {len(corrected)}")
    return RowIntegers(q, scale, bits, 0, tuple(_correction(name, i, shape, tensors) for i in corrected))


def _correction(name: str, index: int, shape: tuple[int, ...], tensors: dict[str, Tensor]) -> LowRank:
    n, R, C = shape
    require(type(index) is int and 0 <= index < n, f"{name}: expected a correction of one of {n}, found {index!r}")
    a, a_scale, b, b_scale = (tensors[f"{name}.{index}.{part}"] for part in ("a", "a_scale", "b", "b_scale"))
    rank = a.shape[-1]
    _checked(f"{name}.{index}.a", a, (R, rank), torch.int8)
    _checked(f"{name}.{index}.b", b, (rank, C), torch.int8)
    sound = len(a_scale) in (1, R) and 0 < len(b_scale) and b.numel() % len(b_scale) == 0
    require(sound, f"{name}.{index}: expected steps of a correction, found {len(a_scale)} and {len(b_scale)}")
    _checked(f"{name}.{index}.a_scale", a_scale, (len(a_scale),), torch.float16)
    _checked(f"{name}.{index}.b_scale", b_scale, (len(b_scale),), torch.float16)
    return LowRank(index, a, a_scale, b, b_scale)


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    sound = tuple(tensor.shape) == tuple(shape) and tensor.dtype == dtype
    require(sound, f"{name}: expected {dtype} {tuple(shape)}, found {tensor.dtype} {tuple(tensor.shape)}")
    require(bool(torch.isfinite(tensor).all()), f"{name}: expected finite values, found others")
    return tensor


def _brotli_large(data: bytes) -> bytes:
    return brotli.compress(data, quality=11, lgwin=24)


def _decompress(name: str, coded: bytes, expected: int | None = None) -> bytes:
    """`expected` bytes, or as many as a model within MAX_WEIGHTS may have."""
    decoder, most = brotli.Decompressor(), MAX_TENSORS_BYTES if expected is None else expected
    try:
        data = decoder.process(coded, output_buffer_limit=most + 1)
    except brotli.error as error:
        raise ArtifactError(f"{name}: expected one brotli stream, found something else") from error
    whole = decoder.is_finished() and (expected is None or len(data) == expected) and len(data) <= most
    require(whole, f"{name}: expected {expected or f'up to {most}'} bytes decoded, found {len(data)} or more")
    return data
