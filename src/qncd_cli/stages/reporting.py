"""What stage 4 gives to read: report.html, and the sheet of pairs beside it.

Everything comes from what earlier stages wrote and from metrics.json; what is missing of it is left
out of the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..lineage.sample_set import SampleSet, match_sets
from ..metrics.rows import bits, short_name
from ..report import insight
from ..report.images import Pair, pair_sheet, png_bytes
from ..report.page import Group, Report, html_report
from ..report.study import tallied
from ..spec import Widths
from ..store.artifacts import Artifact

WORST_PAIRS, TYPICAL_PAIRS = 12, 4
"""Pairs shown at once: those that differ most; those around the median, and the best."""
MOST_PAIRS = 64
"""Pairs of a page and of a sheet; the page folds what is neither of these."""
TITLE = 60
"""Characters of a prompt in a title."""


@dataclass(frozen=True)
class Sources:
    """What a report is made of beside metrics.json and the two sets.

    artifacts: by kind, those that are there; coverage: of coverage.json; others: name ->
    metrics.json of further sets of the same seeds; facts: of the measurement; commands: that
    reproduce it; tally: of a study with human raters; bench: of bench.json; None for none.
    """

    artifacts: Mapping[str, Artifact]
    coverage: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    commands: Sequence[str] = ()
    tally: Mapping[str, Any] | None = None
    bench: Mapping[str, Any] | None = None


def run(
    full: SampleSet, quantized: SampleSet, metrics: Mapping[str, Any], sources: Sources
) -> tuple[str, bytes]:
    """report.html, and a PNG of pairs with their differences, seeds and PSNR.

    Raises ArtifactError if the sets do not share settings or seeds.
    """
    full, quantized = match_sets(full, quantized)
    made, source = metrics["quantization"], full.manifest["source"]
    psnr = metrics["fidelity"]["per_seed"]["psnr_db"]
    groups = list(_groups(full, quantized, psnr))
    prompts = full.manifest["sampling"].get("prompts")
    facts = {"model": source, "bits": bits(made), "preset": made["preset"], **sources.facts}
    sampling = {key: str(value) for key, value in full.manifest["sampling"].items()}
    tensors = {kind: artifact.tensors for kind, artifact in sources.artifacts.items()}
    entries = sources.artifacts["quantized"].body["layers"] if "quantized" in tensors else {}
    smoothing, calibration = tensors.get("smoothing"), tensors.get("calibration")
    statistics = tensors.get("noise_stats")
    name = short_name(source)
    label = Widths(made["weights"], made["activations"]).label
    report = html_report(
        Report(
            metrics,
            f"{name}, {label}: quantized against full precision",
            name,
            str(sources.facts.get("date", "")).partition(" ")[0],
            groups,
            _curves(quantized, metrics, sources.others, "sqnr_steps_db"),
            _by_class(full, psnr),
            "prompt" if prompts else "class",
            insight.noise_curves(statistics) if statistics else None,
            insight.network(sources.coverage, entries),
            insight.channel_ranges(calibration, smoothing) if smoothing and calibration else (),
            sources.others,
            sources.bench,
            {**facts, **sampling},
            sources.commands,
            tallied(sources.tally) if sources.tally else None,
            _curves(quantized, metrics, sources.others, "deviation_steps"),
        )
    )
    shown = sorted((pair for group in groups for pair in group.pairs), key=lambda pair: pair.psnr)
    return report, png_bytes(pair_sheet(shown))


def _groups(full: SampleSet, quantized: SampleSet, psnr: Mapping[str, float]) -> Iterator[Group]:
    """Pairs from the worst on, those around the median, the best, and folded the rest."""
    order = sorted(range(len(full.seeds)), key=lambda row: psnr[str(full.seeds[row])])
    worst, rest = order[:WORST_PAIRS], order[WORST_PAIRS:]
    middle = len(order) // 2 - TYPICAL_PAIRS // 2
    usual = [row for row in order[max(middle, 0) : middle + TYPICAL_PAIRS] if row in rest]
    rest = [row for row in rest if row not in usual]
    best = rest[max(len(rest) - TYPICAL_PAIRS, 0) :]
    left = [row for row in rest if row not in best]
    left = left[: MOST_PAIRS - len(worst) - len(usual) - len(best)]
    named = [
        (f"The {len(worst)} of {len(order)} that differ most, the worst first", worst),
        (f"{len(usual)} around the median", usual),
        (f"The {len(best)} that differ least", best),
        (f"{len(left)} more, the worst first", left),
    ]
    for heading, rows in named:
        if rows:
            pairs = [
                Pair(_title(full, row), full.images[row], quantized.images[row]) for row in rows
            ]
            yield Group(heading, pairs, folded=rows is left)


def _title(samples: SampleSet, row: int) -> str:
    return f"seed {samples.seeds[row]}, {_shows(samples, row)}"


def _shows(samples: SampleSet, row: int) -> str:
    """What an image was to show: its class, or its prompt."""
    label, prompts = samples.manifest["classes"][row], samples.manifest["sampling"].get("prompts")
    if not prompts:
        return f"class {label}"
    text = prompts[label]
    return text if len(text) <= TITLE else f"{text[:TITLE]}..."


def _by_class(samples: SampleSet, psnr: Mapping[str, float]) -> dict[str, list[float]]:
    """PSNR of the images of every class or prompt, in the order of their numbers."""
    found: dict[int, list[float]] = {}
    names: dict[int, str] = {}
    for row, (seed, label) in enumerate(
        zip(samples.seeds, samples.manifest["classes"], strict=True)
    ):
        found.setdefault(label, []).append(psnr[str(seed)])
        names[label] = _shows(samples, row).removeprefix("class ")
    return {f"{names[label]}": found[label] for label in sorted(found)}


def _curves(
    quantized: SampleSet,
    metrics: Mapping[str, Any],
    others: Mapping[str, Mapping[str, Any]],
    key: str,
) -> dict[str, Any]:
    """What `fidelity` says of the steps of this set, and of further ones of the same seeds."""
    named = {quantized.folder.name: metrics, **others}
    return {
        f"{name}, correction {_method(found)}": found["fidelity"][key]
        for name, found in named.items()
        if found["fidelity"].get(key)
    }


def _method(metrics: Mapping[str, Any]) -> str:
    return (metrics["protocol"].get("correction") or {}).get("method", "none")
