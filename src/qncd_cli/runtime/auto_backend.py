"""Which backend `auto` takes: those that can be tried cheaply are timed once, the fastest is
remembered.

Tried are the backends that compute layer by layer, by swapping what the layers of one denoiser
compute with; and one that runs a whole graph, where an earlier run has left its graph (making one
takes minutes). Where the denoiser is compiled, layer by layer nothing is tried beside it: that is
slower. Trying costs a few calls of a few rows; where little more than that is ahead nothing is
timed, and what is remembered holds, or the order of the backends.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..backends.base import AUTO, BACKENDS, Backend
from ..errors import ArtifactError, BackendUnavailable
from ..machine import described
from ..models.loading import DiffusionModel
from ..quant.layers import QuantizedLayer
from ..store.digests import digest_of
from ..store.files import read_json, write_json
from .compiled_graph import Tell
from .denoiser import compute_with
from .exported_graph import has_openvino, in_float32, in_openvino
from .sampled_model import SampledModel

FILE = "backend.json"
"""Beside the graphs. Whatever in it cannot be read is measured again."""
TIMED_ROWS = 8
"""Rows of a timed call; more take longer and do not change which backend is fastest."""
TIMED_CALLS = 2
"""Timed calls of each candidate, the shortest of which counts; one before them warms up."""
WORTH_TIMING = 2000
"""Calls of that size that must lie ahead for backends to be timed; larger: timed less often.

Trying two takes as long as some 20 calls (in small batches a row is dearer): one or two percent
of the work, once.
"""


@dataclass(frozen=True)
class BackendCache:
    """Where a choice is remembered, and what it holds for: digests of what is computed with.

    graphs: whether the graphs of other runtimes that earlier runs have left are tried as well.
    """

    folder: Path
    digests: Mapping[str, str]
    low_memory: bool = False
    graphs: bool = True

    def remembered(self, names: Sequence[str]) -> dict[str, float] | None:
        """Seconds a call of just these candidates on this machine, None where they are unknown."""
        entry = self._entries().get(self._key(names))
        seconds = entry.get("seconds") if isinstance(entry, dict) else None
        if not isinstance(seconds, dict) or set(seconds) != set(names):
            return None
        sound = all(isinstance(s, float) and s > 0 for s in seconds.values())
        return seconds if sound else None

    def remember(self, seconds: dict[str, float]) -> None:
        entry = {**self._holds_for(list(seconds)), "seconds": seconds, "chosen": fastest(seconds)}
        write_json(self.folder / FILE, {**self._entries(), self._key(list(seconds)): entry})

    def _entries(self) -> dict[str, Any]:
        try:
            found = read_json(self.folder / FILE, "qncd sample")
        except ArtifactError:
            return {}
        return found if isinstance(found, dict) else {}

    def _holds_for(self, names: Sequence[str]) -> dict[str, Any]:
        return {
            "candidates": sorted(names),
            "digests": dict(self.digests),
            "low_memory": self.low_memory,
            "machine": described(),
        }

    def _key(self, names: Sequence[str]) -> str:
        return digest_of(self._holds_for(names))


def fastest(seconds: Mapping[str, float]) -> str:
    return min(seconds, key=lambda name: seconds[name])


def backend_of_set(
    asked: str, manifest: Mapping[str, Any] | None, device: torch.device, *, low_memory: bool
) -> str:
    """The backend for a set that may have begun: with auto the one that it began with.

    asked: a name or auto; manifest: of the set, None for a new one. A backend that cannot be used
    here, or not with little memory, is not gone on with.
    """
    begun = BACKENDS.get(str((manifest or {}).get("backend")))
    if asked != AUTO or begun is None or begun.why_unavailable(device):
        return asked
    return asked if begun.whole and low_memory else begun.name


def backend_of_table(cache: BackendCache, device: torch.device) -> str:
    """auto, or the backend that is remembered for all rows of a table."""
    seconds = cache.remembered([backend.name for backend in _layer_by_layer(device)])
    return AUTO if seconds is None else fastest(seconds)


def choose_backend(
    model: DiffusionModel,
    sampled: SampledModel,
    cache: BackendCache,
    folder: Path,
    tell: Tell,
    *,
    batch: int,
    ahead: int,
) -> SampledModel:
    """The model, compiled or not, on the backend that is fastest here; its remark says why.

    folder: of graphs; tell: hears what could not be tried; batch: rows of a call; ahead: of all
    calls that will be made. Where only one backend can be tried, the model comes back as it is.
    """
    candidates = _Candidates(model, sampled, folder, tell)
    names = candidates.names(graphs=cache.graphs)
    if len(names) < 2:
        return sampled
    seconds = cache.remembered(names)
    why = "the fastest as measured before"
    if seconds is None:
        rows = min(TIMED_ROWS, batch)
        if ahead < WORTH_TIMING * rows:
            return _with_remark(sampled, "the first available, too little work to time others")
        seconds = candidates.measure(names, rows)
        cache.remember(seconds)
        why = "the fastest of those tried"
    figures = ", ".join(f"{name} {value:.3g}" for name, value in seconds.items())
    found = candidates.on(fastest(seconds))
    return _with_remark(found, f"{why} (seconds a call: {figures})")


def _with_remark(sampled: SampledModel, why: str) -> SampledModel:
    assert sampled.backend is not None
    remark = f"{sampled.backend.remark}; {why}"
    return replace(sampled, backend=replace(sampled.backend, remark=remark))


# ------------------------------------------------------------------ candidates

_COMPILED = " compiled"


def _layer_by_layer(device: torch.device) -> list[Backend]:
    found = (b for b in BACKENDS.values() if not b.whole and not b.by_name)
    return [backend for backend in found if not backend.why_unavailable(device)]


@dataclass(frozen=True)
class _Candidates:
    """What a quantized model can be computed by. folder: of graphs."""

    model: DiffusionModel
    sampled: SampledModel
    folder: Path
    tell: Tell

    def names(self, *, graphs: bool) -> list[str]:
        """What can be tried, the model's own backend first; none for full precision.

        graphs: whether graphs of other runtimes that earlier runs have left are tried as well.
        """
        sampled = self.sampled
        if sampled.backend is None:
            return []
        names = [sampled.backend.name + _COMPILED * sampled.compiled]
        if not sampled.compiled:
            found = [backend.name for backend in _layer_by_layer(self.model.device)]
            names += [name for name in found if name not in names]
        graph = BACKENDS["openvino"]
        kept = graphs and has_openvino(self.folder, sampled.graph_digests)
        if kept and not graph.why_unavailable(self.model.device):
            names.append(graph.name)
        return names

    def on(self, name: str) -> SampledModel:
        """The model computed by a candidate.

        The layers of its denoiser are switched, unless they are not what is called.
        """
        sampled, backend = self.sampled, BACKENDS[name.removesuffix(_COMPILED)]
        if backend.whole:
            inputs = _inputs(self.model, 1)
            denoiser = in_openvino(
                sampled.denoiser,
                sampled.graph_digests,
                (inputs[0], inputs[2]),
                self.folder,
                self.model.dtype,
                self.tell,
            )
            return replace(sampled, denoiser=denoiser, backend=backend, compiled=False)
        if sampled.backend is not None and backend.name == sampled.backend.name:
            backend = sampled.backend  # which may have more to say
        compute_with(sampled.denoiser.module, backend)
        return replace(sampled, backend=backend)

    def measure(self, names: Sequence[str], rows: int) -> dict[str, float]:
        """Seconds of a call of so many rows, by candidate; one that fails is left out.

        What the layers keep for a slower candidate is freed.
        """
        inputs, seconds = _inputs(self.model, rows), {}
        for name in names:
            try:
                seconds[name] = _seconds(self.on(name), inputs)
            except (ArtifactError, BackendUnavailable) as error:
                self.tell(f"{name} was not tried: {error.message}")
        for name in seconds:
            backend = BACKENDS[name.removesuffix(_COMPILED)]
            if name != fastest(seconds) and not backend.whole:
                _forget(self.sampled, backend)
        return seconds


# ------------------------------------------------------------------ timing


def _inputs(model: DiffusionModel, rows: int) -> tuple[Any, Any, Any]:
    """x, t and condition of a call, of noise; float32 but for labels."""
    x = torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        condition = model.condition(torch.zeros(rows, dtype=torch.int64))
    return x, torch.tensor(0), in_float32(condition)


def _seconds(sampled: SampledModel, inputs: tuple[Any, Any, Any]) -> float:
    times = []
    for _ in range(1 + TIMED_CALLS):
        start = time.perf_counter()
        sampled.denoiser(*inputs)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _forget(sampled: SampledModel, backend: Backend) -> None:
    for layer in sampled.denoiser.module.modules():
        if isinstance(layer, QuantizedLayer):
            backend.forget(layer)
