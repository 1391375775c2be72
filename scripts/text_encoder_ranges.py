#!/usr/bin/env python
"""SQNR of reduced text encoders by what their inputs' ranges and weights' codes are made of.

    python scripts/text_encoder_ranges.py
    python scripts/text_encoder_ranges.py --spread 1

Random CLIP and T5 of six layers; --spread: channels of norms are scaled by exp(spread * normal), as
trained encoders have channels that stand out. Ranges and Hessians come from 16 prompts of random
tokens; figures are of the last hidden state on these and on 16 others. `ours` is what `quantize`
makes; a range a token is what integer kernels here do not carry (simulated).
"""

from __future__ import annotations

from collections.abc import Callable

import click
import torch
from torch import Tensor, nn

from qncd_cli.backends.base import get_backend
from qncd_cli.metrics.tensor import sqnr_db
from qncd_cli.models.topology import capture_inputs, weight_layers
from qncd_cli.ptq.text_encoders import quantize_encoders, see_inputs
from qncd_cli.quant.affine import choose_qparams, dequantize, fake_quantize
from qncd_cli.quant.gptq import HessianAccumulator
from qncd_cli.quant.rounding import round_gptq, round_nearest
from qncd_cli.runtime.text_encoders import install_encoders
from qncd_cli.spec import activation_spec, weight_spec

PROMPTS, TOKENS, WORDS = 16, 77, 500


def clip() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    special = {"bos_token_id": WORDS - 2, "eos_token_id": WORDS - 1, "pad_token_id": WORDS - 1}
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=WORDS,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            **special,
        )
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 256, "d_kv": 64, "d_ff": 640, "num_layers": 6, "num_heads": 4}
    return T5EncoderModel(
        T5Config(vocab_size=WORDS, feed_forward_proj="gated-gelu", **sizes)  # type: ignore[arg-type]
    )


def prepared(make: Callable[[], nn.Module], spread: float) -> nn.Module:
    torch.manual_seed(0)
    module = make().eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.mul_(torch.exp(spread * torch.randn(parameter.shape)))
    return nn.ModuleDict({"text_encoder": module})


def tokens(seed: int) -> Tensor:
    """Prompts of 5 to 40 tokens, filled up with the last of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, WORDS - 2, (PROMPTS, TOKENS), generator=generator)
    lengths = torch.randint(5, 40, (PROMPTS,), generator=generator)
    found[torch.arange(TOKENS) >= lengths[:, None]] = WORDS - 1
    found[:, 0] = WORDS - 2
    return found


def by_token(x: Tensor) -> Tensor:
    """Rounded to 8 bits with a scale and a zero-point of each token's own."""
    low, high = (end.reshape(-1) for end in x.aminmax(dim=-1))
    found = [
        fake_quantize(row, choose_qparams(a[None], b[None], activation_spec(8)).at(0), spec)
        for row, a, b in zip(x.flatten(0, -2), low, high, strict=True)
        for spec in [activation_spec(8)]
    ]
    return torch.stack(found).reshape(x.shape)


def alternative(
    module: nn.Module, call: Callable[[], Tensor], bits: int, inputs: str, rounding: str
):
    """Round the module's weights; what has to be called before each layer comes back."""
    layers = weight_layers(module)
    seen = see_inputs(module, call)
    sums = {name: HessianAccumulator(layer.weight.shape[1]) for name, layer in layers.items()}
    with capture_inputs(module, [*layers], lambda name, x: sums[name].update(x, layers[name])):
        call()
    handles = []
    for name, layer in layers.items():
        spec, weight = weight_spec(bits), layer.weight
        if rounding == "gptq":
            rounded = round_gptq(weight, spec, sums[name].hessian())[0]
        else:
            rounded = round_nearest(weight, spec)
        layer.weight.copy_(dequantize(rounded.codes, rounded.qparams, spec))
        low, high = seen[name].low.min()[None], seen[name].high.max()[None]
        qparams = choose_qparams(low, high, activation_spec(8)).at(0)

        def before(layer: nn.Module, args: tuple, qparams=qparams) -> tuple | None:
            if inputs == "float":
                return None
            if inputs == "token":
                return (by_token(args[0]),)
            return (fake_quantize(args[0], qparams, activation_spec(8)),)

        handles.append(layer.register_forward_pre_hook(before))
    return handles


def figures(make: Callable[[], nn.Module], spread: float, way: tuple[int, str, str]) -> list[float]:
    """SQNR in dB on the prompts that were seen, and on others."""
    module, sets = prepared(make, spread), [tokens(0), tokens(9)]

    def call(ids: Tensor = sets[0]) -> Tensor:
        with torch.no_grad():
            return module["text_encoder"](input_ids=ids).last_hidden_state  # type: ignore

    full = [call(ids) for ids in sets]
    bits, inputs, rounding = way
    if inputs == "ours":
        made = quantize_encoders(module, bits, see_inputs(module, call), call)
        install_encoders(module, made, "here", get_backend("simulate"))
    else:
        alternative(module, call, bits, inputs, rounding)
    return [sqnr_db(a, call(ids)) for a, ids in zip(full, sets, strict=True)]


WAYS = {
    "W8A8, a range a layer, nearest": (8, "layer", "nearest"),
    "W8A8, a range a layer, GPTQ": (8, "layer", "gptq"),
    "W8A8, ours: smoothed, a range a layer, GPTQ": (8, "ours", "gptq"),
    "W8A8, a range a token, nearest": (8, "token", "nearest"),
    "W8A8, a range a token, GPTQ": (8, "token", "gptq"),
    "weights of 4 bits, nearest": (4, "float", "nearest"),
    "weights of 4 bits, ours: GPTQ": (4, "ours", "gptq"),
}


@click.command()
@click.option("--spread", multiple=True, type=float, default=(0.0, 0.5))
def main(spread: tuple[float, ...]) -> None:
    torch.set_grad_enabled(False)
    heads = [f"{make.__name__}, {s:g}" for make in (clip, t5) for s in spread]
    print("| way |", " | ".join(heads), "|")
    print("|---" * (1 + len(heads)) + "|")
    for name, way in WAYS.items():
        cells = [figures(make, s, way) for make in (clip, t5) for s in spread]
        print(f"| {name} |", " | ".join(f"{a:.1f}; {b:.1f}" for a, b in cells), "|", flush=True)


if __name__ == "__main__":
    main()
