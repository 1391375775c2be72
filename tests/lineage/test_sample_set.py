"""A sample set that is being drawn: damage costs the batch that it hit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Qncd
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from qncd_cli.errors import ArtifactError
from qncd_cli.lineage import sample_set
from qncd_cli.store import artifacts

SET = Path("runs/tiny/samples/new")
STEPS = 4
SAMPLE = ("sample", "--num", "6", "--batch-size", "2", "--name", "new", "--no-compile")


@pytest.fixture
def work(sampled, tmp_path) -> Qncd:
    """A copy of a run that is quantized."""
    return Qncd(shutil.copytree(sampled, tmp_path / "work"))


@contextmanager
def calls(stop_at: int = 0) -> Iterator[list[None]]:
    """Calls of the denoiser within the block; the one of that number is interrupted."""
    made: list[None] = []

    def called(module: object, inputs: object) -> None:
        if isinstance(module, UNet2DConditionModel):
            made.append(None)
            if len(made) == stop_at:
                raise KeyboardInterrupt

    handle = register_module_forward_pre_hook(called)
    try:
        yield made
    finally:
        handle.remove()


def files_of(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture
def whole(work) -> dict[str, bytes]:
    """The files of a set that was drawn at once; it is there no more."""
    work(*SAMPLE)
    files = files_of(work.folder / SET)
    shutil.rmtree(work.folder / SET)
    return files


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (".parts/000000-2.safetensors", flip),
        (".parts/000000-2.safetensors", lambda path: path.write_bytes(b"")),
        ("000001.png", Path.unlink),
        ("000001.png", lambda path: path.write_bytes(b"")),
    ],
    ids=["a bit of a part", "an empty part", "no image", "an empty image"],
)
def test_damage_to_an_unfinished_set_costs_its_batch(work, whole, name, damage):
    with calls(stop_at=2 * STEPS + 2):
        assert work(*SAMPLE, ok=False).exit_code == 130
    damage(work.folder / SET / name)
    with calls() as made:
        work(*SAMPLE)
    assert len(made) == 2 * STEPS  # the damaged batch, and the last
    assert files_of(work.folder / SET) == whole


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_lost_image_of_a_finished_set_is_made_from_its_latent(work, whole, damage):
    work(*SAMPLE)
    damage(work.folder / SET / "000003.png")
    with calls() as made:
        work(*SAMPLE)
    assert made == []
    assert files_of(work.folder / SET) == whole


def test_a_set_is_not_complete_without_a_seed_that_was_asked_for(work):
    work(*SAMPLE)
    folder = work.folder / SET
    drawn = sample_set.Latents.open(folder / "latents.safetensors")
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(ArtifactError, match=r"1 images are not there .*000009\.png"):
        sample_set.assemble(folder, {}, [drawn], {}, {0, 9})
    assert (folder / "manifest.json").read_bytes() == before


MORE = ("sample", "--num", "10", "--batch-size", "2", "--name", "new", "--no-compile")


def test_a_finished_set_stays_one_while_more_of_it_is_drawn(work):
    work(*MORE)
    files = files_of(work.folder / SET)
    shutil.rmtree(work.folder / SET)
    work(*SAMPLE)
    before = sample_set.read_set(work.folder / SET)
    with calls(stop_at=STEPS + 2):
        assert work(*MORE, ok=False).exit_code == 130
    assert (work.folder / SET / "000007.png").exists()
    there = sample_set.read_set(work.folder / SET)
    assert there.seeds == before.seeds == list(range(6))
    assert there.manifest["complete"]
    assert work("eval", "--name", "new", "--json").data["protocol"]["num_samples"] == 6
    with calls() as made:
        work(*SAMPLE)
    assert made == []
    with calls() as made:
        work(*MORE)
    assert len(made) == STEPS  # the batch that was interrupted
    assert files_of(work.folder / SET) == files


def test_latents_are_there_before_the_manifest_that_names_them(work):
    """A process that dies between the two leaves a set that is whole, and is ended by the next."""
    work(*SAMPLE)
    manifest = work.folder / SET / "manifest.json"
    before = json.loads(manifest.read_text())
    work(*MORE)
    files = files_of(work.folder / SET)
    manifest.write_text(json.dumps({**before, "asked": list(range(10))}))
    assert sample_set.read_set(work.folder / SET).seeds == list(range(6))
    with calls() as made:
        work(*MORE)
    assert made == []
    assert files_of(work.folder / SET) == files


def test_a_set_that_was_begun_at_another_seed_is_the_same_set(work, monkeypatch):
    """Predictions are traced of the first seeds of the set, not of those that were drawn first."""
    for module in ("stages.sample", "lineage.latents"):
        monkeypatch.setattr(f"qncd_cli.{module}.TRACED", 3)
    work(*SAMPLE)
    files = files_of(work.folder / SET)
    shutil.rmtree(work.folder / SET)
    work(*SAMPLE, "--seed", "2", "--num", "4")
    work(*SAMPLE)
    assert files_of(work.folder / SET) == files


def test_latents_of_another_set_are_found(drawn):
    """Sound ones, of the same seeds and classes."""
    path = drawn / "latents.safetensors"
    found = artifacts.read(path, "latents")
    tensors = {**found.tensors, "latents": found.tensors["latents"] + 0.01}
    artifacts.write(path, replace(found, tensors=tensors))
    with pytest.raises(ArtifactError, match="of other values than the manifest names"):
        sample_set.read_set(drawn)


@pytest.mark.parametrize("text", ["[]", '"text"', '{"seeds": 3}', '{"seeds": ["a"]}', "null"])
@pytest.mark.parametrize("command", [SAMPLE, ("eval", "--name", "new")], ids=["sample", "eval"])
def test_a_manifest_of_another_form_is_one_line(work, text, command):
    (work.folder / SET).mkdir()
    (work.folder / SET / "manifest.json").write_text(text)
    result = work(*command, ok=False)
    assert result.exit_code == 4
    assert "new/manifest.json: damaged" in result.stderr
    assert "unforeseen" not in result.stderr


@pytest.fixture
def drawn(sampled, tmp_path) -> Path:
    """A copy of a complete set of six."""
    folder = Path("runs/tiny/samples/quantized")
    return Path(shutil.copytree(sampled / folder, tmp_path / "quantized"))


def test_an_exchanged_image_is_found(drawn):
    assert sample_set.read_set(drawn).seeds == [0, 1, 2, 3, 4, 5]
    shutil.copy(drawn / "000003.png", drawn / "000001.png")
    with pytest.raises(ArtifactError, match=r"1 of 6 images are not those .*first: 000001.png"):
        sample_set.read_set(drawn)


def test_an_image_that_another_program_wrote_again_is_the_same(drawn):
    """Its colours count, not its bytes."""
    path = drawn / "000001.png"
    before = path.read_bytes()
    with Image.open(path) as image:
        image.convert("RGB").save(path, compress_level=0)
    assert path.read_bytes() != before
    assert len(sample_set.read_set(drawn).images) == 6


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("classes", lambda classes: [*classes[1:], classes[0]]),
        ("seeds", lambda seeds: seeds[:-1]),
        ("sampling", lambda sampling: {**sampling, "steps": 3}),
        ("source", lambda source: "another"),
        ("digests", lambda digests: {**digests, "model": "0" * 16}),
    ],
)
def test_a_changed_manifest_is_found(drawn, key, change):
    path = drawn / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, key: change(manifest[key])}))
    with pytest.raises(ArtifactError, match="damaged|of other (classes|seeds)"):
        sample_set.read_set(drawn)


def test_parts_of_a_set_keep_what_their_images_look_like(drawn):
    whole = sample_set.read_set(drawn)
    pixels = whole.latents.pixels()
    cut = whole.cut([1, 4])
    assert [sample_set.pixels_digest(image) for image in cut.images] == [pixels[1], pixels[4]]
    left = whole.latents.without({0, 2, 3, 5})
    assert left.pixels() == {1: pixels[1], 4: pixels[4]}
    shutil.copy(drawn / "000003.png", drawn / "000004.png")
    with pytest.raises(ArtifactError, match=r"1 of 6 images are not those .*first: 000004.png"):
        cut.images.read()
