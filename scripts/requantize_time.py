#!/usr/bin/env python
"""How long a LoRA on a quantized run takes, beside the first quantize of the run.

    python scripts/requantize_time.py --width 64 --side 32

The U-Net has the shape of Stable Diffusion 1.x and random weights; --width 320 --side 64 is its
size. The LoRA changes the query, key, value and output of every attention, as most do.

    python scripts/requantize_time.py --foresee

counts the multiplications of both at full size, as --plan does, and runs nothing.
"""

from __future__ import annotations

import math
import time
from typing import Any

import click
import torch
from diffusers import UNet2DConditionModel

from qncd_cli.cli.console import ErrorReportingCommand
from qncd_cli.config.loading import parse_config
from qncd_cli.config.schema import Config
from qncd_cli.forecast import activations, artifacts
from qncd_cli.forecast.shapes import model_shapes
from qncd_cli.models.loading import DiffusionModel
from qncd_cli.models.random_models import PROMPTS, RANDOM
from qncd_cli.models.topology import count_macs, weight_layers
from qncd_cli.ptq import hessians
from qncd_cli.ptq.hessians import wanted_rows
from qncd_cli.ptq.layer import gptq_cost
from qncd_cli.ptq.layer_plan import plan_layers
from qncd_cli.stages import calibrate, quantize, requantize

LEVELS = (1, 2, 4, 4)
RANK, STRENGTH = 8, 0.05
ENDS = ("to_q", "to_k", "to_v", "to_out.0")


def model_of(width: int, side: int) -> DiffusionModel:
    """random:sd15 with another U-Net; decoding is not needed."""
    torch.manual_seed(0)
    embedder = RANDOM["sd15"]().class_embedder.eval().requires_grad_(False)
    unet: Any = UNet2DConditionModel(
        sample_size=side,
        block_out_channels=tuple(width * level for level in LEVELS),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    return DiffusionModel(
        source="sd15 reduced",
        digest="before",
        denoiser=unet.eval().requires_grad_(False),
        scheduler_config={"beta_schedule": "scaled_linear", "clip_sample": False},
        latent_shape=(4, side, side),
        num_classes=PROMPTS,
        condition=lambda labels: {"encoder_hidden_states": embedder(labels)},
        null_condition=lambda n: {"encoder_hidden_states": embedder(torch.full((n,), PROMPTS))},
        interpolates=True,
        decode=lambda latents: latents,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def fuse(model: DiffusionModel) -> int:
    """Add a random LoRA; how many layers it changes."""
    generator, count = torch.Generator().manual_seed(1), 0
    for name, layer in weight_layers(model.denoiser).items():
        if name.endswith(ENDS):
            out, inside = layer.weight.shape[:2]
            up = torch.randn(out, RANK, generator=generator)
            layer.weight += STRENGTH / inside * up @ torch.randn(RANK, inside, generator=generator)
            count += 1
    return count


def foresee(config: Config) -> None:
    """Multiplications of the first quantize of random:sd15, and of the LoRA's."""
    shapes = model_shapes("random:sd15", torch.float32)
    times = list(range(config.sampling.steps))
    calibration = artifacts.calibration(config, shapes, times)
    smoothing = artifacts.smoothing(config, shapes)
    quantized = artifacts.quantized(config, shapes, calibration, smoothing)
    with torch.no_grad():
        costs = count_macs(shapes.denoiser, lambda: shapes.call(1))
    call = activations.meter(config, shapes, quantized, costs, config.sampling.steps)
    parts = quantize.costs(config, shapes.denoiser, call)
    touched = [p for p in plan_layers(config, shapes.denoiser) if p.name.endswith(ENDS)]
    touched = [p for p in touched if "attn" in p.name]
    calls, rows = min(config.calibration.looks.hessian_calls, config.sampling.steps), 1
    for plan in touched:
        vectors = max(1, call.layer_macs[plan.name] // plan.layer.weight.numel())
        rows = max(
            rows,
            math.ceil(
                wanted_rows(plan, config.calibration.looks) / (calls * call.copies * vectors)
            ),
        )
    batch = min(config.calibration.batch_size, config.calibration.trajectories)
    rows = min(rows, batch)
    few = config.model_copy(
        update={"calibration": config.calibration.model_copy(update={"batch_size": rows})}
    )
    seen = 2 * requantize.LOSS_STEPS * requantize.LOSS_ROWS * call.copies + 2
    second = hessians.cost(few, touched, call).macs + gptq_cost(touched).macs + seen * call.macs
    first = sum(part.macs for part in parts.values())
    print(f"quantize: {first:.2g} multiplications")
    for name, part in parts.items():
        print(f"  {name}: {part.macs:.2g}")
    print(
        f"with a LoRA: {second:.2g}, {second / first:.1%} of the first; {len(touched)} layers, "
        f"{rows} of {batch} rows a call"
    )


@click.command(cls=ErrorReportingCommand)
@click.option("--width", default=64, show_default=True, help="Channels of the first level.")
@click.option("--side", default=32, show_default=True, help="Of latents.")
@click.option("--steps", default=20, show_default=True)
@click.option("--trajectories", default=16, show_default=True)
@click.option("--bits", default=4, show_default=True, help="Of weights; inputs have 8.")
@click.option("--foresee", "ahead", is_flag=True, help="Count the work at full size instead.")
def main(width: int, side: int, steps: int, trajectories: int, bits: int, ahead: bool) -> None:
    trajectories = 128 if ahead else trajectories
    batch = min(32 if ahead else 16, trajectories)
    tree = {
        "model": {"source": "random:sd15"},
        "sampling": {"steps": steps, "scheduler": "ddim", "guidance_scale": 3.0},
        "calibration": {"trajectories": trajectories, "batch_size": batch},
        "quantization": {
            "weights": {"bits": bits},
            "activations": {"bits": 8, "timestep_groups": steps},
        },
    }
    config = parse_config(tree, "requantize_time")
    if ahead:
        foresee(config)
        return
    model = model_of(width, side)
    calibration, smoothing = calibrate.run(config, model)
    begun = time.perf_counter()
    made = quantize.run(config, model, calibration, smoothing)
    first = time.perf_counter() - begun
    found = {
        "smoothing": smoothing,
        "calibration": calibration,
        "quantized": made.quantized,
        "noise_stats": made.noise_stats,
    }
    before = requantize.layer_digests(model.denoiser)
    touched = fuse(model)
    begun = time.perf_counter()
    again = requantize.run(config, model, found, before)
    second = time.perf_counter() - begun
    assert len(again.layers) == touched
    layers = len(made.quantized.body["layers"])
    print(f"quantize: {first:.1f} s, {layers} layers")
    print(f"with a LoRA: {second:.1f} s, {touched} layers, {second / first:.1%} of the first")
    print(f"predictions: SQNR {again.sqnr_db:.1f} dB to full precision with the LoRA")


if __name__ == "__main__":
    main()
