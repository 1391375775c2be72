"""Artifacts with their tensors: how they are written, read and checked.

Tensor files are safetensors with one metadata key, `qncd`, of canonical JSON: kind, schema
version, digest of the configuration, digest of the model, digests of the parent artifacts,
versions, a `body` that depends on the kind (store/artifact_kinds.py has the table), and
`content`, a SHA-256 over all of that and every tensor. Same inputs, same bytes. This module
is their only writer, and with store/artifact_files.py, which needs no torch, their only
reader.

Reading is strict: the first missing, extra or mis-shaped tensor is named together with the
command that makes a good file; a file changed by one byte does not pass its content digest.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..errors import ArtifactError
from .artifact_files import (
    again,
    check_description,
    compare,
    content_digest,
    tensor_line,
    unreadable,
)
from .artifact_files import check_lineage as check_lineage
from .artifact_kinds import KINDS, Layout
from .artifact_kinds import packed_width as packed_width
from .digests import canonical_json
from .files import replacing


@dataclass(frozen=True)
class Artifact:
    """One tensor file: its tensors by name, its body, and where it comes from."""

    kind: str
    tensors: dict[str, Tensor]
    body: dict[str, Any]
    config: str
    model: str
    parents: dict[str, str] = field(default_factory=dict)
    digest: str = ""
    path: Path | None = None


def tensors_below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def tensors_by_module(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module by what stands after the last dot of their names."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        found.setdefault(module, {})[part] = tensor
    return found


# ------------------------------------------------------------------ writing


def _content_digest(meta: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = content_digest(meta)
    for name, (type_, shape) in sorted(_layout(tensors).items()):
        digest.update(tensor_line(name, type_, shape))
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def torch_type(name: str) -> torch.dtype:
    """A type of the grammar."""
    found = getattr(torch, name.removeprefix("torch."))
    assert isinstance(found, torch.dtype)
    return found


def _layout(tensors: dict[str, Tensor]) -> Layout:
    return {name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()}


def _meta(artifact: Artifact, content: str) -> dict[str, Any]:
    return {
        "kind": artifact.kind,
        "schema": KINDS[artifact.kind].version,
        "config": artifact.config,
        "model": artifact.model,
        "parents": artifact.parents,
        "versions": {"qncd": __version__, "torch": torch.__version__},
        "body": artifact.body,
        "content": content,
    }


def seal(artifact: Artifact) -> Artifact:
    """Check against the grammar and give the artifact its digest, before it is written."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in artifact.tensors.items()}
    problem = compare(_layout(tensors), KINDS[artifact.kind].layout(artifact.body))
    assert problem is None, f"{artifact.kind}: {problem}"
    digest = _content_digest(_meta(artifact, ""), tensors)
    return replace(artifact, tensors=tensors, digest=digest)


def description(artifact: Artifact) -> str:
    """Description of a sealed artifact, kept in its file beside the tensors: canonical JSON."""
    return canonical_json(_meta(artifact, artifact.digest))


def write(path: Path, artifact: Artifact) -> Artifact:
    """Seal, write atomically, return the artifact with its digest and path."""
    sealed = seal(artifact)
    with replacing(path) as temporary:
        try:
            save_file(sealed.tensors, temporary, metadata={"qncd": description(sealed)})
        except SafetensorError as error:
            raise _system_error(error) from error
    return replace(sealed, path=path)


def _system_error(error: SafetensorError) -> OSError:
    """The system's error that safetensors reports in words alone: "... (os error 28)"."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]) if found else errno.EIO, str(error))


# ------------------------------------------------------------------ reading


def _load(path: Path) -> tuple[str, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if len(metadata) != 1:
            raise KeyError("metadata")
        return metadata["qncd"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read(path: Path, kind: str | None = None) -> Artifact:
    """Read and check one artifact. kind: what it must be (any, when None).

    Raises ArtifactError: missing, not an artifact, truncated, changed, of another kind or
    version, or with tensors that its own description does not announce.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: missing", again(kind))
    try:
        text, tensors = _load(path)
    except (SafetensorError, KeyError, ValueError, TypeError, OSError, RecursionError) as error:
        raise unreadable(path, kind) from error
    return checked(path, text, tensors, kind)


def checked(path: Path, text: str, tensors: dict[str, Tensor], kind: str | None = None) -> Artifact:
    """The artifact of a description and tensors found at path. Raises as read does."""
    meta = check_description(
        path, text, _layout(tensors), lambda meta: _content_digest(meta, tensors), kind
    )
    fields = {key: meta[key] for key in ("kind", "body", "config", "model", "parents")}
    return Artifact(tensors=tensors, digest=meta["content"], path=path, **fields)
