"""report.html: metrics as a page that needs nothing beside it, for a desk and for a phone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from markupsafe import Markup

from ..metrics.tensor import CHANGED_DB
from ..vocabulary import DIRECTIONS, IDENTICAL_DB, NUMBERS, cell, heading
from .charts import histogram, line_chart
from .headline import head_table, verdict
from .images import AMPLIFIED, Pair, encode_all
from .insight import HEAT, HEAT_DB, Network, NoiseCurves, Ranges
from .rendering import part, render
from .tables import plain

SMALL_PIXELS = 160
"""Images narrower than this are enlarged, pixel by pixel."""
PICTURE = 110
"""Pixels of a picture of a triple on a page, at least where there is room."""
CLASSES_SHOWN = 40
"""Rows of the table of classes; the worst of more."""
STEP = "sampling step"


@dataclass(frozen=True)
class Group:
    """Pairs under one heading. folded: to be opened by whoever wants more of them."""

    heading: str
    pairs: Sequence[Pair]
    folded: bool = False


@dataclass(frozen=True)
class Report:
    """What a report is made of; parts that are empty are left out of it.

    metrics: the object of metrics.json (values may be None or infinite); model: its short name;
    curves: name -> SQNR in dB of every sampling step; classes: class, or number of a prompt -> PSNR
    of its images in dB; class_name: what these are; others: name -> metrics.json of further sets
    that were measured alike; bench: the content of bench.json of the model; facts: what was
    measured, shown before the protocol; commands: that reproduce it; study: a part of a page;
    deviations: name -> mean and spread of what a set's predictions differ by at every step.
    """

    metrics: Mapping[str, Any]
    title: str
    model: str = "the model"
    date: str = ""
    groups: Sequence[Group] = ()
    curves: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    classes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    class_name: str = "class"
    noise: NoiseCurves | None = None
    network: Network | None = None
    ranges: Sequence[Ranges] = ()
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bench: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()
    study: Markup | None = None
    deviations: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Shown:
    title: str
    said: str
    views: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class _Class:
    name: str
    count: int
    median: str
    worst: str
    share: int


def html_report(report: Report) -> str:
    """One self-contained HTML page. Raises ValueError if a pair is not uint8 or of two shapes."""
    metrics = report.metrics
    pairs = [pair for group in report.groups for pair in group.pairs]
    encoded = encode_all([image for pair in pairs for image in pair.images])
    uris = iter(encoded.uris)
    groups = [
        {
            "heading": group.heading,
            "folded": group.folded,
            "pairs": [_shown(pair, list(islice(uris, 3))) for pair in group.pairs],
        }
        for group in report.groups
    ]
    width = pairs[0].full.shape[-1] if pairs else 0
    height = pairs[0].full.shape[-2] if pairs else 0
    psnr = list(
        _mapping(_mapping(metrics.get("fidelity")).get("per_seed")).get("psnr_db", {}).values()
    )
    protocol = {k: v for k, v in _mapping(metrics.get("protocol")).items() if v != {}}
    classes, more = _classes(report.classes)
    return render(
        "report.html",
        title=report.title,
        verdict=verdict(metrics, report.model, report.date),
        head=head_table(metrics, report.others, report.bench),
        directions=DIRECTIONS,
        notes=[note["says"] for note in metrics.get("checks") or ()],
        groups=groups,
        encoding=encoded.note,
        amplified=AMPLIFIED,
        small=width < SMALL_PIXELS,
        size=Markup(f' width="{width}" height="{height}" decoding="async"'),
        wide=3 * max(PICTURE, min(width, 2 * PICTURE)) + 8,
        histogram=_histogram(psnr),
        spread=_spread(psnr),
        classes=classes,
        more_classes=more,
        class_name=report.class_name,
        steps=_steps(report),
        network=report.network,
        heat=_heat(),
        ranges=[(ranges, _range_chart(ranges)) for ranges in report.ranges],
        study=report.study,
        facts=report.facts,
        protocol=protocol,
        commands=report.commands,
        definitions=definitions,
    )


def definitions(values: Mapping[str, Any]) -> Markup:
    """Names and values as a list, JSON values as text."""
    return part("definitions.html", values=[(str(k), plain(v)) for k, v in values.items()])


def _shown(pair: Pair, uris: Sequence[str]) -> _Shown:
    said = f"{pair.title}: {NUMBERS['psnr_db'].name} {_decibels(pair.psnr)}"
    names = ("full precision", "quantized", f"difference times {AMPLIFIED}")
    return _Shown(pair.title, said, list(zip(names, uris, strict=True)))


def _decibels(value: float) -> str:
    text = cell("psnr_db", value)
    return f"{text} dB" if value < IDENTICAL_DB else text


# ------------------------------------------------------------------ single images


def _histogram(psnr: Sequence[float]) -> Markup | None:
    """The chart of the images that differ at all; None where there is nothing to see."""
    differing = [value for value in psnr if value < IDENTICAL_DB]
    if len(differing) < 2:
        return None
    return histogram(differing, "PSNR of an image, dB", "images", CHANGED_DB)


def _spread(psnr: Sequence[float]) -> str:
    same = sum(value >= IDENTICAL_DB for value in psnr)
    text = f"Below {CHANGED_DB:g} dB, in the other colour, it is another image."
    return f"{text} {same} of {len(psnr)} images are identical and not shown." if same else text


def _classes(found: Mapping[str, Sequence[float]]) -> tuple[list[_Class], str]:
    """Rows of the table, and what is not in it."""
    medians = {name: statistics.median(values) for name, values in found.items() if values}
    if len(medians) < 2:
        return [], ""
    wanted = list(medians)
    more = ""
    if len(wanted) > CLASSES_SHOWN:
        worst = {*sorted(wanted, key=lambda name: medians[name])[:CLASSES_SHOWN]}
        more = f"The worst {CLASSES_SHOWN} of {len(medians)}."
        wanted = [name for name in wanted if name in worst]
    largest = max((m for m in medians.values() if m < IDENTICAL_DB), default=1.0)
    rows = [
        _Class(
            name,
            len(found[name]),
            cell("psnr_db", medians[name]),
            cell("psnr_db", min(found[name])),
            max(0, min(100, round(100 * medians[name] / largest))),
        )
        for name in wanted
    ]
    return rows, more


# ------------------------------------------------------------------ steps, layers, channels


def _steps(report: Report) -> list[tuple[str, Markup, str]]:
    """Heading, chart and what it says, for every curve over the steps that there is."""
    found = []
    if any(report.curves.values()):
        says = (
            "Of the prediction along both models' own trajectories, so that it holds what earlier "
            "steps have handed on, and what the set's correction has taken out."
        )
        chart = line_chart(report.curves, STEP, heading("sqnr_steps_db"))
        found.append(("SQNR of the prediction", chart, says))
    if report.noise is not None:
        at_once = (
            "Of the quantized model at the same inputs as full precision, on calibration seeds: "
            "before any correction, and what those leave that are prepared offline for single "
            "predictions. The run-time and the step-wise correction work along a trajectory; "
            "what they leave is in the last two charts, of sets that were drawn with them."
        )
        mean = line_chart(report.noise.mean, STEP, "mean of the noise")
        spread = line_chart(report.noise.spread, STEP, "spread of the noise")
        found.append(("Mean of the quantization noise", mean, at_once))
        says = "Its standard deviation within a channel; the prediction's own is about 1."
        found.append(("Spread of the quantization noise", spread, says))
    along = (
        "What the prediction differs by from full precision's, each along its own trajectory on "
        "the same seeds: noise of this step, and what earlier steps have handed on. A set for "
        "each correction (sample --inter METHOD --name NAME, eval --name NAME) is a curve each."
    )
    within = "Its standard deviation within a channel."
    for key, says in (("mean", along), ("spread", within)):
        curves = {name: each[key] for name, each in report.deviations.items()}
        if any(curves.values()):
            chart = line_chart(curves, STEP, f"{key} of the deviation")
            found.append((f"{key.capitalize()} of the deviation along the trajectory", chart, says))
    return found


def _heat() -> list[str]:
    """What the colours of the network's map mean, from the palest on."""
    below = [f"−{HEAT_DB * (HEAT - 1 - level):g} dB" for level in range(HEAT - 1)]
    return [f"{below[0]} and less", *below[1:], "the worst"]


def _range_chart(ranges: Ranges) -> Markup:
    count = max(map(len, ranges.curves.values()))
    shares = [100 * i / max(count - 1, 1) for i in range(count)]
    return line_chart(
        ranges.curves, "channels, %", "times the median", xs=shares, log=True, dots=False
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
