#!/usr/bin/env python
"""How far two sample sets of one run, drawn from the same seeds, are from each other.

    qncd sample --num 64 --no-compile --backend int8 --name integers
    qncd sample --num 64 --backend simulate --name simulated
    python scripts/agreement.py integers simulated

Two ways of computing one quantized model belong closer together than either of them and the
full-precision model.
"""

from __future__ import annotations

import click
import torch

from qncd_cli.cli.console import ErrorReportingCommand
from qncd_cli.errors import ConfigError
from qncd_cli.lineage.sample_set import read_set
from qncd_cli.metrics.tensor import psnr_db, sqnr_db, squared_errors
from qncd_cli.store.run_dir import find_run


@click.command(cls=ErrorReportingCommand)
@click.argument("first")
@click.argument("second")
@click.option("--run-dir", help="As of qncd eval.")
def main(first: str, second: str, run_dir: str | None) -> None:
    """Compare the sample sets FIRST and SECOND, by name."""
    run = find_run(run_dir)
    a, b = (read_set(run.samples(name)) for name in (first, second))
    if a.seeds != b.seeds:
        raise ConfigError(f"{first} and {second} have different seeds", "draw them alike")
    latents = [one.latents.of(one.seeds) for one in (a, b)]
    click.echo(f"images: PSNR {psnr_db(a.images, b.images):.1f} dB")
    click.echo(f"final latents: SQNR {sqnr_db(*latents):.1f} dB")
    equal = int((squared_errors(a.images, b.images) == 0).sum())
    same = "equal" if torch.equal(*latents) else "not equal"
    click.echo(f"{equal} of {len(a.images)} images are identical, the latents are {same}")


if __name__ == "__main__":
    main()
