"""Text encoders in integers: factors, ranges and Hessians from their own prompts.

At 8 bits inputs are smoothed (SmoothQuant) and have one range each, at 4 bits weights alone are
quantized. Weights are rounded by GPTQ, from inputs of full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotFinite
from ..models.topology import capture_inputs, weight_layers
from ..progress import Track, no_progress
from ..quant.affine import QParams, choose_qparams, fake_quantize
from ..quant.gptq import HessianAccumulator
from ..quant.smoothing import IDENTITY, SmoothingFactor, smoothquant_factor
from ..spec import FLOAT_BITS, activation_spec
from ..store.artifacts import Artifact
from ..store.layer_entry import LayerEntry, bodies
from ..store.partial import NOTHING_KEPT, Partial, Piece
from .cost import Cost
from .hessians import hessian_groups
from .layer import gptq_cost, quantize_layer, search_passes
from .layer_plan import LayerPlan

OBSERVER = "minmax"
"""The prompts that ranges are of are those that are drawn: there is nothing to clip."""
PROMPTS = 128
"""Prompts that are looked at, at most; more: rarer inputs are not clipped, and a longer stage."""
STRENGTH = 0.5
"""How much of the difficulty moves from inputs to weights: SmoothQuant's own."""
CALLS = 2
"""Passes over the prompts beside those for Hessians: one for extremes, one that measures."""
LAYER = "text encoders/"
"""Beginning of the names of layers among the partial results."""


@dataclass
class Extremes:
    """Least and largest value of each channel of a layer's input, [C] each."""

    low: Tensor
    high: Tensor

    def update(self, x: Tensor) -> None:
        rows = x.detach().to("cpu", torch.float32).flatten(0, -2)
        self.low = torch.minimum(self.low, rows.amin(0))
        self.high = torch.maximum(self.high, rows.amax(0))

    @classmethod
    def none(cls, channels: int) -> Extremes:
        """Before anything was seen."""
        return cls(torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf))


def plan_encoders(module: nn.Module, bits: int) -> list[LayerPlan]:
    """What is to become of every linear layer of text encoders."""
    inputs = bits if bits == 8 else FLOAT_BITS
    return [
        LayerPlan(name, layer, bits, inputs, OBSERVER)
        for name, layer in weight_layers(module).items()
        if isinstance(layer, nn.Linear)
    ]


def see_inputs(module: nn.Module, call: Callable[[], Any]) -> dict[str, Extremes]:
    """Extremes of the inputs of all linear layers that a call of the text encoders reaches.

    Raises NotFinite for inputs that hold a NaN or an infinity.
    """
    found: dict[str, Extremes] = {}
    channels = {plan.name: plan.in_channels for plan in plan_encoders(module, FLOAT_BITS)}

    def look(name: str, x: Tensor) -> None:
        found.setdefault(name, Extremes.none(channels[name])).update(x)

    with capture_inputs(module, [*channels], look), torch.no_grad():
        call()
    for name, seen in found.items():
        if not torch.isfinite(seen.high - seen.low).all():
            raise NotFinite(f"inputs of {name} are not finite")
    return found


def quantize_encoders(
    module: nn.Module,
    bits: int,
    seen: dict[str, Extremes],
    call: Callable[[], Any],
    track: Track = no_progress,
    partial: Partial = NOTHING_KEPT,
) -> Artifact:
    """Text encoders, not sealed, and without what they are compared by.

    seen: of `see_inputs`; layers that it lacks stay as they are. call: encodes the prompts with
    the module, which stays as it is.
    """
    plans = [plan for plan in plan_encoders(module, bits) if plan.name in seen]
    decided = {plan.name: _decided(plan, seen[plan.name]) for plan in plans}
    found: dict[str, Piece] = {}
    for group in hessian_groups(plans):
        kept = {p.name: partial.take(f"{LAYER}{p.name}") for p in group}
        found |= {name: piece for name, piece in kept.items() if piece is not None}
        left = [plan for plan in group if plan.name not in found]
        if not left:
            continue
        sums = _hessians(left, decided, module, call)
        for plan in track(left, "rounding the text encoders", len(left), "layers"):
            factor, qparams = decided[plan.name]
            curvature = sums.pop(plan.name).curvature()
            with torch.no_grad():
                tensors, entry = quantize_layer(plan, qparams, factor, curvature)
            found[plan.name] = Piece(entry.to_body(), tensors)
            partial.keep(f"{LAYER}{plan.name}", found[plan.name])
    entries = {plan.name: LayerEntry.from_body(found[plan.name].value) for plan in plans}
    tensors = {f"{n}.{key}": t for n in entries for key, t in found[n].tensors.items()}
    body = {
        "layers": bodies(entries),
        "attention": {},
        "groups": 1,
        "group_bounds": [],
        "bits": bits,
        "float_bytes": 4 * sum(entry.weights for entry in entries.values()),
    }
    return Artifact("text_encoders", tensors, body, "", "")


def _decided(plan: LayerPlan, seen: Extremes) -> tuple[SmoothingFactor, QParams | None]:
    """What smooths a layer's input, and the range [1] of what comes of it."""
    if plan.activation_bits == FLOAT_BITS:
        return IDENTITY, None
    low, high = seen.low, seen.high
    factor = smoothquant_factor(torch.maximum(-low, high), plan.layer.weight.cpu(), STRENGTH)
    low, high = ((end / factor.factor) for end in (low, high))
    spec = activation_spec(plan.activation_bits)
    return factor, choose_qparams(low.min().reshape(1), high.max().reshape(1), spec)


def _hessians(
    plans: list[LayerPlan],
    decided: dict[str, tuple[SmoothingFactor, QParams | None]],
    module: nn.Module,
    call: Callable[[], Any],
) -> dict[str, HessianAccumulator]:
    """Sums over one call, of the layers' smoothed and quantized inputs."""
    by_name = {plan.name: plan for plan in plans}
    sums = {plan.name: HessianAccumulator(plan.in_features) for plan in plans}

    def look(name: str, x: Tensor) -> None:
        factor, qparams = decided[name]
        x = factor.apply(x.float(), -1)
        if qparams is not None:
            x = fake_quantize(x, qparams.at(0), activation_spec(by_name[name].activation_bits))
        sums[name].update(x, by_name[name].layer)

    with capture_inputs(module, [*by_name], look), torch.no_grad():
        call()
    return sums


def cost(plans: list[LayerPlan], tokens: int, held: float) -> Cost:
    """Passes over the prompts, and the rounding of all layers. tokens: of all prompts together;
    held: bytes of the text encoders."""
    groups, rounding = hessian_groups(plans), gptq_cost(plans)
    call = sum(plan.layer.weight.numel() for plan in plans)
    products = sum(plan.in_features**2 for plan in plans)
    return Cost(
        held + rounding.bytes,
        tokens * products + rounding.macs,
        search_passes(plans),
        model_macs=tokens * (CALLS + len(groups)) * call,
    )
