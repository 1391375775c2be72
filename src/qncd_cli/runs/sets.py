"""The two sample sets of a run: of the quantized model, and of full precision on its seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.loading import parse_config
from ..config.own_settings import place_of
from ..config.schema import Config
from ..config.start_images import read_inputs
from ..errors import ArtifactError
from ..lineage.sample_sets import read_manifest
from ..store.artifact_files import read_stored
from ..store.run_dir import RunDir
from .watch import Watch

if TYPE_CHECKING:
    from ..lineage.sample_set import SampleSet
    from ..models.loading import DiffusionModel
    from ..runtime.ranks import Ranks

MADE_FROM = {
    "quantized": "quantized model",
    "first_stage": "decoder in integers",
    "text_encoders": "text encoders in integers",
}
"""What of a run a set's images come from, by its kind."""
KEPT = "images of finished batches are kept, the same command goes on with the next"
"""What whoever interrupts the drawing of images is told."""


def sampled_with(config: Config, sampling: Mapping[str, Any], where: str) -> Config:
    """The configuration with other sampling; fewer steps have fewer groups of timesteps. where: it
    is said, for errors. Raises ConfigError."""
    tree = config.to_dict()
    tree["sampling"] = {**sampling}
    groups = tree["quantization"]["activations"]
    steps = int(sampling["steps"] * (sampling.get("strength") or 1))
    groups["timestep_groups"] = max(1, min(groups["timestep_groups"], steps))
    return parse_config(tree, where)


def config_of(config: Config, samples: SampleSet) -> Config:
    """The run's configuration with the sampling of a set: its prompts, images, sizes, LoRAs.

    Raises ConfigError where a file that the set was drawn with is another one now.
    """
    where = str(samples.folder)
    drawn_with = {**samples.manifest["sampling"], "seed": config.sampling.seed}
    sampling = sampled_with(config, drawn_with, where).to_dict()["sampling"]
    read_inputs(sampling, lambda name: place_of(name, Path()))
    return sampled_with(config, sampling, where)


def check_quantized(run: RunDir, samples: SampleSet) -> None:
    """Raises ArtifactError for samples of another quantized model than the run's."""
    check_made_from(run, samples.folder, samples.manifest, 'repeat "qncd sample" with --force')


def check_made_from(run: RunDir, folder: Path, manifest: Mapping[str, Any], hint: str) -> None:
    """The same, of a manifest."""
    digests = manifest.get("digests", {})
    for kind, what in MADE_FROM.items():
        if kind in digests and digests[kind] != read_stored(run.tensors(kind), kind).digest:
            raise ArtifactError(f"{folder}: sampled from another {what} than this run's", hint)


def check_model(samples: SampleSet, model: DiffusionModel) -> None:
    """Raises ArtifactError for samples of another model than the one that is there now."""
    if samples.manifest["digests"]["model"] != model.digest:
        raise ArtifactError(
            f"{samples.folder}: sampled from another model than {model.source} is now",
            'repeat "qncd calibrate", "qncd quantize" and "qncd sample --force"',
        )


def full_folder(
    run: RunDir,
    config: Config,
    model: DiffusionModel,
    quantized: SampleSet,
    watch: Watch,
    ranks: Ranks | None = None,
) -> Path:
    """Full-precision samples for the seeds and settings of a quantized set; drawn if missing."""
    from ..runtime.ranks import ALONE
    from ..runtime.sampled_model import SampledModel
    from ..stages import pipeline
    from ..stages import sample as stage

    seeds = quantized.seeds
    sampling = {**quantized.manifest["sampling"], "seed": seeds[0]}
    config = sampled_with(config, sampling, str(quantized.folder))
    sampled = SampledModel.full_precision(model)
    digest = stage.identify(config, model, sampled)["digest"]
    own = run.samples("full")
    if own.is_dir():
        manifest = read_manifest(own, "qncd sample --full-precision")
        if manifest.get("digest") == digest and set(seeds) <= set(manifest.get("seeds", ())):
            return own
    batch_size = quantized.manifest["batch_size"]
    with watch.keeping(KEPT):
        return pipeline.full_precision_samples(
            *(run.path.parent, config, model, seeds, batch_size, watch.track),
            tell=watch.note,
            ranks=ranks or ALONE,
        )
