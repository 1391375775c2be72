"""What a configuration leaves to the model's own files, put in before it is validated."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..sampling.scheduler_classes import check_known
from . import model_card
from .model_card import Card

OWN_KEYS = ("scheduler", "steps", "guidance_scale")
"""Keys of the section `sampling` that are the model's own unless they are set."""
Download = Callable[[str], object]
"""Brings a model of the hub to this machine."""
Tree = dict[str, Any]


def section_of(tree: Tree, name: str) -> Tree:
    """A section of a tree that nobody has validated yet, made where there is none; what is no
    section is left to the validation."""
    found = tree.setdefault(name, {})
    return found if isinstance(found, dict) else {}


def place_model(tree: Tree, beside: Path) -> None:
    """Paths of the model, which may start with ~ or be relative to the current folder or to that of
    the configuration, become absolute: a run is found again from anywhere."""
    section = section_of(tree, "model")
    for key in ("source", "compvis_config", "tokenizer", "base"):
        name = section.get(key)
        if not isinstance(name, str) or name.startswith(("zoo:", "random:")):
            continue
        place = place_of(name, beside)
        section[key] = name if place is None else os.path.abspath(place)
    loras = section.get("lora")
    loras = [loras] if isinstance(loras, str) else loras
    if isinstance(loras, list):
        section["lora"] = [
            _placed(lora, beside) if isinstance(lora, str) else lora for lora in loras
        ]


def _placed(lora: str, beside: Path) -> str:
    """FILE or FILE:WEIGHT with the file's absolute path."""
    name, colon, weight = lora.rpartition(":")
    if (place := place_of(lora, beside)) is not None:
        return os.path.abspath(place)
    place = place_of(name, beside) if name else None
    return lora if place is None else f"{os.path.abspath(place)}{colon}{weight}"


def place_of(name: str, beside: Path) -> Path | None:
    """What is there by that name, looked for in the current folder, then in that of the
    configuration; ~ is the home folder."""
    path = os.path.expanduser(name)
    return next((Path(p) for p in (path, os.path.join(beside, path)) if os.path.exists(p)), None)


def ask_model(tree: Tree, where: str, download: Download | None) -> Card | None:
    """Fill what sampling takes from the model's own files; those of a complete tree are not read.

    Raises ConfigError where they are needed and the model is not here, or of another kind.
    """
    model, sampling = section_of(tree, "model"), section_of(tree, "sampling")
    source = model.get("source")
    described = {key: model.get(key) for key in ("compvis_config", "base")}
    described = {key: name for key, name in described.items() if isinstance(name, str)}
    missing = [key for key in OWN_KEYS if sampling.get(key) is None]
    if not isinstance(source, str) or not source:
        return None
    if not missing and sampling.get("prompts") is not None:
        return None
    for key in missing:
        sampling.pop(key, None)
    card = model_card.card_of(source, **described)
    if missing and model_card.is_hub_id(source) and model_card.folder_of(source) is None:
        if download is None:
            raise ConfigError(
                f"{where}: {', '.join(f'sampling.{key}' for key in missing)} would be the model's "
                f"own, but {source} is neither a folder here nor in the hub's cache",
                f"download it (hf download {source}), or set them",
            )
        download(source)
        card = model_card.card_of(source)
    if card is None or not missing:
        return card
    if card.scheduler is None and "scheduler" in missing:
        own_class = card.scheduler_class
        check_known(own_class, f"{where}: no sampling.scheduler fits a model made for {own_class}")
        raise ConfigError(
            f"{where}: the model's own scheduler, {card.scheduler_class}, has no namesake here",
            "set sampling.scheduler, e.g. to euler or dpmsolver++",
        )
    own = {"scheduler": card.scheduler, "steps": card.steps, "guidance_scale": card.guidance_scale}
    sampling.update({key: own[key] for key in missing})
    return card
