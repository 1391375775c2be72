"""A quantized denoiser as one ONNX graph, called as a signature says; and modules as they are.

The graph holds the ranges of all timestep groups and finds those of its call: all rows of a call
are at one timestep.

Each quantized layer and each attention's products are traced as one operator of our own, which
`onnx_layers` then spells out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ...quant.attention import AttentionProducts
from ...quant.layers import QuantizedLayer, StepState
from .. import int8
from ..reference import simulate_with
from .layers import Form, Writer
from .signature import DenoiserSignature, Inputs, Signature

OPSET = 21
DOMAIN = "qncd"
LARGEST = 1_500_000_000
"""Bytes of weights inside of the file; protobuf allows 2 GiB."""


class _Rows(dict):
    """The rows of all tables at a timestep group, by module and name, as they are asked for."""

    def __init__(self, group: Tensor):
        super().__init__()
        self.group = group

    def __missing__(self, key: tuple[nn.Module, str]) -> Tensor:
        module, name = key
        return module.get_buffer(name)[self.group]


class _Whole(nn.Module):
    """A module that takes the signature's inputs; of a denoiser, with nothing outside of them."""

    def __init__(self, module: nn.Module, signature: Signature):
        super().__init__()
        self.module, self.signature = module, signature

    def forward(self, inputs: Inputs) -> Any:
        return self.signature.call(self.module, inputs)


class _Denoiser(_Whole):
    def __init__(
        self,
        module: nn.Module,
        signature: DenoiserSignature,
        step: StepState,
        group_bounds: tuple[float, ...],
    ):
        super().__init__(module, signature)
        self.timestep, self.step = signature.timestep, step
        self.register_buffer("bounds", torch.tensor(group_bounds, dtype=torch.float32))

    def forward(self, inputs: Inputs) -> Any:
        group = (self.timestep(inputs) < self.get_buffer("bounds")).sum()  # denoiser.timestep_group
        self.step.traced = _Rows(group)
        return super().forward(inputs)


def trace(
    module: nn.Module,
    step: StepState,
    group_bounds: tuple[float, ...],
    signature: DenoiserSignature,
) -> ir.Model:
    """The denoiser with operators of our own in it; its layers cannot compute any more.

    Raises whatever torch raises where a model cannot be traced.
    """
    for name, part in module.named_modules():
        if isinstance(part, QuantizedLayer):
            part.compute = _simulated(part.float_weight()) if int8.why_not(part) else _layer(name)
        elif isinstance(part, AttentionProducts):
            part.products = _products(name, step)  # type: ignore[method-assign]
    try:
        return _traced(_Denoiser(module, signature, step, group_bounds), signature)
    finally:
        step.traced = None


def trace_float(module: nn.Module, signature: Signature) -> ir.Model:
    """A module without quantized layers, in standard operators alone. Raises as trace does."""
    return _traced(_Whole(module, signature), signature)


def _traced(whole: _Whole, signature: Signature) -> ir.Model:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            whole,
            (),
            kwargs={"inputs": dict(signature.inputs)},
            input_names=list(signature.inputs),
            output_names=list(signature.outputs),
            dynamic_shapes={"inputs": signature.sizes},
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


def spell_out(
    model: ir.Model, parts: Mapping[str, nn.Module], form: Form, *, any_cpu: bool
) -> ir.Model:
    """A copy of a traced model with standard operators only. parts: its modules by name; any_cpu:
    whether products are exact on CPUs without VNNI as well."""
    model = model.clone()
    for node in list(model.graph):
        if node.domain != DOMAIN:
            continue
        name = node.attributes["name"].as_string()
        group, *operands = (value for value in node.inputs if value is not None)
        part, writer = parts[name], Writer(form, name, group, any_cpu)
        if isinstance(part, QuantizedLayer):
            output = writer.layer(part, operands[0])
        else:
            assert isinstance(part, AttentionProducts)
            query, key, value, *mask = operands
            output = writer.attention(part, query, key, value, mask[0] if mask else None)
        for constant in writer.tape.initializers:
            model.graph.register_initializer(constant)
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], writer.tape.nodes, node.outputs, [output]
        )
    model.opset_imports.pop(DOMAIN, None)
    model.graph.sort()
    return model


def save(model: ir.Model, path: Path) -> None:
    """path: an .onnx file; weights too large for one file go to a second one beside it."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    beside = f"{path.name}.data" if size > LARGEST else None
    ir.save(model, path, external_data=beside)


Compute = Callable[[QuantizedLayer, Tensor], Tensor]


def _simulated(weight: Tensor) -> Compute:
    """A compute for layers without an integer operator. weight: a constant, made before tracing."""

    def compute(layer: QuantizedLayer, x: Tensor) -> Tensor:
        qparams = None if layer.input_spec is None else layer.input_qparams()
        return simulate_with(layer, x, weight, layer.bias_now(), qparams)

    return compute


def _layer(name: str) -> Compute:
    def compute(layer: QuantizedLayer, x: Tensor) -> Tensor:
        if layer.is_conv:
            shape = int8.conv_output_shape(layer, x.shape)
        else:
            shape = [*x.shape[:-1], layer.weight_shape[0]]
        return _operator("Layer", name, layer.step, (x,), shape)

    return compute


def _products(name: str, step: StepState) -> Callable[..., Tensor]:
    def products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        operands = (query, key, value) if mask is None else (query, key, value, mask)
        return _operator("Attention", name, step, operands, query.shape)

    return products


def _operator(
    kind: str, name: str, step: StepState, operands: tuple[Tensor, ...], shape: Any
) -> Tensor:
    """One operator in the traced graph; its first input is the timestep group."""
    assert isinstance(step.traced, _Rows)
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}",
        (step.traced.group, *operands),
        attrs={"name": name},
        dtype=torch.float32,
        shape=list(shape),
        version=1,
    )
