"""Distances between sets of images, and what each of them may be called.

`fid`, `kid` and `inception_score` are names of numbers that come from the published Inception
weights. Every other network fills `feature_distance`, `kernel_distance`, `class_score` and
`precision_recall` instead, and each of these names its network.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArtifactError
from ..progress import Track, no_progress
from .features import NUM_CLASSES
from .fidelity import (
    MINIMUM_IMAGES,
    Features,
    class_score,
    extract_features,
    frechet_distance,
    frechet_statistics,
    kernel_distance,
    precision_recall,
)
from .networks import FeatureNetwork, packaged
from .networks import downloaded_inception as downloaded_inception
from .networks import inception as inception
from .record import METRICS
from .reference import Reference, Statistics
from .reference import load_images as load_images
from .reference import load_reference as load_reference

BOOTSTRAP_ROUNDS = 50
BOOTSTRAP_MAX_FEATURES = 256  # a round is an eigendecomposition: too slow at Inception's 2,048
CONFIDENCE = (0.025, 0.975)


def frechet_interval(
    features: Tensor,
    other: Tensor | Statistics,
    *,
    rounds: int = BOOTSTRAP_ROUNDS,
    seed: int = 0,
    paired: bool = False,
    track: Track = no_progress,
) -> tuple[float, float | None, float | None]:
    """(value, low, high): the Frechet distance of features [N, D] to other, 95% bootstrap interval.

    features are resampled with replacement; so is `other` if it is features (by the same rows if
    paired: image i of both sets has the same seed), while statistics stay fixed. A resampled set
    holds fewer distinct images and so lies further away; hence the deviations of the rounds from
    their mean are laid around the measured value. The interval speaks of sets of this size.
    rounds 0: low and high are None. Raises ValueError if paired sets differ in size.
    """
    if paired and (isinstance(other, dict) or len(other) != len(features)):
        raise ValueError("paired sets must have the same number of images")
    against = other if isinstance(other, dict) else frechet_statistics(other)
    value = frechet_distance(frechet_statistics(features), against)
    if rounds == 0:
        return value, None, None
    rng = np.random.default_rng(seed)
    distances = []
    for _ in track(range(rounds), "bootstrapping the distance", rounds, "rounds"):
        rows = torch.from_numpy(rng.integers(len(features), size=len(features)))
        if not isinstance(other, dict):
            drawn = rows if paired else torch.from_numpy(rng.integers(len(other), size=len(other)))
            against = frechet_statistics(other[drawn])
        distances.append(frechet_distance(frechet_statistics(features[rows]), against))
    low, high = value + np.quantile(distances, CONFIDENCE) - np.mean(distances)
    return value, max(float(low), 0.0), float(high)


def feature_distance(
    images_a: Tensor | Features,
    images_b: Tensor | Features,
    network: FeatureNetwork,
    *,
    paired: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    device: str = "cpu",
    bootstrap_rounds: int | None = None,
    track: Track = no_progress,
) -> dict[str, Any]:
    """Frechet distance between two sets of samples, e.g. full precision and quantized.

    Arguments and errors as measure; paired: see frechet_interval.
    Returns {network, name, value, low, high}; low and high are None where not computed.
    """
    sides = {"the first set": images_a, "the second set": images_b}
    a, b = (
        _to_features(images, network, {"fid"}, what, batch_size=batch_size, device=device).features
        for what, images in sides.items()
    )
    return _frechet_entry(network, a, b, bootstrap_rounds, seed, track, paired)


def prepare_reference(
    reference: Reference,
    network: FeatureNetwork,
    metrics: Collection[str] = METRICS,
    *,
    batch_size: int = 64,
    device: str = "cpu",
    track: Track = no_progress,
) -> Reference:
    """The reference with the features and statistics that the metrics need; measure does it too.

    Stored statistics win over those of the images: ADM's .npz keeps 10,000 images beside the
    statistics of the whole training set. Raises ArtifactError if the reference cannot supply them.
    """
    what = f"reference {reference.source}"
    reference.check(metrics, network)
    ready = reference.fitted(network.feature_size)
    wanted = {"kid", "prc"} | ({"fid"} if ready.statistics is None else set())
    if ready.features is None and ready.images is not None and wanted & set(metrics):
        features = _to_features(
            ready.images,
            network,
            metrics,
            what,
            batch_size=batch_size,
            device=device,
            track=track,
        )
        ready = replace(ready, features=features.features)
    if "fid" in metrics and ready.statistics is None and ready.features is not None:
        ready = replace(ready, statistics=frechet_statistics(ready.features))
    if ready.features is not None:
        _check_count(what, len(ready.features), metrics)
    return ready


def measure(
    images: Tensor | Features,
    reference: Reference | None,
    network: FeatureNetwork,
    metrics: Collection[str] = METRICS,
    *,
    batch_size: int = 64,
    seed: int = 0,
    device: str = "cpu",
    bootstrap_rounds: int | None = None,
    track: Track = no_progress,
) -> dict[str, Any]:
    """The metrics of one set of images: the entry `full`, `quantized` or `images` of metrics.json.

    images: uint8 [N, 1 or 3, H, W], or their features; metrics: of METRICS; reference: needed
    unless only isc is asked for; bootstrap_rounds: by default 50, or 0 above 256 features.
    Keys: network, num_samples, reference; feature_distance, kernel_distance, class_score and
    precision_recall, which name their network; fid, inception_score and kid, filled by the
    published Inception weights only; sfid (None); precision, recall. Not asked for: None.
    Raises ValueError for an unknown metric; ArtifactError for too few images or a reference that
    lacks what a metric needs; and what extract_features raises.
    """
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise ValueError(f"unknown metrics {unknown}, known are {list(METRICS)}")
    if reference is None and set(metrics) - {"isc"}:
        raise ArtifactError("fid, kid and prc need a reference set", "name one or ask for isc only")
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "track": track}
    known = prepare_reference(reference, network, metrics, **options) if reference else None
    mine = _to_features(images, network, metrics, "the samples", **options)
    features = mine.features
    found: dict[str, Any] = {}
    if "isc" in metrics:
        found["class_score"] = class_score(mine.logits, seed)
    if known is not None and known.statistics is not None and "fid" in metrics:
        found["feature_distance"] = _frechet_entry(
            network, features, known.statistics, bootstrap_rounds, seed, track
        )
    if known is not None and known.features is not None:
        if "kid" in metrics:
            found["kernel_distance"] = kernel_distance(features, known.features, seed)
        if "prc" in metrics:
            found["precision_recall"] = precision_recall(features, known.features)
    source = None if known is None else {"source": known.source, "num_samples": known.num_samples}
    return {
        "network": {"name": network.name, "weights_sha256": network.sha256},
        "num_samples": len(features),
        "reference": source,
        **_named(network, found),
    }


def not_measured(count: int) -> dict[str, Any]:
    """The entry of a set of which no metric was asked for, or none could be had: all None."""
    return {"network": None, "num_samples": count, "reference": None, **_named(None, {})}


def fits_labels(labels: Sequence[int]) -> bool:
    """Whether the packaged classifier knows all classes that were asked for."""
    return all(0 <= label < NUM_CLASSES for label in labels)


def class_agreement(
    images: Tensor | Features,
    labels: Tensor | Sequence[int],
    network: FeatureNetwork | None = None,
    *,
    batch_size: int = 64,
    device: str = "cpu",
) -> float:
    """Share of images that the packaged classifier puts into the class that was asked for.

    images: uint8 [N, 1 or 3, H, W], or their features; labels: N classes, 0 to 9.
    network: the packaged one unless given. Raises ValueError if the labels do not match, and what
    extract_features raises.
    """
    network = packaged() if network is None else network
    asked = torch.as_tensor(labels).cpu()
    if not fits_labels(asked.flatten().tolist()):
        raise ValueError(f"labels must lie in 0..{NUM_CLASSES - 1}")
    logits = _to_features(
        images, network, {"isc"}, "the samples", batch_size=batch_size, device=device
    ).logits
    if asked.shape != logits.shape[:1]:
        raise ValueError(f"{len(logits)} images need as many labels, got {list(asked.shape)}")
    return (logits.argmax(dim=1) == asked).double().mean().item()


def _to_features(
    images: Tensor | Features,
    network: FeatureNetwork,
    metrics: Collection[str],
    what: str,
    *,
    batch_size: int,
    device: str,
    track: Track = no_progress,
) -> Features:
    """Features of images, extracted unless they are features already; enough for the metrics."""
    count = len(images.features) if isinstance(images, Features) else len(images)
    _check_count(what, count, metrics)
    if isinstance(images, Tensor):
        return extract_features(images, network, batch_size=batch_size, device=device, track=track)
    if images.network != network.name:
        raise ValueError(f"features of {images.network}, but the network is {network.name}")
    return images


def _check_count(what: str, count: int, metrics: Collection[str]) -> None:
    short = [f"{name} needs {MINIMUM_IMAGES[name]}" for name in METRICS if name in metrics]
    if count < max((MINIMUM_IMAGES[name] for name in metrics), default=0):
        raise ArtifactError(f"{what}: too few images, {count}: {', '.join(short)}", "add images")


def _frechet_entry(
    network: FeatureNetwork,
    features: Tensor,
    other: Tensor | Statistics,
    rounds: int | None,
    seed: int,
    track: Track,
    paired: bool = False,
) -> dict[str, Any]:
    if rounds is None:
        rounds = BOOTSTRAP_ROUNDS if network.feature_size <= BOOTSTRAP_MAX_FEATURES else 0
    value, low, high = frechet_interval(
        features, other, rounds=rounds, seed=seed, paired=paired, track=track
    )
    entry = {"network": network.name, "name": network.distance_name}
    return {**entry, "value": value, "low": low, "high": high}


def _named(network: FeatureNetwork | None, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The keys of a set in metrics.json: entries with their network, then the field's names.

    network: None where nothing was found.
    """
    keys = ("feature_distance", "kernel_distance", "class_score", "precision_recall")
    entries = {
        key: {"network": network.name, **found[key]} if network and key in found else None
        for key in keys
    }
    is_fid = network is not None and network.is_fid

    def value(key: str, field: str = "value", inception_only: bool = True) -> float | None:
        entry = entries[key]
        return None if entry is None or (inception_only and not is_fid) else entry[field]

    return {
        **entries,
        "fid": value("feature_distance"),
        "sfid": None,  # needs spatial features, which torch-fidelity does not supply
        "inception_score": value("class_score"),
        "kid": value("kernel_distance"),
        "precision": value("precision_recall", "precision", inception_only=False),
        "recall": value("precision_recall", "recall", inception_only=False),
    }
