#!/usr/bin/env python
"""qncd's rows and those of other tools on one model, timed in turn in one process.

They need an environment of their own, for their sake and ours:

    python -m venv .venv-peers
    .venv-peers/bin/pip install -e ".[onnx,openvino]" optimum-quanto torchao nncf
    .venv-peers/bin/python scripts/bench_peers.py random:ldm4

Every peer quantizes the same float32 denoiser as its documentation says, calibrated on the one
input that is timed. What each leaves in floating point is its own choice:

    quanto        weights and activations int8 (optimum-quanto); it dequantizes to multiply
    torchao       int8 weights, dynamic int8 activations of linear layers, compiled
    nncf          post-training int8 of the OpenVINO model, on OpenVINO in the precision it chooses
                  (bfloat16 where the CPU multiplies it)
    onnxruntime   static QDQ int8 per channel of convolutions and matrix products, on ONNX Runtime

One that is not installed or fails is listed with the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from qncd_cli.bench import rendering, table
from qncd_cli.bench.row import Guest, Inputs, Row, parse_rows
from qncd_cli.cli.console import Console, ErrorReportingCommand
from qncd_cli.cli.shared import open_model
from qncd_cli.config.loading import parse_config
from qncd_cli.errors import ConfigError
from qncd_cli.store import files

OURS = "float32-eager,bfloat16-compiled,int8-w4a8-bfloat16-compiled,openvino-w4a8-bfloat16"
Call = Callable[[], Any]


def arguments(inputs: Inputs) -> dict[str, Tensor]:
    """Of the denoiser, by name."""
    timesteps = torch.full((len(inputs.x),), inputs.timestep)
    return {"sample": inputs.x, "timestep": timesteps, **inputs.condition}


class Positional(nn.Module):
    """The denoiser with its arguments in their order, for exporters."""

    def __init__(self, denoiser: nn.Module, names: list[str]):
        super().__init__()
        self.denoiser, self.names = denoiser, names

    def forward(self, *values: Tensor) -> Tensor:
        return self.denoiser(**dict(zip(self.names, values, strict=True)), return_dict=False)[0]


def calling(denoiser: nn.Module, inputs: Inputs) -> Call:
    given = arguments(inputs)

    def call() -> Any:
        with torch.no_grad():
            return denoiser(**given)

    return call


def quanto(denoiser: nn.Module, inputs: Inputs, folder: Path) -> Call:
    from optimum.quanto import Calibration, freeze, qint8, quantize

    quantize(denoiser, weights=qint8, activations=qint8)
    call = calling(denoiser, inputs)
    with Calibration():
        call()
    freeze(denoiser)
    return call


def torchao(denoiser: nn.Module, inputs: Inputs, folder: Path) -> Call:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(denoiser, Int8DynamicActivationInt8WeightConfig())
    return calling(torch.compile(denoiser, dynamic=False), inputs)  # type: ignore[arg-type]


def nncf(denoiser: nn.Module, inputs: Inputs, folder: Path) -> Call:
    import nncf
    import openvino

    given = arguments(inputs)
    with torch.no_grad():
        example = tuple(given.values())
        converted = openvino.convert_model(Positional(denoiser, list(given)), example_input=example)
    arrays = [value.numpy() for value in example]
    quantized = nncf.quantize(converted, nncf.Dataset([arrays]), subset_size=1)
    options = {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = openvino.Core().compile_model(quantized, "CPU", options).create_infer_request()
    return lambda: request.infer(arrays)


def onnxruntime(denoiser: nn.Module, inputs: Inputs, folder: Path) -> Call:
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    given = arguments(inputs)
    plain, quantized = folder / "plain.onnx", folder / "quantized.onnx"
    torch.onnx.export(
        Positional(denoiser, list(given)),
        tuple(given.values()),
        plain,
        input_names=list(given),
        dynamo=True,
        external_data=True,
        verbose=False,
    )
    arrays = {name: value.numpy() for name, value in given.items()}

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows: Iterator[dict[str, np.ndarray]] = iter([arrays])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    quantize_static(
        plain,
        quantized,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],  # of others it cannot share some ranges
        per_channel=True,
        use_external_data_format=True,
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, arrays)


PEERS = {"quanto": quanto, "torchao": torchao, "nncf": nncf, "onnxruntime": onnxruntime}


@click.command(cls=ErrorReportingCommand)
@click.argument("source")
@click.option("--rows", default=OURS, show_default=True, help="Of qncd bench.")
@click.option("--peers", default=",".join(PEERS), show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=2, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bench_peers"))
def main(source: str, rows: str, peers: str, batch_size: int, rounds: int, out: Path) -> None:
    """Time SOURCE's denoiser; writes bench.json and bench.md into --out."""
    logging.getLogger().setLevel(logging.ERROR)  # exporters and calibrators warn of every layer
    names = [name for name in peers.split(",") if name]
    if unknown := [name for name in names if name not in PEERS]:
        raise ConfigError(f"--peers {unknown[0]}: unknown", f"known: {', '.join(PEERS)}")
    guests = [Guest(Row(name, "float32", "int8"), PEERS[name]) for name in names]
    own = parse_rows([name for name in rows.split(",") if name])
    request = table.BenchRequest(own, batch_size, rounds, alone=False, guests=guests)
    config = parse_config({"model": {"source": source}}, "bench_peers")
    model = open_model(config, "cpu")
    report = table.run(config, model, request, lambda line: click.echo(line, err=True))
    files.write_json(out / "bench.json", report)
    page = rendering.markdown(report, f"{source} beside other tools")
    files.write_bytes(out / "bench.md", page.encode())
    Console().table(rendering.COLUMNS, [list(row.values()) for row in rendering.cells(report)])
    for line in rendering.missing(report):
        click.echo(line)


if __name__ == "__main__":
    main()
