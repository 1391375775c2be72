"""The digest of a model's files: what lies behind links counts, the rest is as it always was."""

from __future__ import annotations

import hashlib
import os
import shutil

import pytest
import torch

from qncd_cli.errors import ModelError
from qncd_cli.models.digest import files_below, folder_digest, random_digest
from qncd_cli.models.zoo import zoo_path

DIGESTS = ["3f71e5e4f8e52f33", "c665a847ca9227e6", "3bfa740b082d6223", "fe6d57b9b20ac36f"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def linked(tiny_model, tmp_path):
    """The tiny model with its U-Net behind a link to a folder, as hub tools lay models out."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "unet").rename(tmp_path / "unet")
    (folder / "unet").symlink_to("../unet")
    return folder


def change(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_digests_of_the_packaged_models_are_those_they_always_had():
    names = ("fashion-ldm", "fashion-ddpm", "fashion-dit", "emoji-ldm")
    found = [folder_digest(zoo_path(name)) for name in names]
    assert found == DIGESTS


def test_a_folder_with_links_has_the_digest_of_a_folder_without(linked, tiny_model):
    assert folder_digest(linked) == folder_digest(tiny_model)


def test_weights_behind_a_linked_folder_count(linked, tiny_model):
    change(linked.parent / "unet" / WEIGHTS)
    assert folder_digest(linked) != folder_digest(tiny_model)


def test_weights_behind_linked_files_count(tiny_model, tmp_path):
    """A hub cache: every file a link to a blob, the folder itself one to a snapshot."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in tiny_model.rglob("*") if p.is_file())):
        shutil.copy(path, blobs / str(number))
        link = snapshot / path.relative_to(tiny_model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    main = tmp_path / "main"
    main.symlink_to(snapshot)
    assert folder_digest(main) == folder_digest(tiny_model)
    change((snapshot / "unet" / WEIGHTS).resolve())
    assert folder_digest(main) != folder_digest(tiny_model)


@pytest.mark.parametrize("name", ["merges.txt", "vocab.txt", "spiece.model"])
def test_whatever_a_tokenizer_is_read_from_counts(linked, name):
    """Another one makes other prompts of the same words, so those that are kept are not its."""
    (linked / "tokenizer").mkdir()
    (linked / "tokenizer" / name).write_text("r e\n")
    before = folder_digest(linked)
    (linked / "tokenizer" / name).write_text("e d\n")
    after = folder_digest(linked)
    assert after != before
    (linked / "LICENSE.txt").write_text("mine")
    assert folder_digest(linked) == after


def test_a_link_to_a_folder_above_it_is_not_entered(linked):
    before = sorted(files_below(linked))
    for place in (linked / "self", linked / "unet" / "back"):
        place.symlink_to(linked)
    (linked / "a").symlink_to("b")
    (linked / "b").symlink_to("a")
    assert sorted(files_below(linked)) == before


def test_a_link_to_nothing_is_one_line(linked):
    (linked.parent / "unet" / WEIGHTS).unlink()
    (linked.parent / "unet" / WEIGHTS).symlink_to("../../blobs/gone")
    with pytest.raises(ModelError, match=f"{WEIGHTS}: cannot be read: a link to nothing"):
        folder_digest(linked)


def test_a_link_to_nothing_beside_the_weights_does_no_harm(linked, tiny_model):
    (linked / "README.md").symlink_to("gone")
    assert folder_digest(linked) == folder_digest(tiny_model)


def test_random_weights_are_known_by_the_version_of_torch():
    made_from = f"random:ldm4 0 {torch.__version__}"
    assert random_digest("random:ldm4") == hashlib.sha256(made_from.encode()).hexdigest()[:16]
