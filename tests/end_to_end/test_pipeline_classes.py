"""Every pipeline class of diffusers that is supported: its own samples, and the four stages."""

from __future__ import annotations

import json

import diffusers_pipelines as tiny
import pytest
import torch
from conftest import Qncd, tiny_config
from diffusers import DiffusionPipeline

from qncd_cli.models.loading import load_model
from qncd_cli.models.text import Prompts
from qncd_cli.sampling.noise import generators_for
from qncd_cli.sampling.samplers import denoise, make_scheduler
from qncd_cli.stages.assemble import full_denoiser, guided_predict

SEEDS, STEPS, GUIDANCE = [4, 5, 6], 3, 2.5
TEXTS = ("a red shoe", "a blue bag")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            made[name] = tiny.save(name, tmp_path_factory.mktemp("pipeline") / "model")
        return made[name]

    return of


def drawn(model, guidance):
    """Latents of SEEDS as qncd samples them at full precision."""
    labels = model.labels(SEEDS, "all")
    scheduler = make_scheduler("ddim", model.scheduler_config)
    predict = guided_predict(model, full_denoiser(model), labels, guidance)
    with torch.no_grad():
        return denoise(predict, scheduler, STEPS, generators_for(SEEDS), model.latent_shape)


def noise(model):
    shape = (1, *model.latent_shape)
    return torch.cat([torch.randn(shape, generator=g) for g in generators_for(SEEDS)])


@pytest.mark.parametrize("negative", ["", "red"])
@pytest.mark.parametrize("name", tiny.TEXT)
def test_a_text_model_is_sampled_as_its_own_pipeline_does(folder, name, negative):
    model = load_model(str(folder(name)), prompts=Prompts(TEXTS, negative))
    pipeline = DiffusionPipeline.from_pretrained(folder(name))
    pipeline.set_progress_bar_config(disable=True)
    texts = [TEXTS[seed % 2] for seed in SEEDS]
    options = {"negative_prompt": [negative] * len(SEEDS)} if negative else {}
    if name.startswith("PixArt"):
        options["use_resolution_binning"] = False  # it knows the published sizes only
    expected = pipeline(
        texts,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=noise(model),
        output_type="latent",
        **options,
    ).images
    found = drawn(model, GUIDANCE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        decoded = pipeline.vae.decode(found / pipeline.vae.config.scaling_factor).sample
    images = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    difference = model.decode(found).int() - images.int()
    assert difference.abs().max() <= 1  # large images are decoded one by one
    other = load_model(str(folder(name)), prompts=Prompts(TEXTS, "bag"))
    assert not torch.equal(drawn(other, GUIDANCE), found)
    assert other.digest == model.digest


def test_dit_is_sampled_as_its_own_pipeline_does(folder):
    model = load_model(str(folder("DiTPipeline")))
    assert model.num_classes == 1000
    pipeline = DiffusionPipeline.from_pretrained(folder("DiTPipeline"))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        SEEDS,
        guidance_scale=GUIDANCE,
        generator=generators_for(SEEDS),
        num_inference_steps=STEPS,
        output_type="np",
    ).images
    images = model.decode(drawn(model, GUIDANCE)).permute(0, 2, 3, 1).numpy() / 255
    assert abs(images - expected).max() < 0.51 / 255 + 1e-4


STAGED = [*tiny.TEXT, *tiny.CLASSES, *tiny.UNCONDITIONAL]
STAGED.remove("PixArtAlphaPipeline")  # 4,096 tokens; Sigma has the same transformer


@pytest.mark.parametrize("name", STAGED)
def test_four_stages(folder, name, tmp_path):
    guided = name not in tiny.UNCONDITIONAL
    changes = {"sampling__steps": 2, "sampling__guidance_scale": 2.0 if guided else 1.0}
    if name in tiny.TEXT:
        (tmp_path / "prompts.txt").write_text("a red shoe\n\n  a blue bag \n")
        changes["sampling__prompts"] = "prompts.txt"
    work = Qncd(tmp_path)
    work.write_config(tiny_config(folder(name), **changes))
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    sampled = work("sample", "--num", "3")
    run = tmp_path / "runs" / "tiny"
    assert len(list((run / "samples/quantized").glob("*.png"))) == 3
    manifest = json.loads((run / "samples/quantized/manifest.json").read_text())
    if name in tiny.TEXT:
        assert manifest["sampling"]["prompts"] == ["a red shoe", "a blue bag"]
        assert manifest["classes"] == [0, 1, 0]
        work("sample", "--num", "2", "--prompt", "a red bag", "--name", "other")
        text = (run / "samples/other/manifest.json").read_text()
        assert json.loads(text)["sampling"]["prompts"] == ["a red bag"]
    coverage = json.loads((run / "coverage.json").read_text())
    assert coverage["integer_macs_share"] > 0.9, sampled.stderr


def test_prompts_belong_to_text_models_and_files_are_found(folder, tmp_path, tiny_model):
    work = Qncd(tmp_path)
    work.write_config(tiny_config(folder("StableDiffusionPipeline")))
    refused = work("calibrate", "--config", "tiny.yaml", ok=False)
    assert refused.exit_code == 5
    assert "set sampling.prompts" in refused.stderr
    missing = work(
        "calibrate", "--config", "tiny.yaml", "--set", "sampling.prompts=no.txt", ok=False
    )
    assert missing.exit_code == 3
    assert "no.txt" in missing.stderr
    work.write_config(tiny_config(tiny_model, sampling__prompts=["a bag"]))
    refused = work("calibrate", "--config", "tiny.yaml", ok=False)
    assert refused.exit_code == 5
    assert "takes no prompts" in refused.stderr


def test_without_transformers_it_says_what_to_install(folder, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "transformers" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    work = Qncd(tmp_path)
    changes = {"sampling__prompts": ["a bag"]}
    work.write_config(tiny_config(folder("StableDiffusionPipeline"), **changes))
    refused = work("calibrate", "--config", "tiny.yaml", ok=False)
    assert refused.exit_code == 5
    assert "pip install transformers" in refused.stderr
