"""Quantized processors for the attention modules of a denoiser."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ArtifactError
from ..models.topology import attention_sites
from ..quant.attention import Matmul
from ..quant.attention_processors import QuantizedAttnProcessor, QuantizedJointAttnProcessor
from ..quant.layers import StepState
from ..store.artifacts import Artifact, tensors_by_module
from ..store.layer_entry import attention_entries


def install_attention(
    denoiser: nn.Module, artifact: Artifact, step: StepState, matmul: Matmul | None = None
) -> None:
    """Give the attention modules that the artifact names their quantized processors.

    matmul: the backend's integer product, if it has one.
    Raises ArtifactError naming the first module that the denoiser does not have.
    """
    sites = {site.name: site for site in attention_sites(denoiser)}
    tables = tensors_by_module(artifact.tensors)
    for name, entry in attention_entries(artifact.body).items():
        if name not in sites:
            raise ArtifactError(
                f"{artifact.path}: attention {name} does not fit the model",
                'repeat "qncd quantize"',
            )
        site = sites[name]
        tensors = tables.get(name, {})  # none where both products stay in floating point
        bits = entry.bits, entry.probabilities_bits
        module: Any = denoiser.get_submodule(name)
        processor = (
            QuantizedJointAttnProcessor(
                tensors, *bits, step, site.scale, matmul, inner=module.processor
            )
            if site.joint
            else QuantizedAttnProcessor(
                tensors, *bits, step, site.scale, matmul, qk_norm=site.qk_norm
            )
        )
        module.set_processor(processor)
