"""ControlNet: own samples are the pipeline's, four stages quantize its own denoiser as well."""

from __future__ import annotations

import json
import re

import diffusers_pipelines as tiny
import pytest
import torch
from conftest import Qncd, tiny_config
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from qncd_cli.errors import ModelError
from qncd_cli.models.control import ControlImages
from qncd_cli.models.loading import load_model
from qncd_cli.models.text import Prompts
from qncd_cli.runtime.denoiser import full_denoiser, guided_predict
from qncd_cli.sampling.noise import generators_for
from qncd_cli.sampling.samplers import denoise, make_scheduler

SEEDS, STEPS, GUIDANCE = [4, 5, 6], 3, 2.5
TEXTS = ("a red shoe", "a blue bag")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    draws = torch.Generator().manual_seed(0)
    for number, sides in enumerate(((16, 16), (16, 16), (32, 16))):
        small = torch.randint(0, 256, (4, 4, 3), generator=draws, dtype=torch.uint8)
        Image.fromarray(small.numpy()).resize(sides).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            made[name] = tiny.save(name, tmp_path_factory.mktemp("pipeline") / "model")
        return made[name]

    return of


def loaded(folder, files, scale=1.0, numbers=(0, 1)):
    control = ControlImages(tuple(str(files / f"{n}.png") for n in numbers), scale)
    return load_model(str(folder), prompts=Prompts(TEXTS, control=control))


def drawn(model):
    labels = model.labels(SEEDS, "all")
    scheduler = make_scheduler("ddim", model.scheduler_config)
    predict = guided_predict(model, full_denoiser(model), labels, GUIDANCE)
    with torch.no_grad():
        return denoise(predict, scheduler, STEPS, generators_for(SEEDS), model.latent_shape)


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("name", tiny.CONTROL)
def test_own_samples_are_those_of_the_pipeline(folder, files, name, scale):
    model = loaded(folder(name), files, scale)
    pipeline = DiffusionPipeline.from_pretrained(folder(name))
    pipeline.set_progress_bar_config(disable=True)
    noise = [torch.randn((1, *model.latent_shape), generator=g) for g in generators_for(SEEDS)]
    images = [Image.open(files / f"{seed % 2}.png") for seed in SEEDS]
    expected = pipeline(
        [TEXTS[seed % 2] for seed in SEEDS],
        image=images,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        controlnet_conditioning_scale=scale,
        latents=torch.cat(noise),
        output_type="latent",
    ).images
    found = drawn(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    other = loaded(folder(name), files, scale, (1, 0))
    assert not torch.allclose(drawn(other), found, rtol=1e-2)


@pytest.mark.parametrize("name", tiny.CONTROL)
def test_four_stages(folder, files, name, tmp_path):
    work = Qncd(tmp_path)
    work.write_config(
        tiny_config(
            folder(name),
            sampling__prompts=list(TEXTS),
            sampling__control=str(files / "0.png"),
            sampling__steps=2,
            calibration={"trajectories": 2, "batch_size": 2, "noise_trajectories": 1},
        )
    )
    plan = work("run", "--config", "tiny.yaml", "--plan", "--json").data
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    work("sample", "--num", "2")
    run = tmp_path / "runs" / "tiny"
    coverage = json.loads((run / "coverage.json").read_text())
    share = coverage["integer_macs_share"]
    assert share > 0.9
    assert plan["coverage"]["integer_macs_share"] == pytest.approx(share, abs=0.01)
    own = [row for row in coverage["layers"] if row["name"].startswith("controlnet.")]
    integers = sum(row["macs"] for row in own if not row["why_not_integer"])
    assert integers > 0.9 * sum(row["macs"] for row in own) > 0
    stored = load_file(run / "quantized.safetensors")
    assert any(key.startswith("controlnet.") or ".controlnet." in key for key in stored)
    if "XL" in name:
        return
    work("sample", "--num", "2", "--control", files / "1.png", "--name", "other")
    images = [(run / "samples" / s / "000000.png").read_bytes() for s in ("quantized", "other")]
    assert images[0] != images[1]
    for to, place in (("diffusers", "out"), ("comfyui", "out.safetensors"), ("onnx", "graph")):
        refused = work("export", "--to", to, place, ok=False)
        assert refused.exit_code == 5 and "ControlNet" in refused.stderr, refused.stderr
        assert not (tmp_path / place).exists()
    refused = work("bench", "--config", "tiny.yaml", ok=False)
    assert refused.exit_code == 5 and "ControlNet" in refused.stderr, refused.stderr


def test_what_does_not_fit_is_one_line(folder, files, tmp_path):
    name = "StableDiffusionControlNetPipeline"
    with pytest.raises(ModelError, match=r"2.png: 32 x 16 pixels, of another shape than the 16"):
        loaded(folder(name), files, numbers=(2,))
    with pytest.raises(ModelError, match="is steered by images.*set sampling.control"):
        load_model(str(folder(name)), prompts=Prompts(TEXTS))
    with pytest.raises(ModelError, match="has no ControlNet.*leave sampling.control out"):
        loaded(folder("StableDiffusionPipeline"), files)
    work = Qncd(tmp_path)
    for changes, said in (
        ({"sampling__control": "no.png"}, "sampling.control: no file or folder no.png"),
        ({"sampling__control_scale": 0.5}, "control_scale belongs to control"),
        ({"sampling__control": str(files), "sampling__reuse": 0.5}, "sampling.reuse: null"),
    ):
        tree = tiny_config(folder(name), sampling__prompts=list(TEXTS), **changes)
        tree["correction"]["inter"]["method"] = "none"
        work.write_config(tree)
        refused = work("calibrate", "--config", "tiny.yaml", ok=False)
        assert refused.exit_code == 3 and said in refused.stderr, refused.stderr


def test_several_controlnets_are_refused(folder, files, tmp_path):
    from diffusers import MultiControlNetModel

    name = "StableDiffusionControlNetPipeline"
    pipeline = DiffusionPipeline.from_pretrained(folder(name))
    several = MultiControlNetModel([pipeline.controlnet, pipeline.controlnet])
    parts = {n: part for n, part in pipeline.components.items() if n != "controlnet"}
    type(pipeline)(**parts, controlnet=several, requires_safety_checker=False).save_pretrained(
        tmp_path / "several"
    )
    with pytest.raises(ModelError) as error:
        loaded(tmp_path / "several", files)
    assert re.search("MultiControlNetModel|controlnet", str(error.value))


def test_an_ip_adapter_is_refused(folder, tmp_path):
    """One that was saved with the pipeline it was loaded into."""
    pipeline = DiffusionPipeline.from_pretrained(folder("StableDiffusionPipeline"))
    adapter = tmp_path / "adapter.safetensors"
    save_ip_adapter(pipeline.unet, adapter)
    pipeline.load_ip_adapter(
        str(tmp_path), subfolder="", weight_name=adapter.name, image_encoder_folder=None
    )
    assert isinstance(pipeline, StableDiffusionPipeline)
    pipeline.save_pretrained(tmp_path / "saved")
    with pytest.raises(ModelError) as error:
        load_model(str(tmp_path / "saved"), prompts=Prompts(TEXTS))
    assert "IP-Adapter" in str(error.value)
    assert "\n" not in str(error.value)


def save_ip_adapter(unet, path):
    """A tiny one in the names of published files (h94/IP-Adapter)."""
    from safetensors.torch import save_file

    width = unet.config.cross_attention_dim
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * width, 12),
        "image_proj.proj.bias": torch.randn(4 * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    number = 1
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            for part in ("k", "v"):
                key = f"ip_adapter.{number}.to_{part}_ip.weight"
                tensors[key] = torch.randn(module.inner_dim, width)
            number += 2
    save_file(tensors, path)
