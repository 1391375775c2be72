#!/usr/bin/env python
"""Memory, time and seams of a large image that is decoded in tiles (`first_stage.tile`).

    python scripts/decode_large.py                     # Stable Diffusion's shape, 1024 x 1024
    python scripts/decode_large.py --bits 8            # the decoder in integers
    python scripts/decode_large.py --tile 0            # the whole image at once
    python scripts/decode_large.py --model DIR         # a folder's own AutoencoderKL

One process decodes once, so that its peak is that of one way. With --whole FILE the image is also
held against that of another call (--save FILE), in all pixels and in those where tiles are blended.
Random weights by default: their time and memory are those of trained ones, their seams are not.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import torch
from torch import Tensor

from qncd_cli.machine import described
from qncd_cli.metrics.tensor import psnr_db
from qncd_cli.models.digest import RANDOM_SEED
from qncd_cli.models.first_stage import FirstStage
from qncd_cli.models.random_models import kl_autoencoder
from qncd_cli.ptq.first_stage import quantize_decoder
from qncd_cli.resident import peak_of_process
from qncd_cli.runtime.first_stage import with_integers


def first_stage_of(folder: str | None) -> FirstStage:
    """A folder's, or Stable Diffusion's with random weights."""
    if folder is not None:
        from diffusers import AutoencoderKL

        return FirstStage(AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False))
    torch.manual_seed(RANDOM_SEED)
    return FirstStage(kl_autoencoder(512).eval().requires_grad_(False))


def blended(side: int, tile: int) -> Tensor:
    """Whether a row or column lies where two tiles are blended, [side]."""
    found = torch.zeros(side, dtype=torch.bool)
    step, overlap = tile * 3 // 4, tile // 4
    for start in range(step, side, step):
        found[start : start + overlap] = True
    return found


@click.command(help=__doc__.partition("\n")[0])
@click.option("--model", type=click.Path(exists=True, file_okay=False))
@click.option("--side", default=1024, show_default=True, help="Pixels.")
@click.option("--tile", default=512, show_default=True, help="Pixels, 0 for the whole image.")
@click.option("--bits", type=click.Choice(["8"]), help="The decoder in integers.")
@click.option("--save", type=click.Path(dir_okay=False), help="Keep the image.")
@click.option("--whole", type=click.Path(exists=True), help="An image of another call.")
def main(
    model: str | None, side: int, tile: int, bits: str | None, save: str | None, whole: str | None
) -> None:
    first_stage = first_stage_of(model)
    factor, channels = first_stage.factor, first_stage.model.config.latent_channels
    generator = torch.Generator().manual_seed(0)
    shape = (1, channels, side // factor, side // factor)
    latents = torch.randn(shape, generator=generator) * first_stage.model.config.scaling_factor
    if bits is not None:  # calibrated on a corner of the image
        corner = latents[..., : shape[2] // 4, : shape[3] // 4]
        made = quantize_decoder(first_stage, [corner], int(bits))
        first_stage = with_integers(first_stage, made, "decode_large", "int8")
    if tile:
        first_stage = first_stage.tiled(tile)
    before = peak_of_process()
    started = time.perf_counter()
    with torch.no_grad():
        image = first_stage(latents)
    found = {
        "side": side,
        "tile": tile or None,
        "bits": int(bits or 32),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_mib": peak_of_process() >> 20,
        "peak_before_mib": before >> 20,
        "machine": described()["capability"],
    }
    if save is not None:
        torch.save(image, Path(save))
    if whole is not None:
        other = torch.load(Path(whole))
        found["psnr_db"] = round(psnr_db(other, image), 2)
        if tile:
            rows = blended(side, tile)
            seams = rows[:, None] | rows[None, :]
            found["psnr_seams_db"] = round(
                psnr_db(other[..., seams, None], image[..., seams, None]), 2
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
