"""The command bench: one model's denoiser, full precision beside quantized."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.loading import load_config, parse_config
from ..config.schema import Config
from ..errors import ModelError
from ..store import files
from .console import Console
from .shared import open_model

FILES = ("bench.json", "bench.md")
"""What is written."""


@dataclass(frozen=True)
class BenchOptions:
    """One of source and config_name is None."""

    source: str | None
    config_name: str | None
    rows: str
    batch_size: int
    rounds: int
    memory: bool
    profile: bool
    out: str | None


def bench(console: Console, options: BenchOptions) -> None:
    from ..bench import rendering, table
    from ..bench.row import parse_rows

    if options.config_name is not None:
        config, name = load_config(options.config_name), Path(options.config_name).stem
    else:
        config = parse_config({"model": {"source": options.source}}, "bench")
        name = re.sub(r"[^\w.-]+", "-", config.model.source).strip("-.") or "model"
    if config.sampling.control is not None:
        raise ModelError(
            "bench times a denoiser from its own file, and a U-Net with its ControlNet has none",
            "leave sampling.control out, with the pipeline's U-Net alone",
        )
    names = [part.strip().lower() for part in options.rows.split(",") if part.strip()]
    request = table.BenchRequest(
        parse_rows(names, config.model.dtype),
        options.batch_size,
        options.rounds,
        options.memory,
        options.profile,
    )
    folder = Path(options.out) if options.out else Path("runs") / f"bench_{name}"
    files.check_place(folder, FILES)
    model = open_model(_in_float32(config), "cpu")
    report = table.run(config, model, request, _teller(), console.track)
    table_file, page = (folder / name for name in FILES)
    files.write_sealed_json(table_file, report)
    files.write_bytes(page, rendering.markdown(report, f"Bench of {name}").encode())

    def render() -> None:
        tables(console, report)
        for line in rendering.missing(report):
            print(line)
        print(rendering.conditions(report))
        print(f"bench: done in {report['seconds']:.1f} s, {page}")

    console.result({**report, "out": str(folder)}, render)


def tables(console: Console, report: Mapping[str, Any]) -> None:
    """Print the rows of a report, and where their time goes where that was measured."""
    from ..bench import rendering

    found = [list(line.values()) for line in rendering.cells(report)]
    console.table(rendering.COLUMNS, found)
    if report["profile"]:
        shares = [list(line.values()) for line in rendering.profile_cells(report)]
        console.table(rendering.profile_columns(report), shares)


def _in_float32(config: Config) -> Config:
    """All rows are made from the model in float32, whatever quantized rows leave in between."""
    tree = config.to_dict()
    tree["model"]["dtype"] = "float32"
    return parse_config(tree, "bench")


def _teller() -> Callable[[str], None]:
    """Remarks on stderr; silent when that is no terminal."""
    if not sys.stderr.isatty():
        return lambda line: None
    return lambda line: print(line, file=sys.stderr, flush=True)
