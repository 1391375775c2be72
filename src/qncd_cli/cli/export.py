"""The command export: the quantized model in another tool's format."""

from __future__ import annotations

from pathlib import Path

from ..config.loading import load_config, parse_config
from ..runs.model import silence_diffusers
from ..store import artifacts
from ..store.files import check_folder, replacing_folder
from ..store.run_dir import find_run
from . import usage
from .console import Console
from .shared import open_model


def export_graph(
    console: Console,
    target: str,
    out: str,
    run_dir: str | None,
    samples: int,
    bound: float,
    *,
    force: bool,
) -> None:
    """The denoiser alone, as a graph of ONNX or OpenVINO."""
    from ..export import graph as stage

    stage.require(target)
    folder = Path(out)
    check_folder(folder, stage.INDEX, "folder with an exported graph", force=force)
    run = find_run(run_dir)
    config = load_config(str(run.config))
    quantized = artifacts.read(run.tensors("quantized"), "quantized")
    artifacts.check_lineage(quantized, config=config.stage_digest("quantize"))
    tree = config.to_dict()
    tree["model"]["dtype"] = "float32"  # of what stays unquantized in the graph
    config = parse_config(tree, "export")
    model = open_model(config, "cpu", run.path)
    artifacts.check_lineage(quantized, model=model.digest)
    check = stage.Check(samples, bound)
    with replacing_folder(folder) as made:
        index = stage.run(config, model, quantized, target, made, check, console.track)
        lines = usage.graph_lines(index, folder)
        readme = usage.graph_readme(config, index, lines)
        (made / usage.README).write_text(readme, encoding="utf-8")
    products, agreement = index["products"], index["agreement"]
    floats = [row for row in index["layers"] if row["why_not_integer"]]
    for row in floats[:1]:
        console.note(
            f"{len(floats)} parts are not computed in integers "
            f"(first: {row['name']}: {row['why_not_integer']}); {stage.INDEX} names them all"
        )
    payload = {
        "folder": str(folder),
        "format": target,
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "layers": len(index["layers"]),
        "integer_layers": sum(row["integer_products"] > 0 for row in index["layers"]),
        "products": products,
        "agreement": agreement,
        "python": lines,
        "seconds": round(console.lap(), 2),
    }

    psnr = agreement["psnr_db"]
    images = "identical images" if psnr is None else f"images {psnr:.1f} dB"

    def render() -> None:
        print(
            f"integer: {payload['integer_layers']} of {payload['layers']} layers; "
            f"{products['integer_here']} of {products['to_be_integer']} products of bytes are "
            f"integer operators in the compiled graph, beside {products['float_here']} float ones"
        )
        print(
            f"simulate: largest difference {agreement['max_difference']:.3g} "
            f"({agreement['relative_difference']:.2%} of the largest prediction), {images} "
            f"({samples} samples, {agreement['steps']} steps)"
        )
        print(usage.said(folder, index["file"], payload["bytes"], lines), end="")

    console.result(payload, render)


def export(console: Console, out: str, run_dir: str | None, *, force: bool) -> None:
    """A pipeline folder for diffusers."""
    from ..export.folder import check_target, save_folder
    from ..exported import exported_pipeline
    from ..models.loading import open_pipeline
    from ..models.schedule import schedule_of
    from ..sampling.samplers import make_scheduler

    silence_diffusers()
    run, folder = find_run(run_dir), Path(out)
    config = load_config(str(run.config))
    check_target(folder, force=force)
    quantized = artifacts.read(run.tensors("quantized"), "quantized")
    artifacts.check_lineage(quantized, config=config.stage_digest("quantize"))
    model = config.model
    pipeline, digest = open_pipeline(
        model.source, model.compvis_config, model.tokenizer, console.note, model.lora
    )
    artifacts.check_lineage(quantized, model=digest)
    scheduler = make_scheduler(config.sampling.scheduler, schedule_of(pipeline))
    lines = usage.pipeline_lines(config, type(pipeline), folder)
    readme = usage.pipeline_readme(config, lines, type(pipeline).__name__)
    exported = exported_pipeline(pipeline, quantized, scheduler)
    save_folder(exported, folder, force=force, readme=readme)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    inter = config.correction.inter.method
    if inter != "none":
        console.note(f"a pipeline samples by itself: the {inter} correction is not part of it")
    payload = {
        "folder": str(folder),
        "pipeline": type(pipeline).__name__,
        "bytes": size,
        "python": lines,
        "seconds": round(console.lap(), 2),
    }
    said = usage.said(folder, type(pipeline).__name__, size, lines)
    console.result(payload, lambda: print(said, end=""))
