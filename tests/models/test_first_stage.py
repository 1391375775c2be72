"""The first stage: images of latents, with another decoder, and in tiles."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from qncd_cli.errors import ConfigError
from qncd_cli.models.first_stage import FirstStage, to_uint8


def kl(**options) -> AutoencoderKL:
    torch.manual_seed(0)
    found = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=64,
        **options,
    )
    return found.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def first_stage() -> FirstStage:
    return FirstStage(kl())


def latents(height: int, width: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(1))


def test_images_are_the_model_s_own_and_batches_change_none(first_stage):
    x = latents(8, 8, 300)
    images = first_stage(x)
    assert images.dtype == torch.uint8 and images.shape == (300, 3, 16, 16)
    own = first_stage.model.decode(x[:3] / first_stage.model.config.scaling_factor).sample
    assert torch.equal(images[:3], ((own / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
    assert first_stage.images_at_once(x.shape) == 256  # so that two parts were decoded


def test_another_decoder_leaves_this_one_as_it_is(first_stage):
    other = first_stage.with_decoder(kl(layers_per_block=2).decoder)
    x = latents(8, 8)
    before = first_stage(x)
    assert not torch.equal(other(x), before)
    assert torch.equal(first_stage(x), before)
    assert other.model.post_quant_conv is first_stage.model.post_quant_conv


def test_only_images_larger_than_a_tile_are_decoded_in_tiles(first_stage):
    tiled = first_stage.tiled(32)
    assert torch.equal(tiled(latents(16, 16)), first_stage(latents(16, 16)))
    large = latents(40, 24)
    assert tiled(large).shape == first_stage(large).shape == (2, 3, 80, 48)
    assert not torch.equal(tiled(large), first_stage(large))
    assert tiled.decoded_shape((40, 24)) == (4, 16, 16)
    assert first_stage.decoded_shape((40, 24)) == (4, 40, 24)


def test_a_tile_s_inside_is_near_the_whole_image(first_stage):
    """Norms see a tile instead of the image: the two are near, not equal."""
    large = latents(40, 40, 1)
    off = (first_stage.tiled(64)(large).float() - first_stage(large).float()).abs()
    spread = first_stage(large).float().std()
    assert off.mean() < 0.2 * spread


@pytest.mark.parametrize("side", [36, 33, 100])
def test_a_tile_of_broken_latents_is_refused(first_stage, side):
    with pytest.raises(ConfigError, match="no multiple of 8"):
        first_stage.tiled(side)


def test_a_first_stage_without_tiles_says_so():
    with pytest.raises(ConfigError, match="VQModel decodes no tiles"):
        FirstStage(VQModel(block_out_channels=(32,))).tiled(64)


def test_a_codebook_is_looked_up_by_rows_of_one_image(monkeypatch):
    monkeypatch.setattr("qncd_cli.models.first_stage.DISTANCES", 4 * 16 * 64)
    torch.manual_seed(0)
    model = VQModel(block_out_channels=(32,), num_vq_embeddings=64).eval().requires_grad_(False)
    first_stage, x = FirstStage(model), torch.randn(2, 3, 10, 16) / 64
    expected = to_uint8(model.decode(x / model.config.scaling_factor).sample)
    calls, lookup = [], model.quantize.forward
    model.quantize.forward = lambda part: (calls.append(part.shape), lookup(part))[1]
    assert torch.equal(first_stage(x), expected)
    assert calls == 2 * [(1, 3, 4, 16), (1, 3, 4, 16), (1, 3, 2, 16)]
