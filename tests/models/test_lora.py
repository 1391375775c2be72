"""LoRA files in the names that people have, fused into a tiny Stable Diffusion folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Qncd, tiny_config
from diffusers import DiffusionPipeline
from diffusers_pipelines import save
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qncd_cli.config.loading import load_config
from qncd_cli.errors import ConfigError, ModelError
from qncd_cli.models.digest import with_loras
from qncd_cli.models.loading import load_model, open_pipeline
from qncd_cli.models.text import Prompts

PROMPTS = Prompts(("a red shoe", "a blue bag"), "", image_size=None, guidance_scale=2.0)
RANK, ALPHA = 2, 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "sd"
    save("StableDiffusionPipeline", path)
    return path


def chosen(folder: Path, part: str) -> dict[str, Tensor]:
    """Weights of some layers of a part, by the layer's name: linear ones and a convolution."""
    ends = ("to_q", "q_proj", "k_proj", "v_proj", "out_proj", "proj_in", "conv_in")
    module = getattr(DiffusionPipeline.from_pretrained(folder), part)
    layers = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return {name: layer.weight for name, layer in layers.items() if name.endswith(ends)}


def factors(weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every layer."""
    generator, found = torch.Generator().manual_seed(3), {}
    for name, weight in weights.items():
        out, inside, *kernel = weight.shape
        down = 0.3 * torch.randn((RANK, inside, *kernel), generator=generator)
        ones = (1, 1) if kernel else ()
        found[name] = down, 0.3 * torch.randn((out, RANK, *ones), generator=generator)
    return found


def product(down: Tensor, up: Tensor) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


@pytest.fixture(scope="module")
def pairs(folder) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    return {part: factors(chosen(folder, part)) for part in ("unet", "text_encoder")}


def written(path: Path, pairs, naming: str) -> Path:
    """A file of the pairs in PEFT's names, or in kohya's with alpha."""
    tensors = {}
    for part, layers in pairs.items():
        for name, (down, up) in layers.items():
            if naming == "peft":
                tensors[f"{part}.{name}.lora_A.weight"] = down
                tensors[f"{part}.{name}.lora_B.weight"] = up
                continue
            prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part]
            own = name if part == "unet" or name.startswith("text_model") else f"text_model.{name}"
            stem = prefix + own.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = down
            tensors[f"{stem}.lora_up.weight"] = up
            tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def lora(pairs, tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("lora") / "style.safetensors", pairs, "peft")


def fused_folder(folder: Path, pairs, weight: float, out: Path) -> Path:
    """The folder with the products added by hand."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        for part, layers in pairs.items():
            for name, (down, up) in layers.items():
                getattr(pipeline, part).get_submodule(name).weight += weight * product(down, up)
    pipeline.save_pretrained(out)
    return out


@pytest.mark.parametrize(("naming", "scale"), [("peft", 1.0), ("kohya", ALPHA / RANK)])
def test_the_products_are_added_to_the_weights(folder, pairs, tmp_path, naming, scale):
    path = written(tmp_path / "style.safetensors", pairs, naming)
    pipeline, _ = open_pipeline(str(folder), None, loras=(f"{path}:0.5",))
    plain = DiffusionPipeline.from_pretrained(folder)
    for part, layers in pairs.items():
        before, after = getattr(plain, part).state_dict(), getattr(pipeline, part).state_dict()
        assert before.keys() == after.keys()
        for name, value in after.items():
            expected = before[name]
            if (layer := name.removesuffix(".weight")) in layers:
                expected = expected + 0.5 * scale * product(*layers[layer])
                assert not torch.equal(value, before[name])
            assert torch.allclose(value, expected, atol=1e-6), name


def test_several_are_added_one_after_the_other(folder, pairs, lora):
    twice, _ = open_pipeline(str(folder), None, loras=(str(lora), f"{lora}:-1"))
    plain = DiffusionPipeline.from_pretrained(folder)
    for name, value in plain.unet.state_dict().items():
        assert torch.allclose(twice.unet.state_dict()[name], value, atol=1e-6), name


def test_prompts_are_encoded_by_the_fused_text_encoder(folder, pairs, lora, tmp_path):
    by_hand = fused_folder(folder, pairs, 1.0, tmp_path / "fused")
    ours = load_model(str(folder), loras=(str(lora),), prompts=PROMPTS)
    theirs = load_model(str(by_hand), prompts=PROMPTS)
    plain = load_model(str(folder), prompts=PROMPTS)
    labels = torch.tensor([0, 1])
    text = [m.condition(labels)["encoder_hidden_states"] for m in (ours, theirs, plain)]
    assert torch.allclose(text[0], text[1], atol=1e-5)
    assert not torch.allclose(text[0], text[2], atol=1e-2)
    assert len({ours.digest, theirs.digest, plain.digest}) == 3


def test_a_fused_model_quantizes_as_one_that_was_fused_beforehand(folder, pairs, lora, tmp_path):
    runner = Qncd(tmp_path)
    by_hand = tmp_path / "fused"
    pipeline, _ = open_pipeline(str(folder), None, loras=(str(lora),))
    pipeline.save_pretrained(by_hand)
    found = {}
    for name, source, more in (("a", folder, ("--lora", lora)), ("b", by_hand, ())):
        tree = tiny_config(source, sampling__prompts=["a red shoe"], calibration__trajectories=3)
        tree["sampling"]["scheduler"] = "ddim"
        runner.write_config(tree, f"{name}.yaml")
        runner("calibrate", "--config", f"{name}.yaml", "--run-dir", name, *more)
        runner("quantize", "--run-dir", name)
        found[name] = load_file(tmp_path / name / "quantized.safetensors")
    assert found["a"].keys() == found["b"].keys()
    assert all(torch.equal(found["a"][key], found["b"][key]) for key in found["a"])
    again = runner("calibrate", "--config", "a.yaml", "--run-dir", "a", "--lora", f"{lora}:0.5")
    assert "skipped" not in again.stdout and "model.lora" in again.stderr
    drawn = runner("sample", "--run-dir", "b", "--num", "2", "--json").data
    assert drawn["images"] == 2


def renamed(pairs, change):
    return {part: {change(n): ab for n, ab in layers.items()} for part, layers in pairs.items()}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("other layers", "layers are not in|does not fit"),
        ("other sizes", "does not fit"),
        ("DoRA", "is a DoRA, not a LoRA"),
        ("no LoRA", "is no LoRA"),
        ("damaged", "cannot be read"),
        ("missing", "cannot be read"),
        ("pickle", "not a .safetensors file"),
        ("not finite", "is not finite"),
    ],
)
def test_what_does_not_fit_is_refused(folder, pairs, tmp_path, what, message):
    path = tmp_path / "bad.safetensors"
    if what == "other layers":
        written(path, renamed(pairs, lambda name: name.replace("to_q", "to_other")), "peft")
    elif what == "other sizes":
        cut = {n: (down[:, :-1].contiguous(), up) for n, (down, up) in pairs["unet"].items()}
        written(path, {"unet": cut}, "peft")
    elif what == "DoRA":
        save_file({"unet.a.lora_A.weight": torch.ones(1), "unet.a.dora_scale": torch.ones(1)}, path)
    elif what == "no LoRA":
        save_file({"model.weight": torch.ones(2)}, path)
    elif what == "damaged":
        path.write_bytes(b"not one")
    elif what == "pickle":
        path = tmp_path / "bad.pt"
        torch.save({}, path)
    elif what == "not finite":
        layers = {n: (down * torch.inf, up) for n, (down, up) in pairs["unet"].items()}
        written(path, {"unet": layers}, "peft")
    with pytest.raises(ModelError, match=message):
        load_model(str(folder), loras=(str(path),), prompts=PROMPTS)


def test_a_pipeline_that_takes_none_says_so(tmp_path, lora):
    folder = save("DDIMPipeline", tmp_path / "model")
    with pytest.raises(ModelError, match="DDIMPipeline takes no LoRA"):
        load_model(str(folder), loras=(str(lora),))


def test_the_digest_is_that_of_file_and_weight(lora, tmp_path):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(lora.read_bytes())
    assert with_loras("m", ()) == "m"
    assert with_loras("m", (str(lora),)) == with_loras("m", (f"{moved}:1.0",))
    found = {with_loras("m", loras) for loras in ((str(lora),), (f"{lora}:0.5",), (str(lora),) * 2)}
    assert len(found) == 3


def test_a_weight_that_is_none_is_a_line(folder, qncd, lora):
    failed = qncd("calibrate", "--config", "tiny.yaml", "--lora", f"{lora}:strong", ok=False)
    assert failed.exit_code == ConfigError.exit_code
    assert "FILE or FILE:WEIGHT" in failed.stderr
    failed = qncd("calibrate", "--config", "tiny.yaml", "--lora", "gone.safetensors", ok=False)
    assert failed.exit_code == ModelError.exit_code
    assert "gone.safetensors" in failed.stderr


def test_one_file_in_a_configuration_is_found_beside_it(lora, tmp_path):
    (tmp_path / "style.safetensors").write_bytes(lora.read_bytes())
    path = tmp_path / "own.yaml"
    path.write_text("model: {source: zoo:fashion-ldm, lora: style.safetensors:0.5}\n")
    assert load_config(str(path)).model.lora == (f"{tmp_path}/style.safetensors:0.5",)
