"""The budget of bits: weight bits per layer, by measured sensitivity, within an average.

Sensitivity of a layer at b bits: with that layer's weight alone replaced by its nearest-rounded
b-bit version, the squared change of the denoiser's conditional prediction over the prediction's
own square, averaged over calibration rows that cover the sampler's timesteps. Errors of different
layers are taken to add up (as in HAWQ-V2, arXiv 1911.03852), which leaves a multiple-choice
knapsack: one width per layer, least summed sensitivity, at most so many bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.func import functional_call

from ..errors import ConfigError
from ..models.loading import DiffusionModel
from ..progress import Track
from ..quant.affine import dequantize
from ..quant.rounding import round_nearest
from ..quant.smoothing import SmoothingFactor
from ..runtime.ranks import ALONE, Message, Ranks
from ..spec import FLOAT_BITS, weight_spec
from ..store.artifacts import Artifact
from ..store.partial import Piece
from . import layer
from .cost import Cost, DenoiserCall
from .job import QuantizationJob
from .layer_plan import LayerPlan, has_own_weight_bits

WIDTHS = (2, 3, 4, 6, 8)
"""Bits that a layer may get, ascending."""
TRIED_ROWS = 32
"""Calibration rows that every width of every layer is tried on."""
MAX_UNITS = 1 << 16
"""Finest division of the spare bits in the allocation; a coarser one leaves a few unspent."""

ErrorByBits = dict[int, float]
"""What rounding one layer to so many bits does."""


@dataclass(frozen=True)
class BitAssignment:
    """bits: weight bits by layer; sensitivity: by layer and width, what they were chosen by.

    Layers with bits of their own (first_last_bits, overrides) are in neither.
    """

    bits: dict[str, int]
    sensitivity: dict[str, ErrorByBits]


def assign_bits(job: QuantizationJob, track: Track, ranks: Ranks = ALONE) -> BitAssignment:
    """Bits for every layer without bits of its own, so that the average stays in the budget.

    The average is over all weights that are quantized, outer layers included. ranks: try their
    share of the layers each; the first one's answer counts. Raises ConfigError where no assignment
    meets the budget.
    """
    quantized = [p for p in job.plans if p.weight_bits != FLOAT_BITS]
    free = [p for p in quantized if not has_own_weight_bits(p, job.config)]
    budget = job.config.quantization.weights.budget
    spare = ranks.agreed(lambda: spare_bits(budget, quantized, free))
    mine = measure_sensitivity(job.planned([*ranks.share(free)]), track)
    found = ranks.gathered(Message({name: [*errors.items()] for name, errors in mine.items()}))
    if not ranks.first:
        return BitAssignment({}, {})
    tables = {name: dict(errors) for message in found for name, errors in message.value.items()}
    sensitivity = {plan.name: {int(b): e for b, e in tables[plan.name].items()} for plan in free}
    sizes = [p.layer.weight.numel() for p in free]
    widths = allocate(sizes, [sensitivity[p.name] for p in free], spare)
    return BitAssignment({p.name: b for p, b in zip(free, widths, strict=True)}, sensitivity)


def spare_bits(budget: float | None, quantized: list[LayerPlan], free: list[LayerPlan]) -> int:
    """Bits left for the free layers when each of their weights has the least width already."""
    key = "quantization.weights.budget"
    if budget is None or not free:
        raise ConfigError(
            f"{key}: no layer's weight bits are open to choice", "leave budget unset (null)"
        )
    total = sum(p.layer.weight.numel() for p in quantized)
    movable = sum(p.layer.weight.numel() for p in free)
    free_names = {p.name for p in free}
    least = WIDTHS[0] * movable + sum(
        p.layer.weight.numel() * p.weight_bits for p in quantized if p.name not in free_names
    )
    spare = math.floor(Fraction(str(budget)) * total) - least
    if spare < 0:
        most = (least + (WIDTHS[-1] - WIDTHS[0]) * movable) / total
        low = math.ceil(100 * least / total) / 100
        raise ConfigError(
            f"{key}: {budget:g} bits are below the least average of {low:g}",
            f"possible here: {low:g} to {most:g}; the first and last layers, those on timestep "
            "and class, and overrides keep their bits",
        )
    return spare


# ------------------------------------------------------------------ sensitivity


def measure_sensitivity(job: QuantizationJob, track: Track) -> dict[str, ErrorByBits]:
    """Relative squared error of the prediction by layer and width; activations stay float."""
    rows = tried_rows(job.calibration.tensors["inputs.timestep"])
    rows_per_call = 2 * job.config.calibration.batch_size
    predict = _conditional(job.model, job.calibration, rows, rows_per_call)
    exact = predict({})
    power = exact.square().sum(1).clamp(min=1e-30)

    def measured(plan: LayerPlan) -> Piece:
        errors = []
        for bits in WIDTHS:
            weight = rounded_weight(plan, job.factor(plan.name), bits)
            error = (predict({f"{plan.name}.weight": weight}) - exact).square().sum(1)
            errors.append((bits, float((error / power).mean())))
        return Piece(errors)

    found: dict[str, ErrorByBits] = {}
    for plan in track(job.plans, "measuring sensitivity", len(job.plans), "layers"):
        measure = functools.partial(measured, plan)
        found[plan.name] = dict(job.partial.piece(f"budget {plan.name}", measure).value)
    return found


def tried_rows(timestep: Tensor) -> Tensor:
    """About TRIED_ROWS row indices: as many from each timestep [R] of the calibration rows.

    A sampler with more timesteps is represented by TRIED_ROWS of them, evenly spaced. The rows
    move through the trajectories, so that classes vary.
    """
    times = sorted(set(timestep.tolist()), reverse=True)
    count = min(len(times), TRIED_ROWS)
    per_time = TRIED_ROWS // count
    rows: list[int] = []
    for i in range(count):
        at = (timestep == times[i * (len(times) - 1) // max(1, count - 1)]).nonzero().flatten()
        taken = range(i, i + min(per_time, len(at)))
        rows += [int(at[k % len(at)]) for k in taken]
    return torch.tensor(rows)


def _conditional(
    model: DiffusionModel, calibration: Artifact, rows: Tensor, rows_per_call: int
) -> Callable[[dict[str, Tensor]], Tensor]:
    """(replaced parameters by name) -> predictions of the rows [R, elements], double.

    Without guidance; every row at its own timestep. rows_per_call: as many as a guided call on
    a calibration batch takes fit into memory.
    """
    x, t, labels = (calibration.tensors[f"inputs.{k}"][rows] for k in ("x", "timestep", "class"))
    batches = []
    with torch.no_grad():
        for part in torch.arange(len(rows)).split(rows_per_call):
            condition = {
                name: value.to(model.dtype) if value.is_floating_point() else value
                for name, value in model.condition(labels[part]).items()
            }
            latents = x[part].to(model.device, model.dtype)
            batches.append((latents, t[part].to(model.device), condition))

    def predict(replaced: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            outputs = [
                functional_call(model.denoiser, replaced, (latents, times), condition).sample
                for latents, times, condition in batches
            ]
        return torch.cat(outputs).flatten(1).double().cpu()

    return predict


def rounded_weight(plan: LayerPlan, factor: SmoothingFactor, bits: int) -> Tensor:
    """The layer's weight as nearest rounding to `bits` leaves it, smoothing taken out again."""
    exact = plan.layer.weight.detach()
    weight = factor.fold(exact.float().cpu())
    spec = weight_spec(bits)
    rounded = round_nearest(weight, spec)
    return factor.unfold(dequantize(rounded.codes, rounded.qparams, spec)).to(exact)


def cost(plans: list[LayerPlan], call: DenoiserCall) -> Cost:
    """Every width of every layer, rounded and tried. plans: of quantized weights."""
    calls = len(WIDTHS) * len(plans) * TRIED_ROWS
    return Cost(passes=len(WIDTHS) * layer.cost(plans).passes, model_macs=calls * call.macs)


# ------------------------------------------------------------------ allocation


def allocate(sizes: list[int], errors: list[ErrorByBits], spare: int) -> list[int]:
    """One width per layer with the least summed error, for at most `spare` bits in all.

    sizes: weights per layer; errors: per layer, by width; spare: bits beyond the narrowest width
    everywhere, >= 0. Exact dynamic programming over multiples of the common divisor of the sizes;
    where those are more than MAX_UNITS, costs are rounded up to a coarser unit, so that the limit
    still holds and each layer wastes less than one unit.
    """
    layers = list(zip(sizes, errors, strict=True))
    spare = min(spare, sum(size * (max(widths) - min(widths)) for size, widths in layers))
    unit = max(math.gcd(*sizes), math.ceil(spare / MAX_UNITS))
    capacity = spare // unit
    best = torch.zeros(capacity + 1, dtype=torch.float64)  # least error for at most u units
    choices = []
    for size, widths in layers:
        options = torch.full((len(widths), capacity + 1), torch.inf, dtype=torch.float64)
        for i, bits in enumerate(sorted(widths)):
            cost = _units(size, bits - min(widths), unit)
            if cost <= capacity:
                options[i, cost:] = best[: capacity + 1 - cost] + widths[bits]
        best, choice = options.min(0)
        choices.append(choice.to(torch.uint8))
    left, chosen = capacity, []
    for (size, widths), choice in zip(reversed(layers), reversed(choices), strict=True):
        bits = sorted(widths)[int(choice[left])]
        left -= _units(size, bits - min(widths), unit)
        chosen.append(bits)
    return chosen[::-1]


def _units(size: int, more_bits: int, unit: int) -> int:
    return -(-size * more_bits // unit)
