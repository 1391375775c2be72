"""A sample set that is being drawn: what is there of it, what is missing, and its end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..store.files import write_bytes, write_json
from ..store.unfinished import remove_unfinished
from . import sample_set, sample_sets
from .latents import Latents


def part_path(folder: Path, seeds: Sequence[int]) -> Path:
    """The file of a batch of seeds, which have no gap."""
    return folder / sample_sets.PARTS / f"{seeds[0]:06d}-{len(seeds)}.safetensors"


@dataclass(frozen=True)
class GrowingSet:
    """A set as it is found.

    before: its manifest, empty where there is none; noted: what its manifest says of what is asked
    for; drawn: its samples; pending: batches that are missing of it, those first that nothing is
    there of; wanted: all seeds that it will have.
    """

    folder: Path
    identity: dict[str, Any]
    noted: dict[str, Any]
    before: dict[str, Any]
    drawn: Latents | None
    pending: list[list[int]]
    wanted: set[int]

    def ended(self, device: str) -> dict[str, Any]:
        """The manifest, once everything pending is drawn; written where that changes anything.

        device: what drew it. Raises ArtifactError where something is missing all the same.
        """
        if is_finished(self.before) and not self.pending:
            shutil.rmtree(self.folder / sample_sets.PARTS, ignore_errors=True)
            return self.before
        drawn = [self.drawn] if self.drawn is not None else []
        parts = [Latents.open(path) for path in sample_set.parts_of(self.folder)]
        more = {**self.noted, "device": device}
        return sample_set.assemble(self.folder, self.identity, drawn + parts, more, self.wanted)


def go_on(
    folder: Path,
    identity: dict[str, Any],
    seeds: Sequence[int],
    cut: Callable[[Sequence[int]], list[list[int]]],
    noted: dict[str, Any],
    decode: Callable[[Tensor], Tensor],
) -> GrowingSet:
    """Look at what is there of a set, and note in its manifest what is asked for.

    cut: seeds into batches; noted: what the manifest says of them; decode: latents into images, for
    those whose files are lost. Raises ArtifactError where the folder holds another set.
    """
    before = sample_sets.begun(folder) or {}
    drawn = sample_set.finished(folder, identity)
    beyond = sorted({*before.get("seeds", ())} - {*seeds})
    batches = cut(seeds) + cut(beyond)
    if drawn is not None:
        drawn = drawn.without(_images_again(folder, drawn, batches, decode))
    done = set(drawn.row_of) if drawn is not None else set()
    pending = [batch for batch in batches if not done.issuperset(batch)]
    there = {path.name for path in sample_set.parts_of(folder)}
    pending.sort(key=lambda batch: part_path(folder, batch).name in there)
    wanted = {*seeds, *beyond}
    drawn = drawn if done else None
    growing = GrowingSet(folder, identity, noted, before, drawn, pending, wanted)
    if not is_finished(before) or pending:
        note_asked(folder, {**identity, **noted}, before, done, wanted)
        remove_unfinished(folder)
    return growing


def is_finished(manifest: Mapping[str, Any]) -> bool:
    """Whether a set has everything that was ever asked of it."""
    return bool(manifest.get("complete")) and sample_sets.ASKED not in manifest


def note_asked(
    folder: Path, now: dict[str, Any], before: dict[str, Any], done: set[int], wanted: set[int]
) -> None:
    """Note in the manifest that a set is being drawn. It stays complete as it was, where that all
    is still there.

    now: what the manifest says of how it is drawn; before: the manifest as it is; done: seeds that
    are there; wanted: those that will be.
    """
    asked = {sample_sets.ASKED: sorted({*wanted, *before.get(sample_sets.ASKED, ())})}
    if before.get("complete") and done.issuperset(before["seeds"]):
        manifest = {**before, **asked}
    else:
        manifest = {**now, "complete": False, "seeds": sorted(done), **asked}
    if manifest != before:
        write_json(folder / sample_sets.MANIFEST, manifest)


def note_begun(
    folder: Path, identity: dict[str, Any], noted: dict[str, Any], seeds: Sequence[int]
) -> None:
    """Write the manifest of a set of which nothing is there yet, for others to see."""
    if not (folder / sample_sets.MANIFEST).exists():
        more = {"complete": False, "seeds": [], sample_sets.ASKED: list(seeds)}
        write_json(folder / sample_sets.MANIFEST, {**identity, **noted, **more})


def _images_again(
    folder: Path,
    drawn: Latents,
    batches: list[list[int]],
    decode: Callable[[Tensor], Tensor],
) -> set[int]:
    """Write lost images from their latents, decoded in the batches that they are drawn in; the
    seeds whose image has to be drawn, because latents of their batch are missing."""
    lost = set(sample_sets.without_image(folder, drawn.row_of))
    for seeds in batches:
        again = lost.intersection(seeds)
        if not again or not drawn.row_of.keys() >= set(seeds):
            continue
        for seed, image in zip(seeds, decode(drawn.of(seeds)), strict=True):
            if seed in again:
                write_bytes(sample_sets.image_path(folder, seed), sample_set.png_bytes(image))
        lost -= again
    return lost
