#!/usr/bin/env python
"""A trained ADM U-Net of others, out of an ONNX file: read, compared, quantized.

    pip download --no-deps adaptive-terrain-diffusion==0.4.2
    python scripts/terrain.py adaptive_terrain_diffusion-0.4.2-py3-none-any.whl terrain

The consistency model of Adaptive-Diffusion-Terrain (Youwei Yu, MIT; arXiv 2303.01469 distilled to
one step) draws height fields of 128 x 128 for a difficulty from 1 to 100. Its initializers become
the model folder OUT: difficulties are classes, of which the file's network makes embeddings by a
formula. The float output has to be ONNX Runtime's of the same file; then the model is quantized.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import torch
from diffusers import CMStochasticIterativeScheduler
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from qncd_cli.cli.console import ErrorReportingCommand
from qncd_cli.config.loading import load_config
from qncd_cli.errors import ModelError
from qncd_cli.metrics.tensor import sqnr_db
from qncd_cli.models.compvis.adm import ADMOptions, adm_unet
from qncd_cli.models.loading import DiffusionModel, load_model
from qncd_cli.models.pipelines import ClassConditionalPixelPipeline
from qncd_cli.models.topology import weight_layers
from qncd_cli.quant.layers import QuantizedLayer
from qncd_cli.runtime import trajectory
from qncd_cli.runtime.denoiser import full_denoiser, quantized_denoiser
from qncd_cli.sampling.noise import generators_for, initial_noise
from qncd_cli.stages import calibrate, quantize
from qncd_cli.vocabulary import megabytes

SIDE, CLASSES = 128, 100
SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5
OPTIONS = ADMOptions(SIDE, head_channels=32, stacked=True)
PREFIX = "network."
BOUND = 1e-4
"""Relative difference from ONNX Runtime's output that is too large."""
SEEDS = range(1000, 1008)
"""Not those that calibration draws."""
LICENSE = """---
license: mit
base_model: youwyu/Adaptive-Diffusion-Terrain
---
Converted by qncd's scripts/terrain.py from the package adaptive-terrain-diffusion 0.4.2
(Copyright Youwei Yu, MIT license). Class d stands for difficulty d + 1; class 100 is unused.
"""


@click.command(cls=ErrorReportingCommand)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--bits", default="w8a8,w4a8,w4a6", show_default=True)
@click.option("--trajectories", default=16, show_default=True, help="Of calibration.")
@click.option("--set", "overrides", multiple=True, help="Override a key of the configuration.")
@click.option("--json", "record", type=click.Path(path_type=Path), help="Every layer's figures.")
def main(
    file: Path,
    out: Path,
    bits: str,
    trajectories: int,
    overrides: tuple[str, ...],
    record: Path | None,
) -> None:
    """FILE: the wheel, or the ONNX file in it; OUT: the model folder."""
    onnxruntime.set_default_logger_severity(3)
    data = onnx_bytes(file)
    pipeline = pipeline_of(data, str(file))
    pipeline.save_pretrained(out)
    (out / "README.md").write_text(LICENSE)
    model = load_model(str(out))
    difference = against_onnxruntime(model, data)
    print(f"ONNX Runtime: relative difference of the output {difference:.2g}, {len(SEEDS)} samples")
    if not difference < BOUND:
        raise ModelError(
            f"{file}: the output differs by {difference:.2g}", "is it another version?"
        )
    found = {}
    print("| bits | size | output SQNR (dB) | layers: lowest | median | highest |")
    print("|---|---|---|---|---|---|")
    for widths in bits.split(","):
        measured = measure(model, config_of(out, widths, trajectories, overrides))
        found[widths] = measured
        ordered = sorted(measured["layers"].values())
        low, mid, high = ordered[0], median(ordered), ordered[-1]
        print(
            f"| {widths.upper()} | {megabytes(measured['bytes'])} | {measured['output']:.1f} "
            f"| {low:.1f} | {mid:.1f} | {high:.1f} |"
        )
    by_resolution(found)
    if record:
        record.write_text(json.dumps(found, indent=1))


def by_resolution(found: dict[str, Any]) -> None:
    """Lowest and median SQNR of layers by the place in the network."""
    print(f"\n| layers | {' | '.join(w.upper() for w in found)} |")
    print(f"|---|{'---|' * len(found)}")
    names = list(next(iter(found.values()))["layers"])
    places = dict.fromkeys(re.match(r"(\w+?_blocks\.\d+|[a-z_]+)", name)[0] for name in names)
    for place in places:
        cells = []
        for measured in found.values():
            values = [v for n, v in measured["layers"].items() if n.startswith(place)]
            cells.append(f"{min(values):.1f} / {median(values):.1f}")
        count = sum(name.startswith(place) for name in names)
        print(f"| {place} ({count}) | {' | '.join(cells)} |")


# ------------------------------------------------------------------ reading


def onnx_bytes(file: Path) -> bytes:
    if file.suffix != ".whl":
        return file.read_bytes()
    with zipfile.ZipFile(file) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".onnx"))
        return wheel.read(name)


def pipeline_of(data: bytes, where: str) -> ClassConditionalPixelPipeline:
    tensors = adm_tensors(onnx.load(io.BytesIO(data)).graph)
    difficulty = torch.arange(CLASSES)[:, None] / (CLASSES - 1)
    first, second = (
        (tensors.pop(f"label_emb.{i}.weight"), tensors.pop(f"label_emb.{i}.bias")) for i in (0, 2)
    )
    embedded = F.linear(F.silu(F.linear(difficulty, *first)), *second)
    tensors["label_emb.weight"] = F.pad(embedded, (0, 0, 0, 1))
    scheduler = CMStochasticIterativeScheduler(
        sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, sigma_data=SIGMA_DATA, clip_denoised=True
    )
    return ClassConditionalPixelPipeline(adm_unet(tensors, OPTIONS, where), scheduler)


def adm_tensors(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """The network's weights in guided-diffusion's names.

    The exporter folded the norms' weights into constants without names; they come in the order in
    which the network computes.
    """
    constants = {
        i.name: torch.from_numpy(np.array(numpy_helper.to_array(i))) for i in graph.initializer
    }
    tensors = {n.removeprefix(PREFIX): t for n, t in constants.items() if n.startswith(PREFIX)}
    for layer, (weight, bias) in zip(norm_names(tensors), norms(graph, constants), strict=True):
        tensors |= {f"{layer}.weight": weight, f"{layer}.bias": bias}
    return tensors


def norms(graph: onnx.GraphProto, constants: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of every GroupNorm: Reshape, InstanceNormalization, Reshape, Mul, Add."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def after(node: onnx.NodeProto, kind: str) -> onnx.NodeProto:
        return next(user for user in users[node.output[0]] if user.op_type == kind)

    found = []
    for node in graph.node:
        if node.op_type == "InstanceNormalization":
            scaled = after(after(node, "Reshape"), "Mul")
            pair = (scaled, after(scaled, "Add"))
            weight, bias = (next(constants[i] for i in n.input if i in constants) for n in pair)
            found.append((weight.flatten(), bias.flatten()))
    return found


def norm_names(tensors: dict[str, Tensor]) -> list[str]:
    """The norms in the order in which the network computes them."""
    names = []
    for side in ("input_blocks", "middle_block", "output_blocks"):
        pattern = re.compile(rf"{side}\.([\d.]+)\.[a-z]")
        places = {found[1] for name in tensors if (found := pattern.match(name))}
        for place in sorted(places, key=lambda text: [int(part) for part in text.split(".")]):
            block = f"{side}.{place}"
            if f"{block}.in_layers.2.weight" in tensors:
                names += [f"{block}.in_layers.0", f"{block}.out_layers.0"]
            elif f"{block}.qkv.weight" in tensors:
                names.append(f"{block}.norm")
    return [*names, "out.0"]


# ------------------------------------------------------------------ measuring


def config_of(out: Path, widths: str, trajectories: int, overrides: tuple[str, ...] = ()) -> Any:
    weights, activations = re.fullmatch(r"w(\d+)a(\d+)", widths).groups()
    tree: dict[str, Any] = {
        "model": {"source": str(out)},
        "sampling": {"scheduler": "consistency", "steps": 1, "guidance_scale": 1.0},
        "calibration": {"trajectories": trajectories, "batch_size": 8},
        "quantization": {
            "weights": {"bits": int(weights)},
            "activations": {"bits": int(activations), "timestep_groups": 1},
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "terrain.yaml"
        path.write_text(json.dumps(tree))  # JSON is YAML
        return load_config(str(path), overrides)


def drawn(config: Any, model: DiffusionModel, denoiser: Any) -> Tensor:
    return trajectory.draw(config, model, denoiser, list(SEEDS))


def against_onnxruntime(model: DiffusionModel, data: bytes) -> float:
    """Relative difference of our height fields from those of the file."""
    config = config_of(Path(model.source), "w8a8", 1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    noise = initial_noise(generators_for(list(SEEDS)), model.latent_shape, torch.float32)
    labels = model.labels(list(SEEDS), "all")
    theirs = session.run(
        None,
        {
            "noisy": (SIGMA_MAX * noise).numpy(),
            "sigma": np.full(len(SEEDS), SIGMA_MAX, np.float32),
            "difficulty": (labels / (CLASSES - 1)).to(torch.float32).numpy(),
        },
    )[0]
    ours = drawn(config, model, full_denoiser(model))
    return float((ours - torch.from_numpy(theirs)).norm() / torch.from_numpy(theirs).norm())


@dataclass
class Layers:
    """SQNR of every layer's output on the inputs of full precision."""

    found: dict[str, float]

    @classmethod
    def of(cls, config: Any, model: DiffusionModel, quantized: nn.Module) -> Layers:
        parts = {n: m for n, m in quantized.named_modules() if isinstance(m, QuantizedLayer)}
        found: dict[str, float] = {}

        def hook(name: str) -> Any:
            def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                found[name] = sqnr_db(output, parts[name](args[0]))

            return look

        layers = weight_layers(model.denoiser)
        handles = [layers[name].register_forward_hook(hook(name)) for name in parts]
        drawn(config, model, full_denoiser(model))
        for handle in handles:
            handle.remove()
        return cls({name: found[name] for name in parts})


def measure(model: DiffusionModel, config: Any) -> dict[str, Any]:
    artifact = quantize.run(config, model, *calibrate.run(config, model)).quantized
    cache = artifact.body["cache_time_embeddings"]
    denoiser = quantized_denoiser(model, artifact, "simulate", cache)
    full = drawn(config, model, full_denoiser(model))
    return {
        "output": sqnr_db(full, drawn(config, model, denoiser)),
        "layers": Layers.of(config, model, denoiser.module).found,
        "bytes": sum(t.numel() * t.element_size() for t in artifact.tensors.values()),
    }


if __name__ == "__main__":
    main()
