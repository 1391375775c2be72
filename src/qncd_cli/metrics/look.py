"""One look at a set of images: every file is read once, for its features and for its faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..progress import Track, no_progress
from .fidelity import Features
from .images_on_disk import CHUNK, Images
from .kept_features import block_size, kept_features
from .networks import FeatureNetwork
from .protocol import Protocol
from .seen import Seen


@dataclass(frozen=True)
class Look:
    """features: None without a network, or without images."""

    seen: Seen
    features: Features | None

    def told(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The same as a value of JSON and tensors."""
        if self.features is None:
            return {"network": None, "seen": self.seen.told()}, {}
        tensors = {n: t for n, t in vars(self.features).items() if isinstance(t, Tensor)}
        return {"network": self.features.network, "seen": self.seen.told()}, tensors

    @classmethod
    def of(cls, value: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Look:
        """The look that was told."""
        seen, network = Seen.of_told(value["seen"]), value["network"]
        return cls(seen, None if network is None else Features(network, **tensors))


def look_at(
    images: Images,
    protocol: Protocol,
    names: Sequence[Any] | None = None,
    track: Track = no_progress,
) -> Look:
    """A look at images for a protocol. names: as of extract_features.

    Raises what extract_features and reading images raise.
    """
    network = protocol.network
    if network is None or not len(images):
        return Look(Seen.of(images), None)
    spatial = "sfid" in protocol.metrics
    features, seen = kept_features(images, network, names=names, spatial=spatial, track=track)
    return Look(seen, features)


def joined(looks: Sequence[Look], rows: Sequence[Sequence[int]]) -> Look:
    """A look at a whole set, whose names are in their order, from looks at parts of it.

    rows: of each part, within the whole.
    """
    if len(looks) == 1:
        return looks[0]
    order = torch.tensor([row for part in rows for row in part]).argsort()
    seen = Seen.joined([look.seen for look in looks]).take(order.tolist())
    found = [look.features for look in looks if look.features is not None]
    if not found:
        return Look(seen, None)

    def whole(name: str) -> Tensor | None:
        parts = [getattr(features, name) for features in found]
        return None if parts[0] is None else torch.cat(parts)[order]

    features, logits = whole("features"), whole("logits")
    assert features is not None and logits is not None
    network, names = found[0].network, torch.arange(len(order))
    return Look(seen, Features(network, features, logits, whole("spatial"), names))


def rows_of_parts(count: int, parts: int, network: FeatureNetwork | None = None) -> list[list[int]]:
    """Rows of `count` images for each of so many parts: whole chunks, so that every image is looked
    at in the chunk that it has in the whole.

    network: takes what is kept together.
    """
    size = CHUNK if network is None else block_size(network)
    chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    return [[row for chunk in chunks[part::parts] for row in chunk] for part in range(parts)]
