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
    "cifar10_w4a6": ("cfd519c6fa05f99e", "b0fa7ccd8a188a9e", "00d431b090d5f33c"),
    "cifar10_w4a8": ("aa83f2f67ed7d272", "b0fa7ccd8a188a9e", "65ef1a74bb5d6a1f"),
    "cifar10_w4a8_paper": ("842db3dc398e0dd1", "e7d3ab582dc3d314", "aa24c05adb7b3407"),
    "cifar10_w8a8": ("c2f6cc32a9bb1e6b", "b0fa7ccd8a188a9e", "33112d896100a96c"),
    "dit_xl_w4a6": ("1e9ebdfa5d8b9f74", "32670266ce510ec0", "fbd7da9613c3855b"),
    "dit_xl_w4a8": ("40a921db9013e313", "32670266ce510ec0", "8ebc3af9fdb7471b"),
    "dit_xl_w8a8": ("03f59d387c4864cc", "32670266ce510ec0", "7220cd6bff8a67ce"),
    "emoji_ldm_w4a4": ("3e381e4a0a05088d", "ace212ed90a53ed0", "b79687204b196036"),
    "emoji_ldm_w4a6": ("b0c95b9dd74b37c7", "ace212ed90a53ed0", "95017625bd7e7876"),
    "emoji_ldm_w4a8": ("a040d35a1fcf7cd0", "ace212ed90a53ed0", "ca7368c7a65c8f77"),
    "emoji_ldm_w8a8": ("a2e2ad477bd3cf90", "ace212ed90a53ed0", "6f1ed531ebf89cd8"),
    "fashion_ddpm_w4a4": ("450028aacac2147b", "e09e9c161a5181c5", "929686e60587477e"),
    "fashion_ddpm_w4a6": ("10b46adddb022225", "e09e9c161a5181c5", "c5b6ecf9c72a6c71"),
    "fashion_ddpm_w4a8": ("5c2b8a363cf48551", "e09e9c161a5181c5", "5418371f3bf268c7"),
    "fashion_ddpm_w8a8": ("eafddf6588e79d14", "e09e9c161a5181c5", "e3f20b2455edfb51"),
    "fashion_dit_w4a4": ("4d81ecb46ce2ac9f", "d065c36825b7dbf4", "a1f4065b06cac90f"),
    "fashion_dit_w4a6": ("53e6b272668f48cd", "d065c36825b7dbf4", "46f4dfc32c99fac0"),
    "fashion_dit_w4a8": ("fbaae4740e014bab", "d065c36825b7dbf4", "719cd1e2f5b6f049"),
    "fashion_dit_w8a8": ("e93a60407802384e", "d065c36825b7dbf4", "4bcda920bc363833"),
    "fashion_ldm_w4a4": ("419a470843b71f60", "a94334d5c6727d71", "77ab8fcd3d054af9"),
    "fashion_ldm_w4a6": ("1097f0ce37643ef5", "a94334d5c6727d71", "e6f131b185421692"),
    "fashion_ldm_w4a8": ("bd7481a1d1daa956", "a94334d5c6727d71", "84a2f4a139787dd9"),
    "fashion_ldm_w8a8": ("80b79b252597b3a7", "a94334d5c6727d71", "6c40ad238b6b9770"),
    "flux_dev_w4a6": ("8a17b7c1c92eaa6e", "d01d6dc937fa917b", "550035dd19868493"),
    "flux_dev_w4a8": ("eb047d3118e94d11", "d01d6dc937fa917b", "e2e159c528132104"),
    "flux_dev_w8a8": ("6430504714d591bf", "d01d6dc937fa917b", "d3c0583cab12b3dd"),
    "ldm4_w4a6": ("f4bd8acec2f46c54", "a90df8a4b141ab5f", "f670ce38cace98d6"),
    "ldm4_w4a8": ("0490a41ba0b30737", "a90df8a4b141ab5f", "b9aa9876bdfe382c"),
    "ldm4_w4a8_paper": ("e8446495087132d7", "54ed4723a5bcbd52", "bc4dce3ebd0787ed"),
    "ldm4_w8a8": ("ced486085da027ab", "a90df8a4b141ab5f", "75757823a027f4d6"),
    "lsun_bedrooms_w4a6": ("5798c52f76d0f63e", "47455b11ad39dbc3", "84d20f5e4973c406"),
    "lsun_bedrooms_w4a8": ("1dc6a3a17b89736c", "47455b11ad39dbc3", "cfa9d12998357af4"),
    "lsun_bedrooms_w4a8_paper": ("718822b2d7aca779", "aca6b04f64afbe7b", "9fd06f21740ec571"),
    "lsun_bedrooms_w8a8": ("0d33b8984a16851b", "47455b11ad39dbc3", "40903b3d7c2acf6d"),
    "lsun_churches_w4a6": ("a6005c4029c09d0d", "43e662001014e630", "1f8387bd22449c74"),
    "lsun_churches_w4a8": ("a7beeece79819dea", "43e662001014e630", "cb39fc4b874abd73"),
    "lsun_churches_w4a8_paper": ("9c65b2ec5c56bd4f", "b9880a0a022dd5c3", "f99758d8032cc41e"),
    "lsun_churches_w8a8": ("19bb0ad26cd2ba8b", "43e662001014e630", "38cb70d767c4a3ee"),
    "pixart_sigma_w4a6": ("85eeaa7c853ea609", "7ea90afcfb37fa27", "f5ca36f6277818e6"),
    "pixart_sigma_w4a8": ("28cbb66ee3945ec1", "7ea90afcfb37fa27", "2de8c353929c72bc"),
    "pixart_sigma_w8a8": ("29198f7269b28b2e", "7ea90afcfb37fa27", "1abb30f2a36d6249"),
    "sd14_w4a6": ("809bdfb2d2866618", "2bcdae39a74a4042", "be1cc5ccaeea1889"),
    "sd14_w4a8": ("e454ada818007e05", "2bcdae39a74a4042", "c5e3ccf31ed24297"),
    "sd14_w4a8_paper": ("d08028993843b915", "4c1e3a4e2f6af2d0", "eb206ae48313ff15"),
    "sd14_w8a8": ("917e1b9d3b4d411d", "2bcdae39a74a4042", "657f886b9714a20e"),
    "sd3_w4a6": ("6c6d926cba058855", "bf4e9a6d65777224", "86e97677459f42ce"),
    "sd3_w4a8": ("4d92ad3340de8ff7", "bf4e9a6d65777224", "fc4ec0886f9d22b2"),
    "sd3_w8a8": ("71bbeb350421ba12", "bf4e9a6d65777224", "d24a4314e1a5fe10"),
    "sdxl_w4a6": ("2662c7033e45291b", "0472b46bf99b0ff5", "d77caf8db6c1a97d"),
    "sdxl_w4a8": ("8730ba67f7665384", "0472b46bf99b0ff5", "6982015014c205a6"),
    "sdxl_w8a8": ("6794211b41bd8fa7", "0472b46bf99b0ff5", "7e22a4d8882aa534"),
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
