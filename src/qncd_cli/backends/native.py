"""What a compiled graph calls that neither the compiler nor torch does well: kernels.cpp.

Its second of compiling is spent once in a process, with the compiler that graphs need anyway.
Where that fails, torch computes the same, more slowly.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
ROWS = 32
"""Positions that are summed up in float32; as in kernels.cpp."""
_KERNELS = {torch.float32: "group_norm_float32", torch.bfloat16: "group_norm_bfloat16"}


def compiler() -> str:
    """The C++ compiler, as torch chooses it."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


@functools.cache
def library() -> ctypes.CDLL | None:
    """None where kernels.cpp cannot be compiled or loaded."""
    with tempfile.TemporaryDirectory(prefix="qncd-kernels-") as folder:
        path = Path(folder) / "kernels.so"
        command = [compiler(), *FLAGS, str(SOURCE), "-o", str(path)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            found = ctypes.CDLL(str(path))
        except (OSError, subprocess.CalledProcessError):
            return None
    for name in _KERNELS.values():
        sizes = [ctypes.c_int64] * 4
        arguments = [ctypes.c_void_p, *sizes, ctypes.c_double, *[ctypes.c_void_p] * 4]
        getattr(found, name).argtypes = arguments
    return found


def group_norm_statistics(
    x: Tensor, weight: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """x [N, C, ...], weight float32 [C] -> shift and factor, float32 [N, C]: group normalization
    of x is (x - shift) factor + bias (Wu & He, arXiv 1803.08494, eq. 1 to 6).
    """
    kernels = library()
    if kernels is None or x.dtype not in _KERNELS:
        return _with_torch(x, weight, groups, eps)
    last = x.movedim(1, -1).contiguous()  # a copy only where the channels are not last in memory
    samples, channels = x.shape[:2]
    rows = x[0, 0].numel()
    partial = torch.empty(samples, -(-rows // ROWS), 2, channels)
    shift, factor = torch.empty(samples, channels), torch.empty(samples, channels)
    tensors = (weight, partial, shift, factor)
    pointers = [tensor.data_ptr() for tensor in tensors]
    kernel = getattr(kernels, _KERNELS[x.dtype])
    kernel(last.data_ptr(), samples, rows, channels, groups, eps, *pointers)
    return shift, factor


def _with_torch(x: Tensor, weight: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    grouped = x.double().unflatten(1, (groups, -1)).flatten(2)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0)
    width = x.shape[1] // groups
    factor = (variance + eps).rsqrt().repeat_interleave(width, 1) * weight
    return mean.repeat_interleave(width, 1).float(), factor.float()
