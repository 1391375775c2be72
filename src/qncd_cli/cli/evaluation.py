"""The command eval: measure sample sets."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..metrics.record import METRICS
from ..metrics.rows import short_name
from ..report.headline import head_table, verdict, way_out
from ..runs.evaluate import Evaluated
from ..runs.evaluate import evaluate as evaluate_run
from ..runs.measuring import Wishes, protocol_of_images, settle
from ..vocabulary import cell, interval
from .console import Console
from .pictures import show_picture
from .shared import explain, watching, wrapped


@dataclass(frozen=True)
class EvalOptions:
    fid: bool
    sfid: bool
    fid_infinity: bool
    isc: bool
    kid: bool
    prc: bool
    cvvdp: bool
    lpips: bool
    clip: str | None
    reference: str | None
    network: str
    inception_weights: str | None
    skip_broken: bool = False
    lpips_weights: str | None = None
    images: str | None = None
    name: str = "quantized"
    run_dir: str | None = None
    device: str = "auto"
    show: bool = False

    @property
    def wishes(self) -> Wishes:
        named = tuple(name for name in METRICS if getattr(self, name))
        features = (self.reference, self.network, self.inception_weights)
        return Wishes(named, *features, self.skip_broken, self.lpips_weights, self.clip)


def evaluate(console: Console, options: EvalOptions) -> None:
    if options.images is not None:
        from ..stages import evaluate as stage

        protocol = protocol_of_images(options.wishes)
        metrics = stage.measure_images(
            Path(options.images), protocol, console.track, skip_broken=options.skip_broken
        )
        title = f"{metrics['protocol']['num_samples']} images"
        for check in metrics["checks"]:
            console.note(check["says"])
        console.result(metrics, lambda: render(console, metrics, title))
        settle(console.note, metrics["protocol"]["left_out"], options.wishes)
        return
    evaluate_run(
        options.run_dir,
        metrics=options.wishes.named,
        reference=options.reference,
        network=options.network,
        inception_weights=options.inception_weights,
        skip_broken=options.skip_broken,
        lpips_weights=options.lpips_weights,
        clip=options.clip,
        name=options.name,
        device=options.device,
        command=shlex.join(["qncd", *sys.argv[1:]]),
        watch=watching(console),
        show=lambda done: _show(console, options, done),
    )


def _show(console: Console, options: EvalOptions, done: Evaluated) -> None:
    metrics = done.metrics
    how = "unchanged, skipped" if done.skipped else f"done in {console.lap():.1f} s"

    def show() -> None:
        print(wrapped(verdict(metrics, short_name(done.model))))
        if advice := way_out(metrics):
            print(wrapped(advice))
        title = f"{metrics['protocol']['num_samples']} samples, same seeds"
        render(console, metrics, title, done.bench)
        if options.show:
            show_picture(done.pairs)
        print(f"eval: {how}, {done.report}")

    console.result({**metrics, "run_dir": str(done.run.path)}, show)


def render(
    console: Console, metrics: Mapping[str, Any], title: str, bench: Mapping[str, Any] | None = None
) -> None:
    """Print what was measured, and what its words mean."""
    head = head_table(metrics, bench=bench)
    cells = [
        [name, *(f"{number.text} {number.range}".rstrip() for number in row)]
        for name, row in head.rows
    ]
    console.table(["", *head.columns], cells, title)
    _print_pairs(metrics.get("fidelity") or {})
    explain(label for label, _ in head.rows)


def _print_pairs(fidelity: Mapping[str, Any]) -> None:
    """The worst seeds, and what quantization adds to each number of a set."""
    worst, per_seed = fidelity.get("worst_seeds") or [], fidelity.get("per_seed") or {}
    if worst:
        said = (f"{seed} ({cell('psnr_db', per_seed['psnr_db'][str(seed)])})" for seed in worst)
        print(f"worst seeds, PSNR in dB: {', '.join(said)}")
    for key, change in (fidelity.get("changes") or {}).items():
        print(f"{key.replace('_', ' ')}, quantized minus full precision: {interval(change)}")
