"""Reading sets of images from disk, and the reference that samples are compared with.

A reference holds images, or what is left of them: features, or mean and covariance of features.
"""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from ..errors import ArtifactError
from .networks import CLASSIFIER, FeatureNetwork, first_line

ZOO = "zoo"
ZOO_REFERENCE = CLASSIFIER.with_name("reference.safetensors")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Pillow would clip these to 8 bits when it converts them to RGB
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "F")
REFERENCE_HINT = (
    "give a folder of images, an .npz of ADM's evaluator, a statistics file (mu and sigma) or zoo"
)

Statistics = dict[str, np.ndarray]  # mu [D] and sigma [D, D], float64


@dataclass(frozen=True, eq=False)
class Reference:
    """What samples are compared with; at least one of the last three is there.

    source: where it comes from, for messages and records; images: uint8 [N, 3, H, W];
    statistics: mean and covariance of the features; features: [N, D] float32.
    """

    source: str
    images: Tensor | None = None
    statistics: Statistics | None = None
    features: Tensor | None = None

    @property
    def num_samples(self) -> int | None:
        """How many images it holds; None when only their statistics are left."""
        held = self.images if self.images is not None else self.features
        return None if held is None else len(held)

    def fitted(self, feature_size: int) -> Reference:
        """Without stored statistics and features of another width than the network's."""
        statistics, features = self.statistics, self.features
        if statistics is not None and statistics["mu"].size != feature_size:
            statistics = None
        if features is not None and features.shape[1] != feature_size:
            features = None
        return replace(self, statistics=statistics, features=features)

    def check(self, metrics: Collection[str], network: FeatureNetwork) -> None:
        """Raises ArtifactError that lists every metric whose needs are not met."""
        lacks = {
            "fid": "mean and covariance" if self.statistics is None else "",
            "kid": "features" if self.features is None else "",
            "prc": "features" if self.features is None else "",
        }
        missing = [
            f"{name} needs {lack}" for name, lack in lacks.items() if name in metrics and lack
        ]
        if missing:
            raise ArtifactError(
                f"reference {self.source}: {', '.join(missing)} of {network.name} "
                f"({network.feature_size} numbers an image), which it does not hold",
                "give a folder of images or an .npz with arr_0, or leave the metric out",
            )


def load_images(folder: Path) -> Tensor:
    """Every image of a folder, sorted by file name -> uint8 [N, 3, H, W].

    Reads IMAGE_SUFFIXES, no sub-folders.
    Raises ArtifactError if the folder is missing or holds no images, and what read_images raises.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder of images", "check the path")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise ArtifactError(f"{folder}: no images in this folder", f"it reads {suffixes}")
    return read_images(paths)


def read_images(paths: Sequence[Path]) -> Tensor:
    """Images in the order of their paths -> uint8 [N, 3, H, W]; at least one.

    Grey becomes RGB, transparency is dropped. Raises ArtifactError, with the file's name, if an
    image is damaged, deeper than 8 bits, or of another size than the first.
    """
    first = _read_image(paths[0])
    images = torch.empty((len(paths), *first.shape), dtype=torch.uint8)
    for index, path in enumerate(paths):
        image = first if index == 0 else _read_image(path)
        if image.shape != first.shape:
            raise ArtifactError(
                f"{path}: {_size(image)} pixels, but {paths[0].name} has {_size(first)}",
                "all images of a set must have one size: resize this one or move it away",
            )
        images[index] = image
    return images


def load_reference(spec: str | Path | Tensor, zoo: Path = ZOO_REFERENCE) -> Reference:
    """A reference from the word zoo, a folder, an .npz or .safetensors file, or a tensor of images.

    spec: "zoo" is the packaged statistics (the file `zoo`); files hold any of `arr_0` (uint8
    [N, H, W, C] images, .npz only), `mu` [D] with `sigma` [D, D], `features` [N, D].
    Raises ArtifactError if it is missing, damaged, or holds none of these.
    """
    if isinstance(spec, Tensor):
        return Reference("images", images=spec)
    path = zoo if str(spec) == ZOO else Path(spec)
    if path.is_dir():
        return Reference(str(spec), images=load_images(path))
    if not path.is_file():
        hint = "reinstall qncd" if path == zoo else REFERENCE_HINT
        raise ArtifactError(f"{path}: no such reference", hint)
    arrays = _read_arrays(path)
    return Reference(
        str(spec),
        images=_to_images(path, arrays),
        statistics=_to_statistics(path, arrays),
        features=_to_features(path, arrays),
    )


def _read_image(path: Path) -> Tensor:
    """-> uint8 [3, H, W]."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ArtifactError(
            f"{path}: not a readable image: {first_line(error)}", "make it again or move it away"
        ) from error
    if mode in DEEP_MODES:
        raise ArtifactError(f"{path}: more than 8 bits a channel ({mode})", "convert it to 8 bits")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"


def _read_arrays(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays of a reference file that have a meaning here, by name."""
    known = ("arr_0", "mu", "sigma", "features")
    try:
        if path.suffix == ".safetensors":
            stored = safetensors.numpy.load_file(path)
            found = {name: stored[name] for name in known if name in stored}
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                found = {name: archive[name] for name in known if name in archive}
        else:
            raise ArtifactError(f"{path}: not a kind of reference file", REFERENCE_HINT)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise ArtifactError(f"{path}: damaged: {first_line(error)}", REFERENCE_HINT) from error
    if not found or ("mu" in found) != ("sigma" in found):
        raise ArtifactError(
            f"{path}: holds {', '.join(found) or 'nothing'} of {', '.join(known)}", REFERENCE_HINT
        )
    return found


def _to_images(path: Path, arrays: Mapping[str, np.ndarray]) -> Tensor | None:
    if "arr_0" not in arrays:
        return None
    pixels = arrays["arr_0"]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise ArtifactError(f"{path}: arr_0 is {found}, not uint8 [N, H, W, 3]", REFERENCE_HINT)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)  # [N, H, W, C] -> [N, C, H, W]


def _to_statistics(path: Path, arrays: Mapping[str, np.ndarray]) -> Statistics | None:
    if "mu" not in arrays:
        return None
    mu, sigma = (np.asarray(arrays[name], dtype=np.float64) for name in ("mu", "sigma"))
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        shapes = f"mu {list(mu.shape)}, sigma {list(sigma.shape)}"
        raise ArtifactError(f"{path}: {shapes}, expected [D] and [D, D]", REFERENCE_HINT)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ArtifactError(f"{path}: mu or sigma is not finite", "compute the statistics again")
    return {"mu": mu, "sigma": sigma}


def _to_features(path: Path, arrays: Mapping[str, np.ndarray]) -> Tensor | None:
    if "features" not in arrays:
        return None
    features = torch.from_numpy(arrays["features"].astype(np.float32))
    if features.dim() != 2 or not features.isfinite().all():
        shape = list(features.shape)
        raise ArtifactError(f"{path}: features {shape} are not finite [N, D]", REFERENCE_HINT)
    return features
