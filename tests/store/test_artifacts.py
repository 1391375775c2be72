"""Artifacts: same inputs same bytes, every damage is seen, a failed write leaves what was there."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from qncd_cli.errors import ArtifactError
from qncd_cli.store import artifacts
from qncd_cli.store.artifact_files import read_stored
from qncd_cli.store.artifacts import Artifact
from qncd_cli.store.digests import canonical_json
from qncd_cli.store.files import write_bytes

LAYERS = {
    "conv_in": {"in_channels": 3, "chosen": "range@1", "clamped": 0, "shifted": True},
    "mid.conv2": {"in_channels": 5, "chosen": "embedding", "clamped": 2, "shifted": False},
}


def smoothing(**changes) -> Artifact:
    tensors = {
        "conv_in.smoothing": torch.arange(1.0, 4.0),
        "conv_in.shift": torch.arange(-1.0, 2.0),
        "mid.conv2.smoothing": torch.linspace(1, 2, 5),
    }
    artifact = Artifact(
        "smoothing", tensors, {"layers": LAYERS}, "c" * 16, "m" * 16, {"calibration": "p" * 64}
    )
    return replace(artifact, **changes)


def quantized() -> Artifact:
    """A 4-bit convolution with shift and bias correction, an 8-bit linear layer, a layer in
    floating point; attention modules with quantized and with floating-point operands."""
    entry = {
        "kind": "conv",
        "observer": "mse",
        "activation_bits": 8,
        "smoothed": False,
        "shifted": False,
        "bias": True,
        "bias_corrected": False,
        "in_channels": 3,
    }
    corrected = {"smoothed": True, "shifted": True, "bias_corrected": True}
    layers = {
        "a": {**entry, "weight_bits": 4, "weight_shape": [2, 3, 1, 1], **corrected},
        "b": {**entry, "weight_bits": 8, "weight_shape": [2, 3], "error": 0.30000000000000004},
        "c": {**entry, "weight_bits": 32, "weight_shape": [2, 3], "activation_bits": 32},
    }

    def ranges() -> dict[str, torch.Tensor]:
        zero_point = torch.zeros(2, dtype=torch.int32)
        return {"input_scale": torch.ones(2), "input_zero_point": zero_point}

    of_layer = {
        "a": {
            "weight": torch.tensor([[0x21, 0x03], [0x54, 0x06]], dtype=torch.uint8),
            "weight_scale": torch.ones(2),
            "weight_zero_point": torch.full((2,), 8, dtype=torch.uint8),
            "smoothing": torch.ones(3),
            "shift": torch.ones(3),
            "bias_correction": torch.ones(2, 2),
            **ranges(),
        },
        "b": {
            "weight": torch.ones(2, 3, dtype=torch.int8),
            "weight_scale": torch.ones(2),
            **ranges(),
        },
        "c": {"weight": torch.ones(2, 3)},
    }
    tensors = {f"{n}.{k}": v for n, parts in of_layer.items() for k, v in parts.items()}
    tensors |= {f"{name}.bias": torch.zeros(2) for name in layers}
    for operand in ("query", "key", "value"):
        tensors[f"attn.{operand}_scale"] = torch.ones(2)
        tensors[f"attn.{operand}_zero_point"] = torch.zeros(2, dtype=torch.int32)
    attention = {
        "attn": {"bits": 8, "probabilities_bits": 8, "observer": "mse"},
        "softmax_only": {"bits": 32, "probabilities_bits": 32, "observer": "mse"},
    }
    bounds = {"groups": 2, "group_bounds": [500], "cache_time_embeddings": True}
    body = {"layers": layers, "attention": attention, **bounds}
    return Artifact("quantized", tensors, body, "c" * 16, "m" * 16)


@pytest.fixture
def written(tmp_path) -> Path:
    return artifacts.write(tmp_path / "smoothing.safetensors", smoothing()).path


def refused(path: Path, kind: str | None = "smoothing") -> str:
    """What both readers, with torch and without, say of a file."""
    with pytest.raises(ArtifactError) as caught:
        artifacts.read(path, kind)
    with pytest.raises(ArtifactError) as torchless:
        read_stored(path, kind)
    assert str(torchless.value) == str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- round trip ---------------------------------------------------------------------------------


@pytest.mark.parametrize("artifact", [smoothing(), quantized()], ids=lambda a: a.kind)
def test_what_is_written_reads_back_as_it_was(tmp_path, artifact):
    path = tmp_path / "file.safetensors"
    sealed = artifacts.write(path, artifact)
    again = artifacts.read(path, artifact.kind)
    assert again.digest == sealed.digest
    assert again.path == path
    for name in ("kind", "body", "config", "model", "parents"):
        assert getattr(again, name) == getattr(artifact, name)
    assert again.tensors.keys() == artifact.tensors.keys()
    for name, tensor in artifact.tensors.items():
        assert again.tensors[name].dtype == tensor.dtype
        assert torch.equal(again.tensors[name], tensor)


def test_same_inputs_give_the_same_bytes_in_any_order(tmp_path):
    first = artifacts.write(tmp_path / "a", smoothing()).path
    shuffled = smoothing(
        tensors=dict(reversed(smoothing().tensors.items())),
        body={"layers": dict(reversed(LAYERS.items()))},
    )
    second = artifacts.write(tmp_path / "b", shuffled).path
    assert first.read_bytes() == second.read_bytes()


def test_saved_loaded_saved_gives_the_same_bytes(tmp_path):
    first = artifacts.write(tmp_path / "a", quantized()).path
    second = artifacts.write(tmp_path / "b", artifacts.read(first)).path
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"config": "d" * 16},
        {"model": "d" * 16},
        {"parents": {}},
        {"body": {"layers": LAYERS, "more": 1}},
        {"tensors": {**smoothing().tensors, "conv_in.smoothing": torch.zeros(3)}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_digest_covers_everything_in_the_file(changes):
    assert artifacts.seal(smoothing()).digest != artifacts.seal(smoothing(**changes)).digest


def test_the_file_has_one_metadata_key_of_canonical_json(written):
    with safe_open(written, framework="pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["qncd"]
    assert canonical_json(json.loads(metadata["qncd"])) == metadata["qncd"]


def test_an_artifact_that_breaks_the_grammar_is_not_written(tmp_path):
    wrong = smoothing(tensors={k: v for k, v in smoothing().tensors.items() if "mid" not in k})
    with pytest.raises(AssertionError, match=r"1 of 3 tensors missing \(first: mid.conv2"):
        artifacts.write(tmp_path / "a", wrong)
    assert not list(tmp_path.iterdir())


def test_a_channel_of_codes_takes_its_bits_rounded_up_to_bytes():
    assert artifacts.packed_width(7, 2) == 2
    assert artifacts.packed_width(7, 3) == 3
    assert artifacts.packed_width(8, 3) == 3
    assert artifacts.packed_width(7, 4) == 4
    assert artifacts.packed_width(7, 5) == 5
    assert artifacts.packed_width(7, 6) == 6
    assert artifacts.packed_width(7, 8) == 7


def test_tensors_below_a_prefix_lose_it_once_and_keep_their_order():
    tensors = {name: torch.ones(1) for name in ("a.b", "a.a.b", "b.a.", "a", "ab.c", "a.0")}
    below = artifacts.tensors_below("a.", tensors)
    assert list(below) == ["b", "a.b", "0"]
    assert below["a.b"] is tensors["a.a.b"]


def test_tensors_by_module_are_those_below_it_without_its_children():
    tensors = {name: torch.ones(1) for name in ("a.b", "a.a.b", "b.a.", "a", "ab.c", "a.0")}
    found = artifacts.tensors_by_module(tensors)
    assert {module: list(parts) for module, parts in found.items()} == {
        "a": ["b", "0"],
        "a.a": ["b"],
        "b.a": [""],
        "": ["a"],
        "ab": ["c"],
    }
    assert found["a.a"]["b"] is tensors["a.a.b"]


@pytest.mark.parametrize("artifact", [smoothing(), quantized()], ids=lambda a: a.kind)
def test_what_is_read_without_torch_is_what_is_read_with_it(tmp_path, artifact):
    path = artifacts.write(tmp_path / "file.safetensors", artifact).path
    stored, whole = read_stored(path, artifact.kind), artifacts.read(path, artifact.kind)
    for part in ("kind", "body", "config", "model", "parents", "digest", "path"):
        assert getattr(stored, part) == getattr(whole, part)
    layout = {name: (str(t.dtype), tuple(t.shape)) for name, t in whole.tensors.items()}
    assert stored.tensors == layout
    assert stored.size == path.stat().st_size


# ---- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("artifact", [smoothing(), quantized()], ids=lambda a: a.kind)
@pytest.mark.parametrize("read", [artifacts.read, read_stored])
def test_a_change_of_any_single_byte_is_seen(tmp_path, artifact, read):
    path = artifacts.write(tmp_path / "file.safetensors", artifact).path
    good = path.read_bytes()
    unseen = []
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= (0x01, 0x80)[position % 2]
        path.write_bytes(bad)
        try:
            read(path, artifact.kind)
        except ArtifactError:
            continue
        unseen.append((position, good[max(0, position - 20) : position + 20]))
    assert not unseen
    path.write_bytes(good)
    artifacts.read(path, artifact.kind)


def test_a_file_cut_off_anywhere_is_seen(written):
    good = written.read_bytes()
    for length in [*range(0, 64), *range(64, len(good), 13), len(good) - 1]:
        written.write_bytes(good[:length])
        assert 'make it with "qncd calibrate"' in refused(written)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\xff" * 100, b"{}", bytes(8) + b"{}"])
def test_files_of_other_kinds_are_not_artifacts(tmp_path, data):
    path = tmp_path / "file.safetensors"
    path.write_bytes(data)
    assert "not a qncd artifact" in refused(path)


def test_appended_bytes_are_seen(written):
    written.write_bytes(written.read_bytes() + b"\0")
    refused(written)


def test_a_safetensors_file_of_another_program_is_not_an_artifact(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"weight": torch.ones(2)}, metadata={"format": "pt"}))
    assert "not a qncd artifact" in refused(path)


def test_a_second_metadata_key_is_refused(written):
    good = artifacts.read(written)
    with safe_open(written, framework="pt") as file:
        metadata = {**file.metadata(), "format": "pt"}
    written.write_bytes(save(good.tensors, metadata=metadata))
    assert "not a qncd artifact" in refused(written)


def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path):
    line = refused(tmp_path / "smoothing.safetensors")
    assert 'missing (make it with "qncd calibrate")' in line


def test_a_folder_in_the_place_of_the_file_is_missing(tmp_path):
    assert "missing" in refused(tmp_path)


def test_an_artifact_of_another_kind_is_refused_by_both_names(written):
    line = refused(written, "quantized")
    assert "holds smoothing, expected quantized" in line
    assert "qncd quantize" in line


def test_an_artifact_of_any_kind_can_be_asked_for(written):
    assert artifacts.read(written).kind == "smoothing"


def test_another_schema_version_is_refused(tmp_path, monkeypatch):
    other = replace(artifacts.KINDS["smoothing"], version=99)
    with monkeypatch.context() as patch:
        patch.setitem(artifacts.KINDS, "smoothing", other)
        path = artifacts.write(tmp_path / "a", smoothing()).path
    assert "schema 99, this version reads 2" in refused(path)


def forged(path: Path, tensors: dict) -> Path:
    """A file with a good digest whose tensors are not those that its body announces."""
    artifact = smoothing(tensors=tensors)
    digest = artifacts._content_digest(artifacts._meta(artifact, ""), tensors)
    metadata = {"qncd": canonical_json(artifacts._meta(artifact, digest))}
    path.write_bytes(save(tensors, metadata=metadata))
    return path


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mid.conv2.smoothing": None}, "1 of 3 tensors missing (first: mid.conv2.smoothing)"),
        ({"extra.smoothing": torch.ones(1)}, "unexpected tensor extra.smoothing"),
        (
            {"conv_in.smoothing": torch.ones(4)},
            "conv_in.smoothing is torch.float32 [4], expected torch.float32 [3]",
        ),
        (
            {"conv_in.smoothing": torch.ones(3, dtype=torch.float64)},
            "conv_in.smoothing is torch.float64 [3], expected torch.float32 [3]",
        ),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_the_first_wrong_tensor_is_named_with_the_command(tmp_path, change, text):
    tensors = {k: v for k, v in {**smoothing().tensors, **change}.items() if v is not None}
    line = refused(forged(tmp_path / "a", tensors))
    assert text in line
    assert "qncd calibrate" in line


# ---- lineage ------------------------------------------------------------------------------------


def test_the_right_lineage_passes(written):
    artifact = artifacts.read(written)
    artifacts.check_lineage(
        artifact, config="c" * 16, model="m" * 16, parents={"calibration": "p" * 64}
    )


@pytest.mark.parametrize(
    ("claim", "text"),
    [
        ({"config": "x"}, "made with another configuration"),
        ({"model": "x"}, "made from another model"),
        ({"parents": {"calibration": "x"}}, "made from another calibration artifact"),
        ({"parents": {"quantized": "x"}}, "made from another quantized artifact"),
    ],
)
def test_another_lineage_is_refused_with_file_and_command(written, claim, text):
    with pytest.raises(ArtifactError) as caught:
        artifacts.check_lineage(artifacts.read(written), **claim)
    assert text in str(caught.value)
    assert str(written) in str(caught.value)
    assert 'repeat "qncd calibrate"' in str(caught.value)


# ---- atomic writing -----------------------------------------------------------------------------


def test_what_safetensors_says_of_a_full_disk_is_understood(written, monkeypatch):
    """Its own errors carry the system's number in words alone (0.8 on a full tmpfs)."""
    before = written.read_bytes()

    def full(*args, **kwargs):
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "save_file", full)
        with pytest.raises(ArtifactError, match="no room on disk"):
            artifacts.write(written, smoothing(config="d" * 16))
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(written, monkeypatch, call, code):
    before = written.read_bytes()

    def full(*args):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(ArtifactError, match="no room on disk") as caught:
            artifacts.write(written, smoothing(config="d" * 16))
    assert caught.value.exit_code == 4
    assert str(written) in str(caught.value)
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]
    artifacts.write(written, smoothing(config="d" * 16))
    assert artifacts.read(written).config == "d" * 16


def test_an_interruption_while_writing_leaves_the_old_file_and_nothing_else(written, monkeypatch):
    before = written.read_bytes()

    def interrupted(handle):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_bytes(written, b"new")
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]
