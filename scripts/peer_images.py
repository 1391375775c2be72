#!/usr/bin/env python
"""How near SDNQ's dynamic int8 stays to full precision on a packaged model, beside `qncd ablate`.

It needs an environment of its own (SDNQ is GPL-3.0, and no dependency of this project):

    python -m venv .venv-peers
    .venv-peers/bin/pip install -e . sdnq
    SDNQ_USE_TORCH_COMPILE=0 .venv-peers/bin/python scripts/peer_images.py fashion_ldm --num 2000
    qncd ablate --config fashion_ldm --bits w8a8 --presets best-label,best --num 2000

SDNQ 0.2 finds the range of every row of a layer's input in every call, convolutions unfolded
(`use_quantized_matmul_conv`), and needs no calibration. What it leaves in floating point is its own
choice: small layers, the outer ones and attention's products.

Prints SQNR of the latents and PSNR of the images, dB: pooled; median; 5 % quantile.
"""

from __future__ import annotations

import copy

import click
import torch
from torch import Tensor, nn

from qncd_cli.cli.console import ErrorReportingCommand
from qncd_cli.cli.shared import open_model
from qncd_cli.config.loading import load_config
from qncd_cli.config.schema import Config
from qncd_cli.errors import BackendUnavailable
from qncd_cli.metrics.tensor import psnr_db, psnr_each_db, sqnr_db
from qncd_cli.models.loading import DiffusionModel
from qncd_cli.quant.layers import StepState
from qncd_cli.runtime import trajectory
from qncd_cli.runtime.denoiser import Denoiser, denoiser_costs
from qncd_cli.sampling.noise import chunks

BATCH = 50


@click.command(cls=ErrorReportingCommand)
@click.argument("name", metavar="CONFIG")
@click.option("--num", default=200, show_default=True, help="Samples.")
def main(name: str, num: int) -> None:
    """How near SDNQ's dynamic int8 stays to full precision."""
    try:
        from sdnq.quantizer import sdnq_post_load_quant
    except ImportError as error:
        raise BackendUnavailable(f"sdnq: {error}", "see the head of this script") from error
    config = load_config(name)
    model = open_model(config)
    expected = drawn(config, model, model.denoiser, num)
    images = decoded(model, expected)
    quantized = sdnq_post_load_quant(
        copy.deepcopy(model.denoiser),
        weights_dtype="int8",
        quant_conv=True,
        use_quantized_matmul=True,
        use_quantized_matmul_conv=True,
        torch_dtype=torch.float32,
    )
    inside = {n for n, m in quantized.named_modules() if hasattr(m, "sdnq_dequantizer")}
    costs = denoiser_costs(config, model)
    share = sum(c.macs for c in costs if c.name in inside) / sum(c.macs for c in costs)
    latents = drawn(config, model, quantized, num)
    each = torch.tensor([sqnr_db(a, b) for a, b in zip(expected, latents, strict=True)])
    found = decoded(model, latents)
    every = torch.tensor(psnr_each_db(images, found))
    click.echo(
        f"SDNQ int8, {len(inside)} of {len(costs)} layers and products, {share:.1%} of the MACs: "
        f"SQNR {summary(sqnr_db(expected, latents), each)} dB, "
        f"PSNR {summary(psnr_db(images, found), every)} dB"
    )


def summary(pooled: float, each: Tensor) -> str:
    return f"{pooled:.1f}; {each.median():.1f}; {each.quantile(0.05):.1f}"


def drawn(config: Config, model: DiffusionModel, module: nn.Module, num: int) -> Tensor:
    """Latents of the first `num` seeds, [num, ...]."""
    denoiser = Denoiser(module, StepState())
    first = config.sampling.seed
    batches = chunks(list(range(first, first + num)), BATCH)
    return torch.cat([trajectory.draw(config, model, denoiser, batch) for batch in batches])


@torch.no_grad()
def decoded(model: DiffusionModel, latents: Tensor) -> Tensor:
    return torch.cat([model.decode(part) for part in latents.split(BATCH)])


if __name__ == "__main__":
    main()
