"""Denoisers known in closed form, with planted quantization noise, and a short sampler for them.

Data N(mu, s^2) per element have the exact denoiser
eps*(x, t) = sqrt(1 - abar) (x - sqrt(abar) mu) / (abar s^2 + 1 - abar).
"""

from __future__ import annotations

import torch

from qncd_cli.correction.baseline import EstimatorBaseline
from qncd_cli.correction.runtime import RuntimeCorrection
from qncd_cli.sampling.noise import generators_for
from qncd_cli.sampling.samplers import denoise, make_scheduler

SHAPE = (3, 24, 24)
STEPS = 20
SEEDS = [0, 1, 2]
MU = 0.3
LDM = {
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}
BIAS = torch.tensor([0.02, -0.05, 0.08]).view(1, 3, 1, 1)
DDIM = make_scheduler("ddim", LDM)


def gaussian(s, bias=0.0, k=0.0):
    """Exact denoiser of N(MU, s^2), with planted quantization noise eps~ = (1 + k) eps + bias."""

    def predict(x, t):
        a = DDIM.alphas_cumprod[round(float(t))]
        eps = torch.sqrt(1 - a) * (x - torch.sqrt(a) * MU) / (a * s * s + 1 - a)
        return (1 + k) * eps + bias

    return predict


def sample(predict, correction=None, seeds=SEEDS, eta=0.0, on_step=None, scheduler=DDIM):
    options = {"eta": eta, "correction": correction, "on_step": on_step}
    return denoise(predict, scheduler, STEPS, generators_for(seeds), SHAPE, **options)


def runtime(seeds=SEEDS, **options):
    return RuntimeCorrection(generators_for(seeds, "correction"), **options)


def full_precision_baseline(predict, seeds=range(100, 116), **options):
    recorder = runtime(seeds, interval=1, apply=False, **options)
    sample(predict, recorder, seeds)
    return EstimatorBaseline.of(recorder.estimates)


def distance(x, y):
    return (x - y).square().mean().sqrt().item()
