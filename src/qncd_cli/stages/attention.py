"""Part of several stages: ranges of attention's operands, and the processors that use them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..artifacts import Artifact, tensors_below, tensors_by_module
from ..config import Config
from ..errors import ArtifactError
from ..models.topology import AttentionSite, attention_sites
from ..quant.affine import choose_qparams
from ..quant.attention import Matmul, QuantizedAttnProcessor, QuantizedJointAttnProcessor
from ..quant.layers import StepState
from ..quant.observers import RangeObserver, choose_range
from ..spec import ATTENTION_OPERANDS, FLOAT_BITS, activation_spec
from .plan import range_observer


def operand_observers(sites: list[AttentionSite], groups: int) -> dict[str, RangeObserver]:
    """One observer of q, k and v each, by `<module>.query`, `.key` and `.value`."""
    return {
        f"{site.name}.{operand}": RangeObserver(site.channels, -1, groups)
        for site in sites
        for operand in ATTENTION_OPERANDS
    }


def quantize_attention(
    config: Config, calibration: Artifact
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The quantized artifact's tensors and entries of every attention module.

    Both are empty where q, k, v and the probabilities all stay in floating point.
    """
    attention, activations = config.quantization.attention, config.quantization.activations
    if attention.bits == attention.probabilities_bits == FLOAT_BITS:
        return {}, {}
    observer = range_observer(activations.observer)
    tensors: dict[str, Tensor] = {}
    for name in calibration.body["attention"] if attention.bits != FLOAT_BITS else ():
        spec = activation_spec(attention.bits)
        for operand in ATTENTION_OPERANDS:
            prefix = f"{name}.{operand}_"
            state = tensors_below(prefix, calibration.tensors)
            low, high = choose_range(state, observer, spec, activations.percentile)
            qparams = choose_qparams(low, high, spec)
            tensors[f"{prefix}scale"], tensors[f"{prefix}zero_point"] = qparams
    entry = {
        "bits": attention.bits,
        "probabilities_bits": attention.probabilities_bits,
        "observer": observer,
    }
    return tensors, {name: dict(entry) for name in calibration.body["attention"]}


def install_attention(
    denoiser: nn.Module, artifact: Artifact, step: StepState, matmul: Matmul | None = None
) -> None:
    """Give the attention modules that the artifact names their quantized processors.

    matmul: the backend's integer product, if it has one.
    Raises ArtifactError naming the first module that the denoiser does not have.
    """
    sites = {site.name: site for site in attention_sites(denoiser)}
    tables = tensors_by_module(artifact.tensors)
    for name, entry in artifact.body["attention"].items():
        if name not in sites:
            raise ArtifactError(
                f"{artifact.path}: attention {name} does not fit the model",
                'repeat "qncd quantize"',
            )
        site = sites[name]
        tensors = tables.get(name, {})  # none where both products stay in floating point
        bits = entry["bits"], entry["probabilities_bits"]
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


def product_entries(artifact: Artifact) -> dict[str, dict[str, int]]:
    """Bits of both products by the names of their costs (topology.count_macs).

    weight_bits: of the key or the value; activation_bits: of the query or the probabilities.
    """
    found = {}
    for name, entry in artifact.body["attention"].items():
        bits, p_bits = entry["bits"], entry["probabilities_bits"]
        found[f"{name}.query_key"] = {"weight_bits": bits, "activation_bits": bits}
        found[f"{name}.probabilities_value"] = {"weight_bits": bits, "activation_bits": p_bits}
    return found
