"""ColorVideoVDP of pairs, where it is installed, and one line where it is not."""

from __future__ import annotations

import sys

import pytest

from qncd_cli.errors import BackendUnavailable
from qncd_cli.metrics import visible

from .shared import random_images


def test_what_is_not_installed_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycvvdp", None)
    assert 'pip install "qncd-cli[cvvdp]"' in visible.why_not()
    with pytest.raises(BackendUnavailable, match="cvvdp is not installed"):
        visible.jod_each(random_images(0, 1), random_images(1, 1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_equal_images_are_10_and_stronger_noise_is_more_visible():
    pytest.importorskip("pycvvdp", reason="the extra cvvdp is not installed")
    images = random_images(0, 2, size=32) // 2 + 64
    noise = random_images(1, 2, size=32)
    found = [visible.jod_each(images, images + noise // part) for part in (32, 4)]
    assert visible.jod_each(images[:, :1], images[:, :1]) == pytest.approx([10.0] * 2)
    assert all(10 > weak > strong for weak, strong in zip(*found, strict=True))
