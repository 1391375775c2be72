"""What a ComfyUI file holds of one layer, and what an independent reader makes of it."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from oracles import comfyui_file
from torch import nn

from qncd_cli.backends.reference import simulate
from qncd_cli.export.comfyui_layers import Held, bias_of, by_rows, held, joined, swapped
from qncd_cli.quant.affine import QParams
from qncd_cli.quant.layers import QuantizedLayer, StepState
from qncd_cli.quant.packing import pack
from qncd_cli.quant.rotation import rotate

OUT, IN = 6, 32


def layer_of(bits=8, inputs=8, rotation=0, zero_points=None, **tensors) -> QuantizedLayer:
    """A linear layer of random codes."""
    generator = torch.Generator().manual_seed(bits + rotation)
    low, high = (-127, 128) if bits == 8 else (0, 2**bits)
    codes = torch.randint(low, high, (OUT, IN), generator=generator)
    found = {"weight": pack(codes, bits), "weight_scale": torch.rand(OUT, generator=generator) + 1}
    if bits < 8:
        found["weight_zero_point"] = torch.tensor(zero_points or range(OUT), dtype=torch.uint8)
    if rotation:
        found |= {"smoothing": torch.ones(IN), "rotation": torch.tensor([rotation])}
    found |= QParams(torch.tensor([0.05]), torch.tensor([128]))._asdict()
    found["input_scale"], found["input_zero_point"] = found.pop("scale"), found.pop("zero_point")
    found["bias"] = torch.randn(OUT, generator=generator)
    return QuantizedLayer(nn.Linear(IN, OUT), found | tensors, bits, inputs, StepState(), simulate)


def read(part: Held) -> torch.Tensor:
    parts = {name: tensor.clone() for name, tensor in part.tensors().items()}
    mark = json.loads(bytes(parts.pop("comfy_quant").tolist()))
    return comfyui_file.weight_of(mark, parts)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("rotation", [0, 4, 16])
def test_codes_are_kept_exactly(bits, rotation):
    layer = layer_of(bits, rotation=rotation)
    part = held(layer)
    assert part.format == "int8_tensorwise"
    assert torch.equal(part.tensors()["weight"], layer.integer_weight())
    assert torch.equal(part.rotated(), layer.float_weight())
    wanted = layer.float_weight()
    wanted = rotate(wanted, rotation) if rotation else wanted
    assert torch.allclose(read(part), wanted, rtol=0, atol=1e-6 * wanted.abs().max())
    assert torch.equal(read(part), wanted) or rotation


def test_four_bits_are_packed_where_one_codebook_is_enough():
    layer = layer_of(4, rotation=16, zero_points=[8] * OUT)
    part = held(layer)
    assert part.format == "asym_w4a8_int8"
    assert torch.equal(part.tensors()["weight"].view(torch.uint8), layer.weight)
    assert torch.allclose(read(part), rotate(layer.float_weight(), 16), rtol=0, atol=1e-5)
    if importlib.util.find_spec("comfy_kitchen") is not None:
        from comfy_kitchen.tensor.w4a8_int8 import dequantize_w4a8_int8_weight

        stored = part.tensors()
        theirs = dequantize_w4a8_int8_weight(
            stored["weight"],
            stored["weight_s_rel"],
            stored["weight_s_channel"],
            codebook=stored["weight_codebook"],
            group_size=16,
            convrot_groupsize=16,
            output_dtype=torch.float32,
        )
        assert torch.allclose(theirs, read(part), rtol=0, atol=1e-5)


def test_what_no_format_holds_is_float():
    factor = torch.rand(IN) + 0.5
    smoothed = layer_of(8, smoothing=factor)
    assert held(smoothed).format == "bfloat16"
    wanted = (smoothed.float_weight() / factor).to(torch.bfloat16).float()
    assert torch.allclose(held(smoothed).dequantized(), wanted)
    assert held(layer_of(15)).why == "its codes have two bytes"


def test_a_shift_is_taken_out_of_the_bias():
    x, shift = torch.randn(5, IN), torch.randn(IN)
    factor = torch.rand(IN) + 0.5
    layer = layer_of(8, smoothing=factor, shift=shift)
    exact = nn.functional.linear((x - shift) / factor, layer.float_weight(), layer.bias)
    ours = nn.functional.linear(x, layer.float_weight() / factor, bias_of(layer))
    assert torch.allclose(exact, ours, rtol=1e-4, atol=1e-3)


def test_corrections_of_the_bias_are_averaged():
    correction = torch.randn(3, OUT)
    layer = layer_of(8, bias_correction=correction)
    assert torch.allclose(bias_of(layer), layer.bias + correction.mean(0))


def test_layers_that_are_alike_are_joined_and_others_are_float():
    eight, four, wide = layer_of(8), layer_of(4), layer_of(15)
    both = joined([held(eight), held(four)])
    assert both.format == "int8_tensorwise"
    assert torch.equal(read(both), torch.cat([eight.float_weight(), four.float_weight()]))
    mixed = joined([held(eight), held(wide)])
    assert mixed.format == "bfloat16"
    assert torch.equal(mixed.weight, torch.cat([eight.float_weight(), wide.float_weight()]))
    rotated = joined([held(eight), held(layer_of(8, rotation=4))])
    assert rotated.format == "bfloat16"
    halves = eight.float_weight().chunk(2)
    assert torch.equal(read(swapped(held(eight))), torch.cat(halves[::-1]))


@pytest.mark.parametrize(("inputs", "rotation"), [(8, 0), (8, 4), (16, 0)])
def test_rows_are_quantized_as_comfy_kitchen_does_it(inputs, rotation):
    layer = layer_of(8, inputs, rotation)
    x = torch.randn(7, IN) * torch.logspace(-3, 3, 7)[:, None]
    found = by_rows(layer, x)
    bias = layer.bias.to(torch.bfloat16).float()
    exact = nn.functional.linear(x, read(held(layer)), bias)
    error = (found - exact).norm(dim=1) / exact.norm(dim=1)
    assert (error < (1e-5 if inputs == 16 else 0.02)).all()
    assert inputs == 16 or (error > 1e-4).any()
    if inputs == 8 and importlib.util.find_spec("comfy_kitchen") is not None:
        import comfy_kitchen as ck

        stored = held(layer).tensors()
        theirs = ck.int8_linear(
            x,
            stored["weight"],
            stored["weight_scale"],
            bias,
            torch.float32,
            convrot=bool(rotation),
            convrot_groupsize=rotation or 256,
        )
        assert torch.allclose(found, theirs, rtol=1e-3, atol=1e-4 * exact.abs().max())
