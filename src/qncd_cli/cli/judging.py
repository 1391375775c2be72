"""The commands that judge and compare: options and help. Heavy imports are inside of them."""

from __future__ import annotations

import click

from . import options
from .console import Console

BENCH_ROWS = (
    "float32-eager,float32-compiled,bfloat16-eager,bfloat16-compiled,"
    "simulate-w4a8,int8-w4a8,int8-w4a8-compiled"
)
BENCH_ROUNDS = 9


@click.command(
    epilog="\b\nExamples:\n  qncd ablate --config fashion_ldm --num 300\n"
    "  qncd ablate --config fashion_ldm --presets minmax,qncd,best --bits w8a8,w4a8,w4a6\n"
    "  qncd ablate --config fashion_ldm --presets corrections --bits w4a6\n"
    "  qncd ablate --config my.yaml --presets none,intra,inter,both\n"
    "  qncd ablate --config my.yaml --presets none+runtime,none+ptqd --bits fp,w4a8\n"
    "  qncd ablate --config my.yaml --presets best,best+brecq,best+bias"
)
@options.config
@click.option(
    "--presets",
    metavar="NAME,NAME,...",
    default="minmax,qdiffusion,ptqd,tdq,qncd-intra,qncd-inter,qncd,best-label,best",
    show_default=True,
    help="Rows: presets, or none, intra, inter, both: the configuration's own settings with these "
    "of its corrections. NAME+INGREDIENT changes one thing: the inter correction (none, runtime, "
    "ptqd, affine, stepwise; published: runtime as in qncd-inter; stepwise+flat: its offset the "
    "same at all places), the intra correction (embedding, smoothquant, auto), the rounding "
    "(nearest, gptq, adaround, brecq), bias, weighed (step weights) or rotated (by "
    "16 channels). corrections: every correction on qdiffusion and on best. Gains are over the "
    "first row of the same widths.",
)
@click.option(
    "--bits",
    metavar="W4A8,...|fp",
    help="Widths of weights and activations, each with every row (default: the configuration's); "
    "fp: the unquantized model, to see what an inter correction does to it.",
)
@click.option(
    "--num",
    type=click.IntRange(2),
    metavar="N",
    help="Samples a row (default: evaluation.num_samples).",
)
@options.batch_size
@click.option(
    "--published",
    is_flag=True,
    help="Leave in floating point what each preset's paper does; otherwise all rows are quantized "
    "alike.",
)
@options.backend
@options.features
@options.overrides
@options.run_dir
@options.device
@options.force("Measure every row again although nothing has changed.")
@options.json_output
def ablate(**options):
    """Compare presets and corrections on the same seeds, one row each; trains nothing.

    Rows share calibration, quantized weights and full-precision samples where they agree. Writes
    ablation.json, .md and .html (default: to runs/ablate_<config name>); a repeated command goes
    on with the rows that are missing. --set holds for every row and wins over its preset.
    """
    from . import ablate as command

    console = Console(options.pop("as_json"))
    options.pop("debug")
    command.ablate(console, command.AblateOptions(**options))


@click.command(
    epilog="\b\nExamples:\n  qncd bench random:ldm4\n"
    "  qncd bench zoo:fashion-ldm --batch-size 50 --rounds 20\n"
    "  qncd bench random:ldm4 --rows float32-eager,int8-w4a8 --no-memory --profile\n"
    "  qncd bench --config fashion_ldm_w4a8.yaml --json\n"
    "  qncd bench --image --run-dir runs/fashion_ldm_w4a8"
)
@click.argument("source", required=False)
@click.option(
    "--config",
    "config_name",
    metavar="FILE|NAME",
    help="Take model, dtype and classes from a configuration instead of SOURCE.",
)
@click.option(
    "--rows",
    metavar="NAME,NAME,...",
    default=None,
    help=f"What to measure; quantized rows take any widths of 2 to 8 bits (default: {BENCH_ROWS}).",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    metavar="N",
    help="Samples in a call of the denoiser, both halves of guidance counted.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=None,
    metavar="N",
    help="How often every row is timed, in turn with the others (default: 9, with --image 3).",
)
@click.option(
    "--memory/--no-memory",
    default=True,
    show_default=True,
    help="Also load every row alone in a process: its memory, loading and preparing.",
)
@click.option("--profile", is_flag=True, help="Also say where a call's time goes.")
@click.option(
    "--image",
    is_flag=True,
    help="Of a quantized run: seconds per image end to end, by part, and how far its images are "
    "from full precision's. Rows: float32-eager, bfloat16-compiled and the like, int8 with "
    "-bfloat16, -reuse, -decoder and -compiled, nncf.",
)
@click.option(
    "--batch-sizes",
    default="1,8",
    show_default=True,
    metavar="N,N",
    help="With --image: images drawn together.",
)
@click.option(
    "--num",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    metavar="N",
    help="With --image: images that are compared with full precision's.",
)
@options.run_dir
@click.option("--out", metavar="DIR", help="Where to write (default: runs/bench_<model>, or RUN).")
@options.json_output
def bench(source, config_name, as_json, debug, image, batch_sizes, num, run_dir, **options):
    """Speed, memory and size of a model's denoiser on this CPU, full precision beside quantized.

    SOURCE: zoo:NAME, random:NAME, a diffusers folder or hub id. Quantized rows are made on the
    spot from one calibration input (preset minmax): good for speed and size, not for images.
    Writes bench.json and bench.md (--image: bench_image.json and .md). A row that this machine
    cannot run is listed with the reason.
    """
    rows, rounds = options.pop("rows"), options.pop("rounds")
    if image:
        if source or config_name or options.pop("profile"):
            raise click.UsageError("--image takes a --run-dir, no SOURCE, --config or --profile")
        from . import bench_images as images

        more = (rows or images.DEFAULT_ROWS, batch_sizes, rounds or images.ROUNDS, num)
        of_images = images.ImageOptions(*more, options["memory"], run_dir, options["out"])
        images.bench_images(Console(as_json), of_images)
        return
    if (source is None) == (config_name is None):
        raise click.UsageError("give either SOURCE or --config")
    if run_dir is not None:
        raise click.UsageError("--run-dir is for --image")
    from . import bench as command

    asked = command.BenchOptions(
        source, config_name, rows=rows or BENCH_ROWS, rounds=rounds or BENCH_ROUNDS, **options
    )
    command.bench(Console(as_json), asked)


@click.command(
    epilog="\b\nExamples:\n  qncd verify\n  qncd verify --min-psnr 20 --force\n"
    "  qncd verify --run-dir runs/fashion_ldm_w4a8 --num 32 --json"
)
@click.option(
    "--num",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    metavar="N",
    help="How many seeds, the first of the set.",
)
@click.option(
    "--min-psnr",
    type=click.FloatRange(0),
    metavar="DB",
    help="Decibels that every image needs beside full precision's (default: any will do).",
)
@options.batch_size
@options.backend
@options.set_name(
    "Which sample set (default: quantized where it holds the seeds, else one of its own, verify)."
)
@options.run_dir
@options.device
@options.force("Draw the quantized model's images again although they are there.")
@options.json_output
def verify(run_dir, as_json, debug, **options):
    """Look whether a quantized model still draws images; for CI.

    Draws what is missing of a few seeds of the quantized model and of full precision. Exit code 7
    where an image is black, of one colour or not finite, or below --min-psnr; a line for each.
    """
    from . import verify as command

    command.verify(Console(as_json), run_dir, **options)


@click.command(
    epilog="\b\nExamples:\n  qncd study --trials 60\n"
    "  qncd study --run-dir runs/w4a8 --against runs/w4a6\n"
    "  qncd study --tally results/*.json"
)
@click.argument("files", nargs=-1, metavar="[FILE...]", type=click.Path())
@click.option(
    "--tally",
    is_flag=True,
    help="Count the answers in these files, which raters have downloaded.",
)
@click.option(
    "--trials",
    type=click.IntRange(1, 500),
    metavar="N",
    help="Comparisons that count (default: 40); a tenth of controls of either kind comes on top.",
)
@click.option(
    "--against",
    multiple=True,
    metavar="RUN_DIR",
    help="Another run of the same model and seeds, to be compared as well; may be repeated.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    metavar="N",
    help="Of order and sides (default: one that nobody knows).",
)
@options.set_name("Which sample set (default: quantized).")
@options.run_dir
@options.device
@options.force("Make another study: results of the one that is there can no longer be tallied.")
@options.json_output
def study(files, tally, run_dir, as_json, debug, **options):
    """Ask human raters which of two images looks better, without telling which is which.

    Writes study.html, one file to hand out, and study_key.json, which stays here, into the run
    directory. Raters choose with two keys or by touch, and download their answers as a file. Some
    trials show one image twice, some a badly damaged one.

    --tally: preference with its exact binomial interval (Clopper-Pearson), agreement of raters
    (Fleiss' kappa), failed catch trials; writes study.json, which the next report shows.
    """
    from . import study as command

    making = {key: value for key, value in options.items() if value not in (None, (), False)}
    making.pop("device" if options["device"] == "auto" else "", None)
    if tally and making:
        raise click.UsageError(f"--tally goes without --{next(iter(making))}")
    if tally and not files:
        raise click.UsageError("--tally needs the files of raters: --tally results/*.json")
    if files and not tally:
        raise click.UsageError("files are for --tally")
    console = Console(as_json)
    if tally:
        command.tally(console, run_dir, files)
    else:
        command.make(console, run_dir, **options)


COMMANDS = (verify, study, ablate, bench)
