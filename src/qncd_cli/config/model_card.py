"""What a model says of itself in its own small files: kind, scheduler, steps, guidance.

Nothing is loaded, no network asked, and neither torch nor diffusers imported: model_index.json and
scheduler_config.json of a folder (packaged, own, or in the hub's cache), the YAML of a checkpoint.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..sampling.scheduler_classes import DISTILLED
from ..store.regular import read_regular
from .yaml_text import YamlError, read_yaml

Needs = Literal["prompts", "classes"]
CHECKPOINTS = (".ckpt", ".pt", ".pth", ".safetensors")
INDEX = "model_index.json"
_ZOO = Path(__file__).resolve().parents[1] / "zoo"

PIPELINES: dict[str, tuple[int, float, Needs | None]] = {
    "StableDiffusionPipeline": (50, 7.5, "prompts"),
    "StableDiffusionXLPipeline": (50, 5.0, "prompts"),
    "LatentConsistencyModelPipeline": (4, 8.5, "prompts"),
    "StableDiffusionImg2ImgPipeline": (50, 7.5, "prompts"),
    "StableDiffusionInpaintPipeline": (50, 7.5, "prompts"),
    "StableDiffusionXLImg2ImgPipeline": (50, 5.0, "prompts"),
    "StableDiffusionXLInpaintPipeline": (50, 7.5, "prompts"),
    "StableDiffusionControlNetPipeline": (50, 7.5, "prompts"),
    "StableDiffusionXLControlNetPipeline": (50, 5.0, "prompts"),
    "StableDiffusion3Pipeline": (28, 7.0, "prompts"),
    "FluxPipeline": (28, 3.5, "prompts"),
    "PixArtAlphaPipeline": (20, 4.5, "prompts"),
    "PixArtSigmaPipeline": (20, 4.5, "prompts"),
    "DiTPipeline": (50, 4.0, "classes"),
    "ClassConditionalLDMPipeline": (20, 3.0, "classes"),
    "ClassConditionalPixelPipeline": (20, 3.0, "classes"),
    "ClassConditionalDiTPipeline": (20, 3.0, "classes"),
    "DDPMPipeline": (1000, 1.0, None),
    "DDIMPipeline": (50, 1.0, None),
    "LDMPipeline": (50, 1.0, None),
    "ConsistencyModelPipeline": (1, 1.0, None),
}
"""Pipeline class: the steps and the guidance that it is called with by default (1: none), and what
its samples are asked for by."""
_SCHEDULERS = {
    "CMStochasticIterativeScheduler": "consistency",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpmsolver++",
    "DPMSolverSinglestepScheduler": "dpmsolver-singlestep",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "flow-euler",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "kdpm2-ancestral",
    "KDPM2DiscreteScheduler": "kdpm2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "SASolverScheduler": "sa-solver",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}
STRENGTHS = {
    "StableDiffusionPipeline": 0.8,
    "StableDiffusionImg2ImgPipeline": 0.8,
    "StableDiffusionInpaintPipeline": 1.0,
    "StableDiffusionXLPipeline": 0.3,
    "StableDiffusionXLImg2ImgPipeline": 0.3,
    "StableDiffusionXLInpaintPipeline": 0.9999,
}
"""Pipeline class that can begin from images -> the share of the steps by default; of a class that
makes images from text alone, that of its relative."""
DISTILLED_STEPS = 4
"""Steps of a folder with a scheduler of distilled models, whatever its pipeline's class (LCM,
arXiv 2310.04378: 2 to 4; TCD, arXiv 2402.19159: 4)."""
_COMPVIS: dict[str, tuple[int, float, Needs | None]] = {
    "FrozenCLIPEmbedder": (50, 7.5, "prompts"),
    "FrozenOpenCLIPEmbedder": (50, 7.5, "prompts"),
    "ClassEmbedder": (20, 3.0, "classes"),
    "": (50, 1.0, None),
}
"""Class that conditions a CompVis model -> steps, guidance, needs, as in CompVis' scripts."""


@dataclass(frozen=True)
class Card:
    """kind: pipeline class; scheduler: our name of the model's own, None where there is none like
    it; guidance_scale: 1 for none."""

    kind: str
    scheduler: str | None
    scheduler_class: str
    steps: int
    guidance_scale: float
    needs: Needs | None


def is_hub_id(source: str) -> bool:
    """Whether a model source can be nothing else: owner/name, and no such folder here."""
    plain = source.count("/") == 1 and source[0] not in "./~" and ":" not in source
    return plain and not source.endswith(CHECKPOINTS) and not os.path.exists(source)


def is_model(source: str) -> bool:
    """Whether a word on the command line names a model, as far as names and folders say."""
    if source.startswith(("zoo:", "random:")) or source.endswith(CHECKPOINTS):
        return True
    return os.path.isfile(os.path.join(source, INDEX))


def folder_of(source: str) -> Path | None:
    """The pipeline folder of a source that is on this machine; None for all others."""
    if source.startswith("zoo:"):
        folder = _ZOO / source.removeprefix("zoo:")
    elif is_hub_id(source):
        from huggingface_hub import constants

        kept = os.path.join(constants.HF_HUB_CACHE, f"models--{source.replace('/', '--')}")
        if not os.path.isdir(kept):  # the look-up itself takes 0.15 s to import
            return None
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(source, INDEX)
        return Path(found).parent if isinstance(found, str) else None
    else:
        folder = Path(source)
    return folder if os.path.isfile(folder / INDEX) else None


def card_of(source: str, compvis_config: str | None = None, base: str | None = None) -> Card | None:
    """None where nothing is said: a source that is not here, damaged, of another kind."""
    if source.endswith(CHECKPOINTS):
        return _checkpoint(compvis_config) if base is None else card_of(base)
    folder = folder_of(source)
    if folder is None:
        return None
    index = read_tree(folder / INDEX)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        return None
    steps, guidance, needs = PIPELINES[kind]
    if kind == "ConsistencyModelPipeline":
        classes = read_tree(folder / "unet" / "config.json").get("num_class_embeds")
        needs = needs if classes is None else "classes"
    denoiser = read_tree(folder / "transformer" / "config.json")
    if kind == "FluxPipeline" and not denoiser.get("guidance_embeds", False):
        guidance = 1.0  # schnell reads none
    own = read_tree(folder / "scheduler" / "scheduler_config.json")
    name = str(own.get("_class_name") or (index.get("scheduler") or [None, ""])[1])
    if name in DISTILLED:
        steps = DISTILLED_STEPS
        if read_tree(folder / "unet" / "config.json").get("time_cond_proj_dim") is None:
            guidance = 1.0  # it was distilled into the weights
    return Card(kind, _short(name, own), name, steps, guidance, needs)


def read_tree(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none, which loading says in its own words."""
    try:
        tree = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _short(name: str, own: dict[str, Any]) -> str | None:
    if name == "PNDMScheduler" and own.get("skip_prk_steps", False):
        return "plms"
    return _SCHEDULERS.get(name)


def _checkpoint(compvis_config: str | None) -> Card | None:
    try:
        params = read_yaml(Path(compvis_config or ""))["model"]["params"]
        stage = params.get("cond_stage_config")
        embedder = stage["target"] if isinstance(stage, dict) else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, YamlError):
        return None
    found = _COMPVIS.get(str(embedder).rpartition(".")[2])
    return Card("CompVis checkpoint", "ddim", "DDIM", *found) if found else None
