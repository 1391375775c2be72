"""Whole pipeline folders of graphs, as Optimum's pipelines for ONNX Runtime and OpenVINO load them.

The denoiser is the quantized one; text encoders and first stage are float32. Optimum is not needed
to write them. Everything is run before the folder is in its place: the denoiser beside the
simulation, each other part beside the module that it was made of.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends.onnx import runtimes
from ..backends.onnx.signature import Inputs, Signature
from ..config.schema import Config
from ..errors import ArtifactError, ModelError
from ..models.loading import DiffusionModel
from ..progress import Track, counted
from ..quant.layers import StepState
from ..runtime.denoiser import Denoiser, quantized_denoiser
from ..runtime.exported_graph import TARGETS, in_float32, write_float_graph, write_graph
from ..store.artifacts import Artifact
from ..store.files import write_json
from . import graph, optimum_calls
from .optimum_calls import PIPELINES, Interface

MODEL_INDEX = "model_index.json"
FLOAT_BOUND = 1e-3
"""Largest difference of a part that is not quantized from its module, as a share of the largest
output."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
KNOWN_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
LEFT_OUT = ("safety_checker", "image_encoder")
"""Parts that Optimum has no graphs for."""
OF_TRANSFORMERS_4 = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Name of a class in transformers 5 -> its name in both; optimum-onnx 0.1 needs 4."""


@dataclass(frozen=True)
class Format:
    """target: of graphs; file: what one is called in each part's folder; package: of Optimum."""

    target: str
    file: str
    package: str


FORMATS = {
    "optimum-onnx": Format("onnx", "model.onnx", "optimum-onnx[onnxruntime]"),
    "optimum-openvino": Format("openvino", "openvino_model.xml", "optimum-intel[openvino]"),
}


def require(to: str) -> None:
    """Raises BackendUnavailable that says what to install."""
    runtimes.require(f"--to {to}", TARGETS[FORMATS[to].target].packages)


def interface_of(kind: str, to: str) -> Interface:
    """How the denoiser of a pipeline class is called. Raises ModelError for one without graphs."""
    if kind not in PIPELINES:
        raise ModelError(
            f"--to {to}: Optimum has no pipeline for {kind}",
            f"--to {FORMATS[to].target} writes the denoiser alone; Optimum has "
            f"{', '.join(PIPELINES)}",
        )
    return PIPELINES[kind]


def write_rest(
    pipeline: Any, scheduler: Any, source: Path | None, to: str, folder: Path, track: Track
) -> dict[str, float]:
    """All but the denoiser's graph; how far each part is from its module, by folder.

    scheduler: that the folder gets; source: the pipeline folder whose tokenizers are copied, None
    where there is none. Raises ArtifactError for a part beyond FLOAT_BOUND, BackendUnavailable for
    one that cannot be traced.
    """
    pipeline.register_modules(scheduler=scheduler)
    kind = interface_of(type(pipeline).__name__, to)
    _check_parts(pipeline, to)
    _write_index(pipeline, folder, source)
    pipeline.components[kind.folder].save_config(folder / kind.folder)
    signatures: dict[str, tuple[Any, Signature]] = {
        name: (part, optimum_calls.text_signature(part))
        for name in TEXT_ENCODERS
        if (part := pipeline.components.get(name)) is not None
    }
    vae = pipeline.vae
    signatures["vae_decoder"] = vae, optimum_calls.decoder_signature(vae)
    signatures["vae_encoder"] = vae, optimum_calls.encoder_signature(vae)
    found = {}
    what = "writing text encoders and first stage"
    for name, tick in counted(track, list(signatures), what, len(signatures), "parts"):
        part, signature = signatures[name]
        part.to("cpu", torch.float32).eval().requires_grad_(False)
        place = folder / name
        place.mkdir()
        _save_config(part, place)
        path = place / FORMATS[to].file
        write_float_graph(part, signature, FORMATS[to].target, path, f"--to {to}: {name}")
        found[name] = _difference(part, signature, to, path)
        if not found[name] <= FLOAT_BOUND:
            raise ArtifactError(
                f"--to {to}: {name} differs from the model's by {found[name]:.3g} of the largest "
                f"output, more than {FLOAT_BOUND:g}",
                "nothing was written; another version of the runtime or of torch may be right",
            )
        tick()
    return found


def _check_parts(pipeline: Any, to: str) -> None:
    """Raises ModelError for a part that Optimum has no names for."""
    known = {**dict.fromkeys(TEXT_ENCODERS, KNOWN_ENCODERS), "vae": ("AutoencoderKL",)}
    for name, kinds in known.items():
        part = pipeline.components.get(name)
        if part is not None and type(part).__name__ not in kinds:
            raise ModelError(
                f"--to {to}: the pipeline's {name} is of the class {type(part).__name__}, "
                "which Optimum loads no graph of",
                f"known: {', '.join(kinds)}; --to {FORMATS[to].target} writes the denoiser alone",
            )


def _save_config(part: Any, place: Path) -> None:
    """config.json, of diffusers' or of transformers' models."""
    if hasattr(part, "save_config"):
        part.save_config(place)
    else:
        part.config.save_pretrained(place)


def _write_index(pipeline: Any, folder: Path, source: Path | None) -> None:
    """model_index.json, scheduler, tokenizers and what prepares images."""
    pipeline.save_config(folder)
    path = folder / MODEL_INDEX
    index = json.loads(path.read_text(encoding="utf-8"))
    own = _read_index(source)
    for name, part in pipeline.components.items():
        if name in LEFT_OUT and name in index:
            index[name] = [None, None]
        elif name in (*TOKENIZERS, "feature_extractor", "scheduler") and part is not None:
            kept = None if source is None or name == "scheduler" else source / name
            if kept is not None and kept.is_dir():
                shutil.copytree(kept, folder / name)
                index[name] = own.get(name, index[name])
            else:
                part.save_pretrained(folder / name)
            if name in TOKENIZERS:
                _add_vocabulary(part, folder / name)
                index[name][1] = OF_TRANSFORMERS_4.get(index[name][1], index[name][1])
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _read_index(source: Path | None) -> dict[str, Any]:
    if source is None:
        return {}
    found: dict[str, Any] = json.loads((source / MODEL_INDEX).read_text(encoding="utf-8"))
    return found


def _add_vocabulary(tokenizer: Any, place: Path) -> None:
    """The files that transformers 4 reads of CLIP's; 5 writes one that holds them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = getattr(backend, "model", None)
    there = all((place / name).is_file() for name in ("vocab.json", "merges.txt"))
    if model is not None and type(model).__name__ == "BPE" and not there:
        model.save(str(place))


def _difference(part: Any, signature: Signature, to: str, path: Path) -> float:
    """The largest one, as a share of the largest output, on random inputs of another size."""
    generator = torch.Generator().manual_seed(0)

    def random(example: Tensor) -> Tensor:
        sides = [side + side for side in example.shape[2:]]
        if not example.is_floating_point():
            return torch.randint(0, part.config.vocab_size, (1, 7), generator=generator)
        return torch.randn(1, example.shape[1], *sides, generator=generator)

    inputs = {name: random(example) for name, example in signature.inputs.items()}
    with torch.no_grad():
        expected = signature.call(part, inputs)
    expected = (expected,) if isinstance(expected, Tensor) else expected
    got = TARGETS[FORMATS[to].target].open(path).run_all(inputs)
    shares = [
        ((got[name] - value).abs().max() / value.abs().max()).item()
        for name, value in zip(signature.outputs, expected, strict=True)
    ]
    return max(shares) if all(share == share for share in shares) else float("inf")


def write_denoiser(
    config: Config,
    model: DiffusionModel,
    quantized: Artifact,
    interface: Interface,
    to: str,
    folder: Path,
    cpus: str,
    check: graph.Check,
    track: Track,
) -> dict[str, Any]:
    """The quantized denoiser's graph, run beside the simulation; what graph.json says of it.

    model: on the CPU in float32; cpus: one of graph.CPUS. Raises as `graph.run` does.
    """
    target, path = FORMATS[to].target, folder / interface.folder / FORMATS[to].file
    cache = quantized.body["cache_time_embeddings"]
    traced = quantized_denoiser(model, quantized, "simulate", cache)
    parts = dict(traced.module.named_modules())
    module = optimum_calls.traced_module(traced.module)
    with torch.no_grad():
        condition = in_float32(model.condition(model.labels([0], config.sampling.classes)))
    signature = optimum_calls.denoiser_signature(interface, model.denoiser.config, condition)
    traced = Denoiser(module, traced.step, traced.group_bounds)
    any_cpu = cpus == graph.ANY
    write_graph(traced, signature, target, path, f"--to {to}", any_cpu=any_cpu)
    layers = graph.rows(model, quantized, parts, target, cpus)
    del traced, module
    session = TARGETS[target].open(path)
    called = optimum_calls.called_by_name(model.denoiser, interface, session.run)
    exported = Denoiser(called, StepState(), tuple(quantized.body["group_bounds"]))
    simulated = quantized_denoiser(model, quantized, "simulate", cache)
    compared = graph.compare(config, model, simulated, exported, check.samples, track)
    graph.check_bound(compared, check.bound, to)
    return {
        "format": to,
        "file": path.relative_to(folder).as_posix(),
        "source": model.source,
        "digests": {"model": model.digest, "quantized": quantized.digest},
        "inputs": _described(signature.inputs, signature.sizes),
        "timestep_group_bounds": quantized.body["group_bounds"],
        "cpus": cpus,
        "layers": layers,
        "products": graph.products(layers, session),
        "agreement": compared,
    }


def _described(inputs: Inputs, sizes: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
    """dtype and shape by name, open sizes by their names."""
    return {
        name: {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": [
                str(getattr(sizes[name][i], "__name__", sizes[name][i])) if i in sizes[name] else n
                for i, n in enumerate(value.shape)
            ],
        }
        for name, value in inputs.items()
    }


def finish(folder: Path, index: Mapping[str, Any], parts: Mapping[str, float]) -> dict[str, Any]:
    """Write graph.json beside model_index.json; what it says."""
    said = {**index, "float_parts": dict(parts)}
    write_json(folder / graph.INDEX, said)
    return said
