"""quantize --lora: another LoRA on a quantized run."""

from __future__ import annotations

import shutil
import signal

import pytest
import torch
from conftest import Qncd, tiny_config
from diffusers import DiffusionPipeline
from diffusers_pipelines import save
from processes import At, code_of, stderr_of
from safetensors.torch import save_file
from torch import nn

from qncd_cli.errors import ConfigError
from qncd_cli.quant.affine import QParams, dequantize
from qncd_cli.quant.packing import unpack
from qncd_cli.runs.requantize import requantize
from qncd_cli.spec import weight_spec
from qncd_cli.store import artifacts
from qncd_cli.store.artifacts import tensors_by_module

PLAIN = {
    "sampling__prompts": ["a red shoe", "a blue bag", "a bag"],
    "sampling__guidance_scale": 2.0,
    "quantization__sensitive": {"weight_bits": 0.5, "activation_bits": 0.5},
    "correction__intra": "range",
    "correction__inter__method": "none",
}
CALLS = 13
"""Of the denoiser, by a command that is not interrupted."""
TOUCHED = {"one": ("attn1.to_q", "attn1.to_v"), "two": ("attn1.to_q", "ff.net.2")}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Qncd:
    """A run of a tiny Stable Diffusion, and the LoRAs one and two beside it."""
    work = Qncd(tmp_path_factory.mktemp("requantize"))
    folder = save("StableDiffusionPipeline", work.folder / "model")
    unet = DiffusionPipeline.from_pretrained(folder).unet
    for name, ends in TOUCHED.items():
        generator, tensors = torch.Generator().manual_seed(len(name)), {}
        for layer, module in unet.named_modules():
            if isinstance(module, nn.Linear) and layer.endswith(ends):
                out, inside = module.weight.shape
                down = 0.3 * torch.randn(2, inside, generator=generator)
                tensors[f"unet.{layer}.lora_A.weight"] = down
                tensors[f"unet.{layer}.lora_B.weight"] = 0.3 * torch.randn(
                    out, 2, generator=generator
                )
        save_file(tensors, work.folder / f"{name}.safetensors")
    work.write_config(tiny_config(folder, **PLAIN))
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    return work


def layers_of(run):
    artifact = artifacts.read(run / "quantized.safetensors", "quantized")
    return artifact, {
        name: tensors
        for name, tensors in tensors_by_module(artifact.tensors).items()
        if name in artifact.body["layers"]
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module", params=TOUCHED)
def requantized(request, quantized):
    """Which LoRA, and what the command said of the run runs/NAME."""
    name = request.param
    arguments = ("--lora", f"{name}.safetensors:0.5", "--into", f"runs/{name}", "--json")
    return name, quantized("quantize", "--run-dir", "runs/tiny", *arguments).data


def test_only_layers_that_the_lora_touches_are_new(quantized, requantized):
    name, said = requantized
    old, before = layers_of(quantized.folder / "runs/tiny")
    new, after = layers_of(quantized.folder / f"runs/{name}")
    changed = {layer for layer in after if not same(before[layer], after[layer])}
    expected = {layer for layer in after if layer.endswith(TOUCHED[name])}
    assert changed == expected == set(new.body["requantized"]["layers"])
    assert said["requantized_layers"] == len(expected) >= 4
    for layer in changed:
        for kept in ("weight_bits", "activation_bits", "observer", "estimated_error"):
            assert new.body["layers"][layer].get(kept) == old.body["layers"][layer].get(kept)
        for kept in ("input_scale", "input_zero_point", "smoothing"):
            assert torch.equal(before[layer][kept], after[layer][kept])


def test_codes_stand_for_the_fused_weights(quantized, requantized):
    name, said = requantized
    new, after = layers_of(quantized.folder / f"runs/{name}")
    pipeline = DiffusionPipeline.from_pretrained(quantized.folder / "model")
    plain = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(quantized.folder / f"{name}.safetensors")
    pipeline.fuse_lora(lora_scale=0.5)
    pipeline.unload_lora_weights()
    for layer in new.body["requantized"]["layers"]:
        entry, tensors = new.body["layers"][layer], after[layer]
        bits, shape = entry["weight_bits"], tuple(entry["weight_shape"])
        zero_point = tensors.get("weight_zero_point", torch.zeros(shape[0])).int()
        codes = unpack(tensors["weight"], bits, shape)
        weight = dequantize(codes, QParams(tensors["weight_scale"], zero_point), weight_spec(bits))
        weight = weight / tensors["smoothing"]
        fused, before = (w[f"{layer}.weight"] for w in (pipeline.unet.state_dict(), plain))
        assert (weight - fused).norm() < 0.5 * (weight - before).norm()
    assert said["sqnr_predictions_db"] > 10


def test_later_commands_take_the_new_run(quantized, requantized):
    name, _ = requantized
    run = f"runs/{name}"
    sampled = quantized("sample", "--run-dir", run, "--num", "2", "--json").data
    assert sampled["stage"] == "sample"
    assert "unchanged" in quantized("quantize", "--run-dir", run).stdout
    refused = quantized("sample", "--run-dir", run, "--inter", "ptqd", "--name", "x", ok=False)
    assert refused.exit_code == 4
    assert "was not prepared for the LoRA" in refused.stderr


def test_the_same_lora_gives_the_same_bytes(quantized, requantized):
    name, _ = requantized
    arguments = ("--lora", f"{name}.safetensors:0.5", "--into", f"runs/{name}-again")
    quantized("quantize", "--run-dir", "runs/tiny", *arguments)
    for kind in ("calibration", "quantized", "noise_stats"):
        first, again = (
            (quantized.folder / run / f"{kind}.safetensors").read_bytes()
            for run in (f"runs/{name}", f"runs/{name}-again")
        )
        assert first == again


@pytest.mark.parametrize(
    ("at", "code"),
    [
        (At(call=3, kill=signal.SIGTERM), 143),  # Hessians
        (At(write=6), -signal.SIGKILL),
        (At(write=12, before=False), -signal.SIGKILL),
    ],
    ids=["asked", "killed", "killed later"],
)
def test_an_interrupted_call_goes_on(quantized, requantized, at, code):
    name, _ = requantized
    into = f"runs/{name}-interrupted-{abs(code)}-{at.write}"
    arguments = ("quantize", "--run-dir", "runs/tiny", "--lora", f"{name}.safetensors:0.5")
    folder = quantized.folder
    assert code_of(folder, *arguments, "--into", into, at=at) == code, stderr_of(folder)
    if code > 0:
        (line,) = (line for line in stderr_of(folder) if line.startswith("Interrupted"))
        assert "what quantize has done is kept, the same command goes on from there" in line
    assert [*(folder / into / "partial" / "quantize").glob("*.safetensors")]
    fewer = At(call=CALLS, kill=signal.SIGUSR1)  # which ends a process that makes so many
    assert code_of(folder, *arguments, "--into", into, at=fewer) == 0, stderr_of(folder)
    assert code_of(folder, *arguments, "--into", f"{into}-whole", at=fewer) == -signal.SIGUSR1
    assert not (folder / into / "partial").exists()
    for kind in ("smoothing", "calibration", "quantized", "noise_stats"):
        first, again = (
            (folder / run / f"{kind}.safetensors").read_bytes() for run in (f"runs/{name}", into)
        )
        assert first == again


def test_noise_is_measured_anew_for_a_correction(quantized):
    arguments = ("--run-dir", "runs/tiny", "--set", "correction.inter.method=ptqd")
    shutil.copytree(quantized.folder / "runs/tiny", quantized.folder / "runs/ptqd")
    quantized("quantize", "--run-dir", "runs/ptqd", *arguments[2:])
    lora = ("--lora", "one.safetensors", "--into", "runs/ptqd-one")
    quantized("quantize", "--run-dir", "runs/ptqd", *lora)
    stats = artifacts.read(quantized.folder / "runs/ptqd-one/noise_stats.safetensors")
    assert "carried_from" not in stats.body
    quantized("sample", "--run-dir", "runs/ptqd-one", "--num", "1")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--lora", "one.safetensors", "--bits", "w8a8"), 2, "leave --bits out"),
        (("--into", "runs/x"), 2, "--into is for --lora"),
        (("--lora", "one.safetensors", "--into", "runs/tiny"), 4, "is the run itself"),
        (("--lora", "nowhere.safetensors"), 5, "nowhere.safetensors"),
        (("--lora", "one.safetensors:much"), 3, "FILE or FILE:WEIGHT"),
    ],
)
def test_what_cannot_be_is_said(quantized, arguments, code, said):
    before = sorted((quantized.folder / "runs").iterdir())
    refused = quantized("quantize", "--run-dir", "runs/tiny", *arguments, ok=False)
    assert refused.exit_code == code, refused.stderr
    assert said in refused.stderr
    made = set((quantized.folder / "runs").iterdir()) - set(before)
    assert not any((folder / "config.yaml").exists() for folder in made)


def test_learnt_roundings_are_refused(quantized):
    shutil.copytree(quantized.folder / "runs/tiny", quantized.folder / "runs/passes")
    passes = ("--set", "quantization.weights.passes=2")
    quantized("quantize", "--run-dir", "runs/passes", *passes)
    refused = quantized(
        "quantize", "--run-dir", "runs/passes", "--lora", "one.safetensors", ok=False
    )
    assert refused.exit_code == 3
    assert "look beyond a layer's weight" in refused.stderr


def test_several_processes_would_write_one_run(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        requantize(["one.safetensors"])
