"""The layer plan: what the configuration wants of each layer."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ..config.quantization import LayerOverride
from ..config.schema import Config
from ..models.topology import is_conditioning_layer, is_outer_layer, time_layers, weight_layers
from ..spec import FLOAT_BITS
from ..store.layer_entry import LayerEntry


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What is to become of one convolution or linear layer."""

    name: str
    layer: nn.Conv2d | nn.Linear
    weight_bits: int
    activation_bits: int
    observer: str

    @property
    def is_conv(self) -> bool:
        return isinstance(self.layer, nn.Conv2d)

    @property
    def is_pointwise(self) -> bool:
        """Whether every output value reads one position: no padding that a shift would move."""
        layer = self.layer
        return not isinstance(layer, nn.Conv2d) or (
            layer.kernel_size == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
        )

    @property
    def channel_axis(self) -> int:
        """Axis of the channels in the layer's input."""
        return 1 if self.is_conv else -1

    @property
    def in_channels(self) -> int:
        layer = self.layer
        return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features

    @property
    def in_features(self) -> int:
        """Inputs of one output value: C_in * kh * kw of a convolution."""
        return self.layer.weight[0].numel()

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer on x with another weight and without its bias."""
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(
                x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
            )
        return F.linear(x, weight)

    @property
    def stays_float(self) -> bool:
        return self.weight_bits == self.activation_bits == FLOAT_BITS

    def rotates(self, config: Config) -> bool:
        """Whether its input's channels are to be rotated: a linear layer's that reads features."""
        group = config.quantization.rotation
        if group == 0 or self.is_conv or self.stays_float or self.in_channels % group:
            return False
        return not (is_outer_layer(self.name) or is_conditioning_layer(self.name))

    def entry(self, *, smoothed: bool, shifted: bool, rotated: bool = False) -> LayerEntry:
        """The layer's entry in the artifact before its weight is rounded."""
        return LayerEntry(
            kind="conv" if self.is_conv else "linear",
            weight_shape=tuple(self.layer.weight.shape),
            in_channels=self.in_channels,
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            observer=self.observer,
            smoothed=smoothed,
            shifted=shifted,
            rotated=rotated or None,
            bias=self.layer.bias is not None or shifted,  # a shift moves into the bias
        )


def plan_layers(config: Config, denoiser: nn.Module) -> list[LayerPlan]:
    """Bits and observer of every layer that does not depend on the timestep alone.

    The first and the last layer have bits of their own, which those layers share that compute on
    timestep and class, one vector per sample; overrides come last.
    """
    q = config.quantization
    plans = []
    timed = time_layers(denoiser)
    for name, layer in weight_layers(denoiser).items():
        if name in timed:
            continue
        weight_bits, activation_bits = q.weights.bits, q.activations.bits
        observer: str = q.activations.observer
        if is_outer_layer(name) or is_conditioning_layer(name):
            observer = q.first_last_observer
            if weight_bits != FLOAT_BITS:
                weight_bits = q.first_last_bits
            if activation_bits != FLOAT_BITS:
                activation_bits = q.first_last_activation_bits
        override = override_of(name, q.overrides)
        if override is not None:
            weight_bits = override.weights.bits or weight_bits
            activation_bits = override.activations.bits or activation_bits
            observer = override.activations.observer or observer
        plans.append(LayerPlan(name, layer, weight_bits, activation_bits, observer))
    return plans


def range_observer(observer: str) -> str:
    """What chooses a range where no layer's output is there to judge it."""
    return "minmax" if observer == "output" else observer


def has_own_weight_bits(plan: LayerPlan, config: Config) -> bool:
    """Whether first_last_bits or an override gives the layer its weight bits, not weights.bits."""
    override = override_of(plan.name, config.quantization.overrides)
    if override is not None and override.weights.bits is not None:
        return True
    return is_outer_layer(plan.name) or is_conditioning_layer(plan.name)


def override_of(name: str, overrides: dict[str, LayerOverride]) -> LayerOverride | None:
    """The last pattern that matches wins."""
    found = None
    for pattern, override in overrides.items():
        if fnmatch.fnmatchcase(name, pattern):
            found = override
    return found
