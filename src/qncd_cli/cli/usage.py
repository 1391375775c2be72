"""How an exported folder is used, in Python: what export prints and writes into the folder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..config.schema import Config
from ..vocabulary import megabytes
from .model_card import Format

README = "README.md"
OPENED = {
    "onnx": (
        ["import numpy as np, onnxruntime"],
        'denoiser = onnxruntime.InferenceSession("{path}")',
        "prediction = denoiser.run(None, inputs)[0]",
    ),
    "openvino": (
        ["import numpy as np, openvino"],
        'denoiser = openvino.Core().compile_model("{path}", "CPU")',
        "prediction = denoiser(inputs)[0]",
    ),
}
"""Format of a graph -> its imports, how it is opened, how it is called."""
OPTIMUM = {
    "onnx": ("optimum.onnxruntime", "ORTDiffusionPipeline"),
    "openvino": ("optimum.intel", "OVDiffusionPipeline"),
}
TYPES = {"int64": "np.int64", "int32": "np.int32"}


def pipeline_lines(config: Config, kind: type, folder: Path | str) -> list[str]:
    """Three lines that load a pipeline folder, and one that draws an image as the run does.

    folder: or an id on a hub. kind: the pipeline's class, whose call says what it takes.
    """
    return [
        "import qncd_cli.exported",
        "from diffusers import DiffusionPipeline",
        f"pipeline = DiffusionPipeline.from_pretrained({str(folder)!r})",
        f"image = pipeline({', '.join(_arguments(config, kind))}).images[0]",
    ]


def optimum_lines(config: Config, kind: type, folder: Path | str, target: str) -> list[str]:
    """The same with Optimum's pipelines, for graphs of ONNX or OpenVINO."""
    module, name = OPTIMUM[target]
    return [
        f"from {module} import {name}",
        f"pipeline = {name}.from_pretrained({str(folder)!r})",
        f"image = pipeline({', '.join(_arguments(config, kind))}).images[0]",
    ]


def _arguments(config: Config, kind: type) -> list[str]:
    sampling = config.sampling
    takes = inspect.signature(kind.__call__).parameters
    label = 0 if sampling.classes == "all" else sampling.classes[0]
    height, width = sampling.sides or (None, None)
    wanted = {
        "prompt": sampling.prompts[0] if sampling.prompts else None,
        "negative_prompt": sampling.negative_prompt or None,
        "class_labels": [label],
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "height": height,
        "width": width,
    }
    return [f"{k}={v!r}" for k, v in wanted.items() if k in takes and v is not None]


WITH_VNNI = (
    "**Only CPUs with VNNI compute it right**: on others sums of 8-bit products saturate, and "
    "images are wrong."
)
"""Said of a graph that was exported with --cpus vnni."""


def graph_lines(index: Mapping[str, Any], folder: Path) -> list[str]:
    """Python that calls a graph once, on zeros. index: what graph.json says."""
    imports, opened, called = OPENED[index["format"]]
    inputs = ", ".join(_zeros(name, entry) for name, entry in index["inputs"].items())
    path = (folder / index["file"]).as_posix()
    return [*imports, opened.format(path=path), f"inputs = {{{inputs}}}", called]


def _zeros(name: str, entry: Mapping[str, Any]) -> str:
    shape = [1 if size == "batch" else size for size in entry["shape"]]
    kind = TYPES.get(entry["dtype"], "np.float32")
    return f'"{name}": np.zeros({tuple(shape)}, {kind})'


def graph_said(payload: Mapping[str, Any]) -> str:
    """What export prints of a denoiser's graph: what is in integers, and how well it agrees."""
    products, agreement = payload["products"], payload["agreement"]
    psnr = agreement["psnr_db"]
    images = "identical images" if psnr is None else f"images {psnr:.1f} dB"
    return (
        f"integer: {payload['integer_layers']} of {payload['layers']} layers; "
        f"{products['integer_here']} of {products['to_be_integer']} products of bytes are "
        f"integer operators in the compiled graph, beside {products['float_here']} float ones\n"
        f"simulate: largest difference {agreement['max_difference']:.3g} "
        f"({agreement['relative_difference']:.2%} of the largest prediction), {images} "
        f"({agreement['samples']} samples, {agreement['steps']} steps)\n"
    )


def optimum_format(target: str, package: str, size: int, cpus: str) -> Format:
    """What a model card says of a folder for Optimum. size: of the denoiser in bytes; cpus: on
    which it is exact."""
    return Format(
        "as graphs that Optimum's pipelines load. The denoiser is quantized, the other parts are "
        "float32; `graph.json` says what is computed in integers, and how well the graph agrees."
        + (f" {WITH_VNNI}" if cpus == "vnni" else ""),
        "Loading needs an environment with Optimum and a diffusers that fits it "
        f"(`pip install '{package}' diffusers`), without qncd-cli:",
        library="diffusers",
        tags=(target,),
        size=size,
    )


def graph_readme(config: Config, index: Mapping[str, Any], lines: Sequence[str]) -> str:
    """README.md of a folder with a graph. lines: of graph_lines."""
    return _readme(
        config,
        f"The denoiser of the model alone, quantized, as a graph ({index['file']}). It predicts "
        "for a batch of any size at one timestep; the sampler around it, guidance and the decoder "
        "are not part of it, nor are corrections of the sampling loop.",
        "Calling it, here on zeros (`graph.json` names inputs, layers and what is in integers):",
        lines,
        _paragraph(WITH_VNNI) if index["cpus"] == "vnni" else "",
    )


def _readme(config: Config, what: str, how: str, lines: Sequence[str], more: str) -> str:
    quantization = config.quantization
    label = quantization.widths.label
    return (
        f"# {config.model.source}, {label}\n\n"
        + _paragraph(what)
        + _paragraph(how)
        + "```python\n"
        + "".join(f"{line}\n" for line in lines)
        + "```\n\n"
        + more
        + f"Written by `qncd export` (version {__version__}), preset `{quantization.preset}`.\n"
    )


def _paragraph(text: str) -> str:
    return f"{text}\n\n"


def said(folder: Path, what: str, size: int, lines: Sequence[str]) -> str:
    """What export prints: what was written, and the lines that load it."""
    code = "".join(f"\n  {line}" for line in lines)
    return f"{folder}: {what}, {megabytes(size)}; {README} says how to load it:\n{code}\n"
