"""Artifacts in pieces have the bytes of those that are written at once, whatever their types."""

from __future__ import annotations

import pytest
import torch

from qncd_cli.store import artifacts
from qncd_cli.store.artifact_files import TYPES
from qncd_cli.store.artifacts import Artifact
from qncd_cli.store.streamed import ORDER, Streamed, read_rows, write_streamed


def all_types() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 2, (5, 3), generator=generator)
    types = {
        name: getattr(torch, spelled.removeprefix("torch.")) for name, (spelled, _) in TYPES.items()
    }
    return {
        f"{place}/{name}": values.to(type_, copy=True)
        for name, type_ in types.items()
        for place in "ba"
    }


def test_every_type_lies_where_safetensors_puts_it(tmp_path):
    assert sorted(ORDER) == sorted(TYPES)
    tensors = all_types()
    described = {n.split("/")[1]: [str(t.dtype), list(t.shape)] for n, t in tensors.items()}
    body = {
        "made_from": {"text": 'ä "quoted"'},
        "pieces": {p: {"tensors": described} for p in "ba"},
    }
    whole = Artifact("partial", tensors, body, "c", "m")
    artifacts.write(tmp_path / "whole", whole)
    streamed = {
        name: Streamed(str(t.dtype), tuple(t.shape), lambda t=t: iter([t[:2], t[2:]]))
        for name, t in tensors.items()
    }
    write_streamed(tmp_path / "pieces", Artifact("partial", {}, body, "c", "m"), streamed)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    assert torch.equal(read_rows(tmp_path / "pieces", "a/F32", slice(1, 3)), tensors["a/F32"][1:3])


def test_a_wrong_shape_is_no_artifact(tmp_path):
    body = {"made_from": {}, "pieces": {"a": {"tensors": {"x": ["torch.float32", [2]]}}}}
    wrong = {"a/x": Streamed("torch.float32", (3,), lambda: iter([torch.zeros(3)]))}
    with pytest.raises(AssertionError, match="a/x"):
        write_streamed(tmp_path / "a", Artifact("partial", {}, body, "c", "m"), wrong)
    assert not (tmp_path / "a").exists()
