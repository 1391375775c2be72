"""What all kernels share: codes of numbers, and numbers in 16 bits."""

import triton
import triton.language as tl

ROUND_TO_EVEN: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2^23, as quant/affine.py has it: y + this is y rounded half to even, |y| < 2^22."""
ITS_BITS: tl.constexpr = tl.constexpr(0x4B400000)


@triton.jit
def code(x, scale, zero_point, largest):
    """x float32 -> code in [0, largest], int32; NaN becomes the zero-point."""
    y = tl.div_rn(x, scale)
    y = tl.where(y == y, y, 0.0)
    low = (-zero_point).to(tl.float32)
    high = (largest - zero_point).to(tl.float32)
    y = tl.minimum(tl.maximum(y, low), high)
    rounded = (y + ROUND_TO_EVEN).to(tl.int32, bitcast=True) - ITS_BITS
    return rounded + zero_point


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """float32 -> DTYPE, rounded half to even; bfloat16 by hand, as the interpreter cuts it off."""
    if tl.bfloat16 == DTYPE:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = bits.to(tl.float32, bitcast=True)
    return value.to(DTYPE)
