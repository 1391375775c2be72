"""A configuration for a model of the user's own, from what its folder says: init, and run MODEL.

Neither torch nor diffusers is imported, and no weights are read but the headers of their files.
"""

from __future__ import annotations

import dataclasses
import os
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config import model_card
from ..config.keys import sections
from ..config.model_card import Card, read_tree
from ..errors import ModelError
from ..models.folder_check import check_folder, read_index
from ..models.weight_files import stored, weight_files
from ..models.zoo import zoo_path

Tree = dict[str, Any]
EXAMPLES = ["a red bicycle leaning against a brick wall", "two dogs running along a beach"]
_SMALL, _LARGE = 100_000_000, 1_500_000_000
"""Parameters up to which calibration can draw many images at once, and from which one."""
EARLY_SIZE = 64
"""What diffusers takes for the smaller sizes in folders of Stable Diffusion before version 0.9.0,
which were trained at it (StableDiffusionPipeline; models/schedule.py has it do so)."""
_COMMENTED: Tree = {"negative_prompt": "", "image_size": None}
"""Keys of a text model that most leave as they are."""


@dataclass(frozen=True)
class Facts:
    """source: absolute where it is a path; parameters, types: of the denoiser, 0 and none where its
    files do not say; image: height and width in pixels, None where nothing says."""

    source: str
    compvis_config: str | None
    base: str | None
    card: Card
    parameters: int
    types: frozenset[str]
    image: tuple[int, int] | None

    @property
    def name(self) -> str:
        return name_of(self.source)


def name_of(source: str) -> str:
    """A model's short name: the last part of its source."""
    last = Path(source.partition(":")[2] if ":" in source else source).name
    return last if not last.endswith(model_card.CHECKPOINTS) else Path(last).stem


def facts_of(source: str, compvis_config: str | None = None, base: str | None = None) -> Facts:
    """compvis_config, base: of a checkpoint file, what describes it.

    Raises ModelError for what is not here, or of a kind that is not supported.
    """
    source = os.path.expanduser(source)
    if source.endswith(model_card.CHECKPOINTS):
        if base is not None and compvis_config is None:
            return _file_facts(source, os.path.expanduser(base))
        return _checkpoint_facts(source, compvis_config)
    if source.startswith("random:"):
        raise ModelError(
            f"{source}: random weights are for time and memory, not for images",
            f"qncd bench {source}, or --plan with a configuration",
        )
    folder = _folder(source)
    index = read_index(folder, source)
    check_folder(folder, source, index)
    card = model_card.card_of(source)
    if card is None:
        known = ", ".join(model_card.PIPELINES)
        raise ModelError(
            f"{source}: pipeline {index['_class_name']} is not supported", f"supported: {known}"
        )
    denoiser = folder / ("unet" if "unet" in index else "transformer")
    try:
        parameters, types = stored(weight_files(denoiser))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{denoiser}: weights cannot be read: {error}") from error
    here = os.path.abspath(source) if os.path.isdir(source) else source
    image = _image(folder, denoiser, card.kind)
    return Facts(here, None, None, card, parameters, frozenset(types), image)


def starter_tree(facts: Facts) -> Tree:
    """The keys that a newcomer would set, with the values to begin with."""
    card, own = facts.card, facts.types
    dtype = "bfloat16" if own == {"BF16"} else "float32"
    model: Tree = {"source": facts.source, "dtype": dtype}
    if facts.compvis_config is not None:
        model["compvis_config"] = facts.compvis_config
    if facts.base is not None:
        model["base"] = facts.base
    sampling: Tree = {
        "scheduler": card.scheduler,
        "steps": card.steps,
        "guidance_scale": card.guidance_scale,
    }
    if card.needs == "prompts":
        sampling["prompts"] = EXAMPLES
    elif card.needs == "classes":
        sampling["classes"] = "all"
    batch = 32
    if facts.parameters > _SMALL:
        batch = 2 if facts.parameters <= _LARGE else 1
    return {
        "model": model,
        "sampling": sampling,
        "calibration": {"effort": "standard", "batch_size": batch},
        "quantization": {
            "preset": "best",
            "weights": {"bits": 4},
            "activations": {"bits": 8},
        },
    }


def starter_yaml(facts: Facts) -> str:
    """The same as text, every key with its description."""
    card = facts.card
    image = "" if facts.image is None else f", images of {facts.image[1]} x {facts.image[0]} pixels"
    count = f", {facts.parameters / 1e6:,.1f} M parameters" if facts.parameters else ""
    lines = [
        f"# {facts.name}: {card.kind}{count}{image}.",
        "# Every other key that there is, with its default: docs/config.md",
    ]
    if facts.types == {"F16"}:
        lines.append("# The weights are stored as float16; float32 holds them without loss.")
    if card.needs == "prompts":
        lines.append("# The two prompts are examples: put in what you will ask of the model.")
    if card.scheduler is None:
        lines.append(f"# Set sampling.scheduler: nothing here is like {card.scheduler_class}.")
    tree = starter_tree(facts)
    for section, values in tree.items():
        lines += ["", f"{section}:", *_keys(values, section, "  ")]
        if section == "sampling" and card.needs == "prompts":
            for key, value in _COMMENTED.items():
                lines += [*_comment(f"{section}.{key}", "  "), f"  # {_line(key, value)}"]
    return "\n".join(lines) + "\n"


def _keys(values: Tree, path: str, indent: str) -> list[str]:
    """Lines of a section's keys, a comment before each."""
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_keys(value, f"{path}.{key}", indent + "  ")]
            continue
        lines += _comment(f"{path}.{key}", indent)
        lines += [indent + line for line in _line(key, value).splitlines()]
    return lines


def _comment(path: str, indent: str) -> list[str]:
    key = next(k for section in sections() for k in section.keys if k.path == path)
    words = f" ({', '.join(key.values)})" if key.values else ""
    return textwrap.wrap(
        key.description + words,
        96,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}#   ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _line(key: str, value: Any) -> str:
    return yaml.safe_dump({key: value}, allow_unicode=True, width=1000).strip()


def _folder(source: str) -> Path:
    if source.startswith("zoo:"):
        return zoo_path(source.removeprefix("zoo:"))
    folder = model_card.folder_of(source)
    if folder is not None:
        return folder
    if os.path.isdir(source):
        raise ModelError(f"{source}: no model_index.json", "a diffusers pipeline folder has one")
    if model_card.is_hub_id(source):
        raise ModelError(
            f"{source}: neither a folder here nor in the hub's cache",
            f"check the name, or download it: hf download {source}",
        )
    raise ModelError(
        f"{source[:80]}: no such model", "give a diffusers folder, a hub id, or zoo:NAME"
    )


def _checkpoint_facts(source: str, compvis_config: str | None) -> Facts:
    if not os.path.isfile(source):
        raise ModelError(f"{source}: no such file", "check the name")
    beside = sorted(Path(source).parent.glob("*.yaml"))
    same = [path for path in beside if path.stem == Path(source).stem]
    those = same or (beside if len(beside) == 1 else [])
    found = compvis_config or next(map(str, those), "")
    card = model_card.card_of(source, found)
    if card is None:
        raise ModelError(
            f"{source}: a checkpoint needs the YAML that CompVis published with it",
            "name it (--compvis-config; elsewhere --set model.compvis_config=YAML), or a pipeline "
            "folder of the same kind (--base; elsewhere --set model.base=FOLDER)",
        )
    return Facts(os.path.abspath(source), os.path.abspath(found), None, card, 0, frozenset(), None)


def _file_facts(source: str, base: str) -> Facts:
    """What a file's base says of it, with the sizes of the base's denoiser."""
    if not os.path.isfile(source):
        raise ModelError(f"{source}: no such file", "check the name")
    own = facts_of(base)
    return dataclasses.replace(own, source=os.path.abspath(source), base=own.source)


def _image(folder: Path, denoiser: Path, kind: str) -> tuple[int, int] | None:
    """Height and width of the model's own images."""
    config = read_tree(denoiser / "config.json")
    size = config.get("sample_size")
    if kind == "StableDiffusionPipeline" and isinstance(size, int) and _is_early(config):
        size = max(size, EARLY_SIZE)
    sides = size if isinstance(size, list) and len(size) == 2 else [size, size]
    if not all(isinstance(side, int) for side in sides):
        return None
    stages = [read_tree(folder / part / "config.json") for part in ("vae", "vqvae")]
    blocks = next((stage["block_out_channels"] for stage in stages if stage), [0])
    height, width = (side * 2 ** (len(blocks) - 1) for side in sides)
    return height, width


def _is_early(config: Tree) -> bool:
    """Whether a version of diffusers before 0.9.0 wrote it."""
    found = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version")))
    return found is not None and (int(found[1]), int(found[2])) < (0, 9)
