#!/usr/bin/env python
"""Seconds, processor seconds and memory of `qncd eval` on thousands of images of fashion-ldm.

    python scripts/eval_speed.py --num 10000

A small run is calibrated and quantized, DRAWN images of both models are drawn, and each set is
filled up to --num with mixtures of two of its own images (latents likewise, the same two in both
sets), so that what is measured has the size and the texture of what the model draws. Then `qncd
eval` runs in a process of its own:

- cold: no feature is cached, and nothing was measured before;
- again: features are cached, everything else is measured again.

The reference is the packaged one. The cache of features is a folder beside the run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from qncd_cli.lineage import sample_set, sample_sets
from qncd_cli.lineage.latents import Latents
from qncd_cli.store import artifacts
from qncd_cli.store.artifacts import Artifact
from qncd_cli.store.files import write_bytes

CONFIG, RUN = "fashion_ldm_w4a8", "runs/speed"
SMALL = ("sampling.steps=4", "calibration.trajectories=4", "calibration.noise_trajectories=2")
DRAWN, PART = 64, 500
UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def command(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run qncd in the folder: {seconds, cpu_seconds, peak_bytes} of its process."""
    settings = {**os.environ, "QNCD_CACHE": str(folder / "cache")}
    started, line = time.monotonic(), [sys.executable, "-m", "qncd_cli", *arguments]
    process = subprocess.Popen(line, cwd=folder, env=settings, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{' '.join(line)}: exit code {process.returncode}")
    seconds, processor = time.monotonic() - started, used.ru_utime + used.ru_stime
    return {"seconds": seconds, "cpu_seconds": processor, "peak_bytes": UNIT * used.ru_maxrss}


def mixtures(count: int) -> Iterator[tuple[int, int, float]]:
    """Two different rows of the images that were drawn, and the share of the first."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        first, second = rng.choice(DRAWN, 2, replace=False)
        yield int(first), int(second), float(rng.uniform(0.2, 0.8))


def fill_up(folder: Path, count: int) -> None:
    """A sample set of so many seeds from the one that was drawn into the folder."""
    samples = sample_set.read_set(folder)
    manifest, drawn = samples.manifest, samples.latents
    missing = list(range(len(samples.seeds), count))
    images, latents = samples.images.read().double(), drawn.of(samples.seeds[:DRAWN])
    classes = manifest["classes"]
    mixed = list(mixtures(count - DRAWN))[len(samples.seeds) - DRAWN :]
    pieces = [drawn]
    for start in range(0, len(missing), PART):
        seeds, rows = missing[start : start + PART], mixed[start : start + PART]
        a, b = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
        share = torch.tensor([row[2] for row in rows]).reshape(-1, 1, 1, 1)
        new = (share * images[a] + (1 - share) * images[b]).round().to(torch.uint8)
        for seed, image in zip(seeds, new, strict=True):
            write_bytes(sample_sets.image_path(folder, seed), sample_set.png_bytes(image[:1]))
        tensors = {
            "latents": (share * latents[a] + (1 - share) * latents[b]).float(),
            "seeds": torch.tensor(seeds),
            "classes": torch.tensor([classes[row[0]] for row in rows]),
            "predictions": drawn.tensor("predictions", slice(0, 0)),
            "prediction_seeds": torch.empty(0, dtype=torch.int64),
        }
        digests = [sample_set.pixels_digest(image) for image in new]
        body = {**drawn.body, "count": len(seeds), "traced": 0, sample_sets.PIXELS: digests}
        part = folder / sample_sets.PARTS / f"{seeds[0]:06d}-{len(seeds)}.safetensors"
        artifacts.write(part, Artifact("latents", tensors, body, "", drawn.stored.model))
        pieces.append(Latents.open(part))
    identity = {k: manifest[k] for k in (*sample_sets.IDENTITY, "digest") if k in manifest}
    more = {k: v for k, v in manifest.items() if k not in identity}
    sample_set.assemble(folder, identity, pieces, more, set(range(count)))


def prepare(folder: Path, count: int) -> None:
    """The run, and both of its sets."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = [word for setting in SMALL for word in ("--set", setting)]
    where = ("--run-dir", RUN)
    command(folder, "calibrate", "--config", CONFIG, *where, *settings)
    command(folder, "quantize", *where)
    drawing = ("sample", "--num", str(DRAWN), "--batch-size", str(DRAWN), "--no-compile", *where)
    command(folder, *drawing)
    command(folder, "eval", *where)  # draws full precision
    (full,) = (path.parent for path in (folder / "runs" / "full-precision").glob("*/manifest.json"))
    for place in (folder / RUN / "samples" / "quantized", full):
        fill_up(place, count)


def measured(folder: Path, options: list[str]) -> dict[str, Any]:
    """One `qncd eval` that finds nothing of what earlier ones wrote but the cache."""
    for name in ("metrics.json", "report.html", "pairs.png"):
        (folder / RUN / name).unlink(missing_ok=True)
    return command(folder, "eval", "--run-dir", RUN, *options)


@click.command(help=(__doc__ or "").partition("\n\n    python")[0])
@click.option("--num", default=10_000, show_default=True, type=click.IntRange(DRAWN))
@click.option("--metrics", default="fid,isc,kid,prc", show_default=True, help="Options of eval.")
@click.option("--folder", default="runs/eval_speed", show_default=True, help="Where to work.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(num: int, metrics: str, folder: str, as_json: bool) -> None:
    place = Path(folder).absolute() / str(num)
    if not (place / "ready").exists():
        shutil.rmtree(place, ignore_errors=True)
        prepare(place, num)
        (place / "ready").touch()
    shutil.rmtree(place / "cache" / "features", ignore_errors=True)
    options = [f"--{name.replace('_', '-')}" for name in metrics.split(",") if name]
    load = os.getloadavg()[0]
    rows = {name: measured(place, options) for name in ("cold", "again")}
    if as_json:
        print(json.dumps({"num": num, "cores": os.cpu_count(), "load": load, **rows}))
        return
    print(f"qncd eval {' '.join(options)}, {num} pairs of 32x32, {os.cpu_count()} cores")
    print(f"load of other processes before: {load:.1f}")
    for name, row in rows.items():
        memory = f"{row['peak_bytes'] / 2**30:.2f} GiB"
        print(f"{name}: {row['seconds']:.1f} s, {row['cpu_seconds']:.1f} CPU s, {memory}")


if __name__ == "__main__":
    main()
