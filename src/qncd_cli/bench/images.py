"""Seconds per image end to end, by part, of a quantized run beside its model in full precision.

Every row draws the same seeds by the run's own sampling; beside its time stands how far its images
and latents are from the float32 row's, so that none buys speed with pictures. Rows are timed in
turn in one process; memory is measured of each row alone in a process.
"""

from __future__ import annotations

import difflib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import machine
from ..backends.compiled import graph
from ..backends.compiled.compiler import CACHE, environment
from ..backends.compiled.graph import silence_compiler
from ..config.schema import Config
from ..errors import BackendUnavailable, ConfigError, QncdError
from ..lineage.sample_set import png_bytes
from ..metrics.tensor import each_psnr_db, pooled_psnr_db, sqnr_db, squared_errors
from ..models.loading import DiffusionModel
from ..progress import Track, no_progress
from ..runtime import trajectory
from ..runtime.sampled_model import SampledModel
from ..sampling.levels import StepInfo
from ..sampling.samplers import Correction, Predict
from ..stages.sample import make_correction
from ..store.files import write_bytes
from .image_memory import Peaks
from .nncf import why_no_nncf
from .row import reason
from .timing import spread

BASELINE = "float32-eager"
FLOATS = tuple(f"{d}-{how}" for d in ("float32", "bfloat16") for how in ("eager", "compiled"))
INTEGERS = tuple(
    f"int8{floats}{more}{how}"
    for floats in ("", "-bfloat16")
    for more in ("", "-reuse", "-decoder", "-reuse-decoder")
    for how in ("", "-compiled")
)
NNCF = "nncf"
ROWS = (*FLOATS, *INTEGERS, NNCF)
PARTS = ("text", "steps", "correction", "decoder", "png")
"""What an image takes, in the order of the work."""


@dataclass(frozen=True)
class ImageRow:
    """A row by what its name says: int8-bfloat16-reuse-decoder-compiled."""

    name: str

    @property
    def words(self) -> list[str]:
        return self.name.split("-")

    @property
    def integers(self) -> bool:
        return self.words[0] == "int8"

    @property
    def compiled(self) -> bool:
        return "compiled" in self.words

    @property
    def dtype(self) -> torch.dtype:
        """What floats compute in: all of full precision, what stays unquantized of a denoiser in
        integers, and text encoders."""
        return torch.bfloat16 if "bfloat16" in self.words else torch.float32

    def why_unavailable(self, kinds: Sequence[str]) -> str:
        """Why it cannot be drawn here, empty where it can. kinds: artifacts of the run."""
        if "reuse" in self.words and "reuse" not in kinds:
            return "the run has no plan: qncd quantize --reuse 0.5"
        if "decoder" in self.words and "first_stage" not in kinds:
            return "the run has no decoder in integers: qncd quantize --set first_stage.bits=8"
        if self.name == NNCF:
            return why_no_nncf()
        return graph.why_unavailable() if self.compiled else ""


def parse_image_rows(names: Sequence[str]) -> list[ImageRow]:
    """Each row once. Raises ConfigError with the nearest name."""
    if not names:
        raise ConfigError("--rows: no row is named", f"known: {', '.join(ROWS)}")
    for name in names:
        if name not in ROWS:
            close = difflib.get_close_matches(name, ROWS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(ROWS)}"
            raise ConfigError(f"--rows {name}: unknown row of --image", hint)
    return [ImageRow(name) for name in dict.fromkeys(names)]


@dataclass(frozen=True)
class Drawer:
    """What draws a row's images: encode(seeds) what their text takes, None without text."""

    config: Config
    sampled: SampledModel
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Sequence[int]], object] | None = None


@dataclass(frozen=True)
class ImageRequest:
    """build: row -> what draws it; batches: sizes that are timed; num: images that are compared;
    alone: row, batch sizes -> bytes at most of each, in a process of its own; None to measure none;
    kinds: artifacts of the run."""

    rows: Sequence[ImageRow]
    batches: Sequence[int]
    rounds: int
    num: int
    build: Callable[[ImageRow], Drawer]
    kinds: Sequence[str]
    alone: Callable[[ImageRow, Sequence[int]], Peaks] | None = None


class Clocked:
    """A correction that counts the seconds of its own work, its extra calls of the denoiser too."""

    def __init__(self, inner: Correction):
        self.inner, self.seconds, self.extra_calls = inner, 0.0, 0

    def tries(self, step: StepInfo) -> bool:
        return self.inner.tries(step)

    def correct(self, step: StepInfo, prediction: Tensor) -> Tensor:
        with self._clock():
            return self.inner.correct(step, prediction)

    def observe(self, step: StepInfo, x_next: Tensor, predict: Predict) -> None:
        with self._clock():
            self.inner.observe(step, x_next, predict)

    def deductible_variance(self, step: StepInfo) -> Tensor | None:
        with self._clock():
            return self.inner.deductible_variance(step)

    @contextmanager
    def _clock(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
        self.extra_calls = self.inner.extra_calls


@dataclass(frozen=True)
class DrawnImages:
    """images uint8 [N, C, H, W]; seconds: of the whole batch by PARTS."""

    images: Tensor
    latents: Tensor
    seconds: dict[str, float]


def draw_images(
    drawer: Drawer, model: DiffusionModel, seeds: Sequence[int], folder: Path
) -> DrawnImages:
    """A batch of images from text to PNG, with what each part took."""
    config, clock = drawer.config, time.perf_counter
    scheduler = trajectory.timed_scheduler(config, model)
    own = make_correction(config, drawer.sampled, scheduler, list(seeds))
    clocked = None if own is None else Clocked(own)
    marks = [clock()]
    if drawer.encode is not None:
        drawer.encode(seeds)
    marks.append(clock())
    latents = trajectory.draw(config, model, drawer.sampled.denoiser, seeds, correction=clocked)
    marks.append(clock())
    with torch.no_grad():
        images = drawer.decode(latents)
    marks.append(clock())
    for seed, image in zip(seeds, images, strict=True):
        write_bytes(folder / f"{seed:06d}.png", png_bytes(image))
    marks.append(clock())
    text, drawn, decoder, png = (b - a for a, b in zip(marks, marks[1:], strict=False))
    correction = 0.0 if clocked is None else clocked.seconds
    seconds = (text, drawn - correction, correction, decoder, png)
    return DrawnImages(images, latents, dict(zip(PARTS, seconds, strict=True)))


def run(
    config: Config,
    model: DiffusionModel,
    request: ImageRequest,
    tell: Callable[[str], None],
    track: Track = no_progress,
) -> dict[str, Any]:
    """The content of bench_image.json. A row that cannot be drawn here is listed with the reason;
    BackendUnavailable if none can."""
    started = time.perf_counter()
    silence_compiler()
    unavailable: dict[str, str] = {}
    drawers: dict[str, Drawer] = {}
    drawn: dict[str, DrawnImages] = {}
    first = config.sampling.seed
    seeds = range(first, first + request.num)

    def drop(row: ImageRow, why: str) -> None:
        unavailable[row.name] = why
        tell(f"{row.name}: {why}")

    with (
        tempfile.TemporaryDirectory(prefix="qncd-images-") as name,
        environment(CACHE, f"{name}/inductor"),
    ):
        folder = Path(name)
        for row in track(request.rows, "drawing what is compared", len(request.rows), "rows"):
            if why := row.why_unavailable(request.kinds):
                drop(row, why)
                continue
            tell(f"{row.name}: {request.num} images to be compared, then those to be timed")
            try:
                drawer = request.build(row)
                drawn[row.name] = draw_images(drawer, model, seeds, folder)
                for batch in request.batches:
                    draw_images(drawer, model, seeds_of(first, batch), folder)
            except QncdError as error:
                drop(row, str(error))
                continue
            except Exception as error:  # whatever a compiler or another's tool can stumble over
                drop(row, reason(error))
                continue
            drawers[row.name] = drawer
        if not drawers:
            name, why = next(iter(unavailable.items()))
            raise BackendUnavailable(f"no row can be measured here; {name}: {why}")
        rows = [row for row in request.rows if row.name in drawers]
        reference = drawn.get(BASELINE)
        if reference is None:
            reference = draw_images(request.build(ImageRow(BASELINE)), model, seeds, folder)
        peaks = _peaks(rows, request, track)
        table = []
        for batch in request.batches:
            taken: dict[str, list[dict[str, float]]] = {name: [] for name in drawers}
            for _ in track(
                range(request.rounds), f"timing batch {batch}", request.rounds, "rounds"
            ):
                for name, drawer in drawers.items():
                    found = draw_images(drawer, model, seeds_of(first, batch), folder)
                    taken[name].append(found.seconds)
            alike = {name: timing(rounds, batch) for name, rounds in taken.items()}
            base = alike.get(BASELINE, {}).get("seconds_per_image")
            for row in rows:
                entry = {"name": row.name, "batch_size": batch, **alike[row.name]}
                entry["speedup"] = None if base is None else base / entry["seconds_per_image"]
                entry |= fidelity(reference, drawn[row.name], same=row.name == BASELINE)
                table.append({**entry, "peak_bytes": peaks[row.name].get(batch)})
    return {
        "model": model.source,
        "sampling": config.sampling.drawn_with(),
        "num_samples": request.num,
        "rounds": request.rounds,
        "machine": machine.described(),
        "rows": table,
        "unavailable": unavailable,
        "seconds": round(time.perf_counter() - started, 1),
    }


def seeds_of(first: int, batch: int) -> range:
    return range(first, first + batch)


def timing(rounds: Sequence[Mapping[str, float]], batch: int) -> dict[str, Any]:
    """Median seconds per image over rounds, their spread, and the median of every part."""
    whole = [sum(parts.values()) / batch for parts in rounds]
    return {
        "seconds_per_image": statistics.median(whole),
        "spread": spread(whole),
        "seconds": whole,
        "parts": {
            part: statistics.median(parts[part] for parts in rounds) / batch for part in PARTS
        },
    }


def fidelity(reference: DrawnImages, other: DrawnImages, *, same: bool) -> dict[str, float | None]:
    """PSNR of images and SQNR of latents to the float32 row's, in dB; None for that row itself, and
    where nothing differs."""
    if same or torch.equal(reference.latents, other.latents):
        return dict.fromkeys(("psnr_db", "psnr_median_db", "sqnr_latents_db"))
    errors = squared_errors(reference.images, other.images)
    found = {
        "psnr_db": pooled_psnr_db(errors),
        "psnr_median_db": statistics.median(each_psnr_db(errors)),
        "sqnr_latents_db": sqnr_db(reference.latents, other.latents),
    }
    return {key: value if value != float("inf") else None for key, value in found.items()}


# ------------------------------------------------------------------ alone


def _peaks(rows: Sequence[ImageRow], request: ImageRequest, track: Track) -> dict[str, Peaks]:
    """Bytes at most by row; none of one whose process was killed, or where nothing is measured."""
    peaks: dict[str, Peaks] = {row.name: {} for row in rows}
    if request.alone is not None:
        for row in track(rows, "drawing each row alone", len(rows), "rows"):
            peaks[row.name] = request.alone(row, request.batches)
    return peaks
