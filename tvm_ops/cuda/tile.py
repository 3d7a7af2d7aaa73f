"""What a block of threads makes of a matrix product."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace

from targets import Gpu
from tvm_ops.cuda.problem import Problem
from tvm_ops.cuda.ptx import LANES
from tvm_ops.ops.bitserial_gemm import FRAGMENT_WORDS, MIN_FRAGMENT_ROWS

CHUNK = 4
"""Words that a thread copies at once, and that ldmatrix reads of a row."""


# Rows, columns, down, across, split; larger ones first. With few rows, the smallest that holds them.
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
        """Of the steps."""
        return self.stages * sum(self.block) * self.pitch

    @property
    def shared_bytes(self) -> int:
        """Of the steps, and of the sums that warps exchange."""
        return 4 * (self.shared_words + (self.split - 1) * math.prod(self.block))

    @property
    def least_depth(self) -> int:
        """A step in which every warp has something to count."""
        return self.split * (FRAGMENT_WORDS if self.tensor else CHUNK)


def tiles(problem: Problem, gpu: Gpu) -> list[Tile]:
    """The tiles that suit a product, first the one of the rule: the largest that fills the GPU."""
    suiting = _suiting(problem, gpu)
    filling = [tile for tile in suiting if _blocks(problem, tile) >= _MIN_BLOCKS]
    rule = (filling or suiting[-1:])[0]
    variants = {
        replace(tile, depth=tile.depth * halves // 2, stages=stages): None
        for tile in suiting
        for halves in (1, 2, 4)
        for stages in (2, 3, 4)
    }
    fitting = [
        tile
        for tile in variants
        if tile.depth >= tile.least_depth
        and tile.stages <= tile.steps(problem) * problem.pairs + 1
        and tile.shared_bytes <= gpu.shared_bytes
    ]
    return [rule, *(tile for tile in fitting if tile != rule)]


def _suiting(problem: Problem, gpu: Gpu) -> list[Tile]:
    """One tile of each size, larger ones first."""
    tensor = problem.operation != "" and problem.operation == gpu.bit_product and problem.rows >= MIN_FRAGMENT_ROWS
    holding = [size for size in _FEW_ROWS if size[0] >= problem.rows]
    sizes = holding[-1:] or (_TENSOR if tensor else _ORDINARY)
    found = []
    for size in sizes:
        tile = Tile(tensor, *size, 1, 1)
        depth, most = tile.least_depth, max(32 if tensor else 16, (1 if tensor else 2) * tile.least_depth)
        while depth < min(most, problem.depth) and 4 * sum(tile.block) * 2 * depth <= _SHARED // 3:
            depth *= 2
        steps = math.ceil(problem.depth / depth) * problem.pairs
        found.append(replace(tile, depth=depth, stages=min(3 if gpu.async_copy else 2, steps + 1)))
    return found


def _blocks(problem: Problem, tile: Tile) -> int:
    rows, columns = tile.block
    return math.ceil(problem.rows / rows) * math.ceil(problem.columns / columns)
