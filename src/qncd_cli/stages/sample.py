"""Stage 3: images from the quantized (or the full-precision) model, noise corrected.

A sample set is a folder: NNNNNN.png by seed, latents.safetensors, manifest.json; its contact sheet
lies beside it.
Seeds are cut into the same batches whether a run is resumed or not, so that a resumed set is, byte
for byte, the set that an uninterrupted run writes.
"""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import artifacts
from ..artifacts import Artifact
from ..config import Config
from ..digests import digest_of
from ..errors import ArtifactError, ConfigError
from ..files import read_json, remove_temporaries, write_bytes, write_json
from ..metrics.report import contact_sheet
from ..models.loading import DiffusionModel
from ..quant.estimator_baseline import EstimatorBaseline
from ..quant.noise_correction import RuntimeCorrection
from ..quant.offline_correction import AffineCorrection, PtqdCorrection
from ..sampling.levels import plan_steps, supports_variance_deduction, with_timesteps
from ..sampling.noise import chunks, generators_for
from ..sampling.samplers import Correction, denoise, make_scheduler
from .assemble import Track, guided_predict, no_progress
from .subject import Subject

TRACED = 32
"""Seeds whose predictions are kept at every step, for the SQNR over the steps."""
SHEET_IMAGES = 64
LARGEST_BATCH = 50
BATCH_MACS = 10**12
"""Of one call, as many samples as come near it where fewer are to be drawn together."""
MANIFEST = "manifest.json"
PARTS = ".parts"


def default_batch(macs: int) -> int:
    """How many samples are drawn together unless it is said. macs: of one call on one sample."""
    return max(1, min(LARGEST_BATCH, BATCH_MACS // macs))


@dataclass(frozen=True)
class SampleRequest:
    """What to draw: seeds first_seed .. first_seed + count - 1, in batches, into folder."""

    folder: Path
    first_seed: int
    count: int
    batch_size: int

    @property
    def seeds(self) -> list[int]:
        return list(range(self.first_seed, self.first_seed + self.count))


def run(
    config: Config,
    model: DiffusionModel,
    subject: Subject,
    request: SampleRequest,
    track: Track = no_progress,
) -> dict[str, Any]:
    """Draw what is missing of the set and return its manifest.

    Raises ArtifactError when the folder holds another set than the one asked for, ConfigError
    when the correction was prepared for other sampling settings.
    """
    identity = identify(config, model, subject)
    check(config, model, subject, request)
    finished = _finished(request.folder, identity)
    done = set(finished.tensors["seeds"].tolist()) if finished else set()
    scheduler = make_scheduler(config.sampling.scheduler, model.scheduler_config)
    write_json(
        request.folder / MANIFEST,
        {**identity, "complete": False, "seeds": sorted(done), "batch_size": request.batch_size},
    )
    remove_temporaries(request.folder)
    pending = [b for b in chunks(request.seeds, request.batch_size) if not done.issuperset(b)]
    for seeds in track(pending, f"sampling ({subject.kind})", len(pending)):
        part = request.folder / PARTS / f"{seeds[0]:06d}-{len(seeds)}.safetensors"
        if not part.is_file():
            draw_batch(config, model, subject, scheduler, seeds, part)
    return _assemble(request, identity, finished)


def check(config: Config, model: DiffusionModel, subject: Subject, request: SampleRequest) -> None:
    """Before anything is drawn or replaced. Raises ModelError, ConfigError.

    A correction is refused where its statistics were prepared for other sampling, and where the
    scheduler leaves it without meaning (`plan_steps`).
    """
    model.labels(request.seeds, config.sampling.classes)
    _check_correction(config, subject)
    if subject.kind == "quantized" and config.correction.inter.method != "none":
        scheduler = make_scheduler(config.sampling.scheduler, model.scheduler_config)
        steps, eta = config.sampling.steps, config.sampling.eta
        plan_steps(with_timesteps(scheduler, steps, eta), eta)


def identify(config: Config, model: DiffusionModel, subject: Subject) -> dict[str, Any]:
    """Everything but the seeds that decides the images of a set."""
    sampling = config.to_dict()["sampling"]
    sampling.pop("seed")
    inter = config.correction.inter.model_dump() if subject.kind == "quantized" else None
    if inter is not None and inter["method"] == "none":
        inter = {"method": "none"}
    identity = {
        "kind": subject.kind,
        "source": model.source,
        "dtype": config.model.dtype,
        "sampling": sampling,
        "correction": inter,
        "digests": subject.digests,
    }
    if subject.backend is not None:
        identity["backend"] = subject.backend.name  # equal to others only up to float rounding
    if subject.compiled:
        identity["compiled"] = True  # the same
    return {**identity, "digest": digest_of(identity)}


def _finished(folder: Path, identity: dict[str, Any]) -> Artifact | None:
    """Latents of the samples already in the folder, None when there are none.

    Raises ArtifactError when they were made with other settings.
    """
    manifest = begun(folder)
    if manifest is None:
        return None
    if manifest.get("digest") != identity["digest"]:
        keys = [key for key in {**identity, "compiled": None} if key != "digest"]
        differing = [key for key in keys if manifest.get(key) != identity.get(key)]
        raise ArtifactError(
            f"{folder}: holds samples made with other settings (different: {', '.join(differing)})",
            "add --force to replace them, or --name NAME to keep both",
        )
    latents = folder / "latents.safetensors"
    if not latents.is_file():
        return None
    finished = artifacts.read(latents, "latents")
    seeds = finished.tensors["seeds"].tolist()
    return finished if all(image_path(folder, seed).is_file() for seed in seeds) else None


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


# ------------------------------------------------------------------ corrections


def _check_correction(config: Config, subject: Subject) -> None:
    """Statistics hold for the sampler they were measured with, and for no other."""
    inter, stats = config.correction.inter, subject.noise_stats
    needs = inter.method in ("ptqd", "affine") or (
        inter.method == "runtime" and inter.baseline == "full_precision"
    )
    if subject.kind == "full" or not needs:
        return
    assert stats is not None
    prepared = stats.body["sampling"]
    asked = {key: getattr(config.sampling, key) for key in prepared}
    differing = [f"{k} {prepared[k]}, now {asked[k]}" for k in prepared if prepared[k] != asked[k]]
    if differing:
        raise ConfigError(
            f"the {inter.method} correction was prepared for other sampling"
            f" ({'; '.join(differing)})",
            'repeat "qncd calibrate" and "qncd quantize" with these settings, or add --inter none',
        )
    if inter.method == "runtime" and stats.body["target"] != inter.target:
        raise ConfigError(
            f"the run-time baseline was measured for target {stats.body['target']}, "
            f"not {inter.target}",
            'repeat "qncd quantize", or set correction.inter.baseline=none',
        )


def make_correction(
    config: Config, subject: Subject, scheduler: Any, seeds: list[int]
) -> Correction | None:
    """A fresh correction for one batch, None where nothing is to be corrected.

    The variance of the noise is deducted where the scheduler's own noise is of known size.
    """
    inter = config.correction.inter
    if subject.kind == "full" or inter.method == "none":
        return None
    statistics = subject.noise_stats.tensors if subject.noise_stats else {}
    deduct = supports_variance_deduction(scheduler, config.sampling.eta)
    if inter.method == "ptqd":
        return PtqdCorrection(statistics, deduct_variance=deduct)
    if inter.method == "affine":
        return AffineCorrection(statistics)
    compared = inter.baseline == "full_precision"
    return RuntimeCorrection(
        generators_for(seeds, "correction"),
        target=inter.target,
        granularity=inter.granularity,
        interval=inter.interval,
        baseline=EstimatorBaseline.from_statistics(statistics) if compared else None,
        slope=inter.slope,
        deduct_variance=deduct,
    )


# ------------------------------------------------------------------ one batch


def draw_batch(
    config: Config,
    model: DiffusionModel,
    subject: Subject,
    scheduler: Any,
    seeds: list[int],
    part: Path,
) -> None:
    """Sample one batch; write its images, then its part file, which says that it is done."""
    sampling = config.sampling
    labels = model.labels(seeds, sampling.classes)
    correction = make_correction(config, subject, scheduler, seeds)
    traced: list[Tensor] = []
    keep = [i for i, seed in enumerate(seeds) if seed - sampling.seed < TRACED]

    def trace(index: int, t: Tensor, x: Tensor, prediction: Tensor) -> None:
        traced.append(prediction[keep].float().clone())

    latents = denoise(
        guided_predict(model, subject.denoiser, labels, sampling.guidance_scale),
        scheduler,
        sampling.steps,
        generators_for(seeds),
        model.latent_shape,
        eta=sampling.eta,
        correction=correction,
        on_step=trace,
    )
    folder = part.parent.parent
    with torch.no_grad():
        images = model.decode(latents)
    for seed, image in zip(seeds, images, strict=True):
        write_bytes(image_path(folder, seed), png_bytes(image))
    body = {
        "count": len(seeds),
        "latent_shape": list(model.latent_shape),
        "traced": len(keep),
        "steps": len(traced),
        "extra_calls": correction.extra_calls if correction else 0,
    }
    tensors = {
        "latents": latents.float(),
        "seeds": torch.tensor(seeds, dtype=torch.int64),
        "classes": labels,
        "predictions": torch.stack(traced, dim=1),
        "prediction_seeds": torch.tensor([seeds[i] for i in keep], dtype=torch.int64),
    }
    artifacts.write(part, Artifact("latents", tensors, body, "", model.digest))


def png_bytes(image: Tensor) -> bytes:
    """uint8 [C, H, W], C 1 or 3 -> PNG."""
    array = image.permute(1, 2, 0).numpy()
    array = array[:, :, 0] if array.shape[2] == 1 else array
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG")
    return buffer.getvalue()


# ------------------------------------------------------------------ the set


def _assemble(
    request: SampleRequest, identity: dict[str, Any], finished: Artifact | None
) -> dict[str, Any]:
    """Join the parts (and earlier samples) into one latents file, a sheet and the manifest."""
    folder = request.folder
    parts = sorted((folder / PARTS).glob("*.safetensors"))
    pieces = [finished] if finished else []
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
        "batch_size": request.batch_size,
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
