"""The configuration: a frozen tree of options, their ranges, and the digests of what a stage uses.

Building one is inert: no file or model is opened, nothing seeded, no device asked. Validation is
pydantic's; config/loading.py reads the tree from YAML and says in our words what pydantic refuses.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..spec import FLOAT_BITS, MAX_ACTIVATION_BITS, WIDE_WEIGHT_BITS, Widths
from ..store.digests import digest_of
from . import presets

MAX_STEPS = 1000
MAX_GUIDANCE = 100
"""Published uses stay below 20; far above, every image is saturated or not finite."""
NOISE_TRAJECTORIES = 32

Bits = Annotated[int, Field(ge=2, le=FLOAT_BITS)]


Observer = Literal["minmax", "moving_average", "percentile", "mse", "output"]
"""How a range is chosen; output: by the error of the layer's output."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _without_mark(text: Any) -> Any:
    """A text without byte order marks, which editors put at the beginning of files."""
    return text.replace("\ufeff", "") if isinstance(text, str) else text


def _check_bits(bits: int, what: str, most: int = 8) -> None:
    if most < bits < FLOAT_BITS:
        raise ValueError(f"{what} takes 2 to {most} bits, or {FLOAT_BITS} for floating point")


def _check_weight_bits(bits: int, what: str) -> None:
    if 8 < bits < FLOAT_BITS and bits != WIDE_WEIGHT_BITS:
        raise ValueError(
            f"{what} takes 2 to 8 or {WIDE_WEIGHT_BITS} bits, or {FLOAT_BITS} for floating point"
        )


class ModelConfig(_Section):
    """The model, and how it is read."""

    source: str = Field(description="zoo:NAME, a diffusers folder or hub id, a CompVis checkpoint")
    compvis_config: str | None = Field(
        None, description="of a CompVis checkpoint: the YAML that was published with it"
    )
    tokenizer: str | None = Field(
        None, description="of a Stable Diffusion checkpoint: a folder or hub id with CLIP's"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="precision of what stays unquantized"
    )


class SamplingConfig(_Section):
    """How images are drawn, for calibration too; null: the model's own."""

    scheduler: Literal[
        "ddim", "ddpm", "pndm", "plms", "dpmsolver++", "euler", "unipc", "flow-euler"
    ] = Field(
        "ddim",
        description="default: the model's own; flow-euler is of rectified flows (SD3, FLUX), and "
        "of no others",
    )
    steps: int = Field(
        20, ge=1, le=MAX_STEPS, description="denoising steps (default: of the model's pipeline)"
    )
    eta: float = Field(0.0, ge=0, le=1, description="stochasticity of DDIM (1: DDPM's variance)")
    guidance_scale: float = Field(
        3.0,
        ge=0,
        le=MAX_GUIDANCE,
        description="classifier-free guidance (default: of the model's pipeline); off at 1, in "
        "diffusers' own pipelines at anything up to 1 (0 keeps the prompt); of class-conditional "
        "models 0 is the null class alone, whatever the class; FLUX.1-dev reads it as an input",
    )
    seed: int = Field(0, ge=0, description="seed of the first sample; the next ones count up")
    classes: Literal["all"] | tuple[int, ...] = Field(
        "all", description="class labels (prompts by number), taken in turn by seed"
    )
    prompts: tuple[str, ...] | None = Field(
        None, description="of a text model: a list, or a file with one a line; in turn by seed"
    )
    negative_prompt: str = Field("", description="what guidance leads a text model away from")
    image_size: Annotated[int, Field(ge=16)] | None = Field(
        None, description="of a text model, height and width in pixels, if not its own"
    )

    @model_validator(mode="before")
    @classmethod
    def _list_is_a_tuple(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        lists = {k: tuple(v) for k in ("classes", "prompts") if isinstance(v := data.get(k), list)}
        data = {**data, **lists}
        if isinstance(data.get("prompts"), tuple):
            data["prompts"] = tuple(_without_mark(text) for text in data["prompts"])
        return {**data, "negative_prompt": _without_mark(data.get("negative_prompt", ""))}

    @model_validator(mode="after")
    def _check(self) -> SamplingConfig:
        if self.classes == ():
            raise ValueError("classes must not be empty; 'all' takes every class in turn")
        if self.prompts == ():
            raise ValueError("prompts must not be empty")
        for key in ("negative_prompt", "image_size"):
            if getattr(self, key) and self.prompts is None:
                raise ValueError(f"{key} belongs to text models, which need prompts")
        if self.eta > 0 and self.scheduler != "ddim":
            raise ValueError(f"eta applies to the ddim scheduler, not to {self.scheduler}")
        return self


class CalibrationConfig(_Section):
    """What is observed in full precision before anything is quantized."""

    trajectories: int = Field(128, ge=1, description="full-precision sampling trajectories")
    batch_size: int = Field(
        32, ge=1, description="trajectories drawn together; fewer need less memory"
    )
    seed: int = Field(
        1_000_000, ge=0, description="seed of the first trajectory, away from the samples' seeds"
    )
    noise_trajectories: int = Field(
        NOISE_TRAJECTORIES,
        ge=1,
        description="how many of them also measure the quantization noise (default: 32, or all)",
    )

    @model_validator(mode="before")
    @classmethod
    def _as_many_as_there_are(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("trajectories"), int):
            return data
        return {"noise_trajectories": min(NOISE_TRAJECTORIES, data["trajectories"]), **data}

    @model_validator(mode="after")
    def _check(self) -> CalibrationConfig:
        if self.noise_trajectories > self.trajectories:
            raise ValueError("noise_trajectories cannot exceed trajectories")
        return self


class WeightsConfig(_Section):
    """Weights of convolutions and linear layers."""

    bits: Bits = Field(4, description="2 to 8 or 15 (two bytes), 32 for floating point")
    rounding: Literal["nearest", "gptq", "adaround", "brecq"] = Field(
        "gptq",
        description="to integers; adaround, brecq: learnt per layer or per block, from gptq on",
    )
    iterations: int = Field(
        500, ge=1, description="of adaround and brecq, gradient steps per layer or block"
    )
    reconstruction_batch: int = Field(16, ge=1, description="samples of one gradient step")
    reconstruction_rows: int = Field(
        256, ge=1, description="calibration inputs that layers or blocks are learnt and judged on"
    )
    learn_bias: bool = Field(False, description="adaround and brecq also learn the biases")
    learn_input_scale: bool = Field(
        False, description="adaround and brecq also learn the scales of the layers' inputs"
    )
    budget: float | None = Field(
        None, description="average bits: 2, 3, 4, 6 or 8 per layer by sensitivity, not weights.bits"
    )

    @model_validator(mode="after")
    def _check(self) -> WeightsConfig:
        _check_weight_bits(self.bits, "weights")
        if self.budget is not None and not 2 <= self.budget <= 8:
            raise ValueError(f"budget takes 2 to 8 bits on average, got {self.budget:g}")
        if self.budget is not None and self.bits == FLOAT_BITS:
            raise ValueError(f"budget needs quantized weights, bits is {FLOAT_BITS}")
        return self


class ActivationsConfig(_Section):
    """Inputs of convolutions and linear layers."""

    bits: Bits = Field(8, description="2 to 8 or more (in two passes), 32 for floating point")
    observer: Observer = Field(
        "mse", description="how a range is chosen; output: by the error of the layer's output"
    )
    percentile: float = Field(99.99, gt=50, le=100, description="of the percentile observer")
    timestep_groups: int = Field(1, ge=1, le=MAX_STEPS, description="sets of ranges over the steps")

    @model_validator(mode="after")
    def _check(self) -> ActivationsConfig:
        _check_bits(self.bits, "activations", MAX_ACTIVATION_BITS)
        return self


class AttentionConfig(_Section):
    """Operands of the two matrix products of attention."""

    bits: Bits = Field(8, description="of query, key and value")
    probabilities_bits: Bits = Field(8, description="of the softmax's output; 16 as well")

    @model_validator(mode="after")
    def _check(self) -> AttentionConfig:
        _check_bits(self.bits, "attention")
        p_bits = self.probabilities_bits
        if 8 < p_bits < FLOAT_BITS and p_bits != 16:
            raise ValueError(
                f"probabilities take 2 to 8 or 16 bits, or {FLOAT_BITS} for floating point"
            )
        return self


class WeightsOverride(_Section):
    """What to change for the weights of those layers."""

    bits: Bits | None = Field(None, description="instead of weights.bits")


class ActivationsOverride(_Section):
    """What to change for the inputs of those layers."""

    bits: Bits | None = Field(None, description="instead of activations.bits")
    observer: Observer | None = Field(None, description="instead of activations.observer")


class LayerOverride(_Section):
    """What to change for the layers whose name matches a pattern (shell wildcards)."""

    weights: WeightsOverride = WeightsOverride()
    activations: ActivationsOverride = ActivationsOverride()

    @model_validator(mode="after")
    def _check(self) -> LayerOverride:
        if self.weights.bits is not None:
            _check_weight_bits(self.weights.bits, "weights")
        if self.activations.bits is not None:
            _check_bits(self.activations.bits, "activations", MAX_ACTIVATION_BITS)
        return self


class SensitiveConfig(_Section):
    """Finer codes for the layers whose rounding changes the denoiser's output most."""

    weight_bits: float = Field(
        0.0,
        ge=0,
        le=4,
        description="extra bits of weights, on average over all; above 8 bits in two passes",
    )
    activation_bits: float = Field(
        0.0,
        ge=0,
        le=10,
        description="extra bits of inputs, on average over MACs; above 8 bits in two passes",
    )


class QuantizationConfig(_Section):
    """What becomes integers, and how."""

    preset: str | None = Field(
        None,
        description="fills the keys that are not set, see qncd models; best unless another one is "
        "named, null for none",
    )
    strict: bool = Field(False, description="quantize what the preset's paper leaves in float too")
    weights: WeightsConfig = WeightsConfig()
    activations: ActivationsConfig = ActivationsConfig()
    attention: AttentionConfig = AttentionConfig()
    first_last_bits: Bits = Field(8, description="weights of the outer layers; 15: two bytes")
    first_last_activation_bits: Bits = Field(
        16, description="their activations; above 8 bits in two passes of 8-bit kernels"
    )
    first_last_observer: Observer = Field(
        "minmax", description="clipping the outer layers' tails costs the most"
    )
    sensitive: SensitiveConfig = SensitiveConfig()
    bias_correction: bool = Field(
        False, description="add the mean error of a layer's output to its bias, per timestep group"
    )
    split_skip_connections: bool = Field(
        True, description="scales of their own for the two halves of a concatenation"
    )
    cache_time_embeddings: bool = Field(
        True, description="evaluate time-embedding layers once per step, in full precision"
    )
    overrides: dict[str, LayerOverride] = Field(
        {}, description="layers by name, with wildcards, and what to change for them"
    )

    @model_validator(mode="after")
    def _check(self) -> QuantizationConfig:
        _check_weight_bits(self.first_last_bits, "first_last_bits")
        _check_bits(
            self.first_last_activation_bits, "first_last_activation_bits", MAX_ACTIVATION_BITS
        )
        if self.preset is not None and self.preset not in presets.PRESETS:
            close = difflib.get_close_matches(self.preset, presets.PRESETS, n=1)
            known = f"did you mean {close[0]}?" if close else ", ".join(presets.PRESETS)
            raise ValueError(f"unknown preset {self.preset} ({known})")
        return self

    @property
    def widths(self) -> Widths:
        """Bits of the layers that neither a preset, an override nor measurement gives others."""
        return Widths(self.weights.bits, self.activations.bits)


class InterConfig(_Section):
    """Correction of the noise that accumulates over the steps (docs/method.md).

    A run-time estimate with granularity batch is one number for all samples that are drawn
    together, as published; part below 1 makes estimates for the first samples of a batch alone.
    With either, a sample depends on the batch that it is drawn in.
    """

    method: Literal["none", "runtime", "ptqd", "affine"] = Field(
        "none",
        description="runtime estimates the noise while sampling; ptqd and affine use what quantize "
        "measured and cost nothing",
    )
    target: Literal["injected", "total"] = Field(
        "total", description="the noise of the step itself, as published, or all of it so far"
    )
    granularity: Literal["batch", "tensor", "channel"] = Field(
        "channel",
        description="over what a run-time estimate is averaged: all samples that are drawn "
        "together, as published (they then depend on their batch), one sample, one of its channels",
    )
    interval: int = Field(5, ge=1, description="steps between two run-time estimates")
    first: int = Field(0, ge=0, description="the step, from 0, of the first run-time estimate")
    repeat: bool = Field(
        False,
        description="make the step of an estimate twice, as published: first without any "
        "correction, then with the new estimate",
    )
    part: float = Field(
        1.0,
        gt=0,
        le=1,
        description="of a batch that has run-time estimates of its own; below 1 the rest takes "
        "their mean, and samples depend on their batch",
    )
    baseline: Literal["none", "full_precision"] = Field(
        "full_precision", description="what full precision reads as well is no noise"
    )
    slope: bool = Field(False, description="also divide by the slope over full precision's")

    @model_validator(mode="after")
    def _check(self) -> InterConfig:
        if self.slope and self.baseline == "none":
            raise ValueError("slope needs baseline full_precision to compare with")
        return self

    @property
    def depends_on_batch(self) -> bool:
        """Whether a sample is not the same in every batch."""
        return self.method == "runtime" and (self.part < 1 or self.granularity == "batch")

    def identity(self) -> dict[str, Any]:
        """What of it decides images."""
        if self.method == "none":
            return {"method": "none"}
        tree = self.model_dump()
        if (
            self.part == 1 or not self.depends_on_batch
        ):  # sets drawn before there was a part stay valid
            del tree["part"]
        for key in ("first", "repeat"):  # and those drawn before these keys were there
            if tree[key] == InterConfig.model_fields[key].default:
                del tree[key]
        return tree


class CorrectionConfig(_Section):
    """Corrections of the noise inside the network (intra) and over the steps (inter)."""

    intra: Literal["none", "embedding", "smoothquant", "range", "auto"] = Field(
        "none",
        description="how smoothing factors are made; auto: per layer the one with the least output "
        "error",
    )
    smoothing_strength: float = Field(0.5, ge=0, le=1, description="of smoothquant and range")
    inter: InterConfig = InterConfig()


class EvaluationConfig(_Section):
    """What images are compared with."""

    num_samples: int = Field(
        10000, ge=2, description="samples a row of ablate, unless --num says otherwise"
    )
    reference: str | None = Field(
        None,
        description="a folder of images, an .npz or statistics file; packaged models have zoo",
    )


class Config(_Section):
    """The tree of all keys."""

    model: ModelConfig
    sampling: SamplingConfig = SamplingConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    correction: CorrectionConfig = CorrectionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        groups = self.quantization.activations.timestep_groups
        if groups > self.sampling.steps:
            raise ValueError(
                f"quantization.activations.timestep_groups ({groups}) exceeds "
                f"sampling.steps ({self.sampling.steps})"
            )
        inter = self.correction.inter
        if inter.method == "runtime" and inter.first >= self.sampling.steps:
            raise ValueError(
                f"correction.inter.first ({inter.first}) is no step of the "
                f"sampler, which makes {self.sampling.steps} (sampling.steps)"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def stage_inputs(self, stage: Literal["calibrate", "quantize"]) -> dict[str, Any]:
        """The part of the configuration that decides what a stage writes."""
        tree = self.to_dict()
        inputs = {k: tree[k] for k in ("model", "sampling", "calibration")}
        inputs["sampling"].pop("seed")
        if inputs["model"]["tokenizer"] is None:  # runs made before there was one stay valid
            del inputs["model"]["tokenizer"]
        if tree["sampling"]["guidance_scale"] < 1:  # once led away from prompts
            inputs["guidance"] = "off, or towards the null class"
        inputs["intra"] = intra = tree["correction"]["intra"]
        inputs["timestep_groups"] = tree["quantization"]["activations"]["timestep_groups"]
        inputs["split"] = tree["quantization"]["split_skip_connections"]
        if intra in ("smoothquant", "range"):
            inputs["smoothing_strength"] = tree["correction"]["smoothing_strength"]
        if intra == "auto":  # chosen by the error at the configured widths
            widths = self.to_dict()["quantization"]
            del widths["cache_time_embeddings"], widths["attention"]
            del widths["preset"], widths["strict"]
            del widths["activations"]["timestep_groups"]
            del widths["sensitive"], widths["bias_correction"]
            weights = widths["weights"]
            nearest = weights["rounding"] == "nearest"
            widths["weights"] = {"bits": weights["bits"], "nearest": nearest}
            inputs["widths"] = widths
        if stage == "quantize":
            inputs["quantization"] = tree["quantization"]
            del inputs["quantization"]["preset"], inputs["quantization"]["strict"]  # names only
            inputs["estimator_target"] = tree["correction"]["inter"]["target"]
        return inputs

    def stage_digest(self, stage: Literal["calibrate", "quantize"]) -> str:
        return digest_of(self.stage_inputs(stage))
