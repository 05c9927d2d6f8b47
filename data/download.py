"""Fetches the challenge's FineWeb shards and tokenizer from the Hugging Face hub.

`python -m niblick.data.download --out fineweb --shards 80`. A file appears under its name in the folder once it is
whole and checked; run again, the command keeps those and fetches the rest. A connection that breaks inside a file is
resumed where it broke. The folder is then ready shards for `prepare`.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from niblick.data import shards
from niblick.data import tokenizer as tokenizers
from niblick.data.command_line import guarded, parse
from niblick.data.errors import DataError


@dataclass(frozen=True)
class Download:
    """What to fetch, and where to. The defaults are the plain 8192-piece export that the challenge's runs used."""

    out: Path
    """Folder for shards and tokenizer."""
    shards: int = 80
    """Training shards, from the first (10^8 tokens and 200 MB each)."""
    val_shards: int = 1
    """Validation shards."""
    val_bytes: bool = False
    """Also the validation shards' bytes per token, which a CaseOps export has and its score needs."""
    repo: str = "kevclark/parameter-golf"
    """Dataset repository on the hub."""
    folder: str = "datasets/datasets/fineweb10B_sp8192"
    """Folder of the shards fineweb_{train,val}_NNNNNN.bin in the repository."""
    tokenizer: str = "datasets/tokenizers/fineweb_8192_bpe.model"
    """The SentencePiece model in the repository."""
    revision: str = "main"
    """Branch, tag or commit."""
    endpoint: str | None = None
    """Address of a mirror of the hub."""


def download(options: Download) -> list[Path]:
    """Fetches what `options` names and returns the files. DataError names the file that cannot be had or is wrong."""
    if options.shards < 0 or options.val_shards < 0:
        raise DataError(
            f"download: expected no negative number of shards, found {options.shards}, {options.val_shards}"
        )
    names = [f"{options.folder}/fineweb_train_{i:06d}.bin" for i in range(options.shards)]
    names += [f"{options.folder}/fineweb_val_{i:06d}.bin" for i in range(options.val_shards)]
    if options.val_bytes:
        names += [f"{options.folder}/fineweb_val_bytes_{i:06d}.bin" for i in range(options.val_shards)]
    return [_fetch(name, options) for name in [options.tokenizer, *names]]


def _fetch(name: str, options: Download) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    target = options.out / PurePosixPath(name).name
    place = {"repo_type": "dataset", "revision": options.revision, "endpoint": options.endpoint}
    url = hf_hub_url(options.repo, name, **place)
    incoming = options.out / ".incoming"
    try:
        size = get_hf_file_metadata(url).size
        if target.exists() and target.stat().st_size == size:
            _check(target, size)
            return target
        shutil.rmtree(incoming, ignore_errors=True)  # of a run that was killed
        fetched = Path(hf_hub_download(options.repo, name, local_dir=incoming, **place))
        _check(fetched, size)
        fetched.replace(target)
    except Exception as error:  # the hub client's errors are of its HTTP library, which changes with its version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{url}: not fetched to {target}: {reason}") from error
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return target


def _check(path: Path, size: int | None) -> None:
    """The file against the hub's size, a shard against its own header, a tokenizer by loading it."""
    found = path.stat().st_size
    if size is not None and found != size:
        raise DataError(f"{path}: expected the hub's {size} bytes, found {found}")
    if path.suffix == ".bin":
        shards.read_header(path)
    else:
        tokenizers.load(path)


def main(words: list[str]) -> None:
    for path in download(parse(Download, words, script="niblick.data.download", about=__doc__)):
        print(path)


if __name__ == "__main__":
    sys.exit(guarded("niblick.data.download", main, sys.argv[1:]))
