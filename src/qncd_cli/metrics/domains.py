"""What the packaged models were trained on: each domain has a feature network and a reference.

A packaged model belongs to the domain that its name begins with: zoo:fashion-ldm to fashion.
Torch is not imported here, so that commands can name domains at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PACKAGED = "zoo:"
"""How sources of packaged models begin."""
FEATURES = Path(__file__).resolve().parents[1] / "zoo" / "features"


@dataclass(frozen=True)
class Domain:
    """Images of one kind, the classifier that knows them, and their statistics.

    name: what --network calls it; data: what the images are; channels, side: of an image as the
    classifier takes it, pixels; classes: how many it tells apart, those of the domain's models;
    stride: of its first convolution; weights: its safetensors; reference: safetensors of features
    [N, 128] of the images, with their mean `mu` and covariance `sigma`.
    """

    name: str
    data: str
    channels: int
    side: int
    classes: int
    stride: int
    weights: Path
    reference: Path

    @property
    def network(self) -> str:
        """The classifier's name, as reported."""
        return f"{self.name}-classifier"

    @property
    def distance_name(self) -> str:
        """What a Frechet distance in its features is called."""
        return f"fd_{self.name}"


FASHION = Domain(
    name="fashion",
    data="Fashion-MNIST",
    channels=1,
    side=32,
    classes=10,
    stride=1,
    weights=FEATURES / "classifier.safetensors",
    reference=FEATURES / "reference.safetensors",
)
EMOJI = Domain(
    name="emoji",
    data="Fluent emoji",
    channels=3,
    side=64,
    classes=12,
    stride=2,
    weights=FEATURES / "emoji-classifier.safetensors",
    reference=FEATURES / "emoji-reference.safetensors",
)
DOMAINS = {domain.name: domain for domain in (FASHION, EMOJI)}
"""All of them, by the names that --network takes."""


def domain_of(source: str) -> Domain | None:
    """The domain of a packaged model, None of any other.

    >>> domain_of("zoo:emoji-ldm").distance_name
    'fd_emoji'
    """
    if not source.startswith(PACKAGED):
        return None
    return DOMAINS.get(source.removeprefix(PACKAGED).partition("-")[0])
