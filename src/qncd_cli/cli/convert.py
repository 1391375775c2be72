"""The command convert: a checkpoint file becomes a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runs.model import silence_diffusers
from ..vocabulary import megabytes
from .console import Console


def convert(
    console: Console,
    checkpoint: str,
    config: str | None,
    tokenizer: str | None,
    base: str | None,
    adm: Mapping[str, Any] | None,
    out: str,
    *,
    force: bool,
) -> None:
    from ..export.folder import check_target, save_folder
    from ..models.compvis.adm_file import adm_pipeline
    from ..models.loading import open_pipeline

    silence_diffusers()
    folder = Path(out)
    check_target(folder, force=force)
    if adm is not None:
        pipeline = adm_pipeline(checkpoint, **adm)
    else:
        pipeline, _ = open_pipeline(checkpoint, config, tokenizer, console.note, base=base)
    save_folder(pipeline, folder, force=force)
    parameters = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in pipeline.components.items()
        if hasattr(part, "parameters")
    }
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    payload = {
        "folder": str(folder),
        "pipeline": type(pipeline).__name__,
        "parameters": parameters,
        "bytes": size,
        "seconds": round(console.lap(), 2),
    }

    def render() -> None:
        print(f"{folder}: {payload['pipeline']}, {megabytes(size)}")
        for name, count in parameters.items():
            print(f"  {name}: {count:,} parameters")

    console.result(payload, render)
