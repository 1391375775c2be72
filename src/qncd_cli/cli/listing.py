"""The commands inspect and models: what there is."""

from __future__ import annotations

from pathlib import Path

from ..artifact_files import read_stored
from ..config_files import load_config, shipped_configs
from ..presets import PRESETS
from ..vocabulary import megabytes
from .console import Console


def inspect(console: Console, file: str) -> None:
    artifact = read_stored(Path(file))
    tensors = {
        name: {"dtype": type_.removeprefix("torch."), "shape": list(shape)}
        for name, (type_, shape) in sorted(artifact.tensors.items())
    }
    payload = {
        "kind": artifact.kind,
        "digest": artifact.digest,
        "config": artifact.config,
        "model": artifact.model,
        "parents": artifact.parents,
        "body": artifact.body,
        "tensors": tensors,
    }

    def render() -> None:
        print(
            f"{file}: {artifact.kind}, {megabytes(Path(file).stat().st_size)}, "
            f"content {artifact.digest[:16]}"
        )
        print(f"model {artifact.model}, configuration {artifact.config or '-'}")
        for name, digest in artifact.parents.items():
            print(f"made from {name} {digest[:16]}")
        rows = [[n, t["dtype"], str(t["shape"])] for n, t in tensors.items()]
        console.table(["tensor", "dtype", "shape"], rows)

    console.result(payload, render)


def models(console: Console) -> None:
    from ..models.zoo import training_record, zoo_models

    configs = {}
    for name, path in shipped_configs().items():
        config = load_config(str(path))
        q = config.quantization
        configs[name] = {
            "model": config.model.source,
            "bits": f"W{q.weights.bits}A{q.activations.bits}",
            "sampler": f"{config.sampling.scheduler}, {config.sampling.steps} steps",
        }
    packaged = {name: training_record(name) for name in zoo_models()}
    presets = {
        name: {
            "description": preset.description,
            "left_in_float": preset.exclusions_note or None,
            "settings": preset.settings,
        }
        for name, preset in PRESETS.items()
    }

    def render() -> None:
        rows = []
        for name, record in packaged.items():
            date = record.get("unet", {}).get("date", "")
            rows.append([f"zoo:{name}", date, megabytes(_bytes_below(zoo_models()[name]))])
        console.table(["packaged model", "trained", "size"], rows)
        cells = [[n, c["bits"], c["model"], c["sampler"]] for n, c in configs.items()]
        console.table(["configuration", "bits", "model", "sampler"], cells)
        said = [[n, p["description"], p["left_in_float"]] for n, p in presets.items()]
        console.table(["preset", "what it is", "left in float, unless strict"], said)

    console.result({"models": packaged, "configs": configs, "presets": presets}, render)


def _bytes_below(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
