"""Draw docs/architecture.svg: the rooms of the package, from the import table of its tests.

    python scripts/architecture.py            writes it
    python scripts/architecture.py --check    fails where the file is another picture

The table is ROOMS in tests/test_layers.py: every room, top first, and the rooms that it may import.
A floor holds rooms that may not import each other. An arrow leads from a room to one that it
may import; it is left out where a longer way leads there, so that every permitted import is a way
downwards. What a room holds is the first sentence of its docstring.
"""

from __future__ import annotations

import ast
import runpy
import textwrap
from html import escape
from pathlib import Path

import written

TABLE = written.ROOT / "tests" / "test_layers.py"
SOURCE = written.ROOT / "src" / "qncd_cli"
PICTURE = written.DOCS / "architecture.svg"
Rooms = list[tuple[str, list[str]]]

WIDTH, MARGIN, GAP = 860, 20, 26
"""Of the picture, around it, and between floors and boxes; in pixels, as all lengths here."""
LINE, PADDING, INDENT, NAME_COLUMN = 17, 9, 12, 118
LETTER = 6.6
"""Width of a letter of the smaller text, rather too wide."""
STYLE = """
text { font-family: ui-sans-serif, system-ui, sans-serif; fill: #1f2933; }
.name { font-size: 14px; font-weight: 600; }
.holds { font-size: 12px; }
.box { fill: #eef3f8; stroke: #7b8794; }
.arrow { stroke: #7b8794; fill: none; marker-end: url(#head); }
"""


def floors(rooms: Rooms) -> list[list[str]]:
    """Rooms by floor, top floor first: a room stands on the highest one that it may import."""
    below = dict(rooms)
    heights: dict[str, int] = {}

    def height(room: str, above: tuple[str, ...] = ()) -> int:
        if room in above:
            raise ValueError(f"rooms import each other: {' -> '.join([*above, room])}")
        if room not in heights:
            found = [
                height(other, (*above, room)) for other in below.get(room, []) if other in below
            ]
            heights[room] = 1 + max(found, default=-1)
        return heights[room]

    for room, _ in rooms:
        height(room)
    top = max(heights.values())
    return [[r for r, _ in rooms if heights[r] == floor] for floor in range(top, -1, -1)]


def arrows(rooms: Rooms) -> list[tuple[str, str]]:
    """Permitted imports that no longer way replaces."""
    below = {room: [other for other in others if other != room] for room, others in rooms}

    def reached(room: str) -> set[str]:
        found = set(below.get(room, []))
        return found.union(*(reached(other) for other in found)) if found else found

    direct = []
    for room, others in below.items():
        around = set().union(*(reached(other) for other in others))
        direct += [(room, other) for other in others if other in below and other not in around]
    return direct


def holds(room: str) -> str:
    """First sentence of the room's docstring; empty where there is no such package."""
    path = SOURCE / room / "__init__.py"
    if not path.is_file():
        return ""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence, dot, _ = " ".join(text.replace("`", "").split()).partition(". ")
    return sentence + dot.strip()


def picture(rooms: Rooms) -> str:
    """The whole SVG."""
    boxes: list[str] = []
    places: dict[str, tuple[float, float, float]] = {}
    y = float(MARGIN)
    for floor in floors(rooms):
        width = (WIDTH - 2 * MARGIN - GAP * (len(floor) - 1)) / len(floor)
        beside = len(floor) == 1  # else what a room holds stands below its name
        room_for_text = width - (NAME_COLUMN if beside else 2 * INDENT)
        texts = {room: textwrap.wrap(holds(room), int(room_for_text / LETTER)) for room in floor}
        rows = max(len(lines) for lines in texts.values())
        height = 2 * PADDING + LINE * (max(1, rows) if beside else 1 + rows)
        for i, room in enumerate(floor):
            x = MARGIN + i * (width + GAP)
            places[room] = (x + width / 2, y, y + height)
            boxes += _box((x, y, width, height), room, texts[room], beside)
        y += height + GAP
    lines = [
        f'<path class="arrow" d="M {places[a][0]:.1f} {places[a][2]:.1f} '
        f'L {places[b][0]:.1f} {places[b][1] - 3:.1f}"/>'
        for a, b in arrows(rooms)
    ]
    size = f'width="{WIDTH}" height="{y - GAP + MARGIN:.0f}"'
    view = f'viewBox="0 0 {WIDTH} {y - GAP + MARGIN:.0f}"'
    head = (
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="4" '
        'orient="auto"><path d="M 0 0 L 8 4 L 0 8 z" fill="#7b8794"/></marker></defs>'
    )
    title = "<title>The rooms of qncd_cli; each may import what its arrows lead to</title>"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view}>',
        title,
        f"<style>{STYLE}</style>",
        head,
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        *lines,
        *boxes,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _box(
    place: tuple[float, float, float, float], room: str, lines: list[str], beside: bool
) -> list[str]:
    """place: x, y, width, height; lines: what the room holds, beside its name or below it."""
    x, y, width, height = place
    base = y + PADDING + LINE - 5
    left, first = (x + NAME_COLUMN, base) if beside else (x + INDENT, base + LINE)
    return [
        f'<rect class="box" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>',
        f'<text class="name" x="{x + INDENT:.1f}" y="{base:.1f}">{escape(room)}</text>',
        *(
            f'<text class="holds" x="{left:.1f}" y="{first + LINE * i:.1f}">{escape(line)}</text>'
            for i, line in enumerate(lines)
        ),
    ]


def pictures() -> dict[Path, str]:
    return {PICTURE: picture(runpy.run_path(str(TABLE))["ROOMS"])}


if __name__ == "__main__":
    written.main(__doc__, pictures)
