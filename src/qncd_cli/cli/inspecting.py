"""The command inspect: an artifact, another file of a run, or a run, summed up; without torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from ..config.loading import load_config
from ..errors import ArtifactError
from ..store.artifact_files import TYPES, Stored, read_stored
from ..store.files import read_json
from ..store.layer_entry import layer_entries
from ..vocabulary import MISSING, NUMBERS, megabytes, number, said
from .console import Console
from .reuse import picture

SENSITIVE = 5
"""Layers that are named."""
PARTS, LONG = 6, 60
"""Kinds of tensors that are named; characters of a value that is shown and not counted."""
BYTES = dict(TYPES.values())
KINDS = {
    "metrics": {"protocol", "full", "quantized", "fidelity"},
    "metrics of images": {"protocol", "images"},
    "coverage": {"layers", "macs", "bit_operations"},
    "sample set": {"seeds", "digests", "sampling"},
    "ablation": {"rows", "protocol", "full"},
    "bench": {"rows", "rates", "machine"},
    "exported graph": {"format", "products", "agreement"},
}
"""JSON files of a run by the keys that only they have."""


def inspect(console: Console, name: str, *, tensors: bool) -> None:
    """Whatever the name stands for. Raises ArtifactError for what is of no run."""
    path = Path(name)
    if path.is_dir():
        from . import run_listing

        run_listing.inspect(console, path)
    elif path.suffix == ".json":
        _json(console, path)
    elif path.suffix in (".yaml", ".yml"):
        _configuration(console, path)
    else:
        _artifact(console, path, tensors)


# ------------------------------------------------------------------ artifacts


def _artifact(console: Console, path: Path, tensors: bool) -> None:
    stored = read_stored(path)
    described = {
        name: {"dtype": type_.removeprefix("torch."), "shape": list(shape)}
        for name, (type_, shape) in sorted(stored.tensors.items())
    }
    payload = {
        "kind": stored.kind,
        "digest": stored.digest,
        "config": stored.config,
        "model": stored.model,
        "parents": stored.parents,
        "body": stored.body,
        "tensors": described,
    }

    def render() -> None:
        print(f"{path}: {stored.kind}, {megabytes(stored.size)}, sound")
        named = [("content", stored.digest[:16]), ("model", stored.model)]
        named += [("configuration", stored.config or MISSING)]
        named += [(f"made from {name}", digest[:16]) for name, digest in stored.parents.items()]
        named += [*_body(stored), ("parts", _parts(stored))]
        console.pairs(named)
        if worst := _sensitive(stored):
            print("layers whose rounding matters most, by estimated error:")
            console.pairs(worst)
        if stored.kind == "reuse":
            print(*picture(stored.body), sep="\n")
        if tensors:
            listed = [[n, t["dtype"], str(t["shape"])] for n, t in described.items()]
            console.table(["tensor", "dtype", "shape"], listed)
        else:
            print(f"--tensors lists all {len(described):,} tensors")

    console.result(payload, render)


def _body(stored: Stored) -> list[tuple[str, str]]:
    """What the description says: what is large as a count, bits as how many layers have them."""
    found = []
    for key, value in sorted(stored.body.items()):
        if key not in ("layers", "attention"):
            found.append((key.replace("_", " "), _short(value)))
    layers, attention = stored.body.get("layers"), stored.body.get("attention")
    for name, entries in (("layers", layers), ("attention modules", attention)):
        if entries:
            found.append((name, number(len(entries))))
    if layers and stored.kind == "quantized":
        described = layer_entries(stored.body).values()
        for what in ("weight_bits", "activation_bits", "rounding"):
            counts = Counter(getattr(entry, what) for entry in described)
            text = ", ".join(f"{value} in {count}" for value, count in sorted(counts.items()))
            found.append((what.replace("_", " "), f"{text} layers"))
    return found


def _parts(stored: Stored) -> str:
    """Megabytes by kind of tensor, the largest first."""
    sizes: Counter[str] = Counter()
    for name, (type_, shape) in stored.tensors.items():
        sizes[name.rpartition(".")[2]] += BYTES[type_] * math.prod(shape)
    most = sizes.most_common(PARTS)
    rest = sizes.total() - sum(size for _, size in most)
    if rest:
        most.append(("all else", rest))
    return ", ".join(f"{part} {megabytes(size)}" for part, size in most)


def _sensitive(stored: Stored) -> list[tuple[str, str]]:
    """Layers whose rounding was estimated to matter most, where that was measured."""
    if stored.kind != "quantized":
        return []
    errors = {
        name: (estimated.input + estimated.weight, entry.widths.label)
        for name, entry in layer_entries(stored.body).items()
        if (estimated := entry.estimated_error) is not None
    }
    worst = sorted(errors.items(), key=lambda item: -item[1][0])[:SENSITIVE]
    return [(name, f"{error:.2g}, {label}") for name, (error, label) in worst]


# ------------------------------------------------------------------ JSON and YAML


def _json(console: Console, path: Path) -> None:
    data = read_json(path, "the command that wrote it")
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: no JSON object", "files of a run are objects")
    kind = next((kind for kind, keys in KINDS.items() if keys <= data.keys()), "JSON")

    def render() -> None:
        print(f"{path}: {kind}, {megabytes(path.stat().st_size)}")
        if kind.startswith("metrics"):
            from . import evaluation

            count = data["protocol"].get("num_samples")
            evaluation.render(console, data, f"{count} samples")
            return
        if kind == "bench":
            from . import bench

            bench.tables(console, data)
            return
        console.pairs([_named(key, value) for key, value in data.items()])

    console.result({"kind": kind, "content": data}, render)


def _named(key: str, value: Any) -> tuple[str, str]:
    """A key of a JSON file in the words of the vocabulary, and its value in a line."""
    if key in NUMBERS and isinstance(value, int | float):
        return NUMBERS[key].name, said(key, value)
    return key.replace("_", " "), _short(value)


def _short(value: Any) -> str:
    """What is large as a count."""
    if isinstance(value, list | dict):
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= LONG else f"{len(value):,} entries"
    return str(value) if isinstance(value, bool | str) else number(value)


def _configuration(console: Console, path: Path) -> None:
    config = load_config(str(path))
    tree = config.to_dict()
    digests = {stage: config.stage_digest(stage) for stage in ("calibrate", "quantize")}

    def render() -> None:
        quantization, sampling = config.quantization, config.sampling
        bits = quantization.widths.label
        named = [
            ("model", config.model.source),
            ("bits", bits),
            ("preset", str(quantization.preset)),
            ("sampler", f"{sampling.scheduler}, {sampling.steps} steps"),
            ("guidance", number(sampling.guidance_scale)),
            ("calibration", f"{config.calibration.trajectories} trajectories"),
            ("intra correction", config.correction.intra),
            ("inter correction", config.correction.inter.method),
        ]
        named += [(f"digest of {stage}", digest) for stage, digest in digests.items()]
        print(f"{path}: configuration")
        console.pairs(named)
        print(f"qncd calibrate --config {path} --dry-run prints all of it")

    console.result({"kind": "configuration", "content": tree, "digests": digests}, render)
