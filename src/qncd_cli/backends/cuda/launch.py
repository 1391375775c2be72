"""Launches of the kernels, compiled for a GPU or, with TRITON_INTERPRET=1, interpreted on a CPU.

Interpreted kernels are for tests: the same files, the same numbers, some thousand times slower.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

EXACT = {"enable_fp_fusion": False}
"""Products are rounded before anything is added to them, as the simulation does it."""
INTERPRETED_UNITS = 1
"""Multiprocessors of the interpreter."""


@dataclass(frozen=True)
class Call:
    """One launch.

    kernel: its name; grid: programs; operands: in the kernel's order; constants: compiled into it;
    options: of the compiler.
    """

    kernel: str
    grid: tuple[int, ...]
    operands: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


def interpreted() -> bool:
    """Whether Triton is asked to interpret kernels (TRITON_INTERPRET=1)."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def kernels(interpreted: bool) -> ModuleType:
    """The package kernels, compiled or interpreted, which Triton decides while it is loaded.

    Two packages of the same files: the interpreter writes into the modules whose functions it runs.
    """
    from triton import knobs

    name = f"{__package__}.kernels_{'interpreted' if interpreted else 'compiled'}"
    folder = Path(__file__).with_name("kernels")
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with knobs.runtime.scope():
        knobs.runtime.interpret = interpreted
        spec.loader.exec_module(module)
    return module


def run(call: Call, device: torch.device) -> None:
    """Compiled on a GPU, which is current meanwhile; interpreted on a CPU."""
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current:
        kernel = getattr(kernels(device.type == "cpu"), call.kernel)
        kernel[call.grid](*call.operands, **call.constants, **call.options)


def launch_time(call: Call, device: torch.device, warmup: float, repeats: float) -> float:
    """Milliseconds of a launch on a GPU, the median of many.

    warmup, repeats: milliseconds of launches before those that count, and of those.
    """
    from triton.testing import do_bench

    found: Any = do_bench(
        lambda: run(call, device), warmup=warmup, rep=repeats, return_mode="median"
    )
    return float(found)


@functools.cache
def units(device: torch.device) -> int:
    """Multiprocessors."""
    if device.type != "cuda":
        return INTERPRETED_UNITS
    return torch.cuda.get_device_properties(device).multi_processor_count


def operand_or(operand: Tensor | None, other: Tensor) -> Tensor:
    """The operand, or where there is none another of its type, which is not read."""
    return other if operand is None else operand


def triton_type(dtype: torch.dtype) -> Any:
    """Triton's name of a float type."""
    import triton.language as tl

    kinds = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return kinds[dtype]
