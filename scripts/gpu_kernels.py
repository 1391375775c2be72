#!/usr/bin/env python
"""The kernels for GPUs, compiled ahead of time: what each binary takes, and a roofline on paper.

    python scripts/gpu_kernels.py compiled        # registers, shared memory, spills, instructions
    python scripts/gpu_kernels.py roofline        # least times of LDM-4's layers on three cards

No GPU is needed: Triton compiles for a named architecture, and its wheel brings NVIDIA's ptxas,
cuobjdump and nvdisasm. Nothing is run. The roofline is arithmetic on published rates.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from gpu_calls import shipped
from torch import Tensor

from qncd_cli.backends.cuda import launch, tiles
from qncd_cli.backends.cuda.launch import Call
from qncd_cli.backends.cuda.tiles import ARCHITECTURES
from qncd_cli.forecast.shapes import model_shapes
from qncd_cli.models.topology import weight_layers

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
"""KiB of shared memory that a block may take (CUDA C++ Programming Guide, compute capabilities)."""
MATRIX = re.compile(r"\b(IMMA|IGMMA)\.\S*S8|\b(HMMA|HGMMA)\.\S*F32")
"""Instructions of the matrix units, on signed bytes and on 16 bits with float32 sums: of one warp,
of a group of warps (sm_90)."""
SPILL = re.compile(r"\b(STL|LDL)\b")


# ------------------------------------------------------------------ binaries


@dataclass(frozen=True)
class Binary:
    """registers: of a thread; stack: bytes of a thread, spills among them; spills: instructions
    that read or write them; shared: bytes of a block; matrix: instructions of the matrix units."""

    registers: int
    stack: int
    spills: int
    shared: int
    matrix: int


def compiled(call: Call, architecture: int) -> Binary:
    """The kernel as that call would have it compiled on such a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(launch.kernels(False), call.kernel)
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    aligned: dict[tuple[int], Any] = {}
    values = dict(zip(kernel.arg_names, call.operands, strict=False)) | call.constants
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in call.constants or (isinstance(value, int) and value == 1):
            signature[name], constants[index,] = "constexpr", value
            continue
        plain = "fp32" if isinstance(value, float) else "i32"
        signature[name] = f"*{_TYPES[value.dtype]}" if isinstance(value, Tensor) else plain
        if isinstance(value, Tensor) or (plain == "i32" and value % 16 == 0):
            aligned[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", architecture, 32)
    found = triton.compile(source, target=target, options=call.options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(found.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", path)
        code = _tool("nvdisasm", "-c", path)
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert numbers is not None, usage
    registers, stack, local = map(int, numbers.groups())
    matrix, spills = len(MATRIX.findall(code)), len(SPILL.findall(code))
    return Binary(registers, stack + local, spills, found.metadata.shared, matrix)


_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}


def _tool(name: str, *arguments: object) -> str:
    """What one of NVIDIA's tools in Triton's wheel prints."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


# ------------------------------------------------------------------ on paper


@dataclass(frozen=True)
class Card:
    """Published rates, without sparsity: 8-bit and 16-bit (float32 sums) operations and bytes a
    second; units: multiprocessors."""

    name: str
    units: int
    int8: float
    float16: float
    bandwidth: float


CARDS = (
    Card("A100 SXM 80 GB (sm_80)", 108, 624e12, 312e12, 2.039e12),
    Card("RTX 4090 (sm_89)", 128, 660.6e12, 165.2e12, 1.008e12),
    Card("H100 SXM (sm_90)", 132, 1979e12, 989.4e12, 3.35e12),
)
"""NVIDIA's A100 and H100 data sheets and the Ada architecture's white paper."""


@dataclass(frozen=True)
class Product:
    """One layer in one call: a product [rows, taps channels] x [taps channels, outputs]; inputs:
    numbers of its input."""

    rows: int
    outputs: int
    channels: int
    taps: int
    inputs: int

    @property
    def macs(self) -> int:
        return self.rows * self.outputs * self.channels * self.taps


def products(source: str, rows: int) -> list[Product]:
    """The layers of a model's denoiser in a call of so many rows, on the meta device."""
    model = model_shapes(source, torch.float32)
    found: list[Product] = []

    def remember(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        outputs, channels, *kernel = layer.weight.shape
        pixels = output.numel() // outputs
        found.append(Product(pixels, outputs, channels, math.prod(kernel), inputs[0].numel()))

    for layer in weight_layers(model.denoiser).values():
        layer.register_forward_hook(remember)
    model.call(rows)
    return found


def least_seconds(
    layers: list[Product], card: Card, weight_bits: int
) -> tuple[float, float, float]:
    """Least seconds of the products with bytes and of those in 16 bits, and the share of the matrix
    units' time in the former that tiles fill.

    A layer takes the longer of its arithmetic, with its tile's efficiency, and its traffic: with
    bytes input and output in 16 bits and the codes written and read once; weights once.
    """
    integer, half, full, filled = 0.0, 0.0, 0.0, 0.0
    for layer in layers:
        tile = tiles.choose_tile(layer.rows, layer.outputs, weight_bits == 4, card.units)
        shape = layer.rows, layer.outputs, layer.channels
        share = tiles.efficiency(*shape, tile, card.units)
        weights = layer.outputs * layer.channels * layer.taps
        outer = 2 * (layer.inputs + layer.rows * layer.outputs)
        moved = outer + 2 * layer.inputs + weights * weight_bits / 8
        least = 2 * layer.macs / card.int8
        integer += max(least / share, moved / card.bandwidth)
        half += max(2 * layer.macs / card.float16 / share, (outer + 2 * weights) / card.bandwidth)
        full, filled = full + least / share, filled + least
    return integer, half, filled / full


# ------------------------------------------------------------------ the command


@click.group()
def cli() -> None:
    """Kernels for GPUs, without a GPU."""


@cli.command("compiled")
@click.option("--arch", type=click.Choice([str(a) for a in ARCHITECTURES]), multiple=True)
def show_compiled(arch: tuple[str, ...]) -> None:
    """A line for every kernel and tile: registers, spills, shared memory, matrix instructions."""
    names = [int(a) for a in arch] or list(ARCHITECTURES)
    click.echo("| kernel, tile | " + " | ".join(f"sm_{a}" for a in names) + " |")
    click.echo("|---|" + "---|" * len(names))
    for name, call in shipped():
        cells = []
        for number in names:
            binary = compiled(call, number)
            cell = f"{binary.registers}; {binary.shared / 1024:.0f}; {binary.matrix}"
            if binary.spills or binary.shared > 1024 * SHARED_LIMIT[number]:
                cell += f" SPILLS {binary.spills}, SHARED {binary.shared}"
            cells.append(cell)
        click.echo(f"| {name} | " + " | ".join(cells) + " |")


@cli.command("roofline")
@click.option("--model", default="random:ldm4", show_default=True)
@click.option(
    "--rows", default=16, show_default=True, help="Rows of a call: images, twice if guided."
)
def show_roofline(model: str, rows: int) -> None:
    """Least times of all layers of a call, on paper."""
    layers = products(model, rows)
    macs = sum(layer.macs for layer in layers)
    click.echo(f"{model}, {rows} rows: {len(layers)} layers, {2 * macs / 1e12:.2f} T operations\n")
    click.echo("| card | tiles filled | float16, ms | W8A8, ms | W4A8, ms | float16 / W4A8 |")
    click.echo("|---|---|---|---|---|---|")
    for card in CARDS:
        eight, half, _ = least_seconds(layers, card, 8)
        four, _, share = least_seconds(layers, card, 4)
        times = " | ".join(f"{1e3 * t:.2f}" for t in (half, eight, four))
        click.echo(f"| {card.name} | {share:.0%} | {times} | {half / four:.2f} |")


if __name__ == "__main__":
    cli()
