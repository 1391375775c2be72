#!/usr/bin/env python
"""Milliseconds of products of bytes on this CPU, beside float32, at shapes of LDM-4.

    python scripts/product_times.py

Sums of GPTQ: products of an input's codes with themselves, as bytes (`integers`) and in parts of
float32 (`floats`), which one the quantizer takes here. Layers: one call of the int8 backend with
weights of 4 and 8 bits and inputs of 8, of the simulation, and of the layer in float32. All are
timed in turn; what is told is the median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import click
import torch
from torch import Tensor, nn

from qncd_cli.backends import int8, onednn
from qncd_cli.backends.reference import simulate
from qncd_cli.cli import process
from qncd_cli.machine import described
from qncd_cli.quant.integer_products import fast_in_integers, integer_product
from qncd_cli.quant.layers import QuantizedLayer, StepState
from qncd_cli.quant.packing import pack

SUMS = [(4096, 192), (4096, 576)]
"""Input vectors, their length."""
LAYERS: dict[str, tuple[nn.Conv2d | nn.Linear, tuple[int, ...]]] = {
    "3x3, 192 to 192, 64 x 64": (nn.Conv2d(192, 192, 3, padding=1), (4, 192, 64, 64)),
    "3x3, 384 to 384, 32 x 32": (nn.Conv2d(384, 384, 3, padding=1), (4, 384, 32, 32)),
    "3x3, 960 to 960, 8 x 8": (nn.Conv2d(960, 960, 3, padding=1), (4, 960, 8, 8)),
    "1x1, 576 to 384, 32 x 32": (nn.Conv2d(576, 384, 1), (4, 576, 32, 32)),
    "linear, 576 to 4608, 256 rows of four": (nn.Linear(576, 4608), (4, 256, 576)),
}
"""Layers with the shapes of their inputs."""


def quantized(layer: nn.Conv2d | nn.Linear, bits: int) -> QuantizedLayer:
    """The layer with random codes of that many bits, computed by the int8 backend."""
    shape, outputs = layer.weight.shape, len(layer.weight)
    codes = torch.randint(0, 2**bits, shape)
    if bits == 8:
        codes = (codes - 128).clamp_(min=-127)
    tensors = {
        "weight": pack(codes.to(torch.int8 if bits == 8 else torch.uint8), bits),
        "weight_scale": torch.full((outputs,), 2.0**-7),
        "bias": torch.randn(outputs),
        "input_scale": torch.tensor([0.03]),
        "input_zero_point": torch.tensor([120], dtype=torch.int32),
    }
    if bits < 8:
        tensors["weight_zero_point"] = torch.full((outputs,), 8, dtype=torch.int32)
    return QuantizedLayer(layer, tensors, bits, 8, StepState(), int8.compute)


def medians(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, timed in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for one in work.values():
        one()
    for _ in range(rounds):
        for name, one in work.items():
            start = time.perf_counter()
            one()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}


def gram(rows: Tensor, in_integers: bool) -> Tensor:
    return integer_product(rows.T, rows, in_integers=in_integers)


def tell(name: str, found: dict[str, float]) -> None:
    print(
        f"{name:40s}", "  ".join(f"{key} {value:.1f}" for key, value in found.items()), flush=True
    )


@click.command()
@click.option("--rounds", default=7, show_default=True, help="Times that each is timed.")
@torch.no_grad()
def main(rounds: int) -> None:
    """Print a line for each product."""
    process.keep_freed_memory()
    torch.manual_seed(0)
    print(*(f"{name} {value}" for name, value in described().items()), sep=", ")
    print(f"bytes: {'fast' if fast_in_integers() else 'slow'}; saturates: {onednn.saturates()}")
    for count, length in SUMS:
        rows = torch.randint(-128, 128, (count, length), dtype=torch.int8)
        floats = rows.float()
        work = {
            "float32": lambda x=floats: x.T @ x,
            "floats": lambda x=rows: gram(x, False),
            "integers": lambda x=rows: gram(x, True),
        }
        tell(f"sums, {count} vectors of {length}", medians(work, rounds))
    for name, (layer, shape) in LAYERS.items():
        x = torch.randn(shape)
        if len(shape) == 4:
            x, layer = (each.to(memory_format=torch.channels_last) for each in (x, layer))
        four, eight = quantized(layer, 4), quantized(layer, 8)
        work = {
            "float32": lambda layer=layer, x=x: layer(x),
            "W4A8": lambda layer=four, x=x: layer(x),
            "W8A8": lambda layer=eight, x=x: layer(x),
            "W4A8 simulated": lambda layer=four, x=x: simulate(layer, x),
        }
        tell(name, medians(work, rounds))


if __name__ == "__main__":
    main()
