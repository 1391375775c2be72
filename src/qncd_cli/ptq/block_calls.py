"""Recorded calls of the denoiser's blocks: their arguments and results, kept on disk.

A block may take any arguments: tensors whose first dimension is the batch are kept row by row,
everything else (flags, None, tensors without a batch) once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..config.schema import Config
from ..models.loading import DiffusionModel
from ..progress import Track, no_progress
from ..runtime.denoiser import Denoiser, guided_predict
from ..store.artifacts import Artifact


class CalibrationRows:
    """Some rows of the calibration inputs, in batches of one timestep each.

    A row gives one sample to every block, or two where guidance adds the null class.
    timestep [K] and held_out [K] (bool) are those of the samples, in the order of the batches.
    """

    def __init__(self, config: Config, model: DiffusionModel, calibration: Artifact, most: int):
        self.config, self.model = config, model
        self.inputs = {
            name: calibration.tensors[f"inputs.{name}"]
            for name in ("x", "timestep", "class", "seed")
        }
        self.samples_per_row = 2 if model.guides(config.sampling.guidance_scale) else 1
        self.batches = self._choose(most)
        copies = self.samples_per_row
        order = torch.cat([rows.repeat(copies) for rows in self.batches])
        self.timestep = self.inputs["timestep"][order]
        self.held_out = self._is_held_out()[order]
        if self.held_out.all() or not self.held_out.any():
            self.held_out = torch.arange(len(order)) % 4 == 3

    def _choose(self, most: int) -> list[Tensor]:
        """Rows by timestep, as many of each, drawn by a generator seeded with calibration.seed."""
        generator = torch.Generator().manual_seed(self.config.calibration.seed)
        timestep = self.inputs["timestep"]
        times = sorted(set(timestep.tolist()), reverse=True)
        each = -(-most // len(times))
        batches: list[Tensor] = []
        for t in times:
            rows = (timestep == t).nonzero().flatten()
            drawn = rows[torch.randperm(len(rows), generator=generator)[:each]]
            batches += drawn.split(self.config.calibration.batch_size)
        return batches

    def _is_held_out(self) -> Tensor:
        """Every fourth trajectory, [R]: rows of one trajectory are much alike."""
        seeds = sorted(set(self.inputs["seed"].tolist()))
        return torch.isin(self.inputs["seed"], torch.tensor(seeds[3::4], dtype=torch.int64))

    def __len__(self) -> int:
        """Number of samples K."""
        return len(self.timestep)

    def run(self, denoiser: Denoiser, batches: list[Tensor] | None = None) -> Iterator[int]:
        """Call the denoiser on every batch; yields the number of samples before each call."""
        for rows in self.batches if batches is None else batches:
            predict = guided_predict(
                self.model,
                denoiser,
                self.inputs["class"][rows],
                self.config.sampling.guidance_scale,
            )
            yield self.samples_per_row * len(rows)
            with _until_recorded():
                predict(self.inputs["x"][rows], self.inputs["timestep"][rows[0]])


class BlockCalls:
    """The arguments of a block and what it returned, for K samples.

    Tensors lie in memory-mapped files in `folder`, floats in the type in which they came; what is
    read back is float32. Raises ValueError if calls differ in more than their rows.
    """

    _names = itertools.count()

    def __init__(self, folder: Path, samples: int):
        self.folder, self.samples = folder, samples
        self.columns: dict[str, Tensor] = {}
        self.spec: pytree.TreeSpec | None = None
        self.constants: dict[int, Any] = {}
        self._files: list[Path] = []

    def put_arguments(self, start: int, batch: int, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keep the arguments of `batch` samples, from number `start` on."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if self.spec is None:
            self.spec = spec
            self.constants = {i: v for i, v in enumerate(leaves) if not _has_rows(v, batch)}
        if spec != self.spec:
            raise ValueError("a block is not always called with the same arguments")
        for i, leaf in enumerate(leaves):
            if i not in self.constants and _has_rows(leaf, batch):
                self._put(f"argument {i}", start, leaf)
            elif i not in self.constants or not _same(leaf, self.constants[i]):
                raise ValueError("a block is not always called with the same arguments")

    def put_output(self, start: int, output: Tensor) -> None:
        self._put("output", start, output)

    def _put(self, name: str, start: int, value: Tensor) -> None:
        if name not in self.columns:
            path = self.folder / f"{next(self._names)}.bin"
            shape = (self.samples, *value.shape[1:])
            size = torch.Size(shape).numel()
            flat = torch.from_file(str(path), shared=True, size=size, dtype=value.dtype)
            self.columns[name] = flat.reshape(shape)
            self._files.append(path)
        self.columns[name][start : start + len(value)] = value.detach().cpu()

    def arguments(
        self, samples: Tensor, device: torch.device
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """args and kwargs of a call with these samples (indices)."""
        assert self.spec is not None, "no call was recorded"
        leaves = []
        for i in range(self.spec.num_leaves):
            if i in self.constants:
                leaves.append(_float32(self.constants[i]))
            else:
                leaves.append(_read(self.columns[f"argument {i}"], samples, device))
        return pytree.tree_unflatten(leaves, self.spec)

    def output(self, samples: Tensor, device: torch.device) -> Tensor:
        return _read(self.columns["output"], samples, device)

    def delete(self) -> None:
        """Give the disk back before the whole folder goes."""
        self.columns.clear()
        for path in self._files:
            path.unlink(missing_ok=True)


def _has_rows(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == batch


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)


def _read(column: Tensor, samples: Tensor, device: torch.device) -> Tensor:
    return _float32(column[samples].to(device))


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class _AllRecorded(Exception):
    """Nothing behind the last recorded block has to be computed."""


@contextmanager
def _until_recorded() -> Iterator[None]:
    try:
        yield
    except _AllRecorded:
        return


def record(
    rows: CalibrationRows,
    denoiser: Denoiser,
    names: Iterable[str],
    folder: Path,
    *,
    arguments: bool,
    output: bool,
    batches: list[Tensor] | None = None,
    track: Track = no_progress,
) -> dict[str, BlockCalls]:
    """Calls of the named blocks on the rows (or on these batches), in the order of execution.

    The denoiser runs no further than to the last of them. A block that runs more than once in a
    call is recorded the first time; one that does not run is left out.
    """
    chosen = rows.batches if batches is None else batches
    samples = rows.samples_per_row * sum(len(b) for b in chosen)
    wanted = set(names)
    calls: dict[str, BlockCalls] = {}
    done: set[str] = set()
    start = batch = 0

    def before(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        if name in done:
            return
        block = calls.setdefault(name, BlockCalls(folder, samples))
        if arguments:
            block.put_arguments(start, batch, args, kwargs)
        if not output:
            finished(name)

    def after(name: str, value: Tensor) -> None:
        if output and name not in done:
            calls[name].put_output(start, value)
            finished(name)

    def finished(name: str) -> None:
        done.add(name)
        if done == wanted:
            raise _AllRecorded

    with _hooks(denoiser, wanted, before, after):
        sizes = rows.run(denoiser, chosen)
        for size in track(sizes, "recording blocks", len(chosen), "calls"):
            start, batch = start + batch, size
            done.clear()
    return calls


@contextmanager
def _hooks(denoiser: Denoiser, names: set[str], before: Any, after: Any) -> Iterator[None]:
    """before(name, args, kwargs) and after(name, output) around each call of the named blocks."""
    handles = []
    try:
        for name in sorted(names):
            module = denoiser.module.get_submodule(name)

            def enter(module, args, kwargs, name=name):
                before(name, args, kwargs)

            def leave(module, args, output, name=name):
                after(name, output)

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()
