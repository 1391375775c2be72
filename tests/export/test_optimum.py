"""qncd export --to optimum-onnx and --to optimum-openvino draw the run's own images."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys

import diffusers_pipelines as tiny
import numpy as np
import optimum_folder
import pytest
import torch
from conftest import Qncd, tiny_config
from PIL import Image

from qncd_cli.cli.export import opened
from qncd_cli.errors import ModelError
from qncd_cli.export import optimum
from qncd_cli.progress import no_progress
from qncd_cli.runtime.denoiser import quantized_denoiser
from qncd_cli.sampling.noise import generators_for
from qncd_cli.store.run_dir import RunDir

SEEDS = [0, 1, 2]
PROMPTS = ["red", "a", "bag"]
FORMATS = ["optimum-onnx", "optimum-openvino"]
FLOWS = ["StableDiffusion3Pipeline", "FluxPipeline, dev"]
OTHERS = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", *FLOWS]
OTHERS += ["LatentConsistencyModelPipeline"]
CHANGES = {
    "calibration": {"trajectories": 2, "batch_size": 2, "noise_trajectories": 1},
    "quantization__activations": {"bits": 8, "observer": "minmax", "timestep_groups": 4},
    "quantization__weights": {"bits": 8, "rounding": "nearest"},
    "quantization__first_last_activation_bits": 16,
    "correction__intra": "none",
    "correction__inter__method": "none",
    "sampling__prompts": PROMPTS,
    "sampling__guidance_scale": 2.0,
}
CALL = {"prompt": PROMPTS, "num_inference_steps": 4, "guidance_scale": 2.0}
INTERPRETERS = [
    sys.executable,
    *filter(None, os.environ.get("QNCD_OPTIMUM_PYTHON", "").split(os.pathsep)),
]
"""Optimum needs older libraries than this package; environments that have it may be named."""
LOADERS = {"optimum-onnx": "optimum.onnxruntime", "optimum-openvino": "optimum.intel"}
DRAW = """
import json, sys, numpy, torch
module, call = sys.argv[1], json.loads(sys.argv[2])
if module == "optimum.intel":
    from optimum.intel import OVDiffusionPipeline as Pipeline
    more = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
else:
    from optimum.onnxruntime import ORTDiffusionPipeline as Pipeline
    more = {}
pipeline = Pipeline.from_pretrained("out", **more)
noise = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2)]
numpy.save("drawn.npy", pipeline(**call, generator=noise, output_type="np").images)
"""


def quantized_in(folder, name, **changes) -> Qncd:
    work = Qncd(folder)
    model = tiny.save(name, folder / "model")
    (model / "LICENSE").write_text("a licence")
    (model / "README.md").write_text("---\nlicense: openrail\n---\ntext\n")
    work.write_config(tiny_config(model, **{**CHANGES, **changes}))
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    work("sample", "--num", str(len(SEEDS)))
    return work


def own_images(work) -> np.ndarray:
    folder = work.folder / "runs" / "tiny" / "samples" / "quantized"
    return np.stack([np.array(Image.open(folder / f"{seed:06d}.png")) for seed in SEEDS])


def psnr(work, images) -> float:
    """Of images in [0, 1] to the run's own."""
    error = (np.round(255.0 * images) - own_images(work)).astype(np.float64)
    return 10 * math.log10(255**2 / max((error**2).mean(), 1e-9))


def drawn(work, folder, **more) -> np.ndarray:
    pipeline = optimum_folder.load(work.folder / folder)
    arguments = {**CALL, "generator": generators_for(SEEDS), "output_type": "np", **more}
    return pipeline(**arguments).images


@pytest.fixture(scope="module")
def stable(tmp_path_factory) -> Qncd:
    """Stable Diffusion, quantized. Do not change but by exported_to."""
    return quantized_in(tmp_path_factory.mktemp("stable"), "StableDiffusionPipeline")


def exported_to(work, form):
    """The folder of a format, exported where that has not been done."""
    if not (work.folder / form).is_dir():
        work("export", "--to", form, form, "--samples", "1")
    return work.folder / form


EACH_FORMAT = pytest.mark.parametrize(
    "form", [FORMATS[0], pytest.param(FORMATS[1], marks=pytest.mark.slow)]
)


@EACH_FORMAT
def test_a_folder_draws_the_runs_own_images(stable, form):
    exported_to(stable, form)
    assert psnr(stable, drawn(stable, form)) > 50


@EACH_FORMAT
def test_the_denoiser_takes_other_sizes_and_numbers(stable, form):
    config, model, quantized = opened(RunDir(stable.folder / "runs" / "tiny"))
    simulated = quantized_denoiser(model, quantized, "simulate", True)
    unet = optimum_folder.UNet(exported_to(stable, form) / "unet")
    for rows, height, width, tokens in ((1, 12, 6, 9), (5, 4, 22, 4)):
        x = torch.randn(rows, 4, height, width, generator=generators_for([rows])[0])
        text = torch.linspace(-1, 1, rows * tokens * 16).reshape(rows, tokens, 16)
        for t in (951.0, 3.0):
            expected = simulated(x, t, {"encoder_hidden_states": text})
            (found,) = unet(x, torch.tensor(t), encoder_hidden_states=text)
            assert ((found - expected).abs().max() / expected.abs().max()) < 0.05


@EACH_FORMAT
def test_what_is_in_a_folder(stable, form):
    folder, file = exported_to(stable, form), optimum_folder.FILES[FORMATS.index(form)]
    said = json.loads((folder / "graph.json").read_text())
    assert said["file"] == f"unet/{file}"
    assert said["products"]["integer_here"] == said["products"]["to_be_integer"] > 70
    assert said["inputs"]["sample"]["shape"] == ["batch", 4, "2*height", "2*width"]
    assert said["agreement"]["relative_difference"] < 0.05
    parts = {"text_encoder", "vae_decoder", "vae_encoder"}
    assert said["float_parts"].keys() == parts
    assert max(said["float_parts"].values()) < 1e-5
    assert all((folder / part / file).is_file() for part in (*parts, "unet"))
    readme = (folder / "README.md").read_text()
    assert 'license: "openrail"' in readme and "without qncd-cli" in readme
    assert f"from {LOADERS[form]} import " in readme
    assert (folder / "LICENSE").read_text() == "a licence"
    assert not [path for path in folder.rglob("*") if path.suffix == ".safetensors"]


def test_a_tokenizer_is_read_from_its_two_files_alone(stable):
    from transformers import CLIPTokenizer

    place = exported_to(stable, FORMATS[0]) / "tokenizer"
    whole = CLIPTokenizer.from_pretrained(place)
    alone = CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"), model_max_length=9)
    for text in (*PROMPTS, "a red shoe's lace"):
        options = {"padding": "max_length", "truncation": True, "max_length": 9}
        assert whole(text, **options).input_ids == alone(text, **options).input_ids


def test_what_is_wrong_leaves_nothing_behind(stable, monkeypatch):
    exported_to(stable, FORMATS[0])
    before = sorted(stable.folder.iterdir())
    there = stable("export", "--to", FORMATS[0], FORMATS[0], ok=False)
    assert there.exit_code == 4 and "is there already" in there.stderr
    options = "--to", FORMATS[0], "new", "--samples", "1"
    monkeypatch.setattr(optimum, "FLOAT_BOUND", 0.0)
    part = stable("export", *options, ok=False)
    assert part.exit_code == 4 and "text_encoder differs from the model's" in part.stderr
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    missing = stable("export", *options, ok=False)
    assert missing.exit_code == 6 and "pip install onnx onnxscript onnxruntime" in missing.stderr
    assert sorted(stable.folder.iterdir()) == before


def test_a_pipeline_that_optimum_lacks_is_refused_in_one_line(sampled, tmp_path):
    work = Qncd(shutil.copytree(sampled, tmp_path / "work"))
    refused = work("export", "--to", "optimum-onnx", "new", ok=False)
    assert refused.exit_code == 5
    assert "Optimum has no pipeline for ClassConditionalLDMPipeline" in refused.stderr
    assert not (work.folder / "new").exists()


def test_a_first_stage_that_optimum_does_not_know_is_refused_in_one_line(tmp_path):
    from diffusers import AutoencoderTiny, DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(tiny.save("StableDiffusionPipeline", tmp_path))
    pipeline.register_modules(vae=AutoencoderTiny())
    with pytest.raises(ModelError, match="the pipeline's vae is of the class AutoencoderTiny"):
        optimum.write_rest(pipeline, pipeline.scheduler, None, FORMATS[0], tmp_path, no_progress)


def interpreter_for(module: str) -> str:
    """A Python that has it; skips where none does."""
    look = "import importlib, sys; importlib.import_module(sys.argv[1])"
    for python in INTERPRETERS:
        command = [python, "-c", look, module]
        if subprocess.run(command, capture_output=True, env=_plain(), check=False).returncode == 0:
            return python
    pytest.skip(f"no {module} here, nor in QNCD_OPTIMUM_PYTHON")


def _plain() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", OTHERS)
def test_optimum_itself_draws_the_runs_own_images(tmp_path, name, form):
    """Prints the PSNR, for docs/notebook."""
    python = interpreter_for(LOADERS[form])
    changes, call = {}, dict(CALL)
    if name in FLOWS:
        changes = {"sampling__scheduler": "flow-euler", "sampling__image_size": 16}
        call |= {"height": 16, "width": 16}
    elif name.startswith("Latent"):
        changes = {"sampling__scheduler": "lcm"}
    work = quantized_in(tmp_path, name, **changes)
    work("export", "--to", form, "out", "--samples", "1")
    command = [python, "-c", DRAW, LOADERS[form], json.dumps(call)]
    options = {"capture_output": True, "text": True, "env": _plain(), "cwd": tmp_path}
    done = subprocess.run(command, **options, check=False)
    assert done.returncode == 0, done.stderr
    found = psnr(work, np.load(tmp_path / "drawn.npy"))
    print(f"| {name} | {form} | {found:.1f} |")
    assert found > 50
