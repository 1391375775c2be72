"""What the commands do: call a stage on its run directory, and render the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..config.loading import load_config
from ..metrics.embeddings import sentence_of_encoders
from ..phases import Phases
from ..runs.calibrate import calibrate as calibrate_run
from ..runs.measuring import check
from ..runs.model import model_digest
from ..runs.quantize import quantize as quantize_run
from ..runs.requantize import requantize as requantize_run
from ..store.run_dir import RunDir, find_run, set_current
from ..vocabulary import megabytes
from . import states
from .console import Console
from .evaluation import EvalOptions, evaluate
from .reuse import picture
from .sampling import SampleOptions, sample
from .shared import done, download, watching
from .wanted import Wanted

DRAWING = (
    *("steps", "num", "seed", "classes", "prompts", "batch_size", "backend"),
    *("images", "masks", "control", "strength"),
)
"""Options of `run` that say what to sample."""


# ------------------------------------------------------------------ calibrate


def calibrate(
    console: Console,
    wanted: Wanted,
    device: str,
    *,
    force: bool,
    dry_run: bool = False,
    profile: bool = False,
) -> RunDir:
    config = wanted.config(None if dry_run else download)
    if dry_run:
        console.result({"config": config.to_dict()}, lambda: print(config.to_yaml(), end=""))
        return RunDir(wanted.folder)
    phases = Phases(console.track) if profile else None
    watch = watching(console, phases)
    made = calibrate_run(config, wanted.folder, device=device, force=force, watch=watch)
    set_current(made.run)
    done(
        console,
        "calibrate",
        made.run,
        phases,
        rows=made.rows,
        layers=made.layers,
        skipped=made.skipped,
        **states.described(made.state, force=force),
    )
    return made.run


# ------------------------------------------------------------------ quantize


def quantize(
    console: Console,
    overrides: Sequence[str],
    run_dir: str | None,
    device: str,
    *,
    force: bool,
    profile: bool = False,
) -> None:
    config = load_config(str(find_run(run_dir).config), overrides) if overrides else None
    phases = Phases(console.track) if profile else None
    watch = watching(console, phases)
    made = quantize_run(run_dir, config, device=device, force=force, watch=watch)
    coverage = made.coverage
    size = made.artifact_bytes + coverage["rest_bytes"]
    plan = {} if made.reuse is None else {"reuse": _reuse(made.reuse)}
    if (decoder := made.first_stage) is not None:
        share = decoder["integer_macs"] / decoder["macs"]
        plan["first_stage"] = {"integer_macs_share": share, "macs": decoder["macs"]}
    if (encoders := made.text_encoders) is not None:
        known = ("bits", "bytes", "float_bytes", "prompts", "fidelity")
        plan["text_encoders"] = {key: encoders[key] for key in known}
    done(
        console,
        "quantize",
        made.run,
        phases,
        bytes=size,
        artifact_bytes=made.artifact_bytes,
        share_of_float32=size / coverage["float_denoiser_bytes"],
        integer_macs_share=coverage["integer_macs_share"],
        average_weight_bits=coverage["average_weight_bits"],
        mean_weight_bits=coverage["mean_weight_bits"],
        mean_input_bits=coverage["mean_input_bits"],
        skipped=made.skipped,
        **states.described(made.state, force=force),
        **plan,
    )
    if made.reuse is not None and not console.as_json:
        print(*picture(made.reuse), sep="\n")
    if encoders is not None and not console.as_json:
        sizes = f"{megabytes(encoders['bytes'])}, in float32 {megabytes(encoders['float_bytes'])}"
        print(f"{sentence_of_encoders(encoders)} ({sizes})")


def _reuse(body: Mapping[str, Any]) -> dict[str, Any]:
    """What the JSON says of a plan of reuse."""
    return {key: body[key] for key in ("share", "chains", "kept", "correction")}


def requantize(
    console: Console,
    loras: Sequence[str],
    run_dir: str | None,
    into: str | None,
    device: str,
    *,
    force: bool,
) -> None:
    """A quantized run's model with other LoRAs, as the run that later commands find."""
    made = requantize_run(loras, run_dir, into, device=device, force=force, watch=watching(console))
    set_current(made.run)
    console.note(
        f"{made.run.path}: factors and ranges are those found without the LoRA; "
        "qncd verify holds its images against full precision's"
    )
    done(
        console,
        "quantize",
        made.run,
        artifact_bytes=made.artifact_bytes,
        requantized_layers=len(made.layers),
        quantized_layers=made.of,
        sqnr_predictions_db=made.sqnr_db,
    )


# ------------------------------------------------------------------ all four


def run_all(
    console: Console, wanted: Wanted, device: str, *, force: bool, options: dict[str, Any]
) -> None:
    """The four commands one after the other; with --json only the last one's object.

    What is unchanged and what is done again, and why, is said before anything is written.
    """
    from .plan import announce

    config, planned = wanted.config(download), RunDir(wanted.folder)
    measuring = {k: v for k, v in options.items() if k not in DRAWING}
    check(EvalOptions(**measuring).wishes, config)
    digest = model_digest(config)
    plan = {}
    if digest is not None:
        sampled = planned.samples(options["name"])
        plan = states.plan(console, planned, config, digest, sampled, force=force)
    drawing = {name: options[name] for name in DRAWING}
    announce(console, config, planned.path, drawing, force=force)
    stages = _OneAfterTheOther(console.as_json)
    run = calibrate(stages, wanted, device, force=force)
    where = str(run.path)
    quantize(stages, (), where, device, force=force)
    name = options["name"]
    sample(stages, SampleOptions(**drawing, name=name, run_dir=where, device=device, force=force))
    stages.more = {"stages": plan}
    evaluate(stages, EvalOptions(**measuring, run_dir=where, device=device))


class _OneAfterTheOther(Console):
    """A console of stages that were announced: people read all results, programs the last one's.

    more: what belongs to that beside the last stage's own; None before it.
    """

    announced = True
    more: dict[str, Any] | None = None

    def result(self, payload: dict[str, Any], render: Callable[[], None]) -> None:
        if not self.as_json or self.more is not None:
            super().result({**payload, **(self.more or {})}, render)
