"""The only door to torch-fidelity: features of images, and metrics of features.

Feature extraction and every formula are torch-fidelity's; its defaults that surprise (CUDA, caches
keyed by name alone, worker processes, a progress bar) are never used.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import (
    FeatureExtractorBase,
    metric_fid,
    metric_isc,
    metric_kid,
    metric_prc,
    registry,
    utils,
)

from ..errors import ArtifactError, BackendUnavailable
from ..progress import Track, counted, no_progress
from .features import IMAGE_SIZE, FashionClassifier, to_classifier_input
from .networks import FeatureNetwork, first_line
from .reference import Statistics

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # torch-fidelity's defaults
KID_KERNEL = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3}  # Binkowski et al. 2018, eq. (4)
ISC_SPLITS, ISC_IMAGES_PER_SPLIT = 10, 10  # 10 splits as published, fewer for a small set
PRC_NEIGHBORHOOD = 3  # Kynkaanniemi et al. 2019, section 3.1
PRC_ROWS_PER_BLOCK = 2000  # bounds a block of distances: 400 MB against 50,000 images
# Fewer images and the formula is not defined
MINIMUM_IMAGES = {"fid": 2, "isc": 1, "kid": 2, "prc": PRC_NEIGHBORHOOD + 1}


@dataclass(frozen=True, eq=False)
class Features:
    """features [N, D] and logits [N, K] of N images, float32 on the CPU, by the named network."""

    network: str
    features: Tensor
    logits: Tensor


class FashionFeatureExtractor(FeatureExtractorBase):
    """The packaged classifier as torch-fidelity runs it: uint8 [N, 3, H, W] -> layers by name."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any
    ) -> None:
        super().__init__(name, features_list)
        self.classifier = FashionClassifier()
        self.classifier.load_state_dict(safetensors.torch.load_file(feature_extractor_weights_path))

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
        return torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features, logits = self.classifier(to_classifier_input(images))
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
    images: Tensor,
    network: FeatureNetwork,
    *,
    batch_size: int = 64,
    device: str = "cpu",
    track: Track = no_progress,
) -> Features:
    """First rung: features and logits of images, by torch-fidelity's extractor.

    images: uint8 [N, 1 or 3, H, W], any size (both networks resize). device: cpu or cuda[:n].
    Deterministic; the batch size changes results by float rounding only.
    Raises ValueError for another dtype or shape, BackendUnavailable for a missing device,
    ArtifactError if the weights do not fit the network or give features that are not finite.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"expected images uint8 [N, 1 or 3, H, W], got {found}")
    if len(images) == 0:
        raise ValueError("expected at least one image, got none")
    cuda = _is_cuda(device)
    extractor = _create_extractor(network).to(device)
    parts: list[dict[str, Tensor]] = []
    chunks = images.split(batch_size)
    for chunk, tick in counted(track, chunks, "extracting features", len(images), "images"):
        with torch.cuda.device(device) if cuda else nullcontext():
            # save_cpu_ram: no worker processes, verbose: no progress bar
            parts.append(
                utils.get_featuresdict_from_dataset(
                    _ImageDataset(chunk.cpu()), extractor, batch_size, cuda, True, False
                )
            )
        for _ in chunk:
            tick()
    features, logits = (torch.cat([part[layer] for part in parts]) for layer in network.layers)
    if not (features.isfinite().all() and logits.isfinite().all()):
        raise ArtifactError(f"{network.weights}: features are not finite", "use intact weights")
    return Features(network.name, features, logits)


def _is_cuda(device: str) -> bool:
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise BackendUnavailable(f"image metrics do not run on {device}", "use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(f"no {device} here for the image metrics", "use cpu")
    return kind == "cuda"


def _create_extractor(network: FeatureNetwork) -> FeatureExtractorBase:
    if network.extractor not in registry.FEATURE_EXTRACTORS_REGISTRY:
        registry.register_feature_extractor(network.extractor, FashionFeatureExtractor)
    try:
        return utils.create_feature_extractor(
            network.extractor,
            list(network.layers),
            cuda=False,
            feature_extractor_weights_path=str(network.weights),
            verbose=False,
        )
    except (RuntimeError, OSError, SafetensorError) as error:
        message = f"{network.weights}: not the weights of {network.name}: {first_line(error)}"
        raise ArtifactError(message, "restore the file") from error


def frechet_statistics(features: Tensor) -> Statistics:
    """Second rung: features [N, D], N >= 2 -> mu [D], sigma [D, D] in float64 (over N - 1)."""
    return metric_fid.fid_features_to_statistics(features.to(torch.float64))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Third rung: |mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2)), >= 0.

    It stays defined when there are fewer images than features (singular sigma), but its bias
    grows as the number of images falls: compare sets of equal size only.
    Source: Heusel et al. 2017 (arXiv 1706.08500), eq. (6).
    """
    distance = metric_fid.fid_statistics_to_metric(a, b, False)[metric_fid.KEY_METRIC_FID]
    return max(distance, 0.0)  # rounding leaves it slightly negative for equal sets


def kernel_distance(a: Tensor, b: Tensor, seed: int = 0) -> dict[str, Any]:
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


def class_score(logits: Tensor, seed: int = 0) -> dict[str, Any]:
    """exp(E KL(p(y|x) || p(y))) of logits [N, K], from 1 to K (Inception score).

    Mean and spread over 10 splits of the shuffled images, fewer if a split would hold under 10.
    Returns {value, std, splits}. Source: Salimans et al. 2016 (arXiv 1606.03498), section 4.
    """
    splits = max(1, min(ISC_SPLITS, len(logits) // ISC_IMAGES_PER_SPLIT))
    result = metric_isc.isc_features_to_metric(logits, splits, shuffle=True, rng_seed=seed)
    return {
        "value": result[metric_isc.KEY_METRIC_ISC_MEAN],
        "std": result[metric_isc.KEY_METRIC_ISC_STD],
        "splits": splits,
    }


def precision_recall(samples: Tensor, reference: Tensor) -> dict[str, Any]:
    """Share of samples within the reference's manifold, and the reverse; features, >= 4 rows each.

    samples: [N, D]; reference: [M, D]. Returns {precision, recall, neighborhood}.
    Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991), the 3 nearest neighbours.
    """
    result = metric_prc.prc_features_to_metric(
        samples,
        reference,
        prc_neighborhood=PRC_NEIGHBORHOOD,
        prc_batch_size=PRC_ROWS_PER_BLOCK,
        save_cpu_ram=True,
        verbose=False,
    )
    return {
        "precision": result[metric_prc.KEY_METRIC_PRECISION],
        "recall": result[metric_prc.KEY_METRIC_RECALL],
        "neighborhood": PRC_NEIGHBORHOOD,
    }
