"""Latents joined from files are the bytes that writing all of them at once gives."""

from __future__ import annotations

import pytest
import torch

from qncd_cli.lineage import latents
from qncd_cli.lineage.latents import Latents, join
from qncd_cli.lineage.sample_sets import PIXELS
from qncd_cli.store import artifacts
from qncd_cli.store.artifacts import Artifact


def artifact(seeds: list[int], traced: int = 2, extra_calls: int = 0) -> Artifact:
    """A batch; every value is a function of its seed."""
    rows = torch.tensor(seeds, dtype=torch.float32).reshape(-1, 1, 1, 1)
    values = rows + torch.arange(12).reshape(1, 3, 2, 2) / 7
    tensors = {
        "latents": values,
        "seeds": torch.tensor(seeds),
        "classes": torch.tensor(seeds) % 3,
        "predictions": torch.stack([values[:traced], -values[:traced]], 1),
        "prediction_seeds": torch.tensor(seeds)[:traced],
    }
    body = {
        "count": len(seeds),
        "latent_shape": [3, 2, 2],
        "traced": len(seeds[:traced]),
        "steps": 2,
        "extra_calls": extra_calls,
        PIXELS: [f"{seed:016x}" for seed in seeds],
    }
    return Artifact("latents", tensors, body, "", "m" * 16)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_joined_files_are_byte_for_byte_the_file_of_all_rows(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(latents, "ROWS", rows)
    for name, seeds in {"b": [5, 6, 7, 8], "a": [0, 1, 2], "c": [7, 20]}.items():
        artifacts.write(tmp_path / name, artifact(seeds, traced=len(seeds)))
    pieces = [Latents.open(tmp_path / name) for name in "bac"]
    joined = join(tmp_path / "joined", pieces)
    seeds = [0, 1, 2, 5, 6, 7, 8, 20]
    whole = artifacts.write(tmp_path / "whole", artifact(seeds, traced=len(seeds)))
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "whole").read_bytes()
    assert joined.digest == whole.digest


def test_a_file_is_joined_into_itself_without_the_seeds_that_are_left_out(tmp_path):
    path, more = tmp_path / "latents", tmp_path / "more"
    artifacts.write(path, artifact([0, 1, 2, 3], traced=4))
    artifacts.write(more, artifact([2], traced=1, extra_calls=5))
    join(path, [Latents.open(path).without({2, 3}), Latents.open(more)])
    whole = artifacts.write(tmp_path / "whole", artifact([0, 1, 2], traced=3, extra_calls=5))
    assert path.read_bytes() == whole.path.read_bytes()


def test_without_traced_seeds_there_are_no_predictions(tmp_path):
    artifacts.write(tmp_path / "a", artifact([40, 41], traced=0))
    join(tmp_path / "joined", [Latents.open(tmp_path / "a")])
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "a").read_bytes()
    found = Latents.open(tmp_path / "joined")
    assert found.rows("prediction_seeds") == {}
    assert torch.equal(found.of([41, 40]), artifact([41, 40]).tensors["latents"])
