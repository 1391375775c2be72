"""Reuse across steps: its plan, chosen on the quantized model, and the terms that mend it.

The plan comes first, from errors without any correction. Then trajectories are drawn together with
the plan, and at every step the values that stand for what is not computed are fitted to what a
whole call at the same latents computes, so that later steps are fitted behind the terms of earlier
ones. Where the prediction is mended as well, its terms are fitted in the same pass, towards full
precision (ptq/stepwise.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config.schema import Config
from ..correction.stepwise import field_grid, fit_terms
from ..errors import ModelError
from ..machine import keeps
from ..models.loading import DiffusionModel
from ..models.reuse_sites import Site, reuse_chains
from ..progress import Track, counted
from ..runtime import trajectory
from ..runtime.denoiser import Denoiser, denoiser_costs, full_denoiser, quantized_denoiser
from ..runtime.reuse import TERMS, History, Pattern, ReusingDenoiser, SiteTerms, channel_axis
from ..sampling.levels import plan_steps
from ..store.artifacts import Artifact
from . import step_weights
from .cost import INTEGERS, SIMULATION, Cost, DenoiserCall
from .noise import computes_in_integers, fastest
from .reuse_errors import AGES, MEASURED, site_errors
from .reuse_plan import Chain, choose_plan
from .stepwise import fit_stepwise, goals_for

MOST_VALUES = 1 << 16
"""Values of a channel that terms are fitted on, at most, evenly from all; more: steadier terms, in
proportion to time and memory."""
SITE, OUTPUT = ("site", "both"), ("output", "both")
"""Values of correction.reuse that mend kept values, and the prediction."""


class FittingDenoiser(ReusingDenoiser):
    """A reusing denoiser that fits the terms of every step as it comes to it. branches: of a call,
    2 with guidance."""

    def __init__(self, inner: Denoiser, pattern: Pattern, branches: int, rows: int):
        terms: list[dict[str, SiteTerms]] = [{} for _ in pattern.timesteps]
        super().__init__(inner, pattern, terms, rows=rows)
        self.fitted, self.branches = terms, branches

    def _at(
        self, step: int, x: Tensor, t: Tensor | float, condition: Mapping[str, Tensor]
    ) -> Tensor:
        if kept := self.pattern.kept[step]:
            _, wanted = self.computed(x, t, condition, {})
            for name in sorted(kept):
                axis, history = channel_axis(self.sites[name]), self._history[name]
                self.fitted[step][name] = fit_site(wanted[name], history, axis, self.branches)
        return super()._at(step, x, t, condition)


def fit_site(wanted: Tensor, history: History, axis: int, branches: int) -> SiteTerms:
    """Terms that bring the kept value [N, ...] to the wanted one, per branch and channel.

    Zeros where they are the same.
    """
    found = []
    values = (wanted, history.values[0], history.slope)
    for parts in zip(*(value.chunk(branches) for value in values), strict=True):
        target, latest, slope = (_thinned(part.float().movedim(axis, 1)) for part in parts)
        found.append(fit_terms(target - latest, latest, slope, 1))
    return SiteTerms(
        torch.stack([terms.prediction for terms in found]),
        torch.stack([terms.latent for terms in found]),
        torch.stack([terms.field.flatten() for terms in found]),
    )


def _thinned(value: Tensor) -> Tensor:
    """[N, C, ...] -> [N, C, L] with at most MOST_VALUES of N * L."""
    flat = value.flatten(2)
    every = -(-len(flat) * flat.shape[2] // MOST_VALUES)
    return flat[:, :, ::every]


def find_reuse(
    config: Config,
    model: DiffusionModel,
    calibration: Artifact,
    quantized: Artifact,
    track: Track,
) -> Artifact:
    """The plan for `sampling.reuse` and its terms.

    Raises ModelError for a denoiser that has no sites, ConfigError for a budget that is too small
    or a sampler whose steps cannot be weighed (`plan_steps`).
    """
    assert config.sampling.reuse is not None
    chains = reuse_chains(model.denoiser)
    if not chains:
        raise ModelError(
            f"{model.source}: nothing of its denoiser can be reused across steps",
            "set sampling.reuse: null",
        )
    timed = trajectory.timed_scheduler(config, model)
    steps = plan_steps(timed, config.sampling.eta)
    by_time = step_weights.step_weights(config, model, calibration, track)
    weights = [by_time[round(step.t)] for step in steps]
    errors = site_errors(config, model, _quantized(config, model, quantized), track)
    kept, share = choose_plan(
        _measured_chains(config, model, chains), errors, weights, config.sampling.reuse
    )
    pattern = Pattern(tuple(float(t) for t in timed.timesteps), kept)
    tensors, channels = _fitted(config, model, calibration, quantized, pattern, track)
    sampling = config.sampling
    body = {
        "sampling": {
            "scheduler": sampling.scheduler,
            "steps": sampling.steps,
            "eta": sampling.eta,
            "guidance_scale": sampling.guidance_scale,
        },
        "timesteps": [*pattern.timesteps],
        "kept": [sorted(names) for names in kept],
        "chains": [[site.name for site in chain] for chain in chains],
        "share": share,
        "sites": channels,
        "branches": _branches(config, model),
        "correction": config.correction.reuse,
        "channels": model.latent_shape[0] if config.correction.reuse in OUTPUT else 0,
        "grid": list(field_grid(model.latent_shape[1:], config.correction.inter.field)),
        "latent_shape": list(model.latent_shape),
    }
    return Artifact(
        *("reuse", tensors, body, config.stage_digest("reuse"), model.digest),
        {"quantized": quantized.digest},
    )


def _branches(config: Config, model: DiffusionModel) -> int:
    return 2 if model.guides(config.sampling.guidance_scale) else 1


def _quantized(config: Config, model: DiffusionModel, quantized: Artifact) -> Denoiser:
    cache, low_memory = quantized.body["cache_time_embeddings"], not keeps(model.denoiser_bytes())
    backend = fastest(model.device)
    return quantized_denoiser(model, quantized, backend, cache, low_memory=low_memory)


def _measured_chains(
    config: Config, model: DiffusionModel, chains: Sequence[Sequence[Site]]
) -> list[Chain]:
    costs = denoiser_costs(config, model)
    total = sum(cost.macs for cost in costs)

    def saved(site: Site) -> float:
        return sum(cost.macs for cost in costs if site.holds(cost.name)) / total

    return [Chain(tuple(s.name for s in chain), tuple(map(saved, chain))) for chain in chains]


def _fitted(
    config: Config,
    model: DiffusionModel,
    calibration: Artifact,
    quantized: Artifact,
    pattern: Pattern,
    track: Track,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The artifact's tensors, and the channels of every site that has terms."""
    settings, method = config.calibration, config.correction.reuse
    if method == "none":
        return {}, {}
    seeds = list(range(settings.seed, settings.seed + settings.noise_trajectories))
    rows = settings.batch_size * _branches(config, model)
    inner = _quantized(config, model, quantized)
    denoiser: ReusingDenoiser
    fitting = None
    if method in SITE:
        denoiser = fitting = FittingDenoiser(inner, pattern, _branches(config, model), rows)
    else:
        denoiser = ReusingDenoiser(inner, pattern, rows=rows)
    tensors: dict[str, Tensor] = {}
    if method in OUTPUT:
        full = full_denoiser(model)
        goals, seeds = goals_for(config, model, calibration, full, track, most=len(seeds))
        tensors |= fit_stepwise(config, model, denoiser, goals, seeds, track)
    else:
        steps = counted(track, [None], "fitting kept values", config.sampling.steps, "steps")
        for _, tick in steps:
            trajectory.draw(config, model, denoiser, seeds, tick=tick)
    channels: dict[str, int] = {}
    if fitting is not None:
        for name in sorted(pattern.sites):
            table = [terms.get(name) for terms in fitting.fitted]
            shape = next(terms.factor.shape for terms in table if terms is not None)
            channels[name] = shape[1]
            nothing = SiteTerms(*[torch.zeros(shape)] * 3)
            for key in TERMS:
                of_steps = [getattr(terms or nothing, key) for terms in table]
                tensors[f"{name}.{key}"] = torch.stack(of_steps)
    return tensors, channels


def cost(config: Config, denoiser: nn.Module, call: DenoiserCall) -> Cost:
    """What finding a plan takes; values that are kept are small beside activations."""
    calibration = config.calibration
    quantized = INTEGERS if computes_in_integers(denoiser) else SIMULATION
    sites = [site for chain in reuse_chains(denoiser) for site in chain]
    of_layers = call.layer_macs.items()
    saved = sum(macs for name, macs in of_layers for site in sites if site.holds(name))
    tried = call.macs * (1 + AGES * len(sites)) - AGES * saved
    measured = min(MEASURED, calibration.noise_trajectories) * tried
    fitted = 2 * calibration.noise_trajectories * call.macs
    weighed = step_weights.cost(config, call)
    batch = call.copies * min(calibration.batch_size, calibration.noise_trajectories)
    return Cost(
        max(weighed.bytes, call.first_bytes(batch)),
        call.copies * call.steps * quantized * (measured + fitted),
        model_macs=weighed.model_macs,
    )
