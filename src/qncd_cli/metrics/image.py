"""Distances between sets of images, and what each of them may be called.

`fid`, `kid` and `inception_score` are names of numbers that come from the published Inception
weights. Every other network fills `feature_distance`, `kernel_distance`, `class_score` and
`precision_recall` instead, and each of these names its network.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArtifactError
from ..progress import Track, no_progress
from . import bootstrap, fidelity, frechet
from .fidelity import MINIMUM_IMAGES, SEED, Features, extract_features
from .images_on_disk import Images
from .kept_features import kept_features
from .manifold import recall_replicates
from .networks import FeatureNetwork, packaged
from .networks import downloaded_inception as downloaded_inception
from .networks import efficientnet as efficientnet
from .networks import inception as inception
from .record import METRICS, UNREFERENCED
from .reference import Reference
from .reference import load_images as load_images
from .reference import load_reference as load_reference

ENTRIES = (
    *("feature_distance", "spatial_distance", "feature_distance_infinity"),
    *("kernel_distance", "class_score", "precision_recall"),
)
"""Objects of a set in metrics.json that name their network."""
AGAINST_STATISTICS = {"fid", "fid_infinity"}


@dataclass(frozen=True, eq=False)
class Measures:
    """entry: the object of a set in metrics.json; replicates: what a bootstrap made of its numbers,
    by key, R each, for comparing with another set of the same seeds."""

    entry: dict[str, Any]
    replicates: Mapping[str, np.ndarray]


def feature_distance(
    images_a: Images | Features,
    images_b: Images | Features,
    network: FeatureNetwork,
    *,
    paired: bool = False,
    seed: int = SEED,
    device: str = "cpu",
    rounds: int = bootstrap.ROUNDS,
    track: Track = no_progress,
) -> dict[str, Any]:
    """Frechet distance between two sets of samples, e.g. full precision and quantized.

    paired: image i of both has the same seed, so that both are resampled alike; rounds: of the
    bootstrap. Returns {network, name, value, low, high}; low and high are None where not computed.
    Raises ValueError if paired sets differ in size, and as measure.
    """
    sides = {"the first set": images_a, "the second set": images_b}
    first, second = (
        _to_features(images, network, {"fid"}, what, device=device, track=track)
        for what, images in sides.items()
    )
    if paired:  # rows of a pair stay beside each other
        second = replace(second, order=first.order)
    a, b = first.in_order().features, second.in_order().features
    if paired and len(a) != len(b):
        raise ValueError("paired sets must have the same number of images")
    drawn = bootstrap.weights(len(a), rounds, seed)
    other = drawn if paired else bootstrap.weights(len(b), rounds, seed + 1)
    value = frechet.distance(frechet.statistics(a), frechet.statistics(b))
    replicates = frechet.replicates_to_features(a, b, drawn, other)
    entry = {"network": network.name, "name": network.distance_name}
    return {**entry, **_bounded(value, replicates, (0, np.inf))}


def prepare_reference(
    reference: Reference,
    network: FeatureNetwork,
    metrics: Collection[str],
    *,
    device: str = "cpu",
    track: Track = no_progress,
) -> Reference:
    """The reference with the features and statistics that the metrics need; measure does it too.

    Stored statistics win over those of the images: ADM's .npz keeps 10,000 images beside the
    statistics of the whole training set. Raises ArtifactError if the reference cannot supply them.
    """
    what = f"reference {reference.source}"
    reference.check(metrics, network)
    ready = reference.fitted(network)
    wanted = {"kid", "prc"} if ready.features is None else set()
    if ready.statistics is None and ready.features is None:
        wanted |= AGAINST_STATISTICS
    if ready.spatial is None:
        wanted.add("sfid")
    wanted &= set(metrics)
    if ready.images is not None and wanted:
        _check_count(what, len(ready.images), wanted)
        options: dict[str, Any] = {"device": device, "track": track, "names": ready.names}
        found, seen = kept_features(ready.images, network, spatial="sfid" in wanted, **options)
        found = found.in_order()
        ready = replace(ready, features=found.features, seen=seen)
        if found.spatial is not None and ready.spatial is None:
            ready = replace(ready, spatial=frechet.statistics(found.spatial))
    if AGAINST_STATISTICS & set(metrics) and ready.statistics is None:
        assert ready.features is not None
        ready = replace(ready, statistics=frechet.statistics(ready.features))
    if ready.features is not None:
        _check_count(what, len(ready.features), set(metrics) - UNREFERENCED)
    return ready


def measure(
    images: Images | Features,
    reference: Reference | None,
    network: FeatureNetwork,
    metrics: Collection[str],
    *,
    names: Sequence[Any] | None = None,
    seed: int = SEED,
    device: str = "cpu",
    rounds: int = bootstrap.ROUNDS,
    track: Track = no_progress,
) -> Measures:
    """The metrics of one set of images: the entry `full`, `quantized` or `images` of metrics.json.

    images: uint8 [N, 1 or 3, H, W], or their features; names: see extract_features; metrics: of
    METRICS; reference: needed but for isc, fixed in every interval; rounds: of the bootstrap.
    Keys of the entry: network, num_samples, reference; ENTRIES; fid, sfid, inception_score and kid,
    filled by the published Inception weights only; precision, recall. Not asked for: None.
    Raises ValueError for an unknown metric; ArtifactError for too few images or a reference that
    lacks what a metric needs; and what extract_features raises.
    """
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise ValueError(f"unknown metrics {unknown}, known are {list(METRICS)}")
    if reference is None and set(metrics) - UNREFERENCED:
        raise ArtifactError("fid, kid and prc need a reference set", "name one or ask for isc only")
    options: dict[str, Any] = {"device": device, "track": track}
    known = prepare_reference(reference, network, metrics, **options) if reference else None
    extracted = _to_features(images, network, metrics, "the samples", names=names, **options)
    mine = extracted.in_order()
    drawn = bootstrap.weights(len(mine.features), rounds, seed)
    found: dict[str, dict[str, Any]] = {}
    moved: dict[str, np.ndarray] = {}
    if "isc" in metrics:
        score = fidelity.class_score(mine.logits, seed)
        moved["class_score"] = fidelity.class_score_replicates(mine.logits, drawn, seed)
        bounds = _bounded(score["value"], moved["class_score"], (1, np.inf))
        found["class_score"] = {**score, **bounds}
    if known is not None:
        _against(known, mine, network, metrics, drawn, seed, found, moved)
    source = known and {"source": known.source, "num_samples": known.num_samples}
    entry = {
        "network": {"name": network.name, "weights_sha256": network.sha256},
        "num_samples": len(mine.features),
        "reference": source,
        **_named(network, found),
    }
    return Measures(entry, moved)


def _against(
    known: Reference,
    mine: Features,
    network: FeatureNetwork,
    metrics: Collection[str],
    drawn: Tensor,
    seed: int,
    found: dict[str, dict[str, Any]],
    moved: dict[str, np.ndarray],
) -> None:
    """Put the metrics that need a reference into found, and their replicates into moved."""
    features, positive = mine.features, (0, np.inf)
    if known.statistics is not None and AGAINST_STATISTICS & set(metrics):
        replicates = frechet.replicates_to_statistics(features, known.statistics, drawn)
        if "fid" in metrics:
            value = frechet.distance(frechet.statistics(features), known.statistics)
            moved["feature_distance"] = replicates
            bounded = _bounded(value, replicates, positive)
            found["feature_distance"] = {"name": network.distance_name, **bounded}
        if "fid_infinity" in metrics:
            value = frechet.limit(features, known.statistics, seed)
            moved["feature_distance_infinity"] = replicates
            found["feature_distance_infinity"] = _bounded(value, replicates)
    if known.spatial is not None and mine.spatial is not None and "sfid" in metrics:
        value = frechet.distance(frechet.statistics(mine.spatial), known.spatial)
        replicates = frechet.replicates_to_statistics(mine.spatial, known.spatial, drawn)
        moved["spatial_distance"] = replicates
        name = "sfid" if network.is_fid else f"s{network.distance_name}"
        found["spatial_distance"] = {"name": name, **_bounded(value, replicates, positive)}
    if known.features is None:
        return
    if "kid" in metrics:
        entry = fidelity.kernel_distance(features, known.features, seed)
        replicates = bootstrap.of_kernel_distance(features, known.features, drawn, seed)
        moved["kernel_distance"] = replicates
        found["kernel_distance"] = {**entry, **_bounded(entry["value"], replicates)}
    if "prc" in metrics:
        entry = {"neighborhood": fidelity.PRC_NEIGHBORHOOD}
        inside = fidelity.within(features, known.features)
        moved["precision"] = bootstrap.of_shares(inside, drawn)
        moved["recall"] = recall_replicates(known.features, features, len(drawn), seed)
        found_in = fidelity.within(known.features, features)
        for key, share in (("precision", inside), ("recall", found_in)):
            entry[key] = _bounded(share.double().mean().item(), moved[key], (0, 1))
        found["precision_recall"] = entry


def not_measured(count: int) -> dict[str, Any]:
    """The entry of a set of which no metric was asked for, or none could be had: all None."""
    return {"network": None, "num_samples": count, "reference": None, **_named(None, {})}


def fits_labels(labels: Sequence[int], network: FeatureNetwork) -> bool:
    """Whether the network is a packaged classifier that knows all classes that were asked for."""
    return network.classes > 0 and all(0 <= label < network.classes for label in labels)


def class_agreement(
    images: Images | Features,
    labels: Tensor | Sequence[int],
    network: FeatureNetwork | None = None,
    *,
    device: str = "cpu",
) -> float:
    """Share of images that a packaged classifier puts into the class that was asked for.

    images: uint8 [N, 1 or 3, H, W], or their features; labels: N classes, of those it knows.
    network: that of Fashion-MNIST unless given. Raises ValueError if the labels do not match, and
    what extract_features raises.
    """
    network = packaged() if network is None else network
    asked = torch.as_tensor(labels).cpu()
    if not fits_labels(asked.flatten().tolist(), network):
        raise ValueError(f"labels must lie in 0..{network.classes - 1}")
    logits = _to_features(images, network, {"isc"}, "the samples", device=device).logits
    if asked.shape != logits.shape[:1]:
        raise ValueError(f"{len(logits)} images need as many labels, got {list(asked.shape)}")
    return (logits.argmax(dim=1) == asked).double().mean().item()


def _to_features(
    images: Images | Features,
    network: FeatureNetwork,
    metrics: Collection[str],
    what: str,
    *,
    names: Sequence[Any] | None = None,
    device: str,
    track: Track = no_progress,
) -> Features:
    """Features of images, extracted unless they are features already; enough for the metrics."""
    count = len(images.features) if isinstance(images, Features) else len(images)
    _check_count(what, count, metrics)
    if isinstance(images, Features):
        if images.network != network.name:
            raise ValueError(f"features of {images.network}, but the network is {network.name}")
        if "sfid" in metrics and images.spatial is None:
            raise ValueError(f"{what}: features without those of sFID")
        return images
    spatial = "sfid" in metrics
    return extract_features(
        images, network, names=names, spatial=spatial, device=device, track=track
    )


def _check_count(what: str, count: int, metrics: Collection[str]) -> None:
    needs = {name: MINIMUM_IMAGES[name] for name in METRICS if name in metrics}
    short = [f"{name} needs {least}" for name, least in needs.items()]
    if count < max(needs.values(), default=0):
        raise ArtifactError(f"{what}: too few images, {count}: {', '.join(short)}", "add images")


def _bounded(
    value: float, replicates: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)
) -> dict[str, float | None]:
    low, high = bootstrap.interval(value, replicates, bounds)
    return {"value": value, "low": low, "high": high}


def _named(network: FeatureNetwork | None, found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The keys of a set in metrics.json: entries with their network, then the field's names.

    network: None where nothing was found.
    """
    entries = {
        key: {"network": network.name, **found[key]} if network and key in found else None
        for key in ENTRIES
    }
    published = entries if network is not None and network.is_fid else {}

    def value(of: Mapping[str, Any], key: str) -> float | None:
        entry = of.get(key)
        return None if entry is None else entry["value"]

    shares = entries["precision_recall"] or {}
    return {
        **entries,
        "fid": value(published, "feature_distance"),
        "sfid": value(published, "spatial_distance"),
        "inception_score": value(published, "class_score"),
        "kid": value(published, "kernel_distance"),
        "precision": value(shares, "precision"),
        "recall": value(shares, "recall"),
        "clip_score": None,
    }
