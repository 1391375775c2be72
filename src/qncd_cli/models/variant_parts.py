"""Components of which a folder holds no plain weights, loaded from the variant that it holds."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import diffusers
import torch

from .folder_check import is_there
from .prompt_length import Tell
from .weight_files import variant_of, variants


def variant_parts(
    folder: Path,
    index: dict[str, Any],
    given: Collection[str],
    dtype_of: Callable[[str], torch.dtype | None],
    tell: Tell,
) -> dict[str, Any]:
    """Component: module, but for those that are given already; dtype None: as it is stored.

    Each is loaded for itself: diffusers' one variant for a whole pipeline would also be taken by
    components that have plain weights beside it. tell: hears which variants are taken.
    """
    loaded, said = {}, []
    for part, entry in index.items():
        if part in given or not is_there(index, part):
            continue
        variant = variant_of(folder / part)
        if variant is None:
            continue
        dtype = dtype_of(part)
        options = {} if dtype is None else {"torch_dtype": dtype}
        loaded[part] = _class_of(*entry).from_pretrained(
            str(folder / part), variant=variant, local_files_only=True, **options
        )
        others = variants(folder / part)[1:]
        said.append(f"{part} {variant}" + (f", not {', '.join(others)}" if others else ""))
    if said:
        tell(f"{folder}: no plain weights of these, a variant is taken: {'; '.join(said)}")
    return loaded


def _class_of(library: str, name: str) -> Any:
    """Of a component, as model_index.json names it; some lie beside one of diffusers' pipelines."""
    beside = getattr(diffusers.pipelines, library, None)
    return getattr(beside or importlib.import_module(library), name)
