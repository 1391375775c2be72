"""A sample set on disk: what is there as it grows, how its parts are joined, how it is read."""

from __future__ import annotations

import hashlib
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ArtifactError
from ..metrics.reference import read_images
from ..report.images import contact_sheet
from ..store import artifacts
from ..store.artifact_files import read_stored
from ..store.artifacts import Artifact
from ..store.files import write_bytes, write_json
from .sample_sets import (
    LATENTS,
    MANIFEST,
    PARTS,
    PIXELS,
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


def finished(folder: Path, identity: dict[str, Any]) -> Artifact | None:
    """Latents of the samples in the folder, some of whose images may be lost, None for none.

    Raises ArtifactError when they were made with other settings.
    """
    manifest = begun(folder)
    if manifest is None:
        return None
    check_identity(folder, manifest, identity)
    if not (folder / LATENTS).is_file():
        return None
    return artifacts.read(folder / LATENTS, "latents")


def is_sound(part: Path) -> bool:
    """Whether a batch is there; a damaged one is drawn again."""
    try:
        stored = read_stored(part, "latents")
    except ArtifactError:
        return False
    first = int(part.stem.partition("-")[0])
    return not without_image(part.parent.parent, range(first, first + stored.body["count"]))


def without(drawn: Artifact, seeds: set[int]) -> Artifact | None:
    """The samples of all other seeds, None where no others are there."""
    if not seeds:
        return drawn

    def keep(key: str) -> list[int]:
        return [row for row, s in enumerate(drawn.tensors[key].tolist()) if s not in seeds]

    rows, traced = keep("seeds"), keep("prediction_seeds")
    if not rows:
        return None
    tensors = {name: drawn.tensors[name][rows] for name in ("latents", "seeds", "classes")}
    tensors |= {name: drawn.tensors[name][traced] for name in ("predictions", "prediction_seeds")}
    body = {**drawn.body, "count": len(rows), "traced": len(traced)}
    if PIXELS in body:
        body[PIXELS] = [body[PIXELS][row] for row in rows]
    return Artifact("latents", tensors, body, "", drawn.model)


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
    drawn: Artifact | None,
    batch_size: int,
    device: str,
    wanted: set[int],
) -> dict[str, Any]:
    """Join the parts, and what was drawn before, into one latents file, a sheet and the manifest,
    which is returned. device: of the last batch.

    Raises ArtifactError where a wanted seed is in none of them, or an image is gone.
    """
    parts = sorted((folder / PARTS).glob("*.safetensors"))
    pieces = [drawn] if drawn else []
    latents = merge_latents(pieces + [artifacts.read(path, "latents") for path in parts])
    seeds = latents.tensors["seeds"].tolist()
    lost = {*without_image(folder, seeds), *wanted.difference(seeds)}
    if lost:
        raise ArtifactError(
            f"{folder}: {len(lost)} images are not there although they were drawn"
            f" (first: {image_path(folder, min(lost)).name})",
            "does something else write or remove files there? repeat the command",
        )
    artifacts.write(folder / LATENTS, latents)
    images = read_images([image_path(folder, seed) for seed in seeds[:SHEET_IMAGES]])
    sheet = contact_sheet(images, columns=None, scale=2)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(sheet_path(folder), buffer.getvalue())
    manifest = {
        **identity,
        "complete": True,
        "seeds": seeds,
        "classes": latents.tensors["classes"].tolist(),
        "batch_size": batch_size,
        "device": device,
        "extra_calls": latents.body["extra_calls"],
        "steps": latents.body["steps"],
    }
    write_json(folder / MANIFEST, manifest)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    return manifest


def merge_latents(pieces: list[Artifact]) -> Artifact:
    """One latents artifact, ordered by seed, each seed once (the later piece wins)."""

    def merged(key: str, names: list[str]) -> dict[str, Tensor]:
        row_of = {
            seed: (piece, row)
            for piece in pieces
            for row, seed in enumerate(piece.tensors[key].tolist())
        }
        order = [row_of[seed] for seed in sorted(row_of)]
        if not order:
            return {name: pieces[0].tensors[name] for name in [key, *names]}
        return {
            name: torch.stack([piece.tensors[name][row] for piece, row in order])
            for name in [key, *names]
        }

    tensors = merged("seeds", ["latents", "classes"])
    tensors |= merged("prediction_seeds", ["predictions"])
    body = {
        **pieces[0].body,
        "count": len(tensors["seeds"]),
        "traced": len(tensors["prediction_seeds"]),
        "extra_calls": max(piece.body["extra_calls"] for piece in pieces),
    }
    pixels = {
        seed: digest
        for piece in pieces
        for seed, digest in zip(
            piece.tensors["seeds"].tolist(), piece.body.get(PIXELS, ()), strict=False
        )
    }
    body.pop(PIXELS, None)
    if all(seed in pixels for seed in tensors["seeds"].tolist()):
        body[PIXELS] = [pixels[seed] for seed in tensors["seeds"].tolist()]
    return Artifact("latents", tensors, body, "", pieces[0].model)


# ------------------------------------------------------------------ reading


@dataclass(frozen=True)
class SampleSet:
    """images uint8 [N, 3, H, W], by seed; latents: the set's artifact."""

    folder: Path
    manifest: dict[str, Any]
    images: Tensor
    latents: Artifact

    @property
    def seeds(self) -> list[int]:
        return self.manifest["seeds"]

    def cut(self, seeds: list[int]) -> SampleSet:
        """The samples of these seeds alone, which the set has."""
        if self.seeds == seeds:
            return self
        wanted = set(seeds)
        rows = [i for i, seed in enumerate(self.seeds) if seed in wanted]
        tensors = dict(self.latents.tensors)
        for name in ("latents", "seeds", "classes"):
            tensors[name] = tensors[name][rows]
        manifest = {**self.manifest, "seeds": seeds}
        manifest["classes"] = [self.manifest["classes"][i] for i in rows]
        body = {**self.latents.body, "count": len(rows)}
        if PIXELS in body:
            body[PIXELS] = [body[PIXELS][i] for i in rows]
        latents = Artifact("latents", tensors, body, "", self.latents.model)
        return SampleSet(self.folder, manifest, self.images[rows], latents)


def read_set(folder: Path, *, whatever: bool = False) -> SampleSet:
    """The samples that the manifest names, in its order; other files in the folder are left out.

    whatever: also samples that are not finite, and sets of nothing but black images.
    Raises ArtifactError when the set is missing, incomplete or does not fit its manifest.
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
    latents = artifacts.read(folder / LATENTS, "latents")
    for key in ("seeds", "classes"):
        if latents.tensors[key].tolist() != manifest[key]:
            raise ArtifactError(
                f"{folder / LATENTS}: of other {key} than the manifest names",
                'repeat "qncd sample --force"',
            )
    check_own_digest(folder, manifest)
    images = read_images([image_path(folder, seed) for seed in seeds])
    _check_pixels(folder, seeds, images, latents)
    if not whatever:
        _check_values(folder, seeds, images, latents)
    return SampleSet(folder, manifest, images, latents)


def _check_pixels(folder: Path, seeds: list[int], images: Tensor, latents: Artifact) -> None:
    """Raises ArtifactError for images that are not those that were drawn. Sets of earlier versions
    do not know theirs."""
    known = latents.body.get(PIXELS)
    if known is None:
        return
    rows = zip(seeds, images, known, strict=True)
    other = [seed for seed, image, digest in rows if pixels_digest(image) != digest]
    if other:
        raise ArtifactError(
            f"{folder}: {len(other)} of {len(seeds)} images are not those that were drawn "
            f"(first: {image_path(folder, other[0]).name})",
            'remove them and repeat "qncd sample", which makes them again',
        )


def _check_values(folder: Path, seeds: list[int], images: Tensor, latents: Artifact) -> None:
    """Sets drawn before anything looked at values may hold black images of what was none."""
    found = latents.tensors["latents"]
    for seed, latent in zip(seeds, found, strict=False):
        if not torch.isfinite(latent).all():
            raise ArtifactError(
                f"{folder}: the latents of seed {seed} are not finite, its image shows nothing",
                'draw it again: "qncd sample --force"',
            )
    if not images.any():
        raise ArtifactError(
            f"{folder}: every image is black", 'draw them again: "qncd sample --force"'
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
