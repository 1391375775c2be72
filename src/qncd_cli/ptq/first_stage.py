"""The decoder of latents in integers: ranges seen on sampled latents, weights rounded to nearest.

Latents come from full precision, so that one decoder serves a model at all its bits. Probabilities
of attention have 8 bits where that has a code for 1 / keys, else 16.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..config.schema import Config
from ..models.first_stage import FirstStage
from ..models.loading import DiffusionModel, first_stage_of
from ..models.topology import (
    attention_sites,
    capture_attention,
    capture_inputs,
    count_macs,
    is_first_layer,
    weight_layers,
)
from ..progress import Track, counted, no_progress
from ..quant.affine import QParams, choose_qparams
from ..quant.observers import RangeObserver
from ..quant.smoothing import IDENTITY
from ..runtime import trajectory
from ..runtime.denoiser import full_denoiser
from ..sampling.noise import chunks
from ..spec import activation_spec
from ..store.artifacts import Artifact, seal
from ..store.layer_entry import AttentionEntry, LayerEntry, bodies
from .attention import operand_observers
from .cost import Cost, DenoiserCall
from .layer import quantize_layer
from .layer_plan import LayerPlan

LATENT_BITS = 16
"""Bits of the first layer's input: few multiplications, and what is lost of a latent is lost to
all."""
OBSERVER = "minmax"
"""The decoder clips nothing: on fashion-ldm `mse` costs 20 dB of PSNR and `percentile` as much
(docs/notebook/2026-11-27-decoder.md)."""
MARGIN = 2.0
"""Inputs of two bytes reach this much beyond what calibration saw: room to spare."""


def plan_decoder(decoder: nn.Module, bits: int) -> list[LayerPlan]:
    """What is to become of every layer of a decoder."""
    return [
        LayerPlan(name, layer, bits, LATENT_BITS if is_first_layer(name) else bits, OBSERVER)
        for name, layer in weight_layers(decoder).items()
    ]


def quantize_first_stage(config: Config, model: DiffusionModel, track: Track) -> Artifact:
    """The decoder at `first_stage.bits`. Raises ModelError for a model of pixels."""
    first_stage, bits = first_stage_of(model), config.first_stage.bits
    assert bits is not None
    latents = _sampled(config, model, track)
    made = quantize_decoder(first_stage, latents, bits, track)
    made = replace(
        made,
        body={**made.body, "source": model.source},
        config=config.stage_digest("first_stage"),
        model=model.digest,
    )
    return seal(made)


def quantize_decoder(
    first_stage: FirstStage, latents: Iterable[Tensor], bits: int, track: Track = no_progress
) -> Artifact:
    """A first stage's decoder, not sealed. latents: batches [N, c, h, w], which ranges are of."""
    decoder = first_stage.decoder
    plans, sites = plan_decoder(decoder, bits), attention_sites(decoder)
    inputs = {p.name: RangeObserver(p.in_channels, p.channel_axis) for p in plans}
    operands, keys = operand_observers(sites, 1), dict[str, int]()

    def observe_operand(name: str, x: Tensor) -> None:
        operands[name].update(x, 0)
        keys[name.rpartition(".")[0]] = x.shape[1]

    with (
        capture_inputs(decoder, [*inputs], lambda name, x: inputs[name].update(x, 0)),
        capture_attention(decoder, sites, observe_operand),
        torch.no_grad(),
    ):
        for batch in latents:
            first_stage(batch)
    with torch.no_grad():
        costs = count_macs(decoder, lambda: first_stage(batch[:1]))
    tensors, entries = dict[str, Tensor](), dict[str, LayerEntry]()
    for plan in track(plans, "rounding the decoder", len(plans), "layers"):
        qparams = _range(inputs[plan.name].state(), plan.activation_bits)
        made, entries[plan.name] = quantize_layer(plan, qparams, IDENTITY, None)
        tensors |= {f"{plan.name}.{key}": value for key, value in made.items()}
    for name, observer in operands.items():
        found = _range(observer.state(), bits)
        tensors[f"{name}_scale"], tensors[f"{name}_zero_point"] = found
    attention = {
        site.name: AttentionEntry(bits, bits if keys[site.name] < 2**bits else 16, OBSERVER)
        for site in sites
    }
    body = {
        "layers": bodies(entries),
        "attention": bodies(attention),
        "groups": 1,
        "group_bounds": [],
        "macs": sum(cost.macs for cost in costs),
        "integer_macs": sum(c.macs for c in costs if c.name in entries or c.kind == "matmul"),
    }
    return Artifact("first_stage", tensors, body, "", "")


def cost(config: Config, call: DenoiserCall) -> Cost:
    """What latents take, which is most of it. call: of the denoiser."""
    calibration = config.calibration
    rows = calibration.noise_trajectories * call.copies * call.steps
    batch = min(calibration.batch_size, calibration.noise_trajectories)
    return Cost(call.full_bytes(batch * call.copies), model_macs=rows * call.macs)


def _sampled(config: Config, model: DiffusionModel, track: Track) -> list[Tensor]:
    """Latents of calibration trajectories, in batches."""
    calibration, denoiser = config.calibration, full_denoiser(model)
    seeds = range(calibration.seed, calibration.seed + calibration.noise_trajectories)
    batches = chunks(seeds, calibration.batch_size)
    calls = len(batches) * config.sampling.calls
    found = []
    for batch, tick in counted(track, batches, "drawing latents", calls, "steps"):
        found.append(trajectory.draw(config, model, denoiser, batch, tick=tick))
    return found


def _range(state: dict[str, Tensor], bits: int) -> QParams:
    """scale, zero_point [1]."""
    margin = MARGIN if bits > 8 else 1.0
    return choose_qparams(margin * state["min"], margin * state["max"], activation_spec(bits))
