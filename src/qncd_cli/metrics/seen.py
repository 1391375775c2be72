"""What there is to notice of single images, whatever network looks at them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .images_on_disk import CHUNK, Images


class Seen:
    """What there is to notice of images, which pass one chunk after the other.

    digests: of the pixels of each; colours: of each the one colour that it is of, a value for each
    channel, or None; brightest: the largest value of any pixel.
    """

    def __init__(self) -> None:
        self.digests: list[str] = []
        self.colours: list[list[int] | None] = []
        self.brightest = 0

    @classmethod
    def of(cls, images: Images) -> Seen:
        seen = cls()
        for chunk in images.split(CHUNK):
            seen.add(chunk)
        return seen

    def add(self, images: Tensor) -> None:
        """The next images, uint8 [N, C, H, W]."""
        pixels = images.flatten(2)  # [N, C, H * W]
        low, high = pixels.amin(2), pixels.amax(2)
        flat = (low == high).all(1).tolist()
        self.colours += [c if f else None for c, f in zip(low.tolist(), flat, strict=True)]
        self.digests += [hashlib.sha256(i.contiguous().numpy()).hexdigest() for i in images]
        self.brightest = max(self.brightest, int(pixels.amax()))

    def flat(self) -> dict[int, tuple[int, ...]]:
        """Images of one colour: row -> that colour. All zeros is black."""
        return {row: tuple(c) for row, c in enumerate(self.colours) if c is not None}

    def duplicates(self) -> dict[int, int]:
        """Images that equal an earlier one in every pixel: row -> the first such row."""
        first: dict[str, int] = {}
        found = {}
        for row, digest in enumerate(self.digests):
            if first.setdefault(digest, row) != row:
                found[row] = first[digest]
        return found

    @classmethod
    def joined(cls, parts: Sequence[Seen]) -> Seen:
        """All images of parts, one part after the other."""
        seen = cls()
        for part in parts:
            seen.digests += part.digests
            seen.colours += part.colours
            seen.brightest = max(seen.brightest, part.brightest)
        return seen

    def take(self, rows: Sequence[int]) -> Seen:
        """What was noticed, with these images in this order."""
        seen = Seen()
        seen.digests = [self.digests[row] for row in rows]
        seen.colours = [self.colours[row] for row in rows]
        seen.brightest = self.brightest
        return seen

    def told(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return {"digests": self.digests, "colours": self.colours, "brightest": self.brightest}

    @classmethod
    def of_told(cls, told: dict[str, Any]) -> Seen:
        """What was told."""
        seen = cls()
        vars(seen).update(told)
        return seen
