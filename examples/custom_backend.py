"""A backend in fifteen lines, compared with the oracle on every layer of an exported folder.

    python examples/custom_backend.py exported/my-model --prompt "a red bicycle"

A backend computes (layer, x) -> output. The layer holds the integers; what they mean is fixed, so
two backends agree to float rounding on the same input (relative error below 1e-5).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

import qncd_cli.exported  # noqa: F401  (diffusers can load the folder from now on)
from qncd_cli.backends.base import BACKENDS, Backend, get_backend
from qncd_cli.quant.affine import fake_quantize
from qncd_cli.quant.layers import QuantizedLayer


def compute(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """The layer in plain floating point: rounded input times the weight that its codes stand for.

    x: [N, C, H, W] or [..., C], any float type; the output has the same type.
    """
    y = layer.smoothed(x.float())  # (x - shift) / S
    if layer.input_spec is not None:  # None: the input stays float
        y = fake_quantize(y, layer.input_qparams(), layer.input_spec)
    weight, bias = layer.float_weight(), layer.bias_now()
    if layer.is_conv:
        places = layer.stride, layer.padding, layer.dilation, layer.groups
        return F.conv2d(y, weight, bias, *places).to(x.dtype)
    return F.linear(y, weight, bias).to(x.dtype)


BACKENDS["plain"] = Backend("plain", compute, "plain floating point, an example")


def compare(denoiser: torch.nn.Module) -> dict[str, float]:
    """From now on every layer is computed by both; the largest relative difference, by layer."""
    mine, oracle = get_backend("plain"), get_backend("simulate")
    found: dict[str, float] = {}
    for name, layer in denoiser.named_modules():
        if not isinstance(layer, QuantizedLayer):
            continue

        def both(layer: QuantizedLayer, x: Tensor, name: str = name) -> Tensor:
            output, expected = mine.compute(layer, x), oracle.compute(layer, x)
            difference = (output - expected).norm() / expected.norm().clamp(min=1e-30)
            found[name] = max(found.get(name, 0.0), float(difference))
            return output

        layer.compute = both
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (default: 4)")
    options = parser.parse_args()

    pipeline = DiffusionPipeline.from_pretrained(str(options.folder))
    parts = pipeline.components
    found = compare(parts.get("transformer") or parts["unet"])
    pipeline(
        prompt=options.prompt,
        num_inference_steps=options.steps,
        generator=torch.Generator().manual_seed(0),
    )
    worst = max(found, key=lambda name: found[name])
    print(f"{len(found)} layers; largest relative difference {found[worst]:.1e} ({worst})")


if __name__ == "__main__":
    main()
