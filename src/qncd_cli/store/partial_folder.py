"""Folders of partial results: where they are and what is in them, without torch.

`partial.Partial` writes and reads them.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

from .lock import LOCK, locked_if_free

FOLDER = "partial"
SOURCES = (".py", ".h", ".cpp")


def folder_of(run: Path, stage: str) -> Path:
    """Where the partial results of a run's stage are."""
    return run / FOLDER / stage


def kept_phrase(run: Path, stage: str, *parts: str) -> str:
    """What an interrupted stage has kept on disk, for people. parts: of it, which keep their own
    results."""
    files = [f for name in (stage, *parts) for f in folder_of(run, name).glob("*.safetensors")]
    files += (run / FOLDER).glob(f"{stage}.*/*.safetensors")
    written = [path.stat().st_mtime for path in files]
    if not written:
        return f"nothing of {stage} is kept, the same command begins it again"
    ago = max(0.0, time.time() - max(written))
    lost = f" but for the last {ago:.0f} s" if ago >= 1 else ""
    return f"what {stage} has done is kept{lost}, the same command goes on from there"


def discard_unneeded(run: Path, stage: str) -> None:
    """Remove what a process left that was killed after the stage was written, unless one works."""
    if (run / FOLDER).is_dir() or (run / LOCK).exists():
        with locked_if_free(run) as free:
            if free:
                discard_stage(run, stage)


def discard(folder: Path) -> None:
    """Remove the partial results of a stage, and the folder of all where they were the last."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.name == FOLDER and folder.parent.is_dir() and not any(folder.parent.iterdir()):
        shutil.rmtree(folder.parent, ignore_errors=True)


def discard_stage(run: Path, stage: str) -> None:
    """Remove the partial results of a stage, those of all ranks of a job among them."""
    for folder in [folder_of(run, stage), *(run / FOLDER).glob(f"{stage}.*")]:
        discard(folder)


def code_digest() -> str:
    """Digest of this package's source files."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in SOURCES):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
