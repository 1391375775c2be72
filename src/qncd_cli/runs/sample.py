"""The third stage of a run: images of the quantized model, or of the model as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.loading import load_config, parse_config
from ..config.schema import Config
from ..errors import ArtifactError, ConfigError
from ..lineage import freshness, sample_sets
from ..lineage.freshness import State
from ..lineage.shards import SHARD, Shard, parse_shard
from ..spec import Compile
from ..store.artifact_files import Stored, check_lineage, read_stored
from ..store.run_dir import RunDir, find_run
from .drawing import DrawingWishes, draw, in_format
from .job import agreed
from .model import model_digest
from .sets import sampled_with
from .watch import SILENT, Watch

DEFAULT_NUM = 64


@dataclass(frozen=True)
class Sampled:
    """folder: 000123.png is the image of seed 123; seeds: all that are there; skipped: whether they
    were there before; drawn, seconds: how many were drawn now, by all processes of the job, and
    what that took, preparations aside; packed: where they are in the format that was asked for."""

    run: RunDir
    folder: Path
    seeds: Sequence[int]
    skipped: bool
    drawn: int = 0
    seconds: float = 0.0
    packed: Path | None = None

    @property
    def contact_sheet(self) -> Path:
        """All images in one PNG."""
        return sample_sets.sheet_path(self.folder)


def sample(
    run_dir: str | Path | None = None,
    config: Config | None = None,
    *,
    num: int = DEFAULT_NUM,
    batch_size: int | None = None,
    name: str | None = None,
    full_precision: bool = False,
    backend: str = "auto",
    compile: Compile = Compile.WHERE_IT_PAYS,
    low_memory: bool = False,
    device: str = "auto",
    force: bool = False,
    shard: str | None = None,
    format: str = "png",
    watch: Watch = SILENT,
) -> Sampled:
    """Draw what is missing of a set of images, in full: a call that was interrupted is repeated.
    Processes that torchrun began share the work.

    run_dir: a quantized run, None for the current one. config: instead of the run's own; it may
    differ from that in `sampling`, `correction.inter`, `first_stage` and `text_encoders`. num:
    images, of the seeds from sampling.seed on. batch_size: drawn together, None for what suits the
    model. name: of the set, None for quantized, full or full_compiled. full_precision: the model as
    it was. backend: auto, int8, simulate or openvino. low_memory: weights stay packed. device,
    force: as calibrate takes them. shard: "2/4" draws the second of four parts into a folder of its
    own, for `merge`. format: png, or also folders, webdataset or npz (lineage/set_formats.py),
    beside the set.

    Raises ArtifactError where the quantized model is missing or another one's, or a set of that
    name was drawn with other settings; ConfigError, ModelError, BackendUnavailable.

    >>> sample("runs/mine", num=16).contact_sheet
    """
    run = find_run(None if run_dir is None else str(run_dir))
    own = load_config(str(run.config))
    config = own if config is None else _of_run(config, own)
    part = None if shard is None else parse_shard(shard)
    if part is not None and format != "png":
        raise ConfigError(f"--format {format}: of a whole set", "give it to qncd merge instead")
    wishes = DrawingWishes(
        *(num, batch_size, full_precision, backend, compile, low_memory, device, force, part)
    )
    of_set = run.samples(name or wishes.set_name)
    folder = of_set if part is None else Shard(*part, range(0)).folder(of_set)

    def present() -> dict[str, Any] | None:
        state = _set_state(run, own, config, folder, wishes)
        return sample_sets.begun(folder) if state is not None and state.holds else None

    manifest = agreed(present)
    skipped = manifest is not None
    images, seconds = 0, 0.0
    if manifest is None:
        drawn = draw(run, own, config, of_set, wishes, watch)
        manifest, images, seconds = drawn.manifest, drawn.images, drawn.seconds
    seeds = manifest["seeds"]
    if part is None and len(seeds) > num:
        watch.note(f"{folder}: {len(seeds)} images are there, {num} asked for: all are kept")
    packed = Path(agreed(lambda: str(in_format(folder, format, watch))))
    return Sampled(run, folder, seeds, skipped, images, seconds, packed)


def check_settled(own: Config, config: Config, what: str) -> None:
    """Raises ConfigError where a configuration differs from the run's own in more than sampling can
    follow. what: names the difference."""
    same = [own.calibration == config.calibration, own.quantization == config.quantization]
    if not all(same) or own.correction.intra != config.correction.intra:
        raise ConfigError(
            f"{what}: calibration, quantization and correction.intra were settled by earlier "
            "stages",
            'set them for "qncd calibrate" or "qncd quantize"',
        )


def _of_run(config: Config, own: Config) -> Config:
    """The run's own configuration with what sampling can follow of another; fewer steps have fewer
    groups of timesteps. Raises ConfigError for what sampling cannot follow."""
    tree, wanted = own.to_dict(), config.to_dict()
    tree["correction"]["inter"] = wanted["correction"]["inter"]
    tree["sampling"]["reuse"] = wanted["sampling"]["reuse"]
    tree |= {key: wanted[key] for key in ("first_stage", "text_encoders")}
    expected = sampled_with(parse_config(tree, "sample"), wanted["sampling"], "sample")
    check_settled(expected, config, "config")
    return config


def _set_state(
    run: RunDir, own: Config, config: Config, folder: Path, wishes: DrawingWishes
) -> State | None:
    """What is there of the set, None where only drawing tells. Raises ArtifactError."""
    digest = model_digest(config)
    made_from = {} if wishes.full_precision else _made_from(run, own, config, digest)
    if digest is None or wishes.force or config.sampling.guidance_scale < 1:
        return None
    manifest = sample_sets.begun(folder)
    if manifest is None:
        return State("sample", f"{wishes.num} images are drawn", new=True)
    digests = {"model": digest, **made_from}
    backend = None if wishes.backend == "auto" else wishes.backend
    kind = "quantized" if "quantized" in digests else "full"
    compile = Compile.NO if wishes.low_memory else wishes.compile
    batch_size = wishes.batch_size or manifest.get("batch_size")
    whole = range(config.sampling.seed, config.sampling.seed + wishes.num)
    drawing = sample_sets.Drawing(
        kind,
        digests,
        None if kind == "full" else backend or manifest.get("backend"),
        compile.going_on(bool(manifest.get("compiled"))) is Compile.YES,
        manifest.get("guidance") == "off",
        whole.start,
        len(whole),
        batch_size,
        encoded_by=_encoded_by(digests, wishes, manifest),
    )
    sample_sets.check_identity(folder, manifest, sample_sets.identity_of(config, drawing))
    if wishes.shard is None:
        return _completeness(folder, manifest, whole)
    shard = Shard(*wishes.shard, whole)
    if type(batch_size) is not int or manifest.get(SHARD) != shard.described():
        return State("sample", "another shard was there")
    return _completeness(folder, manifest, shard.seeds(batch_size))


def _encoded_by(
    digests: Mapping[str, str], wishes: DrawingWishes, manifest: Mapping[str, Any]
) -> str | None:
    """The name of what computes quantized text encoders: as before where the backend that is wished
    for computes no layers by themselves."""
    if "text_encoders" not in digests:
        return None
    return manifest.get("encoded_by") if wishes.backend in ("auto", "openvino") else wishes.backend


def _made_from(run: RunDir, own: Config, config: Config, model: str | None) -> dict[str, str]:
    """Digests of what sample reads, of the run's own configuration, and of the plan, the decoder
    and the text encoders that the set's asks for. Raises ArtifactError."""
    stored = _quantized_of(run, own, model)
    digests = {"quantized": stored.digest}
    if config.sampling.reuse is not None:
        known = stored.model if model is None else model
        digests["reuse"] = freshness.check_reused(run, config, known, stored.digest).digest
    if config.first_stage.bits is not None:
        known = stored.model if model is None else model
        made = own.model_copy(update={"first_stage": config.first_stage})
        digests["first_stage"] = freshness.check_first_stage(run, made, known).digest
    if config.text_encoders.bits is not None:
        known = stored.model if model is None else model
        made = own.model_copy(update={"text_encoders": config.text_encoders})
        digests["text_encoders"] = freshness.check_text_encoders(run, made, known).digest
    return digests


def _quantized_of(run: RunDir, config: Config, model: str | None) -> Stored:
    """The quantized model, of the run's configuration and the model. Raises ArtifactError."""
    quantized = read_stored(run.tensors("quantized"), "quantized")
    check_lineage(quantized, config=config.stage_digest("quantize"))
    noise_stats = read_stored(run.tensors("noise_stats"), "noise_stats")
    if model is not None:
        check_lineage(quantized, model=model)
        check_lineage(noise_stats, model=model, parents={"quantized": quantized.digest})
    return quantized


def _completeness(folder: Path, manifest: Mapping[str, Any], seeds: range) -> State:
    """Whether a set holds all these seeds and everything else that it says it does."""
    there = set(manifest.get("seeds", ()))
    lost = sample_sets.without_image(folder, sorted(there))
    missing = len(there.union(seeds)) - len(there) + len(lost)
    if missing:
        return State("sample", f"{missing} of its images are missing", found={})
    if not manifest.get("complete"):
        return State("sample", "it was not finished")
    try:
        latents = read_stored(folder / sample_sets.LATENTS, "latents")
    except ArtifactError as error:
        return State("sample", error.message)
    return State("sample", found={"latents": latents})
