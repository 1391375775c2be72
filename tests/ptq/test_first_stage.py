"""The decoder in integers: what its artifact holds, and how near its images are."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config
from diffusers_pipelines import save

from qncd_cli.config.loading import parse_config
from qncd_cli.errors import ModelError
from qncd_cli.metrics.tensor import psnr_db
from qncd_cli.models.loading import first_stage_of, load_model
from qncd_cli.models.topology import weight_layers
from qncd_cli.progress import no_progress
from qncd_cli.ptq.first_stage import plan_decoder, quantize_first_stage
from qncd_cli.runtime import trajectory
from qncd_cli.runtime.denoiser import full_denoiser
from qncd_cli.runtime.first_stage import with_integers
from qncd_cli.store import artifacts
from qncd_cli.store.layer_entry import attention_entries, layer_entries

UNSEEN = [100, 101, 102, 103]


def made(source, **changes):
    model = load_model(str(source))
    config = parse_config(tiny_config(source, first_stage__bits=8, **changes), "test")
    return config, model, quantize_first_stage(config, model, no_progress)


@pytest.fixture(scope="module")
def vq(tiny_model):
    return made(tiny_model)


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    """With attention between its convolutions."""
    path = save("DiTPipeline", tmp_path_factory.mktemp("dit") / "model")
    return made(path, correction={"intra": "none", "inter": {"method": "none"}})


@pytest.mark.parametrize("which", ["vq", "kl"])
def test_images_of_unseen_latents_are_near_the_float_decoder_s(request, which):
    config, model, artifact = request.getfixturevalue(which)
    latents = trajectory.draw(config, model, full_denoiser(model), UNSEEN)
    images = with_integers(first_stage_of(model), artifact, "here", "simulate")(latents)
    exact = model.decode(latents)
    assert 35 < psnr_db(exact, images) < 100
    assert torch.equal(model.decode(latents), exact)  # the model's own stays as it was


def test_every_layer_is_in_the_artifact_and_the_file_is_sound(vq, tmp_path):
    _, model, artifact = vq
    decoder = first_stage_of(model).decoder
    entries = layer_entries(artifact.body)
    assert entries.keys() == weight_layers(decoder).keys()
    assert entries["conv_in"].widths == (8, 16)
    assert {e.widths for n, e in entries.items() if n != "conv_in"} == {(8, 8)}
    assert artifact.body["integer_macs"] == artifact.body["macs"] > 0
    artifacts.write(tmp_path / "first_stage.safetensors", artifact)
    again = artifacts.read(tmp_path / "first_stage.safetensors", "first_stage")
    assert again.digest == artifact.digest


def test_probabilities_have_codes_for_as_many_keys_as_there_are(kl, tmp_path):
    _, model, artifact = kl
    few = attention_entries(artifact.body)
    assert few and {e.probabilities_bits for e in few.values()} == {8}  # of 64 positions
    path = save("DiTPipeline", tmp_path / "model")
    config = path / "transformer/config.json"
    text = config.read_text()
    assert '"sample_size": 8' in text
    config.write_text(text.replace('"sample_size": 8', '"sample_size": 16'))
    _, _, larger = made(path, correction={"intra": "none", "inter": {"method": "none"}})
    assert {e.probabilities_bits for e in attention_entries(larger.body).values()} == {16}


def test_the_decoder_follows_its_latents_not_the_denoiser_s_bits(tiny_model):
    plain = parse_config(tiny_config(tiny_model, first_stage__bits=8), "test")
    same = parse_config(
        tiny_config(tiny_model, first_stage__bits=8, quantization__weights__bits=6), "test"
    )
    other = parse_config(tiny_config(tiny_model, first_stage__bits=8, sampling__steps=5), "test")
    assert plain.stage_digest("first_stage") == same.stage_digest("first_stage")
    assert plain.stage_digest("first_stage") != other.stage_digest("first_stage")
    off = parse_config(tiny_config(tiny_model), "test")
    for stage in ("calibrate", "quantize", "reuse"):
        assert plain.stage_digest(stage) == off.stage_digest(stage)


def test_a_model_of_pixels_has_no_decoder(tiny_pixel_model):
    with pytest.raises(ModelError, match="draws pixels"):
        made(tiny_pixel_model)


def test_plans_cover_a_decoder(vq):
    decoder = first_stage_of(vq[1]).decoder
    assert [p.name for p in plan_decoder(decoder, 8)] == [*weight_layers(decoder)]
