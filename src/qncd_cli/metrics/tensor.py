"""How far a tensor or an image is from its full-precision counterpart, in decibels.

All sums are taken in float64 (images: in exact integers), so the numbers do not depend on the
dtype of the arguments. Identical arguments score math.inf; among the numbers of single samples,
which have to be finite, they score IDENTICAL_DB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..vocabulary import IDENTICAL_DB
from .images_on_disk import Images

PEAK = 255  # largest value of a uint8 image
IMAGES_PER_CHUNK = 64  # bounds the integer copies that psnr_each_db makes
CHANGED_DB = 20.0
"""An image of less PSNR is another one than its counterpart, not a noisier one."""
LOW_QUANTILE = 0.05


def sqnr_db(reference: Tensor, noisy: Tensor) -> float:
    """Signal-to-quantization-noise ratio, 10 log10(||reference||^2 / ||reference - noisy||^2), dB.

    reference, noisy: the same shape, any real dtype. Identical tensors: math.inf; a reference of
    zeros with a noisy tensor that is not: -math.inf; a NaN anywhere: NaN.
    Raises ValueError if the shapes differ or are empty.
    """
    _check_same_shape(reference, noisy)
    return _ratio_db(*_energies(reference, noisy))


def sqnr_steps_db(reference: Tensor, noisy: Tensor) -> list[float]:
    """sqnr_db of every sampling step over all samples.

    reference, noisy: [K, S, ...], K samples (trajectories), S sampling steps.
    Returns S numbers in dB. Raises ValueError if the shapes differ or have fewer than 2 dimensions.
    """
    _check_same_shape(reference, noisy)
    if reference.dim() < 2:
        raise ValueError(f"expected [samples, steps, ...], got shape {list(reference.shape)}")
    steps = range(reference.shape[1])
    return [sqnr_db(reference[:, step], noisy[:, step]) for step in steps]


def deviation_steps(reference: Tensor, noisy: Tensor) -> dict[str, list[float]]:
    """How far predictions are apart at every sampling step: mean and spread.

    reference, noisy: [K, S, C, ...], K samples, S sampling steps. Of the difference: mean is the
    root mean square over channels of its mean, spread the root of its mean variance within a
    channel, S numbers each. Raises ValueError as sqnr_steps_db does.
    """
    _check_same_shape(reference, noisy)
    if reference.dim() < 3:
        raise ValueError(f"expected [samples, steps, channels, ...], got {list(reference.shape)}")
    found: dict[str, list[float]] = {"mean": [], "spread": []}
    for step in range(reference.shape[1]):
        difference = noisy[:, step].to(torch.float64) - reference[:, step].to(torch.float64)
        rows = difference.transpose(0, 1).flatten(1)  # [C, K * ...]
        found["mean"].append(rows.mean(1).square().mean().sqrt().item())
        found["spread"].append(rows.var(1, unbiased=False).mean().sqrt().item())
    return found


def psnr_db(reference: Images, other: Images) -> float:
    """Peak signal-to-noise ratio over all pixels of all images, 10 log10(255^2 / MSE), dB.

    reference, other: uint8 [N, C, H, W]. One mean squared error over the whole set, not the mean
    of the images' PSNR (which is infinite as soon as one pair is identical).
    Raises ValueError if a dtype is not uint8, the shapes differ or there are no images.
    """
    return pooled_psnr_db(squared_errors(reference, other))


def pooled_psnr_db(errors: Tensor) -> float:
    """The PSNR of all images together, dB. errors: of `squared_errors`, float64 [N]."""
    return _ratio_db(PEAK**2, errors.mean().item())


def psnr_each_db(reference: Images, other: Images) -> list[float]:
    """PSNR of every pair of images, dB; arguments and errors as psnr_db. Returns N numbers."""
    return each_psnr_db(squared_errors(reference, other))


def each_psnr_db(errors: Tensor) -> list[float]:
    """The PSNR of every image, dB. errors: of `squared_errors`, float64 [N]."""
    return [_ratio_db(PEAK**2, error) for error in errors.tolist()]


def energies(reference: Tensor, noisy: Tensor) -> Tensor:
    """Signal and noise of every sample, float64 [N, 2]: what the SQNR is the ratio of.

    reference, noisy: [N, ...], any real dtype. Raises ValueError as sqnr_db does.
    """
    _check_same_shape(reference, noisy)
    both = [_energies(a, b) for a, b in zip(reference, noisy, strict=True)]
    return torch.tensor(both, dtype=torch.float64)


def _energies(reference: Tensor, noisy: Tensor) -> tuple[float, float]:
    signal = reference.detach().to(torch.float64)
    noise = signal - noisy.detach().to(torch.float64).to(signal.device)
    return signal.square().sum().item(), noise.square().sum().item()


def pooled_sqnr_db(energies: Tensor) -> float:
    """The SQNR of all samples together, dB. energies: of `energies`, [N, 2]."""
    signal, noise = energies.sum(0).tolist()
    return _ratio_db(signal, noise)


def each_sqnr_db(energies: Tensor) -> list[float]:
    """The SQNR of every sample, dB. energies: of `energies`, [N, 2]."""
    return [_ratio_db(signal, noise) for signal, noise in energies.tolist()]


def paired_fidelity(
    seeds: Sequence[int], psnr: Sequence[float], sqnr: Sequence[float]
) -> dict[str, Any]:
    """Decibels of single samples, by seed, and how they are spread.

    psnr, sqnr: of the images and of the final latents, in the order of the seeds. The pooled
    numbers follow the few samples that changed most; these say what most samples are like.
    Returns per_seed {psnr_db, sqnr_db}: {seed: dB between -IDENTICAL_DB and IDENTICAL_DB}, the
    median and the 5 % quantile of both, and `changed`, the number of images below CHANGED_DB.
    No two images that differ reach IDENTICAL_DB: one value off by one is 113 dB in an image of
    1024 x 1024. Latents that differ by less are given as equal.
    """
    found: dict[str, Any] = {"per_seed": {}}
    for name, values in (("psnr", psnr), ("sqnr", sqnr)):
        bounded = [min(max(value, -IDENTICAL_DB), IDENTICAL_DB) for value in values]
        found["per_seed"][f"{name}_db"] = dict(zip(map(str, seeds), bounded, strict=True))
        quantiles = torch.tensor([0.5, LOW_QUANTILE], dtype=torch.float64)
        both = torch.tensor(bounded, dtype=torch.float64).quantile(quantiles).tolist()
        found[f"{name}_median_db"], found[f"{name}_q05_db"] = both
    found["changed"] = sum(value < CHANGED_DB for value in psnr)
    return found


def squared_errors(reference: Images, other: Images) -> Tensor:
    """uint8 [N, C, H, W] twice -> mean squared error of each image, float64 [N], on the CPU.

    Raises ValueError as psnr_db does.
    """
    _check_same_shape(reference, other)
    if reference.dtype != torch.uint8 or other.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images, got {reference.dtype} and {other.dtype}")
    if len(reference.shape) != 4:
        raise ValueError(f"expected images [N, C, H, W], got shape {list(reference.shape)}")
    sums = []
    for a, b in zip(reference.split(IMAGES_PER_CHUNK), other.split(IMAGES_PER_CHUNK), strict=True):
        difference = a.to(torch.int32) - b.to(a.device, torch.int32)
        sums.append(difference.square().sum(dim=(1, 2, 3), dtype=torch.int64).cpu())
    return torch.cat(sums).to(torch.float64) / math.prod(reference.shape[1:])


def _ratio_db(signal: float, noise: float) -> float:
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal > 0 else -math.inf


def _check_same_shape(reference: Images, other: Images) -> None:
    if reference.shape != other.shape:
        shapes = f"{list(reference.shape)} against {list(other.shape)}"
        raise ValueError(f"the two tensors must have the same shape, got {shapes}")
    if math.prod(reference.shape) == 0:
        raise ValueError(f"nothing to compare: shape {list(reference.shape)}")
