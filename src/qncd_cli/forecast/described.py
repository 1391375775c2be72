"""Modules on the meta device that a source describes, and what is on disk of them."""

from __future__ import annotations

import difflib
import importlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import ModelError
from ..models.compvis.checkpoint import described_modules
from ..models.folder_check import check_folder, read_index, reason
from ..models.loading import UNUSED
from ..models.model_folder import find_base
from ..models.random_models import RANDOM
from ..models.schedule import corrected
from ..models.shards import shards_of
from ..models.weight_files import stored as stored_in
from ..models.weight_files import weight_files
from ..models.zoo import zoo_path
from .architectures import PUBLISHED


@dataclass(frozen=True)
class Stored:
    """A component on disk: bytes, elements, and the types that safetensors names."""

    size: int
    elements: int
    types: frozenset[str]


def at_random(name: str) -> tuple[dict[str, nn.Module], dict[str, Any] | None]:
    """Describe random:NAME, with None for a scheduler that is not known. Raises ModelError."""
    known = {**PUBLISHED, **RANDOM}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean random:{close[0]}?" if close else f"known: {', '.join(known)}"
        raise ModelError(f"no architecture random:{name}", hint)
    with torch.device("meta"):
        if name not in RANDOM:
            return PUBLISHED[name](), None
        pipeline = RANDOM[name]()
    components = pipeline.components.items()
    modules = {n: module for n, module in components if isinstance(module, nn.Module)}
    return modules, dict(pipeline.scheduler.config)


def folder_of_source(source: str) -> Path:
    """The folder of a model that is on this machine. Raises ModelError."""
    if source.startswith("zoo:"):
        return zoo_path(source.removeprefix("zoo:"))
    folder = Path(source)
    if not os.path.isdir(folder) and source.count("/") == 1 and source[0] not in "./~":
        try:
            folder = Path(DiffusionPipeline.download(source, local_files_only=True))
        except Exception as error:  # of many kinds; all mean: not here
            raise ModelError(
                f"{source}: is not on this machine, and a plan downloads nothing",
                "give a folder, or the shapes of a published model: "
                + ", ".join(f"random:{n}" for n in {**RANDOM, **PUBLISHED}),
            ) from error
    if not os.path.isfile(folder / "model_index.json"):
        raise ModelError(f"{source}: no model_index.json", "a diffusers pipeline folder has one")
    return folder


def in_checkpoint(
    source: str, compvis_config: str | None, base: str | None
) -> tuple[dict[str, nn.Module], dict[str, Any] | None, dict[str, Stored]]:
    """Describe a checkpoint file from its YAML or its base. Raises ModelError.

    As large as a .safetensors file says; others are taken for float32, as CompVis published them.
    """
    scheduler: dict[str, Any] | None
    if base is None:
        modules, scheduler = described_modules(source, compvis_config)
    else:
        modules, scheduler, _ = in_folder(find_base(base), base)
    size, types, elements = 4.0, frozenset({"F32"}), 0
    paths = shards_of(source)
    if base is not None and all(p.suffix == ".safetensors" and p.is_file() for p in paths):
        elements, found = stored_in(paths)
        size, types = sum(p.stat().st_size for p in paths) / max(1, elements), frozenset(found)
    counts = [(n, sum(p.numel() for p in m.parameters())) for n, m in modules.items()]
    counts.append(("text_encoders", max(0, elements - sum(c for _, c in counts))))
    return modules, scheduler, {n: Stored(int(size * c), c, types) for n, c in counts}


Found = tuple[dict[str, nn.Module], dict[str, Any] | None, dict[str, Stored]]


def in_folder(folder: Path, source: str) -> Found:
    """Modules on meta; the scheduler's configuration; what is on disk by component, also of those
    that are not diffusers' (text encoders). Raises ModelError."""
    modules: dict[str, nn.Module] = {}
    stored: dict[str, Stored] = {}
    scheduler = None
    index = read_index(folder, source)
    check_folder(folder, source, index)
    try:
        for name, entry in index.items():
            if not isinstance(entry, list) or entry[0] is None or name in UNUSED:
                continue
            if name == "scheduler":
                scheduler = json.loads((folder / name / "scheduler_config.json").read_bytes())
                continue
            stored[name] = _weights(folder / name)
            kind = _module_class(*entry)
            if kind is not None:
                with torch.device("meta"):
                    modules[name] = kind.from_config(kind.load_config(folder / name))
        scheduler = scheduler and corrected(index["_class_name"], modules.get("unet"), scheduler)
    except (OSError, ValueError, KeyError, AttributeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"{source}: cannot be read: {reason(error)}", "is the folder complete?"
        ) from error
    return modules, scheduler, stored


def _module_class(library: str, name: str) -> Any:
    """diffusers' own or ours; None for others."""
    package = __name__.partition(".")[0]
    if library == "diffusers":
        return getattr(diffusers, name)
    if library.startswith(f"{package}.models."):
        return getattr(importlib.import_module(library), name)
    return None


def _weights(folder: Path) -> Stored:
    """Bytes, elements and types of a component's safetensors, in the variant that is loaded."""
    paths = weight_files(folder)
    elements, types = 0, set()
    for path in paths:
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
            elements += sum(math.prod(part.get_shape()) for part in slices)
            types |= {part.get_dtype() for part in slices}
    return Stored(sum(p.stat().st_size for p in paths), elements, frozenset(types))
