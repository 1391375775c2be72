"""Text encoders in integers: what their artifact holds, and how near their embeddings are."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config
from diffusers_pipelines import save

from qncd_cli.config.loading import parse_config
from qncd_cli.errors import NotFinite
from qncd_cli.models.loading import load_model
from qncd_cli.models.text import Prompts
from qncd_cli.models.topology import weight_layers
from qncd_cli.ptq.text_encoders import plan_encoders, quantize_encoders, see_inputs
from qncd_cli.stages import text_encoders as stage
from qncd_cli.store import artifacts
from qncd_cli.store.layer_entry import layer_entries

TEXTS = ("a red", "blue", "a shoe", "bag")


def loaded(source, **options):
    """The model of a folder with its text encoders, with norms whose channels differ, as those of
    trained encoders do."""
    model = load_model(str(source), prompts=Prompts(TEXTS, "red"), keep_text=True, **options)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.text.module.named_parameters():
        if "norm" in name and name.endswith("weight"):
            spread = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * torch.exp(0.5 * spread).to(parameter))
    return model


def configured(source, bits, stage="test"):
    tree = tiny_config(source, sampling__prompts=[*TEXTS], text_encoders__bits=bits)
    return parse_config(tree | {"sampling": tree["sampling"] | {"negative_prompt": "red"}}, stage)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save("StableDiffusionXLPipeline", tmp_path_factory.mktemp("xl") / "model")


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save("PixArtSigmaPipeline", tmp_path_factory.mktemp("t5") / "model")


FIGURES = [
    *(("clip", 8, 25.0), ("t5", 8, 25.0)),
    *(("clip", 4, 10.0), ("t5", 4, 10.0)),
]


@pytest.mark.parametrize(("which", "bits", "least"), FIGURES)
def test_embeddings_are_near_full_precision_s(request, which, bits, least):
    source = request.getfixturevalue(which)
    model = loaded(source)
    before = stage.embeddings(model.text)
    made = stage.run(configured(source, bits), model)
    found = made.body["fidelity"]["hidden states"]
    assert least < found["sqnr_embeddings_db"] < 80
    assert found["sqnr_lowest_db"] <= found["sqnr_embeddings_db"] + 3
    assert stage.fidelity(before, stage.embeddings(model.text))["hidden states"] == found


def test_factors_and_hessians_gain_over_plain_rounding(t5, monkeypatch):
    """What is told as the better choice is: inputs smoothed, weights by GPTQ."""
    model = loaded(t5)
    best = stage.run(configured(t5, 8), model).body["fidelity"]["hidden states"]
    from qncd_cli.ptq import text_encoders as part

    rounding = part.quantize_layer
    monkeypatch.setattr(part, "STRENGTH", 0.0)
    monkeypatch.setattr(part, "quantize_layer", lambda p, q, f, c: rounding(p, q, f, None))
    model = loaded(t5)
    plain = stage.run(configured(t5, 8), model).body["fidelity"]["hidden states"]
    assert best["sqnr_embeddings_db"] > plain["sqnr_embeddings_db"] + 1


@pytest.mark.parametrize("bits", [8, 4])
def test_every_linear_layer_is_in_the_artifact_and_the_file_is_sound(clip, bits, tmp_path):
    model = loaded(clip)
    layers = weight_layers(model.text.module)
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    made = stage.run(configured(clip, bits), model)
    entries = layer_entries(made.body)
    assert {name: entry.weight_shape for name, entry in entries.items()} == shapes
    assert {entry.widths for entry in entries.values()} == {(8, 8) if bits == 8 else (4, 32)}
    assert {entry.rounding for entry in entries.values()} == {"gptq"}
    assert made.model == model.digest and made.body["prompts"] == len(TEXTS)
    artifacts.write(tmp_path / "text_encoders.safetensors", made)
    again = artifacts.read(tmp_path / "text_encoders.safetensors", "text_encoders")
    assert again.digest == made.digest
    same = stage.run(configured(clip, bits), loaded(clip))
    assert same.digest == made.digest


def test_they_follow_the_prompts_and_nothing_of_the_denoiser(clip):
    own = configured(clip, 8)
    tree = own.to_dict()
    for section, key, value in (("sampling", "steps", 3), ("calibration", "trajectories", 5)):
        other = parse_config({**tree, section: {**tree[section], key: value}}, "test")
        assert other.stage_digest("text_encoders") == own.stage_digest("text_encoders")
    for section, key, value in (
        ("sampling", "prompts", ["bag"]),
        ("sampling", "negative_prompt", ""),
        ("text_encoders", "bits", 4),
        ("model", "dtype", "bfloat16"),
    ):
        other = parse_config({**tree, section: {**tree[section], key: value}}, "test")
        assert other.stage_digest("text_encoders") != own.stage_digest("text_encoders")
    off = parse_config({**tree, "text_encoders": {"bits": None}}, "test")
    without = {key: value for key, value in tree.items() if key != "text_encoders"}
    for name in ("calibrate", "quantize", "reuse", "first_stage"):
        assert own.stage_digest(name) == off.stage_digest(name)
        assert off.stage_digest(name) == parse_config(without, "test").stage_digest(name)


def test_layers_that_no_prompt_reaches_stay_as_they_are(t5):
    model = loaded(t5)
    module = model.text.module
    module["text_encoder"].beside = torch.nn.Linear(4, 4)
    assert "text_encoder.beside" in {plan.name for plan in plan_encoders(module, 8)}
    seen = see_inputs(module, model.text.encode)
    made = quantize_encoders(module, 8, seen, model.text.encode)
    assert "text_encoder.beside" not in made.body["layers"]
    assert made.body["layers"].keys() == seen.keys()


def test_inputs_that_are_not_finite_are_named(t5):
    model = loaded(t5)
    layer = next(iter(weight_layers(model.text.module).values()))
    layer.weight[0, 0] = torch.inf
    with pytest.raises(NotFinite, match="inputs of text_encoder.* are not finite"):
        see_inputs(model.text.module, lambda: model.text.encode())
