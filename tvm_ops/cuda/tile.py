"""What a block of threads makes of a matrix product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from targets import Gpu
from tvm_ops.cuda.problem import Problem
from tvm_ops.cuda.tir import LANES
from tvm_ops.ops.bitserial_gemm import FRAGMENT_WORDS, MIN_FRAGMENT_ROWS

CHUNK = 4
"""Words that a thread copies at once, and that ldmatrix reads of a row."""


# Rows, columns, down, across, split; larger ones first.
_ORDINARY = ((8, 64, 8, 1, 1), (8, 32, 8, 1, 1), (4, 32, 8, 1, 1), (4, 32, 4, 1, 1), (2, 32, 4, 1, 1), (2, 32, 4, 1, 2))
_FEW_ROWS = ((8, 32, 1, 1, 8), (4, 32, 1, 1, 8), (2, 32, 1, 1, 8), (1, 32, 1, 1, 8))
_TENSOR = (
    (64, 64, 2, 2, 1),
    (32, 64, 4, 1, 1),
    (32, 64, 2, 2, 1),
    (32, 64, 2, 1, 1),
    (32, 32, 2, 1, 2),
    (16, 32, 2, 1, 2),
    (16, 32, 1, 1, 4),
)
_MIN_BLOCKS = 128  # a grid of fewer leaves multiprocessors idle: the largest of today's GPUs have some 130
_SHARED = 48 << 10  # so that several blocks fit a multiprocessor


@dataclass(frozen=True)
class Tile:
    """What a block of threads makes at once.

    tensor: whether tensor cores count. rows, columns: of a warp. down, across: warps that make the block, side by
    side. split: warps that share the depth of a step, and add their sums in the end. depth: words of a step. stages:
    steps that shared memory holds. All powers of two, but for the stages.
    """

    tensor: bool
    rows: int
    columns: int
    down: int
    across: int
    split: int
    depth: int
    stages: int

    @property
    def number(self) -> int:
        """The tile as a number, which tuning records draw: a hexadecimal digit each, logarithms but for the stages."""
        tensor, *sizes, stages = map(int, astuple(self))
        digits = [tensor, *(size.bit_length() - 1 for size in sizes), stages]
        return int("".join(f"{digit:x}" for digit in digits), 16)

    @classmethod
    def of(cls, number: int) -> Tile:
        """The tile of a number."""
        tensor, *logarithms, stages = (int(digit, 16) for digit in f"{number:08x}")
        rows, columns, down, across, split, depth = (1 << digit for digit in logarithms)
        return cls(bool(tensor), rows, columns, down, across, split, depth, stages)

    def steps(self, problem: Problem) -> int:
        """Of a pair's depth."""
        return math.ceil(problem.depth / self.depth)

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.rows * self.down, self.columns * self.across

    @property
    def threads(self) -> int:
        return LANES * self.down * self.across * self.split

    @property
    def pitch(self) -> int:
        """Words from row to row in shared memory; rows that ordinary cores read stand apart by one chunk."""
        return self.depth + (0 if self.tensor else CHUNK)

    @property
    def shared_words(self) -> int:
        return self.stages * sum(self.block) * self.pitch


def tiles(problem: Problem, gpu: Gpu) -> list[Tile]:
    """The tiles that suit a product, the one of the rule first: the largest that fills the GPU."""
    tensor = problem.operation != "" and problem.operation == gpu.bit_product and problem.rows >= MIN_FRAGMENT_ROWS
    few = problem.rows <= _FEW_ROWS[0][0]
    found = []
    for sizes in _TENSOR if tensor else _FEW_ROWS if few else _ORDINARY:
        split = sizes[-1]
        least = split * (FRAGMENT_WORDS if tensor else CHUNK)
        most = max(32, least) if tensor else max(16, 2 * least)
        depth = least
        while depth < most and depth < problem.depth and _stage_bytes(sizes, 2 * depth) <= _SHARED // 3:
            depth *= 2
        steps = math.ceil(problem.depth / depth) * problem.pairs
        found.append(Tile(tensor, *sizes, depth, min(3 if gpu.async_copy else 2, steps + 1)))
    if few:
        fitting = [tile for tile in found if tile.rows >= problem.rows]
        return fitting[::-1]

    def blocks_of(tile: Tile) -> int:
        rows, columns = tile.block
        return math.ceil(problem.rows / rows) * math.ceil(problem.columns / columns)

    filling = [tile for tile in found if blocks_of(tile) >= _MIN_BLOCKS] or found[-1:]
    return [filling[0], *(tile for tile in found if tile is not filling[0])]


def _stage_bytes(sizes: Sequence[int], depth: int) -> int:
    rows, columns, down, across, _ = sizes
    return 4 * (rows * down + columns * across) * depth
