"""Whether the quantized model still draws images: a few seeds beside full precision's, for CI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.loading import load_config
from ..config.schema import Config
from ..errors import ModelError, NotFinite
from ..lineage import sample_sets
from ..store.artifact_files import read_stored
from ..store.lock import locked
from ..store.run_dir import RunDir, find_run
from ..vocabulary import IDENTICAL_DB, said
from .model import open_model
from .sample import sample
from .sets import MADE_FROM, check_model, check_quantized, config_of, full_folder
from .watch import SILENT, Watch

if TYPE_CHECKING:
    from ..lineage.sample_set import SampleSet

DEFAULT_NUM = 8
OWN_SET = "verify"
"""Name of the set that is drawn where none holds what is wanted."""
BLACK, CONSTANT, NOT_FINITE, TOO_FAR = "black", "constant", "not finite", "psnr_db"


@dataclass(frozen=True)
class Fault:
    """One image at fault.

    seed: None where only its batch is known; kind: quantized or full; what: black, constant, not
    finite or psnr_db; figure: the value of every pixel of a black or constant image (mean of its
    channels), how many latents are not finite (None where drawing stopped), or decibels. says: the
    same in words.
    """

    seed: int | None
    kind: str
    what: str
    figure: float | None
    says: str


@dataclass(frozen=True)
class Verified:
    """seeds: that were asked for; psnr_db: by seed, of those that have two sound images; faults:
    none where all is well; folders: of the sample sets that were looked at, by kind."""

    run: RunDir
    seeds: Sequence[int]
    psnr_db: Mapping[int, float]
    faults: Sequence[Fault]
    folders: Mapping[str, Path]


class _Stopped(Exception):
    """Drawing met what is not finite."""

    def __init__(self, faults: Sequence[Fault]):
        super().__init__()
        self.faults = faults


def verify(
    run_dir: str | Path | None = None,
    *,
    num: int = DEFAULT_NUM,
    min_psnr: float | None = None,
    name: str | None = None,
    batch_size: int | None = None,
    backend: str = "auto",
    device: str = "auto",
    force: bool = False,
    watch: Watch = SILENT,
) -> Verified:
    """Look at the images of a few seeds of both models; what is missing of them is drawn.

    run_dir: a quantized run, None for the current one. num: seeds, the first of the set. min_psnr:
    decibels that every image needs, None for any. name: of the set, None for `quantized` where it
    holds enough seeds of the run's present quantized model, else for one of its own, so that no
    other set changes. force: draw the set again. batch_size, backend, device: as sample takes them.

    Faults are returned, not raised. Raises what sample and evaluate raise.

    >>> verify("runs/mine", min_psnr=20).faults
    []
    """
    run = find_run(None if run_dir is None else str(run_dir))
    config = load_config(str(run.config))
    kinds = _kinds(config)
    if name is None:
        usual = not force and _holds(run, run.samples("quantized"), num, kinds)
        name = "quantized" if usual else OWN_SET
    folder = run.samples(name)
    try:
        if force or not _holds(run, folder, num, kinds):
            with _drawing("quantized"):
                sample(
                    run_dir,
                    num=num,
                    batch_size=batch_size,
                    name=name,
                    backend=backend,
                    device=device,
                    force=force,
                    watch=watch,
                )
        quantized = _first(folder, num)
        check_quantized(run, quantized)
        model = open_model(config_of(config, quantized), device, run.path, watch)
        check_model(quantized, model)
        with locked(run.path, watch.note), _drawing("full"):
            beside = full_folder(run, config, model, quantized, watch)
    except _Stopped as stopped:
        first = config.sampling.seed
        return Verified(run, range(first, first + num), {}, stopped.faults, {"quantized": folder})
    return _compared(run, quantized, _first(beside, None), min_psnr)


@contextmanager
def _drawing(kind: str) -> Iterator[None]:
    """Raises _Stopped in the place of a ModelError that tells of what is not finite."""
    try:
        yield
    except ModelError as error:
        cause = error if isinstance(error, NotFinite) else error.__cause__
        if not isinstance(cause, NotFinite):
            raise
        seeds = cause.seeds or [None]
        raise _Stopped(
            [Fault(seed, kind, NOT_FINITE, None, str(error)) for seed in seeds]
        ) from error


def _kinds(config: Config) -> list[str]:
    """Artifacts that images of a run with this configuration are drawn from."""
    asked = {"first_stage": config.first_stage.bits, "text_encoders": config.text_encoders.bits}
    return ["quantized", *(kind for kind, bits in asked.items() if bits is not None)]


def _holds(run: RunDir, folder: Path, num: int, kinds: Sequence[str]) -> bool:
    """Whether a set is whole, of the run's artifacts of these kinds, and of as many seeds."""
    manifest = sample_sets.begun(folder)
    if manifest is None or not manifest.get("complete"):
        return False
    seeds = manifest.get("seeds", ())
    present = {kind: read_stored(run.tensors(kind), kind).digest for kind in kinds}
    digests = manifest.get("digests", {})
    same = all(digests.get(kind) == present.get(kind) for kind in MADE_FROM)
    return len(seeds) >= num and same and not sample_sets.without_image(folder, seeds)


def _first(folder: Path, num: int | None) -> SampleSet:
    """The first samples of a set, whatever they hold."""
    from ..lineage.sample_set import read_set

    samples = read_set(folder, whatever=True)
    return samples.cut(samples.seeds[:num])


def _compared(
    run: RunDir, quantized: SampleSet, full: SampleSet, min_psnr: float | None
) -> Verified:
    from ..lineage.sample_set import match_sets
    from ..metrics.tensor import psnr_each_db

    full, quantized = match_sets(full, quantized)
    faults = [*_faults("quantized", quantized), *_faults("full", full)]
    decibels = psnr_each_db(full.images, quantized.images)
    unsound = {fault.seed for fault in faults}
    psnr = {
        seed: min(value, IDENTICAL_DB)
        for seed, value in zip(quantized.seeds, decibels, strict=True)
        if seed not in unsound
    }
    for seed, value in psnr.items():
        if min_psnr is not None and value < min_psnr:
            says = f"PSNR {said('psnr_db', value)}, at least {said('psnr_db', min_psnr)} wanted"
            faults.append(Fault(seed, "quantized", TOO_FAR, value, says))
    folders = {"quantized": quantized.folder, "full": full.folder}
    return Verified(run, quantized.seeds, psnr, faults, folders)


def _faults(kind: str, samples: SampleSet) -> Iterator[Fault]:
    """Faults of a set's images by themselves, one an image: the first that explains it."""
    from ..metrics.checks import not_finite
    from ..metrics.seen import Seen

    lost = {
        start + row: count
        for start, chunk in samples.latent_chunks()
        for row, count in not_finite(chunk).items()
    }
    flat = Seen.of(samples.images).flat()
    for row, seed in enumerate(samples.seeds):
        if row in lost:
            says = f"{lost[row]} of its latents are not finite"
            yield Fault(seed, kind, NOT_FINITE, float(lost[row]), says)
        elif row in flat:
            colour = flat[row]
            what = CONSTANT if any(colour) else BLACK
            says = f"every pixel is {', '.join(map(str, colour))}"
            yield Fault(seed, kind, what, sum(colour) / len(colour), f"{what}: {says}")
