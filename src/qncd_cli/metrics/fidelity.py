"""The only door to torch-fidelity: features of images, and metrics of features.

Feature extraction and every formula are torch-fidelity's; its defaults that surprise (CUDA, caches
keyed by name alone, worker processes, a progress bar) are never used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import (
    FeatureExtractorBase,
    metric_isc,
    metric_kid,
    metric_prc,
    registry,
    utils,
)

from ..errors import ArtifactError, BackendUnavailable
from ..progress import Track, counted, no_progress
from . import bootstrap
from .domains import FASHION
from .features import OWN
from .images_on_disk import Images
from .networks import SPATIAL_CHANNELS, FeatureNetwork, first_line

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # torch-fidelity's defaults
KID_KERNEL = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3}  # Binkowski et al. 2018, eq. (4)
ISC_SPLITS, ISC_IMAGES_PER_SPLIT = 10, 10  # 10 splits as published, fewer for a small set
PRC_NEIGHBORHOOD = 3  # Kynkaanniemi et al. 2019, section 3.1
PRC_ROWS_PER_BLOCK = 2000  # bounds a block of distances: 400 MB against 50,000 images
# Fewer images and the formula is not defined
MINIMUM_IMAGES = {
    **{"fid": 2, "sfid": 2, "fid_infinity": 2},
    **{"isc": 1, "kid": 2, "prc": PRC_NEIGHBORHOOD + 1},
}
SEED = 2020  # torch-fidelity's: the same subsets and splits as its own command draws


@dataclass(frozen=True, eq=False)
class Features:
    """What the named network makes of N images, float32 on the CPU.

    features: [N, D]; logits: [N, K]; spatial: [N, S] where they were asked for; order: [N], the
    rows as subsets and splits are drawn from them.
    """

    network: str
    features: Tensor
    logits: Tensor
    spatial: Tensor | None = None
    order: Tensor | None = None

    def in_order(self) -> Features:
        """The same images in that order."""
        if self.order is None:
            return self
        rows, spatial = self.order, self.spatial
        return replace(
            self,
            features=self.features[rows],
            logits=self.logits[rows],
            spatial=None if spatial is None else spatial[rows],
            order=None,
        )


class OwnFeatureExtractor(FeatureExtractorBase):
    """A network of features.OWN as torch-fidelity runs it: uint8 [N, 3, H, W] -> layers by name."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any
    ) -> None:
        super().__init__(name, features_list)
        self.network = OWN[name](feature_extractor_weights_path)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("features", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, FASHION.side, FASHION.side, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features, logits = self.network(images)
        named = {"features": features, "logits": logits}
        return tuple(named[layer] for layer in self.features_list)


class _ImageDataset(Dataset):
    """uint8 [N, 1 or 3, H, W] as the dataset of RGB images that torch-fidelity expects."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].expand(3, -1, -1)


def extract_features(
    images: Images,
    network: FeatureNetwork,
    *,
    names: Sequence[Any] | None = None,
    spatial: bool = False,
    device: str = "cpu",
    track: Track = no_progress,
    see: Callable[[Tensor], object] | None = None,
    extractor: FeatureExtractorBase | None = None,
) -> Features:
    """First rung: features and logits of images, by torch-fidelity's extractor.

    images: uint8 [N, 1 or 3, H, W], any size (all networks resize); names: of the images, by which
    torch-fidelity's command would sort them, their contents unless given; spatial: whether the
    features of sFID are wanted too; device: cpu or cuda[:n]; see: is shown every chunk of images,
    in their order, so that they are read once; extractor: the network on that device, made now
    unless given.
    Deterministic, and an image's features do not depend on the others or on its place among them.
    Raises ValueError for another dtype or shape, BackendUnavailable for a missing device,
    ArtifactError if the weights do not fit the network or give features that are not finite.
    """
    if images.dtype != torch.uint8 or len(images.shape) != 4 or images.shape[1] not in (1, 3):
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"expected images uint8 [N, 1 or 3, H, W], got {found}")
    if len(images) == 0:
        raise ValueError("expected at least one image, got none")
    cuda = _is_cuda(device)
    if extractor is None:
        extractor = create_extractor(network).to(device)
    parts: list[dict[str, Tensor]] = []
    digests: list[bytes] = []
    chunks = images.split(network.batch)
    with _spatial(extractor, spatial) as seen:
        for chunk, tick in counted(track, chunks, "extracting features", len(images), "images"):
            if names is None:
                digests += [
                    hashlib.sha256(one.cpu().contiguous().numpy()).digest() for one in chunk
                ]
            missing = network.batch - len(chunk)
            filled = torch.cat([chunk, chunk[-1:].expand(missing, -1, -1, -1)]).cpu()
            with torch.cuda.device(device) if cuda else nullcontext():
                # save_cpu_ram: no worker processes, verbose: no progress bar
                part = utils.get_featuresdict_from_dataset(
                    _ImageDataset(filled), extractor, network.batch, cuda, True, False
                )
            if seen:
                part["spatial"] = seen.pop()
            parts.append({layer: rows[: len(chunk)] for layer, rows in part.items()})
            if see is not None:
                see(chunk)
            for _ in chunk:
                tick()
    keys = digests if names is None else list(names)
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))
    layers = (*network.layers, "spatial") if spatial else network.layers
    stacked = {layer: torch.cat([part[layer] for part in parts]) for layer in layers}
    if not all(values.isfinite().all() for values in stacked.values()):
        raise ArtifactError(f"{network.weights}: features are not finite", "use intact weights")
    features, logits = (stacked[layer] for layer in network.layers)
    return Features(network.name, features, logits, stacked.get("spatial"), order)


@contextmanager
def _spatial(extractor: FeatureExtractorBase, wanted: bool) -> Iterator[list[Tensor]]:
    """A list that holds the features of sFID after a call: ADM's `mixed_6/conv`, 7 channels.

    Laid out as TensorFlow does, [N, 17 * 17 * 7], so that stored statistics fit.
    """
    seen: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        seen.append(output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float().cpu())

    handle = extractor.Mixed_6d.branch1x1.register_forward_hook(keep) if wanted else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def _is_cuda(device: str) -> bool:
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise BackendUnavailable(f"image metrics do not run on {device}", "use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(f"no {device} here for the image metrics", "use cpu")
    return kind == "cuda"


def create_extractor(network: FeatureNetwork) -> FeatureExtractorBase:
    """A network as torch-fidelity knows it, registered under its name where it is ours.

    Raises ArtifactError if the weights do not fit.
    """
    if network.extractor not in registry.FEATURE_EXTRACTORS_REGISTRY:
        registry.register_feature_extractor(network.extractor, OwnFeatureExtractor)
    try:
        found = utils.create_feature_extractor(
            network.extractor,
            list(network.layers),
            cuda=False,
            feature_extractor_weights_path=str(network.weights),
            verbose=False,
        )
    except (RuntimeError, OSError, SafetensorError) as error:
        message = f"{network.weights}: not the weights of {network.name}: {first_line(error)}"
        raise ArtifactError(message, "restore the file") from error
    return found.to(memory_format=torch.channels_last)  # faster on a CPU


def kernel_distance(a: Tensor, b: Tensor, seed: int = SEED) -> dict[str, Any]:
    """Polynomial maximum mean discrepancy of features [N, D] and [M, D], N and M >= 2 (KID).

    The mean over 100 random subsets of 1000 images, or of min(N, M) if that is less (one subset
    when both sets have exactly that size, for all subsets would be equal). Unbiased: may be < 0.
    Returns {value, std, subset_size, subsets}. Source: Binkowski et al. 2018 (arXiv 1801.01401).
    """
    size = min(KID_SUBSET_SIZE, len(a), len(b))
    subsets = 1 if len(a) == len(b) == size else KID_SUBSETS
    result = metric_kid.kid_features_to_metric(
        a,
        b,
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=seed,
        verbose=False,
        **KID_KERNEL,
    )
    return {
        "value": result[metric_kid.KEY_METRIC_KID_MEAN],
        "std": result[metric_kid.KEY_METRIC_KID_STD],
        "subset_size": size,
        "subsets": subsets,
    }


def class_score(logits: Tensor, seed: int = SEED) -> dict[str, Any]:
    """exp(E KL(p(y|x) || p(y))) of logits [N, K], from 1 to K (Inception score).

    Mean and spread over 10 splits of the shuffled images, fewer if a split would hold under 10.
    Returns {value, std, splits}. Source: Salimans et al. 2016 (arXiv 1606.03498), section 4.
    """
    splits = isc_splits(len(logits))
    result = metric_isc.isc_features_to_metric(logits, splits, shuffle=True, rng_seed=seed)
    return {
        "value": result[metric_isc.KEY_METRIC_ISC_MEAN],
        "std": result[metric_isc.KEY_METRIC_ISC_STD],
        "splits": splits,
    }


def isc_splits(count: int) -> int:
    """Splits that this many images are scored in."""
    return max(1, min(ISC_SPLITS, count // ISC_IMAGES_PER_SPLIT))


def class_score_replicates(logits: Tensor, drawn: Tensor, seed: int = SEED) -> np.ndarray:
    """Class scores of resampled images. drawn: [R, N], how often each of N images was drawn."""
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))  # as it shuffles
    splits = isc_splits(len(logits))
    return bootstrap.of_class_score(logits[order], drawn[:, order], splits)


def distances(rows: Tensor, others: Tensor) -> Tensor:
    """Distances of features [N, D] and [M, D]: [N, M], torch-fidelity's."""
    found: Tensor = metric_prc.calc_cdist_part(rows, others, PRC_ROWS_PER_BLOCK)
    return found


def within(points: Tensor, others: Tensor) -> Tensor:
    """Which points lie no further from one of the others than its third neighbour: bool [N].

    The share of samples within the reference is precision, that of the reference within the samples
    recall. points: [N, D]; others: [M, D], M >= 4. Distances are torch-fidelity's.
    Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991), section 3.1.
    """

    nearest = PRC_NEIGHBORHOOD + 1  # the first is the point itself
    blocks = others.split(PRC_ROWS_PER_BLOCK)
    radii = torch.cat([distances(rows, others).kthvalue(nearest).values for rows in blocks])
    split = points.split(PRC_ROWS_PER_BLOCK)
    inside = [(distances(rows, others) <= radii).any(1) for rows in split]
    return torch.cat(inside)
