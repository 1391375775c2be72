"""The digest of a model's files, by which everything that is made from it is known.

Nothing here needs torch: whether a run still holds is settled before anything is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..config.lora_names import split_lora
from ..config.model_card import folder_of
from ..errors import ModelError
from ..store.file_stamps import remembered
from .shards import shards_of

CHECKPOINTS = (".ckpt", ".pt", ".pth", ".safetensors")
SUFFIXES = (".json", ".safetensors", ".bin", ".model")
"""Endings of the files that a pipeline is read from."""
TOKENIZERS = ("merges.txt", "vocab.txt")
"""Tokenizers' files of other endings."""
RECORD = "training.json"
"""How a packaged model was trained; no part of it."""
RANDOM_SEED = 0
"""Seed of the weights of random models."""


def known_digest(
    source: str,
    compvis_config: str | None = None,
    tokenizer: str | None = None,
    base: str | None = None,
) -> str | None:
    """The digest that a model has once it is loaded; None where only loading it tells.

    Raises ModelError for files that cannot be read.
    """
    if source.startswith("random:"):
        return random_digest(source)
    if is_checkpoint(source):
        try:
            return checkpoint_digest(source, compvis_config, tokenizer, base)
        except OSError:
            return None  # loading says which file, and what to do
    folder = folder_of(source)
    return folder_digest(folder) if folder is not None else None


def with_loras(digest: str, loras: Sequence[str]) -> str:
    """The digest of a model with LoRAs fused into it; the model's own without any.

    loras: FILE or FILE:WEIGHT. Raises ModelError for a file that cannot be read.
    """
    for lora in loras:
        path, weight = split_lora(lora)
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ModelError(
                f"{path}: cannot be read: {error.strerror or error}", "give a LoRA file (--lora)"
            ) from error
        digest = hashlib.sha256(f"{digest} {found} {weight}".encode()).hexdigest()[:16]
    return digest


def folder_digest(folder: Path) -> str:
    """First 16 hex digits of a SHA-256 over names and contents of the pipeline's files.

    Links are followed: what lies behind them counts as if it lay in the folder.
    Raises ModelError for a file that cannot be read, such as a link to nothing.
    """
    files = sorted(files_below(folder))
    names = [path.relative_to(folder).as_posix() for path in files]
    return remembered(f"model {names}", files, lambda: _folder_digest(folder, files))


def _folder_digest(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(os.fsencode(path.relative_to(folder).as_posix()))
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        except OSError as error:
            what = "a link to nothing" if path.is_symlink() else str(error.strerror or error)
            raise ModelError(
                f"{path}: cannot be read: {what}", "is the folder complete? download it again"
            ) from error
    return digest.hexdigest()[:16]


def files_below(folder: Path) -> Iterator[Path]:
    """Files of a pipeline's folder that decide what it computes, those behind links included.

    A link to a folder that it lies in itself is not entered.
    """
    entered = {folder: {_place(folder)}}
    for name, subfolders, names in os.walk(folder, followlinks=True):
        here = Path(name)
        above = entered.pop(here)
        for subfolder in list(subfolders):
            place = _place(here / subfolder)
            if place in above:
                subfolders.remove(subfolder)
            else:
                entered[here / subfolder] = above | {place}
        for file in names:
            read = Path(file).suffix in SUFFIXES or file in TOKENIZERS
            if read and file != RECORD:
                yield here / file


def _place(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def is_checkpoint(source: str) -> bool:
    """Whether a model source names a checkpoint file, whether that is there or not."""
    path = Path(source)
    return path.suffix in CHECKPOINTS and not os.path.isdir(path)


def checkpoint_files(
    checkpoint: str, compvis_config: str | None, tokenizer: str | None, base: str | None = None
) -> list[Path]:
    """Files that a checkpoint's digest covers; a tokenizer that is a hub id adds none."""
    if base is not None:
        place = folder_of(base)
        return [*shards_of(checkpoint), *sorted(files_below(place) if place is not None else ())]
    folder = Path(tokenizer) if tokenizer else None
    beside: list[Path] = []
    if folder is not None and os.path.isdir(folder):
        beside = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt"))
    return [Path(checkpoint), Path(str(compvis_config)), *beside]


def checkpoint_digest(
    checkpoint: str, compvis_config: str | None, tokenizer: str | None, base: str | None = None
) -> str:
    """First 16 hex digits of a SHA-256 over the contents of a checkpoint, of its YAML or the files
    of its base, and of others.

    Raises OSError where one of them cannot be read.
    """
    files = checkpoint_files(checkpoint, compvis_config, tokenizer, base)

    def compute() -> str:
        digest = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    return remembered("checkpoint", files, compute)


def random_digest(source: str) -> str:
    """Digest of a model with random weights, which torch's version decides."""
    made_from = f"{source} {RANDOM_SEED} {_torch_version()}"
    return hashlib.sha256(made_from.encode()).hexdigest()[:16]


def _torch_version() -> str:
    """torch.__version__, without importing it."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None, "torch is a dependency"
    text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    version = re.search(r"""^__version__ = ['"](.+)['"]$""", text, re.MULTILINE)
    assert version is not None, "torch.version names the version"
    return version[1]
