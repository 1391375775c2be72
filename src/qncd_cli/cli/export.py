"""The command export: the quantized model in another tool's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.loading import load_config, parse_config
from ..config.schema import Config
from ..errors import ModelError
from ..runs.model import silence_diffusers
from ..store import artifacts
from ..store.files import check_folder, replacing_folder
from ..store.run_dir import RunDir, find_run
from ..vocabulary import megabytes
from . import model_card, usage
from .console import Console
from .shared import open_model


def export_graph(
    console: Console,
    target: str,
    out: str,
    run_dir: str | None,
    samples: int,
    bound: float,
    cpus: str,
    *,
    force: bool,
) -> None:
    """The denoiser alone, as a graph of ONNX or OpenVINO."""
    from ..export import graph as stage

    stage.require(target)
    stage.check_cpus(cpus)
    folder = Path(out)
    check_folder(folder, stage.INDEX, "folder with an exported graph", force=force)
    config, model, quantized = opened(find_run(run_dir))
    check = stage.Check(samples, bound)
    with replacing_folder(folder) as made:
        index = stage.run(config, model, quantized, target, made, cpus, check, console.track)
        lines = usage.graph_lines(index, folder)
        readme = usage.graph_readme(config, index, lines)
        (made / usage.README).write_text(readme, encoding="utf-8")
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
        "products": index["products"],
        "agreement": index["agreement"],
        "python": lines,
        "seconds": round(console.lap(), 2),
    }

    def render() -> None:
        print(usage.graph_said(payload), end="")
        print(usage.said(folder, index["file"], payload["bytes"], lines), end="")

    console.result(payload, render)


def export_comfyui(
    console: Console,
    out: str,
    run_dir: str | None,
    samples: int,
    bound: float | None,
    *,
    force: bool,
) -> None:
    """The denoiser alone, as one file in ComfyUI's names and formats."""
    from ..export import comfyui as stage

    path = Path(out)
    stage.check_target(path, force=force)
    run = find_run(run_dir)
    config, model, quantized = opened(run)
    made = stage.run(config, model, quantized, path, samples, bound, console.track)
    layers, sizes, agreement = made["layers"], made["sizes"], made["agreement"]
    kinds = {kind: [row for row in layers if row["format"] == kind] for kind in stage.FORMATS}
    reasons: dict[str, int] = {}
    for row in layers:
        if row["why"]:
            reasons[row["why"]] = reasons.get(row["why"], 0) + 1
    for why, count in reasons.items():
        console.note(f"{count} of {len(layers)} layers: {why}")
    if not made["known_sizes"]:
        console.note("no published model has these sizes: ComfyUI will not know it")
    prediction = model.scheduler_config.get("prediction_type", "epsilon")
    if prediction == "v_prediction":
        console.note("the model predicts v: say so in ComfyUI (node ModelSamplingDiscrete)")
    without_correction(console, config, "a file")
    payload = {
        "file": str(path),
        "format": "comfyui",
        "bytes": sizes["file"],
        "artifact_bytes": sizes["artifact"],
        "formats": {kind: len(rows) for kind, rows in kinds.items()},
        "layers": layers,
        "agreement": agreement,
        "seconds": round(console.lap(), 2),
    }

    def decibels(key: str) -> str:
        value = agreement[key]
        return "identical" if value is None else f"{value:.1f} dB"

    def render() -> None:
        counts = ", ".join(f"{len(rows)} {kind}" for kind, rows in kinds.items() if rows)
        print(
            f"{path}: {megabytes(sizes['file'])} "
            f"({sizes['file'] / sizes['artifact']:.2f} of the artifact's), layers: {counts}"
        )
        print(
            f"inputs quantized row by row: largest difference of a prediction "
            f"{agreement['relative_difference']:.2%}, images {decibels('psnr_to_artifact_db')} to "
            f"the artifact's and {decibels('psnr_to_full_db')} to full precision's, the "
            f"artifact's {decibels('artifact_psnr_to_full_db')} "
            f"({samples} samples, {agreement['steps']} steps)"
        )
        print(
            "put it into ComfyUI's models/diffusion_models; text encoders and VAE stay as they are"
        )

    console.result(payload, render)


def exportable(run: RunDir) -> Config:
    """The run's configuration. Raises ModelError for a denoiser that other tools have two of."""
    config = load_config(str(run.config))
    if config.sampling.control is not None:
        raise ModelError(
            f"{run.path}: a U-Net and its ControlNet are one denoiser here, and not exported",
            "draw its images with qncd sample --control",
        )
    return config


def opened(run: RunDir) -> tuple[Config, Any, artifacts.Artifact]:
    """Configuration, model (in float32 on the CPU) and quantized artifact of a run."""
    config = exportable(run)
    quantized = artifacts.read(run.tensors("quantized"), "quantized")
    artifacts.check_lineage(quantized, config=config.stage_digest("quantize"))
    tree = config.to_dict()
    tree["model"]["dtype"] = "float32"  # of what stays unquantized
    config = parse_config(tree, "export")
    model = open_model(config, "cpu", run.path)
    artifacts.check_lineage(quantized, model=model.digest)
    return config, model, quantized


def without_correction(console: Console, config: Config, what: str) -> None:
    if config.first_stage.bits is not None:
        console.note(f"{what} decodes in floating point: first_stage.bits is of qncd sample")
    if config.text_encoders.bits is not None:
        console.note(f"{what} encodes in floating point: text_encoders.bits is of qncd sample")
    inter = config.correction.inter.method
    if inter != "none":
        console.note(f"{what} samples by itself: the {inter} correction is not part of it")


def bytes_in(folder: Path) -> int:
    """Sum over all files of a folder and of those below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def opened_pipeline(
    console: Console, config: Config, quantized: artifacts.Artifact
) -> tuple[Any, Any]:
    """The pipeline as it is stored, and the run's scheduler. Raises ModelError, ArtifactError."""
    from ..models.loading import open_pipeline
    from ..models.schedule import schedule_of
    from ..sampling.samplers import make_scheduler

    artifacts.check_lineage(quantized, config=config.stage_digest("quantize"))
    model = config.model
    pipeline, digest = open_pipeline(
        *(model.source, model.compvis_config, model.tokenizer, console.note, model.lora),
        base=model.base,
    )
    artifacts.check_lineage(quantized, model=digest)
    return pipeline, make_scheduler(config.sampling.scheduler, schedule_of(pipeline))


def export(
    console: Console, out: str, run_dir: str | None, hub: str | None, *, force: bool
) -> None:
    """A pipeline folder for diffusers, and its copy on a hub. hub: id of the repository."""
    from ..export.folder import check_target, save_folder
    from ..export.hub import check_id, push
    from ..exported import exported_pipeline

    silence_diffusers()
    run, folder = find_run(run_dir), Path(out)
    if hub is not None:
        check_id(hub)
    config = exportable(run)
    check_target(folder, force=force)
    quantized = artifacts.read(run.tensors("quantized"), "quantized")
    pipeline, scheduler = opened_pipeline(console, config, quantized)
    kind, source = type(pipeline).__name__, model_card.source_of(config.model.source)
    lines = usage.pipeline_lines(config, type(pipeline), folder)
    named = lines if hub is None else usage.pipeline_lines(config, type(pipeline), hub)
    readme = model_card.card_text(config, run, quantized.digest, kind, named, source)
    exported = exported_pipeline(pipeline, quantized, scheduler)
    save_folder(exported, folder, force=force, readme=readme, beside=source.files)
    size = bytes_in(folder)
    without_correction(console, config, "a pipeline")
    payload = {
        "folder": str(folder),
        "pipeline": kind,
        "bytes": size,
        "python": lines,
        "commit": None if hub is None else push(folder, hub),
        "seconds": round(console.lap(), 2),
    }
    said = usage.said(folder, kind, size, lines)
    said += "" if hub is None else f"pushed: {payload['commit']}\n"
    console.result(payload, lambda: print(said, end=""))
