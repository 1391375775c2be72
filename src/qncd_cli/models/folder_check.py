"""What can be said of a pipeline folder before anything of it is loaded: from its JSON alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ModelError

OWN_METHOD = "qncd"


def read_index(folder: Path, source: str) -> dict[str, Any]:
    """model_index.json, with a class name. Raises ModelError."""
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{source}: model_index.json is damaged: {error}") from error
    return index


def is_there(index: dict[str, Any], part: str) -> bool:
    """Whether the pipeline was saved with that component."""
    entry = index.get(part)
    return isinstance(entry, list) and bool(entry) and entry[0] is not None


def check_folder(folder: Path, source: str, index: dict[str, Any]) -> None:
    """Raise ModelError for what no loader here can read, with the reason: code of the folder's own,
    weights that are quantized already."""
    kind = index["_class_name"]
    if not isinstance(kind, str):
        raise ModelError(
            f"{source}: its pipeline is code of its own ({'.'.join(map(str, kind))})",
            "qncd loads diffusers' own pipelines and runs no code from model folders",
        )
    for name, entry in sorted(index.items()):
        if not is_there(index, name):
            continue
        if (folder / name / f"{entry[0]}.py").is_file():
            raise ModelError(
                f"{source}: {name} is a class of its own ({entry[0]}.{entry[1]})",
                "qncd runs no code from model folders",
            )
        method = _quantized_by(folder / name / "config.json")
        if method == OWN_METHOD:
            raise ModelError(
                f"{source}: is a quantized model that qncd exported",
                "give the model that it was made from",
            )
        if method is not None:
            raise ModelError(
                f"{source}: the weights of {name} are quantized already ({method})",
                "give the model in float32, bfloat16 or float16",
            )


def _quantized_by(config: Path) -> str | None:
    """The method that a component's config.json names; None for unquantized weights."""
    try:
        section = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None  # loading says what is wrong with it
    return str(section.get("quant_method")) if isinstance(section, dict) else None


def reason(error: Exception) -> str:
    """The first line of what a library says, whole."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
