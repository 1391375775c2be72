"""A pipeline folder of graphs, loaded as Optimum loads one, without Optimum.

diffusers' own pipeline computes, and in the place of each module stands what runs its file under
the names of Optimum's wrappers (optimum/onnxruntime/modeling_diffusion.py,
optimum/intel/openvino/modeling_diffusion.py).
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from transformers.utils import ModelOutput

from qncd_cli.backends.onnx.signal_stack import signal_stack_kept

FILES = "model.onnx", "openvino_model.xml"


class Part:
    """One file and the config.json beside it. Inputs go by name; those it has not are dropped."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, folder: Path):
        self.config = FrozenDict(json.loads((folder / "config.json").read_text()))
        path = next(folder / name for name in FILES if (folder / name).is_file())
        if path.suffix == ".onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            self.types = {
                i.name: np.int64 if "int64" in i.type else np.float32 for i in session.get_inputs()
            }
            self.ranks = {i.name: len(i.shape) for i in session.get_inputs()}
            names = [o.name for o in session.get_outputs()]
            self.compute = lambda given: dict(zip(names, session.run(names, given), strict=True))
        else:
            import openvino

            model = openvino.Core().read_model(path)
            self.types = {i.get_any_name(): i.get_element_type().to_dtype() for i in model.inputs}
            self.ranks = {i.get_any_name(): len(i.get_partial_shape()) for i in model.inputs}
            exact = {"INFERENCE_PRECISION_HINT": "f32"}
            with signal_stack_kept():
                compiled = openvino.Core().compile_model(model, "CPU", exact)
            self.compute = lambda given: {
                o.get_any_name(): compiled(given)[o] for o in compiled.outputs
            }

    def run(self, **given: Any) -> dict[str, torch.Tensor]:
        arrays = {name: np.asarray(given[name], kind) for name, kind in self.types.items()}
        assert {name: array.ndim for name, array in arrays.items()} == self.ranks
        return {name: torch.from_numpy(y.copy()) for name, y in self.compute(arrays).items()}


class UNet(Part):
    def __call__(self, sample, timestep, added_cond_kwargs=None, **given):
        found = self.run(sample=sample, timestep=timestep, **given, **(added_cond_kwargs or {}))
        return (found["out_sample"],)


class Transformer(Part):
    def __call__(self, **given):
        return (self.run(**given)["out_hidden_states"],)


class TextEncoder(Part):
    def __call__(self, input_ids, attention_mask=None, output_hidden_states=False, **_):
        found = self.run(input_ids=input_ids)
        states = [found.pop(name) for name in list(found) if name.startswith("hidden_states.")]
        if output_hidden_states:
            found["hidden_states"] = (*states[:-1], found["last_hidden_state"])
        return ModelOutput(**found)


class FirstStage(SimpleNamespace):
    """Decoder and encoder, one object as diffusers has it."""

    dtype, device = torch.float32, torch.device("cpu")

    def decode(self, latents, **_):
        return (self.decoder.run(latent_sample=latents)["sample"],)

    def encode(self, images):
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        found = self.encoder.run(sample=images)["latent_parameters"]
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(found))


def load(folder: Path) -> Any:
    """The pipeline that model_index.json names."""
    index = json.loads((folder / "model_index.json").read_text())
    parts: dict[str, Any] = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or name == "vae":
            continue
        library, kind = entry
        if kind is None:
            parts[name] = None
        elif name in ("unet", "transformer"):
            parts[name] = (UNet if name == "unet" else Transformer)(folder / name)
        elif name.startswith("text_encoder"):
            parts[name] = TextEncoder(folder / name)
        else:
            loader = getattr(importlib.import_module(library), kind)
            parts[name] = loader.from_pretrained(folder / name)
    decoder, encoder = Part(folder / "vae_decoder"), Part(folder / "vae_encoder")
    parts["vae"] = FirstStage(decoder=decoder, encoder=encoder, config=decoder.config)
    options = {
        name: value
        for name, value in index.items()
        if not isinstance(value, list) and not name.startswith("_")
    }
    pipeline = getattr(diffusers, index["_class_name"])(**parts, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
