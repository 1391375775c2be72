#!/usr/bin/env python
"""How Q-Diffusion's own quantizer, from a copy of its repository, does on a packaged U-Net.

    git clone https://github.com/Xiuyu-Li/q-diffusion
    python scripts/original_quantizer.py --code q-diffusion/qdiff/quant_layer.py --bits w4a6
    qncd ablate --config fashion_ldm --bits w4a6 --presets qdiffusion+nearest --num 200

    python scripts/original_quantizer.py --code q-diffusion/qdiff/quant_layer.py --bits w4a6 \\
        --adaround 150
    python scripts/original_quantizer.py --code q-diffusion/qdiff/quant_layer.py --symmetric-weights

Its QuantModule takes the place of every convolution and linear layer, its UniformAffineQuantizer
that of attention's operands, and ranges are found as its txt2img.py finds them: initialised on 16
calibration inputs, then running means over batches of 16 inputs of mixed timesteps. The shortcuts
of the way up are split as in its code. Weights are rounded to nearest, which is where its
block-wise reconstruction starts, or with --adaround by its AdaRoundQuantizer, block by block as its
block_reconstruction does it with the options of its txt2img.py; blocks are the residual blocks and
the attention modules of diffusers. The first and the last layer have 8 bits, and the last layer's
input stays float, as in QNCD's copy of this code.

Prints SQNR of the latents and PSNR of the images against full precision, in dB. Nothing of the
quantizer is ours but the processor that hands attention's operands to it, and the loop around
AdaRound's loss: its own module imports the latent-diffusion repository and a GPU.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import click
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from qncd_cli.cli.console import ErrorReportingCommand
from qncd_cli.cli.shared import open_model
from qncd_cli.config.loading import load_config
from qncd_cli.config.schema import Config
from qncd_cli.metrics.tensor import psnr_db, psnr_each_db, sqnr_db
from qncd_cli.models.loading import DiffusionModel
from qncd_cli.models.topology import is_outer_layer, skip_boundaries, time_layers, weight_layers
from qncd_cli.runtime import trajectory
from qncd_cli.runtime.denoiser import full_denoiser
from qncd_cli.sampling.noise import chunks
from qncd_cli.spec import Widths
from qncd_cli.stages import calibrate

BATCH, ROWS = 16, 32
"""Rows of a call and of a step of the rounding."""
OUTER_BITS = 8
ROUNDING_WEIGHT, WARMUP, BETAS = 0.01, 0.2, (20.0, 2.0)
"""Of AdaRound's regularizer, as the published txt2img.py sets them."""
Call = Callable[[int, int], None]
"""Runs the denoiser on the rows [start, stop) of the calibration inputs."""


class OperandProcessor:
    """An attention processor whose q, k, v and probabilities pass through published quantizers."""

    def __init__(self, code: ModuleType, options: dict[str, Any]):
        self.quantizers = [code.UniformAffineQuantizer(**options) for _ in range(3)]
        positive = options | {"symmetric": False, "always_zero": True}
        self.quantizers.append(code.UniformAffineQuantizer(**positive))
        self.on = False

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        found = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in found)
        if self.on:
            q, k, v = (q_(x) for q_, x in zip(self.quantizers, (q, k, v), strict=False))
        p = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        if self.on:
            p = self.quantizers[3](p)
        y: Tensor = attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))
        return y


@click.command(cls=ErrorReportingCommand)
@click.option("--code", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--config", "name", default="fashion_ldm", show_default=True)
@click.option("--bits", default="w8a8", show_default=True, help="Weights and activations, w4a6.")
@click.option("--num", default=200, show_default=True, help="Samples.")
@click.option("--symmetric-weights", is_flag=True, help="Ranges of weights around zero, as ours.")
@click.option("--adaround", default=0, metavar="ITERATIONS", help="0: rounds to nearest.")
def main(
    code: Path, name: str, bits: str, num: int, symmetric_weights: bool, adaround: int
) -> None:
    """How Q-Diffusion's own quantizer does on a packaged U-Net."""
    config = load_config(name)
    model = open_model(config)
    seeds = list(range(config.sampling.seed, config.sampling.seed + num))
    reference = drawn(config, model, seeds)
    calibration, _ = calibrate.run(config, model)
    widths = Widths.parse(bits)
    quantize(config, model, calibration.tensors, code, widths, symmetric_weights, adaround)
    latents = drawn(config, model, seeds)
    expected, images = decoded(model, reference), decoded(model, latents)
    middle = median(psnr_each_db(expected, images))
    click.echo(
        f"{bits}: SQNR {sqnr_db(reference, latents):.1f} dB, "
        f"PSNR {psnr_db(expected, images):.1f} dB, median {middle:.1f} dB"
    )


def imported(path: Path) -> ModuleType:
    """The published file as a module of a package that holds nothing else: all of the published
    one would import the latent-diffusion repository."""
    sys.modules.setdefault("qdiff", ModuleType("qdiff"))
    spec = importlib.util.spec_from_file_location(f"qdiff.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def drawn(config: Config, model: DiffusionModel, seeds: list[int]) -> Tensor:
    """Latents of the model as its denoiser is now, [N, ...]."""
    denoiser = full_denoiser(model)
    return torch.cat([trajectory.draw(config, model, denoiser, b) for b in chunks(seeds, 50)])


@torch.no_grad()
def decoded(model: DiffusionModel, latents: Tensor) -> Tensor:
    return torch.cat([model.decode(part) for part in latents.split(50)])


@torch.no_grad()
def quantize(
    config: Config,
    model: DiffusionModel,
    rows: dict[str, Tensor],
    path: Path,
    widths: Widths,
    symmetric_weights: bool,
    adaround: int,
) -> None:
    """Quantize the model's denoiser in place by the published classes."""
    code = imported(path)
    inputs, timesteps, condition = mixed_inputs(config, model, rows)
    weights = {
        "n_bits": widths.weights,
        "symmetric": symmetric_weights,
        "channel_wise": True,
        "scale_method": "mse",
    }
    if widths.weights >= 8:
        weights["scale_method"] = "max"  # trying 80 ranges for each channel takes minutes
    activations = {
        "n_bits": widths.activations,
        "symmetric": False,
        "channel_wise": False,
        "scale_method": "mse",
        "leaf_param": True,
    }
    layers = replace_layers(model.denoiser, code, weights, activations)
    processors = [OperandProcessor(code, activations | {"n_bits": 8}) for _ in attentions(model)]
    for module, processor in zip(attentions(model), processors, strict=True):
        module.set_processor(processor)

    def call(start: int, stop: int) -> None:
        batch = {key: value[start:stop] for key, value in condition.items()}
        model.denoiser(inputs[start:stop], timesteps[start:stop], **batch)

    for layer in layers:
        layer.set_quant_state(True, False)
    call(0, BATCH // 2)
    if adaround:
        rounding = imported(path.with_name("adaptive_rounding.py"))
        for unit in units(model.denoiser, layers, lambda: call(0, 1)):
            reconstruct(unit, layers, rounding, call, len(inputs), adaround)
    for layer in layers:
        layer.set_quant_state(True, True)
    for processor in processors:
        processor.on = True
    call(0, BATCH)
    everything = [*layers, *(q for p in processors for q in p.quantizers)]
    for running in (True, False):
        for part in everything:
            if isinstance(part, code.QuantModule):
                part.set_running_stat(running)
            else:
                part.running_stat = running
        for start in range(0, len(inputs) - BATCH + 1, BATCH) if running else ():
            call(start, start + BATCH)
    for layer in layers:  # the rounded weights once and for all: they are rounded in every call
        parts = (
            [layer.weight]
            if not layer.split
            else list(layer.weight.split([layer.split, layer.weight.shape[1] - layer.split], 1))
        )
        quantizers = [layer.weight_quantizer, getattr(layer, "weight_quantizer_0", None)]
        layer.org_weight = torch.cat(
            [q(part) for q, part in zip(quantizers, parts, strict=False)], 1
        )
        layer.set_quant_state(False, True)


def mixed_inputs(
    config: Config, model: DiffusionModel, rows: dict[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The calibration rows and, where guidance needs it, the null class's, in mixed order."""
    x, timesteps = rows["inputs.x"], rows["inputs.timestep"]
    condition = model.condition(rows["inputs.class"])
    if model.guides(config.sampling.guidance_scale) and model.null_condition is not None:
        null = model.null_condition(len(x))
        condition = {key: torch.cat([value, null[key]]) for key, value in condition.items()}
        x, timesteps = torch.cat([x, x]), torch.cat([timesteps, timesteps])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], timesteps[order], {key: value[order] for key, value in condition.items()}


def units(denoiser: nn.Module, layers: list[Any], call: Callable[[], None]) -> list[nn.Module]:
    """What is reconstructed at a time, in the order of execution: blocks, and layers of none."""
    blocks = [m for m in denoiser.modules() if isinstance(m, ResnetBlock2D | Attention)]
    held = {id(layer) for block in blocks for layer in block.modules()}
    alone = [layer for layer in layers if id(layer) not in held]
    order: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda m, _: order.append(m)) for m in (*blocks, *alone)]
    call()
    for hook in hooks:
        hook.remove()
    return order


def recorded(unit: nn.Module, call: Call, count: int) -> tuple[list[Any], dict[str, Any], Tensor]:
    """Arguments and output of a unit over all calibration rows."""
    arguments: list[tuple[Any, ...]] = []
    options: list[dict[str, Any]] = []
    outputs: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        arguments.append(args)
        options.append(kwargs)
        outputs.append(output)

    hook = unit.register_forward_hook(see, with_kwargs=True)
    for start in range(0, count - BATCH + 1, BATCH):
        call(start, start + BATCH)
    hook.remove()
    joined = [_joined(parts) for parts in zip(*arguments, strict=True)]
    named = {key: _joined(tuple(of[key] for of in options)) for key in options[0]}
    return joined, named, torch.cat(outputs)


def _joined(parts: tuple[Any, ...]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]


def reconstruct(
    unit: nn.Module,
    layers: list[Any],
    rounding: ModuleType,
    call: Call,
    count: int,
    iterations: int,
) -> None:
    """Round the weights of a unit so that its output stays that of full precision, where weights
    before it are rounded already; activations are float."""
    own = [layer for layer in unit.modules() if any(layer is one for one in layers)]
    for layer in layers:
        layer.set_quant_state(False, False)
    *_, goal = recorded(unit, call, count)
    for layer in layers:
        layer.set_quant_state(True, False)
    arguments, options, _ = recorded(unit, call, count)
    quantizers = [q for layer in own for q in learned(layer, rounding)]
    optimizer = torch.optim.Adam([q.alpha for q in quantizers])
    started, generator = WARMUP * iterations, torch.Generator().manual_seed(0)
    for step in range(1, iterations + 1):
        rows = torch.randperm(len(goal), generator=generator)[:ROWS]
        chosen = [x[rows] if isinstance(x, Tensor) else x for x in arguments]
        named = {k: x[rows] if isinstance(x, Tensor) else x for k, x in options.items()}
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = (unit(*chosen, **named) - goal[rows]).square().sum(1).mean()
            if step >= started:
                left = 1 - (step - started) / (iterations - started)
                beta = BETAS[1] + (BETAS[0] - BETAS[1]) * left
                for quantizer in quantizers:
                    soft = quantizer.get_soft_targets()
                    loss = loss + ROUNDING_WEIGHT * (1 - (2 * soft - 1).abs() ** beta).sum()
            loss.backward()
        optimizer.step()
    for quantizer in quantizers:
        quantizer.soft_targets = False


def learned(layer: Any, rounding: ModuleType) -> list[Any]:
    """The layer's weight quantizers, replaced by those that learn their rounding."""
    columns = {"weight_quantizer": slice(None, layer.split or None)}
    if layer.split:
        columns["weight_quantizer_0"] = slice(layer.split, None)
    found = []
    for name, part in columns.items():
        with torch.enable_grad():
            quantizer = rounding.AdaRoundQuantizer(
                getattr(layer, name), layer.org_weight[:, part], "learned_hard_sigmoid"
            )
        quantizer.soft_targets = True
        setattr(layer, name, quantizer)
        found.append(quantizer)
    return found


def attentions(model: DiffusionModel) -> list[Attention]:
    return [m for m in model.denoiser.modules() if isinstance(m, Attention)]


def replace_layers(
    denoiser: nn.Module, code: ModuleType, weights: dict[str, Any], activations: dict[str, Any]
) -> list[Any]:
    """Every layer but those of the time embedding as a published QuantModule; returns them."""
    timed, boundaries = time_layers(denoiser), skip_boundaries(denoiser)
    found = []
    for name, layer in weight_layers(denoiser).items():
        if name in timed:
            continue
        own_weights, own_activations = dict(weights), dict(activations)
        if is_outer_layer(name):
            own_weights |= {"n_bits": OUTER_BITS, "scale_method": "max"}
            own_activations |= {"n_bits": OUTER_BITS}
        module = code.QuantModule(
            layer, own_weights, own_activations, disable_act_quant=name == "conv_out"
        )
        if name.endswith("conv_shortcut") and name in boundaries:
            module.split = boundaries[name]
            module.set_split()
        parent, _, leaf = name.rpartition(".")
        denoiser.get_submodule(parent).register_module(leaf, module)
        found.append(module)
    return found


if __name__ == "__main__":
    main()
