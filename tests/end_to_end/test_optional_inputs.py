"""Inputs of a denoiser that its pipeline does not give: layers stay in float, or one clear line."""

from __future__ import annotations

import json

import pytest
from conftest import SHALLOW, Qncd, save_tiny_pipeline, tiny_config

from qncd_cli.errors import ModelError
from qncd_cli.models.loading import load_model


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A U-Net that takes the guidance scale, as latent consistency models do."""
    folder = tmp_path_factory.mktemp("distilled") / "model"
    save_tiny_pipeline(folder, time_cond_proj_dim=8, **SHALLOW)
    return folder


@pytest.mark.parametrize(
    ("quantization", "intra"),
    [
        ({"preset": "best"}, "auto"),
        ({"weights": {"bits": 4, "rounding": "nearest", "budget": 4.0}}, "smoothquant"),
        ({"bias_correction": True, "activations": {"bits": 8, "observer": "output"}}, "none"),
    ],
    ids=["best", "budget", "outputs"],
)
def test_a_layer_that_no_input_reaches_stays_in_float(tmp_path, distilled, quantization, intra):
    work = Qncd(tmp_path)
    few = {"trajectories": 2, "batch_size": 2, "noise_trajectories": 1}
    tree = tiny_config(distilled, calibration=few, correction__intra=intra)
    tree["sampling"]["steps"] = 2
    work.write_config({**tree, "quantization": quantization})
    plan = work("calibrate", "--config", "tiny.yaml", "--plan", "--json").data
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    work("sample", "--num", "1")
    written = json.loads((tmp_path / "runs" / "tiny" / "coverage.json").read_text())
    for layers in (written["layers"], plan["coverage"]["layers"]):
        (row,) = (row for row in layers if row["name"] == "time_embedding.cond_proj")
        assert row["why_not_integer"] == "no input reaches it: left in float"
        assert (row["weight_bits"], row["macs"], row["integer"]) == (32, 0, False)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_class_embeds": 4}, "class_labels"),
        ({"class_embed_type": "timestep"}, "class_labels"),
        (
            {"encoder_hid_dim_type": "text_image_proj", "encoder_hid_dim": 16},
            "image_embeds",
        ),
    ],
)
def test_an_input_that_a_denoiser_needs_and_its_pipeline_lacks(tmp_path, options, name):
    save_tiny_pipeline(tmp_path / "model", **options)
    with pytest.raises(ModelError, match=f"UNet2DConditionModel takes {name}, which"):
        load_model(str(tmp_path / "model"))
