#!/usr/bin/env python
"""What a low-rank branch beside the worst layers would give: W^ x + U (V x), as SVDQuant has it.

    qncd calibrate --config fashion_ldm_w4a8 --set quantization.sensitive.weight_bits=0
    qncd quantize
    python scripts/low_rank.py --layers 10

The layers are those whose weight error counts most (`estimated_error` in quantized.safetensors).
U V is the best of its rank on the Hessian objective of the layer's quantized input, in float32: an
upper bound for a branch in eight bits, of which rank (inputs + outputs) are counted as its cost.
Every row draws the same seeds with the `simulate` backend; "exact" puts the full-precision weights
of these layers in place: no branch can give more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import click
import torch
from torch import Tensor

from qncd_cli.backends.reference import simulate_with
from qncd_cli.cli.console import ErrorReportingCommand
from qncd_cli.cli.shared import open_model
from qncd_cli.config.loading import load_config
from qncd_cli.config.schema import Config
from qncd_cli.metrics.tensor import sqnr_db
from qncd_cli.models.loading import DiffusionModel
from qncd_cli.ptq.hessians import collect_hessians
from qncd_cli.ptq.job import QuantizationJob
from qncd_cli.ptq.layer_plan import plan_layers
from qncd_cli.ptq.reconstruct import exact_weights, quantized_layers
from qncd_cli.ptq.smoothing_choice import factors_of
from qncd_cli.quant.affine import QParams
from qncd_cli.quant.layers import QuantizedLayer
from qncd_cli.runtime import trajectory
from qncd_cli.runtime.denoiser import Denoiser, full_denoiser, quantized_denoiser
from qncd_cli.sampling.noise import chunks
from qncd_cli.store import artifacts
from qncd_cli.store.layer_entry import layer_entries
from qncd_cli.store.run_dir import find_run

BATCH = 16
DAMPING = 1e-3
"""Of the Hessian, relative to the mean of its diagonal."""


@dataclass(frozen=True)
class Drawing:
    """What is drawn the same way in every row."""

    config: Config
    model: DiffusionModel
    count: int

    def latents(self, denoiser: Denoiser) -> Tensor:
        first = self.config.sampling.seed
        batches = chunks(list(range(first, first + self.count)), BATCH)
        return torch.cat(
            [trajectory.draw(self.config, self.model, denoiser, batch) for batch in batches]
        )


def best_branch(residual: Tensor, hessian: Tensor, rank: int) -> Tensor:
    """The matrix B of that rank with the least tr (R - B) H (R - B)^T; residual: R [O, I]."""
    eye = torch.eye(len(hessian))
    damped = hessian.double() + DAMPING * hessian.diagonal().double().mean() * eye
    root = torch.linalg.cholesky(damped)  # H = L L^T
    u, s, v = torch.linalg.svd(residual.double() @ root, full_matrices=False)
    low = (u[:, :rank] * s[:rank]) @ v[:rank]
    return torch.linalg.solve_triangular(root, low, upper=False, left=False).float()


@click.command(cls=ErrorReportingCommand)
@click.option("--run-dir", metavar="DIR", help="A quantized run (default: the current one).")
@click.option("--layers", "count", default=10, show_default=True, help="How many layers.")
@click.option("--rank", "ranks", default=(8, 32, 128), multiple=True, show_default=True)
@click.option("--num", default=64, show_default=True, help="Samples a row.")
def main(run_dir: str | None, count: int, ranks: tuple[int, ...], num: int) -> None:
    """What a low-rank branch beside the worst layers of a quantized run would give."""
    run = find_run(run_dir)
    config = load_config(str(run.config))
    model = open_model(config)
    calibration = artifacts.read(run.tensors("calibration"), "calibration")
    quantized = artifacts.read(run.tensors("quantized"), "quantized")
    factors = factors_of(artifacts.read(run.tensors("smoothing"), "smoothing"))
    entries = layer_entries(quantized.body)
    estimates = {name: entry.estimated_error for name, entry in entries.items()}
    errors = {name: found.weight for name, found in estimates.items() if found is not None}
    if not errors:
        raise click.ClickException(f"{run.path}: no estimated errors (preset best has them)")
    worst = sorted(errors, key=lambda name: -errors[name])[:count]

    denoiser = quantized_denoiser(model, quantized, "simulate", cache_time_embeddings=True)
    layers = quantized_layers(denoiser.module, worst)
    exact = exact_weights(model.denoiser, layers)
    plans = [
        replace(plan, activation_bits=layers[plan.name].activation_bits)
        for plan in plan_layers(config, model.denoiser)
        if plan.name in layers
    ]
    qparams = {n: QParams(la.input_scale, la.input_zero_point) for n, la in layers.items()}
    hessians = collect_hessians(
        QuantizationJob(config, model, calibration, plans, factors), qparams
    )

    drawing = Drawing(config, model, num)
    reference = drawing.latents(full_denoiser(model))
    total = sum(entry.weights for entry in entries.values())
    coded = {name: layer.float_weight() for name, layer in layers.items()}
    click.echo(f"{model.source}, {num} samples; layers: {', '.join(worst)}")
    click.echo("| weights of these layers | extra bits in the mean | SQNR, dB |\n|---|---|---|")

    def row(name: str, extra_bits: float | None) -> None:
        found = sqnr_db(reference, drawing.latents(denoiser))
        extra = "" if extra_bits is None else f"{extra_bits:.2f}"
        click.echo(f"| {name} | {extra} | {found:.2f} |")

    row("as quantized", 0.0)
    for rank in ranks:
        for name, layer in layers.items():
            flat = (exact[name] - coded[name]).flatten(1)
            branch = best_branch(flat, hessians[name].hessian, rank)
            compute_with(layer, coded[name] + branch.view_as(coded[name]))
        added = sum(8 * rank * sum(exact[n].flatten(1).shape) for n in layers)
        row(f"branch of rank {rank}", added / total)
    for name, layer in layers.items():
        compute_with(layer, exact[name])
    row("exact", None)


def compute_with(layer: QuantizedLayer, weight: Tensor) -> None:
    """Another weight in the place of the layer's own; its input stays quantized."""

    def compute(layer: QuantizedLayer, x: Tensor) -> Tensor:
        qparams = None if layer.input_spec is None else layer.input_qparams()
        return simulate_with(layer, x, weight, layer.bias_now(), qparams)

    layer.compute = compute


if __name__ == "__main__":
    main()
