"""The commands about models: options and help. Heavy imports are inside of them."""

from __future__ import annotations

import click

from . import options
from .console import Console

_base = click.option(
    "--base",
    metavar="FOLDER",
    help="Of a file of Stable Diffusion, SDXL, SD 3 or FLUX: a pipeline folder of the same kind, "
    "or the hub id of one that was downloaded.",
)


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
@_base
@options.json_output
def init(model, compvis_config, base, as_json, debug):
    """Print a configuration to begin with for a model, every key explained.

    MODEL: a diffusers folder, a hub id that was downloaded, zoo:NAME, a checkpoint file. Only
    its small files are read. Scheduler, steps and guidance are its own.
    """
    from . import init as command

    command.init(Console(as_json), model, compvis_config, base)


@click.command(
    epilog="\b\nExample:\n  qncd convert models/ldm/cin256-v2/model.ckpt \\\n"
    "      --compvis-config models/ldm/cin256-v2/cin256-v2.yaml --out models/cin256-v2\n"
    "  qncd convert sd-v1-4.ckpt --compvis-config v1-inference.yaml \\\n"
    "      --tokenizer clip-vit-large-patch14 --out models/sd-v1-4\n"
    "  qncd convert my-sdxl.safetensors --base stabilityai/stable-diffusion-xl-base-1.0 \\\n"
    "      --out models/my-sdxl\n"
    "  qncd convert cd_bedroom256_lpips.pt --adm consistency --image-size 256 --out models/cd"
)
@click.argument("checkpoint", type=click.Path())
@click.option(
    "--compvis-config",
    metavar="YAML",
    help="The YAML that CompVis published with the checkpoint.",
)
@_base
@click.option(
    "--tokenizer",
    metavar="DIR",
    help="Of Stable Diffusion: a folder with vocab.json and merges.txt, or a hub id.",
)
@click.option(
    "--adm",
    type=click.Choice(["noise", "consistency"]),
    help="The file is a U-Net of guided-diffusion without classes, or a consistency model.",
)
@click.option(
    "--image-size", type=click.IntRange(1), metavar="N", help="With --adm: the side of its images."
)
@click.option(
    "--head-channels",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="With --adm: channels of an attention head.",
)
@click.option(
    "--out", metavar="DIR", required=True, help="The folder to make; model.source can name it."
)
@options.force("Replace the diffusers folder that is there.")
@options.json_output
def convert(
    checkpoint,
    compvis_config,
    base,
    tokenizer,
    adm,
    image_size,
    head_channels,
    out,
    force,
    as_json,
    debug,
):
    """Turn a checkpoint file (.ckpt, .safetensors, a shard of one) into a diffusers folder.

    CompVis' own come with a YAML (--compvis-config). Files of Stable Diffusion, SDXL, SD 3 and FLUX
    in the names of CompVis, of ComfyUI or of diffusers need a pipeline folder of the same kind
    (--base), of which configuration, tokenizers and parts that the file lacks are taken; fp8 is
    read, plain or scaled.

    Every tensor of the checkpoint must have its place, or nothing is written. Weights keep their
    precision; where the checkpoint has moving averages (EMA) of the U-Net, these are taken. A
    Stable Diffusion checkpoint holds no tokenizer: without --tokenizer it is looked for on the hub
    (openai/clip-vit-large-patch14).
    """
    from . import convert as command

    told = None
    if adm is not None:
        if compvis_config or base or tokenizer:
            raise click.UsageError("--adm describes the file: leave the other descriptions out")
        if image_size is None:
            raise click.UsageError("--adm needs --image-size")
        told = {"image_size": image_size, "head_channels": head_channels}
        told["consistency"] = adm == "consistency"
    elif image_size is not None:
        raise click.UsageError("--image-size is for --adm")
    source = compvis_config, tokenizer, base, told
    command.convert(Console(as_json), checkpoint, *source, out, force=force)


@click.command(
    epilog="\b\nExamples:\n  qncd export --to diffusers exported/fashion-ldm-w4a8\n"
    "  qncd export --to diffusers exported/ldm --run-dir runs/fashion_ldm_w4a6\n"
    "  qncd export --to onnx exported/onnx\n"
    "  qncd export --to openvino exported/openvino --samples 8 --bound 0.05\n"
    "  qncd export --to openvino exported/fast --cpus vnni\n"
    "  qncd export --to optimum-onnx exported/my-model-onnx\n"
    "  qncd export --to optimum-openvino exported/my-model-openvino --run-dir runs/my-model_w8a8\n"
    "  qncd export --to comfyui exported/sdxl-w8a8.safetensors\n"
    "  qncd export --to diffusers exported/my-model --push-to-hub me/my-model-w4a8"
)
@click.argument("out", metavar="PLACE", type=click.Path())
@click.option(
    "--to",
    type=click.Choice(
        ["diffusers", "comfyui", "onnx", "openvino", "optimum-onnx", "optimum-openvino"]
    ),
    required=True,
    help="The format.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    metavar="N",
    help="Of a graph or a ComfyUI file: images to compare with the simulation (default: 4).",
)
@click.option(
    "--bound",
    type=click.FloatRange(0),
    metavar="SHARE",
    help="Largest difference of one prediction from the simulation, as a share of the largest "
    "prediction; beyond it nothing is written (default: 0.1 of a graph, none of a ComfyUI file).",
)
@click.option(
    "--cpus",
    type=click.Choice(("any", "vnni")),
    help="Of a graph: the CPUs that compute it right. For those with VNNI alone, a product of "
    "8-bit weights is one instead of two (default: any).",
)
@click.option(
    "--push-to-hub",
    "hub",
    metavar="OWNER/NAME",
    help="Of a pipeline folder: upload it as well, into this repository of the hub.",
)
@options.run_dir
@options.force("Replace the exported folder or file that is there.")
@options.json_output
def export(out, to, samples, bound, cpus, hub, run_dir, force, as_json, debug):
    """Write the quantized model for other tools, as a folder or a file at PLACE.

    diffusers: in the code that loads it, import qncd_cli.exported once, then
    DiffusionPipeline.from_pretrained(PLACE) (needs the package accelerate). It computes with
    integers where the CPU can. Its README.md is a model card: what it was quantized from, licence,
    bits, size, the PSNR that eval measured.

    onnx, openvino: the denoiser alone, with open batch size and the ranges of all timesteps, in
    the operators that ONNX Runtime or OpenVINO compute in integers. The graph is run beside the
    simulation; PLACE/graph.json says how to call it, what is not in integers, and what came out.

    optimum-onnx, optimum-openvino: a whole pipeline folder of such graphs, which Optimum's
    ORTDiffusionPipeline (package optimum-onnx) or OVDiffusionPipeline (optimum-intel) loads by
    from_pretrained(PLACE), without this package: the denoiser quantized, text encoders and first
    stage in float32, sizes of images and batch open. Stable Diffusion, SDXL, LCM, their img2img and
    inpainting, SD 3 and FLUX. Optimum is not needed to write it.

    comfyui: the denoiser alone, one .safetensors in ComfyUI's names: U-Nets of Stable Diffusion and
    SDXL, transformers of SD 3 and FLUX. Its linear layers keep their codes, one byte each;
    convolutions, which ComfyUI does not quantize, are bfloat16. Inputs are quantized row by row
    there; what that does to images is simulated and printed.

    Corrections of the sampling loop are part of none.
    """
    from . import export as command

    console = Console(as_json)
    if cpus is not None and to in ("diffusers", "comfyui"):
        raise click.UsageError("--cpus is for graphs of ONNX and OpenVINO")
    cpus = cpus or "any"
    if to == "diffusers":
        if samples is not None or bound is not None:
            raise click.UsageError("--samples and --bound are for graphs, not for diffusers")
        command.export(console, out, run_dir, hub, force=force)
        return
    samples = 4 if samples is None else samples
    if to.startswith("optimum-"):
        from .export_optimum import export_optimum

        share = 0.1 if bound is None else bound
        export_optimum(console, to, out, run_dir, hub, samples, share, cpus, force=force)
        return
    if hub is not None:
        raise click.UsageError("--push-to-hub is for pipeline folders")
    if to == "comfyui":
        command.export_comfyui(console, out, run_dir, samples, bound, force=force)
        return
    bound = 0.1 if bound is None else bound
    command.export_graph(console, to, out, run_dir, samples, bound, cpus, force=force)


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


COMMANDS = (init, convert, export, inspect, models)
