"""The packaged feature network: a small Fashion-MNIST classifier.

It supplies the features of the Frechet distance where Inception weights are not at hand
(reported as fd_fashion, never as FID) and says which garment an image shows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 32
FEATURE_SIZE = 128
NUM_CLASSES = 10


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
