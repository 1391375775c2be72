#!/usr/bin/env python
"""Milliseconds of a graph's operators that large tensors pass through, at shapes of LDM-4,
Stable Diffusion and its decoder.

    python scripts/kernel_times.py
    MALLOC_ARENA_MAX=8 python scripts/kernel_times.py

Of a convolution in a decoder `padded` is oneDNN's own padding, `rows` the same with rows of padding
added to the codes beforehand. In the first line of a feed-forward layer `product` is that of its
first linear layer, `whole` the same and then the gate with the quantization behind it, `parts` both
a few rows at a time. In an attention `products` is layer by layer, `operator` what a graph calls.
All are timed in turn; what is told is the median, and the least. The second command leaves memory
to glibc, which asks the system for new pages at every tensor of more than 32 MB.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from qncd_cli.backends import int8
from qncd_cli.backends.compiled import native, ops
from qncd_cli.cli import process
from qncd_cli.quant.attention import AttentionProducts, softmax_codes
from qncd_cli.quant.layers import QuantizedLayer, StepState
from qncd_cli.quant.packing import pack

GATES = {
    "LDM-4, 32 x 32, four rows": (4, 1024, 384, 3072),
    "LDM-4, 16 x 16, four rows": (4, 256, 576, 4608),
    "SD, 64 x 64, two rows": (2, 4096, 320, 2560),
}
"""Rows, tokens, channels, width of the product."""
ATTENTIONS = {
    "SD, 64 x 64, two rows": (2, 8, 4096, 40),
    "SD, 32 x 32, two rows": (2, 8, 1024, 80),
    "decoder, 64 x 64, one row": (1, 1, 4096, 512),
}
"""Rows, heads, tokens, channels of a head."""
BYTE_ATTENTIONS = {
    "LDM-4, 32 x 32, four rows": (4, 1024, 384),
    "LDM-4, 16 x 16, four rows": (4, 256, 576),
}
"""Heads, tokens, channels of a head."""
CONVOLUTIONS = {
    "128 x 128": (512, 512, 128),
    "256 x 256": (512, 512, 256),
    "256 x 256, fewer channels": (512, 256, 256),
    "512 x 512": (256, 256, 512),
}
"""Channels of the input and of the output, sides of the image."""


def layer_of(channels: int, width: int) -> QuantizedLayer:
    """A linear layer of random codes at W4A8."""
    tensors = {
        "weight": pack(torch.randint(0, 16, (width, channels)).to(torch.uint8), 4),
        "weight_scale": torch.full((width,), 2.0**-7),
        "weight_zero_point": torch.full((width,), 8, dtype=torch.int32),
        "bias": torch.randn(width),
        "input_scale": torch.tensor([0.03]),
        "input_zero_point": torch.tensor([64], dtype=torch.int32),
    }
    linear = nn.Linear(channels, width)
    return QuantizedLayer(linear, tensors, 4, 8, StepState(), int8.compute)


def timed(what: str, calls: Mapping[str, Callable[[], object]], rounds: int) -> None:
    for call in calls.values():
        call()
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            spent[name].append(1000 * (time.perf_counter() - begun))
    found = [f"{name} {statistics.median(t):.1f} ({min(t):.1f})" for name, t in spent.items()]
    click.echo(f"{what}: {', '.join(found)}")


def gate(name: str, rows: int, tokens: int, channels: int, width: int, rounds: int) -> None:
    layer = layer_of(channels, width)
    ops.register({name: layer})
    zero_point = layer.input_zero_point.float()
    quantizer = (None, None, torch.tensor([0.05]), torch.tensor([7.0]), 8)
    x: Tensor = torch.randn(rows, tokens, channels)
    low, _ = ops.codes(x, False, None, None, layer.input_scale, zero_point, 8)
    product = (low, None, layer.input_scale, zero_point, layer.bias, name, torch.float32)
    call = torch.ops.qncd
    calls = {
        "product": lambda: call.multiply(*product),
        "whole": lambda: call.gated_codes(call.multiply(*product), *quantizer),
        "parts": lambda: call.gated_product_codes(*product, *quantizer),
    }
    timed(f"gate, {name}", calls, rounds)


def attention(name: str, rows: int, heads: int, tokens: int, width: int, rounds: int) -> None:
    scale = width**-0.5
    made = AttentionProducts({}, 32, 8, StepState(), scale)
    operands = [torch.randn(rows, heads, tokens, width) for _ in range(3)]
    calls = {
        "products": lambda: made.products(*operands, None),
        "operator": lambda: torch.ops.qncd.attention(*operands, scale, 8),
    }
    timed(f"attention, {name}", calls, rounds)


def byte_attention(name: str, heads: int, tokens: int, width: int, rounds: int) -> None:
    """As two products with the probabilities' codes between them, and as one operator."""
    q, k, v = (torch.randint(-128, 128, (heads, tokens, width), dtype=torch.int8) for _ in "qkv")
    added, factor = torch.zeros(heads, tokens, dtype=torch.int32), torch.tensor([3e-4])

    def products() -> Tensor:
        sums = torch.ops.qncd.matmul(q, k.transpose(1, 2))
        codes, _ = softmax_codes(sums, added, factor, 8)
        return torch.ops.qncd.matmul(codes, v)

    calls = {
        "products": products,
        "operator": lambda: torch.ops.qncd.byte_attention(q, k, v, added, factor, 8),
    }
    timed(f"attention of bytes, {name}", calls, rounds)


def convolution(name: str, channels: int, outputs: int, side: int, rounds: int) -> None:
    codes = torch.randint(0, 256, (1, channels, side, side), dtype=torch.uint8)
    codes = codes.contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-127, 128, (outputs, channels, 3, 3), dtype=torch.int8)
    scale, zeros = torch.full((outputs,), 2.0**-7), torch.zeros(outputs, dtype=torch.int64)
    padding = [1, 1], [1, 1], [1, 1], 1
    packed = torch.ops.onednn.qconv_prepack(weight, scale, 0.03, 64, *padding, list(codes.shape))
    kernels = {
        "padded": int8.Kernel([], zeros, padding),
        "rows": int8.Kernel([], zeros, ([1, 1], [0, 1], [1, 1], 1), rows=1),
    }
    operands = (codes, 0.03, 64, packed, scale, None, torch.float32)
    calls = {n: functools.partial(int8._pass, kernel, *operands) for n, kernel in kernels.items()}
    timed(f"convolution, {name}", calls, rounds)


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=25, show_default=True)
def main(rounds: int) -> None:
    """Print a line for every shape."""
    process.keep_freed_memory()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="qncd-kernels-") as folder, torch.no_grad():
        native.load(Path(folder))
        for name, shape in GATES.items():
            gate(name, *shape, rounds)
        for name, shape in ATTENTIONS.items():
            attention(name, *shape, rounds)
        for name, of_bytes in BYTE_ATTENTIONS.items():
            byte_attention(name, *of_bytes, rounds)
        for name, layer in CONVOLUTIONS.items():
            convolution(name, *layer, rounds)


if __name__ == "__main__":
    main()
