"""What human raters said, as a part of a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from ..vocabulary import MISSING, number
from .rendering import part


def tallied(tally: Mapping[str, Any]) -> Markup:
    """The tables of a tally. tally: the content of study.json."""
    return part(
        "tally.html",
        tally=tally,
        share=share,
        left_out=[rater for rater in tally["raters"] if rater["left_out"]],
        kappa=kappa(tally),
    )


def share(entry: Mapping[str, Any]) -> str:
    """A share in percent with its interval: "62.5 % [45.8, 77.3]"."""
    if entry["value"] is None:
        return MISSING
    value, low, high = (100 * entry[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def kappa(tally: Mapping[str, Any]) -> str:
    """Agreement as a sentence."""
    if tally["fleiss_kappa"] is None:
        return "Agreement needs two raters who answered the same trials."
    return (
        f"Agreement (Fleiss' kappa; 0 chance, 1 full): {number(tally['fleiss_kappa'])} over the "
        f"{tally['kappa_trials']} trials that all of them answered."
    )
