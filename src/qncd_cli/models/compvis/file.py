"""CompVis checkpoint files: state dicts of tensors alone, as .ckpt or .safetensors."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ...errors import ModelError

# What PyTorch Lightning stores of its callbacks beside the weights, by name; none of it is needed
# (without these, CompVis' own files are refused: flowtyone/ComfyUI-Flowty-LDSR, issue 8).
_INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
SHOWN = 3  # names in an error


class _Inert:
    """Stands for a class that a checkpoint names beside its weights: holds and does nothing."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_tensors(checkpoint: str) -> dict[str, Tensor]:
    """The file's state dict, mapped into memory where the format allows; no code of it is run.

    Raises ModelError for a file that cannot be read, that holds code, no tensors, or LoRA weights.
    """
    if Path(checkpoint).suffix == ".safetensors":
        try:
            found: Any = safetensors.torch.load_file(checkpoint)
        except (OSError, safetensors.SafetensorError) as error:
            raise _unreadable(checkpoint, error) from error
    else:
        found = _unpickle(checkpoint)
        found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not found:
        raise ModelError(f"{checkpoint}: holds no state dict", "give a checkpoint of a model")
    strange = [k for k, v in found.items() if not isinstance(k, str) or not isinstance(v, Tensor)]
    if strange:
        raise ModelError(
            f"{checkpoint}: {strange[0]} is no tensor ({len(strange)} such entries)",
            "give a checkpoint of a model",
        )
    adapted = [name for name in found if "lora" in name.lower() or ".base_layer." in name]
    if adapted:
        raise ModelError(
            f"{checkpoint}: {some_tensors('of a LoRA', adapted)}",
            "merge the adapter into the model and save that",
        )
    return found


def header_of(file: str) -> dict[str, str]:
    """What a .safetensors file says of itself beside its tensors; nothing of other files."""
    if Path(file).suffix != ".safetensors":
        return {}
    with safetensors.safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def _unpickle(checkpoint: str) -> Any:
    stand_ins: Any = [(_Inert, name) for name in _INERT]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(
                checkpoint,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(checkpoint),
            )
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{checkpoint}: is no pickle of tensors alone ({_reason(error)})",
            "it may hold code, and none is run; save its state dict as .safetensors",
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: str, error: Exception) -> ModelError:
    return ModelError(f"{checkpoint}: cannot be read ({_reason(error)})", "is the file complete?")


def _reason(error: Exception) -> str:
    """What torch says about a file without its advice to read it all the same."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "WeightsUnpickler error:" in line] or lines
    text = telling[0].partition("WeightsUnpickler error:")[2] or telling[0] if telling else ""
    return text.strip().partition(". ")[0][:120] or type(error).__name__


def some_tensors(what: str, names: list[str]) -> str:
    """A count of tensors with the first few names, empty for none."""
    if not names:
        return ""
    more = ", ..." if len(names) > SHOWN else ""
    count = f"{len(names)} tensor{'s' * (len(names) > 1)}"
    return f"{count} {what} ({', '.join(names[:SHOWN])}{more})"
