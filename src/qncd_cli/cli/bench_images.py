"""The command bench --image: seconds per image of a quantized run, beside full precision."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.loading import load_config
from ..config.schema import Config
from ..resident import resident
from ..runs.model import open_model as open_quietly
from ..store import files
from ..store.run_dir import RunDir, find_run
from .console import Console
from .shared import open_model

FILES = ("bench_image.json", "bench_image.md")
"""What is written."""
DEFAULT_ROWS = (
    "float32-eager,float32-compiled,bfloat16-eager,bfloat16-compiled,int8-compiled,"
    "int8-reuse-compiled,int8-reuse-decoder-compiled,nncf"
)
ROUNDS = 3


@dataclass(frozen=True)
class ImageOptions:
    rows: str
    batch_sizes: str
    rounds: int
    num: int
    memory: bool
    run_dir: str | None
    out: str | None


def bench_images(console: Console, options: ImageOptions) -> None:
    from ..bench import image_rendering as rendering
    from ..bench import images

    run = find_run(options.run_dir)
    config = load_config(str(run.config))
    names = [part.strip().lower() for part in options.rows.split(",") if part.strip()]
    rows = images.parse_image_rows(names)
    batches = _sizes(options.batch_sizes)
    folder = Path(options.out) if options.out else run.path
    files.check_place(folder, FILES)
    model = open_model(config, "cpu", run.path)
    made = _rows(run, config, model, console.note)
    measure = functools.partial(_alone, run.path)
    request = images.ImageRequest(
        rows,
        batches,
        options.rounds,
        options.num,
        made.build,
        [*made.found],
        measure if options.memory else None,
    )
    report = images.run(config, model, request, console.note, console.track)
    table_file, page = (folder / name for name in FILES)
    files.write_sealed_json(table_file, report)
    title = f"Images of {run.path.name}"
    files.write_bytes(page, rendering.markdown(report, title).encode())
    console.result({**report, "out": str(folder)}, lambda: _show(console, report, page))


def _show(console: Console, report: Mapping[str, Any], page: Path) -> None:
    from ..bench import image_rendering as rendering

    for batch in rendering.batches(report):
        print(f"batch {batch}, milliseconds per image:")
        console.table(
            rendering.COLUMNS, [list(line.values()) for line in rendering.cells(report, batch)]
        )
    for line in rendering.missing(report):
        print(line)
    print(rendering.conditions(report))
    print(f"bench: done in {report['seconds']:.1f} s, {page}")


def _sizes(text: str) -> Sequence[int]:
    """Raises ConfigError for what is no list of numbers from 1 on."""
    from ..errors import ConfigError

    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise ConfigError(f"--batch-sizes {text}: no numbers from 1 on", "for example 1,8")
    return list(dict.fromkeys(found))


def _rows(run: RunDir, config: Config, model: Any, tell: Any) -> Any:
    """What rows are made of, checked to be of this run and model. Raises ArtifactError."""
    from ..bench.image_rows import KINDS, OPTIONAL, RunRows
    from ..lineage import freshness
    from ..runtime.compiled_graph import GRAPHS_FOLDER
    from ..store import artifacts

    found = {kind: artifacts.read(run.tensors(kind), kind) for kind in KINDS}
    quantized = found["quantized"]
    artifacts.check_lineage(quantized, config=config.stage_digest("quantize"), model=model.digest)
    holds = {
        "reuse": freshness.reused(run, config, model.digest, quantized.digest).holds,
        "first_stage": freshness.first_stage(run, config, model.digest).holds,
    }
    found |= {k: artifacts.read(run.tensors(k), k) for k in OPTIONAL if holds[k]}
    return RunRows(config, model, found, run.path / GRAPHS_FOLDER, tell)


def _alone(path: Path, row: Any, batches: Sequence[int]) -> Mapping[int, int | None]:
    from ..bench.image_memory import alone

    return alone(_measure, path, row, batches)


def _measure(path: Path, row: Any, batches: Sequence[int]) -> Mapping[int, int | None]:
    """The most that drawing batches holds, the model included; in a process of its own."""
    import tempfile

    from ..bench import images
    from ..bench.image_memory import peaks_of
    from ..bench.image_rows import RunRows  # noqa: F401  what is imported is no part of it

    before, run = resident(), RunDir(path)
    config = load_config(str(run.config))
    model = open_quietly(config, "cpu", run.path)
    drawer = _rows(run, config, model, lambda line: None).build(row)
    with tempfile.TemporaryDirectory() as folder:

        def draw(batch: int) -> object:
            seeds = images.seeds_of(config.sampling.seed, batch)
            return images.draw_images(drawer, model, seeds, Path(folder))

        return peaks_of(draw, batches, before)
