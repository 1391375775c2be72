"""Write an architecture with random weights as a diffusers folder, in the type that is asked for.

python scripts/random_folder.py dit-xl DIR --dtype bfloat16
"""

from __future__ import annotations

from pathlib import Path

import click
from diffusers.models.modeling_utils import ModelMixin

from qncd_cli.models.loading import DTYPES, FIRST_STAGES
from qncd_cli.models.random_models import RANDOM, random_pipeline


@click.command()
@click.argument("name", type=click.Choice(sorted(RANDOM)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), default="float32", show_default=True)
def main(name: str, folder: Path, dtype: str) -> None:
    """First stages stay in float32, as qncd computes with them."""
    pipeline = random_pipeline(name)
    for part, module in pipeline.components.items():
        if isinstance(module, ModelMixin) and part not in FIRST_STAGES:
            module.to(DTYPES[dtype])
    pipeline.save_pretrained(folder)


if __name__ == "__main__":
    main()
