"""The sections `model` and `sampling` of the configuration: how images are drawn."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .lora_names import split_lora
from .section import MAX_STEPS, Section, Side

MAX_GUIDANCE = 100
"""Published uses stay below 20; far above, every image is saturated or not finite."""
LATER = (
    *("height", "width", "images", "masks", "strength", "inputs"),
    *("control", "control_scale", "lora_branch"),
)
"""Keys of SamplingConfig without which runs were made that stay valid."""


class ModelConfig(Section):
    """The model, and how it is read."""

    source: str = Field(description="zoo:NAME, a diffusers folder or hub id, a checkpoint file")
    compvis_config: str | None = Field(
        None, description="of a CompVis checkpoint: the YAML that was published with it"
    )
    tokenizer: str | None = Field(
        None, description="of a Stable Diffusion checkpoint: a folder or hub id with CLIP's"
    )
    base: str | None = Field(
        None,
        description="of a single file (.safetensors, .ckpt): a pipeline folder or downloaded hub "
        "id of the same kind, with configuration, tokenizers, and the parts that the file lacks",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="precision of what stays unquantized"
    )
    lora: tuple[str, ...] = Field(
        (),
        description="LoRA files (.safetensors), FILE or FILE:WEIGHT each, fused in float32 before "
        "anything else",
    )

    @model_validator(mode="before")
    @classmethod
    def _list_is_a_tuple(cls, data: Any) -> Any:
        lora = data.get("lora") if isinstance(data, dict) else None
        if isinstance(lora, str | list):
            return {**data, "lora": (lora,) if isinstance(lora, str) else tuple(lora)}
        return data

    @model_validator(mode="after")
    def _check_weights(self) -> ModelConfig:
        for lora in self.lora:
            split_lora(lora)
        if self.base is not None and self.compvis_config is not None:
            raise ValueError("base and compvis_config both describe a file: give one of them")
        return self


class SamplingConfig(Section):
    """How images are drawn, for calibration too; null: the model's own."""

    scheduler: Literal[
        "ddim",
        "ddpm",
        "pndm",
        "plms",
        "dpmsolver++",
        "dpmsolver-singlestep",
        "deis",
        "euler",
        "euler-ancestral",
        "heun",
        "kdpm2",
        "kdpm2-ancestral",
        "lms",
        "sa-solver",
        "unipc",
        "lcm",
        "tcd",
        "flow-euler",
        "consistency",
    ] = Field(
        "ddim",
        description="default: the model's own; flow-euler is of rectified flows (SD3, FLUX), and "
        "of no others; lcm, tcd and consistency are of models made for them",
    )
    steps: int = Field(
        20, ge=1, le=MAX_STEPS, description="denoising steps (default: of the model's pipeline)"
    )
    eta: float = Field(
        0.0,
        ge=0,
        le=1,
        description="stochasticity of DDIM (1: DDPM's variance) and TCD (its gamma)",
    )
    guidance_scale: float = Field(
        3.0,
        ge=0,
        le=MAX_GUIDANCE,
        description="classifier-free guidance (default: of the model's pipeline); off at 1, in "
        "diffusers' own pipelines at anything up to 1 (0 keeps the prompt); of class-conditional "
        "models 0 is the null class alone, whatever the class; FLUX.1-dev and latent consistency "
        "models read it as an input",
    )
    seed: int = Field(0, ge=0, description="seed of the first sample; the next ones count up")
    classes: Literal["all"] | tuple[int, ...] = Field(
        "all", description="class labels (prompts by number), taken in turn by seed"
    )
    prompts: tuple[str, ...] | None = Field(
        None, description="of a text model: a list, or a file with one a line; in turn by seed"
    )
    negative_prompt: str = Field("", description="what guidance leads a text model away from")
    image_size: Side | None = Field(
        None,
        description="height and width of images in pixels, if not the model's own: of text models "
        "and of class-conditional U-Nets in latents",
    )
    height: Side | None = Field(
        None,
        description="of the same models, in pixels, together with width, if it is not square",
    )
    width: Side | None = Field(None, description="the same")
    images: tuple[str, ...] | None = Field(
        None,
        description="of Stable Diffusion and SDXL: images that sampling begins from, a file, a "
        "folder or a list; one for each prompt in turn",
    )
    masks: tuple[str, ...] | None = Field(
        None,
        description="of inpainting models: what is painted anew is white; one mask of each "
        "image, or one of all",
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the steps that images are noised and denoised by (default: of the "
        "pipeline)",
    )
    control: tuple[str, ...] | None = Field(
        None,
        description="of a ControlNet: a file, a folder or a list of images that steer, such as "
        "edges or depths, one for each prompt in turn",
    )
    control_scale: float | None = Field(
        None, description="share of what the ControlNet adds; null: all of it"
    )
    lora_branch: tuple[str, ...] | None = Field(
        None,
        description="LoRA files, FILE or FILE:WEIGHT each, computed in floating point beside the "
        "layers as they are; of qncd sample alone",
    )
    inputs: str | None = Field(
        None, description="digest of the files that sampling reads, filled in when it reads them"
    )

    reuse: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="share of the denoiser's MACs that are computed; the rest comes from earlier "
        "steps, by a plan that quantize makes (docs/method.md); null: all is computed",
    )

    @model_validator(mode="before")
    @classmethod
    def _list_is_a_tuple(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        of_files = ("classes", "prompts", "images", "masks", "control", "lora_branch")
        lists = {k: tuple(v) for k in of_files if isinstance(v := data.get(k), list)}
        data = {**data, **lists}
        prompts = data.get("prompts")
        given = [v for k in ("images", "control") if isinstance(v := data.get(k), tuple)]
        if given and isinstance(prompts, tuple) and prompts:
            turns = max(*map(len, given), len(prompts))  # each image has its prompt
            data["prompts"] = tuple(prompts[i % len(prompts)] for i in range(turns))
        if isinstance(data.get("prompts"), tuple):
            data["prompts"] = tuple(_without_mark(text) for text in data["prompts"])
        return {**data, "negative_prompt": _without_mark(data.get("negative_prompt", ""))}

    @model_validator(mode="after")
    def _check(self) -> SamplingConfig:
        if self.classes == ():
            raise ValueError("classes must not be empty; 'all' takes every class in turn")
        if self.prompts == ():
            raise ValueError("prompts must not be empty")
        for key in ("negative_prompt", "images", "control"):
            if getattr(self, key) and self.prompts is None:
                raise ValueError(f"{key} belongs to text models, which need prompts")
        for key in ("masks", "strength"):
            if getattr(self, key) is not None and self.images is None:
                raise ValueError(f"{key} belongs to images")
        if self.control_scale is not None and self.control is None:
            raise ValueError("control_scale belongs to control")
        if self.lora_branch and self.reuse is not None:
            raise ValueError("reuse is planned without a LoRA: with lora_branch set reuse: null")
        for lora in self.lora_branch or ():
            split_lora(lora)
        if self.images is not None and self.calls < 1:
            raise ValueError(
                f"strength {self.strength} of {self.steps} steps leaves none: raise either"
            )
        if self.masks and len(self.masks) not in (1, len(self.images or ())):
            raise ValueError(
                f"{len(self.masks)} masks for {len(self.images or ())} images: one each, or one "
                "for all"
            )
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width belong together (image_size is both)")
        if self.height is not None and self.image_size is not None:
            raise ValueError("image_size is height and width: set either it or these two")
        if self.eta > 0 and self.scheduler not in ("ddim", "tcd"):
            raise ValueError(
                f"eta applies to the ddim scheduler and to tcd, not to {self.scheduler}"
            )
        return self

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width of images in pixels, None for the model's own."""
        if self.height is not None and self.width is not None:
            return self.height, self.width
        return None if self.image_size is None else (self.image_size, self.image_size)

    @property
    def calls(self) -> int:
        """Steps that are made: where images are begun from, the share of them that strength is."""
        return self.steps if self.strength is None else int(self.steps * self.strength)

    def drawn_with(self) -> dict[str, Any]:
        """What decides an image beside its seed; keys that came later only where they are set."""
        tree = self.model_dump(mode="json")
        del tree["seed"], tree["reuse"]  # what that means is in the digest of its plan
        return {key: value for key, value in tree.items() if key not in LATER or value is not None}


def _without_mark(text: Any) -> Any:
    """A text without byte order marks, which editors put at the beginning of files."""
    return text.replace("\ufeff", "") if isinstance(text, str) else text
