"""int8 and simulate compute the same bits, layer by layer and over whole models, uncompiled.

Small matrices (a handful of rows) and grouped convolutions take other kernels of oneDNN, which
scale in another order, and of weights of two bytes the sums of wide layers exceed what float32
holds on the way: these agree to float rounding (test_int8.py).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from qncd_cli.backends import int8, reference
from qncd_cli.backends.compiled import graph, ops
from qncd_cli.backends.reference import simulate
from qncd_cli.bench import table
from qncd_cli.config.loading import parse_config
from qncd_cli.models.loading import load_model
from qncd_cli.quant.affine import choose_qparams
from qncd_cli.quant.layers import QuantizedLayer, StepState
from qncd_cli.quant.packing import pack
from qncd_cli.quant.rounding import round_nearest
from qncd_cli.quant.smoothing import SmoothingFactor
from qncd_cli.runtime.denoiser import guided_predict, quantized_denoiser
from qncd_cli.sampling.noise import generators_for
from qncd_cli.sampling.samplers import denoise, make_scheduler
from qncd_cli.spec import activation_spec, weight_spec
from qncd_cli.stages import calibrate, quantize

why = int8.why_unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(bool(why), reason=why)

LAYERS = [
    (nn.Conv2d(64, 96, 3, padding=1), (3, 64, 8, 8)),
    (nn.Conv2d(700, 40, 3, padding=1, stride=2, bias=False), (2, 700, 6, 6)),
    (nn.Conv2d(48, 64, 1), (2, 48, 9, 9)),
    (nn.Linear(320, 128), (2, 64, 320)),
    (nn.Linear(2560, 64, bias=False), (2, 40, 2560)),
]


def layer_of(original: nn.Conv2d | nn.Linear, weight_bits: int, bits: int) -> QuantizedLayer:
    """Its input reaches from -1 to 3."""
    rounded = round_nearest(original.weight.detach(), weight_spec(weight_bits))
    low, high = torch.tensor([-1.0]), torch.tensor([3.0])
    scale, zero_point = choose_qparams(low, high, activation_spec(bits))
    tensors = {
        "weight": pack(rounded.codes, weight_bits),
        "weight_scale": rounded.qparams.scale,
        "input_scale": scale,
        "input_zero_point": zero_point,
    }
    if weight_bits < 8:
        tensors["weight_zero_point"] = rounded.qparams.zero_point.to(torch.uint8)
    if original.bias is not None:
        tensors["bias"] = original.bias.detach()
    return QuantizedLayer(original, tensors, weight_bits, bits, StepState(), int8.compute)


@pytest.mark.parametrize("group", [4, 16, 64])
def test_a_rotated_layer_has_the_same_bits_eager_traced_and_simulated(operators, group):
    original = nn.Linear(320, 128)
    plain = layer_of(original, 4, 4)
    factor = SmoothingFactor(torch.ones(320), 0, rotation=group)
    rounded = round_nearest(factor.fold(original.weight.detach()), weight_spec(4))
    tensors = dict(plain.named_buffers()) | factor.tensors()
    tensors |= {"weight": pack(rounded.codes, 4), "weight_scale": rounded.qparams.scale}
    tensors["weight_zero_point"] = rounded.qparams.zero_point.to(torch.uint8)
    layer = QuantizedLayer(original, tensors, 4, 4, StepState(), int8.compute)
    x, layers = torch.randn(2, 64, 320), {f"rotated:{id(layer)}": layer}
    expected = simulate(layer, x)
    assert torch.equal(layer(x), expected)
    ops.register(layers)
    tables = graph.Tables(layer)
    layer.step.traced = tables.cut(tables.values[0])
    assert torch.equal(ops._traced(*layers)(layer, x), expected)
    layer.step.traced = None
    error = (layer(x) - original(x)).square().mean() / original(x).square().mean()
    assert error < 0.15


@pytest.mark.parametrize(("original", "shape"), LAYERS, ids=[str(case[0]) for case in LAYERS])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("bits", [6, 8, 16])
def test_a_layer(original, shape, weight_bits, bits):
    layer = layer_of(original, weight_bits, bits)
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output, expected = layer(x), simulate(layer, x)
    assert torch.equal(output, expected)
    assert output.stride() == expected.stride()


PADDED = [
    (nn.Conv2d(64, 96, 3, padding=1), (2, 64, 7, 9)),
    (nn.Conv2d(40, 48, (3, 5), padding=(2, 1), stride=2, bias=False), (2, 40, 9, 12)),
    (nn.Conv2d(40, 48, 3, padding=2, dilation=2), (1, 40, 9, 9)),
]


@pytest.mark.parametrize(("original", "shape"), PADDED, ids=[str(case[0]) for case in PADDED])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("bits", [8, 16])
def test_rows_of_padding_that_are_added_before_change_no_bit(
    operators, monkeypatch, original, shape, weight_bits, bits
):
    """Eager and in a graph, where oneDNN is slow to pad: here by a clock that says so."""
    times = itertools.cycle([0.0, 9.0, 9.0, 18.0, 0.0, 7.0, 7.0, 14.0])
    monkeypatch.setattr(int8, "LARGE_ROW", 1)
    monkeypatch.setattr(int8.time, "perf_counter", lambda: next(times))
    layer = layer_of(original, weight_bits, bits)
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = simulate(layer, x)
        assert torch.equal(layer(x), expected)
        kernel = layer.prepared[int8.KERNEL]
        assert kernel.rows == original.padding[0] and kernel.geometry[1] == [0, original.padding[1]]
        key, tables = f"padded:{id(layer)}", graph.Tables(layer)
        ops.register({key: layer})
        layer.step.traced = tables.cut(tables.values[0])
        assert torch.equal(ops._traced(key)(layer, x), expected)


@pytest.mark.parametrize(
    ("original", "low_memory", "tried"),
    [
        (nn.Conv2d(16, 384, 3, padding=1), False, True),
        (nn.Conv2d(16, 384, (11, 3), padding=1), False, True),  # taller than what is tried
        (nn.Conv2d(16, 384, 3, padding=1), True, False),  # its kernel is made at every call
        (nn.Conv2d(16, 376, 3, padding=1), False, False),
        (nn.Conv2d(16, 384, 1), False, False),
        (nn.Conv2d(16, 384, (1, 3), padding=(0, 1)), False, False),
    ],
)
@pytest.mark.parametrize("slow", [False, True])
def test_padding_is_timed_where_rows_are_large(monkeypatch, original, low_memory, tried, slow):
    longer = 1.3 if slow else 1.2
    times = itertools.cycle([0.0, 9.0, 10.0, 10.0 + longer, 0.0, 1.0, 5.0, 8.0])
    asked: list[float] = []
    monkeypatch.setattr(int8.time, "perf_counter", lambda: asked.append(next(times)) or asked[-1])
    layer = layer_of(original, 8, 8)
    layer.low_memory = low_memory
    with torch.no_grad():
        layer(torch.randn(1, 16, 12, 128))
    assert len(asked) == 8 * tried
    if tried:
        assert layer.prepared[int8.KERNEL].rows == slow


@pytest.mark.parametrize("inputs", [200, 700, 9000])
def test_sums_are_exact_whatever_their_size(inputs):
    """In one piece, in nibbles, in doubles: the integer, rounded once to float32."""
    layer = layer_of(nn.Linear(inputs, 8, bias=False), 8, 8)
    draw = torch.Generator().manual_seed(inputs)
    weight = torch.randint(100, 128, (8, inputs), generator=draw)
    x = torch.randint(200, 256, (5, inputs), generator=draw)
    part = reference._part(weight, torch.ones(8))
    ways = [part.reach < reference.EXACT, part.reach_in_nibbles < reference.EXACT]
    assert ways == [inputs == 200, inputs < 9000]
    assert torch.equal(reference._sums(layer, x.float(), part), (x @ weight.T).float())


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("fashion-ldm", (4, 8)),
        ("fashion-ldm", (8, 8)),
        ("fashion-ldm", (4, 6)),
        pytest.param("emoji-ldm", (4, 8), marks=pytest.mark.slow),
    ],
)
def test_a_packaged_model_draws_the_same_latents(name, widths):
    model = load_model(f"zoo:{name}")
    source = parse_config({"model": {"source": model.source}}, "test")
    config = table.quick_config(source, widths)
    artifact = quantize.run(config, model, *calibrate.run(config, model)).quantized
    scheduler, seeds = make_scheduler("ddim", model.scheduler_config), list(range(4))
    drawn = []
    for backend in ("int8", "simulate"):
        denoiser = quantized_denoiser(model, artifact, backend, True)
        predict = guided_predict(model, denoiser, model.labels(seeds, "all"), 3.0)
        drawn.append(denoise(predict, scheduler, 6, generators_for(seeds), model.latent_shape))
    assert drawn[0].std() > 0.1
    assert torch.equal(*drawn)
