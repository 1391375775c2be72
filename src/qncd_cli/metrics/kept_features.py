"""Features of images, computed once: kept in the user's cache, block by block.

A block is kept under a digest of its images' files, of the network and of all else that decides
features to the bit, so that it is found again whatever the folder is called and whatever lies
beside it: by the next `eval`, by other runs that share a full-precision set, for a set that has
grown, and after a kill, of which the block that was being computed is lost. Blocks are sealed like
all artifacts, and one that is damaged is computed again. Where the cache cannot be written, nothing
is kept.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import machine
from ..errors import ArtifactError
from ..progress import Tick, Track, counted, no_progress
from ..store import artifacts
from ..store.artifacts import Artifact
from ..store.digests import digest_of
from ..store.file_stamps import cache_folder
from . import domains, fidelity, images_on_disk, seen
from . import features as networks_here
from .fidelity import Features, create_extractor, extract_features
from .image_files import digest_of_files
from .images_on_disk import Images
from .networks import FeatureNetwork
from .seen import Seen

T = TypeVar("T")
CALLS = 16
"""Calls of a network in a block: 512 images of the packaged one, 128 of Inception, 10 to 20 s on
two cores. More: fewer files, more lost by a kill."""
LARGEST = 4 << 30
"""Bytes of the cache from which on the blocks that were used least recently are removed: features
of 300,000 images in Inception's."""
LAYERS = ("features", "logits", "spatial")
DECIDING = (networks_here, domains, fidelity, images_on_disk, seen)
"""Modules whose code decides what is kept."""
LIBRARIES = ("torch", "torch-fidelity", "pillow", "numpy")


@dataclass(frozen=True)
class _Block:
    """Rows of the images, and the file that keeps what a network makes of them."""

    rows: range
    place: Path


def kept_features(
    images: Images,
    network: FeatureNetwork,
    *,
    names: Sequence[Any] | None = None,
    spatial: bool = False,
    device: str = "cpu",
    track: Track = no_progress,
) -> tuple[Features, Seen]:
    """extract_features, and what there is to notice of the images, from the cache where it can be.

    Arguments and errors as of extract_features; at least one image. Progress counts the images
    that are not in the cache.
    """
    blocks = list(_blocks(images, network, spatial, device))
    size = [*images.shape[-2:]]
    found = {block: _read(block, size) for block in blocks}
    missing = [block for block in blocks if found[block] is None]
    if missing:
        extractor = create_extractor(network).to(device)
        total = sum(len(block.rows) for block in missing)
        for block, tick in counted(track, missing, "extracting features", total, "images"):
            noticed = Seen()
            made = extract_features(
                _take(images, block.rows),
                network,
                names=block.rows,
                spatial=spatial,
                device=device,
                track=_through(tick),
                see=noticed.add,
                extractor=extractor,
            )
            found[block] = made, noticed
            _write(block, network, size, made, noticed)
        _make_room()
    parts = [part for part in found.values() if part is not None]
    noticed = Seen.joined([part for _, part in parts])
    keys = noticed.digests if names is None else list(names)
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))
    whole = {name: _joined([getattr(made, name) for made, _ in parts]) for name in LAYERS}
    features, logits = whole["features"], whole["logits"]
    assert features is not None and logits is not None
    return Features(network.name, features, logits, whole["spatial"], order), noticed


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _through(tick: Tick) -> Track:
    """Progress of one block as progress of all."""

    def track(
        items: Iterable[T], description: str, total: int, unit: str
    ) -> Generator[T, None, None]:
        for item in items:
            yield item
            tick()

    return track


# ------------------------------------------------------------------ blocks


def block_size(network: FeatureNetwork) -> int:
    """Images that are kept in one file, a multiple of those of a call."""
    return CALLS * network.batch


def _blocks(
    images: Images, network: FeatureNetwork, spatial: bool, device: str
) -> Iterator[_Block]:
    here = machine.described()
    made_from = {
        "network": [network.name, network.sha256, network.resize, network.batch],
        "spatial": spatial,
        "device": device,
        "code": _code(),
        "versions": [version(name) for name in LIBRARIES],
        "machine": [here["capability"], here["threads"]],
    }
    size = block_size(network)
    for start in range(0, len(images), size):
        rows = range(start, min(start + size, len(images)))
        key = digest_of([made_from, _content(images, rows)])
        yield _Block(rows, cache_folder() / "features" / key[:2] / f"{key}.safetensors")


def _code() -> str:
    digest = hashlib.sha256()
    for module in DECIDING:
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def _content(images: Images, rows: range) -> str:
    """Digest of these images as they lie on disk, or in memory."""
    if not isinstance(images, Tensor):
        return digest_of_files(images.paths[rows.start : rows.stop])
    pixels = images[rows.start : rows.stop].cpu().contiguous()
    digest = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    digest.update(pixels.numpy().data)
    return digest.hexdigest()


def _take(images: Images, rows: range) -> Images:
    return images[rows.start : rows.stop] if isinstance(images, Tensor) else images.take(rows)


# ------------------------------------------------------------------ files


def _read(block: _Block, size: list[int]) -> tuple[Features, Seen] | None:
    """What is kept of a block of images of this height and width; None where nothing is."""
    try:
        artifact = artifacts.read(block.place, "features")
        os.utime(block.place)
    except (ArtifactError, OSError):
        return None
    body, tensors = artifact.body, artifact.tensors
    if body["size"] != size or body["count"] != len(block.rows):
        return None  # these very images, in a set of another size: whoever reads them says so
    return Features(body["network"], **tensors), Seen.of_told(body["seen"])


def _write(
    block: _Block, network: FeatureNetwork, size: list[int], made: Features, noticed: Seen
) -> None:
    tensors = {name: t for name in LAYERS if (t := getattr(made, name)) is not None}
    body = {
        "network": network.name,
        "count": len(block.rows),
        "size": size,
        "seen": noticed.told(),
        "widths": {name: t.shape[1] for name, t in tensors.items()},
    }
    with suppress(ArtifactError):  # no room, or not allowed to: nothing is kept
        artifacts.write(
            block.place, Artifact("features", tensors, body, block.place.stem, network.sha256)
        )


def _make_room(largest: int = LARGEST) -> None:
    """Remove the blocks that were used least recently from a cache that has grown too large."""
    with suppress(OSError):  # another process removes some at the same time
        files = [(p.stat(), p) for p in (cache_folder() / "features").glob("*/*.safetensors")]
        total = sum(status.st_size for status, _ in files)
        for status, path in sorted(files, key=lambda file: file[0].st_mtime):
            if total <= largest:
                break
            path.unlink(missing_ok=True)
            total -= status.st_size
