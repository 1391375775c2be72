"""Models without weights: the same sizes, layers, MACs and arguments as the models themselves."""

from __future__ import annotations

import copy
import json

import diffusers_pipelines
import pytest
import torch
import yaml
from full_size_ldm4 import CIN256_V2

from qncd_cli.config.loading import parse_config
from qncd_cli.errors import ModelError
from qncd_cli.forecast.shapes import model_shapes
from qncd_cli.models.loading import load_model
from qncd_cli.models.text import Prompts
from qncd_cli.models.topology import count_macs
from qncd_cli.models.zoo import zoo_models
from qncd_cli.runtime.denoiser import denoiser_costs

READ_TEXT = {**diffusers_pipelines.TEXT, **diffusers_pipelines.FLUX}
TINY = {
    **READ_TEXT,
    **diffusers_pipelines.CLASSES,
    **diffusers_pipelines.UNCONDITIONAL,
}


def shapes_of(source, **options):
    found = model_shapes(str(source), torch.float32, **options)
    for module in (found.denoiser, found.first_stage):
        assert module is None or all(p.is_meta for p in module.parameters())
    return found


def costs(shapes):
    with torch.no_grad():
        return count_macs(shapes.denoiser, lambda: shapes.call(1))


def same(shapes, model) -> None:
    config = parse_config({"model": {"source": model.source}}, "test")
    assert costs(shapes) == denoiser_costs(config, model)
    assert shapes.latent_shape == model.latent_shape
    assert shapes.guided == (model.null_condition is not None)
    scales = (0.0, 0.5, 1.0, 2.0)
    assert [shapes.guides(s) for s in scales] == [model.guides(s) for s in scales]
    assert shapes.classes == (model.num_classes or 0)
    with torch.no_grad():
        image = model.decode(torch.zeros(1, *model.latent_shape))[0]
    assert shapes.image_shape == image.shape
    assert 4 * shapes.parts[_denoiser_part(shapes)].parameters == model.denoiser_bytes()


def _denoiser_part(shapes) -> str:
    return next(name for name in ("unet", "transformer") if name in shapes.parts)


@pytest.mark.parametrize("name", zoo_models())
def test_packaged_models(name):
    same(shapes_of(f"zoo:{name}"), load_model(f"zoo:{name}"))


@pytest.mark.parametrize("name", TINY)
def test_folders_of_every_pipeline_class(name, tmp_path):
    folder = diffusers_pipelines.save(name, tmp_path / "model")
    prompts, size = None, None
    if name in READ_TEXT:  # FLUX and PixArt-alpha have thousands of tokens at their own size
        size = 16
        prompts = Prompts(("a red shoe", "a blue bag"), image_size=size)
    shapes = shapes_of(folder, prompts=2, image_size=size)
    same(shapes, load_model(str(folder), prompts=prompts))
    encoders = [part for part in shapes.parts.values() if not part.stays]
    assert bool(encoders) == (prompts is not None)
    assert all(part.stored > 4 * part.parameters > 0 for part in encoders)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_a_folder_of_an_early_version_is_corrected_as_on_loading(scheduler, tmp_path):
    """Its scheduler's offset and clipping, and the size of its images."""
    folder = diffusers_pipelines.save("StableDiffusionPipeline", tmp_path / "model")
    old = {"_class_name": scheduler, "_diffusers_version": "0.2.0", "clip_sample": True}
    changed = {
        "model_index.json": {"scheduler": ["diffusers", scheduler]},
        "scheduler/scheduler_config.json": {**old, "steps_offset": 0},
        "unet/config.json": {"_diffusers_version": "0.2.0"},
    }
    for name, more in changed.items():
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**tree, **more}))
    shapes = shapes_of(folder, prompts=1)
    with pytest.warns(FutureWarning):
        model = load_model(str(folder), prompts=Prompts(("a red",)))
    assert shapes.latent_shape == model.latent_shape == (4, 64, 64)
    assert shapes.scheduler == model.scheduler_config
    assert shapes.scheduler["steps_offset"] == 1


def test_a_checkpoint_needs_only_its_yaml(tmp_path):
    path = tmp_path / "cin256-v2.yaml"
    path.write_text(yaml.safe_dump(copy.deepcopy(CIN256_V2)))
    found = shapes_of(tmp_path / "model.ckpt", compvis_config=str(path))
    known = shapes_of("random:ldm4")
    for name in ("unet", "class_embedder"):
        assert found.parts[name].parameters == known.parts[name].parameters
    assert (found.latent_shape, found.image_shape) == (known.latent_shape, known.image_shape)
    with pytest.raises(ModelError, match="the YAML that came"):
        shapes_of(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("name", "parameters", "attention"),
    [
        # parameters: of the published weights; attention: MACs of all its products by hand
        ("sdxl", 2_567_463_684, None),
        ("sd3", 2_028_328_000, 2 * 24 * (4096 + 333) ** 2 * 1536),
        ("flux-dev", 11_901_408_320, 2 * (19 + 38) * (4096 + 512) ** 2 * 3072),
        ("pixart-sigma", 610_856_096, None),
    ],
)
def test_published_shapes(name, parameters, attention):
    shapes = shapes_of(f"random:{name}")
    assert sum(p.numel() for p in shapes.denoiser.parameters()) == parameters
    assert shapes.image_shape == (3, 1024, 1024)
    if attention is not None:
        assert sum(c.macs for c in costs(shapes) if c.kind == "matmul") == attention


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("random:flux", "did you mean random:flux-dev"),
        ("nobody/nothing", "downloads nothing"),
        ("zoo:fashion", "no packaged model"),
        ("./nowhere", "no model_index.json"),
    ],
)
def test_what_is_not_here_is_said_in_one_line(source, said):
    with pytest.raises(ModelError, match=said) as caught:
        model_shapes(source, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_damaged_folder_is_refused(tiny_model, tmp_path):
    (tmp_path / "model_index.json").write_bytes((tiny_model / "model_index.json").read_bytes())
    with pytest.raises(ModelError, match="is the folder complete"):
        model_shapes(str(tmp_path), torch.float32)
