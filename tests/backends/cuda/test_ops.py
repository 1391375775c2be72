"""The operators of cuda-int8: their fakes, and layers in torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from qncd_cli.backends.cuda import layers, ops
from qncd_cli.backends.cuda.layers import compute

from ..test_int8 import layer_of, random

CASES = [
    (nn.Conv2d(6, 5, 3, padding=1, stride=2), (2, 6, 9, 8)),
    (nn.Conv2d(6, 5, 1), (2, 6, 4, 4)),
    (nn.Linear(6, 5), (2, 9, 6)),
]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("original", "shape"), CASES, ids=[str(c[0]) for c in CASES])
def test_fakes_have_the_form_of_what_they_stand_for(original, shape, dtype, bits):
    layer, x = layer_of(original, 4, bits), random(*shape).to(dtype)
    expected = compute(layer, x)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with fakes:
        fake = compute(layer, fakes.from_tensor(x))
    assert (fake.shape, fake.dtype) == (expected.shape, expected.dtype)
    assert fake.stride() == expected.stride()


def test_the_operators_keep_torchs_rules():
    layer, x = layer_of(nn.Conv2d(6, 5, 3, padding=1)), random(2, 6, 5, 4)
    scale, zero_point = layer.input_qparams()
    quantizer = (None, None, scale, zero_point, 8)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.BYTES, (x, True, *quantizer), test_utils=tests)
    low, _ = ops.BYTES(x, True, *quantizer)
    (weight,) = layers.prepare(layer)
    operands = (low, weight.codes, None, weight.scale, weight.sums, layer.bias, scale, zero_point)
    operands = (*operands, layers.geometry(layer), torch.float16)
    following = {"next_scale": scale, "next_zero_point": zero_point, "next_bits": 8}
    for options in ({}, {"residual": random(2, 5, 4, 5).half()}, following):
        torch.library.opcheck(ops.BYTE_PRODUCT, operands, options, test_utils=tests)
    assert ops.BYTE_PRODUCT(*operands, **following).dtype == torch.int8


def test_a_residual_may_lie_anyhow_in_memory():
    layer, residual = layer_of(nn.Linear(6, 5)), random(3, 5)
    scale, zero_point = layer.input_qparams()
    low, _ = ops.BYTES(random(3, 6), False, None, None, scale, zero_point, 8)
    (weight,) = layers.prepare(layer)
    operands = (low, weight.codes, None, weight.scale, weight.sums, layer.bias, scale, zero_point)
    found = ops.BYTE_PRODUCT(*operands, [], torch.float32, residual=residual)
    apart = torch.stack([residual, residual], -1)[..., 0]
    assert not apart.is_contiguous()
    assert torch.equal(ops.BYTE_PRODUCT(*operands, [], torch.float32, residual=apart), found)
    assert torch.equal(found, ops.BYTE_PRODUCT(*operands, [], torch.float32) + residual)


@pytest.mark.parametrize("bits", [8, 16])
def test_torch_compile_takes_layers_in_one_graph(bits):
    """Whole, without breaks, its operators opened by AOT autograd; group by group."""
    model = nn.Sequential(
        layer_of(nn.Conv2d(6, 8, 3, padding=1), 4, bits, (9, 40)),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        layer_of(nn.Conv2d(8, 5, 1), 8, bits, (9, 40), smoothing=random(8).abs() + 0.3),
        nn.Flatten(2),
        layer_of(nn.Linear(20, 7), 4, bits, (9, 40)),
    )
    step = model[0].step
    for module in model:
        if hasattr(module, "compute"):
            module.compute, module.step = compute, step
    x, outputs = random(2, 6, 4, 5), []
    with torch.no_grad():
        model(x)  # prepares the weights
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for step.group in (0, 1):
            outputs.append(compiled(x))
            assert torch.equal(outputs[-1], model(x))
    assert not torch.equal(*outputs)
