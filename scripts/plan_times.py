#!/usr/bin/env python
"""Predicted and measured seconds of calibrate and quantize, by part.

    python scripts/plan_times.py fashion_ldm_w4a8 fashion_dit_w4a8
    python scripts/plan_times.py sd15-blocks --busy --set calibration.trajectories=2 \\
        --set sampling.steps=10

sd15-blocks is configuration sd14 for a U-Net that has one block of each kind of Stable Diffusion
1.x at 512 x 512, with 320 channels at the outer and 640 at the inner level, and random weights.
--busy counts seconds of the processor on one thread, predicted and measured, for machines that do
other work meanwhile; without it the clock counts, with the threads that qncd takes. The time of
Python's imports is told by itself.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Generator, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from diffusers import UNet2DConditionModel

from qncd_cli.cli.console import ErrorReportingCommand
from qncd_cli.config.loading import load_config
from qncd_cli.config.schema import Config
from qncd_cli.forecast import plan
from qncd_cli.forecast.shapes import model_shapes
from qncd_cli.forecast.work import Clock
from qncd_cli.machine import described
from qncd_cli.models.digest import RANDOM_SEED
from qncd_cli.models.loading import DTYPES
from qncd_cli.models.random_models import random_pipeline
from qncd_cli.resident import peak_of_process
from qncd_cli.runs.calibrate import calibrate
from qncd_cli.runs.quantize import quantize
from qncd_cli.runs.watch import Watch

T = TypeVar("T")
SD15_BLOCKS = "sd15-blocks"


def write_sd15_blocks(folder: Path) -> None:
    """A diffusers folder of what random:sd15 is, with two levels and one layer in a block."""
    whole = random_pipeline("sd15")
    torch.manual_seed(RANDOM_SEED)
    unet = UNet2DConditionModel.from_config(
        whole.unet.config,
        block_out_channels=(320, 640),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    type(whole)(**{**whole.components, "unet": unet}).save_pretrained(folder)


class Laps:
    """Seconds by what a stage says that it is doing."""

    def __init__(self, clock: Clock):
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._now: list[str] = []
        self._since = clock()

    def track(
        self, items: Iterable[T], description: str, total: int, unit: str
    ) -> Generator[T, None, None]:
        """A Track; what a phase does within another counts for itself alone."""
        self._lap(begun=description)
        try:
            yield from items
        finally:
            self._lap()

    def _lap(self, begun: str | None = None) -> None:
        now = self._clock()
        if self._now:
            what = self._now[-1]
            self.seconds[what] = self.seconds.get(what, 0.0) + now - self._since
        self._since = now
        if begun is None:
            self._now.pop()
        else:
            self._now.append(begun)


def compared(name: str, settings: tuple[str, ...], clock: Clock) -> dict[str, Any]:
    """One configuration, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="qncd-plan-times-") as folder:
        if name == SD15_BLOCKS:
            write_sd15_blocks(Path(folder) / "model")
            source = f"model.source={folder}/model"
            name, settings = "sd14", (source, "sampling.prompts=null", *settings)
        return stages_compared(load_config(name, settings), Path(folder), clock)


def stages_compared(config: Config, folder: Path, clock: Clock) -> dict[str, Any]:
    """What the plan says of both stages, and what they take in that folder."""
    shapes = model_shapes(config.model.source, DTYPES[config.model.dtype])
    imports = peak_of_process()
    result: dict[str, Any] = {}
    request = plan.Request(
        ("calibrate", "quantize"), config, 8, None, "int8", folder, imports, clock
    )
    stages = {s["stage"]: s for s in plan.run(config, shapes, request)["stages"]}
    for stage in ("calibrate", "quantize"):
        laps, begun = Laps(clock), clock()
        watch = Watch(track=laps.track)
        if stage == "calibrate":
            calibrate(config, folder / "run", device="cpu", watch=watch)
        else:
            quantize(folder / "run", device="cpu", watch=watch)
        seconds = clock() - begun
        result[stage] = {
            "predicted": round(stages[stage]["seconds"], 1),
            "measured": round(seconds, 1),
            "ratio": round(seconds / stages[stage]["seconds"], 2),
            "predicted_parts": {k: round(v, 1) for k, v in stages[stage]["parts"].items()},
            "measured_parts": {k: round(v, 1) for k, v in laps.seconds.items()},
        }
    return result


@click.command(cls=ErrorReportingCommand)
@click.argument("configs", nargs=-1, required=True)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As of qncd.")
@click.option("--busy", is_flag=True, help="Seconds of the processor, on one thread.")
def main(configs: tuple[str, ...], settings: tuple[str, ...], busy: bool) -> None:
    """Hold the plan's times against those that are measured."""
    imported = time.process_time()
    if busy:
        torch.set_num_threads(1)
    clock = time.process_time if busy else time.perf_counter
    report = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": described(),
        "clock": "processor" if busy else "wall",
        "imports": round(imported, 1),
        "configurations": {name: compared(name, settings, clock) for name in configs},
    }
    click.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
