"""A denoiser compiled: made once per artifact and machine, kept on disk beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..backends.compiled import graph, native, ops
from ..backends.compiled.compiler import compiling
from ..errors import BackendUnavailable
from ..quant.layers import QuantizedLayer
from ..store import own_code
from ..store.digests import digest_of
from .denoiser import Denoiser

VERSION = 11
"""Version of what a graph contains and how it is called; another one compiles it anew."""
GRAPHS_FOLDER = "compiled"
"""Below the run directory. What lies there is machine code, which is run like the package itself:
only what this user has sealed (store/own_code.py)."""
Tell = Callable[[str], None]


class GraphDenoiser(Denoiser):
    """A denoiser whose calls run one compiled graph, which serves a range of batch sizes.

    A smaller batch is filled up by repeating its row, larger ones are cut into equal parts.
    """

    def __init__(self, eager: Denoiser, run: graph.Graph):
        super().__init__(eager.module, eager.step, eager.group_bounds)
        self._run = run
        self._tables = graph.Tables(eager.module).values

    def _predict(self, x: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        parts, size = [], math.ceil(len(x) / math.ceil(len(x) / graph.BATCH_RANGE[1]))
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            cut = {name: value[part] for name, value in condition.items()}
            parts.append(self._part(x[part], t[part], cut))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        rows = len(x)
        if rows < graph.BATCH_RANGE[0]:
            x, t = filled(x), filled(t)
            condition = {name: filled(value) for name, value in condition.items()}
        row = self._tables[self.step.group]
        return self._run(x, t.to(torch.float32), row, condition)[:rows]


def compile_denoiser(
    eager: Denoiser,
    digests: Mapping[str, str],
    example: tuple[Tensor, Mapping[str, Tensor]],
    folder: Path,
    tell: Tell,
) -> GraphDenoiser:
    """The denoiser as a compiled graph: from `folder`, else made there.

    digests: of what its constants come from; example: x [N, ...] and condition; tell hears when
    it is compiled. The module of `eager` must not be called elsewhere meanwhile.
    Raises BackendUnavailable where this model cannot be compiled on this machine, ArtifactError
    where nothing can be written.
    """
    layers = registered(eager, digests)
    x, condition = eager.in_own_dtype(*example)
    filled_example = filled(x), {name: filled(value) for name, value in condition.items()}

    def compile() -> bytes:
        return graph.compile_graph(eager.module, eager.step, layers, filled_example)

    tell_once = "compiling the denoiser, once for this artifact and machine"
    return GraphDenoiser(eager, made_graph(digests, folder, compile, tell, tell_once))


def registered(eager: Denoiser, digests: Mapping[str, str]) -> dict[str, QuantizedLayer]:
    """The quantized layers by the keys that graphs know them by."""
    key, modules = _key(digests), eager.module.named_modules()
    layers = {f"{key}:{n}": layer for n, layer in modules if isinstance(layer, QuantizedLayer)}
    ops.register(layers)
    return layers


def made_graph(
    digests: Mapping[str, str],
    folder: Path,
    compile: Callable[[], bytes],
    tell: Tell,
    saying: str,
    what: str = "denoiser",
) -> graph.Graph:
    """The graph of these digests: from the folder, else compiled, after `saying` is told. what: it
    is of, for errors.

    Raises BackendUnavailable, ArtifactError.
    """
    path = graph_path(folder, digests)
    with own_code.opened(path) as mine:
        if (mine is None or native.missing(folder)) and (why := graph.why_unavailable()):
            raise BackendUnavailable(f"the {what} cannot be compiled: {why}", "use --no-compile")
        if mine is not None:
            try:
                return _loaded(mine, folder, what)
            except BackendUnavailable as error:  # of other operators than ours
                if graph.why_unavailable():
                    raise
                tell(f"{error.message}: made again")
        elif path.exists():
            tell(f"{path}: damaged, or not compiled by you: made again")
    tell(saying)
    with compiling(folder):
        content = _compiled(compile, folder, what)
    with own_code.seal_and_open(path, content) as made:
        return _loaded(made, folder, what)


def _loaded(path: Path, folder: Path, what: str) -> graph.Graph:
    """The graph of a file. Raises BackendUnavailable, ArtifactError."""
    try:
        native.load(folder)
        return graph.load_graph(path)
    except (RuntimeError, OSError) as error:
        raise BackendUnavailable(
            f"the compiled {what} cannot be loaded: {first_line(error)}", "use --no-compile"
        ) from error


def _compiled(compile: Callable[[], bytes], folder: Path, what: str) -> bytes:
    """The graph's library. Raises BackendUnavailable."""
    try:
        native.load(folder)
        return compile()
    except Exception as error:  # whatever a tracer and a compiler can stumble over
        raise BackendUnavailable(
            f"the {what} cannot be compiled: {first_line(error)}", "use --no-compile"
        ) from error


def first_line(error: Exception) -> str:
    """What a library says of its failure, for a message of one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]


def has_graph(folder: Path, digests: Mapping[str, str]) -> bool:
    """Whether a graph is kept that can be used."""
    return own_code.is_sealed(graph_path(folder, digests))


def graph_path(folder: Path, digests: Mapping[str, str]) -> Path:
    """Where the graph is kept."""
    return folder / f"{_key(digests)}.graph"


def _key(digests: Mapping[str, str]) -> str:
    return digest_of({"version": VERSION, **digests, **native.machine()})


def filled(value: Tensor) -> Tensor:
    """The first row of a value, as many times as a graph needs at least."""
    return value[:1].expand(graph.BATCH_RANGE[0], *value.shape[1:]).contiguous()
