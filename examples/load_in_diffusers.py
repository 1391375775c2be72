"""Draw images with diffusers from a folder that `qncd export --to diffusers` wrote.

python examples/load_in_diffusers.py exported/my-model --prompt "a red bicycle"
python examples/load_in_diffusers.py exported/fashion-ldm --classes 7 9 --guidance 3
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import qncd_cli.exported  # noqa: F401  (diffusers can load the folder from now on)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", nargs="+", help="of a text model, one image each")
    asked.add_argument("--classes", nargs="+", type=int, help="of a class-conditional model")
    parser.add_argument("--seed", type=int, default=0, help="of the first image")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the pipeline's)")
    parser.add_argument("--guidance", type=float, help="scale (default: the pipeline's)")
    parser.add_argument("--out", type=Path, default=Path())
    options = parser.parse_args()

    pipeline = DiffusionPipeline.from_pretrained(str(options.folder))

    arguments: dict[str, Any] = {"prompt": options.prompt}
    if options.prompt is None:
        arguments = {"class_labels": options.classes}
    if options.steps is not None:
        arguments["num_inference_steps"] = options.steps
    if options.guidance is not None:
        arguments["guidance_scale"] = options.guidance
    seeds = range(options.seed, options.seed + len(options.prompt or options.classes))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # one per image, as qncd
    images = pipeline(**arguments, generator=generators).images

    options.out.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(seeds, images, strict=True):
        path = options.out / f"{seed:06d}.png"
        image.save(path)
        print(path)


if __name__ == "__main__":
    main()
