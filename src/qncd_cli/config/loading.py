"""Configurations are read strictly from YAML files and `--set` overrides.

Reading is inert: no model is opened, nothing seeded, no device asked. What can be set is in
config/schema.py, which file a name stands for in config/shipped.py; here are the overrides and the
suggestions.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ..errors import ConfigError
from ..store.regular import read_regular
from . import model_card, presets
from .effort import DEFAULT_EFFORT, EFFORTS
from .own_settings import Download, ask_model, place_model, place_of, section_of
from .quantization import LayerOverride
from .sampling import SamplingConfig
from .schema import Config
from .shipped import find_config, shortened
from .start_images import read_inputs
from .yaml_text import LARGEST, YamlError, parse_yaml, read_yaml

_ALTERNATIVES = ("literal[", "tuple[")
TOLD = 20
"""Mistakes that are told at once."""
DEFAULT_PRESET = "best"
"""Preset of a configuration that names none; null in a configuration means no preset."""


def load_config(
    name: str | Path,
    overrides: Sequence[str] = (),
    *,
    prompts: Sequence[str] = (),
    download: Download | None = None,
) -> Config:
    """Read a configuration: a YAML file, or a shipped one by name (fashion_ldm, fashion_ldm_w4a6).

    overrides: "key.path=value", values in YAML, the last one wins. prompts: of a text model whose
    configuration has none. download: brings a model of the hub whose own settings are needed.

    Raises ConfigError naming the file, the dotted key and the nearest known key.

    >>> load_config("fashion_ldm_w4a8", ["sampling.steps=10"]).sampling.steps
    10
    """
    found = find_config(str(name))
    path = found.path
    try:
        tree = read_yaml(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except YamlError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping with the key model", "see qncd models")
    overrides = (*found.overrides, *overrides)
    return resolved(tree, str(path), path.parent, overrides, prompts=prompts, download=download)


def resolved(
    tree: dict[str, Any],
    where: str,
    beside: Path,
    overrides: Sequence[str] = (),
    *,
    prompts: Sequence[str] = (),
    download: Download | None = None,
) -> Config:
    """The configuration that a tree means, with `key.path=value` overrides (values are YAML).

    What the tree does not set comes from its preset (`best` unless it names one) and, for
    scheduler, steps and guidance, from the model's own files. A preset, and an effort, among the
    overrides wins over the tree: what the tree says of keys that it sets is dropped.
    where: names the tree in errors; beside: a folder that relative paths are looked up in after the
    current one; prompts: of a text model that has none; download: brings a model that is not here
    yet. Raises ConfigError, also for a text model without prompts.
    """
    assigned = {override.partition("=")[0] for override in overrides}
    if "quantization.preset" in assigned:
        tree = presets.without_settings(tree)
    elif "quantization.strict" in assigned:
        tree = presets.without_exclusions(tree)
    if "calibration.effort" in assigned:
        _without_trajectories(tree)
    for override in overrides:
        _apply_override(tree, override)
    if "calibration.trajectories" in assigned and "calibration.noise_trajectories" not in assigned:
        _fewer_noise_trajectories(tree)
    place_model(tree, beside)
    card = ask_model(tree, where, download)
    sampling = tree.get("sampling")
    if card and card.needs == "prompts" and isinstance(sampling, dict):
        if sampling.get("prompts") is None and prompts:
            sampling["prompts"] = list(prompts)
        if sampling.get("prompts") is None:
            raise ConfigError(
                f"{where}: a text model ({card.kind}) needs sampling.prompts",
                "--prompts FILE with one a line; in a configuration a list, or the name of a file",
            )
    _read_prompts(tree, beside)
    if isinstance(sampling, dict):
        read_inputs(sampling, lambda name: place_of(name, beside))
        if sampling.get("images") is not None and sampling.get("strength") is None:
            _own_strength(tree)
    steps = _steps(tree)
    _by_effort(tree, steps)
    quantization = tree.setdefault("quantization", {})
    if isinstance(quantization, dict):
        quantization.setdefault("preset", DEFAULT_PRESET)
    return parse_config(presets.filled(tree, steps), where)


def _own_strength(tree: dict[str, Any]) -> None:
    """Set sampling.strength to that of the model's pipeline."""
    source = section_of(tree, "model").get("source")
    card = model_card.card_of(source) if isinstance(source, str) else None
    if card is not None and card.kind in model_card.STRENGTHS:
        section_of(tree, "sampling")["strength"] = model_card.STRENGTHS[card.kind]


def _by_effort(tree: dict[str, Any], steps: int) -> None:
    """Set how many trajectories of so many steps the effort asks for, unless the tree says it.
    Where they have to do for several sizes, or the tree measures noise on more, they stay more."""
    section = tree.setdefault("calibration", {})
    if not isinstance(section, dict) or "trajectories" in section or section.get("sizes"):
        return
    effort = EFFORTS.get(str(section.get("effort", DEFAULT_EFFORT)))
    noise = section.get("noise_trajectories", 0)
    if effort is not None and steps > 0 and isinstance(noise, int):
        enough = max(noise, effort.trajectories_at(steps))
        section["trajectories"] = min(enough, effort.trajectories)


def _without_trajectories(tree: dict[str, Any]) -> None:
    """Drop how many trajectories the tree asks for."""
    for key in ("trajectories", "noise_trajectories"):
        section_of(tree, "calibration").pop(key, None)


def _fewer_noise_trajectories(tree: dict[str, Any]) -> None:
    """Fewer trajectories alone, as an override, are also fewer of those that measure noise."""
    section = section_of(tree, "calibration")
    every, noise = section.get("trajectories"), section.get("noise_trajectories")
    if isinstance(every, int) and isinstance(noise, int):
        section["noise_trajectories"] = min(every, noise)


def _read_prompts(tree: dict[str, Any], beside: Path) -> None:
    """Put the lines of a file of prompts in the place of its name. Raises ConfigError."""
    section = tree.get("sampling")
    if not isinstance(section, dict) or not isinstance(section.get("prompts"), str):
        return
    name = section["prompts"]
    path = place_of(name, beside)
    if path is None or path.is_dir():
        raise ConfigError(
            f"sampling.prompts: no file {shortened(name)}",
            "a file with one prompt a line, or a YAML list: [a red shoe, a blue bag]",
        )
    try:
        text = read_regular(path, LARGEST).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"sampling.prompts: {path}: cannot be read: {error}", "a text file in UTF-8"
        ) from error
    section["prompts"] = [line.strip() for line in text.split("\n") if line.strip()]


def _steps(tree: dict[str, Any]) -> int:
    """Steps that are made by a tree that nobody has validated yet."""
    section = tree.get("sampling")
    steps = section.get("steps") if isinstance(section, dict) else None
    strength = section.get("strength") if isinstance(section, dict) else None
    steps = steps if isinstance(steps, int) else SamplingConfig().steps
    return max(1, int(steps * strength)) if isinstance(strength, float) else steps


# ------------------------------------------------------------------ validation


def parse_config(tree: dict[str, Any], where: str) -> Config:
    """Validate a tree of plain values. Raises ConfigError that lists every offender."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(e) for e in error.errors()[:TOLD]]
        if more := error.error_count() - len(problems):
            problems.append(f"and {more} more")
        raise ConfigError(f"{where}: " + "; ".join(problems)) from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    told = shortened(override)
    if not equals or not key:
        raise ConfigError(f"--set {told}: expected key.path=value", "e.g. --set sampling.steps=50")
    try:
        value = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"--set {told}: the value is not valid YAML") from error
    node: Any = tree
    *parents, last = key.split(".")
    for i, part in enumerate(parents):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {told}: {'.'.join(parents[: i + 1])} has no keys below")
    node[last] = value


def _explain(error: Any) -> str:
    """One pydantic error as 'dotted.key: what is wrong'."""
    # pydantic names the alternatives of a union as parts of the path; nobody can write those
    told = [shortened(str(p)) for p in error["loc"]]
    location = [p for p in told if not p.startswith(_ALTERNATIVES)]
    key = ".".join(location) or "configuration"
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        if close:
            return f"unknown key {key}, did you mean {'.'.join([*location[:-1], close[0]])}?"
        return f"unknown key {key} (known: {', '.join(known)})"
    if error["type"] == "missing":
        return f"missing key {key}"
    text = error["msg"].removeprefix("Value error, ")
    text = text[0].lower() + text[1:]
    if error["type"] == "value_error":
        return text if key == "configuration" else f"{key}: {text}"
    return f"{key}: {text}, got {_said(error['input'])}"


def _said(value: Any) -> str:
    try:
        return shortened(repr(value))
    except ValueError:  # Python does not write out integers of thousands of digits
        return "a number of too many digits"


def _known_keys(path: list[str]) -> list[str]:
    """Keys of the section at a dotted path; [] where the path leads nowhere."""
    section: Any = Config
    for part in path:
        if section is None:
            return []
        field = section.model_fields.get(part)
        annotation = field.annotation if field else None
        if part == "overrides" and annotation is not None:
            section = LayerOverride  # the next part is a free pattern
            continue
        if field is None and section is LayerOverride:
            continue
        candidates = [annotation, *get_args(annotation)]
        section = next(
            (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None
        )
    return list(section.model_fields) if section is not None else []
