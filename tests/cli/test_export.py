"""An exported folder is loaded by diffusers in a process of its own and draws the same images."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import diffusers_pipelines as tiny
import numpy as np
import pytest
import torch
from conftest import Qncd, tiny_config
from PIL import Image
from safetensors import safe_open

SEEDS = [0, 1, 2]
DRAW = """
import json, sys, torch
from pathlib import Path
from diffusers import DiffusionPipeline
import qncd_cli.exported
from qncd_cli.sampling.noise import generators_for

for work, arguments in json.load(sys.stdin).items():
    pipeline = DiffusionPipeline.from_pretrained(work + "/out")
    pipeline.set_progress_bar_config(disable=True)
    generator = generators_for([0, 1, 2])
    images = pipeline(**arguments, generator=generator, output_type="np").images
    torch.save(torch.from_numpy(images), work + "/images.pt")
    pipeline.save_pretrained(work + "/again")
"""
PROMPTS = ["a red shoe", "a blue bag", "a bag"]
FLOWS = ["StableDiffusion3Pipeline", "FluxPipeline, dev"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, tiny_model, tiny_pixel_model, tiny_dit_model):
    """Folders by model, each exported to `out`; what one other process drew with diffusers is in
    images.pt, the pipeline that it saved again in `again`. Do not change."""
    base = tmp_path_factory.mktemp("drawn")
    common = {"guidance_scale": 2.0, "num_inference_steps": 4}
    found, jobs = {}, {}
    for name, model in [("unet", tiny_model), ("pixel", tiny_pixel_model), ("dit", tiny_dit_model)]:
        found[name] = exported(base / name, tiny_config(model, **EVERYTHING))
        jobs[str(base / name)] = {**common, "class_labels": SEEDS}
    for name in ["StableDiffusionPipeline", *FLOWS]:
        folder = tiny.save(name, base / name / "model")
        changes = {**EVERYTHING, "sampling__prompts": PROMPTS, "sampling__guidance_scale": 2.0}
        options = {**common, "prompt": PROMPTS}
        if name in FLOWS:
            changes |= {"sampling__scheduler": "flow-euler", "sampling__image_size": 16}
            options |= {"height": 16, "width": 16}
        found[name] = exported(base / name, tiny_config(folder, **changes))
        jobs[str(base / name)] = options
    done = subprocess.run(
        [sys.executable, "-c", DRAW],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr
    assert "not used" not in done.stderr
    return found


def levels_of(work):
    """What diffusers drew, [N, H, W, C] in units of a pixel's levels."""
    return (torch.load(work.folder / "images.pt") * 255).round()


def exported(folder, config):
    """The command line in the folder, where the model of the configuration is exported to out."""
    folder.mkdir(exist_ok=True)
    work = Qncd(folder)
    work.write_config(config)
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    work("sample", "--num", str(len(SEEDS)))
    said = work("export", "--to", "diffusers", "out", "--json").data
    assert said["folder"] == "out"
    return work


@pytest.fixture(scope="module")
def everything(drawn):
    """The tiny model with EVERYTHING, exported to out. Do not change."""
    return drawn["unet"]


@pytest.fixture
def own(everything, tmp_path):
    """A copy of our own."""
    return Qncd(shutil.copytree(everything.folder, tmp_path / "own"))


def images_of(work):
    folder = work.folder / "runs" / "tiny" / "samples" / "quantized"
    found = [np.atleast_3d(np.array(Image.open(folder / f"{seed:06d}.png"))) for seed in SEEDS]
    return torch.from_numpy(np.stack(found))


def tensors_of(folder, part):
    files = sorted((folder / part).glob("*.safetensors"))
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found["metadata"] = file.metadata()["qncd"]
    return found


# best's ranges for every step, bias corrections, smoothing and two-byte inputs: all that there is
EVERYTHING = {
    "calibration": {"trajectories": 2, "batch_size": 2, "noise_trajectories": 1},
    "quantization__activations": {"bits": 8, "observer": "minmax", "timestep_groups": 4},
    "quantization__bias_correction": True,
    "quantization__first_last_activation_bits": 16,
    "correction__inter__method": "none",
}


def run_as_printed(lines, folder):
    """In a process of its own; the size of the image that comes out."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, "print(*image.size)"])],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_lines_that_export_prints_load_the_folder(tmp_path, tiny_model):
    work = exported(tmp_path, tiny_config(tiny_model, sampling__classes=[3, 1]))
    said = work("export", "--to", "diffusers", "out", "--force").stdout
    lines = [line.strip() for line in said.splitlines() if line.startswith("  ")]
    assert lines[:3] == [
        "import qncd_cli.exported",
        "from diffusers import DiffusionPipeline",
        "pipeline = DiffusionPipeline.from_pretrained('out')",
    ]
    assert "class_labels=[3], num_inference_steps=4, guidance_scale=2.0" in lines[3]
    assert run_as_printed(lines, tmp_path) == ["16", "16"]
    readme = (tmp_path / "out" / "README.md").read_text()
    assert readme.startswith("---\n") and f"\n# {tiny_model}, W4A8\n" in readme
    assert "\n".join(lines) in readme and "correction `ptqd`" in readme


def test_the_lines_of_a_text_model_name_a_prompt_with_its_quotes(tmp_path):
    folder = tiny.save("StableDiffusionPipeline", tmp_path / "model")
    changes = {**EVERYTHING, "sampling__prompts": ['a "red" shoe\'s lace']}
    work = exported(tmp_path, tiny_config(folder, **changes))
    said = work("export", "--to", "diffusers", "out", "--force", "--json").data
    assert 'a \\"red' not in said["python"][3] and "prompt=" in said["python"][3]
    assert run_as_printed(said["python"], tmp_path)
    assert "correction" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("model", ["unet", "pixel", "dit"])
def test_a_fresh_process_draws_the_same_images_and_saves_the_same_file(drawn, model):
    work = drawn[model]
    assert torch.equal(levels_of(work).to(torch.uint8), images_of(work))
    part = "transformer" if model == "dit" else "unet"
    before, after = (tensors_of(work.folder / name, part) for name in ("out", "again"))
    assert before.keys() == after.keys()
    assert before.pop("metadata") == after.pop("metadata")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", *FLOWS])
def test_models_that_read_prompts_are_exported(drawn, name):
    """FLUX is told the timestep in units of its own; its group of timesteps is found."""
    difference = levels_of(drawn[name]) - images_of(drawn[name])
    assert difference.abs().max() <= 1


def test_a_scale_survives_half_precision(everything):
    from diffusers import DiffusionPipeline

    import qncd_cli.exported  # noqa: F401

    folder = everything.folder / "out"
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    layer = pipeline.unet.conv_out
    exact = tensors_of(folder, "unet")["qncd.conv_out.weight_scale"]
    assert torch.equal(layer.weight_scale, exact)
    assert pipeline.unet.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="quantized model"):
        pipeline.to(torch.float16)


def test_what_is_wrong_is_one_line(own, tiny_model, tiny_pixel_model):
    assert "is there already" in own("export", "--to", "diffusers", "out", ok=False).stderr
    own("export", "--to", "diffusers", "out", "--force")
    config = own.folder / "runs" / "tiny" / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_model), str(tiny_pixel_model)))
    other = own("export", "--to", "diffusers", "new", ok=False)
    assert other.exit_code == 4
    assert not (own.folder / "new").exists()


def test_a_damaged_folder_is_refused(own):
    from diffusers import DiffusionPipeline

    import qncd_cli.exported  # noqa: F401
    from qncd_cli.errors import ArtifactError

    path = next((own.folder / "out" / "unet").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start = 8 + length + header["qncd.conv_in.weight_scale"]["data_offsets"][0]
    content[start] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        DiffusionPipeline.from_pretrained(own.folder / "out")
