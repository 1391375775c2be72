"""The forecast of text encoders in integers, beside what is written."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config
from diffusers_pipelines import save

from qncd_cli.config.loading import parse_config
from qncd_cli.forecast import text_encoders
from qncd_cli.forecast.artifacts import file_bytes
from qncd_cli.forecast.shapes import model_shapes
from qncd_cli.models.loading import load_model
from qncd_cli.models.text import Prompts
from qncd_cli.stages import text_encoders as stage
from qncd_cli.store import artifacts

PROMPTS = ("a red", "blue", "bag")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["StableDiffusionXLPipeline", "PixArtSigmaPipeline"])
def test_the_file_is_as_large_as_was_foreseen(kind, bits, tmp_path):
    source = save(kind, tmp_path / "model")
    tree = tiny_config(source, sampling__prompts=list(PROMPTS), text_encoders__bits=bits)
    config = parse_config(tree, "test")
    model = load_model(str(source), prompts=Prompts(PROMPTS), keep_text=True)
    path = tmp_path / "text_encoders.safetensors"
    artifacts.write(path, stage.run(config, model))
    shapes = model_shapes(str(source), torch.float32, prompts=3, text=True)
    foreseen = text_encoders.artifact(config, shapes)
    assert foreseen is not None and all(t.is_meta for t in foreseen.tensors.values())
    assert abs(file_bytes(foreseen) - path.stat().st_size) < 0.02 * path.stat().st_size
    (cost,) = text_encoders.cost(config, shapes, foreseen).values()
    assert cost.model_macs > shapes.tokens * sum(p.numel() for p in shapes.text.parameters())
    off = parse_config(tiny_config(source, sampling__prompts=list(PROMPTS)), "test")
    assert text_encoders.artifact(off, shapes) is None
    assert text_encoders.cost(off, shapes, None) == {}
