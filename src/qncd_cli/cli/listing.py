"""The command models: what there is."""

from __future__ import annotations

from pathlib import Path

from ..config.loading import load_config
from ..config.presets import PRESETS
from ..config.shipped import shipped_configs
from ..vocabulary import megabytes
from .console import Console


def models(console: Console) -> None:
    from ..models.zoo import training_record, zoo_models

    configs = {}
    for name, path in shipped_configs().items():
        config = load_config(str(path))
        configs[name] = {
            "model": config.model.source,
            "bits": config.quantization.widths.label,
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
        print("Other bits: --bits w8a8, or a name like fashion_ldm_w8a8")
        said = [[n, p["description"], p["left_in_float"]] for n, p in presets.items()]
        console.table(["preset", "what it is", "left in float, unless strict"], said)

    console.result({"models": packaged, "configs": configs, "presets": presets}, render)


def _bytes_below(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
