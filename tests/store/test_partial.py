"""Partial results: found again by the same work, and by no other."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch

from qncd_cli.errors import ArtifactError, ConfigError
from qncd_cli.store import partial
from qncd_cli.store.partial import Partial, Piece
from qncd_cli.store.partial_folder import discard_unneeded, folder_of, kept_phrase

MADE_FROM = {"configuration": {"bits": 4}, "model": "m", "threads": 1}


def opened(folder: Path, tell=pytest.fail, clock=lambda: 0.0, **other) -> Partial:
    return Partial(folder / "partial" / "quantize", {**MADE_FROM, **other}, tell, clock)


def stopped_by(error: type[BaseException], folder: Path, pieces: dict[str, Piece]) -> None:
    """Work that made these pieces and then ended so."""
    with suppress(error), opened(folder) as kept:
        for key, piece in pieces.items():
            kept.keep(key, piece)
        raise error("stopped")


def interrupted_after(folder: Path, *keys: str) -> None:
    """Work that made these pieces, which hold their numbers, and was stopped."""
    numbered = {
        key: Piece({"n": number}, {"x": torch.full((2, 2), float(number))})
        for number, key in enumerate(keys)
    }
    stopped_by(KeyboardInterrupt, folder, numbered)


def test_pieces_come_back_once_with_values_and_tensors(tmp_path):
    interrupted_after(tmp_path, "a.b c", "d")
    with opened(tmp_path) as kept:
        piece = kept.take("d")
        assert piece is not None
        assert piece.value == {"n": 1}
        assert torch.equal(piece.tensors["x"], torch.ones(2, 2))
        assert kept.take("d") is None
        assert kept.has("a.b c")
        assert kept.piece("a.b c", pytest.fail).value == {"n": 0}


def test_a_piece_lies_in_memory_as_it_is_read_back(tmp_path):
    """Sums over channels first and last differ in their last bits."""
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    made = Piece(tensors={"x": x, "columns": x[0, 0].T})
    with suppress(KeyboardInterrupt), opened(tmp_path) as kept:
        kept.keep("call", made)
        raise KeyboardInterrupt
    with opened(tmp_path) as kept:
        found = kept.take("call")
    for name, tensor in made.tensors.items():
        assert torch.equal(tensor, found.tensors[name])
        assert tensor.stride() == found.tensors[name].stride()


def test_a_piece_is_what_it_was_when_it_was_kept(tmp_path):
    x = torch.zeros(3)
    with suppress(KeyboardInterrupt), opened(tmp_path) as kept:
        kept.keep("a", Piece(tensors={"x": x, "view": x[:2], "none": x[:0]}))
        x += 1
        raise KeyboardInterrupt
    with opened(tmp_path) as kept:
        piece = kept.take("a")
        assert piece is not None
        assert {n: t.tolist() for n, t in piece.tensors.items()} == {
            "x": [0, 0, 0],
            "view": [0, 0],
            "none": [],
        }


def test_it_is_written_now_and_then_and_more_rarely_where_that_takes_long(tmp_path):
    now = [0.0]
    with opened(tmp_path, clock=lambda: now[0]) as kept:

        def kept_at(seconds: float) -> int:
            now[0] = seconds
            kept.keep(f"{seconds}", Piece())
            return len(list(folder_of(tmp_path, "quantize").glob("0*.safetensors")))

        assert [kept_at(t) for t in (1, 19, 20, 39, 40)] == [0, 0, 1, 1, 2]

        def slow() -> Piece:
            now[0] += 3.0
            return Piece()

        now[0] = 61
        kept.keep("slow", Piece(), {"state": slow})
        assert [kept_at(64 + t) for t in (20, 59, 60)] == [3, 3, 4]


def test_the_longer_a_stage_takes_the_more_rarely_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "EVERY", 0.5)
    now, written = [0.0], []
    with opened(tmp_path, clock=lambda: now[0]) as kept:
        for half_seconds in range(1, 20_001):
            now[0] = half_seconds / 2
            kept.keep_states({"state": lambda: written.append(now[0]) or Piece()})
    intervals = [b - a for a, b in zip(written, written[1:], strict=False)]
    assert intervals[:3] == [0.5, 0.5, 0.5]
    assert intervals == sorted(intervals)
    assert intervals[-1] == 60.0
    assert len(written) < 700


def test_a_state_replaces_the_one_before_and_is_never_ahead_of_the_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "EVERY", 0.0)
    with opened(tmp_path) as kept:
        for number in (1, 2):
            kept.keep(f"{number}", Piece(), {"state": lambda n=number: Piece(n)})

        def no_room(path: Path):
            raise ArtifactError(f"{path}: no room")

        write = partial.artifacts.replacing
        monkeypatch.setattr(
            partial.artifacts, "replacing", lambda p: no_room(p) if p.stem == "state" else write(p)
        )
        with pytest.raises(ArtifactError):
            kept.keep("3", Piece(), {"state": lambda: Piece(3)})
    with opened(tmp_path) as kept:
        state = kept.take("state")
        assert state is not None
        assert state.value == 2
        assert kept.has("3")


def test_work_made_from_something_else_is_left_with_a_line_that_says_what(tmp_path):
    interrupted_after(tmp_path, "a")
    said: list[str] = []
    with opened(tmp_path, said.append, threads=2) as kept:
        assert not kept.has("a")
    (line,) = said
    assert line.endswith("partial/quantize: not gone on with, begun again (threads: 1 -> 2)")
    assert not (tmp_path / "partial").exists()


def test_a_damaged_file_costs_its_pieces(tmp_path):
    interrupted_after(tmp_path, "a")
    interrupted_after(tmp_path, "b")
    first, second = sorted(folder_of(tmp_path, "quantize").iterdir())
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    said: list[str] = []
    with opened(tmp_path, said.append) as kept:
        assert not kept.has("a")
        assert kept.has("b")
    assert "damaged" in said[0]
    assert list(second.parent.iterdir()) == [second]


def test_an_error_that_would_come_again_keeps_nothing(tmp_path):
    stopped_by(ConfigError, tmp_path, {"a": Piece()})
    assert not (tmp_path / "partial").exists()


def test_what_is_forgotten_is_gone_from_disk_and_what_is_written_is_removed(tmp_path):
    interrupted_after(tmp_path, "probe 1", "probe 2")
    with opened(tmp_path) as kept:
        kept.keep("choice", Piece())
        kept.forget("probe ")
        assert len(list(folder_of(tmp_path, "quantize").iterdir())) == 1
        kept.remove()
    assert list(tmp_path.iterdir()) == []


def test_scratch_of_a_killed_process_is_gone_when_the_work_begins_again(tmp_path):
    interrupted_after(tmp_path, "a")
    with opened(tmp_path) as kept:
        with kept.scratch() as folder:
            assert folder.is_relative_to(tmp_path / "partial")
            left = folder.with_name("left")
            left.mkdir()
        assert not folder.exists()
    with opened(tmp_path):
        assert not left.exists()


def test_people_are_told_what_is_there(tmp_path):
    assert kept_phrase(tmp_path, "quantize").startswith("nothing of quantize is kept")
    interrupted_after(tmp_path, "a")
    assert kept_phrase(tmp_path, "quantize").startswith("what quantize has done is kept")
    discard_unneeded(tmp_path, "quantize")
    assert list(tmp_path.iterdir()) == []
