"""The text encoders of a pipeline, as one module and with what encodes prompts by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..progress import Track, no_progress
from .folder_check import is_there, read_index
from .prompt_length import untold
from .text import Encoded, Prompts, encode

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Their names among a pipeline's components."""


@dataclass(frozen=True)
class OtherEncoders:
    """Text encoders that are computed otherwise than a pipeline's own.

    key: tells what they make apart from what others make; install: puts them into the module of all
    (`encoders_of`).
    """

    key: str
    install: Callable[[nn.Module], None]


@dataclass(frozen=True)
class TextEncoders:
    """A pipeline's text encoders, and the prompts that they are for."""

    pipeline: Any
    prompts: Prompts

    def some(self, most: int) -> TextEncoders:
        """The same for so many of the prompts at most, evenly picked."""
        texts = self.prompts.texts[:: -(-len(self.prompts.texts) // most)]
        return replace(self, prompts=replace(self.prompts, texts=texts))

    @property
    def module(self) -> nn.Module:
        return encoders_of(self.pipeline)

    def encode(self, track: Track = no_progress) -> Encoded:
        """What they make of the prompts as they are now."""
        return encode(self.pipeline, self.prompts, untold, track)


def encoders_of(pipeline: Any) -> nn.Module:
    """All text encoders below their names. What is put in the place of one's layers is in it."""
    parts = pipeline.components
    return nn.ModuleDict({n: parts[n] for n in TEXT_ENCODERS if parts.get(n) is not None})


def described_encoders(folder: Path, source: str) -> nn.Module:
    """The text encoders of a pipeline folder without their weights, on the meta device.

    Raises ModelError, and whatever transformers does for a configuration that it cannot read.
    """
    import transformers

    index, found = read_index(folder, source), dict[str, nn.Module]()
    for name in TEXT_ENCODERS:
        if is_there(index, name) and index[name][0] == "transformers":
            kind = getattr(transformers, index[name][1])
            config = kind.config_class.from_pretrained(folder / name)
            with torch.device("meta"):
                found[name] = kind(config)
    return nn.ModuleDict(found)
