"""The network as far as it is rounded: what the layers behind it get to see."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..backends.reference import simulate
from ..models.topology import capture_inputs, replace_module, weight_layers
from ..quant.layers import QuantizedLayer, StepState
from ..runtime.denoiser import Denoiser, full_denoiser, guided_predict
from ..spec import FLOAT_BITS
from .job import QuantizationJob
from .layer_plan import LayerPlan


class _BothHalves(nn.Module):
    """A layer whose second half of rows is computed with its rounded weight."""

    def __init__(self, full: nn.Module, rounded: nn.Module):
        super().__init__()
        self.full, self.rounded = full, rounded

    def forward(self, x: Tensor) -> Tensor:
        half = len(x) // 2
        return torch.cat([self.full(x[:half]), self.rounded(x[half:])])


class TwofoldDenoiser(Denoiser):
    """A denoiser that sees every row twice: in full precision, and behind rounded weights.

    What a layer gets, [2 N, ...], is the input of full precision and that of the prefix, whose
    own inputs are not quantized. The prediction is that of full precision.
    """

    def __init__(self, job: QuantizationJob, rounded: Mapping[str, Mapping[str, Tensor]]):
        layers = weight_layers(job.model.denoiser)
        kept = {id(layer): layer for layer in layers.values()}  # shared with the model, not copied
        module = copy.deepcopy(job.model.denoiser, kept)
        for plan in job.plans:
            if plan.name in rounded:
                bits, tensors = plan.weight_bits, dict(rounded[plan.name])
                layer = QuantizedLayer(plan.layer, tensors, bits, FLOAT_BITS, StepState(), simulate)
                layer = layer.to(job.model.device)  # what is rounded is kept on the CPU
                replace_module(module, plan.name, _BothHalves(plan.layer, layer))
        super().__init__(module, StepState())

    def __call__(self, x: Tensor, t: Tensor | float, condition: Mapping[str, Tensor]) -> Tensor:
        twice = {k: torch.cat([v, v]) if len(v) == len(x) else v for k, v in condition.items()}
        return super().__call__(torch.cat([x, x]), t, twice)[: len(x)]


def passes_of(job: QuantizationJob, passes: int) -> list[list[LayerPlan]]:
    """The layers whose weights are rounded, in the order in which a call reaches them, cut into so
    many runs of equal numbers of layers."""
    plans = {plan.name: plan for plan in job.plans if plan.weight_bits != FLOAT_BITS}
    reached: dict[str, LayerPlan] = {}

    def receive(name: str, x: Tensor) -> None:
        reached[name] = plans[name]

    inputs = job.calibration.tensors
    with capture_inputs(job.model.denoiser, list(plans), receive):
        labels, scale = inputs["inputs.class"][:1], job.config.sampling.guidance_scale
        predict = guided_predict(job.model, full_denoiser(job.model), labels, scale)
        predict(inputs["inputs.x"][:1], inputs["inputs.timestep"][0])
    in_order = list(reached.values())
    cuts = [number * len(in_order) // passes for number in range(passes + 1)]
    return [in_order[a:b] for a, b in zip(cuts, cuts[1:], strict=False) if a < b]


def before(groups: Sequence[Sequence[LayerPlan]], number: int) -> list[str]:
    """Names of the layers of all groups before this one."""
    return [plan.name for group in groups[:number] for plan in group]
