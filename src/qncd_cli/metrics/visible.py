"""How visible differences are: ColorVideoVDP, a model of human vision without learnt features.

Source: Mantiuk et al. 2024, "ColorVideoVDP: A visual difference predictor for image, video and
display distortions". Its constants come with the package cvvdp.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import BackendUnavailable
from ..progress import Track, no_progress
from .images_on_disk import Images

DISPLAY = "standard_4k"
"""The display that images are seen on: 30 inches, 4K, 200 cd/m^2, from 0.75 m."""
HINT = 'pip install "qncd-cli[cvvdp]"'


def why_not() -> str:
    """Why visible differences cannot be had here; empty where they can."""
    try:
        import pycvvdp  # noqa: F401
    except ImportError as error:
        return f"cvvdp is not installed: {error} ({HINT})"
    return ""


def jod_each(reference: Images, other: Images, track: Track = no_progress) -> list[float]:
    """Quality of each image beside its counterpart in just-objectionable differences, 10 for equal.

    One less, and three of four observers prefer the reference. reference, other: uint8 [N, 1 or 3,
    H, W]. Raises BackendUnavailable where cvvdp is not installed.
    """
    if reason := why_not():
        raise BackendUnavailable(reason)
    import pycvvdp

    metric: Any = pycvvdp.cvvdp(display_name=DISPLAY, quiet=True, device=torch.device("cpu"))
    found = []
    pairs = zip(reference.split(1), other.split(1), strict=True)
    for a, b in track(pairs, "looking for visible differences", len(reference), "images"):
        wide = [image.expand(-1, 3, -1, -1).contiguous() for image in (b, a)]
        with torch.no_grad():
            found.append(float(metric.predict(*wide, dim_order="BCHW")[0]))
    return found
