"""Forecast of activations: what one call of the denoiser holds, metered on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..backends.reference import simulate_with
from ..config.schema import Config
from ..models.adapters import DECODE_PIXELS
from ..models.topology import capture_inputs, weight_layers
from ..quant.layers import QuantizedLayer
from ..runtime.denoiser import with_artifact
from ..store.artifacts import Artifact
from .artifacts import refined
from .metering import metered, peak_bytes
from .shapes import Shapes

ROWS = 2
"""Rows of a metered call: with one, some transposed tensors would need no copy."""


@dataclass(frozen=True)
class Activations:
    """Bytes per row of a denoiser call: full precision; simulated; with all that a backward pass
    needs (0 where none is run). weights: of the simulated denoiser in float32; decoding: of one
    call of the first stage; inputs: elements that each layer reads."""

    full: float
    simulated: float
    graph: float
    weights: float
    decoding: float
    inputs: dict[str, int]


def meter(config: Config, shapes: Shapes, quantized: Artifact) -> Activations:
    """One call each on the meta device."""
    inputs: dict[str, int] = {}

    def see(name: str, x: torch.Tensor) -> None:
        inputs.setdefault(name, x[0].numel())

    names = list(weight_layers(shapes.denoiser))
    with capture_inputs(shapes.denoiser, names, see):
        full = peak_bytes(lambda: shapes.call(ROWS)) / ROWS
    weights, simulated = _simulated(shapes, quantized)
    pixels = shapes.image_shape[1] * shapes.image_shape[2]
    at_once = max(1, DECODE_PIXELS // pixels)
    return Activations(
        full,
        simulated,
        _graph(shapes, list(quantized.body["layers"])) / ROWS if refined(config) else 0.0,
        weights,
        0 if shapes.first_stage is None else peak_bytes(lambda: shapes.decode(at_once)),
        inputs,
    )


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
    return kept, peak_bytes(lambda: shapes.call(ROWS, denoiser)) / ROWS


def _graph(shapes: Shapes, names: list[str]) -> float:
    """Peak bytes of the pass that measures extra bits, ROWS rows, without the weights' gradients.

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
                prediction = shapes.call(ROWS)
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
