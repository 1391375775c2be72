"""The command ablate: a table of variants of one configuration."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.loading import load_config
from ..runs.measuring import Wishes, protocol_of, settle
from ..store.files import write_bytes
from ..store.lock import locked
from .console import Console, keeping
from .shared import explain, open_model

TERMINAL = (
    *("feature_distance_to_reference", "feature_distance_to_full", "class_agreement"),
    *("sqnr_latents_db", "sqnr_gain_db", "psnr_db", "psnr_median_db", "changed", "bytes"),
)
"""What the terminal shows of a row; files have the rest."""


@dataclass(frozen=True)
class AblateOptions:
    config_name: str
    overrides: tuple[str, ...]
    presets: str
    bits: str | None
    num: int | None
    batch_size: int | None
    published: bool
    backend: str
    reference: str | None
    network: str
    inception_weights: str | None
    run_dir: str | None
    device: str
    force: bool


def ablate(console: Console, options: AblateOptions) -> None:
    from ..ablation import rendering, strips, table
    from ..ablation.variants import named, variants

    config = load_config(options.config_name, options.overrides)
    rows = variants(
        options.config_name,
        named(_listed(options.presets)),
        _listed(options.bits or ""),
        options.overrides,
        published=options.published,
    )
    name = Path(options.config_name).stem
    folder = Path(options.run_dir) if options.run_dir else Path("runs") / f"ablate_{name}"
    count = options.num or config.evaluation.num_samples
    request = table.AblateRequest(folder, count, options.batch_size, options.force, options.backend)
    wishes = Wishes((), options.reference, options.network, options.inception_weights)
    protocol = protocol_of(wishes, config)
    model = open_model(config, options.device, folder)
    kept = "finished rows are kept, the same command goes on with the next"
    with keeping(kept), locked(folder, console.note):
        measured = table.run(rows, model, request, protocol, _teller(), console.track)
    title = f"Variants of {name}"
    page = folder / "ablation.html"
    shown = strips.strips(request, rows, model)
    write_bytes(folder / "ablation.md", rendering.markdown(measured, title).encode())
    write_bytes(page, rendering.html(measured, title, shown, folder).encode())

    def render() -> None:
        lines = rendering.cells(measured, TERMINAL)
        cells = [list(line.values()) for line in lines]
        console.table(list(lines[0]), cells, _caption(measured), keys=2)
        explain(lines[0])
        print(f"ablate: done in {console.lap():.1f} s, {page}")

    console.result({**measured, "run_dir": str(folder)}, render)
    settle(console.note, measured["protocol"]["left_out"], wishes)


def _listed(text: str) -> list[str]:
    return [part.strip().lower() for part in text.split(",")] if text else []


def _teller() -> Any:
    """Lines about rows on stderr; silent when that is no terminal."""
    if not sys.stderr.isatty():
        return lambda line: None
    return lambda line: print(line, file=sys.stderr, flush=True)


def _caption(table: dict[str, Any]) -> str:
    protocol = table["protocol"]
    text = f"{protocol['num_samples']} samples, same seeds"
    if not protocol["network"]:
        return text
    return f"{text}; distances in the features of {protocol['network']}"
