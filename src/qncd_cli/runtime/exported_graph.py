"""The quantized denoiser as a graph of another runtime: written from the simulation, run there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.onednn import saturates
from ..backends.onnx import runtimes
from ..backends.onnx.runtimes import Session
from ..backends.onnx.signature import DenoiserSignature, Signature, own_signature
from ..errors import ArtifactError, BackendUnavailable
from ..models.loading import DiffusionModel
from ..store import own_code
from ..store.digests import digest_of
from ..store.files import replacing_folder
from .compiled_graph import Tell
from .denoiser import Denoiser

VERSION = 1
"""Version of what a kept graph contains and how it is called; another one exports it anew."""
EXAMPLE_ROWS = 2
"""Rows of the example that a graph is traced with; the graph takes any number."""


@dataclass(frozen=True)
class Target:
    """A format: what its graph is called, what it needs, and which form of layers it takes."""

    file: str
    packages: tuple[str, ...]
    form: str
    open: Callable[[Path], Session]


TARGETS = {
    "onnx": Target(
        "denoiser.onnx",
        ("onnx", "onnxscript", "onnxruntime"),
        "integer",
        runtimes.onnx_session,
    ),
    "openvino": Target("denoiser.xml", runtimes.FOR_OPENVINO, "fake", runtimes.openvino_session),
}
"""OpenVINO's graph is made from one in ONNX."""


class SessionDenoiser(Denoiser):
    """A denoiser whose calls run a graph, which takes and gives float32."""

    def __init__(self, eager: Denoiser, session: Session):
        super().__init__(eager.module, eager.step, eager.group_bounds)
        self._session = session
        self._dtype = torch.float32  # whatever the module has, of which nothing is called

    def _predict(self, x: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        return self._session.run({"sample": x, "timestep": t.to(torch.float32), **condition})


Example = tuple[Tensor, Mapping[str, Tensor]]
"""x [EXAMPLE_ROWS, ...] and its condition, float32 but for labels."""


def example_of(model: DiffusionModel) -> Example:
    """An example of what the model's graph is called with: zeros, class or prompt 0."""
    with torch.no_grad():
        condition = model.condition(torch.zeros(EXAMPLE_ROWS, dtype=torch.int64))
    return torch.zeros(EXAMPLE_ROWS, *model.latent_shape), in_float32(condition)


def in_float32(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Labels stay integers."""
    return {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}


def write_graph(
    denoiser: Denoiser,
    signature: DenoiserSignature,
    target: str,
    path: Path,
    asked: str,
    *,
    any_cpu: bool,
) -> None:
    """The graph of a simulated denoiser, in float32, which cannot compute any more afterwards.

    asked: the option that wants it, for messages; any_cpu: whether the graph is exact on CPUs
    without VNNI as well, with more products where weights are large. Raises BackendUnavailable
    where the model cannot be traced.
    """
    from ..backends.onnx import graph as onnx_graph
    from ..backends.onnx.layers import Form

    module = denoiser.module.float()
    parts = dict(module.named_modules())
    with _tracing(f"{asked}: the denoiser"):
        traced = onnx_graph.trace(module, denoiser.step, denoiser.group_bounds, signature)
    form = Form(TARGETS[target].form)
    _save(onnx_graph.spell_out(traced, parts, form, any_cpu=any_cpu), target, path)


def write_float_graph(
    module: nn.Module, signature: Signature, target: str, path: Path, what: str
) -> None:
    """The graph of a module without quantized layers, in its own precision.

    what: it is, for messages. Raises BackendUnavailable where it cannot be traced.
    """
    from ..backends.onnx import graph as onnx_graph

    with _tracing(what):
        traced = onnx_graph.trace_float(module, signature)
    _save(traced, target, path)


@contextmanager
def _tracing(what: str) -> Iterator[None]:
    """Whatever a tracer can stumble over is one line."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BackendUnavailable(f"{what} cannot be traced: {reason[:160]}") from error


def _save(graph: Any, target: str, path: Path) -> None:
    from ..backends.onnx import graph as onnx_graph

    if target == "onnx":
        onnx_graph.save(graph, path)
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as between:
        source = Path(between) / "denoiser.onnx"
        onnx_graph.save(graph, source)
        runtimes.onnx_to_openvino(source, path)


def in_openvino(
    simulated: Denoiser,
    digests: Mapping[str, str],
    example: Example,
    folder: Path,
    dtype: torch.dtype,
    tell: Tell,
) -> SessionDenoiser:
    """The denoiser run by OpenVINO: its graph from `folder`, else exported there.

    simulated: the simulated denoiser, not usable afterwards; digests: of what it was made from;
    dtype: of what stays unquantized; tell: hears when it is exported. Raises BackendUnavailable
    where it cannot be, ArtifactError for a damaged graph.
    """
    path = openvino_graph(folder, digests)
    place = path.parent
    if not has_openvino(folder, digests):
        if place.exists():
            tell(f"{place}: damaged, or not exported by you: made again")
        tell("exporting the denoiser to OpenVINO, once for this artifact")
        with replacing_folder(place) as made:
            signature = own_signature(*example)
            write_graph(
                simulated,
                signature,
                "openvino",
                made / path.name,
                "--backend openvino",
                any_cpu=saturates(),
            )
        own_code.seal_folder(place)
    try:
        session = runtimes.openvino_session(path, dtype)
    except RuntimeError as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ArtifactError(
            f"{path}: cannot be loaded ({reason[:120]})", f"delete {place} and repeat"
        ) from error
    return SessionDenoiser(simulated, session)


def has_openvino(folder: Path, digests: Mapping[str, str]) -> bool:
    """Whether a graph is kept that this user has exported, as it was."""
    return own_code.is_sealed_folder(openvino_graph(folder, digests).parent)


def openvino_graph(folder: Path, digests: Mapping[str, str]) -> Path:
    """Where the graph is kept, in a folder of its own."""
    cpu = {"any_cpu": True} if saturates() else {}
    key = digest_of({"version": VERSION, **digests, **cpu, "torch": torch.__version__})
    return folder / f"{key}_openvino" / TARGETS["openvino"].file
