"""Random images, features and weights."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torchvision.models.vgg import cfgs, make_layers

from qncd_cli.metrics import perceptual

COUNT = 12


def random_images(seed: int, count: int = COUNT, low: int = 0, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, size, size)
    return torch.randint(low, 256, shape, dtype=torch.uint8, generator=generator)


def save_images(folder: Path, images: torch.Tensor, suffix: str = ".png") -> Path:
    folder.mkdir(exist_ok=True)
    for index, pixels in enumerate(images):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{index:06d}{suffix}")
    return folder


def gaussian(seed: int, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def save_lpips(folder: Path) -> Path:
    """Both files of LPIPS with random weights of which no layer blows up or dies out."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    state = {
        f"features.{name}": value for name, value in make_layers(cfgs["D"]).state_dict().items()
    }
    for name, value in state.items():
        spread = (2 / value[0].numel()) ** 0.5 if value.dim() > 1 else 0.1
        state[name] = (torch.randn(value.shape, generator=generator) * spread).half()
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, folder / perceptual.VGG_FILE)
    linear = {
        f"lin{number}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for number, width in enumerate(perceptual.WIDTHS)
    }
    torch.save(linear, folder / perceptual.LINEAR_FILE)
    return folder
