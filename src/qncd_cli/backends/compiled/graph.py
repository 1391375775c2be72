"""A quantized denoiser as one compiled graph for the CPU, in a file (torch.export, AOTInductor).

Compiling takes minutes, loading the file milliseconds. What the file holds is fixed: the layers
by key (`traced`), the unquantized weights, a range of batch sizes. Inputs are the timestep and the
row of all tables that holds there (`Tables`). The number of threads is that of the process that
runs it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...quant.layers import QuantizedLayer, SteppedModule, StepState
from . import native
from .compiler import environment
from .ops import traceable

Graph = Callable[..., Any]
"""(x, timesteps [N] float32, row of Tables [K] float32, condition) -> prediction; of a graph that
leaves work out (x, timesteps, row, condition, given) -> prediction, taken, as `Kept` has them."""
BATCH_RANGE = (2, 63)
"""Smallest and largest batch that a graph serves. Larger ones are no faster: less of them is in the
cache. diffusers' upsampling treats those from 64 on otherwise, which would be another graph."""


def why_unavailable() -> str:
    """Why nothing can be compiled on this machine; empty where it can."""
    if why := native.why_unavailable():
        return why
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return "" if shutil.which(compiler) else f"no C++ compiler {compiler} (CXX names another)"


def silence_compiler() -> None:
    """Silence warnings of torch's tracer and compiler for the rest of this process."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for module in ("torch._dynamo", "torch._inductor"):
        warnings.filterwarnings("ignore", module=rf"{re.escape(module)}(\..*)?$")


OPTIONS = {"cpp.dynamic_threads": True}


class Tables:
    """The tables of all modules of a denoiser, side by side: values float32 [G, K].

    G timestep groups; K scales, zero-points and corrected biases together, equal tables once:
    layers that quantize one input alike then do so together. Zero-points are codes of up to 16
    bits, exact in float32.
    """

    def __init__(self, module: nn.Module):
        stepped = [m for m in module.modules() if isinstance(m, SteppedModule)]
        self._tables = [(m, name) for m in stepped for name in m.tables]
        different: dict[bytes, Tensor] = {}
        keys = []
        for module, name in self._tables:
            table = module.get_buffer(name).to(torch.float32)
            flat = table.reshape(len(table), -1)
            keys.append(flat.cpu().numpy().tobytes())
            different.setdefault(keys[-1], flat)
        self._widths = [flat.shape[1] for flat in different.values()]
        self._places = [list(different).index(key) for key in keys]
        self.values = torch.cat([*different.values()], 1) if different else torch.zeros(1, 0)

    def cut(self, row: Tensor) -> dict[tuple[nn.Module, str], Tensor]:
        """A row of values -> that of every table, [1] where a table is [G]; all of it float32."""
        parts = row.split(self._widths)
        return {
            table: parts[place] for table, place in zip(self._tables, self._places, strict=True)
        }


class Traced(nn.Module):
    """The denoiser with everything that varies as an argument."""

    def __init__(self, module: nn.Module, step: StepState):
        super().__init__()
        self.module, self.step = module, step
        self.tables = Tables(module)

    def forward(self, x: Tensor, t: Tensor, row: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.step.traced = self.tables.cut(row)
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.module(x, t, **condition).sample


class Kept(Protocol):
    """Values that a call of the module is given in the place of what it does not compute then, and
    those that it computed, by name; batch first."""

    given: dict[str, Tensor]
    taken: dict[str, Tensor]


class _TracedWithKept(Traced):
    """The same, with kept values as arguments and results."""

    def __init__(self, module: nn.Module, step: StepState, kept: Kept):
        super().__init__(module, step)
        self.kept = kept

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        t: Tensor,
        row: Tensor,
        condition: dict[str, Tensor],
        given: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.kept.given, self.kept.taken = given, {}
        try:
            return super().forward(x, t, row, condition), self.kept.taken
        finally:
            self.kept.given, self.kept.taken = {}, {}


def compile_graph(
    module: nn.Module,
    step: StepState,
    layers: Mapping[str, QuantizedLayer],
    example: tuple[Tensor, Mapping[str, Tensor]],
    *,
    batches: tuple[int, int] = BATCH_RANGE,
    kept: tuple[Kept, Mapping[str, Tensor]] | None = None,
) -> bytes:
    """Trace the denoiser on x [N, ...] and its condition and compile it: the file's content.

    N: within batches, as all that the graph serves; layers: registered, by the keys
    that the graph will know them by. kept: of a graph that leaves work out, what the module asks,
    and examples of the values that it is given. Raises whatever torch raises where a model cannot
    be traced.
    """
    from .fusion import fused  # brings torch's tracer, of which loading needs nothing

    x, condition = example
    least, most = batches
    batch = {0: torch.export.Dim("batch", min=least, max=most)} if least < most else {}
    denoiser = Traced(module, step) if kept is None else _TracedWithKept(module, step, kept[0])
    inputs: tuple[Any, ...] = x, torch.zeros(len(x)), denoiser.tables.values[0], dict(condition)
    shapes: tuple[Any, ...] = (batch, batch, {}, dict.fromkeys(condition, batch))
    if kept is not None:
        inputs, shapes = (*inputs, dict(kept[1])), (*shapes, dict.fromkeys(kept[1], batch))
    silence_compiler()
    with warnings.catch_warnings(), torch.no_grad(), traceable(module, layers):
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(denoiser, inputs, dynamic_shapes=shapes, strict=False)
            program = fused(program)
        finally:
            step.traced = None
        with tempfile.TemporaryDirectory() as folder:
            package = torch._inductor.aoti_compile_and_package(
                program, package_path=f"{folder}/graph.pt2", inductor_configs=OPTIONS
            )
            return Path(package).read_bytes()


def load_graph(path: Path) -> Graph:
    """A graph from its file, which is run: it must be our own. It is unpacked beside the file.

    Raises RuntimeError where the file is made by another version of torch.
    """
    from torch.export.pt2_archive._package import AOTICompiledModel

    with environment("TMPDIR", str(path.parent)):  # else it stays in the system's for ever
        return AOTICompiledModel(
            torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        )
