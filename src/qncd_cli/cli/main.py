"""The qncd command: options and help. Everything heavy is imported inside the commands."""

from __future__ import annotations

import click

from .. import __version__
from . import options
from .console import Console, ErrorReportingGroup

EPILOG = """\b
The pipeline, one stage after the other:
  qncd calibrate --config fashion_ldm_w4a8.yaml
  qncd quantize
  qncd sample --steps 20 --num 64
  qncd eval --fid

\b
Or all four:
  qncd run --config fashion_ldm_w4a8.yaml --num 64

\b
Exit codes: 0 done, 2 usage, 3 configuration, 4 artifact, 5 model, 6 backend or hardware,
130 interrupted (the same command goes on).
"""


@click.group(
    cls=ErrorReportingGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="qncd")
def cli() -> None:
    """Make diffusion models small by post-training quantization, and prove that nothing was lost.

    Each stage reads the artifacts of the one before from a run directory (runs/<config name>) and
    is skipped when its outputs are there and its inputs are unchanged.
    """


@cli.command(
    epilog="\b\nExamples:\n  qncd calibrate --config fashion_ldm_w4a8.yaml\n"
    "  qncd calibrate --config my.yaml --set calibration.trajectories=256\n"
    "  qncd calibrate --config my.yaml --dry-run\n"
    "  qncd calibrate --config ldm4_w4a8 --set model.source=random:ldm4 --plan"
)
@options.config
@options.overrides
@options.run_dir
@options.device
@options.force("Calibrate again although nothing has changed.")
@click.option("--dry-run", is_flag=True, help="Check and print the configuration, run nothing.")
@options.plan
@options.json_output
def calibrate(config_name, overrides, run_dir, device, force, dry_run, plan, as_json, debug):
    """Collect calibration inputs, activation statistics and smoothing factors."""
    from . import commands
    from . import plan as planning

    if plan:
        stages = planning.STAGES[:2]
        planning.of_config(Console(as_json), config_name, overrides, run_dir, stages)
        return
    commands.calibrate(
        Console(as_json), config_name, overrides, run_dir, device, force=force, dry_run=dry_run
    )


@cli.command(
    epilog="\b\nExamples:\n  qncd quantize\n"
    "  qncd quantize --set quantization.weights.rounding=nearest\n"
    "  qncd quantize --budget 4.5"
)
@click.option(
    "--budget",
    type=float,
    metavar="BITS",
    help="Average bits of the quantized weights; each layer gets 2, 3, 4, 6 or 8 of them by its "
    "measured sensitivity.",
)
@options.overrides
@options.run_dir
@options.device
@options.force("Quantize again although nothing has changed.")
@options.plan
@options.json_output
def quantize(budget, overrides, run_dir, device, force, plan, as_json, debug):
    """Round the weights to integers, set activation ranges, measure the quantization noise."""
    from . import commands
    from . import plan as planning

    if budget is not None:
        overrides = (*overrides, f"quantization.weights.budget={budget}")
    if plan:
        planning.of_run(Console(as_json), run_dir, overrides, ("quantize",))
        return
    commands.quantize(Console(as_json), overrides, run_dir, device, force=force)


@cli.command(
    epilog="\b\nExamples:\n  qncd sample --steps 20 --num 64\n"
    "  qncd sample --classes 3,7 --num 16 --name dresses_and_sneakers\n"
    "  qncd sample --full-precision --num 64\n"
    "  qncd sample --steps 50 --inter none --name steps50"
)
@options.sampling
@click.option("--scheduler", metavar="NAME", help="ddim, ddpm, pndm, plms, dpmsolver++, euler, ...")
@click.option("--eta", type=click.FloatRange(0, 1), help="Stochasticity of DDIM.")
@click.option("--guidance", type=click.FloatRange(0), help="Classifier-free guidance scale.")
@click.option(
    "--inter",
    type=click.Choice(["none", "runtime", "ptqd", "affine"]),
    help="Correction of the noise that accumulates over the steps.",
)
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=None,
    help="Compile the int8 denoiser, once per artifact (default: where it saves time).",
)
@click.option("--full-precision", is_flag=True, help="Sample the model as it was.")
@click.option("--name", metavar="NAME", help="Name of the sample set (default: quantized, full).")
@options.overrides
@options.run_dir
@options.device
@options.force("Replace samples made with other settings.")
@options.plan
@options.json_output
def sample(**options):
    """Draw images from the quantized model; a repeated command resumes."""
    from . import commands
    from . import plan as planning

    name = options["name"]
    if name is not None and (name.startswith(".") or "/" in name or not name):
        hint = "a plain name without /, not starting with a dot"
        raise click.BadParameter(hint, param_hint="--name")
    console = Console(options.pop("as_json"))
    options.pop("debug")
    plan = options.pop("plan")
    if plan and options["full_precision"]:
        raise click.UsageError("--plan is about the quantized model: leave out --full-precision")
    draw = planning.of_samples if plan else commands.sample
    draw(console, commands.SampleOptions(**options))


@cli.command(
    name="eval",
    epilog="\b\nExamples:\n  qncd eval --fid\n  qncd eval --fid --isc --kid --prc\n"
    "  qncd eval --images my_images --reference val_images --network inception --fid",
)
@options.metrics
@click.option("--images", metavar="DIR", help="Measure these images instead of the run's samples.")
@click.option("--name", default="quantized", show_default=True, help="Which sample set.")
@options.run_dir
@options.device
@options.json_output
def evaluate(**options):
    """Measure the samples against a reference and against full precision on the same seeds.

    Draws the full-precision images that are missing. Writes metrics.json and report.html.
    """
    from . import evaluation

    console = Console(options.pop("as_json"))
    options.pop("debug")
    evaluation.evaluate(console, evaluation.EvalOptions(**options))


@cli.command(
    epilog="\b\nExamples:\n  qncd run --config fashion_ldm_w4a8.yaml --num 64\n"
    "  qncd run --config fashion_ldm_w8a8.yaml --num 1000 --fid --kid\n"
    "  qncd run --config fashion_ldm_w4a8.yaml --num 1000 --plan"
)
@options.config
@options.overrides
@options.sampling
@options.metrics
@options.run_dir
@options.device
@options.force("Redo every stage.")
@options.plan
@options.json_output
def run(config_name, overrides, run_dir, device, force, plan, as_json, debug, **options):
    """All four stages; each is skipped when its inputs are unchanged."""
    from . import commands
    from . import plan as planning

    if plan:
        drawing = {name: options[name] for name in commands.DRAWING}
        stages = planning.STAGES
        planning.of_config(Console(as_json), config_name, overrides, run_dir, stages, drawing)
        return
    commands.run_all(
        Console(as_json), config_name, overrides, run_dir, device, force=force, options=options
    )


@cli.command(epilog="\b\nExample:\n  qncd compare runs/fashion_ldm_w8a8 runs/fashion_ldm_w4a8")
@click.argument("run_dirs", nargs=-1, required=True, metavar="RUN_DIR...")
@options.json_output
def compare(run_dirs, as_json, debug):
    """One table over several evaluated runs; refuses runs measured in different protocols."""
    from . import evaluation

    evaluation.compare(Console(as_json), run_dirs)


@cli.command(
    epilog="\b\nExamples:\n  qncd ablate --config fashion_ldm_w4a8.yaml --num 300\n"
    "  qncd ablate --config fashion_ldm_w4a8 --presets minmax,qncd,best --bits w8a8,w4a8,w4a6\n"
    "  qncd ablate --config my.yaml --presets none,intra,inter,both\n"
    "  qncd ablate --config my.yaml --presets none+runtime,none+ptqd --bits fp,w4a8\n"
    "  qncd ablate --config my.yaml --presets best,best+brecq,best+bias"
)
@options.config
@click.option(
    "--presets",
    metavar="NAME,NAME,...",
    default="minmax,qdiffusion,ptqd,tdq,qncd-intra,qncd-inter,qncd,best",
    show_default=True,
    help="Rows: presets, or none, intra, inter, both: the configuration's own settings with these "
    "of its corrections. NAME+INGREDIENT changes one thing: the inter correction (none, runtime, "
    "ptqd, affine), the intra correction (embedding, smoothquant, auto), the rounding (nearest, "
    "gptq, adaround, brecq) or bias.",
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
@click.option("--batch-size", type=click.IntRange(1), default=50, show_default=True, metavar="N")
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


@cli.command(
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


@cli.command(
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


@cli.command(
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


@cli.command(epilog="\b\nExample:\n  qncd inspect runs/fashion_ldm_w4a8/quantized.safetensors")
@click.argument("file", type=click.Path())
@options.json_output
def inspect(file, as_json, debug):
    """What an artifact holds and where it comes from; checks it completely."""
    from . import listing

    listing.inspect(Console(as_json), file)


@cli.command(epilog="\b\nExamples:\n  qncd models\n  qncd models --json")
@options.json_output
def models(as_json, debug):
    """Packaged models, shipped configurations, presets."""
    from . import listing

    listing.models(Console(as_json))
