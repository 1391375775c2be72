"""Reading sets of images from disk, and the reference that samples are compared with.

A reference holds images, or what is left of them: features, or mean and covariance of features.
"""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from PIL import Image, ImageFile, ImageOps
from safetensors import SafetensorError
from torch import Tensor

from ..errors import ArtifactError
from .image_files import digest_of_files, image_paths
from .networks import CLASSIFIER, FeatureNetwork, first_line

ZOO = "zoo"
ZOO_REFERENCE = CLASSIFIER.with_name("reference.safetensors")
# Pillow would clip these to 8 bits when it converts them to RGB
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
REFERENCE_HINT = (
    "give a folder of images, an .npz of ADM's evaluator, a statistics file (mu and sigma) or zoo"
)

Statistics = dict[str, np.ndarray]  # mu [D] and sigma [D, D], float64


@dataclass(frozen=True, eq=False)
class Reference:
    """What samples are compared with; at least one of the last three is there.

    source: where it comes from, for messages and records; digest: of its files' contents, whatever
    they are called, None for images in memory; images: uint8 [N, 3, H, W]; statistics: mean and
    covariance of the features; features: [N, D] float32.
    """

    source: str
    images: Tensor | None = None
    statistics: Statistics | None = None
    features: Tensor | None = None
    digest: str | None = None

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

    def lacks(self, metrics: Collection[str], network: FeatureNetwork) -> dict[str, str]:
        """Metric -> what it needs and this reference lacks; images meet every need."""
        fitted = self.fitted(network.feature_size)
        if fitted.images is not None or fitted.features is not None:
            return {}
        needs = {"kid": "features", "prc": "features"}
        if fitted.statistics is None:
            needs["fid"] = "mean and covariance"
        return {name: needs[name] for name in sorted(needs) if name in metrics}

    def check(self, metrics: Collection[str], network: FeatureNetwork) -> None:
        """Raises ArtifactError that lists every metric whose needs are not met."""
        missing = [f"{name} needs {need}" for name, need in self.lacks(metrics, network).items()]
        if missing:
            raise ArtifactError(
                f"reference {self.source}: {', '.join(missing)} of {network.name} "
                f"({network.feature_size} numbers an image), which it does not hold",
                "give a folder of images or an .npz with arr_0, or leave the metric out",
            )


def load_images(source: Path) -> Tensor:
    """The images of a folder, or of an .npz in arr_0 -> uint8 [N, 1 or 3, H, W].

    image_files.py says which files of a folder are read, in which order and how. Raises
    ArtifactError if there are none, and what read_images raises.
    """
    if source.suffix != ".npz" or source.is_dir():
        return read_images(image_paths(source))
    if not source.is_file():
        raise ArtifactError(f"{source}: no such file", "check the path")
    images = _to_images(source, _read_arrays(source))
    if images is None or not len(images):
        raise ArtifactError(f"{source}: holds no images", "store them as arr_0, uint8 [N, H, W, 3]")
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
        paths = image_paths(path)
        return Reference(str(spec), images=read_images(paths), digest=digest_of_files(paths))
    if not path.is_file():
        hint = "reinstall qncd" if path == zoo else REFERENCE_HINT
        raise ArtifactError(f"{path}: no such reference", hint)
    arrays = _read_arrays(path)
    return Reference(
        str(spec),
        images=_to_images(path, arrays),
        statistics=_to_statistics(path, arrays),
        features=_to_features(path, arrays),
        digest=digest_of_files([path]),
    )


def read_images(paths: Sequence[Path]) -> Tensor:
    """Images in the order of their paths -> uint8 [N, 3, H, W]; at least one.

    Raises ArtifactError, with the file's name, if an image is damaged, deeper than 8 bits, of
    several frames, or of another size than the first.
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


def _read_image(path: Path) -> Tensor:
    """-> uint8 [3, H, W]."""
    try:
        with Image.open(path) as image:
            deep = image.mode if _deep(image) else ""
            frames = getattr(image, "n_frames", 1)
            photograph = image.format == "MPO"  # a JPEG with previews of itself
            pixels = np.array(_on_white(ImageOps.exif_transpose(image)))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ArtifactError(
            f"{path}: not a readable image: {first_line(error)}", "make it again or move it away"
        ) from error
    if deep:
        raise ArtifactError(f"{path}: more than 8 bits a channel ({deep})", "convert it to 8 bits")
    if frames > 1 and not photograph:
        raise ArtifactError(f"{path}: {frames} frames in one file", "store one image a file")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _deep(image: ImageFile.ImageFile) -> bool:
    """Whether an image has over 8 bits a channel; of colours only the decoder's mode says so."""
    return image.mode in DEEP_MODES or any(_deep_code(*tile) for tile in image.tile)


def _deep_code(codec: str, extents: Any, offset: int, args: Any) -> bool:
    """Whether a decoder of Pillow's reads more than 8 bits a channel; BGR;16 is 5, 6 and 5."""
    values = args if isinstance(args, tuple) else (args,)
    code = str(values[0]) if values else ""
    return (";16" in code and code != "BGR;16") or (codec == "ppm" and max(values[1:]) > 255)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    pixels = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")


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
