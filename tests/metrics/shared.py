"""Random images and features."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

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
