"""Draw the same seeds in full precision, at W4A8 by `best` and by `minmax`.

    python scripts/readme_picture.py [--config emoji_ldm] [--num 10] [--runs FOLDER]

Makes both runs of a packaged model with the qncd command (about two minutes on two cores, unless
they are there) and puts their images below each other, one column a class: docs/picture.png of
fashion_ldm, docs/picture_emoji_ldm.png of emoji_ldm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = "fashion_ldm"
WIDTH = 64
"""Of an image, pixels; smaller ones are magnified."""
GAP = 4
LABEL_WIDTH = 190


def run(config: str, preset: str, folder: Path, num: int) -> Path:
    """The run directory of the model at W4A8 with that preset."""
    target = folder / f"{config}_{preset}"
    command = [sys.executable, "-m", "qncd_cli", "run", "--config", f"{config}_w4a8"]
    command += ["--num", str(num), "--run-dir", str(target)]
    command += ["--set", f"quantization.preset={preset}"]
    subprocess.run(command, check=True, cwd=folder)
    return target


def compose(rows: list[tuple[str, list[Path]]]) -> Image.Image:
    """One row of images for each label, in the order given."""
    width, height = Image.open(rows[0][1][0]).size
    width, height = WIDTH, height * WIDTH // width
    count = len(rows[0][1])
    size = LABEL_WIDTH + count * (width + GAP), len(rows) * (height + GAP) + GAP
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for line, (label, paths) in enumerate(rows):
        top = GAP + line * (height + GAP)
        draw.text((GAP, top + height // 2), label, fill="black", font=font, anchor="lm")
        for column, path in enumerate(paths):
            image = (
                Image.open(path).convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            )
            sheet.paste(image, (LABEL_WIDTH + column * (width + GAP), top))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default=DEFAULT, help="of a packaged model")
    parser.add_argument("--num", type=int, default=10, help="images a row")
    parser.add_argument("--runs", type=Path, default=Path("runs/picture"), help="where the runs go")
    options = parser.parse_args()
    name = "picture.png" if options.config == DEFAULT else f"picture_{options.config}.png"
    options.runs.mkdir(parents=True, exist_ok=True)
    runs = {
        preset: run(options.config, preset, options.runs.resolve(), options.num)
        for preset in ("best", "minmax")
    }
    names = [f"{seed:06d}.png" for seed in range(options.num)]
    manifest = json.loads((runs["best"] / "metrics.json").read_text())
    full = options.runs.resolve() / manifest["protocol"]["full"]
    sets = [
        ("full precision", full),
        ("W4A8, preset best", runs["best"] / "samples" / "quantized"),
        ("W4A8, preset minmax", runs["minmax"] / "samples" / "quantized"),
    ]
    picture = ROOT / "docs" / name
    compose([(label, [folder / name for name in names]) for label, folder in sets]).save(
        picture, optimize=True
    )
    print(picture)


if __name__ == "__main__":
    main()
