"""Files of arrays that a reference can be: what they claim is checked before room is made."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from ..errors import ArtifactError
from ..machine import available_memory
from .networks import first_line

REFERENCE_HINT = (
    "give a folder of images, an .npz of ADM's evaluator, a statistics file (mu and sigma) or zoo"
)


def read_arrays(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays of a reference file that have a meaning here, by name. Raises ArtifactError."""
    known = ("arr_0", "mu", "sigma", "mu_s", "sigma_s", "features", "feats")
    try:
        if path.suffix == ".safetensors":
            stored = safetensors.numpy.load_file(path)
            found = {name: stored[name] for name in known if name in stored}
        elif path.suffix == ".npz":
            found = _read_npz(path, known)
        else:
            raise ArtifactError(f"{path}: not a kind of reference file", REFERENCE_HINT)
    except (
        *(OSError, ValueError, TypeError, EOFError, NotImplementedError, RuntimeError, KeyError),
        *(zipfile.BadZipFile, zlib.error, struct.error, SyntaxError, MemoryError, SafetensorError),
    ) as error:
        raise ArtifactError(f"{path}: damaged: {first_line(error)}", REFERENCE_HINT) from error
    halves = any((f"mu{end}" in found) != (f"sigma{end}" in found) for end in ("", "_s"))
    if not found or halves:
        raise ArtifactError(
            f"{path}: holds {', '.join(found) or 'nothing'} of {', '.join(known)}", REFERENCE_HINT
        )
    return found


def _read_npz(path: Path, known: Collection[str]) -> dict[str, np.ndarray]:
    """The known arrays of an .npz, each held against what its header announces before it is read:
    a file of kilobytes can claim gigabytes. Raises ValueError and whatever zipfile raises."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        members = {entry.filename: entry for entry in archive.infolist()}
        for name in known:
            entry = members.get(f"{name}.npy")
            if entry is None:
                continue
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
                    version, np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(file)
                size = math.prod(shape) * dtype.itemsize
                if dtype.hasobject:
                    raise ValueError(f"{name} holds Python objects")
                if size != entry.file_size - file.tell():
                    raise ValueError(
                        f"{name} claims {size} bytes, {entry.file_size - file.tell()} are there"
                    )
            free = available_memory()
            if free is not None and size > free:
                raise ValueError(f"{name} takes {size} bytes, {free} bytes of memory are free")
            with archive.open(entry) as file:
                found[name] = np.lib.format.read_array(file, allow_pickle=False)
    return found
