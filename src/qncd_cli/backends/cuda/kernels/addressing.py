"""Where the operands of a product lie: rows and outputs of a tile, and the pixel of a tap."""

import triton
import triton.language as tl


@triton.jit
def tile_of(outputs, ROWS: tl.constexpr, OUTPUTS: tl.constexpr):
    """The rows and the outputs of this program's tile; tiles of one row lie one after the other."""
    columns = (outputs + OUTPUTS - 1) // OUTPUTS
    tile = tl.program_id(0)
    row = (tile // columns) * ROWS + tl.arange(0, ROWS)
    output = (tile % columns) * OUTPUTS + tl.arange(0, OUTPUTS)
    return row, output


@triton.jit
def corners(
    row,
    height,
    width,
    out_height,
    out_width,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    POINTWISE: tl.constexpr,
):
    """Where the input of each row of the result begins.

    The number of its image's first pixel, and the line and column of the first tap in that image.
    POINTWISE: the number of its only pixel, and zeros.
    """
    if POINTWISE:
        image = row.to(tl.int64)
        top = row * 0
        left = row * 0
    else:
        out_pixels = out_height * out_width
        image = (row // out_pixels).to(tl.int64) * (height * width)
        top = (row % out_pixels) // out_width * STRIDE_H - PAD_H
        left = row % out_width * STRIDE_W - PAD_W
    return image, top, left


@triton.jit
def pixel_of(
    tap,
    here,
    image,
    top,
    left,
    height,
    width,
    KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    POINTWISE: tl.constexpr,
):
    """The pixel that a tap sees at each row, and whether it is one of the image; here: rows of the
    result. image, top, left: of `corners`."""
    if POINTWISE:
        pixel = image
        inside = here
    else:
        y = top + tap // KERNEL_W * DILATION_H
        x = left + tap % KERNEL_W * DILATION_W
        inside = here & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        pixel = image + y * width + x
    return pixel, inside
