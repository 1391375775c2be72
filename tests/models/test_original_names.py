"""Which models have names in ComfyUI; what the names are is checked by its files."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

from qncd_cli.errors import ModelError
from qncd_cli.models.original_names import known_sizes, places

FLUX = {"num_layers": 1, "num_single_layers": 1}
UNET = {"layers_per_block": 1, "norm_num_groups": 4}


def made(kind, **options):
    with torch.device("meta"):
        return kind(**options)


def test_every_parameter_has_a_place_of_its_own():
    flux = made(FluxTransformer2DModel, **FLUX, guidance_embeds=True)
    found = places(flux)
    assert len({(place.key, place.part) for place in found.values()}) == len(found)
    assert found["single_transformer_blocks.0.proj_mlp.weight"].part == 3
    assert found["norm_out.linear.weight"].swapped
    assert known_sizes(flux)


@pytest.mark.parametrize("kind", [UNet2DModel, DiTTransformer2DModel])
def test_other_models_are_refused(kind):
    options = UNET if kind is UNet2DModel else {"num_layers": 1}
    if kind is UNet2DModel:
        options = {**UNET, "block_out_channels": (8, 8, 8, 8)}
    with pytest.raises(ModelError, match="ComfyUI has no names for a"):
        places(made(kind, **options))


def test_parts_without_a_counterpart_are_named():
    unet = made(
        UNet2DConditionModel,
        **UNET,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        encoder_hid_dim=4,
    )
    with pytest.raises(ModelError, match="with encoder_hid_proj has no counterpart"):
        places(unet)
    assert not known_sizes(unet)


def test_sizes_of_published_models_are_known():
    assert known_sizes(made(SD3Transformer2DModel, num_layers=2, num_attention_heads=2))
    assert not known_sizes(made(SD3Transformer2DModel, num_layers=3, num_attention_heads=2))
