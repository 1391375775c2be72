"""Pictures in a terminal: as such where it can show them, else in half-blocks.

The optional package textual-image (extra show) knows the protocols of kitty and of terminals with
sixels (iTerm2, WezTerm, foot, xterm and others) and asks the terminal for what it can; without it,
and elsewhere, every character cell shows two pixels.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = 160
"""Columns of a picture at most; wider ones scroll far."""
TALL = 0.8
"""Height of what is shown over its width, at most; taller ones leave the screen."""
UPPER_HALF = "\u2580"


def show_picture(path: Path) -> None:
    """Print the upper part of an image file on stdout, as wide as the terminal or as it is; where
    there are no colours, where the file is."""
    from PIL import Image
    from rich.console import Console

    width = min(shutil.get_terminal_size((80, 24)).columns, LARGEST)
    console = Console(file=sys.stdout, width=width)
    if console.color_system is None:
        print(f"no colours here to draw {path} in")
        return
    with Image.open(path) as file:
        image = file.crop((0, 0, file.width, min(file.height, round(TALL * file.width))))
        console.print(_protocol(image, width) or half_blocks(image.convert("RGB"), width))


def _protocol(image: Image, width: int) -> Any | None:
    """The picture in the terminal's own protocol, None where there is none."""
    if not sys.stdout.isatty():
        return None
    with suppress(ImportError):
        from textual_image.renderable import HalfcellImage, SixelImage, TGPImage
        from textual_image.renderable import Image as Best

        if Best in (SixelImage, TGPImage) and Best is not HalfcellImage:
            return Best(image, width=width, height="auto")
    return None


def half_blocks(image: Image, width: int) -> Any:
    """Two pixels to a character, the upper in its colour and the lower in its background.

    image: RGB; width: in characters, at most; narrower pictures stay as they are.
    """
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    columns = min(width, image.width)
    rows = max(1, round(image.height * columns / image.width / 2))
    small = image.resize((columns, 2 * rows))
    data = small.tobytes()
    pixels = [Color.from_rgb(*data[i : i + 3]) for i in range(0, len(data), 3)]
    text = Text(no_wrap=True)
    for row in range(rows):
        for column in range(columns):
            upper, lower = (pixels[(2 * row + i) * columns + column] for i in (0, 1))
            text.append(UPPER_HALF, Style(color=upper, bgcolor=lower))
        text.append("\n" if row + 1 < rows else "")
    return text
