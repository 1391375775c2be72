"""Quantized layers in text encoders: what they compute, and by which backend."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_config
from diffusers_pipelines import save

from qncd_cli.backends.base import BACKENDS, get_backend
from qncd_cli.config.loading import parse_config
from qncd_cli.errors import ArtifactError, BackendUnavailable
from qncd_cli.models.loading import load_model
from qncd_cli.models.text import Prompts
from qncd_cli.models.topology import weight_layers
from qncd_cli.quant.layers import QuantizedLayer
from qncd_cli.runtime.text_encoders import InPlace, encoders_backend, install_encoders
from qncd_cli.runtime.text_encoders import other_encoders as others
from qncd_cli.stages import text_encoders as stage

TEXTS = ("a red", "blue", "bag")
CPU = torch.device("cpu")


def made(source, bits):
    tree = tiny_config(source, sampling__prompts=[*TEXTS], text_encoders__bits=bits)
    model = load_model(str(source), prompts=Prompts(TEXTS), keep_text=True)
    return stage.run(parse_config(tree, "test"), model)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save("PixArtSigmaPipeline", tmp_path_factory.mktemp("t5") / "model")


@pytest.fixture(scope="module")
def narrow(t5):
    return made(t5, 4)


@pytest.fixture(scope="module")
def wide(t5):
    return made(t5, 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_are_not_taken_for_the_type_of_a_weight(t5, narrow, dtype):
    """T5 brings inputs to the type of a weight: at 4 bits its codes are unsigned bytes."""
    model = load_model(str(t5), dtype, prompts=Prompts(TEXTS), keep_text=True)
    text = model.text
    module = text.module
    twin = copy.deepcopy(module)
    install_encoders(module, narrow, "here", get_backend("simulate"))
    computed = text.encode().table["encoder_hidden_states"]
    for name, layer in weight_layers(twin).items():
        layer.weight.data = module.get_submodule(name).layer.float_weight().to(layer.weight)
    text.pipeline.text_encoder = twin["text_encoder"]
    expected = text.encode().table["encoder_hidden_states"]
    assert computed.dtype == expected.dtype == model.dtype
    tolerance = 1e-5 if dtype == "float32" else 5e-2
    torch.testing.assert_close(computed, expected, rtol=tolerance, atol=tolerance)


def test_every_layer_stands_in_its_place_and_shows_the_type_of_before(t5, wide):
    module = load_model(str(t5), prompts=Prompts(TEXTS), keep_text=True).text.module
    names = [*weight_layers(module)]
    install_encoders(module, wide, "here", get_backend("simulate"))
    for name in names:
        stands = module.get_submodule(name)
        assert isinstance(stands, InPlace) and isinstance(stands.layer, QuantizedLayer)
        assert stands.weight.dtype == torch.float32 and stands.weight.numel() == 0
    assert not weight_layers(module)


def test_integer_kernels_make_the_same_embeddings(t5, wide):
    if BACKENDS["int8"].why_unavailable(CPU):
        pytest.skip("this machine has no integer kernels")
    tables = []
    for name in ("int8", "simulate"):
        encoders = others(wide, "here", get_backend(name))
        model = load_model(str(t5), prompts=Prompts(TEXTS), encoders=encoders)
        tables.append(model.condition(torch.arange(3))["encoder_hidden_states"])
    torch.testing.assert_close(*tables, rtol=1e-5, atol=1e-5)
    plain = load_model(str(t5), prompts=Prompts(TEXTS))
    assert not torch.equal(tables[0], plain.condition(torch.arange(3))["encoder_hidden_states"])


def test_keys_tell_artifacts_and_what_computes_them_apart(narrow, wide):
    backends = [get_backend("simulate"), BACKENDS["int8"]]
    keys = {others(artifact, "here", b).key for artifact in (narrow, wide) for b in backends}
    assert len(keys) == 4


def test_layers_of_another_encoder_are_refused(wide, tmp_path):
    source = save("StableDiffusionPipeline", tmp_path / "model")
    encoders = others(wide, "here", get_backend("simulate"))
    with pytest.raises(ArtifactError, match="does not fit here"):
        load_model(str(source), prompts=Prompts(TEXTS), encoders=encoders)


def test_a_backend_is_as_wished_else_as_before_else_the_integers(monkeypatch):
    assert encoders_backend("simulate", CPU, "int8").name == "simulate"
    assert encoders_backend("auto", CPU, "simulate").name == "simulate"
    assert encoders_backend("openvino", CPU, "simulate").name == "simulate"
    integers = BACKENDS["int8"].why_unavailable(CPU) == ""
    assert encoders_backend("auto", CPU).name == ("int8" if integers else "simulate")
    monkeypatch.setenv("QNCD_DISABLE_INT8", "1")
    assert encoders_backend("auto", CPU, "int8").name == "simulate"
    with pytest.raises(BackendUnavailable):
        encoders_backend("int8", CPU)
    with pytest.raises(BackendUnavailable, match="no backend abacus"):
        encoders_backend("abacus", CPU)
