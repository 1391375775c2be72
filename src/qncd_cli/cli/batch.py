"""The commands of batch jobs: options and help. Heavy imports are inside of them."""

from __future__ import annotations

import click

from . import options
from .console import Console


@click.command(
    epilog="\b\nExamples:\n  qncd sample --num 1000 --shard 1/2\n"
    "  qncd sample --num 1000 --shard 2/2\n  qncd merge\n"
    "  qncd merge --run-dir runs/mine --name full"
)
@options.set_name("Which sample set.", "quantized")
@options.set_format
@options.run_dir
@options.force("Replace a set that was drawn with other settings.")
@options.json_output
def merge(run_dir, as_json, debug, **names):
    """Join the shards of a sample set, which becomes the one that one process draws.

    Refused, with the shard's name, where one is missing, unfinished or drawn with other settings.
    """
    from . import sampling

    sampling.merge(Console(as_json), run_dir, **names)


COMMANDS = (merge,)
