#!/usr/bin/env python
"""A large set of images: memory, throughput, a resumption near the end, and eval of all of them.

    python scripts/many_images.py --run-dir runs/fashion_ldm_w4a8 --num 20000
    python scripts/many_images.py --random --num 50000

The run has to be quantized; --random makes one of a tiny random model. The set is drawn in a
process of its own, which is killed by SIGKILL when the last hundred images are missing. The same
command goes on, and its start is held against that of the same command in an empty set. Resident
memory is read from /proc all the while (Linux): at every thousandth image of the first process, and
at the hundredth of either, when neither has freed what its first calls took. Sets `many` and
`many_start` of the run are removed before.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import click
import torch
from diffusers import DDIMScheduler, UNet2DModel

from qncd_cli.cli.console import ErrorReportingCommand
from qncd_cli.errors import ArtifactError
from qncd_cli.lineage.sample_sets import begun, image_path, sheet_path
from qncd_cli.machine import described
from qncd_cli.models.pipelines import ClassConditionalPixelPipeline
from qncd_cli.store.run_dir import RunDir

QNCD = (sys.executable, "-m", "qncd_cli")
LOOK = 0.1
"""Seconds between two looks at a process; larger: memory that is held for less is missed."""
MISSING = 100
"""Images that are missing when the process is killed."""


@dataclass
class Seen:
    """A command as it was seen from outside.

    Seconds are from its start, the processor's under their names. resident: MiB by the number of
    images that were there; peak: MiB, the kernel's own count.
    """

    seconds: float = 0.0
    first_image: float | None = None
    first_image_cpu: float | None = None
    resident: dict[int, float] = field(default_factory=dict)
    peak: float = 0.0
    processor: float | None = None
    killed: bool = False


def watched(command: tuple[str, ...], folder: Path, first: int, kill_at: int | None = None) -> Seen:
    """Run qncd and look at it. first: the seed whose image comes next in the folder; kill_at: the
    seed at whose image it is killed. Raises ArtifactError where it fails."""
    seen, begun_at, following = Seen(), time.monotonic(), first
    process = subprocess.Popen([*QNCD, *command])
    while process.poll() is None:
        status = _status(process.pid)
        seen.peak = max(seen.peak, status.get("VmHWM", 0.0))
        seen.processor = _processor_seconds(process.pid) or seen.processor
        while image_path(folder, following).exists():
            if seen.first_image is None:
                seen.first_image = round(time.monotonic() - begun_at, 2)
                seen.first_image_cpu = _processor_seconds(process.pid)
            following += 1
            if following % 1000 == 0 or following - first == MISSING:
                seen.resident[following] = status.get("VmRSS", 0.0)
        if kill_at is not None and following > kill_at:
            process.kill()
            seen.killed = True
        time.sleep(LOOK)
    seen.seconds = round(time.monotonic() - begun_at, 2)
    if process.returncode != 0 and not seen.killed:
        raise ArtifactError(f"{' '.join(command)}: exit code {process.returncode}")
    return seen


def _status(pid: int) -> dict[str, float]:
    """Sizes in MiB that /proc tells of a process, none where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): round(int(size) / 1024, 1) for name, size, _ in fields}


def _processor_seconds(pid: int) -> float | None:
    """Of a process by now; None where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def make_random_run(run: RunDir) -> None:
    """Calibrate and quantize a tiny random model: 8x8 latents of 4 classes, 0.1 M parameters."""
    model = run.path.with_name(f"{run.path.name}_model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=8,
            num_class_embeds=5,  # the last is the null class
        )
    ClassConditionalPixelPipeline(unet, DDIMScheduler(clip_sample=False)).save_pretrained(model)
    settings = (
        "sampling.steps=2",
        "calibration.trajectories=4",
        "calibration.noise_trajectories=2",
    )
    words = [word for setting in settings for word in ("--set", setting)]
    for command in (("calibrate", str(model), *words), ("quantize",)):
        subprocess.run([*QNCD, *command, "--run-dir", str(run.path)], check=True)


@click.command(cls=ErrorReportingCommand)
@click.option("--run-dir", type=click.Path(path_type=Path), required=True)
@click.option("--random", is_flag=True, help="Make the run, of a tiny random model.")
@click.option("--num", default=20000, type=click.IntRange(1000 + MISSING), show_default=True)
@click.option("--draw/--no-draw", "draws", default=True, help="Draw the set.")
@click.option("--eval/--no-eval", "evaluates", default=True, help="Measure the set.")
@click.argument("options", nargs=-1)
def main(
    run_dir: Path, random: bool, num: int, draws: bool, evaluates: bool, options: tuple[str, ...]
) -> None:
    """What stands after -- goes to every qncd sample."""
    run = RunDir(run_dir)
    if random and not run.tensors("quantized").is_file():
        make_random_run(run)
    report: dict[str, object] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "images": num}
    report |= {"machine": described(), "options": options}

    def tell(name: str, value: object) -> None:
        report[name] = value
        click.echo(f"{name}: {value}", err=True)

    if draws:
        draw(run, num, options, tell)
    if evaluates:
        command = ("eval", "--run-dir", str(run.path), "--quiet", "--name", "many")
        measured = watched(command, run.samples("many"), num)
        tell("eval", {"seconds": measured.seconds, "peak_mib": measured.peak})
    click.echo(json.dumps(report, indent=2))


def draw(
    run: RunDir, num: int, options: tuple[str, ...], tell: Callable[[str, object], None]
) -> None:
    """Draw the set in three processes, and say what was seen of them."""
    for name in ("many", "many_start"):
        shutil.rmtree(run.samples(name), ignore_errors=True)
        sheet_path(run.samples(name)).unlink(missing_ok=True)
    folder, start = run.samples("many"), run.samples("many_start")
    whole = ("sample", "--run-dir", str(run.path), "--quiet", *options, "--num", str(num))
    few = watched((*whole, "--name", start.name), start, 0, kill_at=0)
    tell("ordinary_start", {"seconds": few.first_image, "processor": few.first_image_cpu})
    whole = (*whole, "--name", folder.name)
    most = watched(whole, folder, 0, kill_at=num - MISSING - 1)
    drawing = most.seconds - (most.first_image or 0)
    tell("images_per_second", round((num - MISSING) / drawing, 2))
    tell("processor_seconds", most.processor)
    rest = watched(whole, folder, num - MISSING)
    tell("resumed_start", {"seconds": rest.first_image, "processor": rest.first_image_cpu})
    tell("resident_mib", most.resident)
    thousands = [size for count, size in most.resident.items() if count >= 1000]
    tell("resident_growth", round(thousands[-1] / thousands[0] - 1, 4))
    tell("resident_after_100_images", [most.resident[MISSING], rest.resident[num]])
    tell("resumed_seconds", rest.seconds)
    tell("joining_peak_mib", rest.peak)
    manifest = begun(folder) or {}
    tell("complete", manifest.get("complete") and manifest["seeds"] == list(range(num)))
    again = watched(whole, folder, num)
    tell("repeated", {"seconds": again.seconds, "peak_mib": again.peak})


if __name__ == "__main__":
    main()
