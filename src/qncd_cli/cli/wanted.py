"""What calibrate and run are asked for: a configuration, or a model alone; where its run is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from ..config import model_card
from ..config.loading import load_config, resolved
from ..config.schema import Config
from ..config.shipped import find_shipped, split_widths
from ..config.widths import bits_overrides
from .starter import facts_of, name_of, starter_tree

NAMES = (
    *("config_name", "model", "bits", "effort", "prompts_file"),
    *("loras", "overrides", "run_dir"),
)
"""Names of the options that say what is wanted, without that of the prompts."""
_DEFAULT_BITS = "w4a8"
"""Widths of a model alone, and of a shipped configuration whose name says none."""


@dataclass(frozen=True)
class Wanted:
    """One of model and config_name is None. bits: like w4a8; prompts_file: instead of the
    configured prompts; prompts: of a text model that has none; loras: fused into the model;
    effort: instead of the configured one, with its trajectories."""

    config_name: str | None
    model: str | None = None
    bits: str | None = None
    prompts_file: str | None = None
    overrides: tuple[str, ...] = ()
    run_dir: str | None = None
    prompts: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    effort: str | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.config_name is None):
            raise click.UsageError("give either a model (MODEL) or a configuration (--config)")
        if self.model is not None and self._is_config(self.model):
            raise click.UsageError(f"{self.model} is a configuration: --config {self.model}")

    @staticmethod
    def _is_config(name: str) -> bool:
        if model_card.is_model(name):
            return False
        return name.endswith((".yaml", ".yml")) or find_shipped(name) is not None

    @property
    def folder(self) -> Path:
        """Where the run is, or is going to be: named after the configuration, or model and bits."""
        if self.run_dir is not None:
            return Path(self.run_dir)
        bits = (self.bits or _DEFAULT_BITS).lower()
        if self.model is not None:
            return Path("runs") / f"{name_of(self.model)}_{bits}"
        name = str(self.config_name)
        stem, (base, named) = Path(name).stem, split_widths(Path(name).stem)
        own_file = os.path.isfile(name) or find_shipped(name) is None
        if self.bits is None and (named is not None or own_file):
            return Path("runs") / stem
        return Path("runs") / f"{base}_{bits}"

    def config(self, download: Callable[[str], object] | None = None) -> Config:
        """download: brings a model of the hub that is not here. Raises ConfigError, ModelError."""
        overrides = bits_overrides(self.bits) if self.bits is not None else ()
        if self.effort is not None:
            overrides += (f"calibration.effort={self.effort}",)
        if self.prompts_file is not None:
            overrides += (f"sampling.prompts={json.dumps(self.prompts_file)}",)
        if self.loras:
            overrides += (f"model.lora={json.dumps(self.loras)}",)
        overrides += self.overrides
        if self.config_name is not None:
            return load_config(self.config_name, overrides, prompts=self.prompts, download=download)
        model = os.path.expanduser(str(self.model))
        missing = model_card.is_hub_id(model) and model_card.folder_of(model) is None
        if missing and download is not None:
            download(model)
        return resolved(
            self._tree(model), model, Path(), overrides, prompts=self.prompts, download=download
        )

    def _tree(self, model: str) -> dict[str, object]:
        """What `qncd init` would write, without its examples of prompts."""
        if model.startswith("random:"):
            return {"model": {"source": model}}
        assigned = dict(override.partition("=")[::2] for override in self.overrides)
        facts = facts_of(model, assigned.get("model.compvis_config"), assigned.get("model.base"))
        tree = starter_tree(facts)
        tree["sampling"].pop("prompts", None)
        return tree
