#!/usr/bin/env python
"""When the published run-time estimate is made, and what it reads there.

    qncd calibrate --config fashion_ddpm_w4a6 --set quantization.preset=qdiffusion
    qncd quantize
    python scripts/estimate_schedule.py --num 100

Every row draws the same seeds, in batches of 50, with one number for the batch (target injected, no
baseline): SQNR of the latents against full precision, pooled and median, and the first batch's
estimates. `first` and `repeat` are those of correction.inter; the published schedule is 6 and yes.
The last line is what the estimate reads of the full-precision model itself, at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import click
import torch
from torch import Tensor

from qncd_cli.cli.console import ErrorReportingCommand
from qncd_cli.cli.shared import open_model
from qncd_cli.config.loading import load_config
from qncd_cli.config.schema import Config
from qncd_cli.correction.runtime import RuntimeCorrection
from qncd_cli.metrics.tensor import sqnr_db
from qncd_cli.models.loading import DiffusionModel
from qncd_cli.runtime import trajectory
from qncd_cli.runtime.denoiser import Denoiser, full_denoiser, quantized_denoiser
from qncd_cli.sampling.noise import chunks, generators_for
from qncd_cli.store import artifacts
from qncd_cli.store.run_dir import find_run

BATCH = 50
SCHEDULES = ((0, False), (0, True), (6, False), (6, True))
"""(first, repeat); every 10 steps."""

Make = Callable[[Sequence[int]], RuntimeCorrection]


@click.command(cls=ErrorReportingCommand)
@click.option("--run-dir", metavar="DIR", help="A quantized run (default: the current one).")
@click.option("--num", default=100, show_default=True, help="Samples a row.")
def main(run_dir: str | None, num: int) -> None:
    """When the published run-time estimate is made, and what it reads there."""
    run = find_run(run_dir)
    config = load_config(str(run.config))
    model = open_model(config)
    quantized = artifacts.read(run.tensors("quantized"), "quantized")
    cached = config.quantization.cache_time_embeddings
    denoiser = quantized_denoiser(model, quantized, "auto", cached)
    reference, _ = drawn(config, model, full_denoiser(model), num)
    click.echo("| first | repeat | SQNR, dB: pooled | median | estimates |\n|---|---|---|---|---|")

    def row(name: str, make: Make | None) -> None:
        latents, estimates = drawn(config, model, denoiser, num, make)
        each = [sqnr_db(a, b) for a, b in zip(reference, latents, strict=True)]
        read = ", ".join(f"{estimate:+.4f}" for estimate in estimates)
        pooled = sqnr_db(reference, latents)
        click.echo(f"| {name} | {pooled:.2f} | {median(each):.2f} | {read} |")

    row("no correction |", None)
    for first, repeat in SCHEDULES:
        row(
            f"{first} | {'yes' if repeat else 'no'}",
            lambda seeds, f=first, r=repeat: published(seeds, first=f, repeat=r),
        )
    _, own = drawn(
        config,
        model,
        full_denoiser(model),
        min(num, BATCH),
        lambda seeds: published(seeds, interval=1, apply=False),
    )
    click.echo(f"full precision reads {', '.join(f'{estimate:+.4f}' for estimate in own)}")


def published(seeds: Sequence[int], *, interval: int = 10, **options: object) -> RuntimeCorrection:
    """The published estimate, one number for the batch of these seeds."""
    return RuntimeCorrection(
        generators_for(seeds, "correction"),
        target="injected",
        granularity="batch",
        interval=interval,
        **options,
    )


def drawn(
    config: Config, model: DiffusionModel, denoiser: Denoiser, num: int, make: Make | None = None
) -> tuple[Tensor, list[float]]:
    """Latents [num, ...], and the first batch's estimates."""
    first = config.sampling.seed
    found, estimates = [], []
    for seeds in chunks(list(range(first, first + num)), BATCH):
        correction = make(seeds) if make is not None else None
        found.append(trajectory.draw(config, model, denoiser, seeds, correction=correction))
        if correction is not None and not estimates:
            estimates = [float(e.mean.mean()) for e in correction.estimates]
    return torch.cat(found), estimates


if __name__ == "__main__":
    main()
