"""The configuration: a frozen tree of options, their ranges, and the digests of what a stage uses.

Building one is inert: no file or model is opened, nothing seeded, no device asked. Validation is
pydantic's; config/loading.py reads the tree from YAML and says in our words what pydantic refuses.
The large sections have files of their own beside this one.
"""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from ..errors import ConfigError
from ..store.digests import digest_of
from .calibration import CalibrationConfig
from .correction import CorrectionConfig
from .first_stage import FirstStageConfig
from .quantization import QuantizationConfig
from .sampling import ModelConfig, SamplingConfig
from .section import Section
from .text_encoders import TextEncodersConfig

Stage = Literal["calibrate", "quantize", "reuse", "first_stage", "text_encoders"]
SAMPLER = ("scheduler", "steps", "eta", "guidance_scale")
"""Keys of `sampling` that decide what a prediction is at a step."""
REUSING = ("ddim", "dpmsolver++", "euler", "flow-euler")
"""Schedulers that reuse across steps is made for: each timestep once, one prediction a step."""


class EvaluationConfig(Section):
    """What images are compared with."""

    num_samples: int = Field(
        10000, ge=2, description="samples a row of ablate, unless --num says otherwise"
    )
    reference: str | None = Field(
        None,
        description="a folder of images, an .npz or statistics file; packaged models have zoo",
    )


class Config(Section):
    """The tree of all keys."""

    model: ModelConfig
    sampling: SamplingConfig = SamplingConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    correction: CorrectionConfig = CorrectionConfig()
    first_stage: FirstStageConfig = FirstStageConfig()
    text_encoders: TextEncodersConfig = TextEncodersConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        groups = self.quantization.activations.timestep_groups
        if groups > self.sampling.calls:
            raise ValueError(
                f"quantization.activations.timestep_groups ({groups}) exceeds "
                f"sampling.steps ({self.sampling.calls})"
            )
        inter = self.correction.inter
        stepped = inter.method != "none" or self.quantization.step_weights != 0
        if self.sampling.images is not None and (stepped or self.sampling.reuse is not None):
            raise ValueError(
                "corrections, step weights and reuse are of trajectories from noise: with "
                "sampling.images set correction.inter.method: none, quantization.step_weights: 0 "
                "and sampling.reuse: null"
            )
        if self.sampling.control is not None and self.sampling.reuse is not None:
            raise ValueError(
                "a ControlNet is computed at every step: with sampling.control set "
                "sampling.reuse: null"
            )
        if inter.method == "runtime" and inter.first >= self.sampling.steps:
            raise ValueError(
                f"correction.inter.first ({inter.first}) is no step of the "
                f"sampler, which makes {self.sampling.steps} (sampling.steps)"
            )
        if self.sampling.reuse is not None and inter.method != "none":
            raise ValueError(
                f"correction.inter.method {inter.method} is of sampling without reuse: with "
                "sampling.reuse set it to none, and correction.reuse to what is to be mended"
            )
        encoders = self.text_encoders.bits
        if encoders is not None and self.sampling.prompts is None:
            raise ValueError(
                f"text_encoders.bits {encoders} is of models that read prompts (sampling.prompts): "
                "for others leave it null"
            )
        if encoders is not None and self.sampling.lora_branch:
            raise ValueError(
                "sampling.lora_branch may change text encoders, which were quantized without it: "
                "with it set text_encoders.bits: null"
            )
        if self.sampling.reuse is not None and self.sampling.scheduler not in REUSING:
            raise ValueError(
                f"sampling.reuse takes the schedulers {', '.join(REUSING)}, not "
                f"{self.sampling.scheduler}"
            )
        return self

    def check_sizes(self) -> None:
        """Raise ConfigError where calibration.sizes cannot be drawn beside sampling's own; what is
        sampled afterwards may be of any of them."""
        sizes, sampling = self.calibration.sizes or (), self.sampling
        if sampling.sides in sizes:
            height, width = sampling.sides
            raise ConfigError(
                f"calibration.sizes: {height} x {width} is sampling's own size", "leave it out"
            )
        if sizes and (sampling.images or sampling.control):
            raise ConfigError(
                "sampling.images and sampling.control have one shape", "leave calibration.sizes out"
            )

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def stage_inputs(self, stage: Stage) -> dict[str, Any]:
        """The part of the configuration that decides what a stage writes."""
        tree = self.to_dict()
        if stage == "text_encoders":  # whatever the denoiser is, and however it samples
            texts = {key: tree["sampling"][key] for key in ("prompts", "negative_prompt")}
            return {"model": tree["model"], **texts, "text_encoders": tree["text_encoders"]}
        inputs = {k: tree[k] for k in ("model", "calibration")}
        inputs["sampling"] = self.sampling.drawn_with()
        if self.calibration.sizes is None:  # as before there was the key
            del inputs["calibration"]["sizes"]
        if stage == "first_stage":  # latents come from full precision, whatever is quantized
            return {**inputs, "first_stage": tree["first_stage"]}
        budget = self.sampling.reuse
        if self.calibration.effort == "thorough":  # as before there was the key
            inputs["calibration"] = {k: v for k, v in tree["calibration"].items() if k != "effort"}
        if inputs["model"]["tokenizer"] is None:  # runs made before there was a key stay valid
            del inputs["model"]["tokenizer"]
        if inputs["model"]["base"] is None:
            del inputs["model"]["base"]
        if not inputs["model"]["lora"]:
            del inputs["model"]["lora"]
        if tree["sampling"]["guidance_scale"] < 1:  # once led away from prompts
            inputs["guidance"] = "off, or towards the null class"
        inputs["intra"] = intra = tree["correction"]["intra"]
        inputs["timestep_groups"] = tree["quantization"]["activations"]["timestep_groups"]
        inputs["split"] = tree["quantization"]["split_skip_connections"]
        if tree["quantization"]["rotation"]:
            inputs["rotation"] = tree["quantization"]["rotation"]
        if intra in ("smoothquant", "range"):
            inputs["smoothing_strength"] = tree["correction"]["smoothing_strength"]
        if intra == "auto":  # chosen by the error at the configured widths
            widths = self.to_dict()["quantization"]
            del widths["cache_time_embeddings"], widths["attention"]
            del widths["preset"], widths["strict"]
            del widths["activations"]["timestep_groups"]
            del widths["sensitive"], widths["bias_correction"], widths["first_margin"]
            del widths["step_weights"], widths["rotation"]
            weights = widths["weights"]
            nearest = weights["rounding"] == "nearest"
            widths["weights"] = {"bits": weights["bits"], "nearest": nearest}
            inputs["widths"] = widths
        if stage == "reuse":  # the quantized model is a parent of what it writes
            sampling = {key: inputs["sampling"][key] for key in SAMPLER}
            correction, field = tree["correction"]["reuse"], tree["correction"]["inter"]["field"]
            return {
                "sampling": sampling,
                "reuse": {
                    "budget": budget,
                    "mends": correction,
                    **({"field": field} if correction in ("output", "both") else {}),
                },
            }
        if stage == "quantize":
            quantization = inputs["quantization"] = tree["quantization"]
            del quantization["preset"], quantization["strict"]  # names only
            for section, key, value in (
                (quantization, "first_margin", 1.0),
                (quantization, "step_weights", 0.0),
                (quantization, "rotation", 0),
                (quantization["weights"], "passes", 1),
                (quantization["weights"], "asymmetry", 0.0),
            ):
                if section[key] == value:  # as before there was the key
                    del section[key]
            inter = tree["correction"]["inter"]
            inputs["estimator_target"] = inter["target"]
            if inter["field"] != 8:  # as before there was the key
                inputs["stepwise_field"] = inter["field"]
        return inputs

    def stage_digest(self, stage: Stage) -> str:
        return digest_of(self.stage_inputs(stage))
