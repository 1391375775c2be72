"""What a stage holds of a model's weights: mapped files, packed codes, no more than it needs."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from qncd_cli import machine
from qncd_cli.backends import int8
from qncd_cli.config.loading import parse_config
from qncd_cli.errors import BackendUnavailable
from qncd_cli.forecast import memory, plan
from qncd_cli.forecast.plan import Request
from qncd_cli.forecast.shapes import model_shapes
from qncd_cli.models.loading import load_model
from qncd_cli.models.topology import weight_layers
from qncd_cli.progress import no_progress
from qncd_cli.ptq import noise
from qncd_cli.quant.layers import QuantizedLayer, StepState
from qncd_cli.runtime.denoiser import Denoiser, quantized_denoiser
from qncd_cli.stages import calibrate, quantize

FEW = {"trajectories": 2, "batch_size": 2, "noise_trajectories": 2}
NO_INT8 = int8.why_unavailable(torch.device("cpu"))
BACKENDS = ["simulate", pytest.param("int8", marks=pytest.mark.skipif(bool(NO_INT8), reason="CPU"))]


# ---- files that are mapped ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored_bfloat16(tmp_path_factory) -> Path:
    """A pipeline of 64 MB."""
    folder = tmp_path_factory.mktemp("large") / "model"
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(256, 512),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet.to(torch.bfloat16), DDPMScheduler()).save_pretrained(folder)
    return folder


def own_memory() -> int:
    """Bytes of this process that no file backs."""
    gc.collect()
    machine.give_back()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
@pytest.mark.parametrize(("dtype", "copied"), [("bfloat16", False), ("float32", True)])
def test_weights_are_read_from_the_file_where_they_are_used_as_stored(
    stored_bfloat16, dtype, copied
):
    before = own_memory()
    model = load_model(str(stored_bfloat16), dtype)
    for parameter in model.denoiser.parameters():
        assert parameter.abs().amax() < 1e3  # reads it
    size = sum(p.nbytes for p in model.denoiser.parameters())
    assert size > 50e6
    taken = own_memory() - before
    assert taken > 0.9 * size if copied else taken < 0.3 * size
    shapes = model_shapes(str(stored_bfloat16), model.dtype)
    assert memory.mapped(shapes) == (0 if copied else shapes.parts["unet"].stored)
    assert memory.loading(shapes) >= (size if copied else 0)


# ---- packed weights -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tiny_model):
    """Configuration and artifact, with layers of one and of two bytes."""
    tree = tiny_config(
        tiny_model,
        sampling__steps=3,
        calibration=FEW,
        quantization__weights={"bits": 4, "rounding": "nearest"},
        quantization__activations={"bits": 8, "observer": "minmax"},
        quantization__first_last_activation_bits=16,
    )
    config, model = parse_config(tree, "test"), load_model(str(tiny_model))
    calibration, smoothing = calibrate.run(config, model)
    return config, quantize.run(config, model, calibration, smoothing)


def rows_of(model):
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor(500), model.condition(torch.tensor([0, 1]))


def kept_weights(module: torch.nn.Module) -> int:
    """Layers that hold a prepared weight beside their codes."""
    layers = (m for m in module.modules() if isinstance(m, QuantizedLayer))
    return sum(bool(layer.prepared) for layer in layers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_memory_computes_the_same_and_keeps_only_codes(made, tiny_model, backend):
    model, artifact = load_model(str(tiny_model)), made[1].quantized
    plain, low = (
        quantized_denoiser(model, artifact, backend, False, low_memory=low) for low in (False, True)
    )
    for _ in range(2):
        assert torch.equal(plain(*rows_of(model)), low(*rows_of(model)))
    layers = artifact.body["layers"]
    # with one key, a class, integer kernels need neither query nor key
    unused = [name for name in layers if "attn2.to_q" in name or "attn2.to_k" in name]
    assert kept_weights(plain.module) == len(layers) - len(unused) * (backend == "int8")
    assert kept_weights(low.module) == 0


def test_noise_is_measured_alike_where_weights_are_not_kept(made, tiny_model, monkeypatch):
    config, result = made
    model, kept = load_model(str(tiny_model)), []
    original = noise.quantized_denoiser

    def watched(*args, **kwargs):
        kept.append(not kwargs["low_memory"])
        return original(*args, **kwargs)

    monkeypatch.setattr(noise, "quantized_denoiser", watched)
    for free in (1 << 40, 1000):
        monkeypatch.setattr(machine, "available_memory", lambda free=free: free)
        again = noise.measure_noise(config, model, result.quantized, no_progress)
        for name, tensor in result.noise_stats.tensors.items():
            assert torch.equal(again.tensors[name], tensor), name
    assert kept == [True, False]


def test_in_place_the_models_weights_are_let_go(made, tiny_model):
    artifact = made[1].quantized
    model, other = load_model(str(tiny_model)), load_model(str(tiny_model))
    layers = weight_layers(model.denoiser)
    weights = [weakref.ref(layers[name].weight) for name in artifact.body["layers"]]
    del layers
    expected = quantized_denoiser(other, artifact, "simulate", True)(*rows_of(other))
    quantized = quantized_denoiser(model, artifact, "simulate", True, in_place=True)
    gc.collect()
    assert [weight() for weight in weights] == [None] * len(weights)
    assert torch.equal(quantized(*rows_of(model)), expected)


def pages_of(file: Path) -> int:
    """Bytes of a file that this process has mapped and read."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):  # the head of a mapping: its addresses, then its file
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="no /proc")
def test_the_pages_of_the_models_file_stay_and_are_in_the_plan(made, tiny_model, tmp_path):
    config, result = made
    file = tiny_model / "unet/diffusion_pytorch_model.safetensors"
    model = load_model(str(tiny_model))
    for parameter in model.denoiser.parameters():
        assert parameter.abs().amax() < 1e3  # reads it
    quantized_denoiser(model, result.quantized, "simulate", True, in_place=True)
    gc.collect()
    assert pages_of(file) > 0.9 * file.stat().st_size
    shapes = model_shapes(str(tiny_model), torch.float32)
    copied = {name: replace(part, mapped=False) for name, part in shapes.parts.items()}
    asked = Request(("sample",), config, 1, 1, "simulate", tmp_path, 0)
    mapped, held = (
        plan.run(config, one, asked)["stages"][2] for one in (shapes, replace(shapes, parts=copied))
    )
    added = mapped["phases"]["denoising"] - held["phases"]["denoising"]
    assert added == shapes.parts["unet"].stored == file.stat().st_size
    assert mapped["device_bytes"] == held["device_bytes"]  # a GPU holds no page of it


# ---- a device that is full ----------------------------------------------------------------------


def test_a_full_device_is_one_line():
    class Full(torch.nn.Linear):
        def forward(self, x, t):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")

    denoiser = Denoiser(Full(1, 1), StepState())
    with pytest.raises(BackendUnavailable, match="cpu has too little memory .* 3 rows") as caught:
        denoiser(torch.zeros(3, 1), 0.0, {})
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 6
