"""fp8 files, plain and scaled, in ComfyUI's conventions."""

from __future__ import annotations

import json

import pytest
import torch

from qncd_cli.errors import ModelError
from qncd_cli.models.fp8 import plain_numbers

PARTS = ("model.diffusion_model.", "text_encoders.t5xxl.transformer.")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
UNET, T5 = PARTS


def weight(rows=3, dtype=E4M3):
    return torch.linspace(-4, 5, rows * 2).reshape(rows, 2).to(dtype)


def marked(kind):
    return torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)


def read(tensors, header=None):
    return plain_numbers("m.safetensors", tensors, header or {}, PARTS)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_plain_fp8_is_a_cast_and_exact(dtype):
    """As flux1-dev-fp8 is: every number says what it is, biases too."""
    tensors = {f"{UNET}a.weight": weight(dtype=dtype), f"{UNET}a.bias": torch.ones(3).to(dtype)}
    found = read(tensors)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name, tensor in tensors.items():
        assert torch.equal(found[name].float(), tensor.float())


@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 1)])
def test_scaled_fp8_is_multiplied_in_float32(end, shape):
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.1
    tensors = {
        f"{UNET}scaled_fp8": torch.empty(0, dtype=E4M3),
        f"{UNET}a.weight": weight(),
        f"{UNET}a.{end}": scale,
        f"{UNET}a.scale_input": torch.ones(1),
        f"{UNET}a.bias": torch.ones(3),
    }
    found = read(tensors)
    assert found.keys() == {f"{UNET}a.weight", f"{UNET}a.bias"}
    expected = weight().float() * (scale.reshape(-1, 1) if scale.numel() == 3 else scale.item())
    torch.testing.assert_close(found[f"{UNET}a.weight"], expected, rtol=1e-7, atol=0)


def test_layers_that_are_marked_are_scaled_whoever_says_it():
    tensors = {f"{UNET}a.weight": weight(), f"{UNET}a.weight_scale": torch.tensor(2.0)}
    header = {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "float8_e4m3fn"}}})}
    for found in (
        read({**tensors, f"{UNET}a.comfy_quant": marked("float8_e4m3fn")}),
        read(tensors, header),
    ):
        assert torch.equal(found[f"{UNET}a.weight"], weight().float() * 2)


@pytest.mark.parametrize("how", ["mark", "layer mark", "a fellow's scale"])
def test_scaled_fp8_without_a_scale_is_refused(how):
    tensors = {f"{UNET}a.weight": weight(), f"{T5}b.weight": weight()}
    tensors |= {
        "mark": {f"{UNET}scaled_fp8": torch.empty(0, dtype=E4M3)},
        "layer mark": {f"{UNET}a.comfy_quant": marked("float8_e4m3fn")},
        "a fellow's scale": {f"{UNET}c.weight": weight(), f"{UNET}c.scale_weight": torch.ones(1)},
    }[how]
    with pytest.raises(ModelError, match=r"is scaled fp8, 1 tensor without a scale \(.*a\.weight"):
        read(tensors)


def test_one_part_may_be_scaled_and_another_plain():
    tensors = {
        f"{UNET}scaled_fp8": torch.empty(0, dtype=E4M3),
        f"{UNET}a.weight": weight(),
        f"{UNET}a.scale_weight": torch.tensor(3.0),
        f"{T5}b.weight": weight(),
    }
    found = read(tensors)
    assert torch.equal(found[f"{T5}b.weight"].float(), weight().float())
    assert torch.equal(found[f"{UNET}a.weight"], weight().float() * 3)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a.weight": torch.ones(2, 2, dtype=torch.int8)}, "1 tensor in int8"),
        (
            {"a.weight": weight(), "a.comfy_quant": marked("nvfp4")},
            r"a is quantized already \(nvfp4\)",
        ),
        ({"a.weight": torch.ones(2, 2), "a.scale_weight": torch.ones(1)}, "has a scale but is"),
        ({"a.weight": weight(), "a.weight_scale": torch.ones(2, 2)}, r"\[3, 2\], is \[2, 2\]"),
        ({"a.weight": weight(), "a.comfy_quant": torch.ones(3)}, "comfy_quant cannot be read"),
    ],
)
def test_other_quantized_weights_are_one_line(tensors, said):
    with pytest.raises(ModelError, match=said) as error:
        read(tensors)
    assert "\n" not in str(error.value)


def test_a_header_that_cannot_be_read_is_one_line():
    with pytest.raises(ModelError, match="_quantization_metadata cannot be read"):
        read({"a.weight": weight()}, {"_quantization_metadata": "{}"})
