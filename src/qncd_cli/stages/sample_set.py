"""A sample set on disk: NNNNNN.png by seed, latents.safetensors, manifest.json, parts while it is
drawn; its contact sheet lies beside the folder."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import artifacts
from ..artifacts import Artifact
from ..errors import ArtifactError
from ..files import read_json, write_bytes, write_json
from ..metrics.report import contact_sheet

SHEET_IMAGES = 64
MANIFEST = "manifest.json"
PARTS = ".parts"
REASONS = {
    "batches": "batches, on which samples depend with correction.inter.granularity batch or with "
    "part below 1"
}
"""Keys of a manifest that say too little by themselves."""


def finished(folder: Path, identity: dict[str, Any]) -> Artifact | None:
    """Latents of the samples already in the folder, None when there are none.

    Raises ArtifactError when they were made with other settings.
    """
    manifest = begun(folder)
    if manifest is None:
        return None
    if manifest.get("digest") != identity["digest"]:
        keys = [key for key in {**identity, "compiled": None} if key != "digest"]
        differing = [
            REASONS.get(key, key) for key in keys if manifest.get(key) != identity.get(key)
        ]
        raise ArtifactError(
            f"{folder}: holds samples made with other settings (different: {', '.join(differing)})",
            "add --force to replace them, or --name NAME to keep both",
        )
    latents = folder / "latents.safetensors"
    if not latents.is_file():
        return None
    drawn = artifacts.read(latents, "latents")
    seeds = drawn.tensors["seeds"].tolist()
    return drawn if all(image_path(folder, seed).is_file() for seed in seeds) else None


def begun(folder: Path) -> dict[str, Any] | None:
    """The manifest of the set in the folder, finished or not."""
    path = folder / MANIFEST
    return read_json(path, "qncd sample --force") if path.exists() else None


def image_path(folder: Path, seed: int) -> Path:
    return folder / f"{seed:06d}.png"


def sheet_path(folder: Path) -> Path:
    """Beside the folder, so that the folder holds samples and no other images."""
    return folder.with_name(f"{folder.name}_sheet.png")


def clear(folder: Path) -> None:
    """Remove a sample set (for --force): only what this stage writes."""
    for path in [*folder.glob("[0-9]*.png"), folder / MANIFEST, folder / "latents.safetensors"]:
        path.unlink(missing_ok=True)
    sheet_path(folder).unlink(missing_ok=True)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def png_bytes(image: Tensor) -> bytes:
    """uint8 [C, H, W], C 1 or 3 -> PNG."""
    array = image.permute(1, 2, 0).numpy()
    array = array[:, :, 0] if array.shape[2] == 1 else array
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG")
    return buffer.getvalue()


def assemble(
    folder: Path, identity: dict[str, Any], drawn: Artifact | None, batch_size: int
) -> dict[str, Any]:
    """Join the parts, and what was drawn before, into one latents file, a sheet and the manifest,
    which is returned."""
    parts = sorted((folder / PARTS).glob("*.safetensors"))
    pieces = [drawn] if drawn else []
    latents = merge_latents(pieces + [artifacts.read(path, "latents") for path in parts])
    artifacts.write(folder / "latents.safetensors", latents)
    seeds = latents.tensors["seeds"].tolist()
    images = [Image.open(image_path(folder, seed)) for seed in seeds[:SHEET_IMAGES]]
    arrays = [torch.from_numpy(np.atleast_3d(np.array(image))) for image in images]
    sheet = contact_sheet(torch.stack(arrays).permute(0, 3, 1, 2), columns=None, scale=2)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(sheet_path(folder), buffer.getvalue())
    manifest = {
        **identity,
        "complete": True,
        "seeds": seeds,
        "classes": latents.tensors["classes"].tolist(),
        "batch_size": batch_size,
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
    return Artifact("latents", tensors, body, "", pieces[0].model)
