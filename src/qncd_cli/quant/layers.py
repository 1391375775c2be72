"""Quantized convolution and linear layers: buffers, and a function that computes with them.

A layer decides nothing: codes, scales and ranges come from an artifact; the arithmetic comes from
a backend, a function (layer, x) -> output; the timestep group comes from a StepState that the
denoising call sets. forward never calibrates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import FLOAT_BITS, QSpec, activation_spec, weight_spec
from .affine import QParams, dequantize
from .packing import unpack
from .smoothing import IDENTITY, SmoothingFactor

Compute = Callable[["QuantizedLayer", Tensor], Tensor]


@dataclass
class StepState:
    """Which timestep the running call of the denoiser is at.

    timestep: of the noise schedule; group: index of the activation ranges that hold there. traced:
    while a graph is traced, its inputs in the place of the rows of tables, by module and name.
    """

    timestep: float = 0.0
    group: int = 0
    traced: Mapping[tuple[nn.Module, str], Tensor] | None = None


class SteppedModule(nn.Module):
    """A module with tables: buffers [G, ...], of which one row holds at each timestep group."""

    def __init__(self, step: StepState):
        super().__init__()
        self.step = step
        self.tables: list[str] = []

    def register_table(self, name: str, table: Tensor | None) -> None:
        self.register_buffer(name, table)
        if table is not None:
            self.tables.append(name)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SteppedModule:
        """What moves a module or changes its type moves this one; its tensors keep their types.

        Scales in 16 bits are other scales, those of another quantization.
        """
        before = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def now(self, name: str) -> Tensor:
        """The row of a table that holds at the current timestep group."""
        if self.step.traced is not None:
            return self.step.traced[self, name]
        return self.get_buffer(name)[self.step.group]


class QuantizedLayer(SteppedModule):
    """One Conv2d or Linear layer with integer weights and quantized input.

    Buffers: weight (packed codes), weight_scale [O], weight_zero_point [O] or None,
    input_scale, input_zero_point [G] or None (input stays float), smoothing [C_in] or None,
    shift [C_in] or None (taken off before the division; its product with the weight is in the
    bias), bias [O] or None, bias_correction [G, O] or None (added at its timestep group).
    rotation: channels of a group that is rotated before the division, 0 for none.
    activation_bits above 8: codes of up to 16 bits, two 8-bit passes of an integer kernel over
    the high and the low byte. weight_bits 32: weight is float32 with the smoothing folded in.
    prepared: what backends made of the codes and keep beside them, each under a name of its own.
    low_memory: it lives for one call, and is made again at the next.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    input_scale: Tensor
    input_zero_point: Tensor
    smoothing: Tensor | None
    shift: Tensor | None
    bias: Tensor | None
    bias_correction: Tensor | None

    def __init__(
        self,
        original: nn.Conv2d | nn.Linear,
        tensors: dict[str, Tensor],
        weight_bits: int,
        activation_bits: int,
        step: StepState,
        compute: Compute,
        *,
        low_memory: bool = False,
    ):
        super().__init__(step)
        self.low_memory = low_memory
        self.weight_bits = weight_bits
        self.activation_bits = activation_bits
        self.weight_shape = tuple(original.weight.shape)
        self.is_conv = isinstance(original, nn.Conv2d)
        if isinstance(original, nn.Conv2d):
            self.stride: tuple[int, ...] = original.stride
            self.padding = original.padding
            self.dilation, self.groups = original.dilation, original.groups
        self.compute = compute
        self.prepared: dict[str, Any] = {}
        self.rotation = SmoothingFactor.of(tensors).rotation if "rotation" in tensors else 0
        for name in ("weight", "weight_scale", "weight_zero_point", "smoothing", "shift", "bias"):
            self.register_buffer(name, tensors.get(name))
        for name in ("input_scale", "input_zero_point", "bias_correction"):
            self.register_table(name, tensors.get(name))

    @property
    def in_channels(self) -> int:
        return self.weight_shape[1]

    @property
    def input_spec(self) -> QSpec | None:
        return None if self.activation_bits == FLOAT_BITS else activation_spec(self.activation_bits)

    def input_qparams(self) -> QParams:
        """Input range of the current timestep group."""
        return QParams(self.now("input_scale"), self.now("input_zero_point"))

    @property
    def factor(self) -> SmoothingFactor:
        """What smooths the layer's input."""
        if self.smoothing is None:
            return IDENTITY
        return SmoothingFactor(self.smoothing, 0, self.shift, self.rotation)

    def smoothed(self, x: Tensor) -> Tensor:
        """(x H - shift) / S along the channels ([N, C, H, W] or [..., C])."""
        return self.factor.apply(x, 1 if self.is_conv else -1)

    def bias_now(self) -> Tensor | None:
        """bias and its correction at the current timestep group, [O]."""
        if self.bias_correction is None:
            return self.bias
        correction = self.now("bias_correction")
        return correction if self.bias is None else self.bias + correction

    def integer_weight(self) -> Tensor:
        """q - zero_point [O, ...]: what an integer kernel multiplies with.

        int8, or int16 for codes of two bytes.
        """
        dtype = torch.int8 if self.weight_bits <= 8 else torch.int16
        codes = unpack(self.weight, self.weight_bits, self.weight_shape, dtype)
        if self.weight_zero_point is not None:  # codes of less than 8 bits, as it is itself
            zero_point = self.weight_zero_point.to(dtype)
            codes = codes - zero_point.reshape(-1, *[1] * (codes.ndim - 1))
        return codes

    def float_weight(self) -> Tensor:
        """The weight that the codes stand for, float32, smoothing folded in."""
        if self.weight_bits == FLOAT_BITS:
            return self.weight
        centred = QParams(self.weight_scale, torch.zeros_like(self.weight_scale))
        return dequantize(self.integer_weight(), centred, weight_spec(self.weight_bits))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        """What was prepared on another device goes when the layer is moved."""
        before = self.weight.device
        super()._apply(fn, recurse)
        if self.weight.device != before:
            self.prepared.clear()
        return self

    def extra_repr(self) -> str:
        return f"W{self.weight_bits}A{self.activation_bits}, weight {list(self.weight_shape)}"


class CachedTimestepLayer(nn.Module):
    """A layer whose output depends on the timestep alone, evaluated once per timestep.

    The embedding of a timestep is the same for every sample of a batch, so one row is computed in
    full precision on first use and repeated from then on (TFMQ-DM treats these layers apart for
    the same reason). Only valid where nothing else (a class embedding) enters the input.
    """

    def __init__(self, original: nn.Module, step: StepState):
        super().__init__()
        self.original = original
        self.step = step
        self._rows: dict[float, Tensor] = {}

    def forward(self, x: Tensor, *args) -> Tensor:
        if self.step.traced is not None:  # a graph has no memory, and one row costs little
            row = self.original(x[:1], *args)
        else:
            row = self._row(x, *args)
        return row.expand(x.shape[0], *row.shape[1:])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CachedTimestepLayer:
        """Rows follow the layer."""
        super()._apply(fn, recurse)
        self._rows = {timestep: fn(row) for timestep, row in self._rows.items()}
        return self

    def _row(self, x: Tensor, *args) -> Tensor:
        row = self._rows.get(self.step.timestep)
        if row is None:
            row = self.original(x[:1], *args).detach()
            self._rows[self.step.timestep] = row
        return row
