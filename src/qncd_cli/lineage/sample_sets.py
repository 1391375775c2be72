"""A sample set on disk without its tensors: names, manifest, and what decides its images.

| path | what |
|---|---|
| NNNNNN.png | the image of a seed; more digits where the seed has more |
| latents.safetensors | latents of all seeds |
| manifest.json | the set's identity, its seeds and labels |
| .parts/ | batches, while the set is drawn |

The contact sheet lies beside the folder, so that the folder holds samples and no other images.
Nothing here needs torch.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..errors import ArtifactError
from ..store.digests import differing, digest_of
from ..store.files import read_json

MANIFEST = "manifest.json"
LATENTS = "latents.safetensors"
PARTS = ".parts"
ASKED = "asked"
"""Key of the manifest of a set that is being drawn: all seeds whose images may be there by now. A
complete set that more is asked of keeps its seeds until they are all there."""
CONTENT = "latents"
"""Key of a manifest: the digest of its latents, which were its own."""
TRACED = 32
"""Seeds of a set, the first ones, whose predictions are kept at every step, for the SQNR over the
steps."""
PIXELS = "pixels"
"""Key in the body of latents: a digest of every image's colours, in the order of their seeds."""
IDENTITY = (
    *("kind", "source", "dtype", "sampling", "correction", "digests"),
    *("guidance", "backend", "compiled", "batches", "tile", "encoded_by"),
)
"""Keys of a manifest that its own digest is of."""
TYPES: dict[str, type] = {
    **dict.fromkeys(("digest", "kind", "source", "dtype", "backend", "device", CONTENT), str),
    "encoded_by": str,
    **dict.fromkeys(("sampling", "digests", "batches"), dict),
    **dict.fromkeys(("batch_size", "steps", "extra_calls", "tile"), int),
    **{"classes": list, "complete": bool, "compiled": bool},
}
"""Types of what a manifest holds, where it does."""
LARGEST_BATCH = 50
BATCH_MACS = 10**12
"""MACs that one call may take with the default batch; larger: more samples, more memory."""
NAMES = {
    "source": "model.source",
    "dtype": "model.dtype",
    "correction": "correction.inter",
    "digests.model": "the model's files",
    "digests.quantized": "the quantized model",
    "digests.reuse": "the reuse plan",
    "digests.first_stage": "the decoder in integers",
    "digests.text_encoders": "the quantized text encoders",
    "encoded_by": "what computes the text encoders",
    "tile": "first_stage.tile",
    "batches.first_seed": "--seed",
    "batches.count": "--num",
    "batches.size": "--batch-size",
}
"""Keys of a manifest as the user knows them, by their beginnings."""
REASON = (
    "samples depend on their batches with correction.inter.granularity batch or with part below 1"
)


def default_batch(macs: int) -> int:
    """Samples drawn together by default. macs: of one call on one sample."""
    return max(1, min(LARGEST_BATCH, BATCH_MACS // macs))


# ------------------------------------------------------------------ places


def begun(folder: Path) -> dict[str, Any] | None:
    """The manifest of the set in the folder, finished or not. Raises ArtifactError where it is
    damaged."""
    return read_manifest(folder, "qncd sample --force") if (folder / MANIFEST).exists() else None


def read_manifest(folder: Path, command: str) -> dict[str, Any]:
    """The manifest of a set. Raises ArtifactError where it is missing or damaged; command: what
    makes a good one."""
    path = folder / MANIFEST
    found = read_json(path, command)
    seeds = [found.get("seeds"), found.get(ASKED, [])] if isinstance(found, dict) else [None]
    sound = all(isinstance(s, list) and all(type(n) is int for n in s) for s in seeds)
    if not sound or any(type(found[k]) is not t for k, t in TYPES.items() if k in found):
        raise ArtifactError(f"{path}: damaged", f'repeat "{command}"')
    return found


def image_path(folder: Path, seed: int) -> Path:
    return folder / f"{seed:06d}.png"


def sheet_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}_sheet.png")


def without_image(folder: Path, seeds: Iterable[int]) -> list[int]:
    """Those of the seeds whose image is not there, or empty."""
    return [seed for seed in seeds if not _has_bytes(image_path(folder, seed))]


def _has_bytes(path: Path) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0


def clear(folder: Path, also: Iterable[int] = ()) -> None:
    """Remove a sample set (for --force): only what sampling wrote, as its manifest says.

    also: seeds that are known from elsewhere to belong to the set.
    """
    try:
        manifest = begun(folder) or {}
    except ArtifactError:
        manifest = {}  # damaged, or the user's own file: the names in it are lost
    seeds = {*also, *manifest.get("seeds", ()), *manifest.get(ASKED, ())}
    for path in [*(image_path(folder, s) for s in seeds), folder / MANIFEST, folder / LATENTS]:
        path.unlink(missing_ok=True)
    sheet_path(folder).unlink(missing_ok=True)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


# ------------------------------------------------------------------ identity


@dataclass(frozen=True)
class Drawing:
    """How a set is drawn, beside the configuration.

    kind: quantized or full; digests: of what its denoiser was made from; backend: the name of what
    computes quantized layers, None for full precision; without_guidance: none although a scale is
    set; first_seed, count, batch_size: None where the set does not depend on them. encoded_by: the
    name of what computes quantized text encoders, None where there are none.
    """

    kind: str
    digests: dict[str, str]
    backend: str | None = None
    compiled: bool = False
    without_guidance: bool = False
    first_seed: int | None = None
    count: int | None = None
    batch_size: int | None = None
    encoded_by: str | None = None


def identity_of(config: Config, drawing: Drawing) -> dict[str, Any]:
    """Everything but the seeds that decides the images of a set.

    Where samples depend on their batch, the seeds and how they are cut into batches as well: such
    a set can be finished, but not go on to other seeds.
    """
    inter = config.correction.inter if drawing.kind == "quantized" else None
    identity: dict[str, Any] = {
        "kind": drawing.kind,
        "source": config.model.source,
        "dtype": config.model.dtype,
        "sampling": config.sampling.drawn_with(),
        "correction": inter.identity() if inter is not None else None,
        "digests": drawing.digests,
    }
    if drawing.without_guidance:
        identity["guidance"] = "off"  # sets drawn when it led away from the prompt are others
    if drawing.backend is not None:
        identity["backend"] = drawing.backend  # equal to others only up to float rounding
    if drawing.compiled:
        identity["compiled"] = True  # the same
    if config.first_stage.tile is not None:
        identity["tile"] = config.first_stage.tile
    if drawing.encoded_by is not None:
        identity["encoded_by"] = drawing.encoded_by  # as for the backend
    if inter is not None and inter.depends_on_batch:
        identity["batches"] = {
            "first_seed": drawing.first_seed,
            "count": drawing.count,
            "size": drawing.batch_size,
        }
    return {**identity, "digest": digest_of(identity)}


def check_own_digest(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises ArtifactError where what the manifest says of the set is not what it was made with."""
    said = {key: manifest[key] for key in IDENTITY if key in manifest}
    if digest_of(said) != manifest.get("digest"):
        raise ArtifactError(
            f"{folder / MANIFEST}: damaged, its content does not match its digest",
            'repeat "qncd sample --force"',
        )


def check_identity(folder: Path, manifest: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises ArtifactError, with old and new values, for a set made with other settings."""
    if manifest.get("digest") == identity["digest"]:
        return
    keys = [key for key in {**identity, "compiled": None} if key != "digest"]
    before, now = ({key: tree.get(key) for key in keys} for tree in (manifest, identity))
    changes = differing(before, now, NAMES) or ["a changed digest"]
    if before.get("batches") != now.get("batches"):
        changes.append(REASON)
    raise ArtifactError(
        f"{folder}: holds samples made with other settings ({'; '.join(changes)})",
        "add --force to replace them, or --name NAME to keep both",
    )
