"""Shards of a sample set joined: what several processes drew becomes the set of one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..lineage import sample_sets
from ..lineage.shards import Shard, shard_folders, shards_folder
from ..store.digests import differing
from ..store.files import sync_folder
from ..store.lock import locked
from ..store.run_dir import RunDir, find_run
from .drawing import in_format
from .sample import Sampled
from .sets import check_made_from
from .watch import SILENT, Watch

HOW = 'draw it with "qncd sample --shard {}" and the options of the others'


@dataclass(frozen=True)
class _Part:
    """A shard on disk that is finished."""

    shard: Shard
    folder: Path
    manifest: dict[str, Any]


def merge(
    run_dir: str | Path | None = None,
    *,
    name: str = "quantized",
    format: str = "png",
    force: bool = False,
    watch: Watch = SILENT,
) -> Sampled:
    """Join the shards of a set of images, byte for byte the set that one process draws.

    run_dir: of the run, None for the current one; name: of the set. format: as sample takes it.
    force: replaces a set that was drawn with other settings. Shards are removed once the set is
    whole; where none is left and it is, nothing is done.

    Raises ArtifactError, one line that names the shard, where one is missing, unfinished, damaged
    or drawn with other settings; nothing has changed then.

    >>> merge("runs/mine").seeds
    """
    run = find_run(None if run_dir is None else str(run_dir))
    folder = run.samples(name)
    with locked(run.path, watch.note):
        if not any(shard_folders(folder)):
            manifest = sample_sets.begun(folder) or {}
            if manifest.get("complete"):
                packed = in_format(folder, format, watch)
                return Sampled(run, folder, manifest["seeds"], True, packed=packed)
            raise ArtifactError(
                f"{shards_folder(folder)}: no shards are there", HOW.format("1/4, 2/4, ...")
            )
        parts = _parts(folder)
        _check(run, parts)
        if force:
            sample_sets.clear(folder)
        manifest = _joined(folder, parts)
        shutil.rmtree(shards_folder(folder))
        packed = in_format(folder, format, watch)
    return Sampled(run, folder, manifest["seeds"], False, packed=packed)


def _parts(folder: Path) -> list[_Part]:
    """All shards, checked to be the parts of one set that lack nothing. Raises ArtifactError."""
    found = []
    for path in shard_folders(folder):
        manifest = sample_sets.begun(path) or {}
        shard = Shard.from_manifest(manifest)
        if shard is None or type(manifest.get("batch_size")) is not int:
            raise ArtifactError(f"{path}: no shard of a sample set", "draw it again or remove it")
        found.append(_Part(shard, path, manifest))
    one = found[0]
    for other in found[1:]:
        _check_together(one, other)
    count, whole, batch_size = one.shard.count, one.shard.whole, one.manifest["batch_size"]
    there = {part.shard.index: part for part in found}
    for index in range(1, count + 1):
        shard, part = Shard(index, count, whole), there.get(index)
        seeds = shard.seeds(batch_size)
        if part is None and not seeds:
            continue  # more shards than batches
        what = f"shard {shard.label} (seeds {seeds.start}-{seeds.stop - 1})"
        if part is None:
            raise ArtifactError(f"{folder}: {what} is missing", HOW.format(shard.label))
        lacking = {*seeds}.difference(part.manifest.get("seeds", ()))
        if not part.manifest.get("complete") or lacking:
            raise ArtifactError(f"{part.folder}: {what} is not finished", HOW.format(shard.label))
        lost = sample_sets.without_image(part.folder, seeds)
        if lost:
            first = sample_sets.image_path(part.folder, lost[0]).name
            raise ArtifactError(
                f"{part.folder}: {what} lacks {len(lost)} images (first: {first})",
                HOW.format(shard.label),
            )
    return found


def _check_together(one: _Part, other: _Part) -> None:
    """Raises ArtifactError unless both are shards of one set."""
    keys = ("count", "first_seed", "num")
    before, now = ({k: p.shard.described()[k] for k in keys} for p in (one, other))
    sizes = [{"--batch-size": p.manifest["batch_size"]} for p in (one, other)]
    changes = differing({**before, **sizes[0]}, {**now, **sizes[1]})
    if one.manifest.get("digest") != other.manifest.get("digest"):
        known = {*sample_sets.IDENTITY}
        trees = [{k: p.manifest.get(k) for k in known} for p in (one, other)]
        changes += differing(trees[0], trees[1], sample_sets.NAMES) or ["a changed digest"]
    if changes:
        raise ArtifactError(
            f"{other.folder}: not of the same set as {one.folder.name} ({'; '.join(changes)})",
            "draw it as the others were, or remove what is of no use",
        )


def _check(run: RunDir, parts: Sequence[_Part]) -> None:
    """Raises ArtifactError for shards of another quantized model than the run's."""
    hint = "draw the shards again with --force"
    check_made_from(run, parts[0].folder, parts[0].manifest, hint)


def _joined(folder: Path, parts: Sequence[_Part]) -> dict[str, Any]:
    """Join the shards, and what is there of the set, into its folder; the manifest."""
    from ..lineage import sample_set
    from ..lineage.growing_set import note_asked
    from ..lineage.latents import Latents
    from ..lineage.set_formats import link_or_copy

    first = parts[0].manifest
    identity = {k: first[k] for k in (*sample_sets.IDENTITY, "digest") if k in first}
    earlier = sample_set.finished(folder, identity)
    pieces = [] if earlier is None else [earlier]
    pieces += [Latents.open(part.folder / sample_sets.LATENTS) for part in parts]
    for part, piece in zip(parts, pieces[-len(parts) :], strict=True):
        if piece.seeds != part.manifest["seeds"]:
            raise ArtifactError(
                f"{piece.stored.path}: of other seeds than the manifest names",
                HOW.format(part.shard.label) + " and --force",
            )
    wanted = {seed for piece in pieces for seed in piece.row_of}
    there = set() if earlier is None else {*earlier.row_of}
    before = sample_sets.begun(folder) or {}
    note_asked(folder, {**identity, **_more(parts)}, before, there, wanted)
    for part in parts:
        for seed in part.manifest["seeds"]:
            link_or_copy(*(sample_sets.image_path(f, seed) for f in (part.folder, folder)))
    sync_folder(folder)
    return sample_set.assemble(folder, identity, pieces, _more(parts), wanted)


def _more(parts: Sequence[_Part]) -> dict[str, Any]:
    devices = dict.fromkeys(str(part.manifest.get("device")) for part in parts)
    return {"batch_size": parts[0].manifest["batch_size"], "device": ", ".join(devices)}
