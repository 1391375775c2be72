#!/usr/bin/env python
"""int8 against simulate, layer by layer, each on the input that the model gives it.

    python scripts/layer_agreement.py zoo:fashion-ldm random:ldm4 --bits w8a8,w4a8,w4a6

The artifact is the bench's quick one (preset minmax, one calibration input), with two-byte inputs
in the outer layers. The difference is relative to the layer's largest output.
"""

from __future__ import annotations

from dataclasses import dataclass

import click
import torch
from torch import Tensor

from qncd_cli.backends import int8
from qncd_cli.backends.reference import simulate
from qncd_cli.bench import table
from qncd_cli.cli.console import ErrorReportingCommand
from qncd_cli.cli.shared import open_model
from qncd_cli.config.loading import parse_config
from qncd_cli.config.schema import Config
from qncd_cli.config.widths import parse_widths
from qncd_cli.errors import BackendUnavailable, ConfigError
from qncd_cli.models.loading import DiffusionModel
from qncd_cli.quant.layers import QuantizedLayer
from qncd_cli.runtime.denoiser import quantized_denoiser
from qncd_cli.stages import calibrate, quantize

ROWS = 2


@dataclass
class Found:
    """Of one model and widths: layers compared, those equal in every bit, the largest difference
    and its layer, those that integer kernels do not compute."""

    compared: int = 0
    equal: int = 0
    largest: float = 0.0
    worst: str = ""
    floating: int = 0


def compare(model: DiffusionModel, config: Config) -> Found:
    """One call of the simulated denoiser, every layer computed a second time by int8."""
    tree = config.to_dict()
    tree["quantization"]["first_last_activation_bits"] = 16
    config = parse_config(tree, "layer_agreement")
    artifact = quantize.run(config, model, *calibrate.run(config, model)).quantized
    denoiser = quantized_denoiser(model, artifact, "simulate", True)
    found = Found()

    def both(name: str):
        def compute(layer: QuantizedLayer, x: Tensor) -> Tensor:
            expected = simulate(layer, x)
            if int8.why_not(layer):
                found.floating += 1
                return expected
            output = int8.compute(layer, x)
            difference = float((output - expected).abs().max() / expected.abs().max())
            found.compared += 1
            found.equal += int(torch.equal(output, expected))
            if difference >= found.largest:
                found.largest, found.worst = difference, name
            return expected

        return compute

    for name, layer in denoiser.module.named_modules():
        if isinstance(layer, QuantizedLayer):
            layer.compute = both(name)
    x = torch.randn(ROWS, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        condition = model.condition(model.labels(list(range(ROWS)), config.sampling.classes))
        denoiser(x, table.TIMESTEP, condition)
    return found


@click.command(cls=ErrorReportingCommand)
@click.argument("sources", nargs=-1, required=True)
@click.option("--bits", default="w8a8,w4a8,w4a6", show_default=True)
def main(sources: tuple[str, ...], bits: str) -> None:
    """Compare the layers of SOURCES at every pair of widths."""
    if why := int8.why_unavailable(torch.device("cpu")):
        raise BackendUnavailable(f"int8: {why}", "")
    for source in sources:
        config = parse_config({"model": {"source": source}}, "layer_agreement")
        model = open_model(config, "cpu")
        for text in bits.split(","):
            if (widths := parse_widths(text)) is None:
                raise ConfigError(f"--bits {text}: nothing is quantized", "widths like w4a8")
            found = compare(model, table.quick_config(config, widths))
            click.echo(
                f"{source} {text}: {found.compared} layers, {found.equal} equal in every bit, "
                f"largest relative difference {found.largest:.1e} ({found.worst}), "
                f"{found.floating} in floating point"
            )


if __name__ == "__main__":
    main()
