"""How sets of images are measured, and what of it cannot be had for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .. import __version__, machine
from ..progress import Track, no_progress
from .fidelity import MINIMUM_IMAGES, SEED
from .frechet import least_for_limit
from .image import FeatureNetwork, Reference, prepare_reference
from .perceptual import PerceptualWeights
from .prompted import ClipModel
from .record import METRICS, UNREFERENCED

PIXEL_RANGE = (0, 255)
FEATURES_DEVICE = "cpu"
"""Where features are extracted, whatever draws the images."""


@dataclass(frozen=True)
class Protocol:
    """How to measure: which numbers, in which features, against what.

    metrics: of METRICS, those that can be had; network: None where no features can be
    had; reference: None where no metric needs one; left_out: a metric that is wanted and cannot be
    had, or `distance`, the one to full precision -> why. lpips, clip: what these metrics are
    computed with, None where they are not.
    """

    metrics: tuple[str, ...]
    network: FeatureNetwork | None
    reference: Reference | None
    seed: int = SEED
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lpips: PerceptualWeights | None = None
    clip: ClipModel | None = None

    def without(self, reasons: Mapping[str, str]) -> Protocol:
        """The protocol without these metrics, each left out for the reason given."""
        left_out = {**self.left_out}
        for name, why in reasons.items():
            left_out[name] = (*left_out.get(name, ()), why)
        metrics = tuple(name for name in self.metrics if name not in left_out)
        return replace(self, metrics=metrics, left_out=left_out)


def prepared(protocol: Protocol, count: int, track: Track = no_progress) -> Protocol:
    """The protocol for sets of `count` images.

    It holds the reference's features and statistics, so that they are computed once, and leaves
    out the metrics that sets or reference are too small for.
    """
    reference, network = protocol.reference, protocol.network
    protocol = protocol.without(_unmet(protocol, count))
    if reference is None or network is None or not set(protocol.metrics) - UNREFERENCED:
        return protocol
    ready = prepare_reference(reference, network, protocol.metrics, track=track)
    return replace(protocol, reference=ready)


def _unmet(protocol: Protocol, count: int) -> dict[str, str]:
    """Metrics that these sets or this reference do not allow, and why."""
    reference, network = protocol.reference, protocol.network
    needed = dict(MINIMUM_IMAGES)
    if network is not None:
        needed["fid_infinity"] = least_for_limit(network.feature_size)
    few = {
        name: f"{count} images, {name} needs {least}"
        for name, least in needed.items()
        if name in protocol.metrics and count < least
    }
    if network is not None and "sfid" in protocol.metrics and not network.spatial_size:
        few["sfid"] = f"{network.name} has no spatial features, Inception has"
    if network is not None and count < MINIMUM_IMAGES["fid"]:
        few["distance"] = f"{count} images, a distance needs {MINIMUM_IMAGES['fid']}"
    if reference is None or network is None:
        return few
    held = reference.num_samples
    lacking = {
        name: f"reference {reference.source} holds no {need} of {network.name}"
        for name, need in reference.lacks(protocol.metrics, network).items()
        if name not in few
    }
    small = {
        name: f"reference {reference.source} holds {held} images, {name} needs {least}"
        for name, least in MINIMUM_IMAGES.items()
        if name in protocol.metrics
        and name not in UNREFERENCED
        and held is not None
        and held < least
    }
    return {**few, **small, **lacking}


def describe(protocol: Protocol, count: int, more: dict[str, Any]) -> dict[str, Any]:
    """metrics.json's `protocol`. more: what is known of the sets.

    Features are computed on the CPU, of images of 0 to 255 in three channels; devices beside it are
    those that images were drawn on, where that is known.
    """
    network = protocol.network
    device = {**more.get("device", {}), "features": FEATURES_DEVICE if network else None}
    here = machine.described()
    reference = protocol.reference if set(protocol.metrics) - UNREFERENCED else None
    return {
        "version": __version__,
        "metrics": [name for name in METRICS if name in protocol.metrics],
        "left_out": {name: list(reasons) for name, reasons in protocol.left_out.items()},
        "network": network.name if network else None,
        "network_sha256": network.sha256 if network else None,
        "reference": reference.source if reference else None,
        "reference_sha256": reference.digest if reference else None,
        "lpips_sha256": protocol.lpips.sha256 if protocol.lpips else None,
        "clip_sha256": protocol.clip.sha256 if protocol.clip else None,
        "num_samples": count,
        "bootstrap_seed": protocol.seed,
        "resize": network.resize if network else None,
        "pixel_range": list(PIXEL_RANGE),
        "libraries": machine.libraries(),
        "machine": {key: here[key] for key in ("cpu", "capability", "threads")},
        **more,
        "device": device,
    }
