"""A tiny random model of the packaged model's kind, and the command line run in a folder."""

from __future__ import annotations

import atexit
import functools
import getpass
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import nn

from qncd_cli.models import zoo
from qncd_cli.store import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")
COMPILER_CACHE = f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"  # as torch has it
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", COMPILER_CACHE)
if "QNCD_CACHE" not in os.environ:  # what tests keep is not the user's
    os.environ["QNCD_CACHE"] = tempfile.mkdtemp(prefix="qncd-test-cache-")
    atexit.register(shutil.rmtree, os.environ["QNCD_CACHE"], ignore_errors=True)
partial.EVERY = 20.0  # how many files a stage writes shall not depend on how busy the machine is
torch.set_num_threads(1)  # the model is tiny: more threads only wait for each other


def save_tiny_pipeline(folder: Path, seed: int = 0, **unet_options) -> None:
    """A class-conditional latent diffusion pipeline with about 0.3 M random parameters."""
    from diffusers import UNet2DConditionModel

    from qncd_cli.models.pipelines import ClassConditionalLDMPipeline, ClassEmbedder

    torch.manual_seed(seed)
    options = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    unet = UNet2DConditionModel(**{**options, **unet_options})
    vqvae, scheduler = tiny_vqvae(), ddim_scheduler()
    ClassConditionalLDMPipeline(unet, vqvae, ClassEmbedder(4, 16), scheduler).save_pretrained(
        folder
    )


SHALLOW: dict[str, Any] = {
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}
"""Options of a U-Net with one level: a third of the layers, where every layer costs compiling or
thousands of calls and it is the command that is tested."""
LEAST: dict[str, Any] = {**SHALLOW, "mid_block_type": None}
"""The same without the middle, and so without attention."""


def tiny_vqvae() -> nn.Module:
    """A first stage with random weights: latents [3, n, n], images [1, 2n, 2n]."""
    from diffusers import VQModel

    return VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=3,
        num_vq_embeddings=64,
        norm_num_groups=4,
        scaling_factor=1.0,
    )


def ddim_scheduler(**options) -> Any:
    """LDM's schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **options,
    )


def save_tiny_pixel_pipeline(folder: Path) -> None:
    """Pixel-space diffusion with scale-shift blocks and 4 classes, the layout of fashion-ddpm."""
    from diffusers import UNet2DModel

    from qncd_cli.models.pipelines import ClassConditionalPixelPipeline

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=5,  # the last is the null class
        attention_head_dim=8,
        norm_num_groups=4,
    )
    ClassConditionalPixelPipeline(unet, ddim_scheduler()).save_pretrained(folder)


def save_tiny_dit_pipeline(folder: Path, layers: int = 2) -> None:
    """A v-predicting diffusion transformer in latents with 4 classes, the layout of fashion-dit."""
    from diffusers import DiTTransformer2DModel

    from qncd_cli.models.pipelines import ClassConditionalDiTPipeline

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        sample_size=8,
        patch_size=1,
        num_embeds_ada_norm=4,
    )
    scheduler = ddim_scheduler(prediction_type="v_prediction")
    ClassConditionalDiTPipeline(transformer, tiny_vqvae(), scheduler).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pixel_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "pixel"
    save_tiny_pixel_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dit_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "dit"
    save_tiny_dit_pipeline(folder)
    return folder


def tiny_config(model: Path | str, **changes) -> dict:
    """A configuration tree for the tiny model; changes are dotted keys with __ for the dot."""
    tree: dict = {
        "model": {"source": str(model)},
        "sampling": {"steps": 4, "guidance_scale": 2.0},
        "calibration": {"trajectories": 6, "batch_size": 3, "noise_trajectories": 3},
        "quantization": {
            "preset": None,
            "weights": {"bits": 4, "rounding": "gptq"},
            "activations": {"bits": 8, "observer": "mse"},
        },
        "correction": {"intra": "embedding", "inter": {"method": "ptqd"}},
        "evaluation": {"num_samples": 4},
    }
    for key, value in changes.items():
        node = tree
        *parents, last = key.split("__")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


@contextmanager
def packaged(model: Path, domain: str = "fashion") -> Iterator[str]:
    """The source by which the model is a packaged one, which the domain's features may judge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "zoo_models", lambda: {f"{domain}-tiny": model})
        yield f"zoo:{domain}-tiny"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: processes that share the files then end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@functools.cache
def measure_rates_once() -> None:
    """Let every forecast of this process make seconds of the same rates of this machine."""
    from qncd_cli.forecast import plan, work

    work.RATE_SECONDS = 0.0
    plan.measured_rates = functools.cache(work.measured_rates)


class Qncd:
    """Runs the command line in one folder; results have exit_code, stdout, stderr and data."""

    def __init__(self, folder: Path):
        measure_rates_once()
        self.folder = folder

    def write_config(self, tree: dict, name: str = "tiny.yaml") -> None:
        (self.folder / name).write_text(yaml.safe_dump(tree))

    def __call__(self, *arguments: str, ok: bool = True) -> SimpleNamespace:
        from qncd_cli.cli.main import cli

        before = Path.cwd()
        os.chdir(self.folder)
        try:
            result = CliRunner().invoke(cli, [str(a) for a in arguments])
        finally:
            os.chdir(before)
        if ok:
            assert result.exit_code == 0, (result.stdout, result.stderr, result.exception)
        data = json.loads(result.stdout) if ok and "--json" in arguments else None
        return SimpleNamespace(
            exit_code=result.exit_code, stdout=result.stdout, stderr=result.stderr, data=data
        )


@pytest.fixture
def one_minute(monkeypatch) -> None:
    """The clock of reports stands still: they say the minute, and are compared byte for byte."""
    now = time.strftime("%Y-%m-%d %H:%M")
    monkeypatch.setattr(time, "strftime", lambda form, *at: now)


@pytest.fixture
def qncd(tmp_path, tiny_model) -> Qncd:
    """The command line in an empty folder with tiny.yaml."""
    runner = Qncd(tmp_path)
    runner.write_config(tiny_config(tiny_model))
    return runner


@pytest.fixture(scope="session")
def sampled(tmp_path_factory, tiny_model) -> Path:
    """A folder in which the tiny model is calibrated, quantized, sampled. Copy before changing."""
    return sampled_in(tmp_path_factory.mktemp("sampled"), tiny_model)


@pytest.fixture(scope="session")
def sampled_shallow(tmp_path_factory) -> Path:
    """The same as `sampled`, of a model with one level."""
    folder = tmp_path_factory.mktemp("shallow")
    save_tiny_pipeline(folder / "model", **SHALLOW)
    return sampled_in(folder / "work", folder / "model")


def sampled_in(folder: Path, model: Path) -> Path:
    """The folder, in which the model's first three stages have run."""
    folder.mkdir(exist_ok=True)
    runner = Qncd(folder)
    runner.write_config(tiny_config(model))
    runner("calibrate", "--config", "tiny.yaml")
    runner("quantize")
    runner("sample", "--num", "6", "--batch-size", "4")
    return folder


# ---- configurations -----------------------------------------------------------------------------

MODEL = {"model": {"source": "zoo:fashion-ldm"}}


@pytest.fixture
def minimal(tmp_path) -> str:
    """A configuration file that says no more than it must."""
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MODEL))
    return str(path)


def refused(minimal: str, *overrides: str) -> str:
    """The one line that the configuration is refused with."""
    from qncd_cli.config.loading import load_config
    from qncd_cli.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        load_config(minimal, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder for all processes of a session."""
    base = tmp_path_factory.getbasetemp()
    return base if "PYTEST_XDIST_WORKER" not in os.environ else base.parent


@pytest.fixture(scope="session", autouse=True)
def _own_key(shared_folder) -> Iterator[None]:
    """The user's key for compiled code is the session's, and nobody's own is touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(shared_folder / "data"))
        yield


@pytest.fixture(scope="session")
def operators(shared_folder):
    """torch.ops.qncd with the operators of graphs, compiled once for all processes of a session."""
    import fcntl

    from qncd_cli.backends import int8
    from qncd_cli.backends.compiled import graph, native
    from qncd_cli.store import own_code

    if why := int8.why_unavailable(torch.device("cpu")) or graph.why_unavailable():
        pytest.skip(why)
    with (shared_folder / "operators.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other process waits for what this one compiles
        native.load(shared_folder / "operators")
        library = native._path(shared_folder / "operators")
        if not own_code.is_sealed(library):  # a test before has loaded them from elsewhere
            own_code.seal(library, native._compile())
    return torch.ops.qncd


def rewrite_latents(folder: Path, **tensors: Any) -> None:
    """Latents of a set with other tensors, and without the digests of them and of its images: a set
    of a version that had none, whose images a test may exchange."""
    from qncd_cli.lineage.sample_sets import CONTENT, MANIFEST
    from qncd_cli.store import artifacts
    from qncd_cli.store.files import write_json

    path = folder / "latents.safetensors"
    found = artifacts.read(path, "latents")
    body = {key: value for key, value in found.body.items() if key != "pixels"}
    kept = {**found.tensors, **tensors}
    artifacts.write(path, artifacts.Artifact("latents", kept, body, found.config, found.model))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop(CONTENT, None)
    write_json(folder / MANIFEST, manifest)
