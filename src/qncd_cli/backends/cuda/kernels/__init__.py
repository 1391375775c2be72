"""The kernels in Triton.

Codes q are kept as q - 128, int8, images in the order [N, H, W, C]. With c = q - 128 and the
zero-point z an output is

    sum_k (q_k - z) w_k = sum_k c_k w_k + (128 - z) sum_k w_k,    k over the taps inside the image

whose first sum reads 0 outside, and whose second comes from the weight's sums per tap. All sums are
int32. float32 operations stand in the order of backends/reference.py and must not be contracted:
whoever launches says enable_fp_fusion=False.

Only builtins of the language are called, not its standard library, which is compiled when triton is
imported and cannot be interpreted afterwards. `launch` loads this package, once to be compiled and
once to be interpreted. Annotations are read by Triton: no `from __future__ import annotations`.
"""

from .float_product import float_product
from .matmul import matmul
from .norms import group_statistics, normed_image, normed_rows
from .product import product
from .quantize import quantize

__all__ = [
    "float_product",
    "group_statistics",
    "matmul",
    "normed_image",
    "normed_rows",
    "product",
    "quantize",
]
