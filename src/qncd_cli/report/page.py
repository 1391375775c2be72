"""Metrics as something to read: an HTML file that needs nothing beside it, a table, a picture.

Everything that comes from outside (titles, names, metadata) is escaped here and nowhere else.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..metrics.rows import Row, columns, rows
from ..metrics.tensor import psnr_db
from ..vocabulary import DIRECTIONS, NUMBERS, cell, is_number, number, terms
from .curve import line_chart

Pair = tuple[str, Tensor, Tensor]  # title, full precision, quantized; uint8 [C, H, W]

SMALL_PIXELS = 160  # images narrower than this are enlarged, pixel by pixel, to about this width
SHEET_GAP = 2  # pixels between the images of a contact sheet
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p, figcaption, dt { color: #57606a; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid #d8dee4; text-align: right; }
.wide, .chart { overflow-x: auto; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #8c959f; }
.range { color: #57606a; font-size: .85em; white-space: nowrap; }
svg { width: 100%; height: auto; }
.pairs { display: grid; gap: 1.2rem;
         grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--pair)), 1fr)); }
figure { margin: 0; } .pair { display: flex; gap: .5rem; }
.pair div { flex: 1; font-size: .8rem; color: #57606a; }
img { display: block; width: 100%; border: 1px solid #d8dee4; }
img.small { image-rendering: pixelated; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 1rem; } summary { cursor: pointer; color: #57606a; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; } th, td { padding: .35rem .3rem; }
  .range { display: block; } .chart svg { min-width: 36rem; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; }
  .wide thead { display: none; } .wide tr { display: block; padding: .8rem 0; }
  .wide td { display: flex; justify-content: space-between; gap: 1rem; border: 0; }
  .wide td::before { content: attr(data-name); color: #57606a; text-align: left; }
  .wide td:first-child { font-weight: 600; border-bottom: 1px solid #8c959f; }
}
"""


def html_report(
    metrics: Mapping[str, Any],
    curves: Mapping[str, Sequence[float | None]],
    pairs: Mapping[str, Sequence[Pair]],
    title: str,
    meta: Mapping[str, Any],
) -> str:
    """One self-contained HTML page: metrics, checks, SQNR over the sampling steps, image pairs.

    metrics: the object of metrics.json (values may be None or inf); curves: name -> SQNR in dB of
    every sampling step; pairs: heading -> uint8 [C, H, W] images of the same seed, C 1 or 3; meta:
    what was measured, shown before the protocol of metrics.json. Empty parts are left out.
    Raises ValueError if a pair is not uint8 or of two shapes.
    """
    parts = [f"<h1>{escape(title)}</h1>", _table(metrics), _checks(metrics)]
    if any(len(values) for values in curves.values()):
        parts.append("<h2>SQNR of the noise prediction over the sampling steps</h2>")
        parts.append(chart(curves, "sampling step", "SQNR, dB"))
    for heading_, some in pairs.items():
        parts.append(f"<h2>The same seeds in full precision and quantized: {escape(heading_)}</h2>")
        width = max(SMALL_PIXELS, *(full.shape[-1] for _, full, _ in some))
        figures = "".join(map(_figure, some))
        parts.append(f'<div class="pairs" style="--pair: {2 * width + 16}px">{figures}</div>')
    protocol = {k: v for k, v in _mapping(metrics.get("protocol")).items() if v != {}}
    if meta or protocol:
        parts.append("<h2>What was measured</h2>")
        parts.append(definitions(meta))
    if protocol:
        inner = definitions(protocol)
        parts.append(f"<details><summary>The whole protocol</summary>{inner}</details>")
    return page(title, parts)


def chart(curves: Mapping[str, Sequence[float | None]], x_name: str, y_name: str) -> str:
    """A line chart, to be scrolled where the screen is narrow."""
    return f'<div class="chart">{line_chart(curves, x_name, y_name)}</div>'


def page(title: str, parts: Iterable[str]) -> str:
    """A self-contained HTML page of parts that are HTML already; empty ones are left out."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    body = "\n".join(part for part in parts if part)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A Markdown table of the named columns; a column of numbers is aligned right.

    A key that a row lacks reads as None. Ends with a newline.
    """
    right = [all(is_number(row.get(name)) for row in rows) for name in columns]
    lines = [list(columns), ["---:" if numeric else "---" for numeric in right]]
    lines += [[_plain(row.get(name)) for name in columns] for row in rows]
    return "".join("| " + " | ".join(map(_markdown_cell, line)) + " |\n" for line in lines)


def contact_sheet(images: Tensor, columns: int | None = None, scale: int = 1) -> Image.Image:
    """uint8 [N, 1 or 3, H, W] -> one RGB picture, row by row, on white.

    columns: as many as rows unless given; scale: every pixel becomes scale x scale.
    Raises ValueError if the images are of another dtype or shape, none, or columns or scale < 1.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"expected images uint8 [N, 1 or 3, H, W], got {found}")
    count = len(images)
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    if count == 0 or columns < 1 or scale < 1:
        raise ValueError(f"cannot lay out {count} images in {columns} columns at scale {scale}")
    columns = min(columns, count)
    height, width = (side * scale for side in images.shape[-2:])
    step_x, step_y = width + SHEET_GAP, height + SHEET_GAP
    size = (columns * step_x - SHEET_GAP, math.ceil(count / columns) * step_y - SHEET_GAP)
    sheet = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        picture = _to_picture(image).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(picture, (index % columns * step_x, index // columns * step_y))
    return sheet


def _table(metrics: Mapping[str, Any]) -> str:
    found = rows(metrics)
    if not found:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ["", *columns(metrics)])
    body = "".join(
        f"<tr><td>{escape(row.label)}</td>"
        + "".join(f"<td>{_cell(row.key, value)}</td>" for value in row.values)
        + "</tr>"
        for row in found
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"{table}<p>{escape(DIRECTIONS)}</p>{_terms(found)}"


def _checks(metrics: Mapping[str, Any]) -> str:
    """What was noted of the images before anything was measured."""
    notes = [note["says"] for note in metrics.get("checks") or ()]
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<h2>To know before reading the numbers</h2><ul>{items}</ul>"


def _terms(found: Sequence[Row]) -> str:
    """A sentence for each word of the table that a newcomer may not know."""
    known = terms(row.label for row in found)
    return definitions(known) if known else ""


def _cell(key: str, value: Any) -> str:
    """A number, or an entry {value, low, high}, as HTML."""
    if key not in NUMBERS:
        return escape(_plain(value))
    if not isinstance(value, Mapping):
        return escape(cell(key, value))
    low, high = value.get("low"), value.get("high")
    text = escape(cell(key, value.get("value")))
    if low is None or high is None:
        return text
    return f'{text} <span class="range">{escape(f"[{number(low)}, {number(high)}]")}</span>'


def _figure(pair: Pair) -> str:
    title, full, quantized = pair
    psnr = number(psnr_db(full[None], quantized[None]))
    small = ' class="small"' if full.shape[-1] < SMALL_PIXELS else ""
    sides = "".join(
        f'<div><img{small} src="{_data_uri(image)}" alt="{escape(title)}, {name}">{name}</div>'
        for name, image in (("full precision", full), ("quantized", quantized))
    )
    caption = f"<figcaption>{escape(title)}: PSNR {psnr} dB</figcaption>"
    return f'<figure><div class="pair">{sides}</div>{caption}</figure>'


def _data_uri(image: Tensor) -> str:
    buffer = io.BytesIO()
    _to_picture(image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _to_picture(image: Tensor) -> Image.Image:
    """uint8 [1 or 3, H, W] -> RGB picture."""
    return Image.fromarray(image.cpu().expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def definitions(values: Mapping[str, Any]) -> str:
    items = (
        f"<dt>{escape(str(key))}</dt><dd>{escape(_plain(value))}</dd>"
        for key, value in values.items()
    )
    return f"<dl>{''.join(items)}</dl>"


def _plain(value: Any) -> str:
    """Any JSON value as text."""
    if value is None or isinstance(value, int | float):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _markdown_cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
