import pytest
import torch
from torch import nn

from qncd_cli.backends.reference import simulate
from qncd_cli.quant.affine import choose_qparams
from qncd_cli.quant.layers import CachedTimestepLayer, QuantizedLayer, StepState
from qncd_cli.quant.packing import pack
from qncd_cli.quant.rounding import round_nearest
from qncd_cli.quant.smoothing import fold
from qncd_cli.spec import activation_spec, weight_spec


def quantized(layer, factor=None, weight_bits=4, activation_bits=8, groups=1):
    """The layer as the quantize stage makes it, with ranges that cover [-4, 4] (group g: x 2^g)."""
    tensors = {"bias": layer.bias.detach()}
    weight = layer.weight.detach()
    if factor is not None:
        weight, tensors["smoothing"] = fold(weight, factor), factor
    if weight_bits == 32:
        tensors["weight"] = weight
    else:
        rounded = round_nearest(weight, weight_spec(weight_bits))
        tensors["weight"] = pack(rounded.codes, weight_bits)
        tensors["weight_scale"] = rounded.qparams.scale
        if weight_bits < 8:
            tensors["weight_zero_point"] = rounded.qparams.zero_point.to(torch.uint8)
    if activation_bits != 32:
        top = 4.0 * 2.0 ** torch.arange(groups)
        qparams = choose_qparams(-top, top, activation_spec(activation_bits))
        tensors["input_scale"], tensors["input_zero_point"] = qparams
    step = StepState()
    return QuantizedLayer(layer, tensors, weight_bits, activation_bits, step, simulate), step


LAYERS = [
    (nn.Conv2d(6, 5, 3, padding=1), (2, 6, 7, 7)),
    (nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 8, 8)),
    (nn.Conv2d(6, 5, 1), (2, 6, 4, 4)),
    (nn.Linear(6, 5), (2, 9, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_with_quantization_off_the_smoothed_layer_is_the_layer(layer, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factor = torch.rand(6, generator=torch.Generator().manual_seed(1)) * 5 + 0.2
    smoothed, _ = quantized(layer, factor, weight_bits=32, activation_bits=32)
    expected = layer(x)
    assert (smoothed(x) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 8), (4, 6)])
def test_simulation_is_what_integer_arithmetic_computes(layer, shape, weight_bits, activation_bits):
    """Integer codes multiplied in float64 and scaled afterwards, against the simulation."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factor = torch.rand(6, generator=torch.Generator().manual_seed(1)) + 0.5
    q, _ = quantized(layer, factor, weight_bits, activation_bits)
    qparams, spec = q.input_qparams(), activation_spec(activation_bits)
    shaped = factor.reshape(1, -1, 1, 1) if q.is_conv else factor
    codes = torch.round((x / shaped) / qparams.scale) + qparams.zero_point
    codes = codes.clamp(spec.qmin, spec.qmax).double() - qparams.zero_point
    weight = q.integer_weight()
    assert weight.dtype == torch.int8
    if q.is_conv:
        total = nn.functional.conv2d(codes, weight.double(), None, layer.stride, layer.padding)
        scale = q.weight_scale.reshape(1, -1, 1, 1).double()
        bias = layer.bias.detach().reshape(1, -1, 1, 1).double()
    else:
        total = codes @ weight.double().T
        scale, bias = q.weight_scale.double(), layer.bias.detach().double()
    expected = total * scale * qparams.scale.double() + bias
    assert (q(x) - expected).norm() <= 1e-5 * expected.norm()


def test_ranges_follow_the_timestep_group():
    layer, shape = LAYERS[0]
    q, step = quantized(layer, groups=2)
    x = torch.full(shape, 7.0)
    step.group = 1
    wide = q(x)
    step.group = 0
    narrow = q(x)  # clipped at 4
    assert torch.allclose(narrow, q(torch.full(shape, 4.0)), atol=0.2)
    assert (wide - narrow).abs().max() > 0.5


def test_output_has_the_input_dtype():
    q, _ = quantized(*LAYERS[0][:1])
    assert q(torch.zeros(LAYERS[0][1], dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("weight_bits", [4, 8, 32])
def test_half_a_model_keeps_the_layers_scales(weight_bits):
    """model.half() and the like: the layer's tensors keep their types, its outputs follow the
    input."""
    q, _ = quantized(LAYERS[3][0], torch.rand(6) + 0.5, weight_bits)
    x = torch.randn(LAYERS[3][1]).half()
    before, expected = {name: b.clone() for name, b in q.named_buffers()}, q(x)
    model = nn.Sequential(q, nn.Linear(5, 2)).half()
    assert model[1].weight.dtype == torch.float16
    for name, buffer in q.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    assert torch.equal(q(x), expected)
    assert model(x).dtype == torch.float16
    assert {buffer.device.type for buffer in q.to("meta").buffers()} == {"meta"}


def test_a_cached_layer_is_evaluated_once_per_timestep():
    calls = []

    class Counting(nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    original, step = Counting(4, 3), StepState(timestep=981.0)
    cached = CachedTimestepLayer(original, step)
    x = torch.randn(1, 4).expand(5, 4)
    first, second = cached(x), cached(x)
    assert calls == [1]
    assert torch.equal(first, second)
    assert torch.allclose(first, nn.functional.linear(x, original.weight, original.bias))
    step.timestep = 961.0
    assert torch.allclose(
        cached(x * 2), nn.functional.linear(x * 2, original.weight, original.bias)
    )
    assert calls == [1, 1]
