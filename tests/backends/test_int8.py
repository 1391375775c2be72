"""Integer kernels compute what the simulation says, on machines that have them."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from conftest import Qncd
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from qncd_cli.backends import base, int8, onednn
from qncd_cli.backends.compiled import graph, ops
from qncd_cli.backends.reference import simulate
from qncd_cli.errors import BackendUnavailable
from qncd_cli.quant.affine import QParams, quantize, quantize_two_bytes, quantize_uint8
from qncd_cli.quant.layers import QuantizedLayer, StepState
from qncd_cli.quant.packing import pack
from qncd_cli.spec import activation_spec

CPU = torch.device("cpu")
needs_int8 = pytest.mark.skipif(
    bool(int8.why_unavailable(CPU)), reason=f"no int8 here: {int8.why_unavailable(CPU)}"
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(
    original: nn.Conv2d | nn.Linear,
    weight_bits: int = 8,
    activation_bits: int = 8,
    zero_points: tuple[int, ...] = (3,),
    weight: Tensor | None = None,
    smoothing: Tensor | None = None,
    **more: Tensor,
) -> QuantizedLayer:
    """Random codes, scales and bias. weight: q - zero_point instead, within reach of the codes;
    more: shift, bias_correction."""
    generator = torch.Generator().manual_seed(1)
    shape = original.weight.shape
    out = len(original.weight)
    tensors = {
        "weight_scale": torch.rand(out, generator=generator) * 0.01 + 0.001,
        "input_scale": 0.037
        / 2.0 ** (torch.arange(len(zero_points)) + max(0, activation_bits - 8)),
        "input_zero_point": torch.tensor(zero_points, dtype=torch.int32),
    }
    if original.bias is not None:
        tensors["bias"] = torch.randn(out, generator=generator)
    if smoothing is not None:
        tensors["smoothing"] = smoothing
    tensors |= more
    if weight_bits >= 8:
        top = 2 ** (weight_bits - 1) - 1
        codes = torch.randint(-top, top + 1, shape, generator=generator)
        codes = codes if weight is None else weight
        tensors["weight_scale"] /= 2 ** (weight_bits - 8)
    else:
        low = torch.where(torch.arange(out) % 3 == 0, 0, 7)
        low[-1] = 2**weight_bits - 1
        tensors["weight_zero_point"] = low.to(torch.uint8)
        codes = torch.randint(0, 2**weight_bits, shape, generator=generator)
        if weight is not None:
            tensors["weight_zero_point"] = (weight.flatten(1)[:, 0] < 0).to(torch.uint8) * 15
            codes = (weight >= 0).int() * 15
    tensors["weight"] = pack(codes.to(torch.int32), weight_bits)
    step = StepState()
    return QuantizedLayer(original, tensors, weight_bits, activation_bits, step, int8.compute)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


CASES = [
    (nn.Conv2d(6, 5, 3, padding=1), (2, 6, 9, 8)),
    (nn.Conv2d(6, 5, 3, stride=2, padding=1, bias=False), (2, 6, 9, 8)),
    (nn.Conv2d(6, 5, 3, stride=2), (2, 6, 9, 8)),
    (nn.Conv2d(6, 5, 1), (2, 6, 4, 4)),
    (nn.Conv2d(6, 5, 3, padding=(2, 0), dilation=2), (1, 6, 9, 8)),
    (nn.Conv2d(8, 4, 3, padding=1, groups=2), (2, 8, 6, 6)),
    (nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 6, 6)),
    (nn.Conv2d(64, 96, 3, padding=1), (3, 64, 8, 8)),
    (nn.Linear(6, 5), (2, 9, 6)),
    (nn.Linear(64, 33, bias=False), (7, 64)),
]


# ---- codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 6, 8])
@pytest.mark.parametrize("scale", [1.0, 0.037, 0.25, 3.1e-4])
def test_fast_codes_are_those_of_the_oracle(bits, scale):
    """Ties, both ends, both zeros and infinities included; every zero-point."""
    halves = torch.arange(-600, 601) / 2
    x = torch.cat([halves * scale, random(5000) * 40 * scale, torch.tensor([-0.0, 1e30, -1e30])])
    x = torch.cat([x, torch.tensor([math.inf, -math.inf])])
    scale_tensor = torch.tensor(scale)
    for zero_point in range(2**bits):
        qparams = QParams(scale_tensor, torch.tensor(zero_point, dtype=torch.int32))
        codes = quantize_uint8(x, float(scale_tensor), zero_point, bits)
        assert codes.dtype == torch.uint8
        assert torch.equal(codes.int(), quantize(x, qparams, activation_spec(bits)))


@pytest.mark.parametrize("bits", [9, 12, 16])
@pytest.mark.parametrize("zero_point", [0, 1, 255, 256, 511, -1])
def test_fast_codes_of_two_bytes_are_those_of_the_oracle(bits, zero_point):
    """zero_point: -1 stands for the largest code."""
    scale, zero_point = torch.tensor(3.1e-4), zero_point % 2**bits
    halves = torch.arange(-(2 ** (bits + 2)), 2 ** (bits + 2)) / 2
    ends = torch.tensor([-0.0, 1e30, -1e30, math.inf, -math.inf])
    x = torch.cat([halves * scale, random(5000) * 2**bits * scale, ends])
    low, high = quantize_two_bytes(x, float(scale), zero_point, bits)
    assert low.dtype == high.dtype == torch.uint8
    qparams = QParams(scale, torch.tensor(zero_point, dtype=torch.int32))
    expected = quantize(x, qparams, activation_spec(bits))
    assert torch.equal(256 * high.int() + low.int(), expected)


def test_fast_codes_leave_their_input_alone_and_keep_its_order():
    x = random(2, 3, 4, 5).to(memory_format=torch.channels_last)
    before = x.clone()
    for codes in (quantize_uint8(x, 0.1, 3, 8), *quantize_two_bytes(x, 0.1, 300, 16)):
        assert torch.equal(x, before)
        assert codes.is_contiguous(memory_format=torch.channels_last)


# ---- layers -------------------------------------------------------------------------------------


@needs_int8
@pytest.mark.parametrize(("original", "shape"), CASES, ids=[str(c[0]) for c in CASES])
@pytest.mark.parametrize("weight_bits", [4, 8, 15])
@pytest.mark.parametrize(("activation_bits", "zero_point"), [(8, 0), (8, 201), (8, 255), (6, 40)])
def test_a_layer_is_what_the_simulation_says(
    original, shape, weight_bits, activation_bits, zero_point
):
    layer = layer_of(original, weight_bits, activation_bits, (zero_point,))
    x = random(*shape) * 2
    assert int8.why_not(layer) == ""
    output, expected = layer(x), simulate(layer, x)
    assert output.dtype == torch.float32
    assert output.shape == expected.shape
    assert relative(output, expected) < 1e-6
    assert int8.KERNEL in layer.prepared


@needs_int8
@pytest.mark.parametrize(("original", "shape"), CASES, ids=[str(c[0]) for c in CASES])
@pytest.mark.parametrize("weight_bits", [4, 8, 15])
@pytest.mark.parametrize(
    ("activation_bits", "zero_point"), [(9, 300), (12, 0), (12, 2049), (16, 33003), (16, 65535)]
)
def test_inputs_of_two_bytes_are_what_the_simulation_says(
    original, shape, weight_bits, activation_bits, zero_point
):
    layer = layer_of(original, weight_bits, activation_bits, (zero_point,))
    spec = activation_spec(activation_bits)
    x = random(*shape) * 2
    codes = quantize(x, layer.input_qparams(), spec)
    assert int(codes.max()) - int(codes.min()) > 150
    assert int8.why_not(layer) == ""
    assert relative(layer(x), simulate(layer, x)) < 1e-5
    assert int8.KERNEL in layer.prepared


@needs_int8
def test_more_bits_are_a_finer_input():
    """Both passes count, the high byte for 256 times the low one."""
    original, shape = CASES[7]
    x, errors = random(*shape) * 0.8, []  # well inside the range
    for bits, zero_point in ((8, 128), (12, 2048), (16, 32768)):
        layer = layer_of(original, 8, bits, (zero_point,))
        exact = nn.functional.conv2d(x, layer.float_weight(), layer.bias, padding=1)
        errors.append(relative(layer(x), exact))
    assert errors[1] < errors[0] / 10
    assert errors[2] < errors[1] / 10


@needs_int8
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize(("original", "shape"), [CASES[3], CASES[8], CASES[9]])
def test_shift_and_bias_correction_by_group(original, shape, activation_bits):
    out, channels = original.weight.shape[:2]
    zero_points = (7, 2**activation_bits - 20)
    extras = {
        "smoothing": random(channels, seed=3).abs() + 0.2,
        "shift": random(channels, seed=4),
        "bias_correction": random(2, out, seed=5),
    }
    layer = layer_of(original, 4, activation_bits, zero_points, **extras)
    x, outputs = random(*shape) * 2, []
    for group in (0, 1, 0):
        layer.step.group = group
        outputs.append(layer(x))
        assert relative(outputs[-1], simulate(layer, x)) < 1e-5
        plain = layer_of(original, 4, activation_bits, zero_points, smoothing=extras["smoothing"])
        plain.step.group = group
        axis = [1, -1, 1, 1] if layer.is_conv else [-1]
        corrected = plain(x - extras["shift"].reshape(axis))
        corrected = corrected + extras["bias_correction"][group].reshape(axis)
        assert relative(outputs[-1], corrected) < 1e-5
    assert torch.equal(outputs[0], outputs[2])
    assert relative(outputs[0], outputs[1]) > 0.1


@needs_int8
@pytest.mark.parametrize("channels_last", [False, True])
def test_smoothing_strides_batch_size_and_timestep_group(channels_last):
    """The weight is prepared at the first call; what changes afterwards has to be followed."""
    factor = torch.rand(6, generator=torch.Generator().manual_seed(2)) * 4 + 0.2
    layer = layer_of(nn.Conv2d(6, 5, 3, padding=1), 4, 8, (7, 230), smoothing=factor)
    for group, batch, size in [(0, 2, 8), (1, 5, 8), (0, 1, 6), (1, 1, 1)]:
        layer.step.group = group
        x = random(batch, 6, size, size, seed=batch)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        assert relative(layer(x), simulate(layer, x)) < 1e-6
    linear = layer_of(nn.Linear(6, 5), smoothing=factor)
    x = random(2, 6, 9).transpose(1, 2)
    assert relative(linear(x), simulate(linear, x)) < 1e-6


@needs_int8
@pytest.mark.parametrize("bits", [4, 15])
@pytest.mark.parametrize("activation_bits", [6, 8, 16])
@pytest.mark.parametrize(("original", "shape"), CASES, ids=[str(c[0]) for c in CASES])
def test_what_a_graph_is_traced_from_is_what_the_layer_computes(
    operators, original, shape, activation_bits, bits
):
    """Bit for bit, at every timestep group; the operator's fake has the output's layout."""
    out, channels = original.weight.shape[0], shape[1] if len(shape) == 4 else shape[-1]
    zero_points = (7, 2**activation_bits - 20)
    extras = {"shift": random(channels, seed=4), "bias_correction": random(2, out, seed=5)}
    factor = random(channels, seed=3).abs() + 0.2
    layer = layer_of(original, bits, activation_bits, zero_points, smoothing=factor, **extras)
    x, layers = random(*shape) * 2, {f"test:{id(layer)}": layer}
    x = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
    ops.register(layers)
    codes, tables = layer.weight, graph.Tables(layer)
    for group in (0, 1):
        layer.step.group = group
        expected = layer(x)
        layer.step.traced = tables.cut(tables.values[group])
        assert torch.equal(ops._traced(*layers)(layer, x), expected)
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        with ops.traceable(layer, layers), fakes:
            fake = layer(fakes.from_tensor(x))
        layer.step.traced = None
        assert fake.shape == expected.shape
        assert fake.dtype == expected.dtype
        assert fake.stride() == expected.stride()
    assert layer.weight is codes


@needs_int8
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("original", "shape"), CASES, ids=[str(c[0]) for c in CASES])
def test_half_precision_is_the_float32_result_rounded_once(original, shape, dtype, activation_bits):
    layer = layer_of(original, 4, activation_bits, (7, 2**activation_bits - 20))
    x = (random(*shape) * 2).to(dtype)
    assert torch.equal(layer(x), layer(x.float()).to(dtype))


@needs_int8
@pytest.mark.skipif(not onednn.writes_bfloat16(), reason="oneDNN writes no bfloat16 here")
@pytest.mark.parametrize("slow", [False, True])
def test_a_kernel_that_is_slow_to_round_is_rounded_for(monkeypatch, slow):
    """Tried once per layer, on the clock; the bits are the same."""
    layer = layer_of(nn.Conv2d(64, 96, 3, padding=1), 4)
    x, now, asked = random(2, 64, 8, 8).bfloat16(), [0.0], []
    monkeypatch.setattr(int8, "WORTH_A_TRIAL", 1)
    monkeypatch.setattr(int8.time, "perf_counter", lambda: now[0])
    real = int8._pass

    def timed(*operands, **named):
        output = real(*operands, **named)
        asked.append(output.dtype)
        now[0] += 9.0 if slow and output.dtype == torch.bfloat16 else 1.0
        return output

    monkeypatch.setattr(int8, "_pass", timed)
    assert torch.equal(layer(x), layer(x.float()).bfloat16())
    assert torch.equal(layer(x), layer(x.float()).bfloat16())
    chosen = torch.float32 if slow else torch.bfloat16
    assert asked[4:] == [chosen, torch.float32, chosen, torch.float32]


@needs_int8
@pytest.mark.parametrize(("weight_bits", "top"), [(4, 15), (8, 127), (15, 16383)])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("x", [-1e6, 1e6])
@pytest.mark.parametrize(("bits", "zero_point"), [(8, 0), (8, 128), (8, 255), (7, 0), (7, 127)])
def test_the_largest_products_do_not_saturate(weight_bits, top, sign, x, bits, zero_point):
    """All codes at one end, all weights at one end: sums are exact up to the final scaling."""
    for original, shape in [
        (nn.Conv2d(128, 16, 3, padding=1), (1, 128, 4, 4)),
        (nn.Linear(512, 16), (3, 512)),
    ]:
        weight = torch.full(original.weight.shape, sign * top)
        layer = layer_of(original, weight_bits, bits, (zero_point,), weight=weight)
        assert int(layer.integer_weight().unique()) == sign * top
        codes = (2**bits - 1 if x > 0 else 0) - zero_point
        inner = layer(torch.full(shape, x))
        inner = inner[:, :, 1, 1] if layer.is_conv else inner
        exact = weight[0].numel() * codes * sign * top
        expected = exact * layer.weight_scale.double() * layer.input_scale.double() + layer.bias
        torch.testing.assert_close(inner.double(), expected.expand_as(inner), rtol=1e-6, atol=1e-5)


@needs_int8
def test_threads_change_nothing():
    layers = [
        (layer_of(nn.Conv2d(64, 64, 3, padding=1), 4), random(4, 64, 8, 8)),
        (layer_of(nn.Linear(128, 96)), random(64, 128)),
    ]
    before = torch.get_num_threads()
    try:
        for layer, x in layers:
            outputs = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                int8.forget_kernel(layer)
                outputs.append(layer(x))
            assert torch.equal(*outputs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("original", "bits", "reason"),
    [
        (nn.Conv2d(6, 5, 3, padding="same"), (8, 8), "padding same is given by name"),
        (nn.Linear(6, 5), (8, 32), "input is not quantized"),
    ],
)
def test_a_layer_that_integers_cannot_do_is_simulated(original, bits, reason):
    layer = layer_of(original, *bits)
    assert reason in int8.why_not(layer)
    x = random(2, 6, 8, 8) if layer.is_conv else random(2, 6)
    assert torch.equal(layer(x), simulate(layer, x))


# ---- choice -------------------------------------------------------------------------------------


@pytest.fixture
def switched_off(monkeypatch):
    monkeypatch.setenv(int8.SWITCH, "1")


def test_the_switch_turns_int8_off(switched_off):
    with pytest.raises(BackendUnavailable, match="backend int8: switched off by QNCD_DISABLE_INT8"):
        base.get_backend("int8")
    chosen = base.get_backend("auto")
    assert chosen.name == "simulate"
    assert "int8: switched off" in chosen.remark


@needs_int8
def test_auto_takes_int8_on_the_cpu_only():
    assert base.get_backend("auto").name == "int8"
    assert base.get_backend("auto", "cuda").name == "simulate"
    with pytest.raises(BackendUnavailable, match="the model is on cuda"):
        base.get_backend("int8", "cuda")


def test_without_avx2_there_is_only_slow_reference_code(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    assert "without AVX2" in onednn.why_unusable.__wrapped__()


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(BackendUnavailable, match="auto, int8, simulate"):
        base.get_backend("int4")


# ---- the whole model ----------------------------------------------------------------------------


@pytest.fixture
def work(sampled, tmp_path) -> Qncd:
    return Qncd(shutil.copytree(sampled, tmp_path / "work"))


def manifest(work: Qncd, name: str) -> dict:
    return json.loads((work.folder / f"runs/tiny/samples/{name}/manifest.json").read_text())


def sample_of(work: Qncd, name: str) -> tuple[Tensor, Tensor]:
    """Images in [0, 255] and latents."""
    folder = work.folder / "runs/tiny/samples" / name
    images = [Image.open(path) for path in sorted(folder.glob("*.png"))]
    flat = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images]
    return torch.stack(flat).double(), load_file(folder / "latents.safetensors")["latents"]


@needs_int8
def test_both_backends_draw_the_same_images(work):
    for name in ("int8", "simulate"):
        result = work("sample", "--num", "4", "--backend", name, "--name", name)
        assert f"backend {name}: " in result.stderr
        assert manifest(work, name)["backend"] == name
    (images, latents), (expected, expected_latents) = (
        sample_of(work, name) for name in ("int8", "simulate")
    )
    assert torch.equal(latents, expected_latents)
    assert torch.equal(images, expected)


def test_an_unavailable_backend_is_one_line_and_auto_goes_on(work, switched_off):
    failed = work("sample", "--num", "2", "--backend", "int8", "--name", "a", ok=False)
    assert failed.exit_code == 6
    assert failed.stderr.startswith("Error: backend int8: switched off")
    assert len(failed.stderr.splitlines()) == 1
    result = work("sample", "--num", "2", "--name", "b")
    assert "backend simulate: " in result.stderr
    assert "; int8: switched off" in result.stderr
    assert manifest(work, "b")["backend"] == "simulate"


def test_a_set_of_one_backend_is_not_continued_by_another(work, request):
    work("sample", "--num", "2", "--name", "set", "--backend", "int8")
    request.getfixturevalue("switched_off")
    failed = work("sample", "--num", "3", "--name", "set", ok=False)
    assert failed.exit_code == 4
    assert "(backend: int8 -> simulate)" in failed.stderr
