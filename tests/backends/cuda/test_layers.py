"""Layers of the backend cuda-int8, interpreted, have the simulation's bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import Qncd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from qncd_cli.backends import base
from qncd_cli.backends.cuda import layers
from qncd_cli.backends.onednn import input_scale_first
from qncd_cli.backends.reference import simulate
from qncd_cli.errors import BackendUnavailable
from qncd_cli.models.loading import load_model
from qncd_cli.models.topology import weight_layers
from qncd_cli.quant.layers import QuantizedLayer
from qncd_cli.quant.smoothing import SmoothingFactor
from qncd_cli.runtime.denoiser import full_denoiser, quantized_denoiser
from qncd_cli.store import artifacts

from ..test_int8 import CASES, layer_of, random
from ..test_int8_exact import layer_of as layer_with_weight_of

KERNELS = [case for case in CASES if getattr(case[0], "groups", 1) == 1]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def check(layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
    """The output, whose bits and order in memory have to be the simulation's."""
    assert layers.why_not(layer) == ""
    with torch.no_grad():
        output, expected = layers.compute(layer, x), simulate(layer, x)
    assert output.dtype == x.dtype
    assert torch.equal(output, expected)
    assert steps(output) == steps(expected)
    return output


def steps(x: torch.Tensor) -> list[int]:
    """Strides of the axes that have more than one entry."""
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]


slow = pytest.mark.slow


@pytest.mark.parametrize(("original", "shape"), KERNELS, ids=[str(c[0]) for c in KERNELS])
@pytest.mark.parametrize(
    ("weight_bits", "bits", "zero_point"),
    [
        *itertools.product((4, 8), (8,), (0, 201, 255)),
        *((4, 6, 40), (8, 6, 40), (4, 12, 2049), (8, 16, 65535), (4, 16, 65535)),
        *((2, 8, 0), (2, 6, 40), (5, 8, 255), (5, 12, 2049), (15, 8, 201), (15, 16, 65535)),
    ],
)
def test_a_layer_has_the_bits_of_the_simulation(original, shape, weight_bits, bits, zero_point):
    layer = layer_of(original, weight_bits, bits, (zero_point,))
    check(layer, (random(*shape) * 2).to(FLOATS[(weight_bits + zero_point) % 3]))


@pytest.mark.parametrize(
    ("weight_bits", "top"), [(4, 15), (8, 127), pytest.param(15, 16383, marks=slow)]
)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("x", [-1e6, 1e6])
@pytest.mark.parametrize("zero_point", [0, 128, 255])
def test_the_largest_products_do_not_saturate(weight_bits, top, sign, x, zero_point):
    for original, shape in [
        (nn.Conv2d(64, 16, 3, padding=1), (1, 64, 3, 3)),
        (nn.Linear(640, 16), (3, 640)),
    ]:
        weight = torch.full(original.weight.shape, sign * top)
        layer = layer_of(original, weight_bits, 8, (zero_point,), weight=weight)
        check(layer, torch.full(shape, x))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("original", "shape"), [KERNELS[0], KERNELS[3], KERNELS[-1]])
def test_smoothing_shift_and_bias_correction_by_group(original, shape, bits):
    out, channels = original.weight.shape[:2]
    extras = {
        "smoothing": random(channels, seed=3).abs() + 0.2,
        "shift": random(channels, seed=4),
        "bias_correction": random(2, out, seed=5),
    }
    layer = layer_of(original, 4, bits, (7, 2**bits - 20), **extras)
    x, outputs = random(*shape) * 2, []
    for group in (0, 1, 0):
        layer.step.group = group
        outputs.append(check(layer, x))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("group", [4, 16])
def test_a_rotated_layer(group):
    original = nn.Linear(64, 48)
    layer = layer_with_weight_of(original, 4, 8)
    factor = SmoothingFactor(torch.ones(64), 0, rotation=group)
    tensors = dict(layer.named_buffers()) | factor.tensors()
    layer = QuantizedLayer(original, tensors, 4, 8, layer.step, layers.compute)
    check(layer, random(2, 9, 64).bfloat16())


def test_any_order_in_memory():
    layer = layer_of(nn.Conv2d(6, 5, 3, padding=1), 4, 8, (7,))
    x = random(2, 6, 8, 10)
    for image in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:, :, ::2, ::3]):
        check(layer, image)
    check(layer_of(nn.Linear(6, 5)), random(2, 6, 9).transpose(1, 2))


def test_no_rows():
    for original, shape in [
        (nn.Conv2d(6, 5, 3, padding=1), (0, 6, 8, 8)),
        (nn.Linear(6, 5), (0, 6)),
    ]:
        check(layer_of(original), random(*shape))


def test_what_is_kept_and_freed():
    layer, x = layer_of(nn.Linear(6, 5)), random(3, 6)
    check(layer, x)
    kept = layer.prepared[layers.KERNEL]
    check(layer, x)
    assert layer.prepared[layers.KERNEL] is kept
    layers.forget_kernel(layer)
    assert layers.KERNEL not in layer.prepared
    layer.low_memory = True
    check(layer, x)
    assert layers.KERNEL not in layer.prepared


@st.composite
def cases(draw):
    """A layer, an input: odd sizes, kernels that reach over the border, any zero-point."""
    channels, outputs = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    weight_bits = draw(st.sampled_from([2, 3, 4, 6, 8, 15]))
    bits = draw(st.sampled_from([2, 5, 8, 9, 16]))
    zero_point = draw(st.integers(0, 2**bits - 1))
    dtype = draw(st.sampled_from(FLOATS))
    if draw(st.booleans()):
        original: nn.Linear | nn.Conv2d = nn.Linear(channels, outputs, bias=draw(st.booleans()))
        shape = (draw(st.integers(1, 70)), channels)
    else:
        side, dilation = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 2))
        least = dilation * (side - 1) + 1
        padding = draw(st.integers(0, side - 1))
        stride = draw(st.integers(1, 3))
        form = {"stride": stride, "padding": padding, "dilation": dilation}
        original = nn.Conv2d(channels, outputs, side, **form, bias=draw(st.booleans()))
        shape = (draw(st.integers(1, 2)), channels, *(draw(st.integers(least, 9)) for _ in "hw"))
    smoothing = random(channels).abs() + 0.1 if draw(st.booleans()) else None
    layer = layer_of(original, weight_bits, bits, (zero_point,), smoothing=smoothing)
    spread = draw(st.sampled_from([0.01, 1.0, 30.0]))
    return layer, (random(*shape, seed=channels) * spread).to(dtype)


def tried(examples: int):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@tried(12)
@given(cases())
def test_whatever_the_layer_it_has_the_bits_of_the_simulation(case):
    check(*case)


@pytest.mark.slow
@tried(150)
@given(cases())
def test_many_layers_have_the_bits_of_the_simulation(case):
    check(*case)


@pytest.mark.parametrize(
    "name",
    [
        "fashion-dit",
        *(pytest.param(name, marks=slow) for name in ("fashion-ldm", "fashion-ddpm", "emoji-ldm")),
    ],
)
def test_every_layer_shape_of_a_packaged_model(name):
    """With the model's own weights and inputs, W4A8 or W8A8 by turns, one image."""
    model, seen = load_model(f"zoo:{name}"), {}

    def remember(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        shape = type(module), module.weight.shape, inputs[0].shape, getattr(module, "stride", None)
        seen.setdefault(shape, (module, inputs[0]))

    found = weight_layers(model.denoiser).values()
    hooks = [layer.register_forward_pre_hook(remember) for layer in found]
    denoiser = full_denoiser(model)
    with torch.no_grad():
        condition = model.condition(model.labels([0], "all"))
    denoiser(random(1, *model.latent_shape), torch.tensor(500), condition)
    for hook in hooks:
        hook.remove()
    assert len(seen) >= 9
    for index, (module, x) in enumerate(seen.values()):
        check(layer_with_weight_of(module, 4 + 4 * (index % 2), 8), x)


# ---- whole models -------------------------------------------------------------------------------


def test_a_whole_denoiser_has_the_bits_of_the_simulation(sampled_shallow):
    """All that calibrate and quantize made of a tiny model, at two timesteps, with conditions."""
    model = load_model(str(sampled_shallow.parent / "model"))
    artifact = artifacts.read(sampled_shallow / "runs/tiny/quantized.safetensors", "quantized")
    predictions = []
    with torch.no_grad():
        condition = model.condition(model.labels([0, 1], "all"))
    for backend in (layers.NAME, "simulate"):
        denoiser = quantized_denoiser(model, artifact, backend, True)
        found = [m for m in denoiser.module.modules() if isinstance(m, QuantizedLayer)]
        assert len(found) > 20
        x = random(2, *model.latent_shape)
        predictions.append([denoiser(x, torch.tensor(t), condition) for t in (900, 100)])
        kept = [layers.KERNEL in layer.prepared for layer in found]
        assert any(kept) is all(kept) is (backend == layers.NAME)
    for prediction, expected in zip(*predictions, strict=True):
        assert prediction.std() > 0.01
        assert torch.equal(prediction, expected)


def on_fake_gpu(tensor: torch.Tensor) -> torch.Tensor:
    form = tensor.shape, tensor.stride()
    return torch.empty_strided(*form, dtype=tensor.dtype, device="cuda")


def test_a_denoiser_on_a_gpu_leaves_it_nowhere(sampled_shallow):
    """On a fake CUDA device, where an operator that mixes devices is an error: layers, attention,
    norms and cached embeddings; the prediction alone comes back."""
    model = load_model(str(sampled_shallow.parent / "model"))
    artifact = artifacts.read(sampled_shallow / "runs/tiny/quantized.safetensors", "quantized")
    denoiser = quantized_denoiser(model, artifact, layers.NAME, True)
    with torch.no_grad():
        condition = model.condition(model.labels([0, 1], "all"))
    input_scale_first()  # tries a product on this machine's CPU
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for module in denoiser.module.modules():
            for name, tensor in [*module.named_parameters(recurse=False)]:
                fake = nn.Parameter(on_fake_gpu(tensor), requires_grad=False)
                module.register_parameter(name, fake)
            for name, tensor in [*module.named_buffers(recurse=False)]:
                module.register_buffer(name, on_fake_gpu(tensor))
        denoiser._device = torch.device("cuda", 0)
        inputs = {name: on_fake_gpu(tensor) for name, tensor in condition.items()}
        prediction = denoiser(torch.empty(2, *model.latent_shape), 500.0, inputs)
    found = [m for m in denoiser.module.modules() if isinstance(m, QuantizedLayer)]
    assert all(layer.prepared[layers.KERNEL][0].codes.is_cuda for layer in found)
    assert prediction.shape == (2, *model.latent_shape)
    assert prediction.device.type == "cpu"


# ---- what it cannot do --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("original", "bits", "reason"),
    [
        (nn.Conv2d(6, 5, 3, padding="same"), (8, 8), "padding same is given by name"),
        (nn.Conv2d(8, 4, 3, groups=2), (8, 8), "in 2 groups"),
        (nn.Linear(66400, 1), (8, 8), "may not fit 32 bits"),
    ],
)
def test_a_layer_that_integers_cannot_do_is_simulated(original, bits, reason):
    layer = layer_of(original, *bits)
    assert reason in layers.why_not(layer)
    channels = original.weight.shape[1] * getattr(original, "groups", 1)
    x = random(2, channels, 8, 8) if layer.is_conv else random(2, channels)
    assert torch.equal(layers.compute(layer, x), simulate(layer, x))


def refusal(device: str) -> BackendUnavailable:
    with pytest.raises(BackendUnavailable, match="backend cuda-int8: ") as caught:
        base.get_backend(layers.NAME, device)
    assert "--backend simulate" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 6
    return caught.value


def test_where_it_is_unavailable_simulate_is_named(monkeypatch):
    assert "TRITON_INTERPRET=1 interprets kernels on the CPU alone" in str(refusal("cuda"))
    assert base.get_backend(layers.NAME, "cpu").name == layers.NAME
    monkeypatch.delenv(layers.INTERPRET)
    assert "the model is on cpu" in str(refusal("cpu"))
    if not torch.cuda.is_available():
        assert "no CUDA device" in str(refusal("cuda")) or "without CUDA" in str(refusal("cuda"))
    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in str(refusal("cuda"))


def test_architectures_without_a_product_of_bytes_are_refused():
    assert layers._too_old((7, 5)) == "it needs sm_80 or newer, this GPU is sm_75"
    assert [layers._too_old(c) for c in ((8, 0), (8, 9), (9, 0), (12, 0))] == [""] * 4


def test_auto_never_takes_it():
    assert base.get_backend("auto", "cpu").name in ("int8", "simulate")
    assert base.get_backend("auto", "cuda").name == "simulate"


def test_too_little_memory_is_one_line(monkeypatch):
    def full(*operands, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB")

    monkeypatch.setattr(layers.ops, "BYTES", full)
    with pytest.raises(
        BackendUnavailable, match="too little memory .*--backend simulate"
    ) as caught:
        layers.compute(layer_of(nn.Linear(6, 5)), random(3, 6))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 6


def test_the_command_line_says_so(sampled_shallow, monkeypatch):
    monkeypatch.delenv(layers.INTERPRET)
    folder = sampled_shallow
    result = Qncd(folder)("sample", "--num", "2", "--backend", layers.NAME, "--name", "g", ok=False)
    assert result.exit_code == 6
    assert "its kernels are for NVIDIA's GPUs, the model is on cpu" in result.stderr
    assert "--backend simulate" in result.stderr
    assert not (folder / "runs/tiny/samples/g").exists()
