"""What the parts of train_zoo.py share: schedules, averages, states to go on from, records."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor
from safetensors.torch import save_file
from torch import Tensor, nn

ZOO = Path(__file__).resolve().parent.parent / "src" / "qncd_cli" / "zoo"


def signed(images: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def cosine(step: int, steps: int, warmup: int = 200) -> float:
    """Learning-rate factor: linear warm-up, then cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def batches(count: int, size: int, generator: torch.Generator):
    """Endless shuffled index batches."""
    while True:
        order = torch.randperm(count, generator=generator)
        for i in range(0, count - size + 1, size):
            yield order[i : i + size]


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def write_record(folder: Path, part: str, record: dict) -> None:
    path = folder / "training.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    record["torch"] = torch.__version__
    record["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    record["date"] = time.strftime("%Y-%m-%d")
    everything[part] = record
    path.write_text(json.dumps(everything, indent=2, sort_keys=True) + "\n")


def save_half(module: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in module.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, path)


def plain_attention(model: nn.Module) -> None:
    """SDPA's backward is slow on a CPU; plain products train faster."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def save_pipeline(folder: Path, pipeline: DiffusionPipeline) -> None:
    pipeline.to(torch.float16)
    pipeline.save_pretrained(folder)
    for config in folder.glob("*/config.json"):  # diffusers notes the folder a part was read from
        entries = json.loads(config.read_text())
        entries.pop("_name_or_path", None)
        config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")


class Ema:
    """Exponential moving average of parameters, with warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.shadow = [p.detach().clone() for p in module.parameters()]

    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            torch._foreach_lerp_(self.shadow, list(module.parameters()), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self.shadow = state["updates"], state["shadow"]

    def copy_to(self, module: nn.Module) -> None:
        with torch.no_grad():
            for p, s in zip(module.parameters(), self.shadow, strict=True):
                p.copy_(s)


class Progress:
    """What a part needs to go on where it was stopped, in a file that is replaced as a whole.

    path: the file; generator: of every random draw of the part; parts: by name, whatever has
    state_dict and load_state_dict.
    """

    def __init__(self, path: Path, generator: torch.Generator, every: float = 90.0, **parts: Any):
        self.path, self.generator, self.every, self.parts = path, generator, every, parts
        self.seconds, self.started, self.kept = 0.0, time.time(), time.time()
        self.loss = 0.0

    def restore(self) -> int:
        """The number of steps already made, 0 where no file is."""
        if not self.path.is_file():
            return 0
        state = torch.load(self.path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.seconds, self.loss = state["seconds"], state["loss"]
        log(f"{self.path}: goes on at step {state['step']}")
        return state["step"]

    def average(self, loss: float, decay: float = 0.99) -> None:
        """Add a step's loss to the running mean, which is kept with the rest."""
        self.loss = decay * self.loss + (1 - decay) * loss if self.loss else loss

    def elapsed(self) -> float:
        """Seconds of training, earlier runs included."""
        return self.seconds + time.time() - self.started

    def keep(self, step: int, *, now: bool = False) -> None:
        """Write the file if it is old; step: the number of steps made."""
        if not now and time.time() - self.kept < self.every:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": step, "generator": self.generator.get_state()}
        state |= {"seconds": self.elapsed(), "loss": self.loss}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".tmp")
        torch.save(state, fresh)
        os.replace(fresh, self.path)
        self.kept = time.time()
