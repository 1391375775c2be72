"""Artifacts larger than memory: tensors that are written and read piece by piece.

The bytes are those that `artifacts.write` gives the same tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .artifact_files import TYPES, compare, content_digest, tensor_line
from .artifact_kinds import KINDS, Layout
from .artifacts import Artifact, description
from .files import replacing

ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
"""Types in the order in which safetensors lays tensors out."""


@dataclass(frozen=True)
class Streamed:
    """A tensor in pieces along its first axis: type and shape of the whole, and what gives the
    pieces, in their order and the same at every call."""

    type: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]


def write_streamed(path: Path, artifact: Artifact, tensors: Mapping[str, Streamed]) -> Artifact:
    """Write an artifact atomically; it is returned with its digest and path, without tensors.

    artifact: everything but the tensors, which are gone through twice. Raises what
    `artifacts.write` raises.
    """
    layout: Layout = {name: (found.type, found.shape) for name, found in tensors.items()}
    problem = compare(layout, KINDS[artifact.kind].layout(artifact.body))
    assert problem is None, f"{artifact.kind}: {problem}"
    digest = content_digest(json.loads(description(replace(artifact, digest=""))))
    for name, found in sorted(tensors.items()):
        digest.update(tensor_line(name, *layout[name]))
        for piece in found.pieces():
            digest.update(_bytes(piece))
    sealed = replace(artifact, digest=digest.hexdigest(), path=path)
    header, order = _header(description(sealed), layout)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for name in order:
            for piece in tensors[name].pieces():
                file.write(_bytes(piece))
    return sealed


def _bytes(piece: Tensor) -> Any:
    return piece.contiguous().view(-1).view(torch.uint8).numpy().data


def _header(text: str, layout: Layout) -> tuple[bytes, list[str]]:
    """Everything before the tensors, and their order: as safetensors itself writes them."""
    short = {type_: name for name, (type_, _) in TYPES.items()}
    order = sorted(layout, key=lambda name: (ORDER.index(short[layout[name][0]]), name))
    header: dict[str, Any] = {"__metadata__": {"qncd": text}}
    end = 0
    for name in order:
        type_, shape = layout[name]
        begin, end = end, end + TYPES[short[type_]][1] * math.prod(shape)
        entry = {"dtype": short[type_], "shape": list(shape), "data_offsets": [begin, end]}
        header[name] = entry
    data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data, order


def read_rows(path: Path, name: str, rows: slice) -> Tensor:
    """Rows of a tensor of an artifact that was checked before."""
    with safe_open(path, framework="pt") as file:
        whole = rows == slice(None)
        found: Tensor = file.get_tensor(name) if whole else file.get_slice(name)[rows]
        return found
