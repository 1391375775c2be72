"""A sample set on disk: what is there as it grows, how its parts are joined, how it is read."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ArtifactError
from ..metrics.images_on_disk import CHUNK, ImagesOnDisk, read_images
from ..report.images import contact_sheet
from ..store.artifact_files import read_stored
from ..store.files import write_bytes, write_json
from .latents import Latents, join
from .sample_sets import (
    ASKED,
    CONTENT,
    LATENTS,
    MANIFEST,
    PARTS,
    begun,
    check_identity,
    check_own_digest,
    image_path,
    read_manifest,
    sheet_path,
    without_image,
)

SHEET_IMAGES = 64
DIGITS = 16
"""Hexadecimal digits of an image's digest."""
SET_KEYS = ("seeds", "classes", "sampling", "correction", "digests", "source", "batch_size")
"""Keys of a manifest without which a set cannot be measured."""


# ------------------------------------------------------------------ writing


def finished(folder: Path, identity: dict[str, Any]) -> Latents | None:
    """Latents of the samples in the folder, some of whose images may be lost, None for none.

    Raises ArtifactError when they were made with other settings.
    """
    manifest = begun(folder)
    if manifest is None:
        return None
    check_identity(folder, manifest, identity)
    if not (folder / LATENTS).is_file():
        return None
    return Latents.open(folder / LATENTS)


def is_sound(part: Path) -> bool:
    """Whether a batch is there; a damaged one is drawn again."""
    try:
        stored = read_stored(part, "latents")
    except ArtifactError:
        return False
    first = int(part.stem.partition("-")[0])
    return not without_image(part.parent.parent, range(first, first + stored.body["count"]))


def png_bytes(image: Tensor) -> bytes:
    """uint8 [C, H, W], C 1 or 3 -> PNG."""
    array = image.permute(1, 2, 0).numpy()
    array = array[:, :, 0] if array.shape[2] == 1 else array
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG")
    return buffer.getvalue()


def pixels_digest(image: Tensor) -> str:
    """Digest of an image's colours, whatever file it is in. image: uint8 [C, H, W], C 1 or 3."""
    colours = image.expand(3, *image.shape[1:]).contiguous()
    digest = hashlib.sha256(repr(tuple(colours.shape)).encode())
    digest.update(colours.numpy().data)
    return digest.hexdigest()[:DIGITS]


def assemble(
    folder: Path,
    identity: dict[str, Any],
    pieces: Sequence[Latents],
    more: dict[str, Any],
    wanted: set[int],
) -> dict[str, Any]:
    """Join what was drawn into one latents file, a sheet and the manifest, which is returned.

    pieces: at least one; more: what else the manifest says. Raises ArtifactError where a wanted
    seed is in none of them, or an image is gone.
    """
    seeds = sorted(set().union(*(piece.row_of for piece in pieces)))
    lost = {*without_image(folder, seeds), *wanted.difference(seeds)}
    if lost:
        raise ArtifactError(
            f"{folder}: {len(lost)} images are not there although they were drawn"
            f" (first: {image_path(folder, min(lost)).name})",
            "does something else write or remove files there? repeat the command",
        )
    joined = join(folder / LATENTS, pieces)
    images = read_images([image_path(folder, seed) for seed in seeds[:SHEET_IMAGES]])
    sheet = contact_sheet(images, columns=None, scale=2)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(sheet_path(folder), buffer.getvalue())
    manifest = {
        **identity,
        **more,
        "complete": True,
        CONTENT: joined.digest,
        "seeds": seeds,
        "classes": Latents.open(folder / LATENTS).tensor("classes").tolist(),
        "extra_calls": joined.body["extra_calls"],
        "steps": joined.body["steps"],
    }
    write_json(folder / MANIFEST, manifest)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    return manifest


def parts_of(folder: Path) -> list[Path]:
    """Files of finished batches, in the order of their seeds."""
    return sorted((folder / PARTS).glob("*.safetensors"))


# ------------------------------------------------------------------ reading


@dataclass(frozen=True)
class SampleSet:
    """Samples that stay on disk. images: uint8 [N, 3, H, W], by seed; latents: of at least these
    seeds."""

    folder: Path
    manifest: dict[str, Any]
    images: ImagesOnDisk
    latents: Latents

    @property
    def seeds(self) -> list[int]:
        return self.manifest["seeds"]

    def cut(self, seeds: list[int]) -> SampleSet:
        """The samples of these seeds alone, which the set has."""
        if self.seeds == seeds:
            return self
        wanted = set(seeds)
        rows = [i for i, seed in enumerate(self.seeds) if seed in wanted]
        manifest = {**self.manifest, "seeds": seeds}
        manifest["classes"] = [self.manifest["classes"][i] for i in rows]
        return SampleSet(self.folder, manifest, self.images.take(rows), self.latents)

    def latent_chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Latents of all seeds, CHUNK at a time: the first row, and theirs."""
        for start in range(0, len(self.seeds), CHUNK):
            yield start, self.latents.of(self.seeds[start : start + CHUNK])


def read_set(folder: Path, *, whatever: bool = False) -> SampleSet:
    """The samples that the manifest names, in its order; other files in the folder are left out.

    whatever: also samples that are not finite or not those that were drawn, and sets of nothing but
    black images. Raises
    ArtifactError when the set is missing, incomplete or does not fit its manifest.
    """
    manifest = read_manifest(folder, "qncd sample")
    if not manifest.get("complete"):
        raise ArtifactError(f"{folder}: the sample set is incomplete", 'repeat "qncd sample"')
    missing = [key for key in SET_KEYS if key not in manifest]
    if missing:
        raise ArtifactError(
            f"{folder / MANIFEST}: damaged, without {', '.join(missing)}",
            'repeat "qncd sample --force"',
        )
    seeds = manifest["seeds"]
    lost = without_image(folder, seeds)
    if lost or not seeds:
        first = f", without {image_path(folder, lost[0]).name}" if lost else ""
        raise ArtifactError(
            f"{folder}: {len(seeds) - len(lost)} images, the manifest names {len(seeds)}{first}",
            'repeat "qncd sample", which draws what is missing',
        )
    latents = Latents.open(folder / LATENTS)
    _check_latents(folder, manifest, latents)
    check_own_digest(folder, manifest)
    check = None if whatever else _drawn(folder, latents)
    images = ImagesOnDisk([image_path(folder, seed) for seed in seeds], check)
    samples = SampleSet(folder, manifest, images, latents)
    if not whatever:
        _check_values(samples)
    return samples


def _check_latents(folder: Path, manifest: dict[str, Any], latents: Latents) -> None:
    """Raises ArtifactError for latents that are not those that the manifest was written with.

    While more of a set is drawn, they may hold more seeds than it.
    """
    seeds, classes = latents.seeds, latents.tensor("classes").tolist()
    found: dict[str, Any] = {key: latents.body[key] for key in ("steps", "extra_calls")}
    found[CONTENT] = latents.stored.digest
    if ASKED in manifest:
        wanted, found = {*manifest["seeds"]}, {}
        rows = [row for row, seed in enumerate(seeds) if seed in wanted]
        seeds, classes = [seeds[row] for row in rows], [classes[row] for row in rows]
    found |= {"seeds": seeds, "classes": classes}
    other = [key for key, value in found.items() if manifest.get(key, value) != value]
    if other:
        what = "values" if other == [CONTENT] else other[-1]
        raise ArtifactError(
            f"{folder / LATENTS}: of other {what} than the manifest names",
            'repeat "qncd sample --force"',
        )


def _drawn(folder: Path, latents: Latents) -> Callable[[Sequence[Path], Tensor], None] | None:
    """A check that raises ArtifactError for images that are not those that were drawn. Sets of
    earlier versions do not know theirs."""
    known = latents.pixels()
    if known is None:
        return None
    digests = {image_path(folder, seed): digest for seed, digest in known.items()}

    def check(paths: Sequence[Path], images: Tensor) -> None:
        rows = zip(paths, images, strict=True)
        other = [path for path, image in rows if pixels_digest(image) != digests[path]]
        if other:
            raise ArtifactError(
                f"{folder}: {len(other)} of {len(digests)} images are not those that were drawn "
                f"(first: {other[0].name})",
                'remove them and repeat "qncd sample", which makes them again',
            )

    return check


def _check_values(samples: SampleSet) -> None:
    """Sets drawn before anything looked at values may hold black images of what was none."""
    for start, chunk in samples.latent_chunks():
        for seed, latent in zip(samples.seeds[start:], chunk, strict=False):
            if not torch.isfinite(latent).all():
                raise ArtifactError(
                    f"{samples.folder}: the latents of seed {seed} are not finite, its image shows"
                    " nothing",
                    'draw it again: "qncd sample --force"',
                )
    if not any(chunk.any() for chunk in samples.images.split(CHUNK)):
        raise ArtifactError(
            f"{samples.folder}: every image is black", 'draw them again: "qncd sample --force"'
        )


def match_sets(full: SampleSet, quantized: SampleSet) -> tuple[SampleSet, SampleSet]:
    """Both sets cut down to the seeds they share. Raises ArtifactError."""
    if full.manifest["sampling"] != quantized.manifest["sampling"]:
        raise ArtifactError(
            f"{full.folder} and {quantized.folder} were sampled with different settings",
            "sample both with the same options",
        )
    if full.manifest["digests"]["model"] != quantized.manifest["digests"]["model"]:
        raise ArtifactError(f"{full.folder} and {quantized.folder} are of different models")
    shared = sorted(set(full.seeds) & set(quantized.seeds))
    if not shared:
        raise ArtifactError(f"{full.folder} and {quantized.folder} share no seed", "sample again")
    return full.cut(shared), quantized.cut(shared)
