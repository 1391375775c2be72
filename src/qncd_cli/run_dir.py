"""The run directory: where the files of a run are, and which run is the current one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .errors import ArtifactError
from .files import write_bytes


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

    def tensors(self, kind: str) -> Path:
        return self.path / f"{kind}.safetensors"

    def samples(self, name: str) -> Path:
        return self.path / "samples" / name


def _pointer() -> Path:
    return Path("runs") / ".current"


def set_current(run: RunDir) -> None:
    """Later commands in this folder find the run without being told."""
    write_bytes(_pointer(), (str(run.path) + "\n").encode())


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
