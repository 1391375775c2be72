"""Which file of a component's folder holds its weights: the plain one, or a variant of it.

Many published folders have weights in half precision alone, which diffusers calls the variant fp16
and leaves aside unless it is asked for by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

_NAME = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d+-of-\d+)?"
    r"(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)
_PREFERRED = ("fp32", "ema", "bf16", "fp16")
"""Variants from the most exact on; others come after them by name, what is not averaged last."""


def variants(folder: Path) -> list[str]:
    """Variants of the weights in a component's folder, best first; "" for the plain ones."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = {match["variant"] or "" for name in names if (match := _NAME.fullmatch(name))}
    return sorted(found, key=lambda variant: (variant != "", _rank(variant), variant))


def variant_of(folder: Path) -> str | None:
    """The variant to load from a component's folder; None: the plain weights, or there are none."""
    found = variants(folder)
    return found[0] or None if found else None


def named(file_name: str, variant: str | None) -> str:
    """A weights file's name with the variant in its place: model.safetensors.index.fp16.json."""
    stem, dot, ending = file_name.rpartition(".")
    return file_name if variant is None else f"{stem}.{variant}{dot}{ending}"


def weight_files(folder: Path, ending: str = "safetensors") -> list[Path]:
    """Files of the variant that is loaded, all with that ending, by name."""
    variant = variant_of(folder) or ""
    paths = sorted(folder.glob(f"*.{ending}")) if folder.is_dir() else []
    matches = [(path, _NAME.fullmatch(path.name)) for path in paths]
    return [path for path, match in matches if match and (match["variant"] or "") == variant]


def _rank(variant: str) -> int:
    if variant in _PREFERRED:
        return _PREFERRED.index(variant)
    return len(_PREFERRED) + variant.startswith("non_")


def stored(paths: Iterable[Path]) -> tuple[int, set[str]]:
    """Elements in safetensors files, and their types as the files name them (F32, BF16, ...).

    Only headers are read: 8 bytes with their length, then JSON. Raises OSError, ValueError.
    """
    elements, types = 0, set()
    for path in paths:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                elements += math.prod(tensor["shape"])
                types.add(tensor["dtype"])
    return elements, types
