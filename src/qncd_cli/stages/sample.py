"""Stage 3: images from the quantized (or the full-precision) model, noise corrected.

A sample set is a folder: NNNNNN.png by seed, latents.safetensors, manifest.json; its contact sheet
lies beside it.
Seeds are cut into the same batches whether a run is resumed or not, so that a resumed set is, byte
for byte, the set that an uninterrupted run writes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.schema import Config
from ..correction.baseline import EstimatorBaseline
from ..correction.offline import AffineCorrection, PtqdCorrection
from ..correction.runtime import RuntimeCorrection
from ..correction.stepwise import StepwiseCorrection
from ..errors import ArtifactError
from ..lineage import sample_set, sample_sets
from ..lineage.freshness import lacking
from ..lineage.growing_set import GrowingSet, go_on, part_path
from ..lineage.sample_sets import TRACED, Drawing, identity_of
from ..lineage.shards import SHARD, Shard
from ..machine import give_back
from ..models.evidence import explained
from ..models.loading import DiffusionModel
from ..progress import Tick, Track, counted, no_progress
from ..ptq.corrections import check_correction, check_size
from ..ptq.cost import HEADROOM, Cost, DenoiserCall
from ..runtime import trajectory
from ..runtime.ranks import ALONE, Message, Ranks
from ..runtime.sampled_model import SampledModel
from ..sampling.levels import plan_steps, supports_variance_deduction, visited
from ..sampling.noise import chunks, generators_for
from ..sampling.samplers import Correction
from ..store import artifacts
from ..store.artifacts import Artifact
from ..store.files import write_bytes


@dataclass(frozen=True)
class SampleRequest:
    """What to draw: seeds in ascending order, gaps allowed, in batches, into folder.

    shard: the part of a larger request that this is, and that request's seeds; None for a whole.
    """

    folder: Path
    seeds: list[int]
    batch_size: int
    shard: Shard | None = None

    @property
    def whole(self) -> Sequence[int]:
        """All seeds that are asked for, by whatever process they are drawn."""
        return self.seeds if self.shard is None else self.shard.whole

    @property
    def noted(self) -> dict[str, Any]:
        """What the manifest says of it."""
        about = {} if self.shard is None else {SHARD: self.shard.described()}
        return {"batch_size": self.batch_size, **about}


@dataclass(frozen=True)
class Drawn:
    """manifest: of the set; images, seconds: how many were drawn now, by all ranks, and what that
    took."""

    manifest: dict[str, Any]
    images: int = 0
    seconds: float = 0.0


def run(
    config: Config,
    model: DiffusionModel,
    sampled: SampledModel,
    request: SampleRequest,
    track: Track = no_progress,
    ranks: Ranks = ALONE,
) -> Drawn:
    """Draw what is missing of the set.

    Samples that are there beyond those asked for are kept, and drawn again where their images are
    gone. ranks: draw a share of the batches each.

    Raises ArtifactError when the folder holds another set than the one asked for, ConfigError
    when the correction was prepared for other sampling settings.
    """
    check(config, model, sampled.noise_stats, request.seeds, sampled.reuse)
    identity = identify(config, model, sampled, request)
    growing: list[GrowingSet] = []

    def begin() -> dict[str, Any]:
        def cut(seeds: Sequence[int]) -> list[list[int]]:
            return chunks(seeds, request.batch_size)

        noted, decode = request.noted, torch.no_grad()(sampled.decode or model.decode)
        growing.append(go_on(request.folder, identity, request.seeds, cut, noted, decode))
        traced = sorted({*request.whole, *growing[0].wanted})[:TRACED]
        return {"digest": identity["digest"], "pending": growing[0].pending, "traced": traced}

    agreed = ranks.agreed(begin)
    if agreed["digest"] != identity["digest"]:
        raise ArtifactError(
            f"{request.folder}: rank {ranks.rank} would draw with other settings than rank 0",
            "use machines of one kind, or name a --backend",
        )
    pending, what = ranks.share(agreed["pending"]), f"{sampled.kind}{ranks.label}"
    scheduler = trajectory.timed_scheduler(config, model)
    calls = len(pending) * (len(visited(scheduler)) + 1)  # the decoder's counts as one
    what = f"sampling {sum(map(len, pending))} images ({what})"
    images, started = 0, time.monotonic()
    give_back()  # what loading and preparing the model has freed
    for seeds, tick in counted(track, pending, what, calls, "calls"):
        part = part_path(request.folder, seeds)
        if not sample_set.is_sound(part):
            draw_batch(config, model, sampled, scheduler, seeds, agreed["traced"], part, tick)
            images += len(seeds)
    images = sum(message.value for message in ranks.gathered(Message(images)))
    seconds = time.monotonic() - started
    return Drawn(ranks.agreed(lambda: growing[0].ended(str(model.device))), images, seconds)


def costs(
    call: DenoiserCall, first_stage: Cost, count: int, batch: int, *, slower: float
) -> dict[str, Cost]:
    """The parts of drawing count samples, each with what it takes beside the denoiser's weights.

    first_stage: bytes of one call, MACs of one image; batch: samples drawn together; slower: time
    of the backend over full precision's.
    """
    macs = count * call.copies * call.steps * call.macs * slower
    return {
        "denoising": Cost(call.first_bytes(call.copies * batch), macs),
        "decoding": Cost(first_stage.bytes * HEADROOM, count * first_stage.macs),
    }


def check(
    config: Config,
    model: DiffusionModel,
    noise_stats: Artifact | None,
    seeds: list[int],
    reuse: Artifact | None = None,
) -> None:
    """Check a request before anything is prepared, drawn or replaced.

    noise_stats: of the quantized model, None for full precision; reuse: its plan. Refused are
    schedulers and numbers of steps that the model cannot have, a plan for images of another size,
    and a correction that was prepared for other sampling or is left without meaning by the
    scheduler (`plan_steps`). Raises ModelError, ConfigError.
    """
    model.labels(seeds, config.sampling.classes)
    if noise_stats is not None:
        check_correction(config, model, noise_stats, lacking(config, noise_stats.body))
    if reuse is not None:
        check_size("the plan for sampling.reuse", model, reuse, "--set sampling.reuse=null")
    timed = trajectory.timed_scheduler(config, model)
    if noise_stats is not None and config.correction.inter.method != "none":
        plan_steps(timed, config.sampling.eta)


def identify(
    config: Config,
    model: DiffusionModel,
    sampled: SampledModel,
    request: SampleRequest | None = None,
) -> dict[str, Any]:
    """What decides the images of the model's set; request: where they depend on the batches."""
    drawing = Drawing(
        sampled.kind,
        sampled.digests,
        sampled.backend.name if sampled.backend is not None else None,
        sampled.compiled,
        config.sampling.guidance_scale < 1 and not model.interpolates,
        *((request.whole[0], len(request.whole), request.batch_size) if request else ()),
    )
    return identity_of(config, replace(drawing, encoded_by=sampled.encoded_by))


# ------------------------------------------------------------------ corrections


def make_correction(
    config: Config, sampled: SampledModel, scheduler: Any, seeds: list[int]
) -> Correction | None:
    """A fresh correction for one batch, None where nothing is to be corrected.

    The variance of the noise is deducted where the scheduler's own noise is of known size.
    """
    inter = config.correction.inter
    if sampled.reuse is not None and sampled.reuse.body["channels"]:
        return StepwiseCorrection(sampled.reuse.tensors)
    if sampled.kind == "full" or inter.method == "none":
        return None
    statistics = sampled.noise_stats.tensors if sampled.noise_stats else {}
    deduct = supports_variance_deduction(scheduler, config.sampling.eta)
    if inter.method == "ptqd":
        return PtqdCorrection(statistics, deduct_variance=deduct)
    if inter.method == "affine":
        return AffineCorrection(statistics)
    if inter.method == "stepwise":
        return StepwiseCorrection(statistics)
    compared = inter.baseline == "full_precision"
    return RuntimeCorrection(
        generators_for(seeds, "correction"),
        target=inter.target,
        granularity=inter.granularity,
        interval=inter.interval,
        first=inter.first,
        repeat=inter.repeat,
        part=inter.part,
        baseline=EstimatorBaseline.from_statistics(statistics) if compared else None,
        slope=inter.slope,
        noise=inter.noise,
        deduct_variance=deduct,
    )


# ------------------------------------------------------------------ one batch


def draw_batch(
    config: Config,
    model: DiffusionModel,
    sampled: SampledModel,
    scheduler: Any,
    seeds: list[int],
    to_trace: Sequence[int],
    part: Path,
    tick: Tick,
) -> None:
    """Sample one batch; write its images, then its part file, which says that it is done.

    to_trace: seeds whose predictions are kept, this batch's and others; tick: called at every step,
    and when the images are decoded.
    """
    correction = make_correction(config, sampled, scheduler, seeds)
    traced: list[Tensor] = []
    keep = [i for i, seed in enumerate(seeds) if seed in to_trace]

    def trace(index: int, t: Tensor, x: Tensor, prediction: Tensor) -> None:
        traced.append(prediction[keep].float().clone())
        tick()

    with explained(model):
        latents = trajectory.draw(
            config, model, sampled.denoiser, seeds, correction=correction, on_step=trace
        )
    folder = part.parent.parent
    with torch.no_grad():
        images = (sampled.decode or model.decode)(latents)
    tick()
    for seed, image in zip(seeds, images, strict=True):
        write_bytes(sample_sets.image_path(folder, seed), sample_set.png_bytes(image))
    body = {
        "count": len(seeds),
        "latent_shape": list(model.latent_shape),
        "traced": len(keep),
        "steps": len(traced),
        "extra_calls": correction.extra_calls if correction else 0,
        sample_sets.PIXELS: [sample_set.pixels_digest(image) for image in images],
    }
    tensors = {
        "latents": latents.float(),
        "seeds": torch.tensor(seeds, dtype=torch.int64),
        "classes": model.labels(seeds, config.sampling.classes),
        "predictions": torch.stack(traced, dim=1),
        "prediction_seeds": torch.tensor([seeds[i] for i in keep], dtype=torch.int64),
    }
    artifacts.write(part, Artifact("latents", tensors, body, "", model.digest))
