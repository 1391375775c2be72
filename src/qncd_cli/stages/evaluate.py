"""Stage 4: sample sets against a reference and against full precision.

A set is a folder that stage 3 wrote. Full precision and quantized images of the same seeds are
measured in one protocol; distribution metrics may fall under quantization,
so fidelity to the full-precision images stands beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ArtifactError
from ..lineage.sample_set import SampleSet, match_sets
from ..lineage.sample_sets import image_path
from ..metrics import checks
from ..metrics.fidelity import Features, extract_features
from ..metrics.image import (
    Measures,
    class_agreement,
    feature_distance,
    fits_labels,
    load_images,
    measure,
    not_measured,
)
from ..metrics.image_files import digest_of_files, image_paths
from ..metrics.protocol import Protocol, describe, prepared
from ..metrics.record import PAIRED, UNREFERENCED, grown
from ..metrics.similarity import ssim_each
from ..metrics.spread import changes, of_pairs
from ..metrics.tensor import sqnr_steps_db
from ..metrics.visible import jod_each
from ..progress import Track, no_progress
from ..sampling.noise import ranges
from ..store.artifacts import Artifact


def measure_images(
    source: Path, protocol: Protocol, track: Track = no_progress, *, skip_broken: bool = False
) -> dict[str, Any]:
    """metrics.json of one set of images that qncd did not make: a folder, or an .npz.

    skip_broken: whether files that cannot be read are left out, and counted in `checks`. Raises
    ArtifactError for damaged images, and where no metric can be had for them.
    """
    broken: list[Path] = []
    images = load_images(source, broken if skip_broken else None)
    paths = image_paths(source) if source.is_dir() else []
    paths = [path for path in paths if path not in {*broken}]
    alone = dict.fromkeys(set(protocol.metrics) & {*PAIRED}, "one set of images is no pair")
    protocol = prepared(protocol.without(alone), len(images), track)
    if not protocol.metrics:
        reasons = dict.fromkeys(why for whys in protocol.left_out.values() for why in whys)
        raise ArtifactError(f"{source}: nothing can be measured: {'; '.join(reasons)}")
    entry = _entry(images, protocol, track, [*map(str, paths)] or None).entry
    size = list(images.shape[-2:])
    known = {"images": str(source), "image_size": size}
    names = [path.name for path in paths] or None
    numbered = [f"number {row + 1}" for row in range(len(images))]
    return {
        "protocol": describe(protocol, len(images), known),
        "images": entry,
        "checks": [
            *checks.notes_of_skipped("images", [path.name for path in broken]),
            *checks.notes_of_images("images", images, names or numbered),
            *_notes_of_reference(images, protocol),
        ],
    }


@dataclass(frozen=True)
class Measured:
    """A set, the features of its images, its object in metrics.json and that one's replicates."""

    samples: SampleSet
    features: Features | None
    entry: dict[str, Any]
    replicates: Mapping[str, Any]


def measure_set(samples: SampleSet, protocol: Protocol, track: Track = no_progress) -> Measured:
    """Features and metrics of one set that need no other set. Raises what measure raises."""
    network = protocol.network
    if network is None:
        return Measured(samples, None, not_measured(len(samples.images)), {})
    spatial = "sfid" in protocol.metrics
    features = extract_features(
        samples.images, network, names=samples.seeds, spatial=spatial, track=track
    )
    found = _entry(features, protocol, track)
    entry = found.entry
    classes = samples.manifest["classes"]
    if network.name == "fashion-classifier" and fits_labels(classes):
        entry["class_agreement"] = class_agreement(features, classes, network)
    return Measured(samples, features, entry, found.replicates)


def _entry(
    images: Tensor | Features,
    protocol: Protocol,
    track: Track,
    names: Sequence[str] | None = None,
) -> Measures:
    if protocol.network is None or not set(protocol.metrics) - {*PAIRED}:
        held = images.features if isinstance(images, Features) else images
        return Measures(not_measured(len(held)), {})
    reference = protocol.reference if set(protocol.metrics) - UNREFERENCED else None
    network = protocol.network
    metrics = [name for name in protocol.metrics if name not in PAIRED]
    seed = protocol.seed
    return measure(images, reference, network, metrics, names=names, seed=seed, track=track)


def compare(
    full: Measured,
    quantized: Measured,
    quantized_bytes: dict[str, int],
    protocol: Protocol,
    track: Track = no_progress,
) -> dict[str, Any]:
    """metrics.json of two sets of the same seeds; quantized_bytes: of `sizes`."""
    one, other = full.samples, quantized.samples
    sampling = {
        "model": one.manifest["digests"]["model"],
        "artifact": other.manifest["digests"].get("quantized"),
        "sampling": one.manifest["sampling"],
        "first_seed": one.seeds[0],
        "seeds": ranges(one.seeds),
        "full": str(one.folder),
        "quantized": str(other.folder),
        "sets": {"full": _content(one), "quantized": _content(other)},
        "correction": other.manifest["correction"],
        "image_size": list(one.images.shape[-2:]),  # height, width
        "class_counts": _counts(one.manifest["classes"]),
        "backend": other.manifest.get("backend"),
        "compiled": bool(other.manifest.get("compiled")),
        "device": {"full": one.manifest.get("device"), "quantized": other.manifest.get("device")},
    }
    return {
        "protocol": describe(protocol, len(one.seeds), sampling),
        "full": full.entry,
        "quantized": quantized.entry,
        "fidelity": _fidelity(full, quantized, protocol, track),
        "bytes": quantized_bytes,
    }


def _fidelity(
    full: Measured, quantized: Measured, protocol: Protocol, track: Track
) -> dict[str, Any]:
    """metrics.json's `fidelity`: of images and latents of the same seeds."""
    one, other = full.samples, quantized.samples
    distance, seen = None, {}
    network, a, b = protocol.network, full.features, quantized.features
    if network is not None and a is not None and b is not None:
        if len(one.seeds) > 1:
            seed = protocol.seed
            distance = feature_distance(a, b, network, paired=True, seed=seed, track=track)
        if "class_agreement" in full.entry and "class_agreement" in quantized.entry:
            logits = {"full": a.logits, "quantized": b.logits}
            seen = {name: rows.argmax(1).tolist() for name, rows in logits.items()}
    images = (one.images, other.images)
    scores = {"ssim": ssim_each(*images)}
    scores["cvvdp_jod"] = jod_each(*images, track) if "cvvdp" in protocol.metrics else None
    return {
        "sqnr_steps_db": _sqnr_steps(one.latents, other.latents),
        "feature_distance": distance,
        "changes": changes(full.entry, quantized.entry, full.replicates, quantized.replicates),
        **of_pairs(
            one.seeds,
            one.manifest["classes"],
            images,
            (one.latents.tensors["latents"], other.latents.tensors["latents"]),
            seen,
            protocol.seed,
            scores,
        ),
    }


def run(
    full: SampleSet,
    quantized: SampleSet,
    quantized_bytes: dict[str, int],
    protocol: Protocol,
    track: Track = no_progress,
    earlier: Mapping[str, Any] | None = None,
    *,
    made: Mapping[str, Any],
) -> dict[str, Any]:
    """metrics.json of two sets that share their seeds and sampling settings.

    quantized_bytes: of `sizes`; earlier: the metrics.json that is there, whose numbers are kept
    where they were measured in the same protocol; made: preset and bits. Raises ArtifactError if
    the sets do not share settings or seeds.
    """
    full, quantized = match_sets(full, quantized)
    protocol = prepared(protocol, len(full.seeds), track)
    sets = [measure_set(samples, protocol, track) for samples in (full, quantized)]
    metrics = compare(sets[0], sets[1], quantized_bytes, protocol, track)
    metrics["checks"] = _checks(full, quantized, protocol)
    return {**grown(earlier or {}, metrics), "quantization": dict(made)}


def sizes(quantized: Path, coverage: dict[str, Any]) -> dict[str, int]:
    """Bytes of the denoiser: full in float32, quantized with all that it needs to run.

    artifact: of these the file at `quantized`; rest: what stays unquantized, in 16 bits where
    these are exact. coverage: the content of coverage.json.
    """
    artifact, rest = quantized.stat().st_size, coverage["rest_bytes"]
    full = coverage["float_denoiser_bytes"]
    return {"full": full, "quantized": artifact + rest, "artifact": artifact, "rest": rest}


def _checks(full: SampleSet, quantized: SampleSet, protocol: Protocol) -> list[checks.Note]:
    """metrics.json's `checks`: what there is to say of the images themselves."""
    names = [f"seed {seed}" for seed in full.seeds]
    return [
        *checks.notes_of_images("full precision", full.images, names),
        *checks.notes_of_images("quantized", quantized.images, names),
        *checks.notes_of_classes(_counts(full.manifest["classes"])),
        *_notes_of_reference(full.images, protocol),
    ]


def _notes_of_reference(images: Tensor, protocol: Protocol) -> list[checks.Note]:
    skipped = protocol.reference.skipped if protocol.reference is not None else ()
    return [
        *checks.notes_of_skipped("reference", skipped),
        *checks.notes_of_reference(
            len(images), images.shape[-2:], protocol.reference, protocol.network, protocol.metrics
        ),
    ]


def _counts(classes: Sequence[int]) -> dict[str, int]:
    """Class, or number of the prompt -> how many images were asked to show it."""
    return {str(label): count for label, count in sorted(Counter(classes).items())}


def _content(samples: SampleSet) -> dict[str, str]:
    """Digests of a set's identity and of the images that were measured."""
    paths = [image_path(samples.folder, seed) for seed in samples.seeds]
    return {"set": samples.manifest["digest"], "images": digest_of_files(paths)}


def _sqnr_steps(full: Artifact, quantized: Artifact) -> list[float]:
    """SQNR in dB of the prediction at every step, over the traced seeds that both sets share."""
    seeds = [a.tensors["prediction_seeds"].tolist() for a in (full, quantized)]
    shared = sorted(set(seeds[0]) & set(seeds[1]))
    if not shared:
        return []
    predictions = [
        a.tensors["predictions"][[s.index(seed) for seed in shared]]
        for a, s in zip((full, quantized), seeds, strict=True)
    ]
    return sqnr_steps_db(*predictions)
