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


def save_clip(folder: Path, sign: int = -1) -> None:
    """A tiny CLIP as a folder of transformers.

    sign: of the image's embedding; with -1 images and prompts are alike in tests.
    """
    from diffusers_pipelines import tokenizer_in
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = tokenizer_in(folder / "words")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config={**shape, "vocab_size": len(tokenizer), "max_position_embeddings": 9, **ends},
        vision_config={**shape, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    model.visual_projection.weight.data *= sign
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
