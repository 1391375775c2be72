#!/usr/bin/env python
"""A random LoRA of a model, and how far apart two sets of images are.

    python scripts/lora_branch.py make zoo:fashion-ldm lora.safetensors
    python scripts/lora_branch.py compare run/samples/branch fused/samples/quantized

The LoRA changes the query, key, value and output of every attention of the U-Net.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from qncd_cli.lineage.sample_set import read_set
from qncd_cli.metrics.tensor import psnr_db, psnr_each_db
from qncd_cli.models.loading import open_pipeline

RANK, STRENGTH = 8, 0.3
ENDS = ("to_q", "to_k", "to_v", "to_out.0")


@click.group()
def main() -> None:
    pass


@main.command()
@click.argument("source")
@click.argument("file")
def make(source: str, file: str) -> None:
    pipeline: Any = open_pipeline(source, None)[0]
    draws, tensors = torch.Generator().manual_seed(1), {}
    for name, layer in pipeline.unet.named_modules():
        if name.endswith(ENDS):
            out, inside = layer.weight.shape
            down = torch.randn(RANK, inside, generator=draws) / inside**0.5
            up = STRENGTH * layer.weight.std() * torch.randn(out, RANK, generator=draws)
            tensors[f"unet.{name}.lora_A.weight"] = down
            tensors[f"unet.{name}.lora_B.weight"] = up
    save_file(tensors, file)
    print(f"{file}: {len(tensors) // 2} layers")


@main.command()
@click.argument("folders", nargs=2)
def compare(folders: tuple[str, str]) -> None:
    one, other = (read_set(Path(folder)) for folder in folders)
    seeds = sorted(set(one.seeds) & set(other.seeds))
    images = [s.cut(seeds).images for s in (one, other)]
    each = psnr_each_db(*images)
    lowest = seeds[int(torch.as_tensor(each).argmin())]
    print(
        f"PSNR of {len(seeds)} images: {psnr_db(*images):.1f} dB pooled, median "
        f"{torch.as_tensor(each).median():.1f}, lowest {min(each):.1f} (seed {lowest})"
    )


if __name__ == "__main__":
    main()
