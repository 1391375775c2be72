"""Sizes of images: which models take them, and what they draw then."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from qncd_cli.config.schema import Config
from qncd_cli.errors import ModelError
from qncd_cli.forecast.shapes import model_shapes
from qncd_cli.models.image_size import latent_sides
from qncd_cli.models.loading import load_model
from qncd_cli.models.pipelines import ClassConditionalLDMPipeline
from qncd_cli.runtime import trajectory
from qncd_cli.runtime.denoiser import full_denoiser
from qncd_cli.sampling.noise import generators_for

SEEDS = [0, 1, 2]


@pytest.mark.parametrize("sides", [(16, 24), (14, 18), (34, 16)])
def test_a_class_conditional_unet_in_latents_draws_what_its_pipeline_does(tiny_model, sides):
    """At any multiple of its first stage's factor: latents of 7 x 9 are halved and come back."""
    model = load_model(str(tiny_model), image_size=sides)
    assert model.latent_shape == (3, sides[0] // 2, sides[1] // 2)
    sampling = {"steps": 3, "guidance_scale": 2.0}
    config = Config.model_validate({"model": {"source": "x"}, "sampling": sampling})
    found = trajectory.draw(config, model, full_denoiser(model), SEEDS)
    pipeline = ClassConditionalLDMPipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    more = {"height": sides[0], "width": sides[1], "generator": generators_for(SEEDS)}
    expected = pipeline(SEEDS, 2.0, 3, output_type="latent", **more).images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert model.decode(found).shape == (3, 1, *sides)


def test_a_pipeline_of_another_size_draws_its_own_where_nothing_is_said(tiny_model):
    pipeline = ClassConditionalLDMPipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline([0], num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 1)
    with pytest.raises(ModelError, match="16 x 17 pixels do not fit"):
        pipeline([0], num_inference_steps=1, width=17)


@pytest.mark.parametrize(
    ("blocks", "unit"),
    [
        (("DownBlock2D", "UpBlock2D"), 1),
        (("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), 4),
    ],
)
def test_the_unit_is_what_the_unet_can_halve(blocks, unit):
    """Every size that is taken runs, and the U-Net itself fails at one that is refused."""
    down, up = blocks
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        down_block_types=(*[down] * 2, "DownBlock2D"),
        up_block_types=(up, up, up),
        mid_block_type=None,
        cross_attention_dim=4,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    assert unet.num_upsamplers == 2

    def runs(height: int, width: int) -> None:
        x, context = torch.zeros(1, 3, height, width), torch.zeros(1, 1, 4)
        assert unet(x, 0, encoder_hidden_states=context).sample.shape == x.shape

    for height, width in ((8, 12), (4, 8), (5, 8), (8, 6), (7, 9)):
        size = (2 * height, 2 * width)
        if height % unit or width % unit:
            with pytest.raises(ModelError, match=f"pixels do not fit it.*multiples of {2 * unit}"):
                latent_sides("it", unet, 2, size)
            with pytest.raises(RuntimeError):
                runs(height, width)
        else:
            assert latent_sides("it", unet, 2, size) == (height, width)
            runs(height, width)


@pytest.mark.parametrize("model", ["tiny_pixel_model", "tiny_dit_model"])
def test_other_models_without_prompts_draw_their_own_size_alone(model, request):
    """Said alike where weights are read and where they are not."""
    source = str(request.getfixturevalue(model))
    said = []
    for opened in (load_model, lambda *a, **k: model_shapes(*a, torch.float32, **k)):
        for asked in ({"image_size": 32}, {"sizes": [(32, 16)]}):
            with pytest.raises(ModelError, match="its own size alone") as caught:
                opened(source, **asked)
            said.append(str(caught.value))
    assert len(set(said)) == 1 and "\n" not in said[0]


def test_a_size_that_does_not_fit_is_said_alike_with_and_without_weights(tiny_model):
    for asked in ({"image_size": (16, 17)}, {"sizes": [(16, 17)]}):
        with pytest.raises(ModelError, match="16 x 17 pixels do not fit.*multiples of 2") as loaded:
            load_model(str(tiny_model), **asked)
        with pytest.raises(ModelError) as planned:
            model_shapes(str(tiny_model), torch.float32, **asked)
        assert str(planned.value) == str(loaded.value)


def test_the_same_model_at_another_size_shares_its_modules(tiny_model):
    model = load_model(str(tiny_model), sizes=[(24, 16)])
    other = model.sized[24, 16]
    assert other.denoiser is model.denoiser and other.digest == model.digest
    assert (model.size, other.size) == (None, (24, 16))
    assert (model.latent_shape, other.latent_shape) == ((3, 8, 8), (3, 12, 8))
    shapes = model_shapes(str(tiny_model), torch.float32, sizes=[(24, 16)])
    assert shapes.sized[24, 16].latent_shape == other.latent_shape
    assert shapes.sized[24, 16].image_shape == (1, 24, 16)
