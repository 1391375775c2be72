"""Where a trajectory stops being numbers: no image is ever made of what is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import NotFinite

NAMED = 4
"""Samples that a message names."""


def check_finite(values: Tensor, what: str, seeds: Sequence[int], hint: str = "") -> None:
    """Raise NotFinite, with the samples concerned, unless all values [N, ...] are finite.

    what: a phrase that ends where the samples are to be named; seeds: N, or none where samples are
    to be named by their place in the batch.
    """
    if torch.isfinite(values).all():
        return
    rows = [i for i, row in enumerate(values) if not torch.isfinite(row).all()]
    names = [str(seeds[i]) if seeds else str(i) for i in rows]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    kind = ("seed" if seeds else "sample") + ("s" if len(names) > 1 else "")
    message = f"{what} {kind} {', '.join(names[:NAMED])}{more}"
    raise NotFinite(message, hint, [seeds[i] for i in rows] if seeds else ())
