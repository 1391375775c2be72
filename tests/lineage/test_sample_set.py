"""A sample set that is being drawn: damage costs the batch that it hit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Qncd
from diffusers import UNet2DConditionModel
from torch.nn.modules.module import register_module_forward_pre_hook

from qncd_cli.errors import ArtifactError
from qncd_cli.lineage import sample_set

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
    drawn = sample_set.artifacts.read(folder / "latents.safetensors", "latents")
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(ArtifactError, match=r"1 images are not there .*000009\.png"):
        sample_set.assemble(folder, {}, drawn, 2, "cpu", {0, 9})
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("text", ["[]", '"text"', '{"seeds": 3}', '{"seeds": ["a"]}', "null"])
@pytest.mark.parametrize("command", [SAMPLE, ("eval", "--name", "new")], ids=["sample", "eval"])
def test_a_manifest_of_another_form_is_one_line(work, text, command):
    (work.folder / SET).mkdir()
    (work.folder / SET / "manifest.json").write_text(text)
    result = work(*command, ok=False)
    assert result.exit_code == 4
    assert "new/manifest.json: damaged" in result.stderr
    assert "unforeseen" not in result.stderr
