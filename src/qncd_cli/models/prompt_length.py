"""Prompts beside what their encoders read: what is too long is cut, and that is said."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

Tell = Callable[[str], None]
"""Hears what a user should know."""


def untold(_: str) -> None:
    """Tell nobody."""


_T5 = {
    "PixArtAlphaPipeline": "tokenizer",
    "PixArtSigmaPipeline": "tokenizer",
    "StableDiffusion3Pipeline": "tokenizer_3",
    "FluxPipeline": "tokenizer_2",
}
"""Pipeline class: the tokenizer whose length is the pipeline's, not its own."""
_QUOTED = 40


@dataclass(frozen=True)
class Reader:
    """A tokenizer; limit: tokens of a prompt that its encoder reads, marks of its ends included."""

    tokenizer: Any
    limit: int

    def read(self, text: str) -> tuple[list[int], list[int]]:
        """Tokens that are read, and those beyond them."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        room = self.limit - self.tokenizer.num_special_tokens_to_add()
        return tokens[:room], tokens[room:]


def readers(pipeline: Any) -> list[Reader]:
    """Readers of a text pipeline, one for each of its tokenizers."""
    kind = type(pipeline).__name__
    found = []
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = pipeline.components.get(name)
        if tokenizer is None:
            continue
        if name == _T5.get(kind):
            limit = inspect.signature(pipeline.encode_prompt).parameters["max_sequence_length"]
            found.append(Reader(tokenizer, limit.default))
        else:
            found.append(Reader(tokenizer, tokenizer.model_max_length))
    return found


def check_lengths(pipeline: Any, texts: Sequence[str], negative: str, tell: Tell) -> None:
    """Tell of prompts that no encoder of the pipeline reads to their end.

    Raises ConfigError where two different prompts are the same to all encoders because of it.
    """
    those = readers(pipeline)
    cut: dict[str, str] = {}
    seen: dict[tuple[tuple[int, ...], ...], str] = {}
    for text in dict.fromkeys((*texts, negative)):
        parts = [reader.read(text) for reader in those]
        if all(beyond for _, beyond in parts):
            fewest = min(range(len(parts)), key=lambda i: len(parts[i][1]))
            cut[text] = those[fewest].tokenizer.decode(parts[fewest][1]).strip()
        if text not in texts:
            continue
        other = seen.setdefault(tuple(tuple(read) for read, _ in parts), text)
        if other != text and {other, text} & cut.keys():
            raise ConfigError(
                f"sampling.prompts: {_quoted(other)} and {_quoted(text)} differ only beyond the "
                f"{max(r.limit for r in those)} tokens that the text encoder reads",
                "shorten them, or put first what differs",
            )
    if cut:
        first, dropped = next(iter(cut.items()))
        which, most = "is" if len(cut) == 1 else "are", max(r.limit for r in those)
        tell(
            f"{len(cut)} of {len(texts)} prompts {which} longer than the {most} tokens that the "
            f"text encoder reads; of {_quoted(first)} this is dropped: {dropped}"
        )


def _quoted(text: str) -> str:
    return f'"{text}"' if len(text) <= _QUOTED else f'"{text[:_QUOTED]}..."'
