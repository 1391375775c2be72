"""The option --plan of the stages: what a configuration takes, before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.loading import load_config
from ..config.schema import Config
from ..errors import ModelError
from ..resident import peak_of_process
from ..runs.measuring import Wishes, check
from ..runs.model import model_digest, silence_diffusers
from ..runs.quantize import check_parents
from ..runs.sample import DEFAULT_NUM, check_settled
from ..spec import FLOAT_BITS
from ..store.run_dir import RunDir, find_run
from ..vocabulary import megabytes
from .console import Console
from .progress import duration
from .sampling import SampleOptions, sampling_config
from .wanted import Wanted

STAGES = ("calibrate", "quantize", "sample")


def of_config(
    console: Console,
    wanted: Wanted,
    stages: tuple[str, ...],
    drawing: dict[str, Any] | None = None,
    measuring: Wishes | None = None,
    device: str = "cpu",
) -> None:
    """Print a forecast of stages from the first on. drawing: sampling options, None: defaults.

    measuring: what eval is told, which is checked as the stages check it; device: where they are to
    run.
    """
    options = SampleOptions(**{**_DEFAULTS, **(drawing or {}), "device": device})
    config, count = wanted.config(), options.num or DEFAULT_NUM
    config.check_sizes()
    if measuring is not None:
        check(measuring, config)
    _forecast(console, config, options, wanted.folder, stages, count)


def announce(
    console: Console, config: Config, folder: Path, drawing: dict[str, Any], *, force: bool
) -> None:
    """Say what run is going to draw and, where stages before that are still to be done or done
    again, roughly how long each takes."""
    options = SampleOptions(**{**_DEFAULTS, **drawing})
    count, sampling = options.num or DEFAULT_NUM, sampling_config(config, options).sampling
    first = sampling.seed
    console.note(
        f"{folder}: {count} images (seeds {first} to {first + count - 1}) of "
        f"{sampling.steps} {sampling.scheduler} steps, guidance {sampling.guidance_scale:g}, and "
        "the same in full precision to compare with; --num draws more or fewer"
    )
    run = RunDir(folder)
    begun = run.config.is_file() and run.config.read_text(encoding="utf-8") == config.to_yaml()
    if begun and run.coverage.is_file() and not force:
        return
    try:
        report = _report(config, options, folder, STAGES, count)
    except ModelError:
        return  # no reason not to run: its stages say what is wrong, if anything is
    times = ", ".join(f"{s['stage']} {duration(s['seconds'])}" for s in report["stages"])
    console.note(
        f"roughly, at {config.calibration.effort} effort, uncompiled and on the CPU: {times} "
        "(--plan says more)"
    )


def of_run(
    console: Console,
    run_dir: str | None,
    overrides: Sequence[str],
    stages: tuple[str, ...],
    device: str,
) -> None:
    """Print a forecast of quantize, and what else is named, in a run that is calibrated."""
    run = find_run(run_dir)
    config = load_config(str(run.config), overrides)
    check_parents(run, config, model_digest(config))
    options = SampleOptions(**_DEFAULTS, device=device)
    _forecast(console, config, options, run.path, stages, DEFAULT_NUM)


def of_samples(console: Console, options: SampleOptions) -> None:
    run = find_run(options.run_dir)
    config = load_config(str(run.config), options.overrides)
    check_settled(load_config(str(run.config)), config, "--set")
    _forecast(console, config, options, run.path, ("sample",), options.num or DEFAULT_NUM)


_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("steps", "num", "seed", "classes", "batch_size")),
    "prompts": (),
}


def _forecast(
    console: Console,
    config: Config,
    options: SampleOptions,
    folder: Path,
    stages: tuple[str, ...],
    count: int,
) -> None:
    """Print the forecast; raises BackendUnavailable where it says that it will not fit."""
    from ..forecast import plan as forecast

    report = _report(config, options, folder, stages, count)
    console.result(report, lambda: _render(console, report))
    forecast.check(report)


def _report(
    config: Config, options: SampleOptions, folder: Path, stages: tuple[str, ...], count: int
) -> dict[str, Any]:
    from ..forecast import plan as forecast
    from ..forecast.shapes import model_shapes
    from ..models.loading import DTYPES, find_device

    silence_diffusers()
    imports = peak_of_process()
    model = config.model
    sampling = sampling_config(config, options)
    shapes = model_shapes(
        model.source,
        DTYPES[model.dtype],
        compvis_config=model.compvis_config,
        base=model.base,
        prompts=len(config.sampling.prompts or ()),
        image_size=config.sampling.sides,
        text=config.text_encoders.bits is not None,
        sizes=config.calibration.sizes or (),
    )
    request = forecast.Request(
        stages,
        sampling,
        count,
        options.batch_size,
        options.backend,
        folder,
        imports,
        device=find_device(options.device),
    )
    return forecast.run(config, shapes, request)


def _render(console: Console, report: dict[str, Any]) -> None:
    covered, result = report["coverage"], report["result"]
    rows = covered["layers"]
    layers = [row for row in rows if row["kind"] != "matmul"]
    products = [row for row in rows if row["kind"] == "matmul"]
    bits, encoders = result["average_weight_bits"], report["text_encoders_bytes"]
    console.table(
        ["plan", ""],
        [
            ["parameters", report["parameters"]],
            ["layers", _quantized(layers)],
            ["products of attention", _quantized(products)],
            ["MACs of one call on one sample", covered["macs"]],
            ["of these in integers", f"{100 * covered['integer_macs_share']:.2f} %"],
            ["bits of a quantized weight, on average", None if bits is None else f"{bits:.2f}"],
            ["bits of weights and inputs, mean over MACs", _mean_bits(covered, result)],
            *_extra_bits(result),
            ["result", megabytes(result["bytes"])],
            ["of these quantized weights", megabytes(result["weight_bytes"])],
            ["of these left unquantized", megabytes(result["rest_bytes"])],
            ["of float32", f"{100 * result['share_of_float32']:.1f} %"],
            *([["text encoders", megabytes(encoders)]] if encoders else []),
        ],
        report["source"],
    )
    console.table(
        ["stage", "peak memory", "reached while", "fits", "disk, at most", "time, roughly"],
        [
            [
                stage["stage"],
                _memory(stage["peak_bytes"]),
                stage["at"],
                "yes" if stage["fits"] else "no",
                _memory(stage["disk_bytes"]),
                duration(stage["seconds"]),
            ]
            for stage in report["stages"]
        ],
    )
    free, on_cpu = report["available"], report["device"] == "cpu"
    device = "the CPU" if on_cpu else report["device"]
    there = "" if on_cpu else f"{_memory(free['device'])} on {device}, "
    print(
        f"{report['samples']:,} samples, {report['batch_size']} at once, on {device} with backend "
        f"{report['backend']}, uncompiled. Available: {_memory(free['memory'])} of memory, {there}"
        f"{_memory(free['disk'])} of disk.\n"
        "Times are rough: from MACs and the rate that this machine's CPU reached just now."
    )
    mapped = max(stage["mapped_bytes"] for stage in report["stages"])
    if mapped:
        print(
            f"Of the memory, up to {_memory(mapped)} are the model's own files, mapped: where "
            "memory is short the system gives them up and reads them again."
        )


def _mean_bits(covered: dict[str, Any], result: dict[str, Any]) -> str:
    means = f"{covered['mean_weight_bits']:.1f} / {covered['mean_input_bits']:.1f}"
    return f"{means} before extra bits" if _extra_bits(result) else means


def _extra_bits(result: dict[str, Any]) -> list[list[str]]:
    """Rows of the table where sensitive layers get bits of their own."""
    weight, inputs = result["extra_weight_bits"], result["extra_input_bits"]
    rows = []
    if weight:
        rows.append(["extra weight bits, mean over weights", f"{weight:+.2f}"])
    if inputs:
        rows.append(["extra input bits, mean over MACs", f"at most {inputs:.2f}"])
    return rows


def _quantized(rows: list[dict[str, Any]]) -> str:
    integer = sum(row["integer"] for row in rows)
    layers = [row for row in rows if row["kind"] != "matmul" and not row["integer"]]
    alone = sum(row["weight_bits"] < FLOAT_BITS for row in layers)
    weights = f"{alone} in their weights alone, " if alone else ""
    return f"{integer} quantized, {weights}{len(rows) - integer - alone} left in float"


def _memory(size: int | None) -> str:
    return "unknown" if size is None else megabytes(size)
