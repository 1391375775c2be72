"""LoRA files, fused into a pipeline or computed beside its layers.

W + weight (alpha / rank) B A, in float32 (Hu et al. 2021, arXiv 2106.09685). The names of kohya's
trainers, of diffusers and of PEFT are read by diffusers, the layers are PEFT's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config.lora_names import split_lora
from ..errors import ModelError
from .folder_check import reason

DOWN = ("lora_down.weight", "lora.down.weight", "lora_A.weight", "lora_A.default.weight")
"""How the names of A end, one a layer."""
OTHER_KINDS = {"dora_scale": "DoRA", "hada_w": "LoHa", "lokr_": "LoKr"}
"""What names of tensors hold that belong to other adapters."""


class Branch(nn.Module):
    """What a LoRA adds to a layer's output: scale * up(down(x)), in its own precision."""

    def __init__(self, down: nn.Module, up: nn.Module, scale: float):
        super().__init__()
        self.down, self.up, self.scale = down, up, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.down(x))


Branches = dict[str, list[Branch]]
"""Branches of a denoiser by the name of the layer that they stand beside."""


def fuse(pipeline: DiffusionPipeline, loras: Sequence[str], source: str) -> None:
    """Add the LoRAs' products to the weights of the pipeline's parts, which keep their types.

    loras: FILE or FILE:WEIGHT each; source: names the pipeline in errors.
    Raises ModelError for a file that is no LoRA, that has layers which the pipeline does not have,
    or whose sizes do not fit; for a pipeline that takes none; without the package peft.
    """
    with _in_float32(pipeline, loras, source) as (loader, modules):
        for path, weight in map(split_lora, loras):
            _load(loader, modules, path, source)
            loader.fuse_lora(components=list(loader.get_list_adapters()), lora_scale=weight)
            loader.unload_lora_weights()


def branches(pipeline: DiffusionPipeline, loras: Sequence[str], source: str) -> Branches:
    """The LoRAs' products of the denoiser's layers, whose weights stay as they are; those of text
    encoders are fused, which nothing quantizes. Arguments and errors as of `fuse`."""
    found: Branches = {}
    with _in_float32(pipeline, loras, source) as (loader, modules):
        denoisers = [part for part in ("unet", "transformer") if part in modules]
        for path, weight in map(split_lora, loras):
            _load(loader, modules, path, source)
            for name, layer in modules[denoisers[0]].named_modules():
                if _is_adapted(layer):
                    found.setdefault(name, []).append(_branch(layer, weight))
            others = [part for part in loader.get_list_adapters() if part not in denoisers]
            if others:
                loader.fuse_lora(components=others, lora_scale=weight)
            loader.unload_lora_weights()
    return found


def attach(denoiser: nn.Module, found: Branches) -> None:
    """Let the layers by those names, quantized or not, add their branches to what they give.

    In the denoiser's own type and on its device, and once however often it is asked.
    Raises ModelError for a layer that is not there.
    """
    parameter = next(denoiser.parameters())
    for name, parts in found.items():
        try:
            layer = denoiser.get_submodule(name)
        except AttributeError as error:
            raise ModelError(f"layer {name} of a LoRA branch is not in the denoiser") from error
        if any(isinstance(hook, _Adding) for hook in layer._forward_hooks.values()):
            continue
        own = [part.to(parameter.device, parameter.dtype).requires_grad_(False) for part in parts]
        layer.register_forward_hook(_Adding(own))


class _Adding:
    """A hook behind a layer. parts: what is added, of the layer's input."""

    def __init__(self, parts: Sequence[Branch]):
        self.parts = parts

    def __call__(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        for part in self.parts:
            output = output + part(args[0])
        return output


class _OfDenoiser:
    """Loads LoRAs into a denoiser alone, where its pipeline has no methods for it."""

    def __init__(self, name: str, denoiser: Any):
        self.name, self.denoiser = name, denoiser

    def load_lora_weights(self, path: str) -> None:
        self.denoiser.load_lora_adapter(load_file(path), prefix=self.name)

    def get_list_adapters(self) -> list[str]:
        return [self.name]

    def fuse_lora(self, components: Sequence[str], lora_scale: float) -> None:
        self.denoiser.fuse_lora(lora_scale)

    def unload_lora_weights(self) -> None:
        self.denoiser.unload_lora()


@contextmanager
def _in_float32(
    pipeline: DiffusionPipeline, loras: Sequence[str], source: str
) -> Iterator[tuple[Any, dict[str, nn.Module]]]:
    """What loads LoRAs, and the pipeline's modules, which have float32 within the block."""
    if not loras:
        yield None, {}
        return
    modules = {k: m for k, m in pipeline.components.items() if isinstance(m, nn.Module)}
    loader: Any = pipeline
    if not hasattr(pipeline, "load_lora_weights"):
        part = next((n for n in ("unet", "transformer") if n in modules), "")
        if not hasattr(modules.get(part), "load_lora_adapter"):
            raise ModelError(
                f"{source}: pipeline {type(pipeline).__name__} takes no LoRA",
                "leave model.lora (--lora) out",
            )
        loader = _OfDenoiser(part, modules[part])
    if importlib.util.find_spec("peft") is None:
        raise ModelError("model.lora needs the package peft", "pip install peft")
    types = {name: next(module.parameters()).dtype for name, module in modules.items()}
    for module in modules.values():
        module.to(torch.float32)
    yield loader, modules
    for name, module in modules.items():
        module.to(types[name])


def _load(loader: Any, modules: dict[str, nn.Module], path: str, source: str) -> None:
    """Put a file's layers beside the modules' own. Raises ModelError."""
    wanted = _layers_of(path)
    try:
        loader.load_lora_weights(path)
    except Exception as error:  # diffusers and PEFT raise many kinds; all mean: does not fit
        raise ModelError(
            f"{path}: does not fit {source}: {reason(error)}", "is it a LoRA of another model?"
        ) from error
    found = sum(_adapted(module) for module in modules.values())
    if found != wanted:
        raise ModelError(
            f"{path}: {wanted - found} of {wanted} layers are not in {source}",
            "is it a LoRA of another model?",
        )


def _layers_of(path: str) -> int:
    """The number of layers that a file changes, by its names. Raises ModelError."""
    if Path(path).suffix != ".safetensors":
        raise ModelError(f"{path}: not a .safetensors file", "other formats can hold code")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {error}", "is it a whole LoRA file?") from error
    for mark, kind in OTHER_KINDS.items():
        if any(mark in name for name in names):
            raise ModelError(f"{path}: is a {kind}, not a LoRA", "merge it with its own tool")
    count = sum(name.endswith(DOWN) for name in names)
    if not count:
        raise ModelError(
            f"{path}: is no LoRA (no tensor ends in {' or '.join(DOWN[:3])})", "give a LoRA file"
        )
    return count


def _adapted(module: nn.Module) -> int:
    """Layers of a module that have an adapter."""
    return sum(_is_adapted(layer) for layer in module.modules())


def _is_adapted(layer: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer)


def _branch(layer: Any, weight: float) -> Branch:
    """Read the branch of a layer of PEFT's with one adapter."""
    (adapter,) = layer.lora_A
    scale = weight * layer.scaling[adapter]
    return Branch(layer.lora_A[adapter], layer.lora_B[adapter], scale)
