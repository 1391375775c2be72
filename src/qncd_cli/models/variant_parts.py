"""Components that are loaded one by one, for what loading a whole pipeline would not say."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..errors import ModelError
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

    Those of which the folder holds a variant alone: diffusers' one variant for a whole pipeline
    would also be taken by components that have plain weights beside it. tell: hears which variants
    are taken. And text encoders, whose loader tells only then what it filled with random numbers:
    raises ModelError.
    """
    loaded, said = {}, []
    for part, entry in index.items():
        if part in given or not is_there(index, part):
            continue
        variant = variant_of(folder / part)
        encodes = part.startswith("text_encoder") and entry[0] == "transformers"
        if variant is None and not encodes:
            continue
        dtype = dtype_of(part)
        options: dict[str, Any] = {} if dtype is None else {"torch_dtype": dtype}
        options |= {"variant": variant, "local_files_only": True}
        load = _whole_encoder if encodes else _component
        loaded[part] = load(_class_of(*entry), folder / part, options)
        if variant is None:
            continue
        others = variants(folder / part)[1:]
        said.append(f"{part} {variant}" + (f", not {', '.join(others)}" if others else ""))
    if said:
        tell(f"{folder}: no plain weights of these, a variant is taken: {'; '.join(said)}")
    return loaded


def _component(kind: Any, folder: Path, options: dict[str, Any]) -> Any:
    return kind.from_pretrained(str(folder), **options)


def _whole_encoder(kind: Any, folder: Path, options: dict[str, Any]) -> Any:
    """A text encoder of transformers, which knows what of its tensors is tied or never stored."""
    if (dtype := options.pop("torch_dtype", None)) is not None:
        options["dtype"] = dtype
    encoder, found = kind.from_pretrained(str(folder), output_loading_info=True, **options)
    missing = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} of {len(encoder.state_dict())} tensors missing "
            f"(first: {missing[0]})",
            "is it another architecture than its config.json says?",
        )
    return encoder


def _class_of(library: str, name: str) -> Any:
    """Class that model_index.json names for a component; some lie beside a diffusers pipeline."""
    beside = getattr(diffusers.pipelines, library, None)
    return getattr(beside or importlib.import_module(library), name)
