"""Shipped tiles of the product kernel, and which of them a product takes by arithmetic.

On a GPU those of products of bytes are timed once (`tuning`). Each is compiled ahead of time for
every architecture in ARCHITECTURES, and its registers, shared memory and spills are looked at
(scripts/gpu_kernels.py and its tests).
"""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = (80, 86, 89, 90, 120)
"""Compute capabilities, 10 major + minor, that the kernels are compiled for in the tests."""
OLDEST = ARCHITECTURES[0]
"""Triton 3.8 has no product of bytes on the matrix units of older ones (sm_75)."""
TAP_CHANNELS = 64
"""Channels that a tap's weights are filled up to: a group of packed nibbles, two steps of IMMA.
Larger: more zeros are multiplied where channels are no multiple."""
TILES_PER_UNIT = 1
"""Tiles a multiprocessor should have at least; more: smaller tiles, which read operands again."""


@dataclass(frozen=True)
class Tile:
    """rows, outputs: of the part of the result that one program computes; depth: bytes of the
    weight's row a step, of which 4-bit weights have two channels; warps, stages: as in Triton."""

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int

    def count(self, rows: int, outputs: int) -> int:
        """Tiles of a result [rows, outputs]."""
        return -(-rows // self.rows) * -(-outputs // self.outputs)

    @property
    def constants(self) -> dict[str, int]:
        """What is compiled into a kernel."""
        return {"ROWS": self.rows, "OUTPUTS": self.outputs, "DEPTH": self.depth}

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        return {"num_warps": self.warps, "num_stages": self.stages}


INT8 = (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3))
PACKED = (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3))
FLAT = Tile(16, 64, 64, 4, 3), Tile(16, 64, 32, 4, 3)
"""For results of a few rows, as of the embedding of a timestep: int8 and packed."""
HALF_INT8 = (INT8[0], Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 8, 3))
HALF_PACKED = (PACKED[1], PACKED[2])
"""For inputs of 16 bits in floating point, which take more registers."""
WIDE = Tile(32, 64, 32, 8, 2)
"""For inputs in float32, which no matrix unit multiplies exactly."""
ATTENTION = Tile(64, 64, 64, 4, 3)
"""For the products of attention: rows, columns, depth."""
QUANTIZE_TILES = ((64, 64), (16, 256))
"""Pixels and channels that one program quantizes: images whose channels lie apart, and rows."""
STATISTICS_PIXELS = 128
"""Pixels that a program adds up at once for the statistics of a group."""
ROW_NUMBERS = 4096
"""Numbers of whole rows that one program holds; more: its registers spill."""


def choose_tile(rows: int, outputs: int, packed: bool, units: int, bits: int = 8) -> Tile:
    """The largest tile that leaves no multiprocessor idle, else the smallest; flat for few rows.

    packed: the weights are; units: multiprocessors of the device; bits: of an input's number.
    """
    if bits == 32:
        return WIDE
    if rows <= FLAT[packed].rows:
        return FLAT[packed]
    tiles = tiles_of(packed, bits)
    full = (tile for tile in tiles if tile.count(rows, outputs) >= TILES_PER_UNIT * units)
    return next(full, tiles[-1])


def candidates(rows: int, packed: bool) -> tuple[Tile, ...]:
    """The tiles that may be the fastest for a product of bytes with so many rows."""
    few = (FLAT[packed],) if rows <= 4 * FLAT[packed].rows else ()
    return tiles_of(packed, 8) + few


def tiles_of(packed: bool, bits: int) -> tuple[Tile, ...]:
    """The tiles for inputs of 8 or 16 bits, from large to small, without the flat one."""
    if bits == 8:
        return PACKED if packed else INT8
    return HALF_PACKED if packed else HALF_INT8


def widest_rows(width: int) -> int:
    """Rows of that width which one program norms at once."""
    return max(1, min(16, ROW_NUMBERS // width))


def efficiency(rows: int, outputs: int, channels: int, tile: Tile, units: int) -> float:
    """Share of the matrix units' work that is not filling: of tiles, of taps, of the last wave."""
    count = tile.count(rows, outputs)
    padded = -(-channels // TAP_CHANNELS) * TAP_CHANNELS
    filled = rows * outputs / (count * tile.rows * tile.outputs) * channels / padded
    waves = -(-count // units)
    return filled * count / (waves * units)
