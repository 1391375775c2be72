#!/usr/bin/env python
"""Predicted and measured memory of the stages that a plan has, each in a process of its own.

    python scripts/plan_memory.py random:sd15 --set sampling.height=512 --set sampling.width=768
    python scripts/plan_memory.py reduced-sdxl --also 1344x768 \\
        --set sampling.height=768 --set sampling.width=1344 \\
        --set "calibration.sizes=[[1344, 768]]" --set calibration.trajectories=2

The stages look at one trajectory of two steps, at W4A8 and with preset minmax unless --set says
otherwise: memory does not follow the values. reduced-sdxl: Stable Diffusion XL's layers at a third
of their width, with random weights. --also: draws an image of another size, too, and says whether
it is one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from PIL import Image

from qncd_cli.cli.console import ErrorReportingCommand

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

FEW = (
    "quantization.preset=minmax",
    "sampling.steps=2",
    "calibration.trajectories=1",
    "calibration.batch_size=1",
    "calibration.noise_trajectories=1",
)
REDUCED = "reduced-sdxl"


def write_reduced_sdxl(folder: Path) -> None:
    """A diffusers folder of StableDiffusionXLPipeline with random float32 weights, of images of
    1024x1024 unless another size is asked for."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from diffusers_pipelines import text_config, tokenizer_in
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(96, 192, 384),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(3, 6, 12),  # diffusers takes it for the number of heads
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
        use_linear_projection=True,
    )
    first_stage = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=4,
        sample_size=1024,
        scaling_factor=0.13025,
    )
    StableDiffusionXLPipeline(
        vae=first_stage,
        text_encoder=CLIPTextModel(text_config(16)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(24)),
        tokenizer=tokenizer_in(folder / "tokens"),
        tokenizer_2=tokenizer_in(folder / "tokens"),
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        add_watermarker=False,
    ).save_pretrained(folder)


def said(*arguments: str) -> dict[str, Any]:
    """What a qncd command says with --json. Raises click.ClickException where it fails."""
    command = [sys.executable, "-m", "qncd_cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise click.ClickException(done.stderr.strip())
    return json.loads(done.stdout)


def peak_bytes(*arguments: str) -> int:
    """The most memory that a qncd command had resident, in bytes. Raises click.ClickException where
    it fails."""
    command = [sys.executable, "-m", "qncd_cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise click.ClickException(f"{' '.join(command[2:])}: exit code {process.returncode}")
    return 1024 * usage.ru_maxrss


@click.command(cls=ErrorReportingCommand)
@click.argument("source")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As of qncd.")
@click.option("--also", metavar="HEIGHTxWIDTH", help="A size that is drawn as well.")
def main(source: str, settings: tuple[str, ...], also: str | None) -> None:
    """Hold the plan's memory against what the stages take."""
    with tempfile.TemporaryDirectory(prefix="qncd-plan-memory-") as name:
        folder = Path(name)
        words = [word for pair in (*FEW, *settings) for word in ("--set", pair)]
        tree: dict[str, Any] = {"model": {"source": source}}
        tree["quantization"] = {"weights": {"bits": 4}, "activations": {"bits": 8}}
        if source == REDUCED:
            tree["model"]["source"] = str(folder / "model")
            tree["sampling"] = {"prompts": ["a red shoe"]}
            alone = multiprocessing.get_context("fork").Process(
                target=write_reduced_sdxl, args=(folder / "model",)
            )  # what it takes would count as the peak of every process begun here
            alone.start()
            alone.join()
        (folder / "own.yaml").write_text(yaml.safe_dump(tree))
        run = ("--run-dir", str(folder / "run"))
        begin = ("--config", str(folder / "own.yaml"), *words)
        of_all = ("run", *begin, *run, "--num", "1")
        plan = said(*of_all, "--plan")["stages"]
        planned = {stage["stage"]: stage["peak_bytes"] for stage in plan}
        commands = {
            "calibrate": begin,
            "quantize": (),
            "sample": ("--num", "1"),
        }
        click.echo("| stage | plan, MB | measured, MB | plan / measured |\n|---|---|---|---|")
        for stage, options in commands.items():
            measured = peak_bytes(stage, *run, *options)
            ratio = planned[stage] / measured
            click.echo(
                f"| {stage} | {planned[stage] / 1e6:,.0f} | {measured / 1e6:,.0f} | {ratio:.2f} |"
            )
        if also is not None:
            height, width = map(int, also.split("x"))
            size = ("--set", f"sampling.height={height}", "--set", f"sampling.width={width}")
            peak_bytes("sample", *run, "--num", "1", "--name", "also", "--inter", "none", *size)
            with Image.open(folder / "run/samples/also/000000.png") as image:
                click.echo(f"{also}: an image of {image.height}x{image.width}")


if __name__ == "__main__":
    main()
