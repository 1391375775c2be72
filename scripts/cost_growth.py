#!/usr/bin/env python
"""How seconds and memory of `qncd sample` grow with the batch, the size, the steps and the images.

    python scripts/cost_growth.py random:ldm4 --batches 1,2,4,8,16,32 --steps 4,20,100
    python scripts/cost_growth.py random:sd15 --sides 256,512,768,1024
    python scripts/cost_growth.py zoo:fashion-ldm --images 10,100,1000 --default-batch

One of the four grows, the others stay: one image in a batch of one, two steps, the smallest side.
Each set is drawn by a process of its own, eagerly, at W4A8 with preset minmax: time does not follow
the values. Seconds are those of drawing, as the command tells them, in all and of one image, step
or million pixels; memory is the peak of the whole process (Linux: the kernel's count), start
included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import yaml

from qncd_cli.cli.console import ErrorReportingCommand

STEPS = 2
FEW = (
    "quantization.preset=minmax",
    f"sampling.steps={STEPS}",
    "calibration.trajectories=1",
    "calibration.batch_size=1",
    "calibration.noise_trajectories=1",
    "correction.inter.method=none",
)


class Numbers(click.ParamType):
    name = "N,N,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(sorted({int(part) for part in value.split(",")}))
        except ValueError:
            self.fail(f"{value}: expected numbers with commas between them", param, ctx)


def measured(*arguments: str) -> tuple[dict[str, Any], float]:
    """What a qncd command says, and the most memory that its process had resident, in MB. Raises
    click.ClickException where it fails."""
    command = [sys.executable, "-m", "qncd_cli", *arguments, "--json"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise click.ClickException(f"{' '.join(command)}: exit code {process.returncode}")
        said.seek(0)
        return json.load(said), 1024 * usage.ru_maxrss / 1e6


@click.command(cls=ErrorReportingCommand)
@click.argument("source")
@click.option("--batches", type=Numbers(), default=(), help="Images drawn at once.")
@click.option("--sides", type=Numbers(), default=(), help="Pixels along an image.")
@click.option("--steps", type=Numbers(), default=(), help="Steps of the sampler.")
@click.option("--images", type=Numbers(), default=(), help="Images of a set.")
@click.option("--default-batch", is_flag=True, help="The sets of --images in batches as qncd's.")
def main(
    source: str,
    batches: tuple[int, ...],
    sides: tuple[int, ...],
    steps: tuple[int, ...],
    images: tuple[int, ...],
    default_batch: bool,
) -> None:
    """Print a table of what one more of each costs."""
    with tempfile.TemporaryDirectory(prefix="qncd-cost-growth-") as name:
        folder = Path(name)
        tree: dict[str, Any] = {"model": {"source": source}}
        tree["quantization"] = {"weights": {"bits": 4}, "activations": {"bits": 8}}
        (folder / "own.yaml").write_text(yaml.safe_dump(tree))
        size = (f"sampling.height={min(sides)}", f"sampling.width={min(sides)}") if sides else ()
        words = [word for setting in (*FEW, *size) for word in ("--set", setting)]
        run = ("--run-dir", str(folder / "run"))
        measured("calibrate", "--config", str(folder / "own.yaml"), *words, *run)
        measured("quantize", *run)

        def row(what: str, amount: int, *options: str, units: float | None = None) -> None:
            told, peak = measured(
                *("sample", *run, "--name", f"{what}-{amount}", "--no-compile", *options)
            )
            seconds = told["images"] / told["images_per_second"]
            of_one = seconds / (units or amount)
            click.echo(f"| {what} | {amount:,} | {seconds:,.1f} | {of_one:,.3f} | {peak:,.0f} |")

        click.echo("| what grows | to | seconds | of one | peak, MB |\n|---|---|---|---|---|")
        one = ("--num", "1", "--batch-size", "1")
        for batch in batches:
            row("batch", batch, "--num", str(batch), "--batch-size", str(batch))
        for side in sides:
            sized = ("--set", f"sampling.height={side}", "--set", f"sampling.width={side}")
            row("side", side, *one, *sized, units=side * side / 1e6)
        for count in steps:
            row("steps", count, *one, "--steps", str(count))
        for count in images:
            row("images", count, "--num", str(count), *(() if default_batch else one[2:]))


if __name__ == "__main__":
    main()
