"""Whether metrics.json and the report still say what eval would measure now; without torch.

Everything that a number depends on is digested when they are written, and again before the next
measurement: options, model, quantized model, coverage, both sample sets with their images, the
reference's files, the network's weights.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import ArtifactError
from ..metrics.image_files import digest_of_files, image_paths
from ..store.artifact_files import read_stored
from ..store.digests import digest_of
from ..store.file_stamps import remembered
from ..store.files import read_json, write_json
from ..store.run_dir import RunDir
from . import sample_sets

KEY = "eval"
"""In settings.json, beside the stages that make artifacts: by the name of the sample set."""


@dataclass(frozen=True)
class Measurement:
    """What eval was asked for, and what it writes.

    name: of the sample set; wanted: metrics; wishes: eval's other options and the configuration;
    model: its digest; weights: the file of a feature network, None for the usual ones; insists:
    whether what could not be had is asked for by name, so that it is tried again; shown: files of
    other commands that the report shows.
    """

    run: RunDir
    name: str
    wanted: tuple[str, ...]
    wishes: Mapping[str, Any]
    model: str
    reference: str | None
    weights: Path | None
    insists: bool
    metrics: Path
    report: Path
    pairs: Path
    shown: Sequence[Path] = ()

    def still_holds(self) -> dict[str, Any] | None:
        """metrics.json where it and the report are what eval wrote last, and hold every metric that
        is wanted, measured from these very inputs by whatever call."""
        try:
            noted = read_json(self.run.settings, "qncd eval")[KEY][self.name]
            metrics = read_json(self.metrics, "qncd eval")
            full = Path(metrics["protocol"]["full"])
            lacking = {*self.wanted} - {*metrics["protocol"]["metrics"]}
            left_out = {*metrics["protocol"]["left_out"]}
            if self.insists and (lacking or "distance" in left_out):
                return None
            known = {*noted["inputs"].get(self._inputs(full), ())}
            good = noted["outputs"] == self._outputs() and known >= {*self.wanted}
        except (ArtifactError, AttributeError, KeyError, TypeError):
            return None
        return metrics if good and lacking <= left_out else None

    def note(self, full: Path, *, grew: bool) -> None:
        """After eval has written.

        full: the folder of the full-precision samples; grew: whether what earlier calls measured is
        still in metrics.json. Their inputs then stay noted, each with the metrics it was for.
        """
        try:
            known = read_json(self.run.settings, "qncd eval")
        except ArtifactError:
            known = {}
        before = known.get(KEY, {}).get(self.name, {}).get("inputs") if grew else None
        held = before if isinstance(before, dict) else {}
        now = self._inputs(full)
        inputs = {**held, now: sorted({*held.get(now, ()), *self.wanted})}
        noted = {"inputs": inputs, "outputs": self._outputs()}
        sets = {**known.get(KEY, {}), self.name: noted}
        write_json(self.run.settings, {**known, KEY: sets})

    def _outputs(self) -> str:
        return digest_of_files([self.metrics, self.report, self.pairs])

    def _inputs(self, full: Path) -> str:
        return digest_of(
            {
                "version": __version__,
                "wishes": dict(self.wishes),
                "model": self.model,
                "quantized": read_stored(self.run.tensors("quantized"), "quantized").digest,
                "coverage": digest_of_files([self.run.coverage]),
                "sets": [_set(folder) for folder in (self.run.samples(self.name), full)],
                "reference": _files(self.reference),
                "weights": None if self.weights is None else _weights(self.weights),
                "downloaded": _downloaded(),
                "shown": digest_of_files(self.shown),
            }
        )


def _set(folder: Path) -> dict[str, str]:
    """Digests of a set's manifest, latents and images."""
    manifest = sample_sets.begun(folder) or {}
    images = [sample_sets.image_path(folder, seed) for seed in manifest.get("seeds", ())]
    return {
        "manifest": digest_of(manifest),
        "latents": read_stored(folder / sample_sets.LATENTS, "latents").digest,
        "images": digest_of_files(images),
    }


def _files(reference: str | None) -> str | None:
    """Digest of a reference on disk; the packaged one belongs to the version."""
    if reference is None or not os.path.exists(reference):
        return None
    path = Path(reference)
    return digest_of_files(image_paths(path) if path.is_dir() else [path])


def _weights(path: Path) -> str | None:
    def compute() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return remembered("weights", [path], compute) if path.is_file() else None


def _downloaded() -> list[str]:
    """What torch.hub has downloaded: Inception's weights may be among it by now."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = os.environ.get("TORCH_HOME") or os.path.join(cache, "torch")
    return sorted(path.name for path in Path(home, "hub", "checkpoints").glob("*"))
