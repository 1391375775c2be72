"""The commands beside the pipeline: options and help. Heavy imports are inside of them."""

from __future__ import annotations

import click

from . import options
from .console import Console


@click.command(
    epilog="\b\nExamples:\n  qncd init models/my-model > my.yaml\n  qncd init zoo:fashion-ldm\n"
    "  qncd init sd-v1-4.ckpt --compvis-config v1-inference.yaml > sd.yaml"
)
@click.argument("model")
@click.option(
    "--compvis-config",
    metavar="YAML",
    help="Of a checkpoint, what CompVis published with it (default: the YAML beside it).",
)
@options.json_output
def init(model, compvis_config, as_json, debug):
    """Print a configuration to begin with for a model, every key explained.

    MODEL: a diffusers folder, a hub id that was downloaded, zoo:NAME, a CompVis checkpoint. Only
    its small files are read. Scheduler, steps and guidance are its own.
    """
    from . import init as command

    command.init(Console(as_json), model, compvis_config)


@click.command(
    epilog="\b\nExample:\n  qncd convert models/ldm/cin256-v2/model.ckpt \\\n"
    "      --compvis-config models/ldm/cin256-v2/cin256-v2.yaml --out models/cin256-v2\n"
    "  qncd convert sd-v1-4.ckpt --compvis-config v1-inference.yaml \\\n"
    "      --tokenizer clip-vit-large-patch14 --out models/sd-v1-4"
)
@click.argument("checkpoint", type=click.Path())
@click.option(
    "--compvis-config",
    metavar="YAML",
    required=True,
    help="The YAML that CompVis published with the checkpoint.",
)
@click.option(
    "--tokenizer",
    metavar="DIR",
    help="Of Stable Diffusion: a folder with vocab.json and merges.txt, or a hub id.",
)
@click.option(
    "--out", metavar="DIR", required=True, help="The folder to make; model.source can name it."
)
@options.force("Replace the diffusers folder that is there.")
@options.json_output
def convert(checkpoint, compvis_config, tokenizer, out, force, as_json, debug):
    """Turn a CompVis latent-diffusion checkpoint into a diffusers folder.

    Every tensor of the checkpoint must have its place, or nothing is written. Weights keep their
    precision; where the checkpoint has moving averages (EMA) of the U-Net, these are taken. A
    Stable Diffusion checkpoint holds no tokenizer: without --tokenizer it is looked for on the hub
    (openai/clip-vit-large-patch14).
    """
    from . import convert as command

    command.convert(Console(as_json), checkpoint, compvis_config, tokenizer, out, force=force)


@click.command(
    epilog="\b\nExamples:\n  qncd export --to diffusers exported/fashion-ldm-w4a8\n"
    "  qncd export --to diffusers exported/ldm --run-dir runs/fashion_ldm_w4a6\n"
    "  qncd export --to onnx exported/onnx\n"
    "  qncd export --to openvino exported/openvino --samples 8 --bound 0.05"
)
@click.argument("out", metavar="DIR", type=click.Path())
@click.option(
    "--to",
    type=click.Choice(["diffusers", "onnx", "openvino"]),
    required=True,
    help="The format.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    metavar="N",
    help="Of a graph: images to compare with the simulation (default: 4).",
)
@click.option(
    "--bound",
    type=click.FloatRange(0),
    metavar="SHARE",
    help="Of a graph: largest difference of one prediction from the simulation, as a share of the "
    "largest prediction; beyond it nothing is written (default: 0.1).",
)
@options.run_dir
@options.force("Replace the exported folder that is there.")
@options.json_output
def export(out, to, samples, bound, run_dir, force, as_json, debug):
    """Write the quantized model for other tools: a pipeline folder, or a graph of the denoiser.

    diffusers: in the code that loads it, import qncd_cli.exported once, then
    DiffusionPipeline.from_pretrained(DIR) (needs the package accelerate). It computes with
    integers where the CPU can.

    onnx, openvino: the denoiser alone, with open batch size and the ranges of all timesteps, in
    the operators that ONNX Runtime or OpenVINO compute in integers. The graph is run beside the
    simulation; DIR/graph.json says how to call it, what is not in integers, and what came out.

    Corrections of the sampling loop are part of neither.
    """
    from . import export as command

    console = Console(as_json)
    if to == "diffusers":
        if samples is not None or bound is not None:
            raise click.UsageError("--samples and --bound are for graphs, not for diffusers")
        command.export(console, out, run_dir, force=force)
        return
    samples, bound = 4 if samples is None else samples, 0.1 if bound is None else bound
    command.export_graph(console, to, out, run_dir, samples, bound, force=force)


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
    "ptqd, affine, stepwise), the intra correction (embedding, smoothquant, auto), the rounding "
    "(nearest, gptq, adaround, brecq) or bias. corrections: every correction on qdiffusion and on "
    "best. Gains are over the first row of the same widths.",
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
    "  qncd bench --config fashion_ldm_w4a8.yaml --json"
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
    default="float32-eager,float32-compiled,bfloat16-eager,bfloat16-compiled,"
    "simulate-w4a8,int8-w4a8,int8-w4a8-compiled",
    show_default=True,
    help="What to measure; quantized rows take any widths of 2 to 8 bits.",
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
    default=9,
    show_default=True,
    metavar="N",
    help="How often every row is timed, in turn with the others.",
)
@click.option(
    "--memory/--no-memory",
    default=True,
    show_default=True,
    help="Also load every row alone in a process: its memory, loading and preparing.",
)
@click.option("--profile", is_flag=True, help="Also say where a call's time goes.")
@click.option("--out", metavar="DIR", help="Where to write (default: runs/bench_<model>).")
@options.json_output
def bench(source, config_name, as_json, debug, **options):
    """Speed, memory and size of a model's denoiser on this CPU, full precision beside quantized.

    SOURCE: zoo:NAME, random:NAME, a diffusers folder or hub id. Quantized rows are made on the
    spot from one calibration input (preset minmax): good for speed and size, not for images.
    Writes bench.json and bench.md. A row that this machine cannot run is listed with the reason.
    """
    if (source is None) == (config_name is None):
        raise click.UsageError("give either SOURCE or --config")
    from . import bench as command

    command.bench(Console(as_json), command.BenchOptions(source, config_name, **options))


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


@click.command(
    epilog="\b\nExamples:\n  qncd inspect runs/fashion_ldm_w4a8\n"
    "  qncd inspect runs/fashion_ldm_w4a8/quantized.safetensors --tensors"
)
@click.argument("path", type=click.Path())
@click.option("--tensors", is_flag=True, help="List every tensor of an artifact.")
@options.json_output
def inspect(path, tensors, as_json, debug):
    """What a run or a file of one holds, where it comes from, what is stale.

    PATH: a run directory, whose stages are listed with what is stale; an artifact (.safetensors),
    which is checked completely; or a JSON or YAML file of a run.
    """
    from . import inspecting

    inspecting.inspect(Console(as_json), path, tensors=tensors)


@click.command(epilog="\b\nExamples:\n  qncd models\n  qncd models --json")
@options.json_output
def models(as_json, debug):
    """Packaged models, shipped configurations, presets."""
    from . import listing

    listing.models(Console(as_json))


COMMANDS = (init, convert, export, verify, study, ablate, bench, inspect, models)
