"""Reading sets of images from disk, and the reference that samples are compared with.

A reference holds images, or what is left of them: features, or mean and covariance of features.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from ..errors import ArtifactError
from ..store.regular import open_regular
from .array_files import REFERENCE_HINT, read_arrays
from .frechet import Statistics
from .image_files import digest_of_files, image_paths
from .networks import CLASSIFIER, FeatureNetwork, first_line

ZOO = "zoo"
ZOO_REFERENCE = CLASSIFIER.with_name("reference.safetensors")
LARGEST = 1 << 26
"""Pixels from which on an image is refused before it is decoded: 8192 x 8192."""
TOLD = 3
"""Broken files that are named at once."""
# Pillow would clip these to 8 bits when it converts them to RGB
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True, eq=False)
class Reference:
    """What samples are compared with; at least one of the last three is there.

    source: where it comes from, for messages and records; digest: of its files' contents, whatever
    they are called, None for images in memory; images: uint8 [N, 3, H, W]; names: of the images,
    None where only their order tells them apart; statistics: mean and covariance of the features,
    spatial of those of sFID; features: [N, D] float32; skipped: broken files that were left out.
    """

    source: str
    images: Tensor | None = None
    statistics: Statistics | None = None
    features: Tensor | None = None
    spatial: Statistics | None = None
    names: tuple[str, ...] | None = None
    digest: str | None = None
    skipped: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int | None:
        """How many images it holds; None when only their statistics are left."""
        held = self.images if self.images is not None else self.features
        return None if held is None else len(held)

    def fitted(self, network: FeatureNetwork) -> Reference:
        """Without stored statistics and features of another width than the network's."""
        statistics, features, spatial = self.statistics, self.features, self.spatial
        if statistics is not None and statistics["mu"].size != network.feature_size:
            statistics = None
        if features is not None and features.shape[1] != network.feature_size:
            features = None
        if spatial is not None and spatial["mu"].size != network.spatial_size:
            spatial = None
        return replace(self, statistics=statistics, features=features, spatial=spatial)

    def lacks(self, metrics: Collection[str], network: FeatureNetwork) -> dict[str, str]:
        """Metric -> what it needs and this reference lacks; images meet every need."""
        fitted = self.fitted(network)
        if fitted.images is not None:
            return {}
        needs = {} if fitted.features is not None else {"kid": "features", "prc": "features"}
        if fitted.features is None and fitted.statistics is None:
            needs["fid"] = needs["fid_infinity"] = "mean and covariance"
        if fitted.spatial is None:
            needs["sfid"] = "mean and covariance of spatial features (mu_s, sigma_s)"
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


def load_images(source: Path, skipped: list[Path] | None = None) -> Tensor:
    """The images of a folder, or of an .npz in arr_0 -> uint8 [N, 1 or 3, H, W].

    image_files.py says which files of a folder are read, in which order and how; skipped: as in
    read_images. Raises ArtifactError if there are none, and what read_images raises.
    """
    if source.suffix != ".npz" or source.is_dir():
        return read_images(image_paths(source), skipped)
    if not source.is_file():
        raise ArtifactError(f"{source}: no such file", "check the path")
    images = _to_images(source, read_arrays(source))
    if images is None or not len(images):
        raise ArtifactError(f"{source}: holds no images", "store them as arr_0, uint8 [N, H, W, 3]")
    return images


def load_reference(
    spec: str | Path | Tensor, zoo: Path = ZOO_REFERENCE, *, skip_broken: bool = False
) -> Reference:
    """A reference from the word zoo, a folder, an .npz or .safetensors file, or a tensor of images.

    spec: "zoo" is the packaged statistics (the file `zoo`); files hold any of `arr_0` (uint8
    [N, H, W, C] images, .npz only), `mu` [D] with `sigma` [D, D], `mu_s` with `sigma_s` likewise,
    `features` [N, D], which clean-fid calls `feats`. skip_broken: whether files of a folder that
    cannot be read are left out.
    Raises ArtifactError if it is missing, damaged, or holds none of these.
    """
    if isinstance(spec, Tensor):
        return Reference("images", images=spec)
    path = zoo if str(spec) == ZOO else Path(spec)
    if path.is_dir():
        broken: list[Path] = []
        paths = image_paths(path)
        images = read_images(paths, broken if skip_broken else None)
        read = [p for p in paths if p not in {*broken}]
        return Reference(
            str(spec),
            images=images,
            names=tuple(map(str, read)),
            digest=digest_of_files(read),
            skipped=tuple(str(p.relative_to(path)) for p in broken),
        )
    if not path.is_file():
        hint = "reinstall qncd" if path == zoo else REFERENCE_HINT
        raise ArtifactError(f"{path}: no such reference", hint)
    arrays = read_arrays(path)
    return Reference(
        str(spec),
        images=_to_images(path, arrays),
        statistics=_to_statistics(path, arrays),
        spatial=_to_statistics(path, arrays, "_s"),
        features=_to_features(path, arrays),
        digest=digest_of_files([path]),
    )


def read_images(paths: Sequence[Path], skipped: list[Path] | None = None) -> Tensor:
    """Images in the order of their paths -> uint8 [N, 3, H, W]; at least one.

    skipped: receives files that cannot be read, which are left out then. Raises ArtifactError, with
    the names of the files, if images are damaged, deeper than 8 bits, or of several frames, and for
    one of another size than the first.
    """
    images, first, broken = torch.empty(0), None, []
    count = 0
    for path in paths:
        try:
            image = _read_image(path)
        except ArtifactError as error:
            broken.append((path, error))
            continue
        if first is None:
            first = path
            images = torch.empty((len(paths), *image.shape), dtype=torch.uint8)
        elif image.shape != images.shape[1:]:
            raise ArtifactError(
                f"{path}: {_size(image)} pixels, but {first.name} has {_size(images)}",
                "all images of a set must have one size: resize this one or move it away",
            )
        images[count] = image
        count += 1
    if broken and (skipped is None or first is None):
        raise _broken(broken, len(paths))
    if skipped is not None:
        skipped += [path for path, _ in broken]
    return images[:count]


def _broken(broken: Sequence[tuple[Path, ArtifactError]], count: int) -> ArtifactError:
    path, error = broken[0]
    if len(broken) == 1:
        return error
    names = ", ".join(other.name for other, _ in broken[:TOLD])
    more = f" and {len(broken) - TOLD} more" if len(broken) > TOLD else ""
    return ArtifactError(
        f"{len(broken)} of {count} images cannot be read: {names}{more} (first: {error.message})",
        error.hint,
    )


def _read_image(path: Path) -> Tensor:
    """-> uint8 [3, H, W]."""
    try:
        with _unwarned(), open_regular(path) as file, Image.open(file) as image:
            if image.width * image.height > LARGEST:
                said = f"{image.width}x{image.height} pixels, more than {LARGEST}"
                raise ArtifactError(f"{path}: {said}", "make it smaller or move it away")
            deep = image.mode if _deep(image) else ""
            frames = getattr(image, "n_frames", 1)
            photograph = image.format == "MPO"  # a JPEG with previews of itself
            pixels = np.array(_on_white(ImageOps.exif_transpose(image)))
    except (
        *(OSError, SyntaxError, ValueError, TypeError, IndexError, OverflowError, struct.error),
        *(Image.DecompressionBombError, zlib.error),
    ) as error:
        raise ArtifactError(
            f"{path}: not a readable image: {first_line(error)}", "make it again or move it away"
        ) from error
    if deep:
        raise ArtifactError(f"{path}: more than 8 bits a channel ({deep})", "convert it to 8 bits")
    if frames > 1 and not photograph:
        raise ArtifactError(f"{path}: {frames} frames in one file", "store one image a file")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _unwarned() -> warnings.catch_warnings:
    """Pillow's warning of large images: ours is an error."""
    return warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)


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


def _to_images(path: Path, arrays: Mapping[str, np.ndarray]) -> Tensor | None:
    if "arr_0" not in arrays:
        return None
    pixels = arrays["arr_0"]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise ArtifactError(f"{path}: arr_0 is {found}, not uint8 [N, H, W, 3]", REFERENCE_HINT)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)  # [N, H, W, C] -> [N, C, H, W]


def _to_statistics(
    path: Path, arrays: Mapping[str, np.ndarray], end: str = ""
) -> Statistics | None:
    """Mean and covariance by the names mu and sigma with this ending."""
    if f"mu{end}" not in arrays:
        return None
    mu, sigma = (np.asarray(arrays[f"{name}{end}"], dtype=np.float64) for name in ("mu", "sigma"))
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        shapes = f"mu{end} {list(mu.shape)}, sigma{end} {list(sigma.shape)}"
        raise ArtifactError(f"{path}: {shapes}, expected [D] and [D, D]", REFERENCE_HINT)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        what = f"mu{end} or sigma{end} is not finite"
        raise ArtifactError(f"{path}: {what}", "compute the statistics again")
    return {"mu": mu, "sigma": sigma}


def _to_features(path: Path, arrays: Mapping[str, np.ndarray]) -> Tensor | None:
    found = arrays.get("features", arrays.get("feats"))
    if found is None:
        return None
    features = torch.from_numpy(found.astype(np.float32))
    if features.dim() != 2 or not features.isfinite().all():
        shape = list(features.shape)
        raise ArtifactError(f"{path}: features {shape} are not finite [N, D]", REFERENCE_HINT)
    return features
