"""Forecast of activations: what one call of the denoiser holds, metered on the meta device."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..backends.reference import simulate_with
from ..config.schema import Config
from ..models.first_stage import DECODE_PIXELS
from ..models.topology import LayerCost, capture_inputs, count_macs, weight_layers
from ..ptq.cost import Cost, DenoiserCall
from ..ptq.extra_bits import spends
from ..quant.layers import QuantizedLayer
from ..runtime.denoiser import with_artifact
from ..store.artifacts import Artifact
from .metering import metered, peak_bytes
from .shapes import Shapes

METERED_ROWS = 2
"""Rows of a metered call: with one, some transposed tensors would need no copy."""


def meter(
    config: Config, shapes: Shapes, quantized: Artifact, costs: list[LayerCost], steps: int
) -> DenoiserCall:
    """The denoiser's sizes, from one call each on the meta device.

    costs: of the denoiser on one row; steps: its calls per trajectory.
    """
    layers = weight_layers(shapes.denoiser)
    full, inputs = _full(shapes)
    weights, simulated = _simulated(shapes, quantized)
    graph = _graph(shapes, list(quantized.body["layers"])) if spends(config) else 0.0
    return DenoiserCall(
        copies(config, shapes),
        steps,
        full,
        simulated,
        graph / METERED_ROWS,
        weights,
        max(layer.weight.numel() for layer in layers.values()),
        sum(cost.macs for cost in costs),
        inputs,
        {cost.name: cost.macs for cost in costs},
    )


def at_size(call: DenoiserCall, shapes: Shapes) -> DenoiserCall:
    """The same call in full precision, of a model that is sized for other images."""
    full, inputs = _full(shapes)
    with torch.no_grad():
        costs = count_macs(shapes.denoiser, lambda: shapes.call(1))
    return replace(call, full=full, inputs=inputs, macs=sum(cost.macs for cost in costs))


def _full(shapes: Shapes) -> tuple[float, dict[str, int]]:
    """Bytes of activations per row, and what each layer reads, in full precision."""
    inputs: dict[str, int] = {}

    def see(name: str, x: torch.Tensor) -> None:
        inputs.setdefault(name, x[0].numel())

    with capture_inputs(shapes.denoiser, list(weight_layers(shapes.denoiser)), see):
        full = peak_bytes(lambda: shapes.call(METERED_ROWS)) / METERED_ROWS
    return full, inputs


def copies(config: Config, shapes: Shapes) -> int:
    """Rows of a denoiser call per sample."""
    return 2 if shapes.guides(config.sampling.guidance_scale) else 1


def first_stage(shapes: Shapes) -> Cost:
    """Bytes of one call, MACs of one image."""
    if shapes.first_stage is None:
        return Cost()
    pixels = shapes.image_shape[1] * shapes.image_shape[2]
    at_once = max(1, DECODE_PIXELS // pixels)
    with torch.no_grad():
        macs = sum(cost.macs for cost in count_macs(shapes.first_stage, lambda: shapes.decode(1)))
    return Cost(peak_bytes(lambda: shapes.decode(at_once)), macs)


def _simulated(shapes: Shapes, quantized: Artifact) -> tuple[float, float]:
    """Dequantized weights, which stay; activations of one row."""
    denoiser = with_artifact(shapes.denoiser, shapes.source, quantized, "simulate", True).module
    weights = {
        module: torch.empty(module.weight_shape, device="meta")
        for module in denoiser.modules()
        if isinstance(module, QuantizedLayer)
    }

    def compute(layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
        qparams = None if layer.input_spec is None else layer.input_qparams()
        return simulate_with(layer, x, weights[layer], layer.bias_now(), qparams)

    for layer in weights:
        layer.compute = compute
    kept = sum(weight.nbytes for weight in weights.values())
    return kept, peak_bytes(lambda: shapes.call(METERED_ROWS, denoiser)) / METERED_ROWS


def _graph(shapes: Shapes, names: list[str]) -> float:
    """Peak bytes of measuring extra bits on METERED_ROWS rows, less the weights' gradients.

    That is: activations with their graph, every input's error and gradient.
    """
    inputs: list[torch.Tensor] = []
    weights = [weight_layers(shapes.denoiser)[name].weight for name in names]

    def see(name: str, x: torch.Tensor) -> None:
        inputs.append(x)

    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad(), metered() as found:
            with capture_inputs(shapes.denoiser, names, see):
                prediction = shapes.call(METERED_ROWS)
            errors = [torch.empty_like(x) for x in inputs]
            read = [x for x in inputs if x.requires_grad]
            v = torch.empty_like(prediction)
            grads = torch.autograd.grad(
                prediction, [*read, *weights], v, retain_graph=True, allow_unused=True
            )
            of_weights = sum(g.nbytes for g in grads[len(read) :] if g is not None)
            del errors, grads
            return found.peak - of_weights
    finally:
        for weight in weights:
            weight.requires_grad_(False)
