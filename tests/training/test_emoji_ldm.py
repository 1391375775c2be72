import argparse
import io
import json
import tarfile

import emoji_data
import emoji_ldm
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from qncd_cli.models.loading import load_model

GENERATOR = torch.Generator()
LEVELS = torch.tensor([[0.9], [0.5], [0.01]])


def candidates(count):
    x0 = torch.randn(count, 4, 2, 2, generator=GENERATOR.manual_seed(1))
    labels = torch.arange(count) % 2
    return x0, labels, torch.full((count,), 1 / count)


def noised(x0, index):
    noise = torch.randn(3, 4, 2, 2, generator=GENERATOR.manual_seed(2))
    level = LEVELS[:, :, None, None]
    return level.sqrt() * x0[index] + (1 - level).sqrt() * noise, noise


def test_with_one_image_of_a_class_the_expected_noise_is_the_noise():
    x0, labels, weights = candidates(2)
    noisy, noise = noised(x0, torch.tensor([0, 1, 0]))
    found = emoji_ldm.mean_noise(noisy, LEVELS, torch.tensor([0, 1, 0]), x0, labels, weights)
    torch.testing.assert_close(found, noise, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("asked", [0, emoji_ldm.NUM_CLASSES])
def test_the_expected_noise_is_that_of_bayes_rule(asked):
    x0, labels, _ = candidates(6)
    weights = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.1, 0.2])
    noisy, _ = noised(x0, torch.tensor([0, 2, 4]))
    asks = torch.full((3,), asked)
    found = emoji_ldm.mean_noise(noisy, LEVELS, asks, x0, labels, weights)
    for row in range(3):
        scale, deviation = LEVELS[row].sqrt(), (1 - LEVELS[row]).sqrt()
        density = torch.distributions.Normal(scale * x0.double(), deviation.double())
        chance = density.log_prob(noisy[row].double()).sum((1, 2, 3)).exp() * weights
        chance = chance * (torch.ones(6) if asked else labels == 0)
        noises = (noisy[row] - scale * x0) / deviation
        expected = (noises * (chance / chance.sum())[:, None, None, None]).sum(0)
        torch.testing.assert_close(found[row].double(), expected, atol=1e-4, rtol=1e-4)


def test_a_class_is_drawn_by_the_square_root_of_its_size():
    labels = torch.tensor([0] * 16 + [1] * 4)
    weights = emoji_ldm.draw_weights(labels)
    assert weights.sum() == pytest.approx(1)
    assert weights[labels == 0].sum() / weights[labels == 1].sum() == pytest.approx(2)


def test_every_class_but_those_with_writing_is_mirrored():
    names = list(emoji_data.CLASSES)
    labels = torch.tensor([names.index("face"), names.index("clock"), -1])
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    torch.manual_seed(0)
    vae = emoji_ldm.make_vae().eval()
    latents, of = emoji_ldm.encode_all(vae, images, labels)
    assert of.tolist() == [names.index("face"), names.index("clock"), names.index("face")]
    assert latents.shape == (3, 4, 16, 16)
    with torch.no_grad():
        mirrored = vae.encode(emoji_ldm.signed(images[:1].flip(3))).latent_dist.mean
    factor = vae.config.scaling_factor
    torch.testing.assert_close(latents[2:], factor * mirrored, atol=1e-5, rtol=1e-4)


def test_the_parts_fit_each_other():
    parts = emoji_ldm.make_parts().eval()
    x = torch.zeros(2, 4, 16, 16)
    labels = torch.tensor([0, emoji_ldm.NUM_CLASSES])
    with torch.no_grad():
        noise = parts["unet"](x, 0, encoder_hidden_states=parts["embedder"](labels)).sample
    assert noise.shape == x.shape
    features, logits = emoji_ldm.classify(
        emoji_ldm.make_classifier(), torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    )
    assert features.shape == (2, 128)
    assert logits.shape == (2, emoji_ldm.NUM_CLASSES)


def test_the_network_that_reads_pictures_sees_them_shifted_not_wrapped():
    images = torch.ones(4, 3, 64, 64)
    images[:, :, :, -1] = 0
    for seed in range(8):
        shifted = emoji_ldm.augment(images, GENERATOR.manual_seed(seed))
        assert (shifted[:, :, :, :8] == 1).all()


def package(folder):
    """A package of eight plain pictures of two classes."""
    with tarfile.open(folder / "lobehub-fluent-emoji-3d-1.1.0.tgz", "w:gz") as archive:
        for index in range(8):
            data = io.BytesIO()
            Image.new("RGB", (64, 64), (30 * index, 128, 0)).save(data, "webp")
            name = f"package/assets/{0x1F600 + index if index < 4 else 0x1F345 + index:x}.webp"
            entry = tarfile.TarInfo(name)
            entry.size = data.tell()
            archive.addfile(entry, io.BytesIO(data.getvalue()))


@pytest.mark.slow
def test_the_parts_in_their_order_write_a_model_that_loads(tmp_path, monkeypatch):
    """Two steps each; then the denoiser, asked for fewer than it has made, is written again."""
    package(tmp_path)
    folder = tmp_path / "emoji-ldm"
    monkeypatch.setattr(emoji_ldm, "EMOJI", folder)
    monkeypatch.setattr(emoji_ldm, "FEATURES", tmp_path / "features")
    args = argparse.Namespace(emoji=tmp_path, state=tmp_path / "state", steps=2, batch=4, seed=0)
    for part in ("emoji-vae", "emoji-unet", "emoji-classifier"):
        emoji_ldm.PARTS[part](args)
    args.steps = 1
    emoji_ldm.PARTS["emoji-unet"](args)
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert record["unet"]["steps"] == 2
    assert record["unet"]["loss"] > 0
    model = load_model(str(folder))
    assert model.latent_shape == (4, 16, 16)
    assert model.num_classes == len(emoji_data.CLASSES)
    assert model.decode(torch.zeros(1, 4, 16, 16)).shape == (1, 3, 64, 64)
    assert load_file(tmp_path / "features" / "emoji-reference.safetensors")["mu"].shape == (128,)
