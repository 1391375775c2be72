"""The plan of reuse across steps as a picture: steps from left to right, sites below each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDTH = 80
COMPUTED, KEPT = "#", "."


def computed(body: Mapping[str, Any]) -> dict[str, list[bool]]:
    """Whether what lies within a site, and within no narrower one, is computed, by site and step.

    body: of the artifact.
    """
    found = {}
    for chain in body["chains"]:
        for place, site in enumerate(chain):
            around = set(chain[: place + 1])
            found[site] = [not around & set(names) for names in body["kept"]]
    return found


def picture(body: Mapping[str, Any]) -> list[str]:
    """Lines of at most WIDTH columns; more steps than fit go on below."""
    rows = computed(body)
    label = max(map(len, rows))
    columns = max(10, (WIDTH - label - 2) // 10 * 10)
    steps = len(body["kept"])
    lines = [
        f"reuse: {body['share']:.0%} of the denoiser's MACs, by step "
        f"({COMPUTED} computed, {KEPT} kept from before)"
    ]
    for start in range(0, steps, columns):
        shown = range(start, min(start + columns, steps))
        ruler = "".join(str((step + 1) // 10 % 10) if step % 10 == 9 else " " for step in shown)
        lines.append(f"{'step':{label}}  {ruler}".rstrip())
        for site, of_steps in rows.items():
            marks = "".join(COMPUTED if of_steps[step] else KEPT for step in shown)
            lines.append(f"{site:{label}}  {marks}")
    return lines
