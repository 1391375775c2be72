"""Whether the stages of a run still hold, and why not: from files and digests, without torch.

A stage holds where its outputs are there and sound and were made from just these inputs. The chain
skips it then; commands say the rest before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.loading import load_config
from ..config.schema import Config, Stage
from ..errors import ArtifactError, ConfigError
from ..store.artifact_files import Stored, read_stored
from ..store.digests import differing
from ..store.files import read_json, write_json
from ..store.run_dir import RunDir, read_coverage

NAMES = {
    "intra": "correction.intra",
    "smoothing_strength": "correction.smoothing_strength",
    "timestep_groups": "quantization.activations.timestep_groups",
    "split": "quantization.split_skip_connections",
    "widths": "quantization",
    "widths.weights.nearest": "rounding to nearest",
    "estimator_target": "correction.inter.target",
    "first_stage": "first_stage",
    "text_encoders": "text_encoders",
    "prompts": "sampling.prompts",
    "negative_prompt": "sampling.negative_prompt",
    "reuse.budget": "sampling.reuse",
    "reuse.mends": "correction.reuse",
    "reuse.field": "correction.inter.field",
}
"""Keys of what decides a stage (`Config.stage_inputs`), as the configuration calls them."""
OF_INTRA = ("widths", "smoothing_strength")
"""Those that count for some values of correction.intra only."""


@dataclass(frozen=True)
class State:
    """A stage of a run. why: a phrase that tells why it is run again, "" where it holds.

    new: nothing of it is there; open: whether it holds depends on what an earlier stage gives;
    found: its sound artifacts by kind; changed: the keys of the configuration in question, each
    "key: old -> new".
    """

    stage: str
    why: str = ""
    new: bool = False
    open: bool = False
    found: Mapping[str, Stored] = field(default_factory=dict)
    changed: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return not self.why

    def sentence(self) -> str:
        """One line for people."""
        if self.holds:
            return f"{self.stage}: unchanged"
        if self.new:
            return f"{self.stage}: {self.why}"
        return f"{self.stage}: again, because {self.why}"

    def described(self) -> dict[str, Any]:
        """The same for JSON."""
        return {"unchanged": self.holds, "because": self.why or None, "keys": list(self.changed)}


def calibrated(run: RunDir, config: Config, model: str) -> State:
    """The stage calibrate. model: the digest of the model as it is now."""

    def linked(found: Mapping[str, Stored]) -> str:
        good = found["calibration"].parents == {"smoothing": found["smoothing"].digest}
        return "" if good else "calibration and smoothing do not belong together"

    return _state(run, "calibrate", ("smoothing", "calibration"), config, model, linked)


def quantized(run: RunDir, config: Config, model: str, before: State) -> State:
    """The stage quantize. before: of calibrate."""
    parents = {kind: stored.digest for kind, stored in before.found.items()}
    state = quantized_from(run, config, model, parents)
    if before.holds or state.changed or state.new:
        return state
    why = f"{before.stage} is made again, unless the same comes out"
    return State("quantize", why, open=True, found=state.found)


def quantized_from(
    run: RunDir, config: Config, model: str, parents: dict[str, str], also: Collection[str] = ()
) -> State:
    """The stage quantize. parents: digests of calibration and smoothing; also: as in `lacking`."""

    def linked(found: Mapping[str, Stored]) -> str:
        if found["quantized"].parents != parents:
            return "calibrate is another one than it was made from"
        if found["noise_stats"].parents != {"quantized": found["quantized"].digest}:
            return "quantized and noise_stats do not belong together"
        if wrong := _coverage_fault(run):
            return wrong
        return lacking(config, found["noise_stats"].body, also)

    return _state(run, "quantize", ("quantized", "noise_stats"), config, model, linked)


def weights_from(run: RunDir, config: Config, model: str, parents: dict[str, str]) -> State:
    """The stage quantize but for the statistics of the noise, which may be measured by themselves.

    parents: as in `quantized_from`.
    """

    def linked(found: Mapping[str, Stored]) -> str:
        if found["quantized"].parents != parents:
            return "calibrate is another one than it was made from"
        return _coverage_fault(run)

    return _state(run, "quantize", ("quantized",), config, model, linked)


def _coverage_fault(run: RunDir) -> str:
    if not run.coverage.is_file():
        return f"{run.coverage.name} is missing"
    try:
        read_coverage(run.coverage)
    except ArtifactError:
        return f"{run.coverage.name} is damaged or an earlier version's"
    return ""


def lacking(config: Config, body: Mapping[str, Any], also: Collection[str] = ()) -> str:
    """A phrase where the statistics of noise are without some that the correction of config reads,
    or that also names; body: of noise_stats."""
    inter, there = config.correction.inter, body.get("measured")
    if there is None or inter.statistics.union(also).issubset(there):
        return ""
    who = "another row's" if inter.statistics.issubset(there) else f"the {inter.method}"
    return f"the noise was measured without what {who} correction needs"


def reused(run: RunDir, config: Config, model: str, quantized: str) -> State:
    """The plan of `sampling.reuse`. quantized: the digest of the model that it is for."""

    def linked(found: Mapping[str, Stored]) -> str:
        good = found["reuse"].parents == {"quantized": quantized}
        return "" if good else "quantize is another one than it was made from"

    return _state(run, "reuse", ("reuse",), config, model, linked)


def check_reused(run: RunDir, config: Config, model: str, quantized: str) -> Stored:
    """The plan of `sampling.reuse` that sampling follows. Raises ArtifactError where there is none
    for these settings, this model and these bits."""
    state = reused(run, config, model, quantized)
    if state.holds:
        return state.found["reuse"]
    why = f"there is no plan for sampling.reuse {config.sampling.reuse:g}"
    if not state.new:
        why = f"the plan for sampling.reuse does not hold ({state.why})"
    raise ArtifactError(
        f"{run.path}: {why}",
        'make one with "qncd quantize --reuse SHARE" and these settings, or add '
        "--set sampling.reuse=null",
    )


def first_stage(run: RunDir, config: Config, model: str) -> State:
    """The decoder in integers."""
    return _state(run, "first_stage", ("first_stage",), config, model, lambda found: "")


def check_first_stage(run: RunDir, config: Config, model: str) -> Stored:
    """The decoder of `first_stage.bits`, which images are made by. Raises ArtifactError where there
    is none of these settings and this model."""
    state = first_stage(run, config, model)
    if state.holds:
        return state.found["first_stage"]
    why = f"there is no decoder of first_stage.bits {config.first_stage.bits}"
    if not state.new:
        why = f"the decoder of first_stage.bits does not hold ({state.why})"
    raise ArtifactError(
        f"{run.path}: {why}",
        f'make one with "qncd quantize --set first_stage.bits={config.first_stage.bits}" and these '
        "settings, or add --set first_stage.bits=null",
    )


def text_encoders(run: RunDir, config: Config, model: str) -> State:
    """The text encoders of `text_encoders.bits`."""
    return _state(run, "text_encoders", ("text_encoders",), config, model, lambda found: "")


def check_text_encoders(run: RunDir, config: Config, model: str) -> Stored:
    """The text encoders of `text_encoders.bits`, which prompts are encoded by. Raises ArtifactError
    where there are none of these settings and this model."""
    state = text_encoders(run, config, model)
    if state.holds:
        return state.found["text_encoders"]
    bits = config.text_encoders.bits
    why = f"there are no text encoders of text_encoders.bits {bits}"
    if not state.new:
        why = f"the text encoders of text_encoders.bits do not hold ({state.why})"
    raise ArtifactError(
        f"{run.path}: {why}",
        f'make them with "qncd quantize --set text_encoders.bits={bits}" and these settings, or '
        "add --set text_encoders.bits=null",
    )


def of_run(run: RunDir, config: Config, model: str) -> tuple[State, State]:
    """calibrate and quantize of a run, under a configuration and with the model as it is now."""
    first = calibrated(run, config, model)
    return first, quantized(run, config, model, first)


# ------------------------------------------------------------------ one stage


def _state(
    run: RunDir,
    stage: Stage,
    kinds: tuple[str, ...],
    config: Config,
    model: str,
    linked: Callable[[Mapping[str, Stored]], str],
) -> State:
    """linked: what is wrong with sound artifacts of this configuration and model, or ""."""
    if not any(run.tensors(kind).exists() for kind in kinds):
        return State(stage, "not done yet", new=True)
    found, wrong = {}, []
    for kind in kinds:
        try:
            found[kind] = read_stored(run.tensors(kind), kind)
        except ArtifactError as error:
            wrong.append(error.message.removeprefix(f"{run.path}/"))
    changed: list[str] = []
    digest = config.stage_digest(stage)
    other = [stored.config for stored in found.values() if stored.config != digest]
    if other:
        changed = _changed(run, stage, config, other[0])
        wrong += changed or [f"the configuration of {stage} was another one"]
    models = [stored.model for stored in found.values() if stored.model != model]
    if models:
        wrong.append(f"the model's files changed ({models[0]} -> {model})")
    if not wrong and (problem := linked(found)):
        wrong.append(problem)
    return State(stage, "; ".join(wrong), found=found, changed=tuple(changed))


def _changed(run: RunDir, stage: Stage, config: Config, digest: str) -> list[str]:
    """What differs from the settings of that digest, [] where nobody knows them any more."""
    before = _settings(run, stage, digest)
    if before is None:
        return []
    now = config.stage_inputs(stage)
    if before.get("intra") != now.get("intra"):
        before, now = ({k: v for k, v in t.items() if k not in OF_INTRA} for t in (before, now))
    return differing(before, now, NAMES)


# ------------------------------------------------------------------ what stages were made with


def _settings(run: RunDir, stage: Stage, digest: str) -> dict[str, Any] | None:
    """What decided a stage: as it was noted, or from the run's configuration where that fits."""
    noted = _noted(run.settings).get(stage)
    if isinstance(noted, dict) and noted.get("digest") == digest:
        return noted["inputs"]
    try:
        config = load_config(str(run.config)) if run.config.is_file() else None
    except ConfigError:
        return None
    fits = config is not None and config.stage_digest(stage) == digest
    return config.stage_inputs(stage) if config is not None and fits else None


def note_settings(run: RunDir, stage: Stage, config: Config) -> None:
    """Keep what decided a stage that was made or still holds: a later change can be told then."""
    noted = {"digest": config.stage_digest(stage), "inputs": config.stage_inputs(stage)}
    known = _noted(run.settings)
    if known.get(stage) != noted:
        write_json(run.settings, {**known, stage: noted})


def _noted(path: Path) -> dict[str, Any]:
    """{} where the file is missing or damaged: it only helps to explain."""
    try:
        tree = read_json(path, "qncd calibrate")
    except ArtifactError:
        return {}
    return tree if isinstance(tree, dict) else {}
