"""Tiny pipelines as the single files that other programs read, in the names of the authors.

The denoisers' and first stages' names are held against diffusers' own converters, the text
encoders' are written out here: CompVis' (github.com/CompVis/stable-diffusion), OpenCLIP's
(github.com/mlfoundations/open_clip), Stability's and ComfyUI's.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from qncd_cli.models.compvis.keys import first_stage_sources
from qncd_cli.models.original_names import places

UNET = "model.diffusion_model."
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
}


def bare(folder: Path, at: Path) -> Path:
    """A pipeline's folder without weights: what `hf download --include` of small files gives."""
    ignored = shutil.ignore_patterns("*.safetensors", "*.bin")
    return Path(shutil.copytree(folder, at, ignore=ignored))


def denoiser_tensors(denoiser: Any) -> dict[str, Tensor]:
    there, state = places(denoiser), denoiser.state_dict()
    joined: dict[str, list[tuple[int, Tensor]]] = {}
    for name, place in there.items():
        tensor = torch.cat(state[name].chunk(2)[::-1]) if place.swapped else state[name]
        joined.setdefault(place.key, []).append((place.part, tensor))
    return {
        key: torch.cat([tensor for _, tensor in sorted(parts, key=lambda part: part[0])])
        for key, parts in joined.items()
    }


def first_stage_tensors(vae: Any) -> dict[str, Tensor]:
    state = vae.state_dict()
    sources = first_stage_sources(state, len(vae.config.block_out_channels))
    found = {source.key: state[name] for name, source in sources.items()}
    flat = re.compile(r".*\.mid\.attn_1\.(q|k|v|proj_out)\.weight")
    return {k: t[:, :, None, None] if flat.fullmatch(k) else t for k, t in found.items()}


def transformers_names(encoder: Any) -> dict[str, Tensor]:
    """Of CLIP as files have them: below text_model, whatever the version of transformers."""
    state = {name.removeprefix("text_model."): t for name, t in encoder.state_dict().items()}
    outer = {name: state.pop(name) for name in list(state) if name.startswith("text_projection")}
    return {f"text_model.{name}": tensor for name, tensor in state.items()} | outer


def open_clip_names(encoder: Any, more: int) -> dict[str, Tensor]:
    """In OpenCLIP's; more: layers beyond those that are used."""
    found: dict[str, Tensor] = {"logit_scale": torch.tensor(4.6)}
    state = {n.removeprefix("text_model."): t for n, t in encoder.state_dict().items()}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif name == "embeddings.position_embedding.weight":
            found["positional_embedding"] = tensor
        elif not name.startswith("encoder.layers."):
            found[f"{OPEN_CLIP[layer]}.{leaf}"] = tensor
        elif ".self_attn.q_proj" in name:
            qkv = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            block = f"transformer.resblocks.{name.split('.')[2]}"
            found[f"{block}.attn.in_proj_{leaf}"] = torch.cat(qkv)
        elif ".k_proj" not in name and ".v_proj" not in name:
            _, _, number, inner = layer.split(".", 3)
            found[f"transformer.resblocks.{number}.{OPEN_CLIP[inner]}.{leaf}"] = tensor
    count = encoder.config.num_hidden_layers
    for number in range(count, count + more):
        first = {n: t for n, t in found.items() if ".resblocks.0." in n}
        found |= {n.replace(".0.", f".{number}.", 1): t + 1 for n, t in first.items()}
    return found


def encoder_tensors(pipeline: Any, kind: str) -> dict[str, Tensor]:
    """Text encoders under the names that files of that kind have."""
    parts = pipeline.components
    named: list[tuple[str, dict[str, Tensor]]] = []
    if kind == "sd1":
        named = [("cond_stage_model.transformer.", transformers_names(parts["text_encoder"]))]
    elif kind == "sd2":
        named = [("cond_stage_model.model.", open_clip_names(parts["text_encoder"], 1))]
    elif kind == "refiner":
        named = [("conditioner.embedders.0.model.", open_clip_names(parts["text_encoder_2"], 0))]
    elif kind == "sdxl":
        named = [
            ("conditioner.embedders.0.transformer.", transformers_names(parts["text_encoder"])),
            ("conditioner.embedders.1.model.", open_clip_names(parts["text_encoder_2"], 0)),
        ]
    else:
        second, third = parts["text_encoder_2"], parts.get("text_encoder_3")
        named = [("text_encoders.clip_l.transformer.", transformers_names(parts["text_encoder"]))]
        if third is None:
            named.append(("text_encoders.t5xxl.transformer.", second.state_dict()))
        else:
            named.append(("text_encoders.clip_g.transformer.", transformers_names(second)))
            named.append(("text_encoders.t5xxl.transformer.", third.state_dict()))
    return {prefix + name: t for prefix, tensors in named for name, t in tensors.items()}


def tensors_of(folder: Path, kind: str) -> dict[str, Tensor]:
    """A pipeline folder's weights under the names of a kind of file."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    denoiser = pipeline.components.get("transformer") or pipeline.unet
    found = {UNET + name: t for name, t in denoiser_tensors(denoiser).items()}
    stage = "vae." if kind in ("sd3", "flux") else "first_stage_model."
    found |= {stage + name: t for name, t in first_stage_tensors(pipeline.vae).items()}
    found |= encoder_tensors(pipeline, kind)
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def write(tensors: dict[str, Tensor], path: Path, **header: str) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: t.clone().contiguous() for name, t in tensors.items()}, path, header)
    else:
        torch.save({"state_dict": tensors, "global_step": 7}, path)
    return path
