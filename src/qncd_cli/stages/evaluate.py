"""Stage 4: sample sets against a reference and against full precision.

A set is a folder that stage 3 wrote. Full precision and quantized images of the same seeds are
measured in one protocol; distribution metrics may fall under quantization,
so fidelity to the full-precision images stands beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..lineage.pairs import joined_pairs, pair_up
from ..lineage.sample_set import SampleSet, match_sets
from ..lineage.sample_sets import image_path
from ..metrics import checks
from ..metrics.fidelity import Features
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
from ..metrics.images_on_disk import Images
from ..metrics.look import Look, joined, look_at, rows_of_parts
from ..metrics.perceptual import LEAST, lpips_each
from ..metrics.prompted import clip_scores, entry_of
from ..metrics.protocol import Protocol, describe, prepared
from ..metrics.record import FEATURELESS, PAIRED, UNREFERENCED, grown
from ..metrics.spread import Pairs, changes, of_pairs
from ..metrics.tensor import deviation_steps, sqnr_steps_db
from ..metrics.visible import jod_each
from ..progress import Track, no_progress
from ..runtime.ranks import ALONE, Message, Ranks
from ..sampling.noise import ranges

NO_PROMPTS = "CLIP score needs images of prompts"


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
    alone |= dict.fromkeys({"clip"} & {*protocol.metrics}, NO_PROMPTS)
    protocol = prepared(protocol.without(alone), len(images), track)
    if not protocol.metrics:
        reasons = dict.fromkeys(why for whys in protocol.left_out.values() for why in whys)
        raise ArtifactError(f"{source}: nothing can be measured: {'; '.join(reasons)}")
    look = look_at(images, protocol, [*map(str, paths)] or None, track)
    entry = _entry(len(images), look.features, protocol, track).entry
    size = list(images.shape[-2:])
    known = {"images": str(source), "image_size": size}
    names = [path.name for path in paths] or None
    numbered = [f"number {row + 1}" for row in range(len(images))]
    return {
        "protocol": describe(protocol, len(images), known),
        "images": entry,
        "checks": [
            *checks.notes_of_skipped("images", [path.name for path in broken]),
            *checks.notes_of_images("images", look.seen, names or numbered),
            *_notes_of_reference(images, protocol),
        ],
    }


@dataclass(frozen=True)
class Measured:
    """A set, a look at its images, its object in metrics.json and that one's replicates."""

    samples: SampleSet
    look: Look
    entry: dict[str, Any]
    replicates: Mapping[str, Any]


def measure_set(samples: SampleSet, protocol: Protocol, track: Track = no_progress) -> Measured:
    """Features and metrics of one set that need no other set. Raises what measure raises."""
    look = look_at(samples.images, protocol, samples.seeds, track)
    return _measured(samples, look, protocol, track)


def _measured(samples: SampleSet, look: Look, protocol: Protocol, track: Track) -> Measured:
    found = _entry(len(samples.images), look.features, protocol, track)
    network, classes = protocol.network, samples.manifest["classes"]
    if network is not None and fits_labels(classes, network):
        assert look.features is not None
        found.entry["class_agreement"] = class_agreement(look.features, classes, network)
    replicates = dict(found.replicates)
    if protocol.clip is not None and "clip" in protocol.metrics:
        prompts = samples.manifest["sampling"]["prompts"]
        asked = [prompts[label] for label in classes]
        scores = clip_scores(samples.images, asked, protocol.clip, track)
        entry, moved = entry_of(scores, protocol.clip, protocol.seed)
        found.entry["clip_score"], replicates["clip_score"] = entry, moved
    return Measured(samples, look, found.entry, replicates)


def _entry(count: int, features: Features | None, protocol: Protocol, track: Track) -> Measures:
    metrics = [name for name in protocol.metrics if name not in FEATURELESS]
    if protocol.network is None or features is None or not metrics:
        return Measures(not_measured(count), {})
    reference = protocol.reference if set(protocol.metrics) - UNREFERENCED else None
    network, seed = protocol.network, protocol.seed
    return measure(features, reference, network, metrics, seed=seed, track=track)


def compare(
    full: Measured,
    quantized: Measured,
    quantized_bytes: dict[str, int],
    protocol: Protocol,
    track: Track = no_progress,
    pairs: Pairs | None = None,
) -> dict[str, Any]:
    """metrics.json of two sets of the same seeds.

    quantized_bytes: of `sizes`; pairs: all of them, None to look at them now.
    """
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
        "fidelity": _fidelity(full, quantized, pairs, protocol, track),
        "bytes": quantized_bytes,
    }


def _fidelity(
    full: Measured, quantized: Measured, pairs: Pairs | None, protocol: Protocol, track: Track
) -> dict[str, Any]:
    """metrics.json's `fidelity`: of images and latents of the same seeds."""
    one, other = full.samples, quantized.samples
    distance, seen = None, {}
    network, a, b = protocol.network, full.look.features, quantized.look.features
    if network is not None and a is not None and b is not None:
        if len(one.seeds) > 1:
            seed = protocol.seed
            distance = feature_distance(a, b, network, paired=True, seed=seed, track=track)
        if "class_agreement" in full.entry and "class_agreement" in quantized.entry:
            logits = {"full": a.logits, "quantized": b.logits}
            seen = {name: rows.argmax(1).tolist() for name, rows in logits.items()}
    if pairs is None:
        pairs = pair_up(one, other, range(len(one.seeds)))
    classes, seed = one.manifest["classes"], protocol.seed
    sides, scores = (one.images, other.images), dict[str, list[float] | None]()
    scores["cvvdp_jod"] = jod_each(*sides, track) if "cvvdp" in protocol.metrics else None
    lpips = protocol.lpips if "lpips" in protocol.metrics else None
    scores["lpips"] = lpips_each(*sides, lpips, track) if lpips is not None else None
    return {
        **_of_steps(one, other),
        "feature_distance": distance,
        "changes": changes(full.entry, quantized.entry, full.replicates, quantized.replicates),
        **of_pairs(one.seeds, classes, pairs, seen, seed, scores),
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
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """metrics.json of two sets that share their seeds and sampling settings.

    quantized_bytes: of `sizes`; earlier: the metrics.json that is there, whose numbers are kept
    where they were measured in the same protocol; made: preset and bits; ranks: look at a share
    of the samples each. Raises ArtifactError if the sets do not share settings or seeds.
    """
    full, quantized = match_sets(full, quantized)
    ready: list[Protocol] = []

    def prepare() -> list[str]:
        ready.append(prepared(_possible(protocol, full), len(full.seeds), track))
        return [*ready[0].metrics]

    told = replace(protocol, metrics=tuple(ranks.agreed(prepare)))
    looks = [_look(samples, told, track, ranks) for samples in (full, quantized)]
    pairs = _pair_up(full, quantized, ranks)

    def measured() -> dict[str, Any]:
        sets = [
            _measured(samples, look, ready[0], track)
            for samples, look in zip((full, quantized), looks, strict=True)
        ]
        metrics = compare(sets[0], sets[1], quantized_bytes, ready[0], track, pairs)
        metrics["checks"] = _checks(sets[0], sets[1], ready[0])
        return {**grown(earlier or {}, metrics), "quantization": dict(made)}

    return ranks.agreed(measured)


def _possible(protocol: Protocol, samples: SampleSet) -> Protocol:
    """The protocol without what samples of this kind do not have: prompts, or enough pixels."""
    reasons = {}
    if not samples.manifest["sampling"].get("prompts"):
        reasons["clip"] = NO_PROMPTS
    if min(samples.images.shape[-2:]) < LEAST:
        reasons["lpips"] = f"LPIPS needs images of {LEAST} pixels a side"
    return protocol.without({k: why for k, why in reasons.items() if k in protocol.metrics})


def _look(samples: SampleSet, protocol: Protocol, track: Track, ranks: Ranks) -> Look:
    """A look at all images, on the first rank; at this rank's share elsewhere."""
    rows = rows_of_parts(len(samples.seeds), ranks.count, protocol.network)
    own = samples.cut([samples.seeds[row] for row in rows[ranks.rank]])
    mine = look_at(own.images, protocol, own.seeds, track)
    found = ranks.gathered(Message(*mine.told()))
    return joined([Look.of(m.value, m.tensors) for m in found], rows) if found else mine


def _pair_up(full: SampleSet, quantized: SampleSet, ranks: Ranks) -> Pairs:
    """All pairs, on the first rank; this rank's share elsewhere."""
    rows = rows_of_parts(len(full.seeds), ranks.count)
    mine = pair_up(full, quantized, rows[ranks.rank])
    found = ranks.gathered(Message(None, vars(mine)))
    return joined_pairs([Pairs(**message.tensors) for message in found], rows) if found else mine


def sizes(quantized: Path, coverage: dict[str, Any]) -> dict[str, int]:
    """Bytes of the denoiser: full in float32, quantized with all that it needs to run.

    artifact: of these the file at `quantized`; rest: what stays unquantized, in 16 bits where
    these are exact. coverage: the content of coverage.json.
    """
    artifact, rest = quantized.stat().st_size, coverage["rest_bytes"]
    full = coverage["float_denoiser_bytes"]
    return {"full": full, "quantized": artifact + rest, "artifact": artifact, "rest": rest}


def _checks(full: Measured, quantized: Measured, protocol: Protocol) -> list[checks.Note]:
    """metrics.json's `checks`: what there is to say of the images themselves."""
    samples = full.samples
    names = [f"seed {seed}" for seed in samples.seeds]
    return [
        *checks.notes_of_images("full precision", full.look.seen, names),
        *checks.notes_of_images("quantized", quantized.look.seen, names),
        *checks.notes_of_classes(_counts(samples.manifest["classes"])),
        *_notes_of_reference(samples.images, protocol),
    ]


def _notes_of_reference(images: Images, protocol: Protocol) -> list[checks.Note]:
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


def _of_steps(full: SampleSet, quantized: SampleSet) -> dict[str, Any]:
    """Predictions at every step along both trajectories, over the traced seeds that both sets
    share: SQNR in dB, and mean and spread of what they differ by."""
    traced = [samples.latents.rows("prediction_seeds") for samples in (full, quantized)]
    shared = sorted(traced[0].keys() & traced[1].keys() & {*full.seeds})
    if not shared:
        return {"sqnr_steps_db": [], "deviation_steps": {"mean": [], "spread": []}}
    both = [samples.latents.predictions(shared) for samples in (full, quantized)]
    return {"sqnr_steps_db": sqnr_steps_db(*both), "deviation_steps": deviation_steps(*both)}
