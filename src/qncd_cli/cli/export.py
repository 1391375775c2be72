"""The command export: the quantized model in another tool's format."""

from __future__ import annotations

import time
from pathlib import Path

from .. import artifacts
from ..config_files import load_config
from ..run_dir import find_run
from .console import Console
from .shared import silence_diffusers


def export(console: Console, out: str, run_dir: str | None, *, force: bool) -> None:
    from ..exported import exported_pipeline
    from ..models.loading import open_pipeline, schedule_of
    from ..models.saving import check_target, save_folder
    from ..sampling.samplers import make_scheduler

    silence_diffusers()
    start = time.perf_counter()
    run, folder = find_run(run_dir), Path(out)
    config = load_config(str(run.config))
    check_target(folder, force=force)
    quantized = artifacts.read(run.tensors("quantized"), "quantized")
    artifacts.check_lineage(quantized, config=config.stage_digest("quantize"))
    model = config.model
    pipeline, digest = open_pipeline(model.source, model.compvis_config, model.tokenizer)
    artifacts.check_lineage(quantized, model=digest)
    scheduler = make_scheduler(config.sampling.scheduler, schedule_of(pipeline))
    save_folder(exported_pipeline(pipeline, quantized, scheduler), folder, force=force)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    inter = config.correction.inter.method
    if inter != "none":
        console.note(f"a pipeline samples by itself: the {inter} correction is not part of it")
    payload = {
        "folder": str(folder),
        "pipeline": type(pipeline).__name__,
        "bytes": size,
        "seconds": round(time.perf_counter() - start, 2),
    }
    console.result(payload, lambda: print(f"{folder}: {payload['pipeline']}, {size / 1e6:,.1f} MB"))
