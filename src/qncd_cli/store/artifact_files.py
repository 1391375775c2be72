"""Artifacts as they lie on disk: what a file says of itself, checked without torch.

A file is as sound as `artifacts.read` asks for: its description is canonical, its tensors are those
that its body announces, and its content digest, over all of that and every byte of the tensors,
holds. Whoever needs no tensors reads files here, and has no need to wait for torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import ArtifactError
from .artifact_kinds import KINDS, Layout
from .digests import canonical_json
from .file_stamps import remembered

TYPES = {
    "F64": ("torch.float64", 8),
    "F32": ("torch.float32", 4),
    "F16": ("torch.float16", 2),
    "BF16": ("torch.bfloat16", 2),
    "I64": ("torch.int64", 8),
    "I32": ("torch.int32", 4),
    "I16": ("torch.int16", 2),
    "I8": ("torch.int8", 1),
    "U8": ("torch.uint8", 1),
    "BOOL": ("torch.bool", 1),
}
"""safetensors' names of types: torch's spelling, and bytes of a value."""


DESCRIPTION: dict[str, type] = {
    **{"kind": str, "schema": int, "config": str, "model": str},
    **{"parents": dict, "body": dict, "content": str},
}
"""Keys of a description, each with the type of its value."""


class _Verification:
    """Whether contents are held against their digests."""

    wanted = True


@contextmanager
def unverified() -> Iterator[None]:
    """Within the block, contents of artifacts are not held against their digests; everything else
    is checked as always."""
    before, _Verification.wanted = _Verification.wanted, False
    try:
        yield
    finally:
        _Verification.wanted = before


class Described(Protocol):
    """What is known of an artifact beside its tensors."""

    @property
    def kind(self) -> str: ...
    @property
    def config(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def parents(self) -> dict[str, str]: ...
    @property
    def path(self) -> Path | None: ...


@dataclass(frozen=True)
class Stored:
    """A file of tensors without them: type and shape of each by name, and the description.

    digest: of the content; size: of the file in bytes.
    """

    path: Path
    kind: str
    tensors: Layout
    body: dict[str, Any]
    config: str
    model: str
    parents: dict[str, str]
    digest: str
    size: int


def read_stored(path: Path, kind: str | None = None) -> Stored:
    """Read and check one artifact without its tensors. kind: what it must be (any, when None).

    Raises what `artifacts.read` raises.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: missing", again(kind))
    try:
        text, places = _header(path)
    except (KeyError, ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise unreadable(path, kind) from error
    layout = {name: (type_, shape) for name, (type_, shape, _) in places.items()}

    def content(meta: dict[str, Any]) -> str:
        return remembered("artifact", [path], lambda: _content(path, meta, places))

    meta = check_description(path, text, layout, content, kind)
    fields = {key: meta[key] for key in ("kind", "body", "config", "model", "parents")}
    return Stored(
        path=path, tensors=layout, digest=meta["content"], size=path.stat().st_size, **fields
    )


_Places = dict[str, tuple[str, tuple[int, ...], slice]]
"""Type, shape and bytes within the file of every tensor."""


def _header(path: Path) -> tuple[str, _Places]:
    """The description, and where tensors are. Raises ValueError and others for a damaged file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError("header")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__")
    if len(metadata) != 1:
        raise KeyError("metadata")
    places, start, end = {}, 8 + length, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        type_, width = TYPES[entry["dtype"]]
        shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
        if first != end or last - first != width * math.prod(shape):
            raise ValueError(name)
        places[name] = (type_, shape, slice(start + first, start + last))
        end = last
    if start + end != size:
        raise ValueError("length")
    return metadata["qncd"], places


def _content(path: Path, meta: dict[str, Any], places: _Places) -> str:
    digest = content_digest(meta)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        whole = memoryview(data)
        for name in sorted(places):
            type_, shape, part = places[name]
            digest.update(tensor_line(name, type_, shape))
            digest.update(whole[part])
        whole.release()
    return digest.hexdigest()


# ------------------------------------------------------------------ what reading with torch shares


def content_digest(meta: Mapping[str, Any]) -> Any:
    """A SHA-256 that has taken in the description; a line and the bytes of every tensor follow, in
    the order of their names."""
    return hashlib.sha256(canonical_json({**meta, "content": ""}).encode())


def tensor_line(name: str, type_: str, shape: tuple[int, ...]) -> bytes:
    return f"{name} {type_} {shape}\n".encode()


def again(kind: str | None) -> str:
    """The hint of how a good file is made."""
    return f'make it with "{KINDS[kind].command}"' if kind else "repeat the stage that writes it"


def unreadable(path: Path, kind: str | None) -> ArtifactError:
    return ArtifactError(f"{path}: truncated or not a qncd artifact", again(kind))


def check_description(
    path: Path,
    text: str,
    layout: Layout,
    content: Callable[[dict[str, Any]], str],
    kind: str | None,
) -> dict[str, Any]:
    """The description as a tree, if it, its digest and the tensors' layout fit each other.

    content: from the description, the digest that the content has. Raises ArtifactError.
    """
    try:
        meta = json.loads(text)
        if canonical_json(meta) != text:  # a float may be spelled in two ways, canonically in one
            raise ValueError("not canonical")
        found = KINDS[meta["kind"]]
        good_digest = not _Verification.wanted or content(meta) == meta["content"]
        version = meta["schema"]
        for key, wanted in DESCRIPTION.items():
            if type(meta[key]) is not wanted:
                raise TypeError(key)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise unreadable(path, kind) from error
    if kind and meta["kind"] != kind:
        raise ArtifactError(f"{path}: holds {meta['kind']}, expected {kind}", again(kind))
    if version != found.version:
        raise ArtifactError(
            f"{path}: schema {version}, this version reads {found.version}", again(kind)
        )
    if not good_digest:
        raise ArtifactError(f"{path}: damaged, its content does not match its digest", again(kind))
    problem = found.problem(meta["body"])
    try:
        problem = problem or compare(layout, found.layout(meta["body"]))
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        problem = (
            f"its description is not that of a {meta['kind']} ({type(error).__name__}: {error})"
        )
    if problem:
        raise ArtifactError(f"{path}: {problem}", again(kind))
    return meta


def compare(found: Layout, wanted: Layout) -> str | None:
    """The first difference between tensors and grammar in words, or None."""
    for name, (type_, shape) in wanted.items():
        if name not in found:
            missing = sum(n not in found for n in wanted)
            return f"{missing} of {len(wanted)} tensors missing (first: {name})"
        if found[name] != (type_, shape):
            has_type, has_shape = found[name]
            return f"{name} is {has_type} {list(has_shape)}, expected {type_} {list(shape)}"
    extra = next((name for name in found if name not in wanted), None)
    return f"unexpected tensor {extra}" if extra else None


def check_lineage(
    artifact: Described,
    *,
    config: str | None = None,
    model: str | None = None,
    parents: Mapping[str, str] | None = None,
) -> None:
    """Raise ArtifactError unless the artifact was made from just these."""
    command = KINDS[artifact.kind].command
    where = artifact.path or artifact.kind
    if model is not None and artifact.model != model:
        raise ArtifactError(
            f"{where}: made from another model ({artifact.model}, now {model})",
            f'repeat "{command}"',
        )
    if config is not None and artifact.config != config:
        raise ArtifactError(
            f"{where}: made with another configuration ({artifact.config}, now {config})",
            f'repeat "{command}"',
        )
    for name, digest in (parents or {}).items():
        if artifact.parents.get(name) != digest:
            raise ArtifactError(
                f"{where}: made from another {name} artifact than the one in this run",
                f'repeat "{command}"',
            )
