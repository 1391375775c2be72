"""Whether what was prepared for an inter correction holds for what is to be sampled."""

from __future__ import annotations

from ..config.schema import Config
from ..correction.stepwise import field_grid
from ..errors import ArtifactError, ConfigError
from ..models.loading import DiffusionModel
from ..store.artifacts import Artifact
from .noise import CARRIED


def check_correction(config: Config, model: DiffusionModel, stats: Artifact, lacking: str) -> None:
    """Statistics hold for the sampler they were measured with, and for no other.

    lacking: what they are without that the correction reads, "" for nothing. Raises ArtifactError,
    ConfigError.
    """
    inter = config.correction.inter
    needs = inter.method in ("ptqd", "affine", "stepwise") or (
        inter.method == "runtime" and inter.baseline == "full_precision"
    )
    if not needs:
        return
    if CARRIED in stats.body:
        raise ArtifactError(
            f"the {inter.method} correction was not prepared for the LoRA of this run",
            "set it and repeat qncd quantize --lora on the run without it, or add --inter none",
        )
    prepared = stats.body["sampling"]
    asked = {key: getattr(config.sampling, key) for key in prepared}
    if lacking:
        raise ArtifactError(
            lacking,
            f'"qncd quantize --set correction.inter.method={inter.method}" measures it alone; '
            "or add --inter none",
        )
    differing = [f"{k} {prepared[k]}, now {asked[k]}" for k in prepared if prepared[k] != asked[k]]
    if differing:
        raise ConfigError(
            f"the {inter.method} correction was prepared for other sampling"
            f" ({'; '.join(differing)})",
            'repeat "qncd calibrate" and "qncd quantize" with these settings, or add --inter none',
        )
    check_size(f"the {inter.method} correction", model, stats, "--inter none")
    wanted, found = list(field_grid(model.latent_shape[1:], inter.field)), stats.body["grid"]
    if inter.method == "stepwise" and found != wanted:
        raise ConfigError(
            f"the stepwise correction was fitted with a field of {found} values, not {wanted}",
            'repeat "qncd quantize" with this correction.inter.field',
        )
    if inter.method == "runtime" and stats.body["target"] != inter.target:
        raise ConfigError(
            f"the run-time baseline was measured for target {stats.body['target']}, "
            f"not {inter.target}",
            'repeat "qncd quantize", or set correction.inter.baseline=none',
        )


def check_size(what: str, model: DiffusionModel, found: Artifact, without: str) -> None:
    """Raise ConfigError for what was prepared on latents of another shape, where it says of which:
    it does since a run draws several sizes. without: the option that does without it."""
    shape = found.body.get("latent_shape")
    if shape is not None and shape != list(model.latent_shape):
        before, now = (" x ".join(map(str, one[1:])) for one in (shape, model.latent_shape))
        raise ConfigError(
            f"{what} was prepared for images of another size (latents of {before}, now {now})",
            f'repeat "qncd calibrate" and "qncd quantize" with this size, or add {without}',
        )
