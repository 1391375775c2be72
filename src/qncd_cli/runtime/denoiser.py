"""What several stages put together from the rooms below: predictors and the quantized denoiser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..backends.base import Backend, get_backend
from ..config.schema import Config
from ..errors import ArtifactError, BackendUnavailable, ModelError
from ..models.loading import DiffusionModel
from ..models.topology import LayerCost, count_macs, replace_module, time_layers, weight_layers
from ..quant.attention import AttentionProducts
from ..quant.layers import CachedTimestepLayer, QuantizedLayer, StepState
from ..sampling.guidance import guided
from ..store.artifacts import Artifact, tensors_by_module
from ..store.layer_entry import layer_entries
from .install import install_attention

Predict = Callable[[Tensor, Tensor], Tensor]


class Denoiser:
    """A denoiser that knows which timestep it is called at.

    module: full precision or quantized; step: shared with its quantized layers; group_bounds:
    descending timesteps, group g holds from bound g - 1 (excluded) down to bound g.
    """

    def __init__(self, module: nn.Module, step: StepState, group_bounds: tuple[float, ...] = ()):
        self.module = module
        self.step = step
        self.group_bounds = group_bounds
        self.calls = 0
        parameter = next(module.parameters())
        self._dtype, self._device = parameter.dtype, parameter.device

    def __call__(self, x: Tensor, t: Tensor | float, condition: Mapping[str, Tensor]) -> Tensor:
        """Noise prediction [N, ...] float32 on the CPU for model input x at timestep t.

        Raises BackendUnavailable where the device's memory does not suffice.
        """
        self.step.timestep = float(t)
        self.step.group = timestep_group(self.step.timestep, self.group_bounds)
        self.calls += 1
        with torch.no_grad():
            x, condition = self.in_own_dtype(x, condition)
            x = self.to_own_device(x)
            t = torch.as_tensor(t, device=self._device).expand(len(x))
            try:
                return self._predict(x, t, condition).float().cpu()
            except torch.OutOfMemoryError as error:
                raise BackendUnavailable(
                    f"{self._device} has too little memory for a call of {len(x)} rows",
                    "fewer samples at once (--batch-size, calibration.batch_size), or --device cpu",
                ) from error

    def in_own_dtype(
        self, x: Tensor, condition: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x and condition as the module takes them; labels stay integers."""
        own = {k: v.to(self._dtype) if v.is_floating_point() else v for k, v in condition.items()}
        return x.to(self._dtype), own

    def to_own_device(self, x: Tensor) -> Tensor:
        """x where the module is."""
        return x.to(self._device)

    def _predict(self, x: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        return self.module(x, t, **condition).sample


def group_bounds(timesteps: list[float], groups: int) -> tuple[float, ...]:
    """Descending bounds that cut the sampler's timesteps into equal runs of steps."""
    times = sorted(set(timesteps), reverse=True)
    bounds = []
    for group in range(1, groups):
        cut = round(group * len(times) / groups)
        bounds.append((times[cut - 1] + times[cut]) / 2)
    return tuple(bounds)


def timestep_group(t: float, bounds: tuple[float, ...]) -> int:
    """Index of the group that a timestep, of the sampler or not, falls into."""
    return sum(t < bound for bound in bounds)


def guided_predict(
    model: DiffusionModel, denoiser: Denoiser, labels: Tensor, guidance_scale: float
) -> Predict:
    """(x, t) -> guided prediction for one batch of labels. Raises ModelError."""
    null = None
    with torch.no_grad():
        condition = model.condition(labels)
        if model.null_condition is not None and model.guides(guidance_scale):
            null = {**condition, **model.null_condition(len(labels))}  # images are read by both
    reads_scale = not condition.keys().isdisjoint(("guidance", "timestep_cond"))
    if model.null_condition is None and guidance_scale > 1.0 and not reads_scale:
        raise ModelError(
            f"{model.source} has no null class to guide away from",
            "set sampling.guidance_scale: 1",
        )
    return guided(denoiser, condition, null, guidance_scale)


def full_denoiser(model: DiffusionModel) -> Denoiser:
    return Denoiser(model.denoiser, StepState())


def denoiser_costs(config: Config, model: DiffusionModel) -> list[LayerCost]:
    """Costs by layer of one full-precision denoiser call on one sample, guidance not counted."""
    denoiser = full_denoiser(model)
    condition = model.condition(model.labels([0], config.sampling.classes))
    x = torch.zeros(1, *model.latent_shape)
    return count_macs(model.denoiser, lambda: denoiser(x, torch.tensor(0), condition))


def quantized_denoiser(
    model: DiffusionModel,
    artifact: Artifact,
    backend: str,
    cache_time_embeddings: bool,
    *,
    low_memory: bool = False,
    in_place: bool = False,
) -> Denoiser:
    """The denoiser of the artifact: quantized layers from it, everything else from the model.

    low_memory: weights are unpacked at every call and not kept (the same numbers, more slowly).
    in_place: the model's own denoiser becomes it, and its weights are freed; else it stays as it
    is. Raises ArtifactError naming the first layer that the model and the artifact do not share,
    BackendUnavailable.
    """
    return with_artifact(
        model.denoiser,
        model.source,
        artifact,
        backend,
        cache_time_embeddings,
        low_memory=low_memory,
        in_place=in_place,
    )


def with_artifact(
    original: nn.Module,
    source: str,
    artifact: Artifact,
    backend: str,
    cache_time_embeddings: bool,
    *,
    low_memory: bool = False,
    in_place: bool = False,
) -> Denoiser:
    """quantized_denoiser for a denoiser alone; source: where it is from, for messages."""
    device = next(original.parameters()).device
    module = original
    if not in_place:
        layers = weight_layers(original)
        # what is replaced below need not be copied: the largest part of the model
        replaced = [layers[name] for name in artifact.body["layers"] if name in layers]
        module = copy.deepcopy(original, {id(layer): layer for layer in replaced})
    chosen = get_backend(backend, device)
    step = install(module, source, artifact, chosen, low_memory=low_memory)
    if cache_time_embeddings:
        install_time_cache(module, step)
    return Denoiser(module.to(device), step, tuple(artifact.body["group_bounds"]))


def install(
    module: nn.Module,
    source: str,
    artifact: Artifact,
    backend: Backend,
    *,
    low_memory: bool = False,
) -> StepState:
    """Put the artifact's layers and attention in the place of a denoiser's own.

    The state that they follow comes back. Raises ArtifactError as quantized_denoiser does.
    """
    step, layers = StepState(), weight_layers(module)
    tensors = tensors_by_module(artifact.tensors)
    for name, entry in layer_entries(artifact.body).items():
        layer = layers.get(name)
        if layer is None or tuple(layer.weight.shape) != entry.weight_shape:
            raise ArtifactError(
                f"{artifact.path}: layer {name} does not fit {source}",
                'repeat "qncd quantize"',
            )
        try:
            quantized = QuantizedLayer(
                layer,
                tensors[name],
                entry.weight_bits,
                entry.activation_bits,
                step,
                backend.compute,
                low_memory=low_memory,
            )
        except ValueError as error:
            raise ArtifactError(f"{artifact.path}: layer {name}: {error}") from error
        replace_module(module, name, quantized)
    install_attention(module, artifact, step, backend.matmul)
    return step


def compute_with(module: nn.Module, backend: Backend) -> None:
    """The quantized layers and attention products of a denoiser are the backend's from now on."""
    for part in module.modules():
        if isinstance(part, QuantizedLayer):
            part.compute = backend.compute
        elif isinstance(part, AttentionProducts):
            part.matmul = backend.matmul


def install_time_cache(module: nn.Module, step: StepState) -> None:
    """Layers that depend on the timestep alone are evaluated once per timestep from now on."""
    layers = weight_layers(module)
    for name in sorted(time_layers(module)):
        replace_module(module, name, CachedTimestepLayer(layers[name], step))
