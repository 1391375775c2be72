"""What commands know of a run before they load anything, and what they say of it.

Nothing here needs torch: a stage that holds is skipped before anybody has waited for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..errors import ArtifactError
from ..lineage import sample_sets
from ..lineage import stages as fresh
from ..lineage.stages import State
from ..models.digest import known_digest
from ..spec import Compile
from ..store.artifact_files import Stored, check_lineage, read_stored
from ..store.run_dir import RunDir
from .console import Console

FORCED = "--force says so"


def model_digest(config: Config) -> str | None:
    """Digest of the configured model; None where only loading it tells."""
    model = config.model
    return known_digest(model.source, model.compvis_config, model.tokenizer)


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


def check_parents(run: RunDir, config: Config, model: str | None) -> None:
    """What quantize reads is there and of this configuration and model. Raises ArtifactError."""
    smoothing, calibration = (
        read_stored(run.tensors(kind), kind) for kind in ("smoothing", "calibration")
    )
    calibrated = fresh.calibrated(run, config, model or smoothing.model)
    if calibrated.changed:
        hint = 'repeat "qncd calibrate" with these settings'
        raise ArtifactError(f"{run.path}: {calibrated.sentence()}", hint)
    digest = config.stage_digest("calibrate")
    check_lineage(smoothing, config=digest, model=model)
    parents = {"smoothing": smoothing.digest}
    check_lineage(calibration, config=digest, model=model, parents=parents)


def quantized_of(run: RunDir, config: Config, model: str | None) -> Stored:
    """What sample reads, of the run's configuration and the model. Raises ArtifactError."""
    quantized = read_stored(run.tensors("quantized"), "quantized")
    check_lineage(quantized, config=config.stage_digest("quantize"))
    noise_stats = read_stored(run.tensors("noise_stats"), "noise_stats")
    if model is not None:
        check_lineage(quantized, model=model)
        check_lineage(noise_stats, model=model, parents={"quantized": quantized.digest})
    return quantized


# ------------------------------------------------------------------ a sample set


def set_state(
    folder: Path,
    config: Config,
    digests: Mapping[str, str],
    seeds: range,
    batch_size: int | None,
    *,
    backend: str | None,
    compile: Compile,
) -> State:
    """The sample set of these seeds. digests: of the model, and of what is quantized.

    batch_size: None for whatever the set was drawn in; backend: None for what it began
    with. Raises ArtifactError where the folder holds a set made with other settings.
    """
    manifest = sample_sets.begun(folder)
    if manifest is None:
        return State("sample", f"{len(seeds)} images are drawn", new=True)
    kind = "quantized" if "quantized" in digests else "full"
    drawing = sample_sets.Drawing(
        kind,
        dict(digests),
        None if kind == "full" else backend or manifest.get("backend"),
        compile.going_on(bool(manifest.get("compiled"))) is Compile.YES,
        manifest.get("guidance") == "off",
        seeds.start,
        len(seeds),
        batch_size or manifest.get("batch_size"),
    )
    sample_sets.check_identity(folder, manifest, sample_sets.identity_of(config, drawing))
    there = set(manifest.get("seeds", ()))
    lost = sample_sets.without_image(folder, sorted(there))
    missing = len(there.union(seeds)) - len(there) + len(lost)
    if missing:
        return State("sample", f"{missing} of its images are missing", found={})
    if not manifest.get("complete"):
        return State("sample", "it was not finished")
    try:
        latents = read_stored(folder / sample_sets.LATENTS, "latents")
    except ArtifactError as error:
        return State("sample", error.message)
    return State("sample", found={"latents": latents})


def plan(
    console: Console, run: RunDir, config: Config, model: str, sampled: Path, *, force: bool
) -> dict[str, Any]:
    """Say which stages of a run are unchanged and which run again, and why; the same for JSON.

    sampled: the folder of its sample set. Raises ArtifactError for a set that the new settings
    would not fit, before any work is done for it.
    """
    states = fresh.of_run(run, config, model)
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
