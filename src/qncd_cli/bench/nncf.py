"""OpenVINO's own post-training int8 (the package nncf) of a denoiser, for comparison.

It quantizes the float32 denoiser on the calibration rows of the run, as its documentation says for
models with attention (`ModelType.TRANSFORMER`: smoothed, asymmetric inputs; predictions of
fashion-ldm have more error without it), and OpenVINO runs it in the precision that it chooses.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.onnx.signal_stack import signal_stack_kept
from ..models.loading import DiffusionModel
from ..quant.layers import StepState
from ..runtime.denoiser import Denoiser
from ..store.artifacts import Artifact

CALIBRATION_ROWS = 64
"""Inputs that ranges are found on, evenly from all; nncf's own default is 300. More: minutes."""


def why_no_nncf() -> str:
    """Why the row cannot be had here, empty where it can."""
    missing = [name for name in ("nncf", "openvino") if importlib.util.find_spec(name) is None]
    return f"the package {missing[0]} is not installed" if missing else ""


class _Positional(nn.Module):
    """The denoiser with its arguments in their order, as converters want them."""

    def __init__(self, denoiser: nn.Module, names: list[str]):
        super().__init__()
        self.denoiser, self.names = denoiser, names

    def forward(self, x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        named = dict(zip(self.names, condition, strict=True))
        result: Tensor = self.denoiser(x, t, **named).sample
        return result


class NncfDenoiser(Denoiser):
    """A denoiser whose calls OpenVINO computes."""

    def __init__(self, module: nn.Module, names: list[str], request: Any):
        super().__init__(module, StepState())
        self._names, self._request = names, request

    def _predict(self, x: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        arrays = [v.numpy() for v in (x, t.float(), *(condition[n] for n in self._names))]
        return torch.from_numpy(self._request.infer(arrays)[0].copy())


@signal_stack_kept()
def nncf_denoiser(model: DiffusionModel, calibration: Artifact) -> NncfDenoiser:
    """The model's denoiser, quantized by nncf on the rows of a calibration."""
    import nncf
    import openvino

    inputs = {key: calibration.tensors[f"inputs.{key}"] for key in ("x", "timestep", "class")}
    every = max(1, len(inputs["x"]) // CALIBRATION_ROWS)
    rows = [slice(i, i + 1) for i in range(0, len(inputs["x"]), every)]
    names: list[str] = []
    given = []
    for row in rows:
        with torch.no_grad():
            condition = model.condition(inputs["class"][row])
        names = list(condition)
        values = (inputs["x"][row], inputs["timestep"][row], *condition.values())
        given.append([value.numpy() for value in values])
    example = tuple(torch.from_numpy(value).repeat_interleave(2, 0) for value in given[0])
    with torch.no_grad():
        converted = openvino.convert_model(
            _Positional(model.denoiser, names), example_input=example
        )
    quantized = nncf.quantize(
        converted,
        nncf.Dataset(given),
        subset_size=len(given),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    options = {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(quantized, "CPU", options)
    return NncfDenoiser(model.denoiser, names, compiled.create_infer_request())
