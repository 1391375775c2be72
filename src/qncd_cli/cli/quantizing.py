"""The command quantize."""

from __future__ import annotations

import click

from . import options
from .console import Console


@click.command(
    epilog="\b\nExamples:\n  qncd quantize\n"
    "  qncd quantize --set quantization.weights.rounding=nearest\n"
    "  qncd quantize --bits w4a6\n"
    "  qncd quantize --budget 4.5\n"
    "  qncd quantize --reuse 0.5\n"
    "  qncd quantize --run-dir runs/mine --lora style.safetensors:0.8 --into runs/mine-style"
)
@click.option(
    "--bits",
    metavar="W4A8",
    help="Bits of weights and activations (default: as calibrate was told).",
)
@click.option(
    "--budget",
    type=float,
    metavar="BITS",
    help="Average bits of the quantized weights; each layer gets 2, 3, 4, 6 or 8 of them by its "
    "measured sensitivity.",
)
@click.option(
    "--reuse",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
    help="Share of the MACs that sampling computes: a plan of what earlier steps have is made.",
)
@click.option(
    "--lora",
    "loras",
    metavar="FILE[:WEIGHT]",
    multiple=True,
    help="Of a quantized run: the model with this LoRA instead of the run's own, as a new run; "
    "only layers that it touches are rounded again. May be repeated.",
)
@click.option(
    "--into",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="With --lora: the new run (default: the run's folder with the LoRA's name added).",
)
@options.overrides
@options.run_dir
@options.device
@options.force("Quantize again although nothing has changed.")
@options.plan
@options.profile
@options.json_output
def quantize(
    bits, budget, reuse, loras, into, overrides, run_dir, device, force, plan, profile, as_json, **_
):
    """Round the weights to integers, set activation ranges, measure the quantization noise."""
    from ..config.widths import bits_overrides
    from . import commands
    from . import plan as planning

    if loras:
        others = {
            "--bits": bits,
            "--budget": budget,
            "--reuse": reuse,
            "--set": overrides,
            "--plan": plan,
        }
        if given := [name for name, value in others.items() if value]:
            raise click.UsageError(f"--lora keeps the run's settings: leave {given[0]} out")
        commands.requantize(Console(as_json), loras, run_dir, into, device, force=force)
        return
    if into is not None:
        raise click.UsageError("--into is for --lora")
    if bits is not None:
        overrides = (*bits_overrides(bits), *overrides)
    for key, value in (("quantization.weights.budget", budget), ("sampling.reuse", reuse)):
        overrides = overrides if value is None else (*overrides, f"{key}={value}")
    if plan:
        planning.of_run(Console(as_json), run_dir, overrides, ("quantize",), device)
        return
    console = Console(as_json)
    commands.quantize(console, overrides, run_dir, device, force=force, profile=profile)


COMMANDS = (quantize,)
