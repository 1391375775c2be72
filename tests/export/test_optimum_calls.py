"""What Optimum's pipelines call their parts with, computed without a graph."""

from __future__ import annotations

import diffusers_pipelines as tiny
import pytest
import torch
from diffusers import DiffusionPipeline

from qncd_cli.export import optimum_calls
from qncd_cli.export.optimum_calls import PIPELINES, called_by_name, denoiser_signature
from qncd_cli.models.call_signature import as_its_class
from qncd_cli.models.loading import load_model
from qncd_cli.models.text import Prompts
from qncd_cli.quant.layers import StepState
from qncd_cli.runtime.denoiser import Denoiser
from qncd_cli.sampling.noise import generators_for

UNET = ["sample", "timestep", "encoder_hidden_states"]
XL = [*UNET, "text_embeds", "time_ids"]
NAMES = {
    "StableDiffusionPipeline": UNET,
    "StableDiffusionInpaintPipeline": UNET,
    "StableDiffusionXLPipeline": XL,
    "StableDiffusionXLInpaintPipeline": XL,
    "LatentConsistencyModelPipeline": [*UNET, "timestep_cond"],
    "StableDiffusion3Pipeline": [
        *("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    ],
    "FluxPipeline, schnell": [
        *("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
        *("txt_ids", "img_ids"),
    ],
    "FluxPipeline, dev": [
        *("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
        *("txt_ids", "img_ids", "guidance"),
    ],
}
"""Pipeline -> the inputs that Optimum's exporters name (optimum/exporters/onnx/model_configs.py of
optimum-onnx 0.1.0: UNetOnnxConfig, SD3TransformerOnnxConfig, FluxTransformerOnnxConfig)."""


@pytest.mark.parametrize("name", [name for name in NAMES if "Inpaint" not in name])
def test_a_call_under_optimums_names_is_the_call_of_this_package(tmp_path, name):
    interface, size = PIPELINES[name.partition(",")[0]], 16 if "Flux" in name else None
    model = load_model(
        str(tiny.save(name, tmp_path / "model")), prompts=Prompts(("red",), "", size, 2.0)
    )
    condition = model.condition(torch.zeros(2, dtype=torch.int64))
    signature = denoiser_signature(interface, model.denoiser.config, condition)
    assert sorted(signature.inputs) == sorted(NAMES[name]) == sorted(signature.sizes)
    assert signature.outputs == [interface.output]
    plain, given = as_its_class(model.denoiser), {}

    def run(inputs):
        given.update(inputs)
        assert sorted(inputs) == sorted(signature.inputs)
        assert {k: v.ndim for k, v in inputs.items()} == {
            k: v.ndim for k, v in signature.inputs.items()
        }
        return signature.call(plain, inputs)

    x = torch.randn(2, *model.latent_shape, generator=generators_for([1])[0])
    here, there = (
        Denoiser(module, StepState())
        for module in (model.denoiser, called_by_name(model.denoiser, interface, run))
    )
    for t in (951.0, 3.5):
        assert torch.equal(here(x, t, condition), there(x, t, condition))
        assert abs(signature.timestep(given).item() - t) < 1e-3


@pytest.mark.parametrize("name", [name for name in NAMES if "Inpaint" in name])
def test_a_u_net_of_inpainting_reads_nine_channels(tmp_path, name):
    unet = DiffusionPipeline.from_pretrained(tiny.save(name, tmp_path / "model")).unet
    condition = {"encoder_hidden_states": torch.zeros(1, 9, unet.config.cross_attention_dim)}
    if name.startswith("StableDiffusionXL"):
        condition |= {"text_embeds": torch.zeros(1, 24), "time_ids": torch.zeros(1, 6)}
    condition[optimum_calls.BESIDE] = torch.zeros(1, 5, 8, 8)
    signature = denoiser_signature(PIPELINES[name], unet.config, condition)
    assert sorted(signature.inputs) == sorted(NAMES[name])
    assert signature.inputs["sample"].shape[1] == 9
    with torch.no_grad():
        assert signature.call(unet, signature.inputs).shape[1] == 4


def test_text_encoders_and_first_stages_have_optimums_names(tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(tiny.save("StableDiffusion3Pipeline", tmp_path))
    flux = DiffusionPipeline.from_pretrained(tiny.save("FluxPipeline, dev", tmp_path / "flux"))
    states = [f"hidden_states.{layer}" for layer in range(3)]  # of two layers
    expected = {
        "last_hidden_state and more": (
            flux.text_encoder,
            ["last_hidden_state", "pooler_output", *states],
        ),
        "projected": (pipeline.text_encoder_2, ["text_embeds", "last_hidden_state", *states]),
        "T5": (pipeline.text_encoder_3, ["last_hidden_state"]),
    }
    with torch.no_grad():
        for encoder, names in expected.values():
            signature = optimum_calls.text_signature(encoder)
            assert list(signature.inputs) == ["input_ids"] and list(signature.outputs) == names
            found = signature.call(encoder, signature.inputs)
            assert len(names) == (1 if isinstance(found, torch.Tensor) else len(found))
        decoder = optimum_calls.decoder_signature(pipeline.vae)
        encoder = optimum_calls.encoder_signature(pipeline.vae)
        assert (list(decoder.inputs), decoder.outputs) == (["latent_sample"], ["sample"])
        assert (list(encoder.inputs), encoder.outputs) == (["sample"], ["latent_parameters"])
        assert decoder.call(pipeline.vae, decoder.inputs).shape == (2, 3, 4, 6)
        assert encoder.call(pipeline.vae, encoder.inputs).shape == (2, 8, 2, 3)
