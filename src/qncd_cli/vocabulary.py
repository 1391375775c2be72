"""One name for one number: what keys of JSON files and headings of tables mean.

Everything that shows a number takes its name, unit and direction from here; docs/numbers.md is
this table as a page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MISSING = "–"
IDENTICAL = "identical"
IDENTICAL_DB = 200.0
"""Decibels that stand for equality where a number has to be finite."""
DIRECTIONS = "↑ higher is better, ↓ lower is better; in brackets the 95 % bootstrap interval."
ARROWS = {"up": "↑", "down": "↓", "": ""}


@dataclass(frozen=True)
class Number:
    """says: one sentence; better: up, down, or neither; scale: stored value to shown one."""

    name: str
    says: str
    unit: str = ""
    better: str = ""
    scale: float = 1.0


TERMS = {
    "SQNR": "Signal to quantization noise ratio: how much stronger the full-precision latents are "
    "than what quantization adds to them on the same seeds; 20 dB is an error of a tenth, and "
    "every 6 dB halve it.",
    "PSNR": "Peak signal to noise ratio: how little the pixels differ from full precision on the "
    "same seeds; above 40 dB nobody sees a difference, below 20 dB it is another image.",
    "intra noise": "The quantization noise that arises within one call of the denoiser, most where "
    "a few channels are much wider than the rest; smoothing factors even them out.",
    "inter noise": "The quantization noise that is handed on from step to step and adds up over "
    "the trajectory; it is estimated and taken out while sampling.",
    "bits": "W4A8 means weights of 4 and activations (inputs of layers) of 8 bits; in brackets the "
    "means over all multiplications, which the few sensitive layers raise.",
}
"""What a newcomer meets, in a sentence each."""


def _decibels(name: str, says: str) -> Number:
    return Number(name, says, "dB", "up")


def _size(name: str, says: str) -> Number:
    return Number(name, says, "MB", "down", 1e-6)


IMAGES = {
    "num_samples": Number("samples", "How many images were measured."),
    "feature_distance_to_reference": Number(
        "distance to data",
        "Frechet distance to the reference, in the features of the network that is named; in "
        "brackets the 95 % bootstrap interval.",
        better="down",
    ),
    "feature_distance_to_full": Number(
        "distance to full",
        "Frechet distance to the full-precision images of the same seeds, in the same features.",
        better="down",
    ),
    "fid": Number(
        "FID", "Frechet distance to the reference in Inception's features.", better="down"
    ),
    "spatial_distance": Number(
        "spatial distance",
        "Frechet distance to the reference in the first 7 channels of a 17x17 layer of Inception, "
        "which see where things are.",
        better="down",
    ),
    "sfid": Number(
        "sFID", "The same with the published Inception weights, as ADM takes it.", better="down"
    ),
    "feature_distance_infinity": Number(
        "distance to data at ∞",
        "Distance to the reference that infinitely many such images would have, extrapolated.",
        better="down",
    ),
    "fid_infinity": Number(
        "FID∞", "The same in Inception's features: FID-infinity.", better="down"
    ),
    "kernel_distance": Number(
        "kernel distance",
        "Maximum mean discrepancy to the reference, with a polynomial kernel.",
        better="down",
    ),
    "kid": Number("KID", "Kernel distance in Inception's features.", better="down"),
    "class_score": Number(
        "class score", "Inception score by the network that is named, from 1 up.", better="up"
    ),
    "inception_score": Number(
        "inception score",
        "How sure and how varied Inception's classes are, from 1 up.",
        better="up",
    ),
    "precision": Number(
        "precision", "Share of the images that lie among the reference's.", better="up"
    ),
    "recall": Number("recall", "Share of the reference that lies among the images.", better="up"),
    "clip_score": Number(
        "CLIP score",
        "How well images show their prompts: 100 times the cosine of CLIP's embeddings of both, "
        "mean over the images.",
        better="up",
    ),
    "class_agreement": Number(
        "classified as asked", "Share of the images that show the class asked for.", "%", "up", 100
    ),
    "sqnr_latents_db": _decibels("SQNR", "SQNR of the final latents, over all samples together."),
    "sqnr_median_db": _decibels("SQNR, median", "SQNR of the median sample."),
    "sqnr_q05_db": _decibels("SQNR, worst 5 %", "SQNR that 5 % of the samples lie below."),
    "sqnr_gain_db": _decibels(
        "SQNR, gain",
        "Median over the samples of what each gains in SQNR on the table's first row of the same "
        "widths; in brackets the 95 % bootstrap interval of these differences.",
    ),
    "sqnr_steps_db": _decibels("SQNR by step", "SQNR of the prediction at every sampling step."),
    "sqnr_embeddings_db": _decibels("SQNR of embeddings", "Of what text encoders make of prompts."),
    "sqnr_lowest_db": _decibels("SQNR, lowest", "Of the prompt that loses most by quantization."),
    "psnr_db": _decibels("PSNR", "PSNR of all images together: a few that flipped decide it."),
    "psnr_median_db": _decibels("PSNR, median", "PSNR of the median image."),
    "psnr_q05_db": _decibels("PSNR, worst 5 %", "PSNR that 5 % of the images lie below."),
    "changed": Number(
        "changed images",
        "Images below 20 dB PSNR, which are other images than full precision's.",
        better="down",
    ),
    "ssim": Number(
        "SSIM",
        "Structural similarity to full precision on the same seeds, mean over the images; 1 is "
        "equal.",
        better="up",
    ),
    "cvvdp_jod": Number(
        "visible quality",
        "ColorVideoVDP beside full precision, mean over the images: 10 is equal, and of 9 three in "
        "four observers prefer full precision.",
        "JOD",
        "up",
    ),
    "cvvdp_jod_median": Number("its median", "Visible quality of the median image.", "JOD", "up"),
    "cvvdp_jod_q05": Number(
        "its worst 5 %", "Visible quality that 5 % of the images lie below.", "JOD", "up"
    ),
    "lpips": Number(
        "LPIPS",
        "Distance to full precision on the same seeds in the features of VGG-16, mean over the "
        "images; 0 is equal.",
        better="down",
    ),
    "lpips_median": Number("LPIPS of the median", "LPIPS of the median image.", better="down"),
    "lpips_q95": Number(
        "LPIPS of the worst 5 %", "LPIPS that 5 % of the images lie above.", better="down"
    ),
    "ssim_median": Number("SSIM of the median", "SSIM of the median image.", better="up"),
    "ssim_q05": Number(
        "SSIM of the worst 5 %", "SSIM that 5 % of the images lie below.", better="up"
    ),
}
"""Numbers of metrics.json, of ablation.json and of what compare prints."""

MODEL = {
    "bytes": _size("size", "Everything that the denoiser needs to run, in files."),
    "artifact_bytes": _size("of it quantized", "The file of the quantized layers."),
    "rest_bytes": _size(
        "of it unquantized", "What stays as it was, in 16 bits where these are exact."
    ),
    "share_of_float32": Number(
        "of float32", "Size as a share of the whole denoiser in float32.", "%", "down", 100
    ),
    "mean_weight_bits": Number("weight bits", "Bits of a weight, mean over all multiplications."),
    "sqnr_predictions_db": _decibels("SQNR of predictions", "Of those on calibration inputs."),
    "mean_input_bits": Number("input bits", "Bits of an input, mean over all multiplications."),
    "average_weight_bits": Number(
        "bits a weight", "Bits of a quantized weight, mean over weights."
    ),
    "macs": Number(
        "multiplications", "Of one denoiser call on one sample (MACs).", "G", scale=1e-9
    ),
    "integer_macs_share": Number(
        "in integers",
        "Share of the multiplications that can be computed in integers.",
        "%",
        scale=100.0,
    ),
    "bit_operations": Number(
        "bit operations",
        "Weight bits times input bits, summed over the multiplications of one call.",
        "G",
        "down",
        1e-9,
    ),
    "extra_calls": Number("extra calls", "Denoiser calls that the correction adds to a batch."),
    "seconds": Number("time", "Spent on the row or the stage.", "s"),
    "images_per_second": Number(
        "images per second",
        "Drawn by all processes of the job together, loading and compiling aside.",
        better="up",
    ),
}
"""Numbers of coverage.json, of --plan and of the stages."""

BENCH = {
    "seconds_per_call": Number(
        "time a call", "Median over the rounds of one call of the denoiser.", "s", "down"
    ),
    "spread": Number("spread", "Between the quartiles of these times.", "s", "down"),
    "speedup": Number("speedup", "How many times as fast as float32-eager.", better="up"),
    "roofline": Number(
        "roofline",
        "Arithmetic per second over the best rate of one large product of that kind.",
        better="up",
    ),
    "peak_bytes": _size(
        "peak memory",
        "Growth of the resident set up to its highest point, from loading to the second call.",
    ),
    "running_bytes": _size("memory", "The same during a call when all is prepared."),
    "disk_bytes": _size("disk", "Everything that the denoiser is read from."),
    "load_seconds": Number("load", "From the files to a denoiser.", "s", "down"),
    "prepare_seconds": Number(
        "prepare", "What the first call takes over the second (compiling, packing).", "s", "down"
    ),
}
"""Numbers of bench.json."""

SECTIONS = {"Images": IMAGES, "The model": MODEL, "Speed and memory": BENCH}
NUMBERS = {**IMAGES, **MODEL, **BENCH}


def heading(key: str) -> str:
    """Name, unit and direction: "PSNR, dB ↑"."""
    found = NUMBERS[key]
    named = f"{found.name}, {found.unit}" if found.unit else found.name
    return f"{named} {ARROWS[found.better]}".rstrip()


def cell(key: str, value: float | str | None) -> str:
    """A value of that key in its unit, without it; text as it is."""
    if isinstance(value, str):
        return value
    known = NUMBERS[key]
    if value is not None and known.unit == "dB" and value >= IDENTICAL_DB:
        return IDENTICAL
    if value is not None and known.unit == "%":
        return f"{value * known.scale:.1f}"
    return number(value if value is None or known.scale == 1 else value * known.scale)


def said(key: str, value: float | None) -> str:
    """A value with its unit, as in a sentence: "14.6 %"."""
    return f"{cell(key, value)} {NUMBERS[key].unit}".rstrip()


def phrase(key: str, value: float | str | None) -> str:
    """A value with its name: "size 7.120 MB", "14.6 % of float32"; a key that is in no table as it
    is."""
    if key not in NUMBERS:
        return f"{key.replace('_', ' ')} {value if isinstance(value, str) else number(value)}"
    name, text = NUMBERS[key].name, f"{cell(key, value)} {NUMBERS[key].unit}".rstrip()
    return f"{text} {name}" if name.startswith(("of ", "in ")) else f"{name} {text}"


def megabytes(count: int) -> str:
    """A size in bytes as it is shown everywhere."""
    return said("bytes", count)


def terms(headings: Iterable[str]) -> dict[str, str]:
    """The terms that these headings use."""
    shown = " ".join(headings)
    return {term: says for term, says in TERMS.items() if term in shown}


def sentences(*names: str) -> str:
    """Terms for the end of a command's help, a paragraph each."""
    return "".join(f"\n\n{name}: {TERMS[name]}" for name in names)


def number(value: float | None) -> str:
    """A number at the precision that a reader can use: 4 digits or so, thousands separated."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return IDENTICAL if value > 0 else "−∞"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    if size >= 1:
        return f"{value:.{2 if size >= 10 else 3}f}"
    return f"{value:.3g}"


def is_number(value: object) -> bool:
    """Whether a cell holds a number, as such or as text, or stands for one that is missing."""
    if isinstance(value, str):
        return value in (MISSING, IDENTICAL) or value.lstrip("-−")[:1].isdigit()
    return value is None or isinstance(value, int | float)


def interval(entry: Mapping[str, float | None] | None) -> str | None:
    """An entry {value, low, high}: the number, and the interval in brackets where there is one."""
    if entry is None or entry.get("value") is None:
        return None
    text = number(entry["value"])
    low, high = entry.get("low"), entry.get("high")
    return text if low is None or high is None else f"{text} [{number(low)}, {number(high)}]"
