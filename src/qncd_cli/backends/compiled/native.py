"""The operators of graphs that are written in C++ (kernels/): compiled once, loaded once.

The library is machine code for the CPU and the torch that it was compiled with, kept once for all
graphs of a user; only one that this user has compiled is loaded (store/own_code.py).
"""

from __future__ import annotations

import ctypes
import platform
import tempfile
from pathlib import Path

import torch

from ...store import own_code
from ...store.digests import digest_of
from .. import int8
from .compiler import compiling

SOURCES = Path(__file__).with_name("kernels")
_libraries: list[ctypes.CDLL] = []
"""The one that this process has loaded."""
FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-w"),
    "AVX2": ("-mavx2", "-mfma", "-mno-avx512f", "-w"),
}
"""Flags of the compiler, by what torch calls the CPU's vector instructions; kernels/ has vectors
for these."""


def why_unavailable() -> str:
    """Why the operators cannot be compiled for this CPU; empty where they can."""
    capability = torch.backends.cpu.get_cpu_capability()
    return "" if capability in FLAGS else f"this CPU has neither AVX2 nor AVX-512 ({capability})"


def load(folder: Path) -> None:
    """Let graphs find the operators, from the user's own library; it is compiled if it is missing.

    folder: where it is compiled, and kept by users who have no folder of their own. Once in a
    process: the operators are the same wherever the library lies. Raises whatever torch raises
    where the compiler fails, ArtifactError where nothing can be written, OSError where the library
    cannot be loaded.
    """
    if _loaded():
        return
    path = _path(folder)
    with own_code.opened(path) as library:
        if library is not None:
            _libraries.append(ctypes.CDLL(str(library)))
            return
    with compiling(folder):
        content = _compile()
    with own_code.seal_and_open(path, content) as library:
        _libraries.append(ctypes.CDLL(str(library)))


def missing(folder: Path) -> bool:
    """Whether `load` would have to compile."""
    return not _loaded() and not own_code.is_sealed(_path(folder))


def machine() -> dict[str, str]:
    """What machine code is made for here: it may use every instruction that this CPU has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith("flags")), platform.processor())
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu": capability, "instructions": flags}


def _loaded() -> bool:
    return hasattr(torch.ops.qncd, "keep")


def _flags() -> tuple[str, ...]:
    return FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())


def _path(folder: Path) -> Path:
    sources = {path.name: path.read_text() for path in sorted(SOURCES.iterdir())}
    key = digest_of({"sources": sources, "flags": _flags(), **machine()})
    return (own_code.own_folder() or folder) / f"operators_{key}.library"


def _compile() -> bytes:
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions  # takes a second

    options = CppTorchOptions(include_pytorch=True, extra_flags=_flags())
    with tempfile.TemporaryDirectory() as folder:
        builder = CppBuilder("operators", str(SOURCES / "operators.cpp"), options, folder)
        builder.build()
        return Path(builder.get_target_file_path()).read_bytes()


def keep(key: str, kernel: int8.Kernel) -> None:
    """Tell the product's operator what it needs of a layer."""
    weights, scales = ([pair[i] for pair in kernel.weights] for i in (0, 1))
    torch.ops.qncd.keep(
        key,
        kernel.geometry is not None,
        kernel.upsampled,
        weights,
        scales,
        kernel.weight_zero_point,
        *(kernel.geometry or ([], [], [], 1)),
        kernel.rows,
        bool(kernel.rounds),
    )


def forget(key: str) -> None:
    """Let go of what was kept, if anything was.

    Python's collector calls this wherever it runs, also while a graph is traced, when torch's
    operators do not do what they say.
    """
    for library in _libraries:
        library.qncd_forget(key.encode())
