"""Part of stage 1: the smoothing factor of every layer, and what chose it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import Config
from ..models.loading import DiffusionModel
from ..models.topology import capture_inputs, smoothing_sites, step_embeddings
from ..quant.affine import choose_qparams, fake_quantize
from ..quant.observers import RangeObserver, choose_range
from ..quant.rounding import mse_weight_qparams
from ..quant.smoothing import (
    SmoothingFactor,
    embedding_factor,
    fold,
    modulation_factor,
    smooth,
    smoothquant_factor,
)
from ..sampling.noise import generators_for
from ..sampling.samplers import denoise, make_scheduler
from ..spec import FLOAT_BITS, activation_spec, weight_spec
from .assemble import Denoiser, Track, guided_predict
from .plan import LayerPlan, plan_layers

EMBEDDED_CLASSES = 16
"""Classes whose embeddings are looked at, where the class enters them."""
PROBE_TRAJECTORIES = 8
PROBE_STEPS = 8
PROBE_ELEMENTS = 1 << 21
"""Values of a layer's input that are kept to try factors on."""
STRENGTHS = (0.25, 0.5, 0.75)
"""Of SmoothQuant, tried by auto."""

Factors = dict[str, Tensor]
Described = dict[str, dict[str, Any]]


def choose_factors(
    config: Config,
    model: DiffusionModel,
    denoiser: Denoiser,
    timesteps: list[float],
    track: Track,
) -> tuple[Factors, Described]:
    """Factor [C_in] per layer that has one, and the body of the smoothing artifact.

    embedding: the layers behind a timestep embedding, from the embeddings alone (method.md
    section 2); smoothquant: every layer; auto: per layer whichever of these, or none, leaves the
    least error in the layer's output on calibration inputs at the configured widths.
    """
    intra = config.correction.intra
    if intra == "none":
        return {}, {}
    embedded = {}
    if intra in ("embedding", "auto"):
        embedded = embedding_factors(config, model, denoiser, timesteps)
    if intra == "embedding":
        return _describe({name: ("embedding", f) for name, f in embedded.items()})
    plans = [p for p in plan_layers(config, model.denoiser) if not p.stays_float]
    probes = collect_probes(config, model, denoiser, plans, len(timesteps))
    chosen: dict[str, tuple[str, SmoothingFactor]] = {}
    errors: dict[str, dict[str, float]] = {}
    for plan in track(plans, "choosing smoothing factors", len(plans)):
        x, weight = probes[plan.name], plan.layer.weight.detach().float().cpu()
        absmax = x.movedim(plan.channel_axis, 0).flatten(1).abs().amax(1)
        if intra == "smoothquant":
            strength = config.correction.smoothing_strength
            factor = smoothquant_factor(absmax, weight, strength)
            chosen[plan.name] = (f"smoothquant@{strength:g}", factor)
            continue
        candidates = {
            f"smoothquant@{a:g}": smoothquant_factor(absmax, weight, a) for a in STRENGTHS
        }
        if plan.name in embedded:
            candidates["embedding"] = embedded[plan.name]
        percentile = config.quantization.activations.percentile
        found = {
            name: output_error(plan, x, weight, f.factor, percentile)
            for name, f in candidates.items()
        }
        found["none"] = output_error(plan, x, weight, None, percentile)
        errors[plan.name] = found
        best = min(found, key=lambda name: (found[name], name != "none"))
        if best != "none":
            chosen[plan.name] = (best, candidates[best])
    factors, described = _describe(chosen)
    for name, entry in described.items():
        entry["relative_output_error"] = errors.get(name, {})
    return factors, described


def _describe(
    chosen: dict[str, tuple[str, SmoothingFactor]],
) -> tuple[Factors, Described]:
    factors = {name: factor.factor for name, (_, factor) in chosen.items()}
    described: Described = {
        name: {"in_channels": len(f.factor), "chosen": what, "clamped": f.clamped}
        for name, (what, f) in chosen.items()
    }
    return factors, described


def embedding_factors(
    config: Config, model: DiffusionModel, denoiser: Denoiser, timesteps: list[float]
) -> dict[str, SmoothingFactor]:
    """The embedding-derived factor of every layer behind a timestep embedding."""
    sites = smoothing_sites(model.denoiser)
    if not sites:
        return {}
    rows = min(model.num_classes or 1, EMBEDDED_CLASSES)
    x = torch.zeros(rows, *model.latent_shape)
    condition = model.condition(model.labels(list(range(rows)), config.sampling.classes))
    embeddings = step_embeddings(
        model.denoiser,
        sorted({site.projection for site in sites}),
        lambda t: denoiser(x, torch.tensor(t), condition),
        sorted(set(timesteps), reverse=True),
    )
    factors = {}
    for site in sites:
        embedding = embeddings[site.projection].chunk(site.parts, dim=1)[site.part]
        if site.norm is None:
            factor = modulation_factor(embedding)
        else:
            norm = model.denoiser.get_submodule(site.norm)
            assert isinstance(norm, nn.GroupNorm)
            factor = embedding_factor(embedding, norm.weight.cpu(), norm.num_groups, norm.eps)
        factors |= dict.fromkeys(site.layers, factor)
    return factors


def collect_probes(
    config: Config, model: DiffusionModel, denoiser: Denoiser, plans: list[LayerPlan], steps: int
) -> dict[str, Tensor]:
    """Inputs of every layer, float32, at PROBE_STEPS evenly spaced steps of a few trajectories."""
    sampling, calibration = config.sampling, config.calibration
    count = min(PROBE_TRAJECTORIES, calibration.trajectories)
    seeds = list(range(calibration.seed, calibration.seed + count))
    labels = model.labels(seeds, sampling.classes)
    predict = guided_predict(model, denoiser, labels, sampling.guidance_scale)
    stride = max(1, steps // PROBE_STEPS)
    parts: dict[str, list[Tensor]] = {plan.name: [] for plan in plans}
    calls = 0

    def receive(name: str, x: Tensor) -> None:
        if calls % stride:
            return
        rows = max(1, PROBE_ELEMENTS // PROBE_STEPS // x[0].numel())
        picked = x[:: max(1, -(-len(x) // rows))]
        parts[name].append(picked.detach().float().cpu().clone())

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        prediction = predict(x, t)
        calls += 1
        return prediction

    scheduler = make_scheduler(sampling.scheduler, model.scheduler_config)
    with capture_inputs(model.denoiser, list(parts), receive):
        denoise(
            counted,
            scheduler,
            sampling.steps,
            generators_for(seeds),
            model.latent_shape,
            eta=sampling.eta,
        )
    return {name: torch.cat(values) for name, values in parts.items()}


def output_error(
    plan: LayerPlan, x: Tensor, weight: Tensor, factor: Tensor | None, percentile: float
) -> float:
    """||f(x^, W^) - f(x, W)||^2 / ||f(x, W)||^2, nearest rounding, smoothed by factor or not."""
    exact = _apply(plan, x, weight)
    if factor is not None:
        x, weight = smooth(x, factor, plan.channel_axis), fold(weight, factor)
    if plan.activation_bits != FLOAT_BITS:
        spec = activation_spec(plan.activation_bits)
        observer = RangeObserver(plan.in_channels, plan.channel_axis)
        observer.update(x, 0)
        low, high = choose_range(observer.state(), plan.observer, spec, percentile)
        x = fake_quantize(x, choose_qparams(low[0], high[0], spec), spec)
    if plan.weight_bits != FLOAT_BITS:
        spec = weight_spec(plan.weight_bits)
        weight = fake_quantize(weight, mse_weight_qparams(weight, spec), spec)
    error = (_apply(plan, x, weight) - exact).double().square().sum()
    return float(error / exact.double().square().sum().clamp(min=1e-30))


def _apply(plan: LayerPlan, x: Tensor, weight: Tensor) -> Tensor:
    layer = plan.layer
    if isinstance(layer, nn.Conv2d):
        stride, padding = layer.stride, layer.padding
        return F.conv2d(x, weight, None, stride, padding, layer.dilation, layer.groups)
    return F.linear(x, weight)
