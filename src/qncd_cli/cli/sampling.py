"""The command sample: draw what is missing of a set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.loading import load_config, parse_config
from ..config.own_settings import place_of
from ..config.schema import Config
from ..config.start_images import read_inputs
from ..errors import ConfigError
from ..runs.merge import merge as merge_run
from ..runs.sample import DEFAULT_NUM, Sampled, check_settled
from ..runs.sample import sample as sample_run
from ..spec import Compile
from ..store.run_dir import find_run
from .console import Console
from .pictures import show_picture
from .shared import done, watching


@dataclass(frozen=True)
class SampleOptions:
    steps: int | None
    num: int | None
    seed: int | None
    classes: str | None
    prompts: tuple[str, ...]
    batch_size: int | None
    scheduler: str | None = None
    eta: float | None = None
    guidance: float | None = None
    inter: str | None = None
    full_precision: bool = False
    backend: str = "auto"
    compile: Compile = Compile.WHERE_IT_PAYS
    low_memory: bool = False
    name: str | None = None
    overrides: tuple[str, ...] = ()
    run_dir: str | None = None
    device: str = "auto"
    force: bool = False
    show: bool = False
    shard: str | None = None
    format: str = "png"
    images: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    lora_branch: tuple[str, ...] = ()
    strength: float | None = None


def sampling_config(config: Config, options: SampleOptions) -> Config:
    """The run's configuration with the command line's wishes for this one set."""
    tree = config.to_dict()
    sampling = tree["sampling"]
    wishes = {
        "steps": options.steps,
        "seed": options.seed,
        "scheduler": options.scheduler,
        "eta": options.eta,
        "guidance_scale": options.guidance,
        "strength": options.strength,
    }
    sampling.update({key: value for key, value in wishes.items() if value is not None})
    if options.classes is not None:
        sampling["classes"] = _parse_classes(options.classes)
    if options.prompts:
        sampling["prompts"] = list(options.prompts)
    if options.images or options.masks:
        sampling["images"] = list(options.images) or sampling["images"]
        sampling["masks"] = list(options.masks) or (None if options.images else sampling["masks"])
        sampling["inputs"] = None
    if options.control:
        sampling["control"], sampling["inputs"] = list(options.control), None
    if options.lora_branch:
        sampling["lora_branch"], sampling["inputs"] = list(options.lora_branch), None
    read_inputs(sampling, lambda name: place_of(name, Path()))
    if options.inter is not None:
        tree["correction"]["inter"]["method"] = options.inter
    groups = tree["quantization"]["activations"]
    steps = int(sampling["steps"] * (sampling["strength"] or 1))
    groups["timestep_groups"] = max(1, min(groups["timestep_groups"], steps))
    return parse_config(tree, "sample")


def _parse_classes(text: str) -> str | list[int]:
    if text == "all":
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--classes {text}: expected numbers with commas between them, or all"
        ) from error


def sample(console: Console, options: SampleOptions) -> Path:
    run = find_run(options.run_dir)
    config = load_config(str(run.config))
    if options.overrides:
        own, config = config, load_config(str(run.config), options.overrides)
        check_settled(own, config, "--set")
    made = sample_run(
        options.run_dir,
        sampling_config(config, options),
        num=options.num or DEFAULT_NUM,
        batch_size=options.batch_size,
        name=options.name,
        full_precision=options.full_precision,
        backend=options.backend,
        compile=options.compile,
        low_memory=options.low_memory,
        device=options.device,
        force=options.force,
        shard=options.shard,
        format=options.format,
        watch=watching(console),
    )
    _show(console, "sample", made)
    if options.show and not console.as_json:
        show_picture(made.contact_sheet)
    return made.folder


def merge(console: Console, run_dir: str | None, **options: Any) -> None:
    _show(console, "merge", merge_run(run_dir, **options, watch=watching(console)))


def _show(console: Console, stage: str, made: Sampled) -> None:
    rate: dict[str, Any] = {}
    if made.drawn:
        rate = {"images_per_second": made.drawn / made.seconds}
    packed: dict[str, Any] = {}
    if made.packed not in (None, made.folder):
        packed = {"packed": str(made.packed)}
    done(
        console,
        stage,
        made.run,
        images=len(made.seeds),
        **rate,
        folder=str(made.folder),
        **packed,
        contact_sheet=str(made.contact_sheet),
        skipped=made.skipped,
    )
