"""The examples run as they stand there: one folder is quantized, loaded, computed otherwise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import diffusers_pipelines as tiny
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytestmark = pytest.mark.slow


def example(name: str, *arguments: object) -> str:
    """What an example prints. Its errors are the test's."""
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    """A folder with `exported`, made by the first example from a tiny text model."""
    work = tmp_path_factory.mktemp("examples")
    model = tiny.save("StableDiffusionPipeline", work / "model")
    (work / "prompts.txt").write_text("a red shoe\na blue bag\n")
    said = example(
        "quantize_your_folder.py",
        *(model, work / "exported"),
        *("--prompts", work / "prompts.txt", "--run-dir", work / "run"),
        *("--steps", 4, "--trajectories", 4, "--num", 2),
    )
    assert f"load it: python examples/load_in_diffusers.py {work / 'exported'}" in said
    return work


def test_a_folder_is_quantized(quantized):
    assert len(list((quantized / "run" / "samples" / "quantized").glob("*.png"))) == 2
    assert (quantized / "exported" / "model_index.json").is_file()


def test_what_was_exported_draws_the_images_of_qncd_sample(quantized):
    out = quantized / "drawn"
    prompts = ("a red shoe", "a blue bag")  # in turn by seed
    example(
        "load_in_diffusers.py",
        *(quantized / "exported", "--prompt", *prompts),
        *("--steps", 4, "--out", out),
    )
    for name in ("000000.png", "000001.png"):
        drawn, sampled = (
            Image.open(folder / name).convert("RGB").tobytes()
            for folder in (out, quantized / "run" / "samples" / "quantized")
        )
        assert max(abs(a - b) for a, b in zip(drawn, sampled, strict=True)) <= 1


def test_a_custom_backend_agrees_with_the_oracle(quantized):
    said = example("custom_backend.py", quantized / "exported", "--prompt", "a red shoe")
    layers, difference = re.fullmatch(
        r"(\d+) layers; largest relative difference (\S+) \(.+\)", said.strip()
    ).groups()
    assert int(layers) > 20
    assert float(difference) < 1e-5


def test_every_example_has_a_test():
    used = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text()))
    assert {path.name for path in EXAMPLES.glob("*.py")} == used
