"""What several commands need."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..phases import Phases
from ..runs.model import open_model as open_configured
from ..runs.model import silence_diffusers
from ..runs.watch import Watch
from ..store.run_dir import RunDir
from ..vocabulary import DIRECTIONS, phrase, terms
from . import profiling
from .console import Console, keeping
from .process import collect_as_usual
from .states import say

UNSAID = ("because", "keys", "reuse", "first_stage", "text_encoders")
"""Keys of a stage's payload that are told before it begins, or below its line."""


def watching(console: Console, phases: Phases | None = None) -> Watch:
    """What a console shows of a stage. phases: measures what is tracked."""
    return Watch(
        console.track if phases is None else phases.track,
        console.note,
        lambda state, force: say(console, state, force=force),
        keeping,
        collect_as_usual,
    )


def open_model(config: Config, device: str = "auto", folder: Path | None = None) -> Any:
    """The configured model, as `runs.model.open_model` opens it, with its remarks and progress."""
    return open_configured(config, device, folder, watching(Console()))


def download(source: str) -> None:
    """Bring a model of the hub to this machine. Raises ModelError."""
    from ..models.model_folder import find_folder

    silence_diffusers()
    find_folder(source)


def done(
    console: Console, stage: str, run: RunDir, phases: Phases | None = None, **more: Any
) -> None:
    """The result of a stage that ended. phases: where its time went, shown below."""
    seconds = console.lap()
    payload = {"stage": stage, "run_dir": str(run.path), "seconds": round(seconds, 2), **more}
    if phases is not None:
        payload["phases"] = [phase.body() for phase in phases.found]
    more = {k: v for k, v in more.items() if k not in UNSAID}

    def render() -> None:
        what = "unchanged, skipped" if more.get("skipped") else f"done in {seconds:.1f} s"
        details = [phrase(k, v) for k, v in more.items() if k != "skipped"]
        print(f"{stage}: {what}" + (f" ({', '.join(details)})" if details else ""))
        if phases is not None and phases.found:
            profiling.show(console, phases.found, seconds)

    console.result(payload, render)


def explain(headings: Iterable[str]) -> None:
    """Below a table: which way is better, and a sentence for each of its words that need one."""
    says = [DIRECTIONS, *(f"{term}: {text}" for term, text in terms(headings).items())]
    print(*map(wrapped, says), sep="\n")


def wrapped(line: str) -> str:
    """A paragraph as wide as the terminal."""
    return textwrap.fill(line, shutil.get_terminal_size((120, 24)).columns)
