"""How Optimum's pipelines call what they load: names of inputs and outputs, and open sizes.

Names are those of Optimum's own exporters (optimum/exporters/onnx/model_configs.py). Timesteps are
float32, where Optimum's are integers: those of some schedulers have fractions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..backends.onnx.runtimes import Run
from ..backends.onnx.signature import DenoiserSignature, Inputs, Signature
from ..models.call_signature import as_its_class
from ..models.start_images import BESIDE

ROWS = Dim("batch", min=2, max=3)
"""Few are named to trace for, the graphs take any: diffusers decides by the number of elements how
it samples up, and a small one is enough to be shown that it does."""
HEIGHT, WIDTH = Dim("height", min=2, max=4), Dim("width", min=2, max=4)
EXAMPLE_ROWS, EXAMPLE_SIDES, EXAMPLE_TOKENS = 2, (2, 3), 5
TOKENS, IMAGE_TOKENS = Dim("tokens", min=2), Dim("image_tokens", min=2)
ADDED = ("text_embeds", "time_ids")
TEXT = "encoder_hidden_states"


@dataclass(frozen=True)
class Interface:
    """folder: of the pipeline; first, output: names of latents and prediction; unit: of its
    timesteps in those of training."""

    folder: str
    first: str
    output: str
    unit: float = 1.0


UNET = Interface("unet", "sample", "out_sample")
TRANSFORMER = Interface("transformer", "hidden_states", "out_hidden_states")
FLUX = Interface("transformer", "hidden_states", "out_hidden_states", 1000.0)
PIPELINES = {
    "StableDiffusionPipeline": UNET,
    "StableDiffusionImg2ImgPipeline": UNET,
    "StableDiffusionInpaintPipeline": UNET,
    "StableDiffusionXLPipeline": UNET,
    "StableDiffusionXLImg2ImgPipeline": UNET,
    "StableDiffusionXLInpaintPipeline": UNET,
    "LatentConsistencyModelPipeline": UNET,
    "StableDiffusion3Pipeline": TRANSFORMER,
    "FluxPipeline": FLUX,
}
"""diffusers' classes that optimum-onnx and optimum-intel have, of those that are sampled here."""


# ---- the denoiser


def denoiser_signature(interface: Interface, config: Any, condition: Inputs) -> DenoiserSignature:
    """A denoiser called as its class is.

    config: its own; condition: an example of what the model is called with here, whose rows are
    repeated.
    """
    unet = interface is UNET
    given = {
        name: value[:1].expand(EXAMPLE_ROWS, *value.shape[1:]).contiguous()
        for name, value in condition.items()
        if name != BESIDE  # channels of the latents there
    }
    text = given[TEXT] = given[TEXT][:, :1].repeat(1, EXAMPLE_TOKENS, 1)
    sizes: dict[str, Any] = {name: {0: ROWS} for name in given}
    sizes[TEXT] = {0: ROWS, 1: TOKENS}
    if interface is FLUX:
        count = EXAMPLE_SIDES[0] * EXAMPLE_SIDES[1]
        x = torch.zeros(EXAMPLE_ROWS, count, config.in_channels)
        sides: dict[int, Any] = {1: IMAGE_TOKENS}
        given |= {"img_ids": torch.zeros(count, 3), "txt_ids": torch.zeros(text.shape[1], 3)}
        sizes |= {"img_ids": {0: IMAGE_TOKENS}, "txt_ids": {0: TOKENS}}
    else:
        unit = 2 ** (len(config.block_out_channels) - 1) if unet else config.patch_size
        x = torch.zeros(EXAMPLE_ROWS, config.in_channels, *(unit * n for n in EXAMPLE_SIDES))
        sides = {2: unit * HEIGHT, 3: unit * WIDTH}
    time: Mapping[int, Any] = {} if unet else {0: ROWS}
    return DenoiserSignature(
        {interface.first: x, "timestep": torch.zeros([] if unet else [EXAMPLE_ROWS]), **given},
        {interface.first: {0: ROWS, **sides}, "timestep": time, **sizes},
        [interface.output],
        _call_unet if unet else _call_transformer,
        lambda inputs: interface.unit * inputs["timestep"].flatten()[0],
    )


def _call_unet(module: nn.Module, inputs: Inputs) -> Tensor:
    given = dict(inputs)
    x, t = given.pop("sample"), given.pop("timestep")
    added = {name: given.pop(name) for name in ADDED if name in given}
    more: dict[str, Any] = {"added_cond_kwargs": added} if added else {}
    prediction: Tensor = module(x, t.expand(x.shape[0]), **given, **more).sample
    return prediction


def _call_transformer(module: nn.Module, inputs: Inputs) -> Tensor:
    prediction: Tensor = module(**inputs).sample
    return prediction


def traced_module(module: nn.Module) -> nn.Module:
    """What denoiser_signature calls: the denoiser without what unifies calls here."""
    return as_its_class(module)


def called_by_name(module: nn.Module, interface: Interface, run: Run) -> nn.Module:
    """The denoiser with a graph in the place of its forward, called as denoisers are here.

    run: of the graph, under Optimum's names.
    """

    def forward(
        x: Tensor,
        timestep: Tensor,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        **given: Tensor,
    ) -> SimpleNamespace:
        t = timestep[0] if interface is UNET else timestep
        inputs = {interface.first: x, "timestep": t.to(torch.float32), **given}
        return SimpleNamespace(sample=run(inputs | dict(added_cond_kwargs or {})))

    other = copy.copy(module)
    other.forward = forward
    return other


# ---- text encoders and the first stage


def text_signature(encoder: Any) -> Signature:
    """CLIP's with every hidden state, of which pipelines take one; T5's last alone."""
    most = getattr(encoder.config, "max_position_embeddings", None)
    tokens = TOKENS if most is None else Dim("tokens", min=2, max=most)
    inputs = {"input_ids": torch.ones(EXAMPLE_ROWS, EXAMPLE_TOKENS, dtype=torch.int64)}
    sizes = {"input_ids": {0: ROWS, 1: tokens}}
    if most is None:
        return Signature(inputs, sizes, ["last_hidden_state"], _encode_once)
    projects = hasattr(encoder, "text_projection")
    first = ["text_embeds", "last_hidden_state"] if projects else CLIP_OUTPUTS
    layers = range(encoder.config.num_hidden_layers + 1)
    names = [*first, *(f"hidden_states.{i}" for i in layers)]

    def encode(module: nn.Module, given: Inputs) -> tuple[Tensor, ...]:
        found = module(given["input_ids"], output_hidden_states=True)
        return (*(found[name] for name in first), *found.hidden_states)

    return Signature(inputs, sizes, names, encode)


CLIP_OUTPUTS = ["last_hidden_state", "pooler_output"]


def _encode_once(module: nn.Module, inputs: Inputs) -> Tensor:
    found: Tensor = module(inputs["input_ids"]).last_hidden_state
    return found


def decoder_signature(vae: Any) -> Signature:
    x = torch.zeros(EXAMPLE_ROWS, vae.config.latent_channels, *EXAMPLE_SIDES)
    sizes = {"latent_sample": {0: ROWS, 2: HEIGHT, 3: WIDTH}}
    return Signature({"latent_sample": x}, sizes, ["sample"], _decode)


def _decode(vae: Any, inputs: Inputs) -> Tensor:
    images: Tensor = vae.decode(inputs["latent_sample"]).sample
    return images


def encoder_signature(vae: Any) -> Signature:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    x = torch.zeros(EXAMPLE_ROWS, vae.config.in_channels, *(factor * n for n in EXAMPLE_SIDES))
    sizes = {"sample": {0: ROWS, 2: factor * HEIGHT, 3: factor * WIDTH}}
    return Signature({"sample": x}, sizes, ["latent_parameters"], _encode)


def _encode(vae: Any, inputs: Inputs) -> Tensor:
    parameters: Tensor = vae.encode(inputs["sample"]).latent_dist.parameters
    return parameters
