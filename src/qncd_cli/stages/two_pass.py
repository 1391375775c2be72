"""Part of stage 2: which layers read their input as two bytes, in two passes of 8-bit kernels.

A few layers near the output pass the rounding of their input on to the prediction almost whole.
They hold a small share of the MACs; a second pass over the low byte removes that noise and stays
within 8-bit integer kernels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..artifacts import Artifact
from ..config import Config
from ..models.loading import DiffusionModel
from ..models.topology import count_macs
from ..quant.affine import QParams, choose_qparams, fake_quantize
from ..quant.observers import choose_range
from ..quant.smoothing import SmoothingFactor, smooth
from ..spec import MAX_ACTIVATION_BITS, activation_spec
from .assemble import Denoiser, Track, full_denoiser, guided_predict, timestep_group
from .choose_smoothing import Factors
from .plan import LayerPlan

ROWS_PER_STEP = 4
STEPS = 6


def two_pass_layers(
    config: Config,
    model: DiffusionModel,
    calibration: Artifact,
    plans: list[LayerPlan],
    factors: Factors,
    track: Track,
) -> list[LayerPlan]:
    """The plans, those of the most sensitive layers with inputs of 16 bits and min-max ranges.

    Sensitivity: relative squared error of the guided prediction when one layer's input alone is
    quantized, per MAC. Layers are taken in its order while their MACs stay within
    quantization.activations.two_pass_share of the denoiser's.
    """
    share = config.quantization.activations.two_pass_share
    candidates = [p for p in plans if p.activation_bits <= 8]
    if share == 0 or not candidates:
        return plans
    macs = _macs(config, model)
    probe = _InputProbe(config, model, calibration, factors)
    errors = {
        plan.name: probe.error(plan)
        for plan in track(candidates, "measuring layers' inputs", len(candidates))
    }
    left = share * sum(macs.values())
    chosen = set()
    ranked = sorted(candidates, key=lambda p: -errors[p.name] / max(1, macs.get(p.name, 0)))
    for plan in ranked:
        cost = macs.get(plan.name, 0)
        if 0 < cost <= left and errors[plan.name] > 0:
            chosen.add(plan.name)
            left -= cost
    return [
        replace(p, activation_bits=MAX_ACTIVATION_BITS, observer="minmax")
        if p.name in chosen
        else p
        for p in plans
    ]


def _macs(config: Config, model: DiffusionModel) -> dict[str, int]:
    denoiser = full_denoiser(model)
    condition = model.condition(model.labels([0], config.sampling.classes))
    x = torch.zeros(1, *model.latent_shape)
    costs = count_macs(model.denoiser, lambda: denoiser(x, torch.tensor(0), condition))
    return {cost.name: cost.macs for cost in costs}


class _InputProbe:
    """The guided prediction on a few calibration rows, with or without one quantized input."""

    def __init__(
        self, config: Config, model: DiffusionModel, calibration: Artifact, factors: Factors
    ):
        self.config, self.model, self.calibration = config, model, calibration
        self.factors = factors
        self.denoiser: Denoiser = full_denoiser(model)
        self.bounds = tuple(calibration.body["group_bounds"])
        timestep = calibration.tensors["inputs.timestep"]
        times = sorted(set(timestep.tolist()), reverse=True)
        picked = {times[round(i * (len(times) - 1) / (STEPS - 1))] for i in range(STEPS)}
        self.batches = [
            (t, (timestep == t).nonzero().flatten()[:ROWS_PER_STEP])
            for t in sorted(picked, reverse=True)
        ]
        self.exact = self._predict()

    def error(self, plan: LayerPlan) -> float:
        """Mean over the timesteps of ||eps' - eps||^2 / ||eps||^2."""
        factor = self.factors.get(plan.name)
        spec = activation_spec(plan.activation_bits)
        prefix = f"{plan.name}.input_"
        state = {
            key.removeprefix(prefix): value
            for key, value in self.calibration.tensors.items()
            if key.startswith(prefix)
        }
        named = "minmax" if plan.observer == "output" else plan.observer
        percentile = self.config.quantization.activations.percentile
        qparams = choose_qparams(*choose_range(state, named, spec, percentile), spec)

        def quantized(module, args):
            group = timestep_group(self.denoiser.step.timestep, self.bounds)
            at_group = QParams(qparams.scale[group], qparams.zero_point[group])
            x = args[0].float()
            if factor is None:
                return (fake_quantize(x, at_group, spec).to(args[0].dtype),)
            y = smooth(x, factor.factor, plan.channel_axis, factor.shift)
            y = fake_quantize(y, at_group, spec)
            return (_unsmooth(y, factor, plan.channel_axis).to(args[0].dtype),)

        handle = self.model.denoiser.get_submodule(plan.name).register_forward_pre_hook(quantized)
        try:
            found = self._predict()
        finally:
            handle.remove()
        errors = [
            float((a - b).double().square().sum() / b.double().square().sum().clamp(min=1e-30))
            for a, b in zip(found, self.exact, strict=True)
        ]
        return sum(errors) / len(errors)

    def _predict(self) -> list[Tensor]:
        tensors = self.calibration.tensors
        outputs = []
        for t, rows in self.batches:
            labels = tensors["inputs.class"][rows]
            scale = self.config.sampling.guidance_scale
            predict = guided_predict(self.model, self.denoiser, labels, scale)
            outputs.append(predict(tensors["inputs.x"][rows], torch.tensor(t)))
        return outputs


def _unsmooth(y: Tensor, factor: SmoothingFactor, channel_axis: int) -> Tensor:
    x = smooth(y, 1 / factor.factor, channel_axis)
    if factor.shift is None:
        return x
    return smooth(x, torch.ones_like(factor.factor), channel_axis, -factor.shift)
