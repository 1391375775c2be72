"""The text encoder of a Stable Diffusion checkpoint, and the tokenizer that belongs to it.

1.x has OpenAI's CLIP under the names of transformers (FrozenCLIPEmbedder), 2.x has OpenCLIP's under
its own (FrozenOpenCLIPEmbedder): ldm/modules/encoders/modules.py of github.com/CompVis/
stable-diffusion and github.com/Stability-AI/stablediffusion, src/open_clip/transformer.py of
github.com/mlfoundations/open_clip. Both become a CLIPTextModel. A checkpoint holds no tokenizer.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError
from .config import TEXT_ENCODERS, Section
from .file import some_tensors
from .keys import COND_STAGE, Source

TOKENIZER = "openai/clip-vit-large-patch14"  # OpenCLIP has the same vocabulary
_YAML_HINT = "is model.compvis_config the YAML of this checkpoint?"
_TOKENIZER_HINT = (
    "set model.tokenizer (qncd convert: --tokenizer) to a folder with vocab.json and merges.txt of"
    f" {TOKENIZER}"
)
HEAD_WIDTH = 64  # of every CLIP text encoder (github.com/openai/CLIP, clip/model.py, build_model)
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
_BASE_HINT = "is model.base a pipeline of the same kind?"
_QKV = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}


@dataclass(frozen=True)
class TextOptions:
    """Options of a text encoder, as cond_stage_config gives them.

    open_clip: 2.x, else 1.x. tokenizer: its name on the hub. length: tokens of a prompt. skipped:
    last layers of the encoder that are not run.
    """

    open_clip: bool
    tokenizer: str
    length: int
    skipped: int = 0


@dataclass(frozen=True)
class TextEncoder:
    """module: a CLIPTextModel on the meta device; sources: of its parameters, whole keys.

    unused: keys that may be in the checkpoint and are not needed.
    """

    module: Any
    tokenizer: Any
    sources: dict[str, Source]
    unused: set[str]


def text_options(params: Section) -> TextOptions | None:
    """None for a model that reads no text. Raises ModelError."""
    stage = params.tree.get("cond_stage_config")
    target = str(stage.get("target")) if isinstance(stage, dict) else ""
    if target.rpartition(".")[2] not in TEXT_ENCODERS:
        return None
    section = params.child("cond_stage_config")
    given = section.tree.get("params", {})
    section = Section(given, section.file, f"{section.where}.params")
    section.ignore("device", "freeze")
    length = section.take("max_length", int, 77)
    open_clip = target.endswith("FrozenOpenCLIPEmbedder")
    if open_clip:
        section.only("arch", "ViT-H-14")
        section.only("version", "laion2b_s32b_b79k")
        layer = section.take("layer", str, "last")
        if layer not in ("last", "penultimate"):
            raise section.error(f"has layer: {layer!r}, which is not supported")
        options = TextOptions(True, TOKENIZER, length, skipped=int(layer == "penultimate"))
    else:
        version = section.take("version", str, TOKENIZER)
        if not version.startswith("openai/"):
            raise section.error(f"has version: {version!r}", "only OpenAI's CLIP can be read")
        section.only("layer", "last")
        section.only("layer_idx", None)
        options = TextOptions(False, version, length)
    section.done()
    return options


def text_encoder(
    checkpoint: str, tensors: dict[str, Tensor], options: TextOptions, tokenizer: Any
) -> TextEncoder:
    """The encoder that the checkpoint's tensors have the shapes of. Raises ModelError."""
    from transformers import CLIPTextConfig, CLIPTextModel

    prefix, position, widening = _landmarks(options)
    token = prefix + ("" if options.open_clip else "embeddings.") + "token_embedding.weight"
    landmarks = (token, position, widening)
    missing = [key for key in landmarks if key not in tensors]
    flat = [key for key in landmarks if key in tensors and tensors[key].ndim != 2]
    if missing or flat:
        what = some_tensors("missing", missing) or some_tensors("of another shape", flat)
        raise ModelError(f"{checkpoint}: does not fit its YAML: {what}", _YAML_HINT)
    numbered = re.compile(re.escape(prefix) + r".*?(?:layers|resblocks)\.(\d+)\.")
    found = {int(m[1]) for key in tensors if (m := numbered.match(key))}
    layers = len(found) - options.skipped
    (vocabulary, width), positions = tensors[token].shape, len(tensors[position])
    if options.length > positions:
        raise ModelError(
            f"{checkpoint}: its text encoder reads {positions} tokens, the YAML's max_length is"
            f" {options.length}",
            _YAML_HINT,
        )
    if width % HEAD_WIDTH:
        raise ModelError(
            f"{checkpoint}: its text encoder is {width} wide, no multiple of {HEAD_WIDTH}",
            _YAML_HINT,
        )
    if len(tokenizer) != vocabulary:  # transformers makes an empty one where files are missing
        raise ModelError(
            f"{checkpoint}: its text encoder has {vocabulary} tokens, the tokenizer"
            f" {tokenizer.name_or_path} has {len(tokenizer)}",
            _TOKENIZER_HINT,
        )
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(tensors[widening]),
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=positions,
        hidden_act="gelu" if options.open_clip else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("meta"):
        module = CLIPTextModel(config)
    for name, buffer in list(module.named_buffers()):  # positions, which no checkpoint gives
        owner, _, leaf = name.rpartition(".")
        numbers = torch.arange(buffer.shape[-1])[None]
        module.get_submodule(owner).register_buffer(leaf, numbers, persistent=False)
    source = _open_clip_source if options.open_clip else Source
    names = {name: name.removeprefix("text_model.") for name in module.state_dict()}
    sources = {name: source(short) for name, short in names.items()}
    sources = {n: Source(prefix + s.key, s.part, s.stacked) for n, s in sources.items()}
    return TextEncoder(module, tokenizer, sources, _unused(options, prefix, layers, tensors))


def _landmarks(options: TextOptions) -> tuple[str, str, str]:
    """What all keys begin with, and the keys of the positions and of an MLP's first layer."""
    if options.open_clip:
        prefix = f"{COND_STAGE}model."
        return (
            prefix,
            f"{prefix}positional_embedding",
            f"{prefix}transformer.resblocks.0.mlp.c_fc.weight",
        )
    prefix = f"{COND_STAGE}transformer.text_model."
    return (
        prefix,
        f"{prefix}embeddings.position_embedding.weight",
        f"{prefix}encoder.layers.0.mlp.fc1.weight",
    )


def _unused(options: TextOptions, prefix: str, layers: int, tensors: dict[str, Tensor]) -> set[str]:
    if not options.open_clip:
        return {f"{prefix}embeddings.position_ids"}
    skipped = tuple(f"{prefix}transformer.resblocks.{layers + i}." for i in range(options.skipped))
    ends = {prefix + name for name in ("text_projection", "logit_scale")}
    return ends | {key for key in tensors if skipped and key.startswith(skipped)}


def _open_clip_source(name: str) -> Source:
    """Source in OpenCLIP of a parameter of CLIPTextModel. Raises KeyError where it has none."""
    if name in _OPEN_CLIP:
        return Source(_OPEN_CLIP[name])
    _, _, number, rest = name.split(".", 3)  # encoder.layers.N.
    layer, _, leaf = rest.rpartition(".")
    block = f"transformer.resblocks.{number}"
    if layer in _QKV:
        return Source(f"{block}.attn.in_proj_{leaf}", _QKV[layer], stacked=True)
    return Source(f"{block}.{_OPEN_CLIP_LAYER[layer]}.{leaf}")


def clip_state(file: str, tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """OpenCLIP's text encoder in transformers' names; layers beyond so many are left out.

    tensors: by their names there. Raises ModelError for one that has no counterpart.
    """
    state = {}
    names = {short: name for name, short in _OPEN_CLIP.items()}
    inner = {there: layer for layer, there in _OPEN_CLIP_LAYER.items()}
    for name, tensor in tensors.items():
        found = _RESBLOCK.fullmatch(name)
        if name == "text_projection":
            state["text_projection.weight"] = tensor.T.contiguous()
        elif name in names:
            state[f"text_model.{names[name]}"] = tensor
        elif found is None and name != "logit_scale":
            raise ModelError(f"{file}: {name} is not known in a text encoder", _BASE_HINT)
        elif found is not None and int(found[1]) < layers:
            start = f"text_model.encoder.layers.{found[1]}"
            if found[2] == "attn.in_proj":
                for layer, part in zip(_QKV, tensor.chunk(3), strict=True):
                    state[f"{start}.{layer}.{found[3]}"] = part.clone()
            elif found[2] in inner:
                state[f"{start}.{inner[found[2]]}.{found[3]}"] = tensor
            else:
                raise ModelError(f"{file}: {name} is not known in a text encoder", _BASE_HINT)
    return state


def load_tokenizer(checkpoint: str, options: TextOptions, given: str | None) -> Any:
    """CLIP's, from a folder or by its hub id; None: options.tokenizer. Raises ModelError."""
    if importlib.util.find_spec("transformers") is None:
        raise ModelError(
            f"{checkpoint}: its text encoder needs the package transformers",
            "pip install transformers",
        )
    from transformers import CLIPTokenizer

    name = given or options.tokenizer
    try:
        tokenizer: Any = CLIPTokenizer.from_pretrained(name, model_max_length=options.length)
    except Exception as error:  # transformers and the hub raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise ModelError(
            f"{checkpoint}: its tokenizer {name} is not to be had ({reason})", _TOKENIZER_HINT
        ) from error
    # CompVis pads 1.x with the end of the text; OpenCLIP pads with token 0
    tokenizer.pad_token = (
        tokenizer.convert_ids_to_tokens(0) if options.open_clip else tokenizer.eos_token
    )
    return tokenizer
