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
    "cifar10_w4a6": ("95a767f4225e12d8", "a7a97ac25b63ddb9", "0b4d2db24ea7b8f3"),
    "cifar10_w4a8": ("9b91bfeb6637cf56", "a7a97ac25b63ddb9", "44c9a5843861ab19"),
    "cifar10_w4a8_paper": ("842db3dc398e0dd1", "e7d3ab582dc3d314", "aa24c05adb7b3407"),
    "cifar10_w8a8": ("87db043145358c0d", "a7a97ac25b63ddb9", "12bcb00c72c33f7a"),
    "dit_xl_w4a6": ("f00bb03c0faab809", "d3c14185e7ab50b8", "207b6b0f0b7689f9"),
    "dit_xl_w4a8": ("f8104f189cb6fae6", "d3c14185e7ab50b8", "2fda4a5dc29597bb"),
    "dit_xl_w8a8": ("40f351ea40d9cbde", "d3c14185e7ab50b8", "8c5d71a0c65b0322"),
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
    "flux_dev_w4a6": ("a9f872cf67497211", "eb8dc16ff7eee1de", "7364c1b7b8135504"),
    "flux_dev_w4a8": ("e1f9c61995b661c0", "eb8dc16ff7eee1de", "0581529e0e7d5ab3"),
    "flux_dev_w8a8": ("b7d0a17670ec641b", "eb8dc16ff7eee1de", "30b3e4209533610f"),
    "ldm4_w4a6": ("f4bd8acec2f46c54", "a90df8a4b141ab5f", "f670ce38cace98d6"),
    "ldm4_w4a8": ("0490a41ba0b30737", "a90df8a4b141ab5f", "b9aa9876bdfe382c"),
    "ldm4_w4a8_paper": ("e8446495087132d7", "54ed4723a5bcbd52", "bc4dce3ebd0787ed"),
    "ldm4_w8a8": ("ced486085da027ab", "a90df8a4b141ab5f", "75757823a027f4d6"),
    "lsun_bedrooms_w4a6": ("77ff8eb20a81777e", "be6cf9afcd03a5a6", "642c3d47f29dc00f"),
    "lsun_bedrooms_w4a8": ("e5a8b37faa6aaea8", "be6cf9afcd03a5a6", "f6565732cf204207"),
    "lsun_bedrooms_w4a8_paper": ("718822b2d7aca779", "aca6b04f64afbe7b", "9fd06f21740ec571"),
    "lsun_bedrooms_w8a8": ("847cdbc4dad5b1d0", "be6cf9afcd03a5a6", "8e126eca097320e1"),
    "lsun_churches_w4a6": ("36b606d6fa4c0a50", "4740c3e717ab66d1", "4b6587f498e846b8"),
    "lsun_churches_w4a8": ("a18fd1a625aa55a4", "4740c3e717ab66d1", "e1ca2a6b598e16b8"),
    "lsun_churches_w4a8_paper": ("9c65b2ec5c56bd4f", "b9880a0a022dd5c3", "f99758d8032cc41e"),
    "lsun_churches_w8a8": ("6ffad4bd9831bbc0", "4740c3e717ab66d1", "a57809e6a15ed834"),
    "pixart_sigma_w4a6": ("85eeaa7c853ea609", "7ea90afcfb37fa27", "f5ca36f6277818e6"),
    "pixart_sigma_w4a8": ("28cbb66ee3945ec1", "7ea90afcfb37fa27", "2de8c353929c72bc"),
    "pixart_sigma_w8a8": ("29198f7269b28b2e", "7ea90afcfb37fa27", "1abb30f2a36d6249"),
    "sd14_w4a6": ("368cbd33e366b7f0", "58f63908b7a51240", "7bf6bee216e63fed"),
    "sd14_w4a8": ("46254deaacc136ae", "58f63908b7a51240", "a68d20842d5f667c"),
    "sd14_w4a8_paper": ("d08028993843b915", "4c1e3a4e2f6af2d0", "eb206ae48313ff15"),
    "sd14_w8a8": ("20e9eca8a2995269", "58f63908b7a51240", "afd5e66894361e51"),
    "sd3_w4a6": ("dc455164c09ca042", "4052413dd41c356d", "9b0bbf731353eb21"),
    "sd3_w4a8": ("7e3c0c1111b38f6e", "4052413dd41c356d", "2c746867b4f9b62c"),
    "sd3_w8a8": ("caada8a29c87c5d3", "4052413dd41c356d", "95d4e7614361a100"),
    "sdxl_w4a6": ("494c77e03d999cba", "100562ef479ca882", "41fac505bf07bed9"),
    "sdxl_w4a8": ("0e054a738cd24cd1", "100562ef479ca882", "be0b7a0cdd812ee2"),
    "sdxl_w8a8": ("6cf9f6ba67736b6e", "100562ef479ca882", "ea8ea70d83b566e3"),
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
