"""Options that several commands share, as decorators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .image_options import IMAGES

Command = Callable[..., Any]
QUIET = "qncd.quiet"
"""Key of a context's `meta` under which --quiet is found."""


def json_output(command: Command) -> Command:
    help_text = "Print one JSON object on stdout, nothing else."
    command = click.option("--json", "as_json", is_flag=True, help=help_text)(command)
    command = click.option(
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=_hush,
        help="No progress and no remarks on stderr; errors are told.",
    )(command)
    return click.option("--debug", is_flag=True, help="Show the traceback of an error.")(command)


def no_verify(command: Command) -> Command:
    def leave_out(context: click.Context, _: click.Parameter, wanted: bool) -> None:
        from ..store.artifact_files import unverified

        if wanted:
            context.with_resource(unverified())

    return click.option(
        "--no-verify",
        is_flag=True,
        expose_value=False,
        callback=leave_out,
        help="Do not hold artifacts against their digests: large ones are read faster.",
    )(command)


def _hush(context: click.Context, option: click.Parameter, quiet: bool) -> None:
    if quiet:
        context.meta[QUIET] = True


def profile(command: Command) -> Command:
    return click.option(
        "--profile",
        is_flag=True,
        help="Afterwards say where time and memory went: by phase, and by layer.",
    )(command)


def run_dir(command: Command) -> Command:
    return click.option(
        "--run-dir",
        envvar="QNCD_RUN_DIR",
        metavar="DIR",
        help="Run directory (default: runs/<config name>, of a model runs/<model>_<bits>; later "
        "stages: the current run; or QNCD_RUN_DIR).",
    )(command)


def device(command: Command) -> Command:
    return click.option(
        "--device",
        envvar="QNCD_DEVICE",
        metavar="auto|cpu|cuda",
        default="auto",
        show_default=True,
        help="Where the model runs; auto takes a CUDA device if there is one (or QNCD_DEVICE).",
    )(command)


def config(command: Command) -> Command:
    return click.option(
        "--config",
        "config_name",
        metavar="FILE|NAME",
        required=True,
        help='A YAML file, or a shipped configuration (see "qncd models").',
    )(command)


def wanted(command: Command) -> Command:
    """A configuration, or a model alone with widths and prompts."""
    options = [
        click.argument("model", required=False),
        click.option(
            "--config",
            "config_name",
            metavar="FILE|NAME",
            help='Instead of MODEL: a YAML file, or a shipped configuration (see "qncd models").',
        ),
        click.option(
            "--bits",
            metavar="W4A8",
            help="Bits of weights and activations (default: the configuration's; of MODEL, w4a8); "
            "w4a16 leaves all activations in floating point. "
            "A shipped configuration's name may hold them too: fashion_ldm_w4a8.",
        ),
        click.option(
            "--effort",
            type=click.Choice(["quick", "standard", "thorough"]),
            metavar="LEVEL",
            help="How much is looked at before anything is decided: quick, standard (the default) "
            "or thorough.",
        ),
        click.option(
            "--prompts",
            "prompts_file",
            metavar="FILE",
            help="Of a text model: a file with one prompt a line, instead of sampling.prompts.",
        ),
        click.option(
            "--lora",
            "loras",
            metavar="FILE[:WEIGHT]",
            multiple=True,
            help="A LoRA that is fused into the model first (.safetensors; weight 1 by itself); "
            "may be repeated.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def overrides(command: Command) -> Command:
    return click.option(
        "--set",
        "overrides",
        metavar="KEY.PATH=VALUE",
        multiple=True,
        help="Override a key of the configuration; may be repeated.",
    )(command)


def plan(command: Command) -> Command:
    return click.option(
        "--plan",
        is_flag=True,
        help="Run nothing, load nothing: print layers, MACs, bytes of the result, and the memory, "
        "disk and time of each stage; exit code 6 where it will not fit.",
    )(command)


def force(what: str) -> Callable[[Command], Command]:
    return click.option("--force", is_flag=True, help=what)


def sampling(command: Command) -> Command:
    options = [
        click.option(
            "--steps",
            type=click.IntRange(1, 1000),
            help="Denoising steps (default: the configuration's).",
        ),
        click.option(
            "--num", type=click.IntRange(1), metavar="N", help="How many samples (default: 64)."
        ),
        click.option(
            "--seed",
            type=click.IntRange(0),
            help="Seed of the first sample (default: the configuration's, 0 unless it is set).",
        ),
        click.option(
            "--classes",
            metavar="C,C,...|all",
            help="Class labels, in turn by seed (default: the configuration's, all unless set).",
        ),
        click.option(
            "--prompt",
            "prompts",
            metavar="TEXT",
            multiple=True,
            help="Of a text model, instead of the configured ones; several are taken in turn.",
        ),
        *IMAGES,
    ]
    command = batch_size(backend(command))
    for option in reversed(options):
        command = option(command)
    return command


def show(what: str) -> Callable[[Command], Command]:
    return click.option(
        "--show",
        is_flag=True,
        help=f"Draw {what} in the terminal: as a picture where it can (extra show), else in"
        " half-blocks.",
    )


def set_name(what: str, default: str | None = None) -> Callable[[Command], Command]:
    return click.option(
        "--name",
        metavar="NAME",
        default=default,
        show_default=default is not None,
        callback=_plain,
        help=what,
    )


def _plain(context: click.Context, option: click.Parameter, name: str | None) -> str | None:
    """A name for a folder in the run's. Raises BadParameter for one that leads out of it."""
    if name is not None and (name.startswith(".") or "/" in name or not name):
        raise click.BadParameter("a plain name without /, not starting with a dot")
    return name


def set_format(command: Command) -> Command:
    return click.option(
        "--format",
        type=click.Choice(["png", "folders", "webdataset", "npz"]),
        default="png",
        show_default=True,
        help="Write the whole set in another layout too, beside it: a folder for every thousand "
        "images, WebDataset tar files, or one .npz as ADM's evaluator reads it.",
    )(command)


def batch_size(command: Command) -> Command:
    return click.option(
        "--batch-size",
        type=click.IntRange(1),
        metavar="N",
        help="Samples drawn together (default: 50, fewer of large models).",
    )(command)


def backend(command: Command) -> Command:
    return click.option(
        "--backend",
        type=click.Choice(["auto", "int8", "simulate", "openvino", "cuda-int8"]),
        default="auto",
        show_default=True,
        help="What computes quantized layers; auto: what a set began with; for long work the "
        "fastest, timed once and remembered; else int8 where the CPU can, or simulate. "
        "openvino exports the denoiser once and runs it there (extra openvino). cuda-int8: integer "
        "kernels for NVIDIA GPUs; none has run them yet.",
    )(command)


def metrics(command: Command) -> Command:
    options = [
        click.option("--fid", is_flag=True, help="Frechet distance (default when none is named)."),
        click.option("--sfid", is_flag=True, help="The same in Inception's spatial features."),
        click.option(
            "--fid-infinity",
            is_flag=True,
            help="Frechet distance that infinitely many such images would have.",
        ),
        click.option("--isc", is_flag=True, help="Inception score."),
        click.option("--kid", is_flag=True, help="Kernel distance."),
        click.option("--prc", is_flag=True, help="Precision and recall."),
        click.option(
            "--cvvdp",
            is_flag=True,
            help="How visible the differences to full precision are (extra cvvdp).",
        ),
        click.option(
            "--lpips",
            is_flag=True,
            help="LPIPS to full precision, where its weights are here.",
        ),
        click.option(
            "--lpips-weights",
            type=click.Path(file_okay=False),
            metavar="DIR",
            help="Folder of LPIPS's weights: vgg16-397923af.pth, weights-vgg16-lpips.pth "
            "(default: torch.hub's).",
        ),
        click.option(
            "--clip",
            type=click.Path(file_okay=False),
            metavar="DIR",
            help="CLIP score of images and prompts by the CLIPModel of transformers in this "
            "folder (extra text).",
        ),
        click.option(
            "--skip-broken",
            is_flag=True,
            help="Leave out and count images of a folder that cannot be read.",
        ),
    ]
    command = features(command)
    for option in reversed(options):
        command = option(command)
    return command


def features(command: Command) -> Command:
    options = [
        click.option(
            "--reference",
            metavar="DIR|NPZ|zoo",
            help="What to compare with: images, statistics, or (packaged models only) the "
            "packaged ones.",
        ),
        click.option(
            "--network",
            type=click.Choice(["auto", "fashion", "emoji", "inception", "efficientnet"]),
            default="auto",
            show_default=True,
            help="Feature network; auto: the packaged one for packaged models, else Inception if "
            "its weights are here. fashion, emoji: for packaged models of that data; inception: "
            "downloads the weights; efficientnet: of ImageNet (extra efficientnet).",
        ),
        click.option(
            "--inception-weights",
            type=click.Path(dir_okay=False),
            metavar="FILE",
            help="Inception weights on disk instead of torch-fidelity's download.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command
