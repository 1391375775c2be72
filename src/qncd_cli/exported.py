"""Quantized models in diffusers' own folders (`qncd export`). Once this is imported, it loads them:

    import qncd_cli.exported
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained("DIR")

The denoiser's weights file holds the quantized artifact, tensor by tensor under PREFIX and its
description in the metadata, beside what stays unquantized; config.json names the method. Saving a
loaded pipeline writes the same again. Loading needs the package accelerate, as every quantizer of
diffusers does. Corrections of the sampling loop are not part of a pipeline.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import safetensors
import torch
from diffusers import DiffusionPipeline
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from safetensors import safe_open
from torch import nn

from .backends.base import AUTO, get_backend
from .errors import ArtifactError, BackendUnavailable, ModelError
from .models.call_signature import training_timestep
from .models.pipelines import CLASS_CONDITIONAL
from .quant.layers import CachedTimestepLayer, SteppedModule, StepState
from .quant.packing import narrowed
from .runtime.denoiser import compute_with, install, install_time_cache, timestep_group
from .store import artifacts
from .store.artifacts import Artifact

PREFIX = "qncd."
KEY = "qncd"
"""Key of the weights file's metadata that holds the artifact's description."""


class Method(enum.StrEnum):
    """diffusers asks for an enumeration."""

    QNCD = "qncd"


class QncdConfig(QuantizationConfigMixin):
    """What config.json says of a denoiser. backend: as of `qncd sample`, chosen on loading."""

    def __init__(self, backend: str = AUTO, quant_method: str = Method.QNCD.value):
        self.quant_method = Method(quant_method)
        self.backend = backend

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class QncdQuantizer(DiffusersQuantizer):
    """Puts the artifact's layers into a denoiser that diffusers is loading, and back on saving."""

    required_packages = ["accelerate"]

    def __init__(self, quantization_config: QncdConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.artifact: Artifact | None = None
        self.step = StepState()
        self.device = torch.device("cpu")  # that the backend was chosen for
        self.own: set[str] = set()  # names of what the artifact brought into the model
        self.attention: dict[str, nn.Module] = {}  # processors of quantized attention by module
        self.moved: dict[str, str] = {}  # names of tensors that wrapping gave another name: theirs

    def install(self, model: nn.Module, artifact: Artifact) -> None:
        """Quantize the model as the artifact says. Raises ArtifactError, BackendUnavailable."""
        self.artifact = artifact
        backend = get_backend(self.quantization_config.backend)
        if backend.whole:
            raise BackendUnavailable(
                f"backend {backend.name} runs no pipeline folder", "take auto, int8 or simulate"
            )
        self.step = install(model, str(artifact.path), artifact, backend)
        own = [(n, m) for n, m in model.named_modules() if isinstance(m, SteppedModule)]
        self.own = {f"{name}.{buffer}" for name, m in own for buffer, _ in m.named_buffers()}
        self.attention = self._protected(model, artifact)

    def _protected(self, model: nn.Module, artifact: Artifact) -> dict[str, nn.Module]:
        """The processors of quantized attention by module; other ones are refused from now on."""
        found: dict[str, nn.Module] = {}
        for name in artifact.body["attention"]:
            module: Any = model.get_submodule(name)
            found[name] = module.processor
            module.set_processor = functools.partial(_keep_processor, name, module.processor)
            if hasattr(module, "fuse_projections"):
                module.fuse_projections = functools.partial(_keep_processor, name, None)
        return found

    # ---- loading, in the order of the calls

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: Sequence[str] | str
    ) -> list[str]:
        files = [checkpoint_files] if isinstance(checkpoint_files, str) else checkpoint_files
        self.artifact = _read([Path(file) for file in files])
        return [key for key in loaded_keys if not key.startswith(PREFIX)]

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        assert self.artifact is not None
        self.install(model, self.artifact)

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        return [key for key in missing_keys if key not in self.own]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        assert self.artifact is not None
        if self.artifact.body["cache_time_embeddings"]:
            install_time_cache(model, self.step)
        wrapped = [n for n, m in model.named_modules() if isinstance(m, CachedTimestepLayer)]
        self.moved = {
            f"{name}.original.{part}": f"{name}.{part}"
            for name in wrapped
            for part in model.get_submodule(f"{name}.original").state_dict()
        }
        model.register_forward_pre_hook(self._follow, with_kwargs=True)
        _keep_from_compiling(model)

    def compute_on(self, model: nn.Module, device: torch.device) -> None:
        """Choose the backend anew where the model was moved. Raises BackendUnavailable."""
        if device.type != self.device.type:
            compute_with(model, get_backend(self.quantization_config.backend, device))
            self.device = device

    @torch.compiler.disable
    def _follow(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Tell the layers which timestep a call is at, and where."""
        assert self.artifact is not None
        given = (*args, *kwargs.values())
        self.compute_on(model, next(x for x in given if isinstance(x, torch.Tensor)).device)
        for name, processor in self.attention.items():
            if model.get_submodule(name).processor is not processor:
                raise _undone(name)
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.step.timestep = training_timestep(model, timestep)
        bounds = tuple(self.artifact.body["group_bounds"])
        self.step.group = timestep_group(self.step.timestep, bounds)

    # ---- saving

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The unquantized tensors under diffusers' names, the artifact's under ours.

        The former take 16 bits where these are exact.
        """
        assert self.artifact is not None
        away = [name for name, tensor in state_dict.items() if tensor.is_meta]
        if away:
            raise ModelError(
                f"{len(away)} tensors of the denoiser are offloaded (first: {away[0]})",
                "save the pipeline before it is offloaded, or call remove_all_hooks()",
            )
        kept = {
            self.moved.get(n, n): narrowed(t) for n, t in state_dict.items() if n not in self.own
        }
        added = {f"{PREFIX}{name}": tensor for name, tensor in self.artifact.tensors.items()}
        return {**kept, **added}, {KEY: artifacts.description(self.artifact)}

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


@torch.compiler.disable
def _eagerly(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(model).forward(model, *args, **kwargs)


def _keep_from_compiling(model: Any) -> None:
    """Let torch.compile leave the model as it is: layers that look at the timestep, and kernels of
    oneDNN, are nothing that it can trace."""
    model.forward = types.MethodType(_eagerly, model)
    if hasattr(model, "compile_repeated_blocks"):
        model.compile_repeated_blocks = _refuse_compiling


def _refuse_compiling(*_: Any, **__: Any) -> None:
    """In the place of a model's compile_repeated_blocks. Raises ModelError."""
    raise ModelError(
        "the blocks of a quantized denoiser cannot be compiled by torch.compile",
        "qncd sample --compile makes one graph of it",
    )


def _keep_processor(name: str, own: nn.Module | None, processor: Any = None, **_: Any) -> None:
    """In the place of a module's set_processor and fuse_projections. Raises ModelError."""
    if own is None or processor is not own:
        raise _undone(name)


def _undone(name: str) -> ModelError:
    return ModelError(
        f"{name}: the products of attention are quantized, another processor would undo it",
        "leave attention slicing, xformers, fused projections and other processors out, or load "
        "the model that is not quantized",
    )


def _read(files: Sequence[Path]) -> Artifact:
    """The artifact in a denoiser's weights files. Raises ArtifactError."""
    text, tensors = "", dict[str, torch.Tensor]()
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {})[KEY]
                names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118
                tensors |= {name.removeprefix(PREFIX): file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, KeyError, OSError) as error:
        raise ArtifactError(f"{path}: no quantized weights", 'repeat "qncd export"') from error
    return artifacts.checked(files[0], text, tensors, "quantized")


def exported_pipeline(
    pipeline: DiffusionPipeline, artifact: Artifact, scheduler: Any
) -> DiffusionPipeline:
    """The pipeline with the artifact in its denoiser and that scheduler, ready to be saved.

    Raises ArtifactError where artifact and pipeline do not belong together.
    """
    name = next(n for n in ("transformer", "unet") if n in pipeline.components)
    denoiser = pipeline.components[name]
    quantizer = QncdQuantizer(QncdConfig())
    quantizer.install(denoiser, artifact)
    denoiser.hf_quantizer = quantizer
    denoiser.register_to_config(quantization_config=quantizer.quantization_config)
    pipeline.register_modules(scheduler=scheduler)
    return pipeline


def register() -> None:
    """Let diffusers know the method and our pipeline classes."""
    auto.AUTO_QUANTIZER_MAPPING[Method.QNCD.value] = QncdQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.QNCD.value] = QncdConfig
    for name, kind in CLASS_CONDITIONAL.items():
        setattr(diffusers, name, kind)


register()
