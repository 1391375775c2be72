"""The packaged models: small, real, trained by training/train_zoo.py on Fashion-MNIST and emoji."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from ..errors import ModelError

ZOO = Path(__file__).resolve().parent.parent / "zoo"


def zoo_models() -> dict[str, Path]:
    """Packaged models by name."""
    return {p.parent.name: p.parent for p in sorted(ZOO.glob("*/model_index.json"))}


def zoo_path(name: str) -> Path:
    """Folder of a packaged model. Raises ModelError with the nearest known name."""
    models = zoo_models()
    if name in models:
        return models[name]
    close = difflib.get_close_matches(name, models, n=1)
    known = ", ".join(f"zoo:{m}" for m in models)
    raise ModelError(
        f"no packaged model zoo:{name}",
        f"did you mean zoo:{close[0]}?" if close else f"packaged: {known}",
    )


def training_record(name: str) -> dict[str, Any]:
    """How a packaged model was trained and what quality it reached."""
    path = zoo_path(name) / "training.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
