"""The choice of smoothing: the factor of every layer, and how it was chosen."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config.schema import Config
from ..models.loading import DiffusionModel
from ..models.smoothing_sites import smoothing_sites
from ..models.topology import skip_boundaries, step_embeddings
from ..progress import Track
from ..quant.smoothing import (
    IDENTITY,
    SmoothingFactor,
    embedding_factor,
    modulation_factor,
    range_factor,
    smoothquant_factor,
    split_factor,
)
from ..runtime.denoiser import Denoiser, group_bounds
from ..store.artifacts import Artifact, tensors_by_module
from ..store.partial import NOTHING_KEPT, Partial, Piece
from .cost import Cost, DenoiserCall
from .layer_error import LayerError
from .layer_plan import LayerPlan, plan_layers
from .probes import PROBE_CALLS, Probe, collect_probes
from .probes import cost as probing_cost

EMBEDDED_CLASSES = 16
"""Classes whose embeddings are looked at, where the class enters them."""
SMOOTHQUANT_STRENGTHS = (0.25, 0.5, 0.75)
RANGE_STRENGTHS = (0.5, 0.75, 1.0)
"""Tried by auto."""
EMBEDDINGS, CHOICES = "embeddings ", "choice "
BEFORE_FACTORS = (EMBEDDINGS, CHOICES, f"{PROBE_CALLS} ")
"""Beginnings of names in partial results: what is needed until the factors are chosen."""

Factors = dict[str, SmoothingFactor]
Described = dict[str, dict[str, Any]]
Chosen = dict[str, tuple[str, SmoothingFactor]]


def factors_of(smoothing: Artifact) -> Factors:
    """The factors in a smoothing artifact, by layer."""
    tensors = tensors_by_module(smoothing.tensors)
    return {
        name: SmoothingFactor.of(tensors[name], entry["clamped"])
        for name, entry in smoothing.body["layers"].items()
    }


def choose_factors(
    config: Config,
    model: DiffusionModel,
    denoiser: Denoiser,
    timesteps: list[float],
    track: Track,
    partial: Partial = NOTHING_KEPT,
) -> tuple[Factors, Described]:
    """Factor [C_in] per layer that has one, and the body of the smoothing artifact.

    Linear layers that `_smoothed` leaves without a factor are rotated, where so configured.
    """
    factors, described = _smoothed(config, model, denoiser, timesteps, track, partial)
    for plan in plan_layers(config, model.denoiser):
        if plan.rotates(config) and plan.name not in factors:
            ones, group = torch.ones(plan.in_channels), config.quantization.rotation
            factors[plan.name] = SmoothingFactor(ones, 0, rotation=group)
            described[plan.name] = rotated_body(plan)
    return factors, described


def rotated_body(plan: LayerPlan) -> dict[str, Any]:
    """What the smoothing artifact says of a layer that is rotated alone."""
    return {
        "in_channels": plan.in_channels,
        "chosen": "rotation",
        "clamped": 0,
        "shifted": False,
        "rotated": True,
    }


def _smoothed(
    config: Config,
    model: DiffusionModel,
    denoiser: Denoiser,
    timesteps: list[float],
    track: Track,
    partial: Partial,
) -> tuple[Factors, Described]:
    """The factors that even channels out.

    embedding: the layers behind a timestep embedding, from the embeddings alone
    (docs/method.md); smoothquant and range: every layer; auto: per layer whichever of these, or
    none, leaves the least error in the layer's output on calibration inputs at the configured
    widths.
    Layers that read a skip connection and got no factor are split, where so configured.
    """
    intra = config.correction.intra
    boundaries = _boundaries(config, model.denoiser)
    embedded: Factors = {}
    if reads_embeddings(config):
        embedded = embedding_factors(config, model, denoiser, timesteps, track, partial)
    chosen: Chosen = {}
    if intra == "embedding":
        chosen = {name: ("embedding", f) for name, f in embedded.items()}
    wanted = looked_at(config, model.denoiser)
    if not wanted:
        return _describe(chosen, {})
    probes = collect_probes(config, model, denoiser, wanted, len(timesteps), track, partial)
    errors: dict[str, dict[str, float]] = {}
    for plan in track(wanted, "choosing smoothing factors", len(wanted), "layers"):
        probe = probes.pop(plan.name)
        if not probe.parts:  # no input reaches the layer
            continue
        candidates = _candidates(config, plan, probe, embedded.get(plan.name))
        if plan.name in boundaries:
            candidates["split"] = split_factor(*probe.channel_range(), boundaries[plan.name])
        if intra == "auto":
            candidates["none"] = IDENTITY
            judge = functools.partial(_errors, config, plan, probe, candidates, timesteps)
            judged = partial.piece(f"{CHOICES}{plan.name}", judge).value
            best = min(judged, key=lambda name: (judged[name], name != "none"))
            chosen[plan.name], errors[plan.name] = (best, candidates[best]), judged
        elif candidates:
            chosen[plan.name] = next(iter(candidates.items()))
    return _describe(chosen, errors)


def looked_at(config: Config, denoiser: nn.Module) -> list[LayerPlan]:
    """Layers whose inputs decide about a factor: all of them, or those that are to be split."""
    intra = config.correction.intra
    plans = {p.name: p for p in plan_layers(config, denoiser)}
    if intra == "auto":  # the only choice that depends on the widths
        plans = {name: plan for name, plan in plans.items() if not plan.stays_float}
    if intra not in ("none", "embedding"):
        return list(plans.values())
    return [plans[name] for name in _boundaries(config, denoiser) if name in plans]


def reads_embeddings(config: Config) -> bool:
    """Whether timestep embeddings give factors."""
    return config.correction.intra in ("embedding", "auto")


def _boundaries(config: Config, denoiser: nn.Module) -> dict[str, int]:
    """Layers to be split, each with the channels of its first part."""
    return skip_boundaries(denoiser) if config.quantization.split_skip_connections else {}


def _candidates(
    config: Config, plan: LayerPlan, probe: Probe, embedded: SmoothingFactor | None
) -> Factors:
    """What may smooth a layer, by name; the configured one first."""
    correction = config.correction
    low, high = probe.channel_range()
    shifted = plan.is_pointwise
    weight = plan.layer.weight.detach().float().cpu()
    absmax = torch.maximum(-low, high)
    if correction.intra == "smoothquant":
        strength = correction.smoothing_strength
        return {f"smoothquant@{strength:g}": smoothquant_factor(absmax, weight, strength)}
    if correction.intra == "range":
        strength = correction.smoothing_strength
        return {f"range@{strength:g}": range_factor(low, high, strength, shifted=shifted)}
    if correction.intra != "auto":
        return {}
    found = {
        f"smoothquant@{a:g}": smoothquant_factor(absmax, weight, a) for a in SMOOTHQUANT_STRENGTHS
    }
    found |= {f"range@{a:g}": range_factor(low, high, a, shifted=shifted) for a in RANGE_STRENGTHS}
    if embedded is not None:
        found["embedding"] = embedded
    return found


def _errors(
    config: Config,
    plan: LayerPlan,
    probe: Probe,
    candidates: Factors,
    timesteps: list[float],
) -> Piece:
    """What each candidate leaves of error in the layer's output, by its name."""
    bounds = group_bounds(timesteps, config.quantization.activations.timestep_groups)
    error = LayerError(config, plan, probe, bounds)
    return Piece({name: error.of(factor) for name, factor in candidates.items()})


def _describe(chosen: Chosen, errors: dict[str, dict[str, float]]) -> tuple[Factors, Described]:
    kept = {name: pair for name, pair in chosen.items() if pair[0] != "none"}
    described: Described = {}
    for name, (what, factor) in kept.items():
        described[name] = {
            "in_channels": len(factor.factor),
            "chosen": what,
            "clamped": factor.clamped,
            "shifted": factor.shift is not None,
        }
        if name in errors:
            described[name]["judged_error"] = errors[name]
    return {name: factor for name, (_, factor) in kept.items()}, described


def cost(config: Config, denoiser: nn.Module, call: DenoiserCall) -> Cost:
    """Probes, which are freed again. Not counted: candidates tried on one layer at a time."""
    return replace(probing_cost(config, looked_at(config, denoiser), call), kept=0)


def embedding_factors(
    config: Config,
    model: DiffusionModel,
    denoiser: Denoiser,
    timesteps: list[float],
    track: Track,
    partial: Partial = NOTHING_KEPT,
) -> dict[str, SmoothingFactor]:
    """The embedding-derived factor of every layer behind a timestep embedding."""
    sites = smoothing_sites(model.denoiser)
    if not sites:
        return {}
    rows = _embedded_rows(model.num_classes)
    x = torch.zeros(rows, *model.latent_shape)
    condition = model.condition(model.labels(list(range(rows)), config.sampling.classes))
    times = sorted(set(timesteps), reverse=True)
    projections = sorted({site.projection for site in sites})

    def at(t: float) -> Piece:
        found = step_embeddings(
            model.denoiser, projections, lambda t: denoiser(x, torch.tensor(t), condition), [t]
        )
        return Piece(tensors=found)

    parts = [
        partial.piece(f"{EMBEDDINGS}{t}", functools.partial(at, t)).tensors
        for t in track(times, "reading timestep embeddings", len(times), "calls")
    ]
    embeddings = {name: torch.cat([part[name] for part in parts]) for name in projections}
    factors: Factors = {}
    for site in sites:
        embedding = embeddings[site.projection].chunk(site.parts, dim=1)[site.part]
        if site.table is not None:
            embedding = (
                embedding + model.denoiser.get_parameter(site.table)[site.part].float().cpu()
            )
        if site.norm is None:
            factor = modulation_factor(embedding)
        else:
            norm = model.denoiser.get_submodule(site.norm)
            assert isinstance(norm, nn.GroupNorm)
            factor = embedding_factor(embedding, norm.weight.cpu(), norm.num_groups, norm.eps)
        factors |= dict.fromkeys(site.layers, factor)
    return factors


def embedding_cost(denoiser: nn.Module, classes: int | None, call: DenoiserCall) -> Cost:
    """One call per step, of a row per class. classes: of the model."""
    rows = _embedded_rows(classes)
    macs = rows * call.steps * call.macs if smoothing_sites(denoiser) else 0
    return Cost(call.full_bytes(rows), model_macs=macs)


def _embedded_rows(classes: int | None) -> int:
    return min(classes or 1, EMBEDDED_CLASSES)
