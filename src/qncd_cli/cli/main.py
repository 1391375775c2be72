"""The qncd command: options and help of the pipeline; other commands are in modules of their own.

Everything heavy is imported inside the commands.
"""

from __future__ import annotations

import click

from .. import __version__
from ..vocabulary import sentences
from . import batch, judging, options, quantizing, tools
from .console import Console, ErrorReportingGroup

EPILOG = """\b
The pipeline, one stage after the other:
  qncd calibrate --config fashion_ldm --bits w4a8
  qncd quantize
  qncd sample --steps 20 --num 64
  qncd eval --fid

\b
Or all four:
  qncd run --config fashion_ldm --bits w4a8

\b
Your own model, a diffusers folder:
  qncd run models/my-model --bits w4a8 --prompts prompts.txt
  qncd export --to diffusers exported/my-model

\b
Exit codes: 0 done, 2 usage, 3 configuration, 4 artifact or file, 5 model, 6 backend or hardware,
7 images at fault (verify), 1 what nobody foresaw (please report the line),
130, 143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP (the line says what is kept).
"""


@click.group(
    cls=ErrorReportingGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="qncd")
def cli() -> None:
    """Make diffusion models small by post-training quantization, and measure what was lost.

    Each stage reads the artifacts of the one before from a run directory (runs/<config name>) and
    is skipped when its outputs are there and its inputs are unchanged.
    """


@cli.command(
    epilog="\b\nExamples:\n  qncd calibrate --config fashion_ldm --bits w4a8\n"
    "  qncd calibrate --config my.yaml --set calibration.trajectories=256\n"
    "  qncd calibrate --config my.yaml --dry-run\n"
    "  qncd calibrate stable-diffusion-v1-5 --prompts prompts.txt --lora style.safetensors:0.8\n"
    "  qncd calibrate --config ldm4 --set model.source=random:ldm4 --plan"
    + sentences("intra noise", "inter noise")
)
@options.wanted
@options.overrides
@options.run_dir
@options.device
@options.force("Calibrate again although nothing has changed.")
@click.option("--dry-run", is_flag=True, help="Check and print the configuration, run nothing.")
@options.plan
@options.profile
@options.json_output
def calibrate(device, force, dry_run, plan, profile, as_json, debug, **names):
    """Collect calibration inputs, activation statistics and smoothing factors.

    MODEL (instead of --config): a diffusers folder, hub id, zoo:NAME or checkpoint, with the
    configuration that "qncd init MODEL" would write.
    """
    from . import commands
    from . import plan as planning
    from .wanted import Wanted

    wanted = Wanted(**names)
    if plan:
        planning.of_config(Console(as_json), wanted, planning.STAGES[:2], device=device)
        return
    commands.calibrate(
        *(Console(as_json), wanted, device), force=force, dry_run=dry_run, profile=profile
    )


@cli.command(
    epilog="\b\nExamples:\n  qncd sample --steps 20 --num 64\n"
    "  qncd sample --classes 3,7 --num 16 --name dresses_and_sneakers\n"
    "  qncd sample --full-precision --num 64\n"
    "  qncd sample --steps 50 --inter none --name steps50\n"
    "  qncd sample --low-memory --batch-size 1"
)
@options.sampling
@click.option(
    "--scheduler",
    metavar="NAME",
    help="ddim, ddpm, pndm, plms, dpmsolver++, euler, ... (default: the configuration's).",
)
@click.option(
    "--eta",
    type=click.FloatRange(0, 1),
    help="Stochasticity of DDIM (default: the configuration's).",
)
@click.option(
    "--guidance",
    type=click.FloatRange(0, 100),
    help="Classifier-free guidance (default: the configuration's).",
)
@click.option(
    "--inter",
    type=click.Choice(["none", "runtime", "ptqd", "affine", "stepwise"]),
    help="Correction of the noise that accumulates over the steps (default: the configuration's).",
)
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=None,
    help="Compile the denoiser, once per artifact (default: where it saves time; never"
    " --full-precision).",
)
@click.option(
    "--low-memory",
    is_flag=True,
    help="Keep weights packed and unpack each layer's at every call: the same images, more slowly.",
)
@click.option("--full-precision", is_flag=True, help="Sample the model as it was.")
@click.option(
    "--lora-branch",
    metavar="FILE[:WEIGHT]",
    multiple=True,
    help="A LoRA in floating point beside the layers, which stay as they are quantized.",
)
@options.show("the contact sheet")
@click.option(
    "--shard",
    metavar="I/N",
    help="Draw the I-th of N parts, 1/N to N/N, each by a process of its own; qncd merge joins"
    " them.",
)
@options.set_format
@options.set_name("Name of the sample set (default: quantized, full, full_compiled).")
@options.overrides
@options.run_dir
@options.device
@options.force("Replace samples made with other settings.")
@options.plan
@options.no_verify
@options.json_output
def sample(**options):
    """Draw images from the quantized model; a repeated command resumes.

    Under torchrun all processes share the work (docs/batch.md).
    """
    from ..spec import Compile
    from . import plan as planning
    from . import sampling

    console = Console(options.pop("as_json"))
    options.pop("debug")
    compiled = options.pop("compiled")
    plan = options.pop("plan")
    if plan and options["full_precision"]:
        raise click.UsageError("--plan is about the quantized model: leave out --full-precision")
    others = {
        "--compile": compiled,
        "--full-precision": options["full_precision"],
        "--backend openvino": options["backend"] == "openvino",
    }
    if options["low_memory"] and any(others.values()):
        other = next(name for name, given in others.items() if given)
        raise click.UsageError(f"--low-memory is about packed weights: leave it or {other} out")
    draw = planning.of_samples if plan else sampling.sample
    draw(console, sampling.SampleOptions(**options, compile=Compile.of(compiled)))


@cli.command(
    name="eval",
    epilog="\b\nExamples:\n  qncd eval --fid\n  qncd eval --fid --isc --kid --prc\n"
    "  qncd eval --show\n"
    "  qncd eval --images my_images --reference val_images --network inception --fid"
    + sentences("SQNR", "PSNR", "bits"),
)
@options.metrics
@click.option(
    "--images",
    metavar="DIR|NPZ",
    help="Measure these images instead of the run's samples: a folder with its sub-folders, or"
    " arr_0 of an .npz.",
)
@options.set_name("Which sample set.", "quantized")
@options.show("the pairs that differ most, with their difference,")
@options.run_dir
@options.device
@options.no_verify
@options.json_output
def evaluate(**options):
    """Measure the samples against a reference and against full precision on the same seeds.

    Draws the full-precision images that are missing. Writes metrics.json, report.html and pairs.png
    (the worst, typical and best pairs with their difference): PSNR and SQNR always, distances where
    there are features and a reference. What is asked for by name (--fid, --network inception) and
    cannot be had ends with exit code 6, with all else written.
    Metrics of the same samples, reference and features add up over several calls.
    """
    from . import evaluation

    console = Console(options.pop("as_json"))
    options.pop("debug")
    evaluation.evaluate(console, evaluation.EvalOptions(**options))


@cli.command(
    epilog="\b\nExamples:\n  qncd run models/my-model --bits w4a8 --prompts prompts.txt\n"
    "  qncd run zoo:fashion-ldm --bits w4a6\n"
    "  qncd run --config fashion_ldm --bits w4a8\n"
    "  qncd run --config fashion_ldm_w8a8.yaml --num 1000 --fid --kid\n"
    "  qncd run --config fashion_ldm --num 1000 --plan"
)
@options.wanted
@options.overrides
@options.sampling
@options.metrics
@options.set_name("Name of the sample set.", "quantized")
@options.show("the pairs that differ most, with their difference,")
@options.run_dir
@options.device
@options.force("Redo every stage.")
@options.plan
@options.json_output
def run(device, force, plan, as_json, debug, **options):
    """All four stages; each is skipped when its inputs are unchanged.

    MODEL (instead of --config): a diffusers folder, hub id, zoo:NAME or checkpoint, with the
    configuration that "qncd init MODEL" would write. Draws 64 samples unless told otherwise, and
    says beforehand what it will draw and roughly how long it will take.
    """
    from . import commands
    from . import plan as planning
    from .evaluation import EvalOptions
    from .wanted import NAMES, Wanted

    names = {name: options.pop(name) for name in NAMES}
    wanted = Wanted(**names, prompts=options["prompts"])
    if plan:
        drawing = {name: options[name] for name in commands.DRAWING}
        told = EvalOptions(**{k: v for k, v in options.items() if k not in commands.DRAWING})
        planning.of_config(
            *(Console(as_json), wanted, planning.STAGES, drawing, told.wishes), device=device
        )
        return
    commands.run_all(Console(as_json), wanted, device, force=force, options=options)


@cli.command(
    epilog="\b\nExamples:\n  qncd compare runs/fashion_ldm_w8a8 runs/fashion_ldm_w4a8\n"
    "  qncd compare runs/steps20 runs/steps50 --force-compare"
)
@click.argument("run_dirs", nargs=-1, required=True, metavar="RUN_DIR...")
@click.option(
    "--force-compare",
    "force",
    is_flag=True,
    help="Also of different protocols: a column for each thing in which they differ.",
)
@options.json_output
def compare(run_dirs, force, as_json, debug):
    """One table over several evaluated runs; refuses runs measured in different protocols.

    What differs is named with both values: samples, sampling, reference, features.
    """
    from . import comparing

    comparing.compare(Console(as_json), run_dirs, force=force)


for command in (
    *quantizing.COMMANDS,
    *batch.COMMANDS,
    *tools.COMMANDS,
    *judging.COMMANDS,
):
    cli.add_command(command)
