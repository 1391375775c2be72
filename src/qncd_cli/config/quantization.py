"""The section `quantization` of the configuration: what becomes integers, and how."""

from __future__ import annotations

import difflib
from typing import Literal

from pydantic import Field, model_validator

from ..spec import FLOAT_BITS, MAX_ACTIVATION_BITS, Widths
from . import presets
from .section import MAX_STEPS, Bits, Observer, Section, check_bits, check_weight_bits


class WeightsConfig(Section):
    """Weights of convolutions and linear layers."""

    bits: Bits = Field(4, description="2 to 8 or 15 (two bytes), 32 for floating point")
    rounding: Literal["nearest", "gptq", "adaround", "brecq"] = Field(
        "gptq",
        description="to integers; adaround, brecq: learnt per layer or per block, from gptq on",
    )
    passes: int = Field(
        1,
        ge=1,
        le=1000,
        description="in which gptq goes along the network: layers of a later one get their inputs "
        "from behind the weights rounded before",
    )
    asymmetry: float = Field(
        0.0,
        ge=0,
        le=1,
        description="of gptq: how far outputs of full precision are the target where inputs have "
        "drifted away from it",
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
        check_weight_bits(self.bits, "weights")
        if self.passes > 1 and self.rounding == "nearest":
            raise ValueError("passes are those of gptq; rounding is nearest")
        if self.asymmetry > 0 and self.rounding != "gptq":
            raise ValueError(f"asymmetry is of rounding gptq, not of {self.rounding}")
        if self.budget is not None and not 2 <= self.budget <= 8:
            raise ValueError(f"budget takes 2 to 8 bits on average, got {self.budget:g}")
        if self.budget is not None and self.bits == FLOAT_BITS:
            raise ValueError(f"budget needs quantized weights, bits is {FLOAT_BITS}")
        return self


class ActivationsConfig(Section):
    """Inputs of convolutions and linear layers."""

    bits: Bits = Field(8, description="2 to 8 or more (in two passes), 32 for floating point")
    observer: Observer = Field(
        "mse", description="how a range is chosen; output: by the error of the layer's output"
    )
    percentile: float = Field(99.99, gt=50, le=100, description="of the percentile observer")
    timestep_groups: int = Field(1, ge=1, le=MAX_STEPS, description="sets of ranges over the steps")

    @model_validator(mode="after")
    def _check(self) -> ActivationsConfig:
        check_bits(self.bits, "activations", MAX_ACTIVATION_BITS)
        return self


class AttentionConfig(Section):
    """Operands of the two matrix products of attention."""

    bits: Bits = Field(8, description="of query, key and value")
    probabilities_bits: Bits = Field(8, description="of the softmax's output; 16 as well")

    @model_validator(mode="after")
    def _check(self) -> AttentionConfig:
        check_bits(self.bits, "attention")
        p_bits = self.probabilities_bits
        if 8 < p_bits < FLOAT_BITS and p_bits != 16:
            raise ValueError(
                f"probabilities take 2 to 8 or 16 bits, or {FLOAT_BITS} for floating point"
            )
        return self


class WeightsOverride(Section):
    """What to change for the weights of those layers."""

    bits: Bits | None = Field(None, description="instead of weights.bits")


class ActivationsOverride(Section):
    """What to change for the inputs of those layers."""

    bits: Bits | None = Field(None, description="instead of activations.bits")
    observer: Observer | None = Field(None, description="instead of activations.observer")


class LayerOverride(Section):
    """What to change for the layers whose name matches a pattern (shell wildcards)."""

    weights: WeightsOverride = WeightsOverride()
    activations: ActivationsOverride = ActivationsOverride()

    @model_validator(mode="after")
    def _check(self) -> LayerOverride:
        if self.weights.bits is not None:
            check_weight_bits(self.weights.bits, "weights")
        if self.activations.bits is not None:
            check_bits(self.activations.bits, "activations", MAX_ACTIVATION_BITS)
        return self


class SensitiveConfig(Section):
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


class QuantizationConfig(Section):
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
    first_margin: float = Field(
        1.0,
        ge=1,
        le=4,
        description="how far the first layer's input range of up to 8 bits reaches beyond that of "
        "calibration, which saw less of the initial noise than all samples will",
    )
    first_last_observer: Observer = Field(
        "minmax", description="clipping the outer layers' tails costs the most"
    )
    sensitive: SensitiveConfig = SensitiveConfig()
    rotation: Literal[0, 4, 16, 64] = Field(
        0,
        description="channels of a group in which inputs of linear layers without a smoothing "
        "factor are rotated (Hadamard) before they are quantized; 0: none",
    )
    step_weights: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how much Hessians, ranges by the layer's output and sensitive count a step by "
        "what its error does to the end of the trajectory: a power of that, 0: all steps alike",
    )
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
        check_weight_bits(self.first_last_bits, "first_last_bits")
        check_bits(
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
