"""The reference that samples are compared with, and sets of images that qncd did not make.

A reference holds images, or what is left of them: features, or mean and covariance of features.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ArtifactError
from .array_files import REFERENCE_HINT, read_arrays
from .domains import FASHION
from .frechet import Statistics
from .image_files import digest_of_files, image_paths
from .images_on_disk import Images, checked_images
from .networks import FeatureNetwork
from .seen import Seen

ZOO = "zoo"


@dataclass(frozen=True, eq=False)
class Reference:
    """What samples are compared with; at least one of the last three is there.

    source: where it comes from, for messages and records; digest: of its files' contents, whatever
    they are called, None for images in memory; images: uint8 [N, 3, H, W]; names: of the images,
    None where only their order tells them apart; statistics: mean and covariance of the features,
    spatial of those of sFID; features: [N, D] float32; skipped: broken files that were left out;
    seen: what there is to notice of the images, where they were looked at.
    """

    source: str
    images: Images | None = None
    statistics: Statistics | None = None
    features: Tensor | None = None
    spatial: Statistics | None = None
    names: tuple[str, ...] | None = None
    digest: str | None = None
    skipped: tuple[str, ...] = ()
    seen: Seen | None = None

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


def load_images(source: Path, skipped: list[Path] | None = None) -> Images:
    """The images of a folder, or of an .npz in arr_0 -> uint8 [N, 1 or 3, H, W].

    image_files.py says which files of a folder are images, in which order and how they are read;
    skipped: as in checked_images. Raises ArtifactError if there are none, and what checked_images
    raises.
    """
    if source.suffix != ".npz" or source.is_dir():
        return checked_images(image_paths(source), skipped)
    if not source.is_file():
        raise ArtifactError(f"{source}: no such file", "check the path")
    images = _to_images(source, read_arrays(source))
    if images is None or not len(images):
        raise ArtifactError(f"{source}: holds no images", "store them as arr_0, uint8 [N, H, W, 3]")
    return images


def load_reference(
    spec: str | Path | Tensor, zoo: Path = FASHION.reference, *, skip_broken: bool = False
) -> Reference:
    """A reference from the word zoo, a folder, an .npz or .safetensors file, or a tensor of images.

    spec: "zoo" is a domain's packaged statistics (the file `zoo`); files hold any of `arr_0` (uint8
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
        images = checked_images(paths, broken if skip_broken else None)
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
