"""Weights that lack tensors, in any format and of any component: named, never filled at random."""

from __future__ import annotations

import json
import shutil

import diffusers_pipelines as tiny
import pytest
import torch
from safetensors.torch import load_file, save_file

from qncd_cli.errors import ModelError
from qncd_cli.models.loading import load_model
from qncd_cli.models.text import Prompts

NAMES = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {
        name: tiny.save(name, tmp_path_factory.mktemp("whole") / "model")
        for name in ("StableDiffusionPipeline", "PixArtSigmaPipeline")
    }


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole["StableDiffusionPipeline"], tmp_path / "model")


def encoded(folder):
    return load_model(str(folder), prompts=Prompts(("a red shoe",))).condition(torch.tensor([0]))


def weights_of(folder, part):
    return next((folder / part).glob("*.safetensors"))


def as_bin(folder, part, lacking=None):
    """The component's weights in torch's own format, as older folders have them."""
    path = weights_of(folder, part)
    tensors = load_file(path)
    if lacking:
        del tensors[lacking]
    name = "pytorch_model.bin" if part.startswith("text") else "diffusion_pytorch_model.bin"
    torch.save(tensors, path.with_name(name))
    path.unlink()


def in_shards(folder, part, lacking=None):
    """In two files; one tensor is named by the index alone."""
    path = weights_of(folder, part)
    tensors, stem = load_file(path), path.stem
    names, weight_map = sorted(tensors), {}
    for number, half in enumerate((names[::2], names[1::2]), 1):
        shard = f"{stem}-0000{number}-of-00002.safetensors"
        held = {n: tensors[n] for n in half if n != lacking}
        save_file(held, path.with_name(shard), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    path.with_name(f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    path.unlink()


def some_tensor(folder, part):
    return sorted(n for n in load_file(weights_of(folder, part)) if n.endswith("weight"))[3]


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("store", [as_bin, in_shards])
def test_any_format_is_the_same_model_and_lacks_nothing(folder, tmp_path, store, part):
    before = encoded(folder)["encoder_hidden_states"]
    name = some_tensor(folder, part)
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    store(folder, part)
    assert torch.equal(encoded(folder)["encoder_hidden_states"], before)
    store(damaged, part, name)
    with pytest.raises(ModelError, match="missing") as caught:
        encoded(damaged)
    assert "1 of " in str(caught.value) and name.split(".")[-2] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pipeline", "lacking"),
    [
        ("StableDiffusionPipeline", "final_layer_norm.weight"),
        ("PixArtSigmaPipeline", "layer.0.SelfAttention.q.weight"),
    ],
)
def test_a_text_encoder_without_a_tensor_is_refused(whole, tmp_path, pipeline, lacking):
    """CLIP and T5; what T5 ties to its embeddings is no loss."""
    folder = shutil.copytree(whole[pipeline], tmp_path / "model")
    encoded(folder)
    path = weights_of(folder, "text_encoder")
    tensors = load_file(path)
    del tensors[next(name for name in sorted(tensors) if name.endswith(lacking))]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"text_encoder: 1 of .* missing .first: .*{lacking}"):
        encoded(folder)


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_a_shard_that_is_gone(folder, part):
    in_shards(folder, part)
    next((folder / part).glob("*-00002-of-*")).unlink()
    with pytest.raises(ModelError) as caught:
        encoded(folder)
    assert "\n" not in str(caught.value)
    assert "00002-of-00002" in str(caught.value)
