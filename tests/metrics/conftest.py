"""Feature networks with random weights."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch_fidelity import FeatureExtractorInceptionV3

from qncd_cli.metrics import networks
from qncd_cli.metrics.features import FashionClassifier


@pytest.fixture(scope="session")
def network(tmp_path_factory) -> networks.FeatureNetwork:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("features") / "classifier.safetensors"
    safetensors.torch.save_file(FashionClassifier().half().state_dict(), path)
    return networks.packaged(path)


@pytest.fixture(scope="session")
def inception(tmp_path_factory) -> networks.FeatureNetwork:
    """A file in the shape of torch-fidelity's, of whose layers none blows up or dies out."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(torch, "load", lambda *_, **__: None)
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], "unused")
    generator = torch.Generator().manual_seed(0)
    state = model.state_dict()
    for name, value in state.items():
        if value.dim() > 1:
            spread = (2 / value[0].numel()) ** 0.5
            state[name] = (torch.randn(value.shape, generator=generator) * spread).half()
    torch.save(state, path)
    return networks.inception(path)
