"""What commands say of a run before they load anything: what holds, what runs again, and why."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..errors import ArtifactError
from ..lineage import freshness, sample_sets
from ..lineage.freshness import State
from ..store.run_dir import RunDir
from .console import Console

FORCED = "--force says so"


def say(console: Console, state: State | None, *, force: bool = False) -> None:
    """Before a stage runs, why it does so."""
    if state is None or state.new or console.announced:
        return
    if not state.holds:
        console.note(state.sentence())
    elif force:
        console.note(f"{state.stage}: again, because {FORCED}")


def described(state: State | None, *, force: bool = False) -> dict[str, Any]:
    """For the JSON of a stage that ran."""
    if state is None:
        return {}
    because = FORCED if force and state.holds else state.why or None
    return {"because": because, "keys": list(state.changed)}


def plan(
    console: Console, run: RunDir, config: Config, model: str, sampled: Path, *, force: bool
) -> dict[str, Any]:
    """Say which stages of a run are unchanged and which run again, and why; the same for JSON.

    sampled: the folder of its sample set. Raises ArtifactError for a set that the new settings
    would not fit, before any work is done for it.
    """
    states = freshness.of_run(run, config, model)
    for state in (s for s in states if not s.new):  # a first time needs no reason
        console.note(state.sentence() if not force else f"{state.stage}: again, because {FORCED}")
    changed = _once(key for state in states for key in state.changed)
    if changed and not force and sample_sets.begun(sampled) is not None:
        raise ArtifactError(
            f"{sampled}: holds samples made with other settings ({'; '.join(changed)})",
            "add --force to make everything again, or --name NAME to keep these samples",
        )
    return {state.stage: {"unchanged": state.holds, **described(state)} for state in states}


def _once(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(keys))
