"""Draw docs/picture.png: the same seeds in full precision, at W4A8 by `best` and by `minmax`.

    python scripts/readme_picture.py [--num 10] [--runs FOLDER]

Makes both runs of the packaged fashion-ldm with the qncd command (about two minutes on two cores,
unless they are there) and puts their images below each other, one column a class.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "picture.png"
CONFIG = "fashion_ldm_w4a8"
SCALE = 2
GAP = 4
LABEL_WIDTH = 190


def run(preset: str, folder: Path, num: int) -> Path:
    """The run directory of fashion-ldm at W4A8 with that preset."""
    target = folder / preset
    command = [sys.executable, "-m", "qncd_cli", "run", "--config", CONFIG, "--num", str(num)]
    command += ["--run-dir", str(target), "--set", f"quantization.preset={preset}"]
    subprocess.run(command, check=True, cwd=folder)
    return target


def compose(rows: list[tuple[str, list[Path]]]) -> Image.Image:
    """One row of images for each label, in the order given."""
    width, height = (SCALE * side for side in Image.open(rows[0][1][0]).size)
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
    parser.add_argument("--num", type=int, default=10, help="images a row")
    parser.add_argument("--runs", type=Path, default=Path("runs/picture"), help="where the runs go")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    runs = {
        preset: run(preset, options.runs.resolve(), options.num) for preset in ("best", "minmax")
    }
    names = [f"{seed:06d}.png" for seed in range(options.num)]
    manifest = json.loads((runs["best"] / "metrics.json").read_text())
    full = options.runs.resolve() / manifest["protocol"]["full"]
    sets = [
        ("full precision", full),
        ("W4A8, preset best", runs["best"] / "samples" / "quantized"),
        ("W4A8, preset minmax", runs["minmax"] / "samples" / "quantized"),
    ]
    compose([(label, [folder / name for name in names]) for label, folder in sets]).save(
        PICTURE, optimize=True
    )
    print(PICTURE)


if __name__ == "__main__":
    main()
