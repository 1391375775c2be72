"""A pipeline's text encoders as one module, and the prompts that they are for."""

from __future__ import annotations

from diffusers_pipelines import save

from qncd_cli.models.loading import load_model
from qncd_cli.models.prompt_cache import PromptCache
from qncd_cli.models.text import Prompts
from qncd_cli.models.text_encoders import OtherEncoders, described_encoders

TEXTS = ("a red", "blue", "bag", "shoe", "a")


def test_all_encoders_are_kept_where_they_are_asked_for(tmp_path):
    source = save("StableDiffusion3Pipeline", tmp_path / "model")
    assert load_model(str(source), prompts=Prompts(TEXTS)).text is None
    kept = load_model(str(source), prompts=Prompts(TEXTS), keep_text=True).text
    names = {"text_encoder", "text_encoder_2", "text_encoder_3"}
    assert {name for name, _ in kept.module.named_children()} == names
    described = described_encoders(source, "here")
    shapes = {name: p.shape for name, p in kept.module.named_parameters()}
    assert {name: p.shape for name, p in described.named_parameters()} == shapes
    assert all(p.is_meta for p in described.parameters())
    assert kept.some(9).prompts.texts == TEXTS
    assert kept.some(3).prompts.texts == ("a red", "bag", "a")
    assert kept.some(1).prompts.texts == ("a red",)


def test_encoders_are_kept_beside_prompts_that_were_encoded_before(tmp_path):
    source = save("StableDiffusionPipeline", tmp_path / "model")
    options = {"prompts": Prompts(TEXTS), "cache": PromptCache(tmp_path / "prompts")}
    load_model(str(source), **options)
    assert load_model(str(source), **options).text is None
    assert load_model(str(source), **options, keep_text=True).text.module["text_encoder"]


def test_others_take_the_place_of_a_model_s_own_and_have_files_of_their_own(tmp_path):
    source = save("StableDiffusionPipeline", tmp_path / "model")
    cache, seen = PromptCache(tmp_path / "prompts"), []
    options = {"prompts": Prompts(TEXTS), "cache": cache}
    load_model(str(source), **options)
    others = OtherEncoders("others", lambda module: seen.append([*module]))
    load_model(str(source), **options, encoders=others)
    load_model(str(source), **options, encoders=others)  # from the file
    assert seen == [["text_encoder"]]
    assert len([*cache.folder.iterdir()]) == 2
    paths = {cache.path("m", "float32", Prompts(TEXTS), key) for key in (None, "a", "b")}
    assert len(paths) == 3
