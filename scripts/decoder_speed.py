#!/usr/bin/env python
"""Seconds of an image's decoding in integers, beside compiled floating point.

    python scripts/decoder_speed.py                 # Stable Diffusion's shape, 512 x 512
    python scripts/decoder_speed.py --side 256 --rounds 5

The decoder has random weights: time does not follow them. Rows are timed in turn in one process,
after a call each that compiles; seconds are the median of the rounds.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch import Tensor

from qncd_cli.cli import process
from qncd_cli.cli.console import ErrorReportingCommand
from qncd_cli.machine import described
from qncd_cli.metrics.tensor import psnr_db
from qncd_cli.models.digest import RANDOM_SEED
from qncd_cli.models.first_stage import FirstStage, to_uint8
from qncd_cli.models.random_models import kl_autoencoder
from qncd_cli.ptq.first_stage import quantize_decoder
from qncd_cli.runtime.first_stage import compiled, with_integers

REFERENCE = "float32-compiled"


def floating(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The same decoder in a type, compiled by Inductor."""
    torch.manual_seed(RANDOM_SEED)
    model: Any = kl_autoencoder(512).eval().requires_grad_(False).to(dtype)
    decode = torch.compile(model.decode)
    return lambda latents: to_uint8(decode(latents.to(dtype)).sample.float())


def integers(folder: Path, latents: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """In integers, layer by layer and as one graph, and this with the rest of it in bfloat16;
    ranges are of a corner of the image."""
    torch.manual_seed(RANDOM_SEED)
    first_stage = FirstStage(kl_autoencoder(512).eval().requires_grad_(False), lambda _, z: z)
    corner = latents[..., : latents.shape[2] // 4, : latents.shape[3] // 4]
    made = quantize_decoder(first_stage, [corner], 8)
    rows: dict[str, Callable[[Tensor], Tensor]] = {}
    rows["int8-eager"] = with_integers(first_stage, made, "decoder_speed", "int8")
    digests, shape = {"decoder": "decoder_speed"}, tuple(latents.shape[1:])
    for name, dtype in (("int8", torch.float32), ("int8-bfloat16", torch.bfloat16)):
        graph = with_integers(first_stage, made, "decoder_speed", "int8", dtype)
        rows[f"{name}-compiled"] = compiled(graph, digests, shape, folder, click.echo)
    return rows


@click.command(cls=ErrorReportingCommand)
@click.option("--side", default=512, show_default=True, help="Pixels.")
@click.option("--rounds", default=3, show_default=True)
def main(side: int, rounds: int) -> None:
    """Print a row of JSON for every way to decode."""
    process.keep_freed_memory()
    latents = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rows = {
            REFERENCE: floating(torch.float32),
            "bfloat16-compiled": floating(torch.bfloat16),
            **integers(Path(folder), latents),
        }
        images = {name: decode(latents) for name, decode in rows.items()}
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(rounds):
            for name, decode in rows.items():
                started = time.perf_counter()
                decode(latents)
                seconds[name].append(time.perf_counter() - started)
    base = median(seconds["bfloat16-compiled"])
    for name, found in seconds.items():
        row = {
            "row": name,
            "seconds": round(median(found), 3),
            "times_bfloat16": round(base / median(found), 2),
            "psnr_db": None
            if name == REFERENCE
            else round(psnr_db(images[REFERENCE], images[name]), 1),
        }
        click.echo(json.dumps(row))
    click.echo(f"{side} x {side}, {described()['capability']}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
