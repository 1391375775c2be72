"""One file with a whole pipeline's weights, as ComfyUI and a dozen programs read it.

Its names are those of the models' authors (models/original_names.py, models/compvis/keys.py), or
diffusers' of a denoiser alone. Configuration, scheduler, tokenizers and what the file lacks come
from a pipeline folder of the same kind, the base. diffusers' from_single_file reads such files,
too, but passes over tensors that it does not know, leaves weights that are missing empty, and knows
one width of FLUX; here each weight has its tensor, or the file is refused with the first offender.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..errors import ModelError
from .compvis.checkpoint import NOT_WEIGHTS
from .compvis.file import header_of, read_tensors, some_tensors
from .compvis.keys import COND_STAGE, FIRST_STAGE, UNET, ema_key, first_stage_sources
from .compvis.text import clip_state
from .folder_check import check_folder, is_there, read_index, reason
from .fp8 import plain_numbers
from .model_folder import find_base
from .original_names import Place, places
from .pipeline_folder import LEFT_OUT, UNUSED, load_pipeline
from .prompt_length import Tell
from .shards import shards_of
from .weight_files import variants

DENOISERS = ("unet", "transformer")
FIRST_STAGES = (FIRST_STAGE, "vae.")
SDXL_TEXT, COMFY_TEXT = "conditioner.embedders.", "text_encoders."
CLIP = (
    f"{COND_STAGE}transformer.",
    f"{SDXL_TEXT}0.transformer.",
    f"{COMFY_TEXT}clip_l.transformer.",
)
"""What the names of OpenAI's encoder begin with, in transformers' own names."""
OPEN_CLIP = (f"{COND_STAGE}model.", f"{SDXL_TEXT}1.model.", f"{SDXL_TEXT}0.model.")
OPEN_CLIP_RENAMED = (f"{COMFY_TEXT}clip_g.transformer.",)
T5 = (f"{COMFY_TEXT}t5xxl.transformer.",)
PARTS = (UNET, *FIRST_STAGES, *CLIP, *OPEN_CLIP, *OPEN_CLIP_RENAMED, *T5)
_NOT_WEIGHTS = (".position_ids", ".logit_scale", "denoiser.sigmas", "global_step")
_HINT = "is model.base a pipeline of the same kind, of the same sizes?"


@dataclass
class _File:
    """Tensors of a file by name, and which of them have become a weight.

    problems: what is wrong with its weights.
    """

    name: str
    tensors: dict[str, Tensor]
    used: set[str] = field(default_factory=set)

    def prefix(self, candidates: tuple[str, ...]) -> str | None:
        """The first that a name begins with."""
        return next((p for p in candidates if any(n.startswith(p) for n in self.tensors)), None)

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of a part by the rest of their names, all of them used."""
        found = {n: t for n, t in self.tensors.items() if n.startswith(prefix)}
        self.used |= set(found)
        return {n.removeprefix(prefix): t for n, t in found.items()}


def file_pipeline(file: str, base: str, tell: Tell) -> DiffusionPipeline:
    """The pipeline of a file's weights, in their stored precision, and of its base. tell: hears
    what was left aside. Raises ModelError."""
    folder = find_base(base)
    index = read_index(folder, base)
    check_folder(folder, base, index)
    found = parts_of(file, folder, index, tell)
    optional = LEFT_OUT.get(index["_class_name"], ())
    without = [part for part in optional if part not in found and not variants(folder / part)]
    if "text_encoder_3" in without:
        tell(f"{file}: has no text_encoder_3, and neither has {folder}: the pipeline works without")
        without += ["tokenizer_3"]
    else:
        without = []
    return load_pipeline(folder, base, None, (*UNUSED, *without), tell, found)


def parts_of(file: str, base: Path, index: dict[str, Any], tell: Tell) -> dict[str, nn.Module]:
    """The modules that a file holds, by their names in the base's model_index.json.

    tell: hears of what was left aside.
    Raises ModelError for a file that is damaged, that does not fit its base, or lacks a part which
    the base has no weights of either.
    """
    source = _File(file, _read(file))
    found: dict[str, nn.Module] = {}
    needed: list[str] = []
    for part, entry in index.items():
        if not is_there(index, part) or part in UNUSED:
            continue
        kind = _class_of(*entry)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            continue
        needed.append(part)
        module = _part(source, part, kind, base / part)
        if module is not None:
            found[part] = module
    if not found.keys() & set(DENOISERS):
        raise ModelError(
            f"{file}: holds no denoiser ({some_tensors('of others', list(source.tensors))})",
            "give a checkpoint, or the file of a U-Net or transformer",
        )
    optional = LEFT_OUT.get(index["_class_name"], ())
    lacking = [part for part in needed if part not in found and part not in optional]
    lacking = [part for part in lacking if not variants(base / part)]
    if lacking:
        raise ModelError(
            f"{file}: has no {lacking[0]}, and neither has {base}",
            "set model.base to a complete pipeline folder",
        )
    left = [n for n in source.tensors if n not in source.used and not n.endswith(_NOT_WEIGHTS)]
    left = [n for n in left if n not in NOT_WEIGHTS]
    unknown = [n for n in left if n.startswith(PARTS)]
    if unknown:
        raise ModelError(f"{file}: {some_tensors(f'not in {base}', unknown)}", _HINT)
    if left:
        tell(f"{file}: {some_tensors('of no part of the pipeline left aside', left)}")
    return found


def _read(file: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    for shard in shards_of(file):
        if not shard.is_file():
            raise ModelError(f"{shard}: no such file", f"{file} needs all of its shards")
        tensors |= read_tensors(str(shard))
        header |= header_of(str(shard))
    return plain_numbers(file, tensors, header, PARTS)


def _class_of(library: str, name: str) -> Any:
    beside = getattr(diffusers.pipelines, library, None)
    return getattr(beside or importlib.import_module(library), name, None)


def _part(file: _File, part: str, kind: Any, folder: Path) -> nn.Module | None:
    """A module of the file; None where the file does not have it, or it is none."""
    if part in DENOISERS:
        return _denoiser(file, kind, folder)
    if part == "vae" and (prefix := file.prefix(FIRST_STAGES)) is not None:
        module = _empty(kind, folder)
        sources = first_stage_sources(module.state_dict(), len(module.config.block_out_channels))
        there = {name: Place(prefix + source.key) for name, source in sources.items()}
        _fill(file, module, there)
        file.used |= {name for name in file.tensors if name.startswith(f"{prefix}loss.")}
        return module
    if part.startswith("text_encoder"):
        return _text_encoder(file, part, kind, folder)
    return None


def _denoiser(file: _File, kind: Any, folder: Path) -> nn.Module | None:
    module = _empty(kind, folder)
    names = set(module.state_dict())
    if names & set(file.tensors):  # diffusers' own names, of a denoiser alone
        _fill(file, module, {name: Place(name) for name in names})
        return module
    there = places(module)
    prefix = "" if any(place.key in file.tensors for place in there.values()) else UNET
    if prefix and file.prefix((prefix,)) is None:
        return None
    plain = {n: Place(prefix + p.key, p.part, p.swapped) for n, p in there.items()}
    if any(name.startswith(ema_key("")) for name in file.tensors):  # moving averages
        file.used |= {place.key for place in plain.values()}
        plain = {n: Place(ema_key(p.key), p.part, p.swapped) for n, p in there.items()}
    _fill(file, module, plain)
    return module


def _text_encoder(file: _File, part: str, kind: Any, folder: Path) -> nn.Module | None:
    first, second = (*CLIP, OPEN_CLIP[0]), (*OPEN_CLIP[1:], *OPEN_CLIP_RENAMED)
    clip = second if part == "text_encoder_2" else first
    prefix = file.prefix(T5 if "T5" in kind.__name__ else clip)
    if prefix is None:
        return None
    config = kind.config_class.from_pretrained(str(folder))
    state = file.below(prefix)
    if prefix in OPEN_CLIP:
        state = clip_state(file.name, state, config.num_hidden_layers)
    state = {n: t for n, t in state.items() if not n.endswith((".position_ids", "logit_scale"))}
    projection = "text_projection.weight"
    if "WithProjection" in kind.__name__:
        if projection not in state and prefix in CLIP:  # SD 3's, which its authors did not keep
            state[projection] = torch.eye(config.projection_dim)
    else:
        state.pop(projection, None)
    state = _of_one_type(state)
    types = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    options: dict[str, Any] = {"dtype": types[0]} if types else {}
    try:
        module, found = kind.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **options
        )
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{file.name}: {part}: {reason(error)}", _HINT) from error
    wrong = {
        "missing": sorted(found["missing_keys"]),
        "of another shape": sorted(str(key) for key in found["mismatched_keys"]),
        "not known": sorted(found["unexpected_keys"]),
    }
    _check(file.name, part, {what: names for what, names in wrong.items() if names})
    return module


def _empty(kind: Any, folder: Path) -> Any:
    with torch.device("meta"):
        return kind.from_config(kind.load_config(folder))


def _fill(file: _File, module: ModelMixin, there: dict[str, Place]) -> None:
    """Give a module on the meta device the tensors at those places. Raises ModelError."""
    wanted = module.state_dict()
    joined: dict[str, list[str]] = {}
    for name in wanted:
        joined.setdefault(there[name].key, []).append(name)
    state, missing, misshaped = {}, [], []
    for key, names in joined.items():
        names.sort(key=lambda name: there[name].part)
        if key not in file.tensors:
            missing.append(key)
            continue
        file.used.add(key)
        tensor, rows = file.tensors[key], [len(wanted[name]) for name in names]
        shape = [sum(rows), *wanted[names[0]].shape[1:]]
        stored, ones = list(tensor.shape[: len(shape)]), tensor.shape[len(shape) :]
        if stored != shape or any(n != 1 for n in ones):  # 1 x 1: a layer as a convolution
            misshaped.append(f"{key} is {list(tensor.shape)}, expected {shape}")
            continue
        for name, part in zip(names, tensor.split(rows), strict=True):
            if there[name].swapped:
                part = torch.cat(part.chunk(2)[::-1])
            state[name] = part.reshape(wanted[name].shape)
    wrong = {"missing": missing, "of another shape": misshaped}
    _check(file.name, type(module).__name__, {k: v for k, v in wrong.items() if v})
    module.load_state_dict(_of_one_type(state), assign=True)


def _of_one_type(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A module's tensors in the type that they have, or in float32 where they have several."""
    types = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(types) <= 1:
        return state
    return {n: t.float() if t.is_floating_point() else t for n, t in state.items()}


def _check(file: str, part: str, wrong: dict[str, list[str]]) -> None:
    if wrong:
        said = "; ".join(some_tensors(what, names) for what, names in wrong.items())
        raise ModelError(f"{file}: {part}: {said}", _HINT)
