"""Text encoders whose linear layers are those of an artifact."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backends.base import AUTO, BACKENDS, Backend, get_backend
from ..models.text_encoders import OtherEncoders
from ..models.topology import replace_module, weight_layers
from ..store.artifacts import Artifact
from ..store.digests import digest_of
from .denoiser import install


class InPlace(nn.Module):
    """A quantized layer where its neighbours look at the weight of what was there.

    T5 brings an input to the type of the next weight, which codes must not be taken for.
    weight: empty, of the type of the layer's own.
    """

    weight: Tensor

    def __init__(self, layer: nn.Module, weight: Tensor):
        super().__init__()
        self.layer = layer
        self.register_buffer("weight", weight.detach().new_empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def install_encoders(module: nn.Module, artifact: Artifact, source: str, backend: Backend) -> None:
    """Put the artifact's layers in the place of the encoders' own, on the device of these.

    module: of all text encoders. Raises ArtifactError for layers that do not fit.
    """
    layers = weight_layers(module)
    install(module, source, artifact, backend)
    for name in artifact.body["layers"]:
        weight = layers[name].weight
        layer = module.get_submodule(name).to(weight.device)
        replace_module(module, name, InPlace(layer, weight))


def other_encoders(artifact: Artifact, source: str, backend: Backend) -> OtherEncoders:
    """What loading a model takes to encode its prompts by an artifact."""
    return OtherEncoders(
        digest_of([artifact.digest, backend.name]),
        lambda module: install_encoders(module, artifact, source, backend),
    )


def encoders_backend(wish: str, device: torch.device, before: str | None = None) -> Backend:
    """What computes the text encoders of a set that is drawn with such a backend.

    Where the wish leaves it open, what they were computed by before, or int8 where it can be had.
    Raises BackendUnavailable.
    """
    if wish in BACKENDS and not BACKENDS[wish].whole:
        return get_backend(wish, device)
    for name in (before, "int8"):
        known = BACKENDS.get(name or "")
        if known is not None and not known.why_unavailable(device):
            return known
    if wish != AUTO and wish not in BACKENDS:
        return get_backend(wish, device)  # which says that there is none of that name
    return BACKENDS["simulate"]
