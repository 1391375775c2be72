"""A first stage whose decoder computes in integers, layer by layer or as one compiled graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backends.base import BACKENDS, Backend, get_backend
from ..backends.compiled import graph
from ..errors import BackendUnavailable
from ..models.first_stage import FirstStage, InDtype
from ..models.topology import weight_layers
from ..quant.layers import QuantizedLayer
from ..store.artifacts import Artifact
from ..store.digests import digest_of
from .compiled_graph import Tell, filled, made_graph, registered
from .denoiser import Denoiser, install


@dataclass(frozen=True)
class Decoded:
    """What a decoder returns, called as a denoiser is."""

    sample: Tensor


class AtOneStep(nn.Module):
    """A decoder called as a denoiser is, at a timestep that it does not read."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor, t: Tensor | None = None) -> Decoded:
        return Decoded(self.decoder(x))


class GraphDecoder(nn.Module):
    """A decoder whose calls run one compiled graph of `rows` images at least and at most.

    eager: what it was made of, which computes parts of another shape [c, h, w]: the tiles at the
    edges.
    """

    def __init__(
        self,
        run: graph.Graph,
        eager: nn.Module,
        shape: tuple[int, ...],
        rows: tuple[int, int],
    ):
        super().__init__()
        self.eager, self.shape, self.rows = eager, shape, rows
        self._run, self._tables = run, graph.Tables(eager).values

    def forward(self, x: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        if x.shape[1:] != self.shape:
            result: Tensor = self.eager(x)
            return result
        return torch.cat([self._part(part) for part in x.split(self.rows[1])])

    def _part(self, x: Tensor) -> Tensor:
        rows = len(x)
        if rows < self.rows[0]:
            x = filled(x)
        result: Tensor = self._run(x, torch.zeros(len(x)), self._tables[0], {})[:rows]
        return result


def with_integers(
    first_stage: FirstStage,
    artifact: Artifact,
    source: str,
    backend: str,
    dtype: torch.dtype = torch.float32,
) -> FirstStage:
    """The first stage with the artifact's decoder; the given one stays as it is.

    backend: a name; one that runs whole graphs of denoisers leaves the decoder to int8, or to
    simulate where there is none; dtype: of what stays unquantized. Raises ArtifactError,
    BackendUnavailable.
    """
    decoder = first_stage.decoder
    layers = weight_layers(decoder)
    replaced = [layers[name] for name in artifact.body["layers"] if name in layers]
    module = copy.deepcopy(decoder, {id(layer): layer for layer in replaced})
    for part in module.modules():
        if part not in replaced:
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    install(module, source, artifact, _backend_of(backend, first_stage))
    if dtype != torch.float32:
        module = InDtype(module, dtype)
    return first_stage.with_decoder(module)


def compiled(
    first_stage: FirstStage,
    digests: Mapping[str, str],
    latent_shape: tuple[int, ...],
    folder: Path,
    tell: Tell,
) -> FirstStage:
    """The first stage with its quantized decoder as a graph, from `folder` or made there; as it is,
    after a word, where that cannot be compiled.

    digests: of what its constants come from; latent_shape: [c, h, w], which becomes that of one
    tile where images are decoded in tiles.
    """
    decoder = first_stage.decoder
    step = next(m.step for m in decoder.modules() if isinstance(m, QuantizedLayer))
    shape = first_stage.decoded_shape(latent_shape[1:])
    rows = graph.BATCH_RANGE
    if first_stage.images_at_once(torch.Size((1, *shape))) == 1:  # filled up, it would take twice
        rows = (1, 1)
    eager = Denoiser(AtOneStep(decoder), step)
    floats = str(decoder.dtype) if isinstance(decoder, InDtype) else ""
    digests = {**digests, "shape": digest_of([*shape, *rows, floats])}
    layers = registered(eager, digests)
    example = torch.zeros(rows[0], *shape)

    def compile() -> bytes:
        return graph.compile_graph(eager.module, step, layers, (example, {}), batches=rows)

    saying = "compiling the decoder, once for this artifact and machine"
    try:
        run = made_graph(digests, folder, compile, tell, saying, "decoder")
    except BackendUnavailable as error:
        tell(f"{error.message}; it runs uncompiled, more slowly")
        return first_stage
    return first_stage.with_decoder(GraphDecoder(run, decoder, shape, rows))


def _backend_of(name: str, first_stage: FirstStage) -> Backend:
    """The backend that computes a decoder where that of the denoiser is so called."""
    device = first_stage.model.device
    found = get_backend(name, device)
    if not found.whole:
        return found
    inner = get_backend("simulate", device)
    integers = BACKENDS["int8"]
    return inner if integers.why_unavailable(device) else integers
