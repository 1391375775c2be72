"""The third stage of a run: images of the quantized model, or of the model as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.loading import load_config, parse_config
from ..config.schema import Config
from ..errors import ArtifactError, ConfigError
from ..lineage import sample_sets
from ..lineage.freshness import State
from ..spec import Compile
from ..store.artifact_files import Stored, check_lineage, read_stored
from ..store.lock import locked
from ..store.run_dir import RunDir, find_run, read_coverage
from .model import model_digest, note_sampling, open_model
from .sets import KEPT
from .watch import SILENT, Watch

if TYPE_CHECKING:
    from ..models.loading import DiffusionModel
    from ..runtime.sampled_model import SampledModel

DEFAULT_NUM = 64


@dataclass(frozen=True)
class Sampled:
    """folder: 000123.png is the image of seed 123; seeds: all that are there; skipped: whether they
    were there before."""

    run: RunDir
    folder: Path
    seeds: Sequence[int]
    skipped: bool

    @property
    def contact_sheet(self) -> Path:
        """All images in one PNG."""
        return sample_sets.sheet_path(self.folder)


@dataclass(frozen=True)
class _Wishes:
    """What a set is drawn with, beside its configuration."""

    num: int
    batch_size: int | None
    full_precision: bool
    backend: str
    compile: Compile
    low_memory: bool
    device: str
    force: bool

    @property
    def set_name(self) -> str:
        if not self.full_precision:
            return "quantized"
        # eval compares with the plain one
        return "full_compiled" if self.compile is Compile.YES else "full"


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
    watch: Watch = SILENT,
) -> Sampled:
    """Draw what is missing of a set of images, in full: a call that was interrupted is repeated.

    run_dir: a quantized run, None for the current one. config: instead of the run's own; it may
    differ from that in `sampling` and `correction.inter`. num: images, of the seeds from
    sampling.seed on. batch_size: drawn together, None for what suits the model. name: of the set,
    None for quantized, full or full_compiled. full_precision: the model as it was. backend: auto,
    int8, simulate or openvino. low_memory: weights stay packed. device, force: as calibrate takes
    them.

    Raises ArtifactError where the quantized model is missing or another one's, or a set of that
    name was drawn with other settings; ConfigError, ModelError, BackendUnavailable.

    >>> sample("runs/mine", num=16).contact_sheet
    """
    run = find_run(None if run_dir is None else str(run_dir))
    own = load_config(str(run.config))
    config = own if config is None else _of_run(config, own)
    wishes = _Wishes(num, batch_size, full_precision, backend, compile, low_memory, device, force)
    folder = run.samples(name or wishes.set_name)
    state = _set_state(run, own, config, folder, wishes)
    there = sample_sets.begun(folder) if state is not None and state.holds else None
    manifest = there
    if manifest is None:
        with locked(run.path, watch.note):
            manifest = _draw(run, own, config, folder, wishes, watch)
    seeds = manifest["seeds"]
    if len(seeds) > num:
        watch.note(f"{folder}: {len(seeds)} images are there, {num} asked for: all are kept")
    return Sampled(run, folder, seeds, there is not None)


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
    tree["sampling"], tree["correction"]["inter"] = (
        wanted["sampling"],
        wanted["correction"]["inter"],
    )
    groups = tree["quantization"]["activations"]
    groups["timestep_groups"] = min(groups["timestep_groups"], config.sampling.steps)
    check_settled(parse_config(tree, "sample"), config, "config")
    return config


def _set_state(
    run: RunDir, own: Config, config: Config, folder: Path, wishes: _Wishes
) -> State | None:
    """What is there of the set, None where only drawing tells. Raises ArtifactError."""
    digest = model_digest(config)
    stored = None if wishes.full_precision else _quantized_of(run, own, digest)
    if digest is None or wishes.force or config.sampling.guidance_scale < 1:
        return None
    digests = {"model": digest} | ({"quantized": stored.digest} if stored is not None else {})
    seed = config.sampling.seed
    return set_state(
        folder,
        config,
        digests,
        range(seed, seed + wishes.num),
        wishes.batch_size,
        backend=None if wishes.backend == "auto" else wishes.backend,
        compile=Compile.NO if wishes.low_memory else wishes.compile,
    )


def _quantized_of(run: RunDir, config: Config, model: str | None) -> Stored:
    """What sample reads, of the run's configuration and the model. Raises ArtifactError."""
    quantized = read_stored(run.tensors("quantized"), "quantized")
    check_lineage(quantized, config=config.stage_digest("quantize"))
    noise_stats = read_stored(run.tensors("noise_stats"), "noise_stats")
    if model is not None:
        check_lineage(quantized, model=model)
        check_lineage(noise_stats, model=model, parents={"quantized": quantized.digest})
    return quantized


def set_state(
    folder: Path,
    config: Config,
    digests: Mapping[str, str],
    seeds: range,
    batch_size: int | None,
    *,
    backend: str | None,
    compile: Compile,
) -> State:
    """The sample set of these seeds. digests: of the model, and of what is quantized.

    batch_size: None for whatever the set was drawn in; backend: None for what it began
    with. Raises ArtifactError where the folder holds a set made with other settings.
    """
    manifest = sample_sets.begun(folder)
    if manifest is None:
        return State("sample", f"{len(seeds)} images are drawn", new=True)
    kind = "quantized" if "quantized" in digests else "full"
    drawing = sample_sets.Drawing(
        kind,
        dict(digests),
        None if kind == "full" else backend or manifest.get("backend"),
        compile.going_on(bool(manifest.get("compiled"))) is Compile.YES,
        manifest.get("guidance") == "off",
        seeds.start,
        len(seeds),
        batch_size or manifest.get("batch_size"),
    )
    sample_sets.check_identity(folder, manifest, sample_sets.identity_of(config, drawing))
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


def _draw(
    run: RunDir, own: Config, config: Config, folder: Path, wishes: _Wishes, watch: Watch
) -> dict[str, Any]:
    """Draw what is missing of the set; its manifest."""
    from ..runtime.compiled_graph import GRAPHS_FOLDER
    from ..runtime.preparation import Preparation, prepare
    from ..stages import sample as stage
    from ..store import artifacts

    quantized = None
    if not wishes.full_precision:
        kinds = "quantized", "noise_stats"
        artifact, noise_stats = (artifacts.read(run.tensors(kind), kind) for kind in kinds)
        quantized = artifact, noise_stats
    begun = None if wishes.force else sample_sets.begun(folder)
    model = open_model(config, wishes.device, run.path, watch)
    if config.sampling != own.sampling:
        note_sampling(watch, config, model)
    first = config.sampling.seed
    seeds = list(range(first, first + wishes.num))
    stage.check(config, model, quantized[1] if quantized else None, seeds)
    macs = _macs(run, config, model, full_precision=wishes.full_precision)
    batch_size = wishes.batch_size or sample_sets.default_batch(macs)
    how = Preparation(
        seeds,
        batch_size,
        macs,
        run.path / GRAPHS_FOLDER,
        watch.note,
        wishes.backend,
        wishes.compile,
        low_memory=wishes.low_memory,
        in_place=True,
        begun=begun,
    )
    sampled = prepare(config, model, quantized, how)
    _note_backend(watch, sampled)
    if wishes.force:
        sample_sets.clear(folder)
    request = stage.SampleRequest(folder, seeds, batch_size)
    with watch.keeping(KEPT):
        return stage.run(config, model, sampled, request, watch.track)


def _macs(run: RunDir, config: Config, model: DiffusionModel, *, full_precision: bool) -> int:
    """MACs of one denoiser call on one sample."""
    from ..runtime.denoiser import denoiser_costs

    if not full_precision or run.coverage.is_file():
        return int(read_coverage(run.coverage)["macs"])
    return sum(cost.macs for cost in denoiser_costs(config, model))


def _note_backend(watch: Watch, sampled: SampledModel) -> None:
    if sampled.backend is None:
        return
    watch.note(f"backend {sampled.backend.name}: {sampled.backend.remark}")
    fallbacks = sampled.fallbacks()
    for name, why in list(fallbacks.items())[:1]:
        watch.note(f"{len(fallbacks)} layers are simulated in float32 (first: {name}: {why})")
