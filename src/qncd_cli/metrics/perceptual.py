"""LPIPS: how far pairs of images are apart in the features of VGG-16.

Source: Zhang et al. 2018 (arXiv 1801.03924), version 0.1 of its weights. The arithmetic is
torch-fidelity's; both files of weights are read without executing anything in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ArtifactError, BackendUnavailable
from ..progress import Track, counted, no_progress
from .image_files import digest_of_files
from .images_on_disk import Images
from .networks import first_line, read_state_dict

VGG_FILE, LINEAR_FILE = "vgg16-397923af.pth", "weights-vgg16-lpips.pth"
"""torchvision's file, and torch-fidelity's of the linear layers, as torch.hub keeps them."""
URLS = (
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
)
TAPS = (3, 8, 15, 22, 29)
"""Layers of VGG-16 whose outputs are compared: the last activation of each size."""
WIDTHS = (64, 128, 256, 512, 512)
"""Their channels."""
LEAST = 16
"""Pixels of a side that leave one pixel for the deepest layer."""
BATCH = 8


@dataclass(frozen=True)
class PerceptualWeights:
    """folder: with both files; sha256: of both together."""

    folder: Path
    sha256: str


def find_weights(folder: Path | None = None) -> PerceptualWeights:
    """The weights in a folder, torch.hub's unless given.

    Raises BackendUnavailable where they are not there, and they are not downloaded.
    """
    place = Path(torch.hub.get_dir()) / "checkpoints" if folder is None else folder
    missing = [name for name in (VGG_FILE, LINEAR_FILE) if not (place / name).is_file()]
    if missing:
        raise BackendUnavailable(
            f"no LPIPS weights in {place}: {', '.join(missing)} missing",
            f"fetch {' and '.join(URLS)} into a folder and name it with --lpips-weights DIR",
        )
    return PerceptualWeights(place, digest_of_files([place / VGG_FILE, place / LINEAR_FILE]))


def lpips_each(
    reference: Images, other: Images, weights: PerceptualWeights, track: Track = no_progress
) -> list[float]:
    """LPIPS of each image to its counterpart, 0 for equal images.

    reference, other: uint8 [N, 1 or 3, H, W], H and W at least LEAST. Raises ArtifactError for
    weights of another network and for smaller images.
    """
    if min(reference.shape[-2:]) < LEAST:
        size = "x".join(map(str, reversed(reference.shape[-2:])))
        raise ArtifactError(f"LPIPS needs images of {LEAST} pixels a side, these have {size}")
    network = _load(weights)
    found: list[float] = []
    pairs = zip(reference.split(BATCH), other.split(BATCH), strict=True)
    what = "comparing images by LPIPS"
    for (a, b), tick in counted(track, pairs, what, len(reference), "images"):
        with torch.no_grad():
            values = network(*(images.expand(-1, 3, -1, -1).float() for images in (a, b)))
        found += values.flatten().tolist()
        for _ in a:
            tick()
    return found


def _load(weights: PerceptualWeights) -> nn.Module:
    from torch_fidelity.sample_similarity_base import SampleSimilarityBase
    from torch_fidelity.sample_similarity_lpips import NetLinLayer, SampleSimilarityLPIPS
    from torchvision.models.vgg import cfgs, make_layers

    class Lpips(SampleSimilarityLPIPS):
        """torch-fidelity's, which would download its weights, made of these."""

        def __init__(self, vgg: nn.Sequential) -> None:
            SampleSimilarityBase.__init__(self, "lpips-vgg16")
            self.sample_similarity_resize = self.sample_similarity_dtype = None
            self.chns, self.L = list(WIDTHS), len(WIDTHS)
            self.lins = [NetLinLayer(width, use_dropout=True) for width in WIDTHS]
            for number, layer in enumerate(self.lins):
                self.add_module(f"lin{number}", layer)
            linear = _state(weights.folder / LINEAR_FILE)
            _fill(self, linear, weights.folder / LINEAR_FILE)
            self.net = _Taps(vgg)

    with torch.random.fork_rng(devices=[]):  # layers are made with random values
        vgg = make_layers(cfgs["D"])
        path = weights.folder / VGG_FILE
        state = {
            name.removeprefix("features."): value
            for name, value in _state(path).items()
            if name.startswith("features.")
        }
        _fill(vgg, state, path)
        return Lpips(vgg).eval()


class _Taps(nn.Module):
    """Images [N, 3, H, W] -> the outputs of VGG-16 at TAPS."""

    def __init__(self, vgg: nn.Sequential) -> None:
        super().__init__()
        self.layers = vgg[: TAPS[-1] + 1]

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        found = []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in TAPS:
                found.append(x.clone())  # the next activation works in place
        return found


def _state(path: Path) -> Mapping[str, Tensor]:
    """A state dict, read without executing anything in the file. Raises ArtifactError."""
    state = read_state_dict(path, "fetch it again")
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ArtifactError(f"{path}: not a PyTorch state dict", "fetch it again")
    return state


def _fill(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ArtifactError(
            f"{path}: not the weights of LPIPS: {first_line(error)}", "fetch it again"
        ) from error
