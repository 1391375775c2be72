"""qncd: post-training quantization of diffusion models with noise correction (QNCD).

The four stages in Python, on a run directory, as the commands have them:

    from qncd_cli import calibrate, evaluate, load_config, quantize, sample

    calibrate(load_config("fashion_ldm", ["sampling.steps=10"]), "runs/mine")
    quantize("runs/mine")
    print(sample("runs/mine", num=16).contact_sheet)
    print(evaluate("runs/mine").metrics["fidelity"]["psnr_db"])

What is unchanged is skipped. Errors are `qncd_cli.errors.QncdError` with the text that the command
line shows. A name is imported when it is asked for: `import qncd_cli` alone brings no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config.loading import load_config
    from .runs.calibrate import calibrate
    from .runs.evaluate import evaluate
    from .runs.quantize import quantize
    from .runs.sample import sample

__all__ = ["calibrate", "evaluate", "load_config", "quantize", "sample"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "config.loading" if name == "load_config" else f"runs.{name}"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
