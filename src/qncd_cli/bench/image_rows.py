"""The rows of `qncd bench --image`: what draws each, made from a quantized run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config.schema import Config
from ..models.first_stage import FirstStage, InDtype
from ..models.loading import DiffusionModel, open_pipeline
from ..models.prompt_length import untold
from ..models.text import Prompts, encode
from ..quant.layers import StepState
from ..runtime.denoiser import Denoiser, denoiser_costs
from ..runtime.preparation import Preparation, prepare
from ..runtime.sampled_model import SampledModel
from ..spec import Compile
from ..store.artifacts import Artifact
from .images import BASELINE, NNCF, Drawer, ImageRow
from .nncf import nncf_denoiser

KINDS = ("quantized", "noise_stats", "calibration")
OPTIONAL = ("reuse", "first_stage")
"""Artifacts of a run that rows are made of."""


@dataclass(frozen=True)
class RunRows:
    """config: of the run, its model in float32 on the CPU; found: its artifacts by kind; folder:
    where graphs are kept; tell: hears when one is made."""

    config: Config
    model: DiffusionModel
    found: Mapping[str, Artifact]
    folder: Path
    tell: Callable[[str], None]

    def build(self, row: ImageRow) -> Drawer:
        """What draws a row. The model stays as it is."""
        if row.name == NNCF:
            denoiser: Denoiser = nncf_denoiser(self.model, self.found["calibration"])
            drawer = self._full(denoiser, self.model.decode)
        elif row.integers:
            drawer = self._integers(row)
        else:
            drawer = self._float(row)
        return replace(drawer, encode=self._encoder(row.dtype))

    def _full(self, denoiser: Denoiser, decode: Callable[[Tensor], Tensor]) -> Drawer:
        """Full precision, and whatever else nothing is corrected of."""
        plain = without_reuse(self.config)
        sampled = SampledModel("full", denoiser, {"model": self.model.digest})
        return Drawer(plain, sampled, decode)

    def _float(self, row: ImageRow) -> Drawer:
        module, decode = self.model.denoiser, self.model.decode
        if row.name != BASELINE:  # which is as diffusers loads it
            module = _laid_out(copy.deepcopy(module).to(row.dtype))
        if row.compiled:
            module = cast(nn.Module, torch.compile(module, dynamic=False))
        if isinstance(decode, FirstStage) and row.name != BASELINE:
            decoder: nn.Module = InDtype(
                _laid_out(copy.deepcopy(decode.decoder).to(row.dtype)), row.dtype
            )
            if row.compiled:
                decoder = cast(nn.Module, torch.compile(decoder, dynamic=False))
            decode = decode.with_decoder(decoder)
        return self._full(Denoiser(module, StepState()), decode)

    def _integers(self, row: ImageRow) -> Drawer:
        config = self.config if "reuse" in row.words else without_reuse(self.config)
        seeds = range(config.sampling.seed, config.sampling.seed + 1)
        how = Preparation(
            seeds,
            1,
            sum(cost.macs for cost in denoiser_costs(config, self.model)),
            self.folder,
            self.tell,
            backend="int8",
            compile=Compile.YES if row.compiled else Compile.NO,
        )
        quantized = self.found["quantized"], self.found["noise_stats"]
        reuse = self.found["reuse"] if "reuse" in row.words else None
        decoder = self.found["first_stage"] if "decoder" in row.words else None
        sampled = prepare(config, self._in(row.dtype), quantized, how, reuse, decoder)
        return Drawer(config, sampled, sampled.decode or self.model.decode)

    def _in(self, dtype: torch.dtype) -> DiffusionModel:
        """The model as `model.dtype` loads it. Its own denoiser stays as it is."""
        if dtype == self.model.dtype:
            return self.model
        return replace(
            self.model, denoiser=copy.deepcopy(self.model.denoiser).to(dtype), dtype=dtype
        )

    def _encoder(self, dtype: torch.dtype) -> Callable[[Sequence[int]], object] | None:
        """Encodes the prompts of seeds by the pipeline's own text encoders, None without any."""
        sampling, source = self.config.sampling, self.config.model
        texts = sampling.prompts
        if texts is None:
            return None
        pipeline, _ = open_pipeline(
            source.source, source.compvis_config, source.tokenizer, self.tell, source.lora
        )
        parts: Any = pipeline.components
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                part.to(dtype).eval() if name.startswith("text_encoder") else part.to("meta")

        def of(seeds: Sequence[int]) -> object:
            asked = Prompts(
                tuple(texts[seed % len(texts)] for seed in seeds),
                sampling.negative_prompt,
                image_size=sampling.sides,
                guidance_scale=sampling.guidance_scale,
            )
            with torch.no_grad():
                return encode(pipeline, asked, untold)

        return of


def _laid_out(module: nn.Module) -> nn.Module:
    """Images with their channels last, which convolutions on CPUs are faster with."""
    return module.to(memory_format=torch.channels_last)


def without_reuse(config: Config) -> Config:
    """The same sampling with all of the denoiser computed."""
    sampling = config.sampling.model_copy(update={"reuse": None})
    return config.model_copy(update={"sampling": sampling})
