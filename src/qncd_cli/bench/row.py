"""A row of the benchmark, and what it takes alone in a process of its own.

Time is compared in one process, where all rows meet the same noise of the machine; memory cannot
be: what a row holds shows in a process that holds nothing else.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..backends.base import BACKENDS
from ..backends.compiled import graph
from ..backends.compiled.graph import silence_compiler
from ..errors import ConfigError, QncdError
from ..models.denoiser_folder import load_denoiser
from ..models.loading import DTYPES
from ..quant.layers import StepState
from ..resident import forget_peak, peak_resident, resident
from ..runtime.compiled_graph import compile_denoiser
from ..runtime.denoiser import Denoiser, with_artifact
from ..runtime.exported_graph import EXAMPLE_ROWS, in_float32, in_openvino
from ..spec import FLOAT_BITS, Widths
from ..store import artifacts

FLOAT_ROWS = tuple(f"{d}-{how}" for d in ("float32", "bfloat16") for how in ("eager", "compiled"))
BASELINE = FLOAT_ROWS[0]
_EXAMPLES = ("w8a8", "w4a8", "w4a6", "w4a4")
_QUANTIZED_ROWS = (
    *(
        f"{name}-{w}"
        for name, backend in BACKENDS.items()
        if not backend.by_name
        for w in _EXAMPLES
    ),
    *(f"int8-{w}{dtype}-compiled" for w in _EXAMPLES for dtype in ("", "-bfloat16")),
)
FACTS = ("load_seconds", "prepare_seconds", "peak_bytes", "running_bytes")


@dataclass(frozen=True)
class Row:
    """name: as asked for; dtype: of the model, or of what stays unquantized.

    arithmetic: of its products, which the roofline compares it with (simulate computes in
    float32); backend and widths (weights, activations): of quantized rows.
    """

    name: str
    dtype: str
    arithmetic: str
    compiled: bool = False
    backend: str | None = None
    widths: Widths | None = None

    @property
    def channels_last(self) -> bool:
        """Whether the layers' weights are laid out so; the baseline is as diffusers loads it."""
        return self.backend is None and self.name != BASELINE

    def why_unavailable(self) -> str:
        """Why the row cannot be measured on this machine; empty where it can."""
        why = ""
        if self.backend is not None:
            why = BACKENDS[self.backend].why_unavailable(torch.device("cpu"))
        return why or (graph.why_unavailable() if self.compiled else "")


def parse_rows(names: Sequence[str], dtype: str = "float32") -> list[Row]:
    """Each row once. dtype: of what stays unquantized. Raises ConfigError with the nearest name."""
    if not names:
        raise ConfigError("--rows: no row is named", f"known: {_known()}")
    return [_parse(name, dtype) for name in dict.fromkeys(names)]


def _parse(name: str, dtype: str) -> Row:
    if name in FLOAT_ROWS:
        kind, _, how = name.partition("-")
        return Row(name, kind, kind, how == "compiled")
    backend, *parts = name.split("-")
    widths, variant = _integer_widths(parts[0] if parts else ""), parts[1:]
    compiled = "compiled" in variant
    known = variant in ([], ["bfloat16"], ["compiled"], ["bfloat16", "compiled"])
    if backend in BACKENDS and widths and known and (backend == "int8" or not compiled):
        arithmetic = "float32" if backend == "simulate" else "int8"
        kind = "bfloat16" if "bfloat16" in variant else dtype
        return Row(name, kind, arithmetic, compiled, backend, widths)
    close = difflib.get_close_matches(name, [*FLOAT_ROWS, *_QUANTIZED_ROWS], n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {_known()}"
    raise ConfigError(f"--rows {name}: unknown row", hint)


def _integer_widths(text: str) -> Widths | None:
    """Widths as a row names them: without floating point, in small letters."""
    try:
        widths = Widths.parse(text)
    except ValueError:
        return None
    return widths if str(widths) == text and FLOAT_BITS not in widths else None


def _known() -> str:
    names = (name for name, backend in BACKENDS.items() if not backend.by_name)
    backends = (f"{name}-w4a8 and other widths of 2 to 8 bits" for name in names)
    return ", ".join([*FLOAT_ROWS, *backends, "int8-w4a8[-bfloat16]-compiled"])


@dataclass(frozen=True)
class Inputs:
    """Inputs of one call of the denoiser."""

    x: Tensor
    timestep: float
    condition: dict[str, Tensor]

    def call(self, denoiser: Denoiser) -> Callable[[], Tensor]:
        return lambda: denoiser(self.x, self.timestep, self.condition)

    def save(self, path: Path) -> None:
        torch.save({"x": self.x, "timestep": self.timestep, "condition": self.condition}, path)

    @classmethod
    def load(cls, path: Path) -> Inputs:
        return cls(**torch.load(path, weights_only=True))


@dataclass(frozen=True)
class Guest:
    """A row that another tool computes, prepared by prepare(denoiser float32, inputs, an empty
    folder) -> its call."""

    row: Row
    prepare: Callable[[nn.Module, Inputs, Path], Callable[[], Any]]


def build(
    row: Row, module: nn.Module, artifact: artifacts.Artifact | None, cached: bool
) -> Denoiser:
    """The row's denoiser. module: full precision in row.dtype; a float row may lay it out anew.

    artifact: of a quantized row; cached: whether its time embeddings are.
    """
    if row.backend is not None:
        assert artifact is not None
        return with_artifact(module, "the model", artifact, row.backend, cached)
    if row.channels_last:
        module = cast(nn.Module, module.to(memory_format=torch.channels_last))  # type: ignore
    if row.compiled:
        module = cast(nn.Module, torch.compile(module, dynamic=False))
    return Denoiser(module, StepState())


def with_graph(row: Row, denoiser: Denoiser, inputs: Inputs, folder: Path) -> Denoiser:
    """The denoiser run by its graph, kept in the folder; unchanged for rows without a graph."""
    if row.backend is not None and BACKENDS[row.backend].whole:
        rows = in_float32({"x": inputs.x, **inputs.condition})
        two = {n: v[:1].expand(EXAMPLE_ROWS, *v.shape[1:]) for n, v in rows.items()}
        digests, dtype = {"row": row.name}, DTYPES[row.dtype]
        return in_openvino(denoiser, digests, (two.pop("x"), two), folder, dtype, _silent)
    if row.backend is None or not row.compiled:
        return denoiser
    digests = {"row": row.name}
    return compile_denoiser(denoiser, digests, (inputs.x, inputs.condition), folder, _silent)


def _silent(line: str) -> None:
    return None


# ------------------------------------------------------------------ alone


@dataclass(frozen=True)
class Alone:
    """What measure_alone needs, small enough to be sent to another process.

    weights: folder of the denoiser in row.dtype; artifact: of a quantized row; graphs: folder of
    what is compiled.
    """

    row: Row
    weights: Path
    artifact: Path | None
    inputs: Path
    graphs: Path
    cached: bool
    threads: int


def measure_alone(job: Alone) -> dict[str, Any]:
    """Load, prepare and call one row; to be run in a process that has done nothing else.

    load_seconds: from the files to a denoiser; prepare_seconds: what its first call takes over
    the second one (compiling, packing weights); peak_bytes: growth of the resident set up to its
    highest point; running_bytes: the same once everything is prepared, during a call. Bytes are
    None where the system does not tell them. Where the row fails: why, and nothing else.
    """
    torch.set_num_threads(job.threads)
    silence_compiler()
    try:
        return _measure(job)
    except QncdError as error:
        return {"why": str(error)}
    except Exception as error:  # a row that fails in whatever way must not take the others along
        return {"why": reason(error)}


def _measure(job: Alone) -> dict[str, Any]:
    inputs = Inputs.load(job.inputs)
    before = resident() if forget_peak() else None
    seconds = [time.perf_counter()]
    module = load_denoiser(job.weights, DTYPES[job.row.dtype])
    artifact = None if job.artifact is None else artifacts.read(job.artifact, "quantized")
    denoiser = build(job.row, module, artifact, job.cached)
    seconds.append(time.perf_counter())
    call = inputs.call(with_graph(job.row, denoiser, inputs, job.graphs))
    for _ in range(2):
        call()
        seconds.append(time.perf_counter())
    peak = peak_resident()
    running = None
    if forget_peak():
        call()
        running = peak_resident()
    load, first, second = (b - a for a, b in zip(seconds, seconds[1:], strict=False))
    ends = (peak, running)
    grown = [None if before is None or end is None else end - before for end in ends]
    return dict(zip(FACTS, (load, max(0.0, first - second), *grown), strict=True))


def reason(error: Exception) -> str:
    """An unforeseen error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
