"""CLIP score by a tiny CLIP in a folder: the model's own cosine, and a line where there is none."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="the extra text is not installed")

from qncd_cli.errors import ArtifactError, BackendUnavailable
from qncd_cli.metrics import prompted

from .shared import random_images, save_clip

PROMPTS = ["a cat", "a dog", "a cat", "seven boats on a lake"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("clip")
    save_clip(place)
    return place


def test_a_score_is_the_cosine_that_the_model_itself_finds(folder):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    images = random_images(0, 4, size=24)
    found = prompted.clip_scores(images, PROMPTS, prompted.find_clip(folder))
    model = CLIPModel.from_pretrained(folder).eval()
    for image, prompt, ours in zip(images, PROMPTS, found.tolist(), strict=True):
        pixels = CLIPImageProcessor.from_pretrained(folder)(
            image.permute(1, 2, 0).numpy(), return_tensors="pt"
        )
        words = CLIPTokenizer.from_pretrained(folder)(prompt, truncation=True, return_tensors="pt")
        with torch.no_grad():
            cosine = model(**words, **pixels).logits_per_image / model.logit_scale.exp()
        assert ours == pytest.approx(100 * cosine.item(), rel=1e-4)
    assert found.min() > 0


def test_what_points_the_other_way_is_0(tmp_path):
    save_clip(tmp_path, sign=1)
    images = random_images(0, 4, size=24)
    assert prompted.clip_scores(images, PROMPTS, prompted.find_clip(tmp_path)).tolist() == [0] * 4


def test_the_entry_names_the_model_and_pairs_share_their_draws(folder):
    model = prompted.find_clip(folder)
    scores = torch.linspace(10, 30, 50, dtype=torch.float64)
    entry, replicates = prompted.entry_of(scores, model, 1)
    other, others = prompted.entry_of(scores - 1, model, 1)
    assert entry["network"] == f"clip@{model.sha256[:8]}"
    assert entry["value"] == pytest.approx(20)
    assert 10 < entry["low"] < 20 < entry["high"] < 30
    assert replicates - others == pytest.approx([1.0] * len(replicates))
    assert other["value"] == pytest.approx(19)


def test_half_a_model_is_refused_and_not_filled_up_with_random_weights(folder, tmp_path):
    from transformers import CLIPTextModel

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    CLIPTextModel.from_pretrained(folder).save_pretrained(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(ArtifactError, match="not a whole CLIP model: without"):
        prompted.clip_scores(random_images(0, 1), ["a"], prompted.find_clip(tmp_path))


def test_no_model_is_one_line(folder, tmp_path, monkeypatch):
    with pytest.raises(BackendUnavailable, match="no CLIP model: config.json, preprocessor_config"):
        prompted.find_clip(tmp_path)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(ArtifactError, match="not a CLIP model"):
        prompted.clip_scores(random_images(0, 1), ["a"], prompted.find_clip(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackendUnavailable, match="--clip"):
        prompted.find_clip(folder)
