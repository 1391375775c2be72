"""CLIP score: how well images show what their prompts say.

Source: Hessel et al. 2021 (arXiv 2104.08718): 100 times the cosine of CLIP's embeddings of image
and prompt, not below 0. The model is transformers', from a local folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import ArtifactError, BackendUnavailable
from ..progress import Track, counted, no_progress
from . import bootstrap
from .image_files import digest_of_files
from .images_on_disk import Images
from .networks import first_line

BATCH = 16
NEEDED = ("config.json", "preprocessor_config.json")
HINT = 'pip install "qncd-cli[text]"'


@dataclass(frozen=True)
class ClipModel:
    """folder: in the layout of transformers; sha256: of its weights."""

    folder: Path
    sha256: str

    @property
    def name(self) -> str:
        """clip@ and the beginning of the digest: the folder may be called anything."""
        return f"clip@{self.sha256[:8]}"


def find_clip(folder: Path) -> ClipModel:
    """The model in a folder. Raises BackendUnavailable where it is not there."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(f"--clip: {first_line(error)}", HINT) from error
    weights = sorted(folder.glob("*.safetensors"))
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    missing += [] if weights else ["model.safetensors"]
    if missing:
        raise BackendUnavailable(
            f"--clip {folder}: no CLIP model: {', '.join(missing)} missing",
            "name a folder of transformers' CLIPModel with its processor, as on the hub",
        )
    return ClipModel(folder, digest_of_files(weights))


def clip_scores(
    images: Images, prompts: Sequence[str], model: ClipModel, track: Track = no_progress
) -> Tensor:
    """The score of each image with its prompt, float64 [N], from 0 to 100.

    images: uint8 [N, 1 or 3, H, W]; prompts: N, cut to what CLIP's text encoder reads. Raises
    ArtifactError for a folder that holds another model.
    """
    network, processor = _load(model.folder)
    distinct = list(dict.fromkeys(prompts))
    with torch.no_grad():
        told = [_unit(_told(network, processor, text)) for text in distinct]
        row_of = {text: row for row, text in enumerate(distinct)}
        texts = torch.cat(told)
        found: list[Tensor] = []
        chunks = images.split(BATCH)
        for chunk, tick in counted(track, chunks, "CLIP score", len(images), "images"):
            rows = [row_of[text] for text in prompts[len(found) : len(found) + len(chunk)]]
            pixels = processor[0](
                list(chunk.expand(-1, 3, -1, -1)),
                return_tensors="pt",
                input_data_format="channels_first",
            )["pixel_values"]
            shown = _unit(_vector(network.get_image_features(pixel_values=pixels)))
            found += list((shown * texts[rows]).sum(1).clamp(min=0) * 100)
            for _ in chunk:
                tick()
    return torch.stack(found)


def entry_of(
    scores: Tensor, model: ClipModel, seed: int
) -> tuple[dict[str, float | str | None], np.ndarray]:
    """`clip_score` of a set in metrics.json, and what a bootstrap makes of its mean.

    scores: of clip_scores; seed: of the draws, which two sets share.
    """
    drawn, mean = bootstrap.weights(len(scores), seed=seed), scores.mean().item()
    replicates = (drawn @ scores / len(scores)).numpy()
    low, high = bootstrap.interval(mean, replicates, (0, 100))
    return {"network": model.name, "value": mean, "low": low, "high": high}, replicates


def _told(network: Any, processor: Any, text: str) -> Tensor:
    words = processor[1]([text], truncation=True, return_tensors="pt")
    return _vector(
        network.get_text_features(
            input_ids=words["input_ids"], attention_mask=words["attention_mask"]
        )
    )


def _vector(found: Any) -> Tensor:
    """Embeddings [N, D]: transformers 5 returns them inside of an object."""
    vector: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return vector


def _unit(vectors: Tensor) -> Tensor:
    rows = vectors.to(torch.float64)
    return rows / rows.norm(dim=1, keepdim=True)


def _load(folder: Path) -> tuple[Any, Any]:
    """CLIPModel, and its image processor and tokenizer."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of files that are here
    logging.set_verbosity_error()
    here: dict[str, Any] = {"local_files_only": True}
    try:
        loaded: Any = CLIPModel.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **here
        )
        processor = (
            CLIPImageProcessor.from_pretrained(folder, **here),
            CLIPTokenizer.from_pretrained(folder, **here),
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder}: not a CLIP model: {first_line(error)}", "fetch it again"
        ) from error
    network, info = loaded
    if info["missing_keys"]:
        first = min(info["missing_keys"])
        raise ArtifactError(f"{folder}: not a whole CLIP model: without {first}", "fetch it again")
    return network.eval(), processor
