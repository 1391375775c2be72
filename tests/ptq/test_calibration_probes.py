"""Excerpts of what layers read: as large as they may be, and from all over the input."""

from __future__ import annotations

import pytest
import torch

from qncd_cli.ptq.calibration_probes import POSITIONS, excerpt


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 2, 96, 40), (1, 2, 33, 33), (1, 1, 8, 2048)])
def test_an_excerpt_of_an_image_is_one_piece_and_no_larger_than_asked(shape):
    x = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    for number in range(40):
        part = excerpt(x, 1, number)
        height, width = part.shape[2:]
        assert part.shape[:2] == x.shape[:2]
        assert POSITIONS / 2 < height * width <= POSITIONS
        start = int(part[0, 0, 0, 0])
        top, left = divmod(start, shape[3])
        assert torch.equal(part, x[:, :, top : top + height, left : left + width])


def test_excerpts_lie_all_over_the_image():
    image = torch.arange(4096.0).reshape(1, 1, 64, 64)
    seen = {int(v) for number in range(40) for v in excerpt(image, 1, number).flatten()}
    assert len(seen) > 0.9 * 4096


@pytest.mark.parametrize("tokens", [1025, 4096, 5000])
def test_an_excerpt_of_a_sequence_is_of_every_so_many_tokens(tokens):
    x = torch.arange(2.0 * tokens * 3).reshape(2, tokens, 3)
    every = -(-tokens // POSITIONS)
    seen = set()
    for number in range(every):
        part = excerpt(x, -1, number)
        assert part.shape[0] == 2
        assert part.shape[1] <= POSITIONS
        seen |= set(part[0, :, 0].tolist())
    assert len(seen) == tokens


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1024, 3), (2, 77)])
def test_what_is_small_is_kept_whole(shape):
    x = torch.randn(shape)
    for number in range(3):
        assert torch.equal(excerpt(x, 1 if len(shape) == 4 else -1, number), x)
