"""Extra bits: finer codes for the few layers whose rounding matters most.

Layers near the output pass their rounding on to the prediction almost whole, and hold a small
share of the weights and of the MACs. Their weights and inputs may have up to two bytes each, in
several passes of 8-bit kernels: all of it stays within integer kernels, and on average within
the extra bits of quantization.sensitive.
"""

from __future__ import annotations

import heapq
from dataclasses import replace

from ..config.schema import Config
from ..progress import Track, no_progress
from ..runtime.denoiser import denoiser_costs
from ..spec import FLOAT_BITS, MAX_ACTIVATION_BITS, WIDE_WEIGHT_BITS
from .job import QuantizationJob
from .layer_plan import LayerPlan
from .sensitivity import Sensitivity, sensitivity

WEIGHT_WIDTHS = (4, 6, 8, WIDE_WEIGHT_BITS)
ACTIVATION_WIDTHS = (4, 6, 8, MAX_ACTIVATION_BITS)


def refine(job: QuantizationJob, track: Track = no_progress) -> tuple[list[LayerPlan], Sensitivity]:
    """The plans, the most sensitive layers with more bits for their weights or inputs; and what
    decided it, empty where nothing is to be spent.

    Bits are spent where they remove most error per weight (per MAC for the inputs), up to
    quantization.sensitive's mean extra bits. A budget of bits decides about the weights by itself.
    """
    config, plans = job.config, job.plans
    extra_weight_bits = _extra_weight_bits(config)
    extra_activation_bits = config.quantization.sensitive.activation_bits
    coarse = {p.name: p.weight_bits for p in plans if p.weight_bits <= 8}
    narrow = {p.name: p.activation_bits for p in plans if p.activation_bits <= 8}
    if not (extra_weight_bits and coarse) and not (extra_activation_bits and narrow):
        return plans, Sensitivity()
    concerned = [p for p in plans if p.name in coarse or p.name in narrow]
    found = sensitivity(job.planned(concerned), track)
    sizes = {p.name: p.layer.weight.numel() for p in plans if p.weight_bits != FLOAT_BITS}
    finer = spend(found.weights, coarse, sizes, WEIGHT_WIDTHS, extra_weight_bits)
    macs = {cost.name: cost.macs for cost in denoiser_costs(config, job.model)}
    wider = spend(found.inputs, narrow, macs, ACTIVATION_WIDTHS, extra_activation_bits)
    result = []
    for plan in plans:
        plan = replace(plan, weight_bits=finer.get(plan.name, plan.weight_bits))
        plan = replace(plan, activation_bits=wider.get(plan.name, plan.activation_bits))
        if plan.name in wider and plan.activation_bits > 8:
            plan = replace(plan, observer="minmax")
        result.append(plan)
    return result, found


def spends(config: Config) -> bool:
    """Whether there are extra bits, for weights or for inputs."""
    return bool(_extra_weight_bits(config) or config.quantization.sensitive.activation_bits)


def _extra_weight_bits(config: Config) -> float:
    """Extra bits per weight; none where a budget decides."""
    q = config.quantization
    return q.sensitive.weight_bits if q.weights.budget is None else 0.0


def spend(
    errors: dict[str, float],
    bits: dict[str, int],
    costs: dict[str, int],
    widths: tuple[int, ...],
    extra: float,
) -> dict[str, int]:
    """Bits of every name in `bits`, widened by at most `extra` bits on average over all costs.

    errors: squared errors at `bits`; every bit more divides one by four. The widening that removes
    most error per bit and cost comes first, until none fits: optimal but for the remainder, because
    the error is convex in the bits.
    """
    left = extra * sum(costs.values())
    result = dict(bits)
    steps: list[tuple[float, str, int]] = []

    def propose(name: str) -> None:
        now = result[name]
        wider = next((w for w in widths if w > now), None)
        if wider is None or costs.get(name, 0) <= 0 or errors[name] <= 0:
            return
        error = errors[name] / 4.0 ** (now - bits[name])
        gain = error * (1 - 0.25 ** (wider - now))
        heapq.heappush(steps, (-gain / ((wider - now) * costs[name]), name, wider))

    for name in bits:
        propose(name)
    while steps:
        _, name, wider = heapq.heappop(steps)
        cost = (wider - result[name]) * costs[name]
        if cost <= left:
            left -= cost
            result[name] = wider
            propose(name)
    return result
