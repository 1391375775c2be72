"""The run directory: where the files of a run are, and which run is the current one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from .files import read_json, write_bytes

COVERAGE_KEYS: dict[str, type] = {
    "layers": list,
    **dict.fromkeys(("macs", "bit_operations", "rest_bytes", "float_denoiser_bytes"), int),
    **dict.fromkeys(("mean_weight_bits", "mean_input_bits"), float),
    **dict.fromkeys(("integer_macs_share", "average_weight_bits"), float),
}
"""Keys that every reader of coverage.json may ask for, and types of their values."""


@dataclass(frozen=True)
class RunDir:
    """Where the files of one run are."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def settings(self) -> Path:
        """What the stages were made with."""
        return self.path / "settings.json"

    @property
    def coverage(self) -> Path:
        return self.path / "coverage.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def study(self) -> Path:
        """What human raters said."""
        return self.path / "study.json"

    @property
    def study_key(self) -> Path:
        """Which side is which in the study's page: for the experimenter alone."""
        return self.path / "study_key.json"

    @property
    def study_page(self) -> Path:
        """The study, for raters."""
        return self.path / "study.html"

    def tensors(self, kind: str) -> Path:
        return self.path / f"{kind}.safetensors"

    def samples(self, name: str) -> Path:
        return self.path / "samples" / name


def read_coverage(path: Path, command: str = "qncd quantize --force") -> dict[str, Any]:
    """coverage.json. Raises ArtifactError where it is missing, damaged or an earlier version's.

    command: the one that writes a good one.
    """
    found = read_json(path, command)
    known = found if isinstance(found, dict) else {}
    lacking = sorted(COVERAGE_KEYS.keys() - known.keys())
    if lacking:
        raise ArtifactError(
            f"{path}: without {lacking[0]}, as an earlier version wrote it", f'repeat "{command}"'
        )
    for key, wanted in COVERAGE_KEYS.items():
        number = wanted is float and type(known[key]) in (int, float, type(None))
        if not number and type(known[key]) is not wanted:
            raise ArtifactError(
                f"{path}: damaged: {key} is no {wanted.__name__}", f'repeat "{command}"'
            )
    if not all(
        isinstance(row, dict) and isinstance(row.get("name"), str) for row in known["layers"]
    ):
        raise ArtifactError(f"{path}: damaged: layers", f'repeat "{command}"')
    return known


def _pointer() -> Path:
    return Path("runs") / ".current"


def set_current(run: RunDir) -> None:
    """Later commands in this folder find the run without being told."""
    pointer, text = _pointer(), (str(run.path) + "\n").encode()
    if not pointer.is_file() or pointer.read_bytes() != text:
        write_bytes(pointer, text)


def find_run(run_dir: str | None) -> RunDir:
    """The run named on the command line, else the current one. Raises ArtifactError."""
    if run_dir is not None:
        run = RunDir(Path(run_dir))
        hint = f'make it with "qncd calibrate --config CONFIG --run-dir {run_dir}"'
    else:
        pointer = _pointer()
        if not pointer.is_file():
            raise ArtifactError(
                f"no current run in {Path.cwd()}",
                'start with "qncd calibrate --config CONFIG", or name one with --run-dir',
            )
        run = RunDir(Path(pointer.read_text(encoding="utf-8").strip()))
        hint = 'repeat "qncd calibrate", or name a run with --run-dir'
    if not run.config.is_file():
        raise ArtifactError(f"{run.config}: missing", hint)
    return run
