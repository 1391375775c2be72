"""Another LoRA on a quantized run: a new run, in which only the layers it touches are new."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import launch
from ..config.loading import load_config
from ..config.lora_names import split_lora
from ..errors import ArtifactError, ConfigError
from ..lineage import freshness
from ..store.artifact_files import check_lineage
from ..store.files import check_place, write_sealed_json
from ..store.partial_folder import kept_phrase
from ..store.run_dir import RunDir, find_run
from .calibrate import keep_config
from .model import open_model
from .status import reported
from .watch import SILENT, Watch

KINDS = ("smoothing", "calibration", "quantized", "noise_stats")


@dataclass(frozen=True)
class Requantized:
    """run: the new one; layers: names of those that were rounded again, of how many; sqnr_db: of
    predictions to full precision with the LoRA; coverage, artifact_bytes: as of Quantized."""

    run: RunDir
    layers: tuple[str, ...]
    of: int
    sqnr_db: float
    artifact_bytes: int
    coverage: Mapping[str, Any]


def requantize(
    loras: Sequence[str],
    run_dir: str | Path | None = None,
    into: str | Path | None = None,
    *,
    device: str = "auto",
    force: bool = False,
    watch: Watch = SILENT,
) -> Requantized:
    """Quantize a run's model with these LoRAs in the place of its own.

    loras: FILE or FILE:WEIGHT each. run_dir: a quantized run, None for the current one; it stays as
    it is. into: the folder of the new run, by default that of the run with the first LoRA's name
    added. Layers whose weights the LoRAs leave alone keep their codes; the others are rounded again
    with the bits, factors and ranges that they had. force: replace a run that is there. A call that
    was interrupted goes on.

    Raises ArtifactError where the run is missing or does not hold, or where `into` is taken;
    ConfigError for roundings that are learnt by the block, and in a job of several processes;
    ModelError for a LoRA that does not fit.

    >>> requantize(["style.safetensors:0.8"], "runs/mine").run
    """
    if launch.count() > 1:
        raise ConfigError("--lora rounds a few layers, in one process", "start it without torchrun")
    base = find_run(None if run_dir is None else str(run_dir))
    config = load_config(str(base.config))
    wanted = load_config(str(base.config), [f"model.lora={json.dumps(list(loras))}"])
    stem = Path(split_lora(wanted.model.lora[0])[0]).stem
    beside = base.path.with_name(f"{base.path.name}-{stem}")
    made = RunDir(beside if into is None else Path(into))
    if made.path.resolve() == base.path.resolve():
        raise ArtifactError(f"{made.path}: is the run itself", "name another folder with --into")
    if made.config.is_file() and not force:
        raise ArtifactError(f"{made.path}: holds a run already", "--force replaces it")
    check_place(made.path, [made.tensors(kind).name for kind in KINDS])
    from ..runtime.ranks import of_job
    from ..stages import pipeline
    from ..stages import requantize as stage
    from ..store import artifacts

    found = {kind: artifacts.read(base.tensors(kind), kind) for kind in KINDS}
    stage.check(wanted, found["quantized"])
    ranks = of_job()
    model = open_model(config, ranks.device(device), base.path, watch)
    _check(config, model.digest, found)
    before = stage.layer_digests(model.denoiser)
    del model
    model = open_model(wanted, ranks.device(device), made.path, watch)
    origin = {kind: artifact.digest for kind, artifact in found.items()}
    with ExitStack() as stack:
        stack.enter_context(ranks.locked(made.path, watch.note))
        watch = stack.enter_context(reported(made.path, "quantize", watch))
        stack.enter_context(watch.keeping(lambda: kept_phrase(made.path, "quantize")))
        of_stage = made, wanted, model, origin, watch.note, ranks
        with pipeline.kept("quantize", *of_stage) as partial:
            result = stage.run(wanted, model, found, before, watch.track, partial)
            for kind in ("smoothing", "calibration", "quantized"):
                artifacts.write(made.tensors(kind), getattr(result, kind))
            write_sealed_json(made.coverage, result.coverage)
            artifacts.write(made.tensors("noise_stats"), result.noise_stats)
            keep_config(made, wanted)
            for name in ("calibrate", "quantize"):
                freshness.note_settings(made, name, wanted)
    return Requantized(
        made,
        result.layers,
        len(result.quantized.body["layers"]),
        result.sqnr_db,
        made.tensors("quantized").stat().st_size,
        result.coverage,
    )


def _check(config: Any, model: str, found: Mapping[str, Any]) -> None:
    """Raises ArtifactError unless the run's artifacts are of this model and belong together."""
    smoothing, calibration = found["smoothing"], found["calibration"]
    first, second = config.stage_digest("calibrate"), config.stage_digest("quantize")
    check_lineage(smoothing, config=first, model=model)
    parents = {"smoothing": smoothing.digest}
    check_lineage(calibration, config=first, model=model, parents=parents)
    parents["calibration"] = calibration.digest
    check_lineage(found["quantized"], config=second, model=model, parents=parents)
