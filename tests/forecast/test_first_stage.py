"""The forecast of the decoder in integers, beside what is written."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config
from diffusers_pipelines import save

from qncd_cli.config.loading import parse_config
from qncd_cli.forecast import first_stage
from qncd_cli.forecast.artifacts import file_bytes
from qncd_cli.forecast.shapes import model_shapes
from qncd_cli.models.loading import load_model
from qncd_cli.progress import no_progress
from qncd_cli.ptq.first_stage import quantize_first_stage
from qncd_cli.store import artifacts

PLAIN = {"intra": "none", "inter": {"method": "none"}}


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_the_file_is_as_large_as_was_foreseen(kind, tiny_model, tmp_path):
    source = tiny_model if kind == "vq" else save("DiTPipeline", tmp_path / "model")
    tree = tiny_config(source, first_stage__bits=8, correction=PLAIN)
    config = parse_config(tree, "test")
    path = tmp_path / "first_stage.safetensors"
    made = quantize_first_stage(config, load_model(str(source)), no_progress)
    artifacts.write(path, made)
    foreseen = first_stage.artifact(config, model_shapes(str(source), torch.float32))
    assert foreseen is not None
    assert {n: t.shape for n, t in foreseen.tensors.items()} == {
        n: t.shape for n, t in made.tensors.items()
    }
    assert abs(file_bytes(foreseen) - path.stat().st_size) < 0.02 * path.stat().st_size


def test_there_is_none_in_floating_point_nor_of_a_model_of_pixels(tiny_model, tiny_pixel_model):
    shapes = model_shapes(str(tiny_model), torch.float32)
    assert first_stage.artifact(parse_config(tiny_config(tiny_model), "test"), shapes) is None
    pixels = model_shapes(str(tiny_pixel_model), torch.float32)
    config = parse_config(tiny_config(tiny_model, first_stage__bits=8), "test")
    assert first_stage.artifact(config, pixels) is None
