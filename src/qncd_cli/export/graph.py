"""Quantized denoisers as graphs of ONNX and OpenVINO, checked against the simulation.

What is written: the graph, and INDEX, which says how to call it, what it computes in integers and
what not, and how far its predictions and images are from those of the simulate backend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..backends import int8
from ..backends.onednn import saturates
from ..backends.onnx import runtimes
from ..backends.onnx.runtimes import Session
from ..backends.onnx.signature import own_signature
from ..config.schema import Config
from ..errors import ArtifactError, BackendUnavailable
from ..metrics.tensor import psnr_db
from ..models.loading import DiffusionModel
from ..models.topology import weight_layers
from ..progress import Track
from ..quant.attention import AttentionProducts
from ..quant.layers import QuantizedLayer
from ..runtime.denoiser import Denoiser, quantized_denoiser
from ..runtime.exported_graph import TARGETS, SessionDenoiser, example_of, write_graph
from ..store.artifacts import Artifact
from ..store.files import write_json
from . import agreement

INDEX = "graph.json"
ANY, VNNI = CPUS = ("any", "vnni")
"""CPUs on which a graph's integer products are exact. With VNNI alone they are fewer: elsewhere
weights beyond 64 saturate."""


@dataclass(frozen=True)
class Check:
    """samples: drawn by the simulation and by the graph; bound: on the largest difference of one
    prediction, as a share of the largest prediction."""

    samples: int
    bound: float


def check_cpus(cpus: str) -> None:
    """Raises BackendUnavailable for a graph that could not be run here beside the simulation."""
    if cpus == VNNI and saturates():
        raise BackendUnavailable(
            "--cpus vnni: this CPU has no VNNI, so the graph cannot be checked here",
            "leave --cpus out: the graph is right on any CPU then",
        )


def require(target: str) -> None:
    """Raises BackendUnavailable that says what to install."""
    needs = TARGETS[target]
    runtimes.require(f"--to {target}", needs.packages)


def run(
    config: Config,
    model: DiffusionModel,
    quantized: Artifact,
    target: str,
    folder: Path,
    cpus: str,
    check: Check,
    track: Track,
) -> dict[str, Any]:
    """Write graph and INDEX into an empty folder and return what INDEX says.

    model: on the CPU in float32; cpus: one of CPUS. Raises ArtifactError where the graph differs
    from the simulation by more than the bound, BackendUnavailable where the model cannot be traced.
    """
    require(target)
    cache = quantized.body["cache_time_embeddings"]
    simulated = quantized_denoiser(model, quantized, "simulate", cache)
    path = folder / TARGETS[target].file
    layers = _write(model, quantized, target, path, cache, cpus)
    session = TARGETS[target].open(path)
    exported = SessionDenoiser(simulated, session)
    compared = compare(config, model, simulated, exported, check.samples, track)
    check_bound(compared, check.bound, target)
    index = {
        "format": target,
        "file": path.name,
        "source": model.source,
        "digests": {"model": model.digest, "quantized": quantized.digest},
        "inputs": _inputs(config, model),
        "timestep_group_bounds": quantized.body["group_bounds"],
        "cpus": cpus,
        "layers": layers,
        "products": products(layers, session),
        "agreement": compared,
    }
    write_json(folder / INDEX, index)
    return index


def products(layers: Sequence[Mapping[str, Any]], session: Session) -> dict[str, int]:
    """How many products the runtime computes in integers. layers: rows of INDEX."""
    return {
        "to_be_integer": sum(layer["integer_products"] for layer in layers),
        "integer_here": session.integer,
        "float_here": session.floating,
    }


def check_bound(compared: Mapping[str, Any], bound: float, target: str) -> None:
    """Raises ArtifactError for a graph whose predictions are too far from the simulation's."""
    if not compared["relative_difference"] <= bound:
        raise ArtifactError(
            f"--to {target}: a prediction of the graph differs from the simulation by "
            f"{compared['relative_difference']:.3g} of the largest one, more than the bound "
            f"{bound:g}",
            "nothing was written; --bound allows more",
        )


def _inputs(config: Config, model: DiffusionModel) -> dict[str, dict[str, Any]]:
    """Inputs of the graph: dtype and shape, where "batch" is open; all rows are at one timestep."""
    with torch.no_grad():
        condition = model.condition(model.labels([0], config.sampling.classes))
    examples = {"sample": torch.zeros(1, *model.latent_shape), "timestep": torch.zeros(1)}
    return {
        name: {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": ["batch", *value.shape[1:]],
        }
        for name, value in (examples | dict(condition)).items()
    }


def _write(
    model: DiffusionModel, quantized: Artifact, target: str, path: Path, cache: bool, cpus: str
) -> list[dict[str, Any]]:
    """The graph at path; every layer's row of INDEX."""
    denoiser = quantized_denoiser(model, quantized, "simulate", cache)
    parts = dict(denoiser.module.named_modules())
    signature = own_signature(*example_of(model))
    write_graph(denoiser, signature, target, path, f"--to {target}", any_cpu=cpus == ANY)
    return rows(model, quantized, parts, target, cpus)


def rows(
    model: DiffusionModel, quantized: Artifact, parts: Mapping[str, Any], target: str, cpus: str
) -> list[dict[str, Any]]:
    """What INDEX says of every layer. parts: modules of the denoiser in simulation by name."""
    found = []
    for name, part in parts.items():
        if isinstance(part, QuantizedLayer):
            why = int8.why_not(part)
            found.append(_row(name, 0 if why else _products(part, cpus), why))
        elif isinstance(part, AttentionProducts):
            count, why = _attention(part, target)
            found.append(_row(name.removesuffix(".processor"), count, why))
    left = [name for name in weight_layers(model.denoiser) if name not in quantized.body["layers"]]
    return found + [_row(name, 0, "not quantized: see coverage.json") for name in left]


def _products(layer: QuantizedLayer, cpus: str) -> int:
    """Number of products of bytes that one call of a layer takes."""
    from ..backends.onnx.layers import weights_of

    return len(weights_of(layer, cpus == ANY)) * (1 + (layer.activation_bits > 8))


def _row(name: str, products: int, why: str) -> dict[str, Any]:
    return {"name": name, "integer_products": products, "why_not_integer": why}


def _attention(module: AttentionProducts, target: str) -> tuple[int, str]:
    """Integer products of one attention module, and why not both are."""
    from ..backends.onnx import layers as onnx_layers

    if target == "openvino":
        return 0, "OpenVINO has no integer product of two operands whose scales vary"
    pairs = (module.bits, module.bits), (module.probabilities_bits, module.bits)
    integer = [onnx_layers.integer_product(*bits) for bits in pairs]
    return sum(integer), "" if all(integer) else "an operand has more than 8 bits"


def compare(
    config: Config,
    model: DiffusionModel,
    simulated: Denoiser,
    exported: Denoiser,
    samples: int,
    track: Track,
) -> dict[str, Any]:
    """How far the graph is from the simulation, over the run's sampler.

    Differences of guided predictions on the simulation's own inputs at every step, and the PSNR of
    the images that both come to from the same noise (None: they are identical).
    """
    denoisers = {"simulated": simulated, "graph": exported}
    what = "comparing with the simulation"
    found = agreement.measure(config, model, denoisers, "simulated", "graph", samples, track, what)
    psnr = psnr_db(found.images["simulated"], found.images["graph"])
    return {
        "samples": samples,
        "steps": config.sampling.steps,
        "max_difference": found.difference,
        "max_prediction": found.prediction,
        "relative_difference": found.relative,
        "psnr_db": psnr if math.isfinite(psnr) else None,
    }
