"""The sampled model: at full precision or quantized, and what computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends.base import Backend, get_backend
from ..models.image_size import Sides, said
from ..models.loading import DiffusionModel
from ..models.lora import attach
from ..quant.layers import QuantizedLayer
from ..store import artifacts
from ..store.artifacts import Artifact
from .denoiser import Denoiser, full_denoiser, quantized_denoiser
from .reuse import reusing_denoiser


@dataclass(frozen=True)
class SampledModel:
    """A model to draw samples from: the denoiser, and the digests of what it was made from.

    noise_stats: needed by every correction that uses statistics; backend: computes the quantized
    layers. None for full precision. compiled: whether the denoiser is one compiled graph. reuse:
    the plan by which it leaves work out, with its terms. decode: makes images of latents, None for
    the model's own. encoded_by: the name of what computes quantized text encoders. size, dtype: as
    the model has them.
    """

    kind: str  # "quantized" or "full"
    denoiser: Denoiser
    digests: dict[str, str]
    noise_stats: Artifact | None = None
    backend: Backend | None = None
    compiled: bool = False
    reuse: Artifact | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    encoded_by: str | None = None
    size: Sides | None = None
    dtype: torch.dtype = torch.float32

    @classmethod
    def full_precision(cls, model: DiffusionModel) -> SampledModel:
        attach(model.denoiser, model.branches)
        digests = {"model": model.digest}
        return cls("full", full_denoiser(model), digests, size=model.size, dtype=model.dtype)

    @classmethod
    def quantized(
        cls,
        model: DiffusionModel,
        artifact: Artifact,
        noise_stats: Artifact,
        backend: str = "simulate",
        *,
        low_memory: bool = False,
        in_place: bool = False,
    ) -> SampledModel:
        """backend: a name or auto; low_memory, in_place: as `quantized_denoiser` has them.

        Raises BackendUnavailable, and ArtifactError where artifact, noise statistics and model do
        not belong together.
        """
        artifacts.check_lineage(artifact, model=model.digest)
        parents = {"quantized": artifact.digest}
        artifacts.check_lineage(noise_stats, model=model.digest, parents=parents)
        found = get_backend(backend, model.device)
        denoiser = quantized_denoiser(
            model,
            artifact,
            found.name,
            artifact.body["cache_time_embeddings"],
            low_memory=low_memory,
            in_place=in_place,
        )
        attach(denoiser.module, model.branches)
        digests = {"model": model.digest, **parents}
        return cls(
            "quantized", denoiser, digests, noise_stats, found, size=model.size, dtype=model.dtype
        )

    @property
    def graph_digests(self) -> dict[str, str]:
        """What a graph of the denoiser is made from, the plan of reuse aside: digests, and what is
        fixed in it: the size of images where that is not the model's own, and the type of what
        stays unquantized where that is not float32."""
        aside = ("reuse", "first_stage", "text_encoders")
        digests = {name: digest for name, digest in self.digests.items() if name not in aside}
        if self.size is not None:
            digests["size"] = said(self.size)
        if self.dtype != torch.float32:
            digests["dtype"] = str(self.dtype)
        return digests

    def reusing(self, plan: Artifact) -> SampledModel:
        """The same, leaving out work by a plan that was made for it. Raises ArtifactError."""
        model, quantized = (self.digests[name] for name in ("model", "quantized"))
        artifacts.check_lineage(plan, model=model, parents={"quantized": quantized})
        denoiser = reusing_denoiser(self.denoiser, plan)
        return replace(
            self, denoiser=denoiser, digests={**self.digests, "reuse": plan.digest}, reuse=plan
        )

    def decoding(self, decode: Callable[[Tensor], Tensor], artifact: Artifact) -> SampledModel:
        """The same, with images made by the decoder of an artifact."""
        digests = {**self.digests, "first_stage": artifact.digest}
        return replace(self, decode=decode, digests=digests)

    def encoding(self, artifact: Artifact, backend: Backend) -> SampledModel:
        """The same, of a model whose prompts are encoded by an artifact. Raises ArtifactError."""
        artifacts.check_lineage(artifact, model=self.digests["model"])
        digests = {**self.digests, "text_encoders": artifact.digest}
        return replace(self, digests=digests, encoded_by=backend.name)

    def fallbacks(self) -> dict[str, str]:
        """Quantized layers that the backend leaves to the simulation, with the reason."""
        if self.backend is None:
            return {}
        layers = self.denoiser.module.named_modules()
        reasons = {n: self.backend.why_not(m) for n, m in layers if isinstance(m, QuantizedLayer)}
        return {name: reason for name, reason in reasons.items() if reason}
