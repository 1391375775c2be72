"""ONNX Runtime and OpenVINO on the CPU: an exported graph as a function, and what computes it."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import BackendUnavailable
from .signal_stack import signal_stack_kept

Run = Callable[[Mapping[str, Tensor]], Tensor]
"""Inputs by name -> the first output."""
RunAll = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Inputs by name -> outputs by name, in the graph's order."""
ONNX_INTEGER = (
    "ConvInteger",
    "QLinearConv",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QLinearMatMul",
    "QGemm",
    "DynamicQuantizeMatMul",
)
ONNX_FLOAT = ("Conv", "FusedConv", "MatMul", "FusedMatMul", "Gemm")
OPENVINO_PRODUCTS = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")
OPENVINO_INTEGER = ("u8", "i8")
FOR_OPENVINO = ("onnx", "onnxscript", "openvino")
"""Packages that write and run its graphs."""
OPENVINO_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Session:
    """A loaded graph. integer, floating: how many of its products (convolutions and matrix
    products) the runtime computes in integers and in floating point, in its optimized graph.
    """

    run_all: RunAll
    integer: int
    floating: int

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The first output."""
        return next(iter(self.run_all(inputs).values()))


def why_missing(packages: tuple[str, ...]) -> str:
    """The first of these packages that cannot be imported; empty where all can."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            return package
    return ""


def require(target: str, packages: tuple[str, ...]) -> None:
    """Raises BackendUnavailable that says what to install."""
    if missing := why_missing(packages):
        raise BackendUnavailable(
            f"{target} needs the package {missing}", f"pip install {' '.join(packages)}"
        )


def onnx_session(path: Path) -> Session:
    """path: an .onnx file. Uses as many threads as torch."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors; it warns of every graph that it optimizes
        options.optimized_model_filepath = str(optimized)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(optimized, load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrays = {name: value.contiguous().numpy() for name, value in inputs.items()}
        return dict(zip(names, map(torch.from_numpy, session.run(names, arrays)), strict=True))

    return Session(run, sum(map(kinds.count, ONNX_INTEGER)), sum(map(kinds.count, ONNX_FLOAT)))


@signal_stack_kept()
def openvino_session(path: Path, dtype: torch.dtype = torch.float32) -> Session:
    """path: an OpenVINO .xml or an .onnx file; dtype: of what is not quantized."""
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": OPENVINO_PRECISIONS[dtype],
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(path, "CPU", options)
    request = compiled.create_infer_request()
    precisions = []
    for node in compiled.get_runtime_model().get_ops():
        said = {name: value.astype(str) for name, value in node.get_rt_info().items()}
        if said["layerType"] in OPENVINO_PRODUCTS:
            precisions.append(said["runtimePrecision"])

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrays = {name: value.contiguous().numpy() for name, value in inputs.items()}
        found = request.infer(arrays)
        return {
            output.get_any_name(): torch.from_numpy(found[output].copy())
            for output in compiled.outputs
        }

    integer = sum(precision in OPENVINO_INTEGER for precision in precisions)
    return Session(run, integer, len(precisions) - integer)


def onnx_to_openvino(source: Path, target: Path) -> None:
    """target: an .xml; its weights go to a .bin beside it."""
    import openvino

    openvino.save_model(openvino.Core().read_model(source), target, compress_to_fp16=False)
