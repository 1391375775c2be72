#!/usr/bin/env python
"""What quality needs: fidelity over how much calibrate and quantize look at.

    python scripts/effort_curves.py fashion_ldm_w4a8 --num 500
    python scripts/effort_curves.py fashion_ldm_w4a6 --num 2000 --efforts quick,standard,thorough
    python scripts/effort_curves.py fifty_steps.yaml --base standard --only trajectories

Every row quantizes the configuration's model anew, with one thing changed against `thorough` or
what --base says (or, with --efforts, as these stand), draws the same unseen seeds with integer
kernels, and holds the images against full precision's: PSNR of each in the median and at the 5 %
quantile, and pooled, dB; seconds of the processor that calibrate and quantize took, without the
statistics of noise, which only corrections read.
"""

from __future__ import annotations

import dataclasses
import time

import click
import torch
from torch import Tensor

from qncd_cli.cli.console import ErrorReportingCommand
from qncd_cli.cli.shared import open_model
from qncd_cli.config.effort import EFFORTS, Effort
from qncd_cli.config.loading import load_config
from qncd_cli.config.schema import Config
from qncd_cli.metrics.tensor import psnr_db, psnr_each_db
from qncd_cli.models.loading import DiffusionModel
from qncd_cli.runtime import trajectory
from qncd_cli.runtime.denoiser import Denoiser, full_denoiser, quantized_denoiser
from qncd_cli.sampling.noise import chunks
from qncd_cli.stages import calibrate, quantize

BATCH = 50
CHANGED: dict[str, tuple[float, ...]] = {
    "trajectories": (4, 8, 12, 16),
    "hessian_rows": (2048, 4096, 8192),
    "hessian_rows_per_input": (0.5, 1),
    "hessian_calls": (5, 10),
    "probe_elements": (1 << 16, 1 << 18),
    "probe_trajectories": (2, 4),
    "probe_steps": (3, 5),
    "sensitivity_projections": (1, 2),
    "sensitivity_rows": (1, 2),
    "sensitivity_steps": (2, 4),
}
"""What is tried of each, below what `thorough` takes."""


@click.command(cls=ErrorReportingCommand)
@click.argument("name", metavar="CONFIG")
@click.option("--num", default=500, show_default=True, help="Samples a row.")
@click.option("--efforts", help="Compare these, with commas between them.")
@click.option("--only", help="The curves of these alone, with commas between them.")
@click.option("--base", type=click.Choice(sorted(EFFORTS)), default="thorough", show_default=True)
def main(name: str, num: int, efforts: str | None, only: str | None, base: str) -> None:
    """Fidelity over how much calibrate and quantize look at."""
    config = load_config(name)
    model = open_model(config)
    expected = drawn(config, model, full_denoiser(model), num)
    rows: list[tuple[str, Effort]] = []
    if efforts is not None:
        rows = [(effort, EFFORTS[effort]) for effort in efforts.split(",")]
    else:
        unchanged = EFFORTS[base]
        rows.append((base, unchanged))
        for key in CHANGED if only is None else only.split(","):
            free = dataclasses.replace(unchanged, rows=None)  # as many trajectories as are tried
            tried = [(v, dataclasses.replace(free, **{key: v})) for v in CHANGED[key]]
            rows += [(f"{key} {value:g}", effort) for value, effort in tried]
    click.echo(f"{name}, {num} samples: median, 5 % quantile, pooled PSNR in dB; seconds")
    for label, effort in rows:
        EFFORTS["standard"] = dataclasses.replace(effort, noise_trajectories=1)
        changed = load_config(name, ["calibration.effort=standard", "calibration.batch_size=32"])
        begun = time.process_time()
        quantized = quantized_by(changed, model)
        seconds = time.process_time() - begun
        found = drawn(changed, model, quantized, num)
        each = torch.tensor(psnr_each_db(expected, found))
        figures = (each.median(), each.quantile(0.05), psnr_db(expected, found))
        click.echo(f"{label:28s}" + "".join(f"{v:7.2f}" for v in figures) + f"{seconds:8.1f}")


def quantized_by(config: Config, model: DiffusionModel) -> Denoiser:
    made = calibrate.run(config, model)
    assert made is not None
    result = quantize.run(config, model, *made)
    assert result is not None
    return quantized_denoiser(
        model, result.quantized, "int8", config.quantization.cache_time_embeddings
    )


def drawn(config: Config, model: DiffusionModel, denoiser: Denoiser, num: int) -> Tensor:
    """Images of the configuration's first seeds, uint8."""
    first = config.sampling.seed
    batches = chunks(list(range(first, first + num)), BATCH)
    return torch.cat([model.decode(trajectory.draw(config, model, denoiser, b)) for b in batches])


if __name__ == "__main__":
    main()
