"""Encoded prompts on disk: text encoders, often larger than the denoiser, run once per list."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..errors import ArtifactError
from ..store.artifact_files import tensor_line
from ..store.digests import digest_of
from ..store.files import CONTENT, write_bytes
from ..store.regular import read_regular
from .text import Encoded, Prompts

CONDITION, NEGATIVE = "condition.", "negative."
"""Before the names of a denoiser's arguments."""


@dataclass(frozen=True)
class PromptCache:
    """folder: one file in it per model, precision and list of prompts."""

    folder: Path

    def path(
        self, model_digest: str, dtype: str, prompts: Prompts, encoders: str | None = None
    ) -> Path:
        """File that keeps what these prompts become, whatever guidance scale and size.

        encoders: what they are encoded by, None for the model's own text encoders.
        """
        alone = dataclasses.replace(
            prompts, image_size=None, guidance_scale=1.0, images=None, control=None
        )
        encoded = dataclasses.asdict(alone)
        del encoded["images"], encoded["control"]
        made_from = {"model": model_digest, "dtype": dtype, **encoded}
        if encoders is not None:
            made_from["text_encoders"] = encoders
        return self.folder / f"{digest_of(made_from)}.safetensors"

    def read(self, path: Path, device: torch.device) -> Encoded | None:
        """None where the file is not there. Raises ArtifactError for a damaged one."""
        if not path.is_file():
            return None
        try:
            data = read_regular(path)
            tensors = safetensors.torch.load(data)
        except (OSError, safetensors.SafetensorError) as error:
            raise ArtifactError(
                f"{path}: encoded prompts cannot be read: {error}", "remove the file"
            ) from error
        if _said(data).get(CONTENT, "") != _content(tensors):
            raise ArtifactError(
                f"{path}: encoded prompts are damaged, or an earlier version's", "remove the file"
            )
        parts = [
            {
                name.removeprefix(p): t.to(device)
                for name, t in tensors.items()
                if name.startswith(p)
            }
            for p in (CONDITION, NEGATIVE)
        ]
        return Encoded(parts[0], parts[1] or None)

    def write(self, path: Path, encoded: Encoded) -> None:
        """Atomically. Raises ArtifactError."""
        tensors = {f"{CONDITION}{name}": t for name, t in encoded.table.items()}
        tensors |= {f"{NEGATIVE}{name}": t for name, t in (encoded.negative or {}).items()}
        kept = {name: t.cpu().contiguous().clone() for name, t in tensors.items()}
        write_bytes(path, safetensors.torch.save(kept, {CONTENT: _content(kept)}))


def _content(tensors: Mapping[str, Tensor]) -> str:
    """Digest of tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(tensor_line(name, str(tensor.dtype), tuple(tensor.shape)))
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _said(data: bytes) -> dict[str, str]:
    """What a file of tensors that can be read says of itself."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__", {})
