"""Single files on the command line: init, plan, four stages, convert, export."""

from __future__ import annotations

import diffusers_pipelines as tiny
import pytest
import single_files
import torch
import yaml
from conftest import Qncd, tiny_config
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from qncd_cli.models.loading import load_model
from qncd_cli.models.text import Prompts
from qncd_cli.runtime.denoiser import full_denoiser, guided_predict
from qncd_cli.sampling.noise import generators_for
from qncd_cli.sampling.samplers import denoise, make_scheduler

SEEDS, STEPS, GUIDANCE = [4, 5, 6], 3, 2.5
TEXTS = ("a red shoe", "a blue bag")
FILES = {
    "StableDiffusionPipeline": ("sd1", "m.ckpt", None),
    "StableDiffusionXLPipeline": ("sdxl", "m.safetensors", torch.float16),
    "FluxPipeline, dev": ("flux", "m.safetensors", torch.float8_e4m3fn),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name -> the file, its base without weights, and the folder that both were made from."""
    found = {}

    def of(name):
        if name not in found:
            kind, file, dtype = FILES[name]
            room = tmp_path_factory.mktemp("files")
            folder = tiny.save(name, room / "model")
            tensors = single_files.tensors_of(folder, kind)
            if dtype is not None:
                tensors = {n: t.to(dtype) for n, t in tensors.items()}
            base = single_files.bare(folder, room / "base")
            found[name] = single_files.write(tensors, room / file), base, folder
        return found[name]

    return of


def drawn(model):
    labels = model.labels(SEEDS, "all")
    scheduler = make_scheduler("ddim", model.scheduler_config)
    predict = guided_predict(model, full_denoiser(model), labels, GUIDANCE)
    with torch.no_grad():
        return denoise(predict, scheduler, STEPS, generators_for(SEEDS), model.latent_shape)


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionXLPipeline])
def test_own_samples_are_those_of_diffusers_from_single_file(made, kind):
    path, base, _ = made(kind.__name__)
    model = load_model(str(path), base=str(base), prompts=Prompts(TEXTS))
    pipeline = kind.from_single_file(str(path), config=str(base), local_files_only=True)
    pipeline.to(torch.float32).set_progress_bar_config(disable=True)
    shape = (1, *model.latent_shape)
    noise = torch.cat([torch.randn(shape, generator=g) for g in generators_for(SEEDS)])
    expected = pipeline(
        [TEXTS[seed % 2] for seed in SEEDS],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=noise,
        output_type="latent",
    ).images
    torch.testing.assert_close(drawn(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_four_stages(made, name, tmp_path):
    path, base, _ = made(name)
    work = Qncd(tmp_path)
    tree = tiny_config(
        path,
        model__base=str(base),
        sampling__prompts=list(TEXTS),
        sampling__steps=2,
        calibration={"trajectories": 2, "batch_size": 2, "noise_trajectories": 1},
    )
    if name.startswith("Flux"):
        tree["sampling"] |= {"scheduler": "flow-euler", "image_size": 16}
    work.write_config(tree)
    plan = work("run", "--config", "tiny.yaml", "--plan", "--json").data
    work("calibrate", "--config", "tiny.yaml", "--run-dir", "run")
    work("quantize", "--run-dir", "run")
    work("sample", "--run-dir", "run", "--num", "2")
    found = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert found["model"]["base"] == str(base)
    share = yaml.safe_load((tmp_path / "run" / "coverage.json").read_text())["integer_macs_share"]
    assert share > 0.9
    assert plan["coverage"]["integer_macs_share"] == pytest.approx(share, abs=0.02)
    again = work("calibrate", "--config", "tiny.yaml", "--run-dir", "run")
    assert "unchanged, skipped" in again.stdout


def test_init_convert_and_export_take_a_file(made, tmp_path):
    path, base, folder = made("StableDiffusionPipeline")
    work = Qncd(tmp_path)
    config = work("init", str(path), "--base", str(base), "--json").data["config"]
    assert config["model"] | {"dtype": ""} == {"source": str(path), "base": str(base), "dtype": ""}
    refused = work("init", str(path), ok=False)
    assert refused.exit_code == 5 and "--base" in refused.stderr
    said = work("convert", str(path), "--base", str(base), "--out", "folder", "--json").data
    assert said["pipeline"] == "StableDiffusionPipeline"
    found = DiffusionPipeline.from_pretrained(tmp_path / "folder")
    expected = DiffusionPipeline.from_pretrained(folder)
    for part in ("unet", "vae", "text_encoder"):
        state = getattr(found, part).state_dict()
        for name, tensor in getattr(expected, part).state_dict().items():
            assert torch.equal(state[name], tensor)
    refused = work("convert", str(path), "--out", "other", ok=False)
    assert refused.exit_code == 5 and "--base" in refused.stderr
    tree = tiny_config(path, model__base=str(base), sampling__prompts=list(TEXTS))
    tree["sampling"]["steps"] = 2
    tree["calibration"] = {"trajectories": 2, "batch_size": 2, "noise_trajectories": 1}
    work.write_config(tree)
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    work("export", "--to", "diffusers", "exported")
    assert (tmp_path / "exported" / "model_index.json").is_file()
    tree["model"]["compvis_config"] = "v1.yaml"
    work.write_config(tree)
    refused = work("calibrate", "--config", "tiny.yaml", ok=False)
    assert refused.exit_code == 3 and "give one of them" in refused.stderr
