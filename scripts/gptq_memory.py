"""Matrices of a Hessian's size that GPTQ adds to it at its height (stages.footprint.GPTQ_MATRICES).

python scripts/gptq_memory.py --inputs 4000
"""

from __future__ import annotations

import click
import torch

from qncd_cli.quant.rounding import round_gptq
from qncd_cli.resident import peak_of_process
from qncd_cli.spec import weight_spec


@click.command()
@click.option("--inputs", default=4000, show_default=True, help="Of a layer with 16 outputs.")
def main(inputs: int) -> None:
    """Peak of the resident set while one layer is rounded, in units of its Hessian."""
    torch.manual_seed(0)
    spec = weight_spec(4)
    round_gptq(torch.randn(16, 64), spec, torch.eye(64))  # what is loaded on first use
    rows = torch.randn(2 * inputs, inputs)
    hessian = rows.T @ rows
    weight = torch.randn(16, inputs)
    held = peak_of_process()  # rows and Hessian
    rows_bytes = rows.nbytes
    del rows
    round_gptq(weight, spec, hessian)
    peak = peak_of_process()
    print(f"{(peak - held + rows_bytes) / hessian.nbytes:.2f}")


if __name__ == "__main__":
    main()
