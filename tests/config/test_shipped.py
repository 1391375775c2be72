"""Shipped configurations: one a model, found by name, with widths in the name or without."""

from __future__ import annotations

import pytest

from qncd_cli.cli.wanted import Wanted
from qncd_cli.config.loading import load_config
from qncd_cli.config.shipped import find_config, shipped_configs, split_widths
from qncd_cli.errors import ConfigError
from qncd_cli.store.digests import digest_of

# Before there was one file a model, most of these were files of their own. Digests of what it
# resolves to beside defaults, and of what decides calibrate and quantize: runs made from it hold.
# A preset that changes on purpose changes those of its configurations.
WITH_WIDTHS = {
    "cifar10_w4a6": ("bf0c659f0f8f6ad4", "db69755199c1bb2f", "42899139bdcddb02"),
    "cifar10_w4a8": ("dfcc564e05044121", "db69755199c1bb2f", "2fb373076808320b"),
    "cifar10_w4a8_paper": ("650d5991d8ec4716", "e7d3ab582dc3d314", "aa24c05adb7b3407"),
    "cifar10_w8a8": ("66277d800191d588", "db69755199c1bb2f", "73536619c89b9b0a"),
    "dit_xl_w4a6": ("3817f5f2cf3a2695", "9e6e00a76a072e31", "1a376569a4c1e4a0"),
    "dit_xl_w4a8": ("6dd4adeeddeb2e89", "9e6e00a76a072e31", "c86eda683af71b53"),
    "dit_xl_w8a8": ("aa92404ff9dddbfb", "9e6e00a76a072e31", "53e632743baac0ad"),
    "emoji_ldm_w4a4": ("720f5465a0b6c81b", "ace212ed90a53ed0", "b79687204b196036"),
    "emoji_ldm_w4a6": ("8503a9645900aca3", "ace212ed90a53ed0", "95017625bd7e7876"),
    "emoji_ldm_w4a8": ("d27dbb8866830763", "ace212ed90a53ed0", "ca7368c7a65c8f77"),
    "emoji_ldm_w8a8": ("26877575877e1c6d", "ace212ed90a53ed0", "6f1ed531ebf89cd8"),
    "fashion_ddpm_w4a4": ("f489ed85b5fd7546", "e09e9c161a5181c5", "929686e60587477e"),
    "fashion_ddpm_w4a6": ("1db3167da5978155", "e09e9c161a5181c5", "c5b6ecf9c72a6c71"),
    "fashion_ddpm_w4a8": ("1dcaf926850ccb6a", "e09e9c161a5181c5", "5418371f3bf268c7"),
    "fashion_ddpm_w8a8": ("6e330a43fefc0e08", "e09e9c161a5181c5", "e3f20b2455edfb51"),
    "fashion_dit_w4a4": ("e8a1de89fe6ae9a9", "d065c36825b7dbf4", "a1f4065b06cac90f"),
    "fashion_dit_w4a6": ("1bfb89caefa8717d", "d065c36825b7dbf4", "46f4dfc32c99fac0"),
    "fashion_dit_w4a8": ("39baf7255547ac13", "d065c36825b7dbf4", "719cd1e2f5b6f049"),
    "fashion_dit_w8a8": ("fbccbc72184073e5", "d065c36825b7dbf4", "4bcda920bc363833"),
    "fashion_ldm_w4a4": ("32a0ac437ff3f621", "a94334d5c6727d71", "77ab8fcd3d054af9"),
    "fashion_ldm_w4a6": ("4df40e66edb645f7", "a94334d5c6727d71", "e6f131b185421692"),
    "fashion_ldm_w4a8": ("654ed8e0c36a127d", "a94334d5c6727d71", "84a2f4a139787dd9"),
    "fashion_ldm_w8a8": ("605ea8a3a6d5da56", "a94334d5c6727d71", "6c40ad238b6b9770"),
    "flux_dev_w4a6": ("c2ed2c76e6c142bb", "33ebc1ac95f7b974", "1a868d52ca3f1b3b"),
    "flux_dev_w4a8": ("807198eb99bb66c8", "33ebc1ac95f7b974", "2cea30148ecdeb47"),
    "flux_dev_w8a8": ("cd36bb519edd4c6c", "33ebc1ac95f7b974", "17c66965fec3feb9"),
    "ldm4_w4a6": ("f4bd8acec2f46c54", "abb2843bd6c9c038", "adf8feef5496a6d4"),
    "ldm4_w4a8": ("0490a41ba0b30737", "abb2843bd6c9c038", "1b9f3828ec246888"),
    "ldm4_w4a8_paper": ("fb5dcd1f2ff6a5fd", "54ed4723a5bcbd52", "bc4dce3ebd0787ed"),
    "ldm4_w8a8": ("ced486085da027ab", "abb2843bd6c9c038", "89bdd273e0186b1f"),
    "lsun_bedrooms_w4a6": ("8f465d9908963dcc", "6d9111b6c3538a6b", "4d6ff1971548956d"),
    "lsun_bedrooms_w4a8": ("27aeae96c41b88bc", "6d9111b6c3538a6b", "ee823bb1f297b8e7"),
    "lsun_bedrooms_w4a8_paper": ("2cb12ff3760c4fb3", "aca6b04f64afbe7b", "9fd06f21740ec571"),
    "lsun_bedrooms_w8a8": ("5c2b622c1d48e9c2", "6d9111b6c3538a6b", "82dea9954aae9b2c"),
    "lsun_churches_w4a6": ("42080936cc9f7d3f", "5b97da82be71dc86", "63b8117005e7b558"),
    "lsun_churches_w4a8": ("e22392a3324a7caf", "5b97da82be71dc86", "16d3475ee5a48619"),
    "lsun_churches_w4a8_paper": ("1f07b0cd1a94e8d6", "b9880a0a022dd5c3", "f99758d8032cc41e"),
    "lsun_churches_w8a8": ("b4584c3839c626b5", "5b97da82be71dc86", "40b956b1ac13af5a"),
    "pixart_sigma_w4a6": ("fab1c9c937a4b023", "445b14a0e721d055", "329b63d8f6444f5d"),
    "pixart_sigma_w4a8": ("d717aa506af62232", "445b14a0e721d055", "91e7c6345caf07f8"),
    "pixart_sigma_w8a8": ("7b81649e60b3fd97", "445b14a0e721d055", "699476dcbd1bde15"),
    "sd14_w4a6": ("2b94c4546ca67f98", "24fbaa61ab6c7b7d", "b4deb7469724d6e8"),
    "sd14_w4a8": ("3688683c0a03ea33", "24fbaa61ab6c7b7d", "7e79d1edbb61c787"),
    "sd14_w4a8_paper": ("47c2259a36b06e91", "4c1e3a4e2f6af2d0", "eb206ae48313ff15"),
    "sd14_w8a8": ("cca92f19f368c267", "24fbaa61ab6c7b7d", "04607cd3341c230d"),
    "sd3_w4a6": ("0e3131b42b65cd5c", "c5d5471a9aee6f91", "84ee587da123f6fb"),
    "sd3_w4a8": ("67a719c4d01c1158", "c5d5471a9aee6f91", "7eeb608b45eeaef9"),
    "sd3_w8a8": ("740329e652f1a987", "c5d5471a9aee6f91", "c8f307a50ead0016"),
    "sdxl_w4a6": ("e180df497f868ff1", "fec4611a0c9b055c", "00f6b4eb22f26f4e"),
    "sdxl_w4a8": ("10be7141c8c84f97", "fec4611a0c9b055c", "b4bc16eb6a73e018"),
    "sdxl_w8a8": ("cbd3dc678a6a5b9e", "fec4611a0c9b055c", "4bffa046d1f4901b"),
}


@pytest.mark.parametrize("name", WITH_WIDTHS)
def test_a_name_with_widths_is_the_configuration_that_it_always_was(name):
    config = load_config(name)
    stages = config.stage_digest("calibrate"), config.stage_digest("quantize")
    said = config.model_dump(mode="json", exclude_defaults=True)
    assert (digest_of(said), *stages) == WITH_WIDTHS[name]
    assert load_config(f"{name}.yaml") == config
    assert Wanted(name).folder.name == name


def test_one_configuration_a_model_and_the_published_protocols_are_shipped():
    models = {split_widths(name)[0] for name in WITH_WIDTHS}
    assert set(shipped_configs()) == models
    assert len([name for name in models if not name.endswith("_paper")]) == 14


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_a_name_without_widths_is_w4a8(name):
    config = load_config(name)
    assert (config.quantization.weights.bits, config.quantization.activations.bits) == (4, 8)
    assert config.quantization.preset == ("qncd" if name.endswith("_paper") else "best")
    assert Wanted(name).folder.name == f"{name}_w4a8"
    assert Wanted(name).config() == load_config(f"{name}_w4a8")


@pytest.mark.parametrize(
    ("name", "bits"),
    [("fashion_dit_w3a8", (3, 8)), ("dit_xl_w4a4", (4, 4)), ("sd3_w32a6", (32, 6))],
)
def test_any_widths_may_stand_in_a_name(name, bits):
    quantization = load_config(name).quantization
    assert (quantization.weights.bits, quantization.activations.bits) == bits


@pytest.mark.parametrize("name", ["ldm4_w8a8_paper", "ldm4_paper_w8a8"])
def test_widths_stand_before_or_behind_what_follows_the_model(name):
    assert load_config(name) == load_config("ldm4_paper", ["quantization.weights.bits=8"])


def test_overrides_win_over_the_name():
    assert load_config("sdxl_w4a6", ["quantization.weights.bits=8"]).quantization.weights.bits == 8


@pytest.mark.parametrize("ending", ["", ".yaml", ".yml"])
def test_shipped_configurations_are_found_with_and_without_an_ending(ending):
    assert find_config(f"ldm4_w4a8{ending}").path == shipped_configs()["ldm4"]
    assert find_config(f"ldm4{ending}").path == shipped_configs()["ldm4"]


@pytest.mark.parametrize("name", ["ldm4_w4a8.yaml", "ldm4.yaml"])
def test_a_file_wins_over_a_shipped_name(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text("model: {source: mine}\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(name).model.source == "mine"
    assert Wanted(name).folder.name == name.removesuffix(".yaml")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ldm4_w4a88.yaml", "ldm4_w4a8.yaml"),
        ("fashon_ldm", "fashion_ldm.yaml"),
        ("fashon_ldm_w4a6", "fashion_ldm_w4a6.yaml"),
        ("sd14_w4a8_papr", "sd14_w4a8_paper.yaml"),
        ("configs/sd3_w4a6.yaml", "sd3_w4a6.yaml"),
    ],
)
def test_an_unknown_name_gets_the_nearest_shipped_one(name, meant):
    with pytest.raises(ConfigError) as caught:
        find_config(name)
    assert str(caught.value) == f"no configuration {name} (did you mean {meant}?)"


def test_a_name_like_no_other_gets_one_short_line():
    with pytest.raises(ConfigError, match="qncd models lists those that are shipped") as caught:
        find_config("qqqq")
    assert len(str(caught.value)) < 150


def test_a_missing_path_is_not_taken_for_a_shipped_name(tmp_path):
    with pytest.raises(ConfigError, match="no configuration"):
        find_config(str(tmp_path / "ldm4_w4a8.yaml"))
