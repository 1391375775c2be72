"""The model card of an exported pipeline folder: its README.md, as model hubs show it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..config.model_card import folder_of, is_hub_id, read_tree
from ..config.schema import Config
from ..config.yaml_text import YamlError, parse_yaml
from ..errors import ArtifactError
from ..store.files import read_json
from ..store.regular import read_regular
from ..store.run_dir import RunDir, read_coverage
from ..vocabulary import megabytes, said

LICENCE_KEYS = ("license", "license_name", "license_link")
"""What a card says of the licence, in the words of the hub."""
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")
MARK = "---"


@dataclass(frozen=True)
class Source:
    """What is known of the model that was quantized.

    base: its id on the hub, None where it has none; card: the head of its own card; files: of its
    licence, to be copied.
    """

    base: str | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
    files: Sequence[Path] = ()


@dataclass(frozen=True)
class Format:
    """What a card says of the folder's own kind.

    what: after the pipeline's class; needs: of whoever loads it; library: that the hub knows it
    by; tags: more than the usual; size: of the denoiser in bytes, None: as the artifact's.
    """

    what: str
    needs: str
    library: str = "diffusers"
    tags: Sequence[str] = ()
    size: int | None = None


DIFFUSERS = Format(
    "of diffusers whose denoiser is quantized. It computes with integers where the CPU can.",
    "Loading needs the packages qncd-cli, diffusers and accelerate "
    "(`pip install 'qncd-cli[export]'`):",
)


def source_of(source: str) -> Source:
    """What the files on this machine tell of a model source."""
    folder = folder_of(source)
    if folder is None:
        return Source(source if is_hub_id(source) else None)
    base = source if is_hub_id(source) else None
    named = read_tree(folder / "model_index.json").get("_name_or_path")
    if base is None and isinstance(named, str) and named and is_hub_id(named):
        base = named
    files = [path for pattern in LICENCE_FILES for path in sorted(folder.glob(pattern))]
    return Source(base, _head(folder / "README.md"), [path for path in files if path.is_file()])


def _head(path: Path) -> dict[str, Any]:
    """The YAML between the first two lines of dashes; {} where there is none that can be read."""
    try:
        first, _, rest = read_regular(path).decode("utf-8").partition("\n")
        if first.strip() != MARK:
            return {}
        found = parse_yaml(rest.split(f"\n{MARK}")[0])
    except (OSError, UnicodeDecodeError, YamlError):
        return {}
    return found if isinstance(found, dict) else {}


def card_text(
    config: Config,
    run: RunDir,
    quantized: str,
    kind: str,
    lines: Sequence[str],
    source: Source,
    form: Format = DIFFUSERS,
) -> str:
    """README.md. quantized: digest of the artifact; kind: of the pipeline; lines: Python that loads
    the folder and draws an image."""
    coverage = read_coverage(run.coverage)
    head: dict[str, Any] = {key: source.card[key] for key in LICENCE_KEYS if key in source.card}
    if source.base is not None:
        head |= {"base_model": source.base, "base_model_relation": "quantized"}
    label = config.quantization.widths.label
    tags = ["quantized", "qncd", label.lower(), *form.tags]
    head |= {"library_name": form.library, "tags": tags}
    yaml = "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items())
    bits = config.quantization.widths.described(_mean_bits(coverage))
    size = form.size or run.tensors("quantized").stat().st_size + coverage["rest_bytes"]
    share = size / coverage["float_denoiser_bytes"]
    rows = {
        "quantized from": config.model.source if source.base is None else source.base,
        "licence": "as of the model that it was quantized from"
        if "license" in head or source.files
        else "not said by the model that it was quantized from",
        "bits of weights and inputs": bits,
        "denoiser": f"{megabytes(size)}, {said('share_of_float32', share)} of float32",
        "PSNR to full precision": _psnr(run, quantized),
    }
    if config.model.lora:
        rows["LoRA"] = ", ".join(Path(lora).name for lora in config.model.lora)
    inter = config.correction.inter.method
    if inter != "none":
        rows["not part of it"] = f"the correction `{inter}`, which `qncd sample` applies"
    table = "".join(f"| {name} | {text} |\n" for name, text in rows.items())
    code = "".join(f"{line}\n" for line in lines)
    return (
        f"{MARK}\n{yaml}{MARK}\n\n# {rows['quantized from']}, {label}\n\n"
        f"A `{kind}` {form.what}\n\n| | |\n|---|---|\n{table}\n{form.needs}\n\n"
        f"```python\n{code}```\n\n"
        f"Written by `qncd export` (version {__version__}), preset "
        f"`{config.quantization.preset}`.\n"
    )


def _mean_bits(coverage: Mapping[str, Any]) -> tuple[float, float] | None:
    weights, inputs = coverage["mean_weight_bits"], coverage["mean_input_bits"]
    return None if weights is None or inputs is None else (weights, inputs)


def _psnr(run: RunDir, quantized: str) -> str:
    """What eval measured of this very artifact, or that it has not."""
    try:
        metrics = read_json(run.metrics, "qncd eval")
        protocol, fidelity = metrics["protocol"], metrics["fidelity"]
        if protocol["artifact"] != quantized:
            return "not measured"
        count, steps = protocol["num_samples"], protocol["sampling"]["steps"]
        value = said("psnr_db", fidelity["psnr_db"])
    except (ArtifactError, KeyError, TypeError):
        return "not measured"
    return f"{value} over {count} samples of {steps} steps"
