import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from qncd_cli.models.loading import load_model
from qncd_cli.models.smoothing_sites import smoothing_sites
from qncd_cli.models.topology import (
    AttentionSite,
    attention_sites,
    capture_attention,
    capture_inputs,
    count_macs,
    float_attention,
    is_conditioning_layer,
    is_outer_layer,
    skip_boundaries,
    step_embeddings,
    time_layers,
    weight_layers,
)


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(str(tiny_model))


def call(model, t=500):
    x = torch.zeros(1, *model.latent_shape)
    with torch.no_grad():
        return model.denoiser(x, t, **model.condition(torch.tensor([1]))).sample


def test_every_layer_has_one_role(model):
    names = list(weight_layers(model.denoiser))
    assert [n for n in names if is_outer_layer(n)] == ["conv_in", "conv_out"]
    timed = time_layers(model.denoiser)
    assert {n.rpartition(".")[2] for n in timed} == {"linear_1", "linear_2", "time_emb_proj"}
    blocks = [n for n in timed if n.endswith("time_emb_proj")]
    assert len(blocks) == len(smoothing_sites(model.denoiser))
    assert not any("attentions" in n for n in timed)


def test_a_smoothing_site_names_modules_that_belong_together(model):
    for site in smoothing_sites(model.denoiser):
        conv = model.denoiser.get_submodule(site.layers[0])
        norm = model.denoiser.get_submodule(site.norm)
        projection = model.denoiser.get_submodule(site.projection)
        assert norm.num_channels == conv.in_channels == projection.out_features
        assert site.kind == "additive"


def test_scale_shift_blocks_are_recognised():
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=3,
    )
    sites = smoothing_sites(unet)
    assert all((site.kind, site.parts) == ("scale_shift", 2) for site in sites)
    # its class is added to the timestep's embedding, so that only the embedding itself is timed
    assert time_layers(unet) == {"time_embedding.linear_1", "time_embedding.linear_2"}
    assert all(is_conditioning_layer(site.projection) for site in sites)


def test_adaptive_layer_norm_sites_scale_what_the_layers_read():
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        sample_size=4,
        patch_size=1,
        num_embeds_ada_norm=5,
    ).eval()
    sites = smoothing_sites(transformer)
    assert [site.layers[0].rpartition(".")[2] for site in sites] == ["to_q", "proj"] * 2
    assert {n.rpartition("embedder.")[2] for n in time_layers(transformer)} == {
        "linear_1",
        "linear_2",
    }
    assert is_outer_layer("pos_embed.proj") and is_outer_layer("proj_out_2")

    def run(t):
        with torch.no_grad():
            x = torch.ones(2, 3, 4, 4)
            transformer(x, torch.tensor([t, t]), class_labels=torch.tensor([1, 2]))

    inputs = {}
    site = sites[1]  # the feed-forward layers, behind LayerNorm * (1 + scale) + shift
    with capture_inputs(transformer, [site.layers[0]], inputs.__setitem__):
        shift, scale = (
            step_embeddings(transformer, [site.projection], run, [10])[site.projection].chunk(
                site.parts, dim=1
            )[part]
            for part in (site.part - 1, site.part)
        )
    features = (inputs[site.layers[0]] - shift[:, None]) / (1 + scale[:, None])
    assert torch.allclose(features.mean(-1), torch.zeros(()), atol=1e-4)
    assert torch.allclose(features.var(-1, correction=0), torch.ones(()), atol=1e-2)


def test_step_embeddings_are_what_the_blocks_add(model):
    site = smoothing_sites(model.denoiser)[0]
    found = step_embeddings(
        model.denoiser, [site.projection], lambda t: call(model, t), [981, 481, 1]
    )[site.projection]
    unet = model.denoiser
    with torch.no_grad():
        temb = unet.time_embedding(unet.time_proj(torch.tensor([481])))
        expected = unet.get_submodule(site.projection)(torch.nn.functional.silu(temb))
    assert found.shape == (3, expected.shape[1])
    assert torch.allclose(found[1], expected[0], atol=1e-6)


def concatenations(unet, monkeypatch, **condition) -> dict[str, int]:
    """Layers that read what torch.cat returned, with the channels of its first tensor."""
    made, found, cat = [], {}, torch.cat

    def recording(tensors, dim=0, **options):
        result = cat(tensors, dim=dim, **options)
        if result.ndim == 4 and dim == 1:
            made.append((result, tensors[0].shape[1]))
        return result

    def hook(name, block):
        def see(module, args):
            first = [channels for result, channels in made if result is args[0]]
            for layer in ("conv1", "conv_shortcut") if first else ():
                if getattr(block, layer) is not None:
                    found[f"{name}.{layer}"] = first[0]

        return see

    for name, block in unet.named_modules():
        if isinstance(block, ResnetBlock2D):
            block.register_forward_pre_hook(hook(name, block))
    monkeypatch.setattr(torch, "cat", recording)
    with torch.no_grad():
        unet(torch.zeros(1, unet.config.in_channels, 16, 16), 10, **condition)
    return found


@pytest.mark.parametrize("layers", [1, 2])
def test_skip_boundaries_of_a_conditional_unet_are_where_it_concatenates(layers, monkeypatch):
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 24, 16),
        layers_per_block=layers,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    expected = concatenations(unet, monkeypatch, encoder_hidden_states=torch.zeros(1, 1, 8))
    assert skip_boundaries(unet) == expected
    assert len(expected) == 6 * (layers + 1)
    assert len(set(expected.values())) > 1


@pytest.mark.parametrize("scale_shift", ["default", "scale_shift"])
def test_skip_boundaries_of_an_unconditional_unet_are_where_it_concatenates(
    scale_shift, monkeypatch
):
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8, 24),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        resnet_time_scale_shift=scale_shift,
        downsample_type="resnet",
        upsample_type="resnet",
    )
    expected = concatenations(unet, monkeypatch)
    assert skip_boundaries(unet) == expected
    assert len(expected) == 18


def test_a_transformer_has_no_skip_boundaries():
    assert skip_boundaries(nn.ModuleDict({"transformer_blocks": nn.Linear(2, 2)})) == {}


@pytest.mark.parametrize("plain", [AttnProcessor, AttnProcessor2_0])
def test_captured_operands_are_what_the_products_multiply(plain):
    torch.manual_seed(0)
    norm = {"qk_norm": "layer_norm", "elementwise_affine": False}
    attn = Attention(8, heads=2, dim_head=4, bias=True, processor=plain(), **norm).eval()
    denoiser = nn.ModuleDict({"a": attn})
    sites = attention_sites(denoiser)
    assert sites == [AttentionSite("a", 8, 0.5, plain is AttnProcessor2_0, False)]
    seen, x = {}, torch.randn(2, 5, 8)
    with torch.no_grad(), capture_attention(denoiser, sites, seen.__setitem__):
        expected = attn(x)
    assert set(seen) == {"a.query", "a.key", "a.value"}
    q, k, v = (
        seen[f"a.{n}"].unflatten(2, (2, 4)).transpose(1, 2) for n in ("query", "key", "value")
    )
    with torch.no_grad():
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        y = attn.to_out[0](y.transpose(1, 2).flatten(2))
        assert torch.allclose(y, expected, atol=1e-6)
        seen.clear()
        attn(x)
    assert not seen


def test_attention_of_another_kind_is_named_with_its_processor(model):
    class Other(AttnProcessor2_0):
        pass

    denoiser = copy.deepcopy(model.denoiser)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    sites = attention_sites(denoiser)
    assert float_attention(denoiser) == {}
    denoiser.get_submodule(name).set_processor(Other())
    assert [s for s in sites if s.name != name] == attention_sites(denoiser)
    assert len(attention_sites(denoiser)) == len(sites) - 1
    assert list(float_attention(denoiser)) == [name]
    assert "Other" in float_attention(denoiser)[name]


def test_hooks_are_gone_after_an_error(model):
    names = ["conv_in", "conv_out"]

    def fail(name, x):
        raise RuntimeError(name)

    with pytest.raises(RuntimeError, match="conv_in"), capture_inputs(model.denoiser, names, fail):
        call(model)
    call(model)


def test_macs_of_convolution_linear_and_attention(model):
    costs = {cost.name: cost for cost in count_macs(model.denoiser, lambda: call(model))}
    assert costs["conv_in"].macs == 8 * 8 * 16 * 3 * 9
    attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn"
    # 32 channels at 4x4: 16 queries; 16 keys in self-attention, 1 (the class) in cross-attention
    assert costs[f"{attention}1.query_key"].macs == 16 * 16 * 32
    assert costs[f"{attention}2.query_key"].macs == 16 * 1 * 32
    assert costs[f"{attention}1.to_q"].macs == 16 * 32 * 32
    assert set(weight_layers(model.denoiser)) <= set(costs)
