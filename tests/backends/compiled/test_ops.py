"""The operators of compiled graphs, in C++, against the same in torch."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qncd_cli.backends import int8, onednn
from qncd_cli.backends.compiled import fusion, graph, ops, upsampled_conv
from qncd_cli.quant.attention import AttentionProducts, softmax_codes
from qncd_cli.quant.layers import QuantizedLayer, StepState
from qncd_cli.quant.packing import pack

pytestmark = pytest.mark.timeout(300)  # whichever test is first waits for the compiler
EPS = 1e-5


def image(*shape, dtype=torch.float32):
    x = (3 * torch.randn(shape) + 5).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def number_of(low, high):
    return low.long() + (256 * high.long() if high.numel() else 0)


def quantizer(bits, channels=0):
    """smoothing, shift, scale, zero-point, bits."""
    scale, zero_point = torch.tensor([8.0 / 2**bits]), torch.tensor([float(2 ** (bits - 2))])
    if not channels:
        return None, None, scale, zero_point, bits
    return torch.rand(channels) + 0.5, torch.randn(channels), scale, zero_point, bits


def close(codes, expected, share):
    """Codes may part by one, where a number lies at the border of two, and seldom do."""
    assert codes.shape == expected.shape
    apart = (codes - expected).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() <= share


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((2, 48, 16, 16), [48]),
        ((3, 40, 7, 5), [24, 16]),
        ((17, 16, 3, 1), [16]),
        ((1, 72, 20, 20), [72]),
    ],
)
def test_images_are_normalized_and_quantized(operators, shape, parts, dtype, bits):
    torch.manual_seed(0)
    count, channels = shape[:2]
    x = [image(count, width, *shape[2:], dtype=dtype) for width in parts]
    weight, bias = torch.randn(channels), torch.randn(channels)
    embedding, multiplier, addend = (torch.randn(count, channels, 1, 1) for _ in range(3))
    smooth = quantizer(bits, channels)
    before = (embedding.to(dtype), weight, bias, multiplier, addend, 8, EPS, True)
    low, high = operators.image_codes(x, *before, *smooth)
    exact = torch.cat(x, 1).double() + embedding.to(dtype).double()
    exact = F.group_norm(exact, 8, weight.double(), bias.double(), EPS)
    exact = F.silu(exact * multiplier + addend).float()
    expected = number_of(*ops.codes(exact, True, *smooth))
    assert low.is_contiguous(memory_format=torch.channels_last)
    close(number_of(low, high), expected, 0.02 if bits == 16 else 1e-3)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("smoothed", [False, True])
def test_images_without_a_norm_have_the_very_codes(operators, bits, smoothed):
    torch.manual_seed(0)
    x = [image(3, width, 9, 4) for width in (24, 40)]
    others = quantizer(bits, 64 if smoothed else 0)
    found = operators.image_codes(x, *fusion._NO_NORM, *others)
    expected = ops.codes(torch.cat(x, 1), True, *others)
    assert torch.equal(number_of(*found), number_of(*expected))


@pytest.mark.parametrize(("bits", "scales"), [(2, 400), (8, 400), (16, 8)])
def test_no_code_differs_where_two_meet(operators, bits, scales):
    """Where the quotient is half of an odd number, and a few floats to either side of it."""
    torch.manual_seed(0)
    halves = torch.arange(-(2**bits), 2**bits).double() + 0.5
    zero_point = torch.tensor([float(2 ** (bits - 1))])
    for scale in torch.exp2(40 * torch.rand(scales) - 30).reshape(-1, 1):
        x = (halves * scale.double()).float()
        rows = [x]
        for direction in (torch.inf, -torch.inf):
            near = x
            for _ in range(3):
                near = torch.nextafter(near, torch.tensor(direction))
                rows.append(near)
        given = torch.stack(rows)[None, :, :, None]
        others = (None, None, scale, zero_point, bits)
        found = operators.image_codes([given], *fusion._NO_NORM, *others)
        assert torch.equal(number_of(*found), number_of(*ops.codes(given, True, *others)))


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e4])
def test_what_no_code_can_hold_has_the_nearest(operators, scale):
    x = torch.tensor([torch.inf, 3e38, 1e30 * scale, -1e30 * scale, -3e38, -torch.inf])
    others = (None, None, torch.tensor([scale]), torch.tensor([100.0]), 8)
    low, _ = operators.image_codes([x.reshape(1, 1, -1, 1)], *fusion._NO_NORM, *others)
    assert low.flatten().tolist() == [255, 255, 255, 0, 0, 0]


def test_a_mean_far_from_zero_costs_no_digits(operators):
    torch.manual_seed(0)
    x = image(2, 16, 12, 12) + 1000
    weight, bias = torch.ones(16), torch.zeros(16)
    low, high = operators.image_codes(
        [x], None, weight, bias, None, None, 4, EPS, False, *quantizer(8)
    )
    exact = F.group_norm(x.double(), 4, eps=EPS).float()
    close(number_of(low, high), number_of(*ops.codes(exact, True, *quantizer(8))), 0.01)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_rows_are_quantized(operators, dtype, bits):
    torch.manual_seed(0)
    x = torch.randn(3, 11, 2 * 40).to(dtype)
    others = quantizer(bits, 40)
    first, second = x.double().chunk(2, -1)
    expected = ops.codes((first * F.gelu(second)).float(), False, *others)
    found = operators.gated_codes(x, *others)
    close(number_of(*found), number_of(*expected), 0.02 if bits == 16 else 1e-3)


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(5,), (3, 701)])
def test_a_product_gated_in_parts_has_the_codes_of_the_whole(
    operators, rows, dtype, activation_bits
):
    torch.manual_seed(0)
    layer = quantized(nn.Linear(16, 1040), 4, activation_bits)
    key = f"gated:{activation_bits}"
    ops.register({key: layer})
    zero = layer.input_zero_point.float()
    of_input = (layer.input_scale, zero, activation_bits)
    low, high = ops.codes(torch.randn(*rows, 16), False, None, None, *of_input)
    product = low, high if high.numel() else None, *of_input[:2], layer.bias, key, dtype
    for bits in (8, 16):
        others = quantizer(bits, 520)
        found = operators.gated_product_codes(*product, *others)
        expected = operators.gated_codes(operators.multiply(*product), *others)
        assert found[0].shape == (*rows, 520)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_gated_product_that_others_need_is_made_whole(operators):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.out = quantized(nn.Linear(16, 64), 4), quantized(nn.Linear(32, 16), 4)

        def forward(self, x):
            rows = self.gate(x)
            first, second = rows.chunk(2, dim=-1)
            return self.out(first * F.gelu(second)), rows

    torch.manual_seed(0)
    module, x = Two(), torch.randn(3, 5, 16)
    _, program = program_of(module, (x,))
    called = [str(node.target) for node in program.graph.nodes]
    assert called.count("qncd.gated_codes.default") == 1
    with torch.no_grad():
        for found, expected in zip(program.module()(x), module(x), strict=True):
            assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 77), (700, 1024), (40, 20_000)])
def test_attention_of_bytes_is_that_of_the_layers(operators, queries, keys, bits):
    """But for probabilities between two codes; also of more keys than a thread holds scores."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randint(-128, 128, (3, n, 24), dtype=torch.int8) for n in (queries, keys, keys)
    )
    shift = torch.randint(-20_000, 20_000, (3, keys), dtype=torch.int32)
    factor = torch.tensor([3e-4])
    found, totals = operators.byte_attention(query, key, value, shift, factor, bits)
    p, expected_totals = softmax_codes(int8.matmul(query, key.transpose(1, 2)), shift, factor, bits)
    expected = int8.matmul(p, value)
    assert found.shape == expected.shape and totals.shape == expected_totals.shape
    moved = 128 * (keys // 500 + 1)  # one code in some hundreds may be the next one
    assert int((found - expected).abs().max()) <= moved
    assert int((totals - expected_totals).abs().max()) <= keys // 500 + 1


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (19, 77), (300, 1000), (40, 20_000)])
def test_attention_is_that_of_the_layers(operators, queries, keys, bits):
    """Also of more keys than a thread holds scores; but for probabilities between two codes."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 24) for n in (queries, keys, keys))
    key = key.transpose(1, 2).contiguous().transpose(1, 2)
    made = AttentionProducts({}, 32, bits, StepState(), 0.3)
    found = operators.attention(query, key, value, 0.3, bits)
    expected = made.products(query, key, value, None)
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < (1e-5 if bits == 32 else 5e-3)


def test_attention_in_a_graph_is_by_the_operator_where_it_is_large(operators):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = StepState()
            self.attention = AttentionProducts({}, 32, 8, self.step, 0.3, matmul=int8.matmul)

        def forward(self, small, large):
            products = self.attention.products
            return products(small, small, small, None), products(large, large, large, None)

    torch.manual_seed(0)
    module, inputs = Both(), (torch.randn(1, 2, 16, 8), torch.randn(1, 2, 512, 8))
    module.step.traced = {}
    with ops.traceable(module, {}), torch.no_grad():
        program = fusion.fused(torch.export.export(module, inputs, strict=False))
    module.step.traced = None
    assert module.attention.attention is None
    called = [str(node.target) for node in program.graph.nodes]
    assert called.count("qncd.attention.default") == 1
    with torch.no_grad():
        for found, expected in zip(program.module()(*inputs), module(*inputs), strict=True):
            assert float((found - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 30.0, 1e4])
def test_activation_functions_at_their_ends(operators, magnitude):
    """Neither a vanishing nor a huge input may turn into something else."""
    x = magnitude * torch.linspace(-1, 1, 64).reshape(1, 1, -1)
    scale = torch.tensor([magnitude / 2**14])
    others = (None, None, scale, torch.tensor([2.0**15]), 16)
    found = operators.gated_codes(torch.cat([torch.ones_like(x), x], -1), *others)
    expected = ops.codes(F.gelu(x.double()).float(), False, *others)
    close(number_of(*found), number_of(*expected), 0.1)


def test_no_code_depends_on_the_number_of_threads(operators):
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    x, weight, bias = image(3, 32, 30, 30), torch.randn(32), torch.randn(32)
    before, found = (None, weight, bias, None, None, 8, EPS, True), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(operators.image_codes([x], *before, *quantizer(16)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(number_of(*one), number_of(*found[0])) for one in found)


def quantized(module, bits, activation_bits=8, zero_point=0):
    """The layer with random codes, of which every extreme occurs.

    Scales are powers of two: in whatever order a kernel applies them, it gives the same bits.
    """
    shape = module.weight.shape
    codes = torch.randint(0, 2**bits, shape).to(torch.uint8 if bits < 8 else torch.int8)
    codes.flatten()[:2] = torch.tensor([0, 2**bits - 1])
    tensors = {
        "weight": pack(codes, bits),
        "weight_scale": 2.0 ** torch.randint(-9, -6, shape[:1]),
        "weight_zero_point": torch.full((shape[0],), zero_point, dtype=torch.int32),
        "bias": torch.randn(shape[0]),
        "input_scale": torch.tensor([8.0 / 2**activation_bits]),
        "input_zero_point": torch.tensor([2 ** (activation_bits - 2)], dtype=torch.int32),
    }
    return QuantizedLayer(module, tensors, bits, activation_bits, StepState(), int8.compute)


@pytest.mark.parametrize("activation_bits", [4, 8, 16])
@pytest.mark.parametrize(("bits", "zero_point"), [(2, 1), (4, 0), (4, 8), (5, 0), (5, 31)])
def test_pixels_doubled_later_give_the_same_bits(operators, bits, zero_point, activation_bits):
    torch.manual_seed(0)
    layer = quantized(nn.Conv2d(24, 20, 3, padding=1), bits, activation_bits, zero_point)
    key = f"doubled:{bits}:{zero_point}:{activation_bits}"
    ops.register({key: layer})
    x = image(3, 24, 7, 5)
    scale, zero = layer.input_scale, layer.input_zero_point.float()
    low, high = ops.codes(x, True, None, None, scale, zero, activation_bits)
    high = high if high.numel() else None
    beyond = bits == 5 and activation_bits >= 8  # of what is exact without VNNI
    assert upsampled_conv.doubles(layer) != (beyond and onednn.saturates())
    found = operators.multiply(low, high, scale, zero, layer.bias, key, torch.float32, True)
    doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
    if upsampled_conv.doubles(layer):
        assert torch.equal(found, layer(doubled))
    else:  # in a graph of another CPU: sums of parts are as exact, rounded once more
        torch.testing.assert_close(found, layer(doubled), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("module", "bits"),
    [
        (nn.Conv2d(8, 8, 3, padding=1), 6),
        (nn.Conv2d(8, 8, 3, padding=1, stride=2), 4),
        (nn.Conv2d(8, 8, 3), 4),
        (nn.Conv2d(8, 8, 3, padding=1, groups=2), 4),
        (nn.Conv2d(8, 8, 1), 4),
        (nn.Linear(8, 8), 4),
    ],
)
def test_other_layers_are_not_doubled_later(module, bits):
    assert not upsampled_conv.doubles(quantized(module, bits))


class Block(nn.Module):
    """What a denoiser is made of, around quantized layers."""

    def __init__(self, scaled: bool):
        super().__init__()
        self.scaled = scaled
        self.norm, self.other_norm = nn.GroupNorm(4, 24), nn.GroupNorm(4, 16)
        self.first = quantized(nn.Conv2d(24, 16, 3, padding=1), 4)
        self.second = quantized(nn.Conv2d(16, 16, 3, padding=1), 4, 16)
        self.shortcut = quantized(nn.Conv2d(24, 16, 1), 4)
        self.upsampler = quantized(nn.Conv2d(16, 16, 3, padding=1), 4)
        self.gate, self.out = quantized(nn.Linear(16, 64), 4), quantized(nn.Linear(32, 16), 4)

    def forward(self, x, skip, embedding):
        x = torch.cat([x, skip], 1)
        y = self.first(F.silu(self.norm(x)))
        scale, shift = embedding[:, :, None, None].chunk(2, 1)
        if self.scaled:
            y = self.other_norm(y) * (1 + scale) + shift
        else:
            y = self.other_norm(y + scale)
        y = self.second(F.dropout(F.silu(y), 0.5, False)) + self.shortcut(x)
        y = self.upsampler(F.interpolate(y, scale_factor=2.0, mode="nearest"))
        rows = self.gate(y.flatten(2).transpose(1, 2))
        first, second = rows.chunk(2, dim=-1)
        return self.out(first * F.gelu(second))


def program_of(module, inputs):
    """Traced and fused, with the tables' rows as constants."""
    layers = {f"{id(module)}:{n}": m for n, m in module.named_modules() if n and "norm" not in n}
    step = StepState()
    for layer in layers.values():
        layer.step = step
    ops.register(layers)
    tables = graph.Tables(module)
    step.traced = tables.cut(tables.values[0])
    try:
        with ops.traceable(module, layers), torch.no_grad():
            return tables, fusion.fused(torch.export.export(module, inputs, strict=False))
    finally:
        step.traced = None


@pytest.mark.parametrize("scaled", [False, True])
def test_a_fused_graph_computes_what_the_layers_do(operators, scaled):
    torch.manual_seed(0)
    module = Block(scaled)
    inputs = image(3, 16, 8, 8), image(3, 8, 8, 8), torch.randn(3, 32)
    _, program = program_of(module, inputs)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called.count("qncd.image_codes.default") == 3
    assert called.count("qncd.gated_product_codes.default") == 1
    assert called.count("qncd.multiply.default") == 5  # but that of the gate
    assert not any(name in called for name in ("aten.upsample_nearest2d.vec", "aten.gelu.default"))
    with torch.no_grad():
        expected, found = module(*inputs), program.module()(*inputs)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_layers_that_quantize_one_input_alike_do_it_once(operators):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = quantized(nn.Linear(8, 4), 4), quantized(nn.Linear(8, 4), 4)
            self.b.input_scale = self.a.input_scale
            self.b.input_zero_point = self.a.input_zero_point

        def forward(self, x):
            return self.a(x) + self.b(x)

    tables, program = program_of(Two(), (torch.randn(2, 8),))
    assert tables.values.shape == (1, 2)  # one scale, one zero-point
    called = [str(node.target) for node in program.graph.nodes]
    assert called.count("aten.round.default") == 1


def test_a_layer_that_is_collected_during_a_trace_is_forgotten_behind_the_tracer_s_back(operators):
    """The collector runs whenever it likes; torch's operators answer to whoever traces."""
    seen = []

    class Tracer(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    layers = {f"collected {i}": QuantizedLayer.__new__(QuantizedLayer) for i in range(3)}
    for layer in layers.values():
        nn.Module.__init__(layer)
    ops.register(layers)
    with Tracer():
        layers.clear()
        layer = None
        gc.collect()
    assert layer is None and not seen
    assert not any(key.startswith("collected") for key in ops._layers)
