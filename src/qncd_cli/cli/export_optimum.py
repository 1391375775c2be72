"""The command export, for Optimum: a pipeline folder of graphs, the quantized denoiser in it."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..config.model_card import folder_of
from ..runs.model import silence_diffusers
from ..store import artifacts
from ..store.files import check_folder, replacing_folder
from ..store.run_dir import find_run
from . import model_card, usage
from .console import Console
from .export import bytes_in, exportable, opened, opened_pipeline, without_correction


def export_optimum(
    console: Console,
    to: str,
    out: str,
    run_dir: str | None,
    hub: str | None,
    samples: int,
    bound: float,
    cpus: str,
    *,
    force: bool,
) -> None:
    """hub: id of the repository that gets a copy."""
    from ..export import graph
    from ..export import optimum as stage
    from ..export.hub import check_id, push

    stage.require(to)
    graph.check_cpus(cpus)
    silence_diffusers()
    if hub is not None:
        check_id(hub)
    folder, run, form = Path(out), find_run(run_dir), stage.FORMATS[to]
    check_folder(folder, stage.MODEL_INDEX, "pipeline folder", force=force)
    config = exportable(run)
    quantized = artifacts.read(run.tensors("quantized"), "quantized")
    pipeline, scheduler = opened_pipeline(console, config, quantized)
    kind, source = type(pipeline), model_card.source_of(config.model.source)
    interface = stage.interface_of(kind.__name__, to)
    if pipeline.components.get("safety_checker") is not None:
        console.note("the safety checker is not part of it: Optimum loads none of these")
    tokenizers = folder_of(config.model.base or config.model.source)
    lines = usage.optimum_lines(config, kind, folder, form.target)
    named = lines if hub is None else usage.optimum_lines(config, kind, hub, form.target)
    with replacing_folder(folder) as made:
        parts = stage.write_rest(pipeline, scheduler, tokenizers, to, made, console.track)
        del pipeline  # the model is opened again, as the stages see it
        config, model, quantized = opened(run)
        check = graph.Check(samples, bound)
        index = stage.write_denoiser(
            config, model, quantized, interface, to, made, cpus, check, console.track
        )
        index = stage.finish(made, index, parts)
        size = bytes_in(made / interface.folder)
        described = usage.optimum_format(form.target, form.package, size, cpus)
        card = run, quantized.digest, kind.__name__, named, source, described
        (made / usage.README).write_text(model_card.card_text(config, *card), encoding="utf-8")
        for path in source.files:
            shutil.copyfile(path, made / path.name)
    without_correction(console, config, "a pipeline")
    products, agreement, size = index["products"], index["agreement"], bytes_in(folder)
    payload = {
        "folder": str(folder),
        "format": to,
        "pipeline": kind.__name__,
        "bytes": size,
        "layers": len(index["layers"]),
        "integer_layers": sum(row["integer_products"] > 0 for row in index["layers"]),
        "products": products,
        "agreement": agreement,
        "float_parts": parts,
        "python": lines,
        "commit": None if hub is None else push(folder, hub),
        "seconds": round(console.lap(), 2),
    }

    def render() -> None:
        print(usage.graph_said(payload), end="")
        worst = max(parts, key=lambda name: parts[name])
        print(
            f"float32: {', '.join(parts)}; largest difference from the model's "
            f"{parts[worst]:.2g} of the largest output ({worst})"
        )
        print(usage.said(folder, f"{kind.__name__} for Optimum", size, lines), end="")
        print(f"loading needs an environment with {form.package} and diffusers")
        if hub is not None:
            print(f"pushed: {payload['commit']}")

    console.result(payload, render)
