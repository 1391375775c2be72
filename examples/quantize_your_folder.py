"""From a diffusers folder to a quantized folder, stage by stage.

    python examples/quantize_your_folder.py models/my-model exported/my-model --prompts prompts.txt

What is written here as a configuration is what can be changed; docs/config.md lists all keys.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from qncd_cli import calibrate, load_config, quantize, sample


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """Scheduler, steps and guidance that are not set are the model's own."""
    sampling: dict[str, Any] = {}
    if options.prompts is not None:  # of a text model
        sampling["prompts"] = str(options.prompts.resolve())
    if options.steps is not None:
        sampling["steps"] = options.steps
    return {
        "model": {"source": str(options.model.resolve())},
        "sampling": sampling,
        "calibration": {"trajectories": options.trajectories, "batch_size": options.batch_size},
        "quantization": {
            "preset": "best",
            "weights": {"bits": options.weights},
            "activations": {"bits": options.activations},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a diffusers folder (model_index.json)")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--prompts", type=Path, help="of a text model: one prompt a line")
    parser.add_argument("--weights", type=int, default=4, help="bits (default: 4)")
    parser.add_argument("--activations", type=int, default=8, help="bits (default: 8)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    parser.add_argument("--trajectories", type=int, default=64, help="for calibration")
    parser.add_argument("--batch-size", type=int, default=2, help="trajectories at once")
    parser.add_argument("--num", type=int, default=8, help="images to look at (default: 8)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/example"))
    options = parser.parse_args()

    run = options.run_dir
    run.mkdir(parents=True, exist_ok=True)
    config = run / "my.yaml"
    config.write_text(json.dumps(configuration(options), indent=2))  # JSON is YAML

    calibrate(load_config(config), run)
    quantize(run)
    drawn = sample(run, num=options.num)
    export = ["export", "--to", "diffusers", str(options.out), "--run-dir", str(run), "--force"]
    subprocess.run([sys.executable, "-m", "qncd_cli", *export], check=True)
    print(f"images: {drawn.contact_sheet}")
    print(f"load it: python examples/load_in_diffusers.py {options.out}")


if __name__ == "__main__":
    main()
