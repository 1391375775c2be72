"""qncd export --to comfyui: what a reader of the format makes of the file is the artifact."""

from __future__ import annotations

import importlib.util
import json

import diffusers_pipelines as tiny
import pytest
import torch
from conftest import Qncd, tiny_config
from oracles import comfyui_file
from safetensors import safe_open

from qncd_cli.models.loading import load_model
from qncd_cli.models.text import Prompts
from qncd_cli.quant.layers import QuantizedLayer
from qncd_cli.runtime.denoiser import quantized_denoiser
from qncd_cli.store import artifacts

MARKS = {"int8_tensorwise", "asym_w4a8_int8"}
PLAIN = {
    "quantization__weights": {"bits": 8, "rounding": "nearest"},
    "quantization__activations": {"bits": 8, "observer": "minmax"},
    "quantization__first_last_activation_bits": 16,
    "sampling__prompts": ["a red shoe", "a blue bag", "a bag"],
    "correction__intra": "none",
    "correction__inter__method": "none",
}
FLOW = {"sampling__scheduler": "flow-euler", "sampling__image_size": 16}
FOUR_BITS = {"weights": {"bits": 4}}
TWO_BYTES = {"weights": {"bits": 15}, "activations": {"bits": 16}}
RUNS = {
    "SD": ("StableDiffusionPipeline", {"correction__intra": "range"}),
    "SDXL": (
        "StableDiffusionXLPipeline",
        {
            "correction__intra": "embedding",
            "quantization__overrides": {"*attn1.to_q": FOUR_BITS, "*attn2.to_q": TWO_BYTES},
        },
    ),
    "SD3": (
        "StableDiffusion3Pipeline",
        {**FLOW, "quantization__rotation": 4, "quantization__overrides": {"*.0.attn.*": FOUR_BITS}},
    ),
    "FLUX": (
        "FluxPipeline, dev",
        {
            **FLOW,
            "quantization__bias_correction": True,
            "quantization__overrides": {"*.0.attn.to_q": TWO_BYTES},
        },
    ),
}


@pytest.fixture(scope="module", params=RUNS)
def exported(request, tmp_path_factory):
    """A run of a tiny pipeline, exported to out.safetensors, and what the command said."""
    kind, changes = RUNS[request.param]
    work = Qncd(tmp_path_factory.mktemp("comfyui"))
    folder = tiny.save(kind, work.folder / "model")
    work.write_config(tiny_config(folder, **{**PLAIN, **changes}))
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    arguments = ("export", "--to", "comfyui", "out.safetensors", "--samples", "2", "--json")
    return work, work(*arguments).data, request.param


def quantized_layers(work):
    """The model, the artifact, and its layers by name."""
    prompts = tiny_config("", **PLAIN)["sampling"]["prompts"]
    model = load_model(str(work.folder / "model"), prompts=Prompts(tuple(prompts), image_size=16))
    artifact = artifacts.read(work.folder / "runs/tiny/quantized.safetensors", "quantized")
    module = quantized_denoiser(model, artifact, "simulate", cache_time_embeddings=False).module
    return model, {n: m for n, m in module.named_modules() if isinstance(m, QuantizedLayer)}


def test_an_independent_reader_finds_the_artifacts_weights(exported):
    work, said, kind = exported
    model, layers = quantized_layers(work)
    found, marks = comfyui_file.read(work.folder / "out.safetensors")
    named = comfyui_file.in_diffusers_names(found, model.denoiser)
    state = model.denoiser.state_dict()
    assert named.keys() == state.keys()
    formats = {row["name"]: row["format"] for row in said["layers"]}
    assert {name for name, form in formats.items() if form in MARKS} == marks.keys()
    rotated = {name for name, layer in layers.items() if layer.rotation and layer.weight_bits < 9}
    exact = rounded = 0
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        there = named[name].reshape(tensor.shape)
        layer = layers.get(owner)
        if layer is None:
            assert torch.equal(there, tensor.to(torch.bfloat16).float()), name
        elif leaf == "bias":
            continue
        else:
            factor = layer.factor
            wanted = factor.unfold(layer.float_weight())
            if torch.equal(there, wanted):
                exact += 1
            elif owner in rotated:  # the sums of a rotation in another order
                assert torch.allclose(there, wanted, rtol=0, atol=1e-6 * wanted.abs().max())
                exact += 1
            else:
                assert torch.equal(there, wanted.to(torch.bfloat16).float()), name
                rounded += 1
    integers = sum(form in MARKS for form in formats.values())
    assert (integers > 10) == (exact > 10) == (kind != "SD")
    assert rounded > 0


def test_the_model_of_the_file_predicts_what_the_artifact_predicts(exported):
    """Names, biases and shifts: a tensor in the wrong place makes another image."""
    work, said, kind = exported
    model, layers = quantized_layers(work)
    found, _ = comfyui_file.read(work.folder / "out.safetensors")
    named = comfyui_file.in_diffusers_names(found, model.denoiser)
    own = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    condition, t = model.condition(torch.tensor([0, 1])), torch.tensor([500.0, 500.0])
    with torch.no_grad():
        before = model.denoiser(x, t, **condition).sample
        shaped = {k: v.reshape(own[k].shape) for k, v in named.items()}
        model.denoiser.load_state_dict(shaped)
        after = model.denoiser(x, t, **condition).sample
    assert (after - before).norm() / before.norm() < (0.2 if kind == "SD3" else 0.05)
    assert said["agreement"]["relative_difference"] < 0.2


def test_sizes_and_formats_are_said(exported):
    work, said, kind = exported
    path = work.folder / "out.safetensors"
    assert said["bytes"] == path.stat().st_size
    counts = said["formats"]
    assert sum(counts.values()) == len(said["layers"])
    reasons = {row["why"] for row in said["layers"] if row["format"] == "bfloat16"}
    if kind in ("SD", "SDXL"):
        assert "ComfyUI quantizes linear layers alone" in reasons
    if kind in ("SDXL", "FLUX"):
        assert "its codes have two bytes" in reasons
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["qncd"])["quantized"]


def test_the_same_run_gives_the_same_bytes(exported):
    work, _, _ = exported
    before = (work.folder / "out.safetensors").read_bytes()
    arguments = ("export", "--to", "comfyui", "again.safetensors", "--samples", "1")
    work(*arguments)
    assert (work.folder / "again.safetensors").read_bytes() == before


@pytest.mark.skipif(importlib.util.find_spec("comfy_kitchen") is None, reason="needs comfy-kitchen")
def test_comfy_kitchen_reads_the_same(exported):
    from comfy_kitchen.tensor import QuantizedTensor, TensorWiseINT8Layout

    work, _, kind = exported
    found, marks = comfyui_file.read(work.folder / "out.safetensors")
    with safe_open(work.folder / "out.safetensors", "pt") as file:
        for layer, mark in marks.items():
            start = f"{comfyui_file.PREFIX}{layer}.weight"
            weight, scale = file.get_tensor(start), file.get_tensor(f"{start}_scale")
            options = {key: mark[key] for key in ("convrot", "convrot_groupsize") if key in mark}
            params = TensorWiseINT8Layout.Params(
                scale=scale, orig_dtype=torch.float32, orig_shape=tuple(weight.shape), **options
            )
            read = QuantizedTensor(weight, "TensorWiseINT8Layout", params).dequantize()
            assert torch.allclose(read, found[f"{layer}.weight"], rtol=0, atol=1e-7)
    assert bool(marks) == (kind != "SD")


def test_what_is_wrong_is_said_at_once(exported):
    work, _, kind = exported
    if kind != "FLUX":
        return
    before = sorted(work.folder.iterdir())
    for place, why in [("out", "is no .safetensors"), ("out.safetensors", "is there already")]:
        refused = work("export", "--to", "comfyui", place, ok=False)
        assert refused.exit_code == 4
        assert why in refused.stderr
    arguments = ("export", "--to", "comfyui", "new.safetensors", "--samples", "1", "--bound", "0")
    assert "more than the bound" in work(*arguments, ok=False).stderr
    assert sorted(work.folder.iterdir()) == before


def test_a_model_without_names_there_is_refused(tmp_path, tiny_dit_model):
    work = Qncd(tmp_path)
    changes = {**PLAIN, "quantization__first_last_activation_bits": 8}
    del changes["sampling__prompts"]
    work.write_config(tiny_config(tiny_dit_model, **changes))
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    refused = work("export", "--to", "comfyui", "new.safetensors", ok=False)
    assert refused.exit_code == 5
    assert "ComfyUI has no names for a DiTTransformer2DModel" in refused.stderr
    assert not (tmp_path / "new.safetensors").exists()
