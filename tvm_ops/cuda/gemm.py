"""The CUDA kernel of a matrix product of `tvm_ops.ops.implicit_gemm`: windows are made on the way to shared memory.

A block of threads makes a tile of rows x columns. Steps of the depth go to shared memory, some steps ahead of use, and
from there to the registers of warps; what follows the sum is computed from the registers. Two ways to count:

    tensor cores   a warp holds fragments of 16 rows x 8 columns and counts 256 bits of depth an instruction
    ordinary ones  a lane is a column, a row's words are broadcast; also for floats

Planes meet one pair after the other, each pair a product of its own depth, weighted and added when it is done. Rows of
ones, which `and` needs (`bitserial_gemm`), are a product with a fragment of ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from targets import Gpu
from tvm_ops.cuda import ptx
from tvm_ops.cuda.problem import Problem
from tvm_ops.cuda.ptx import LANES
from tvm_ops.cuda.sums import OrdinaryCores, Sums, TensorCores, fragment_filter, swizzled
from tvm_ops.cuda.tile import CHUNK, Tile
from tvm_ops.tir import if_, loop, with_body


def write(func: Any, tile: Tile, gpu: Gpu) -> Any:
    """The function ``func``, whose maps are inlined, as a kernel of tiles ``tile``."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    problem = Problem(func)
    rows, columns = tile.block
    grid = math.ceil(problem.rows / rows), math.ceil(problem.columns / columns)
    with IRBuilder() as builder, T.prim_func(), ExitStack() as threads:
        launch = [("blockIdx.x", grid[0]), ("blockIdx.y", grid[1])]
        launch += [("threadIdx.y", tile.threads // LANES), ("threadIdx.x", LANES)]
        bx, by, warp, lane = (threads.enter_context(T.launch_thread(*axis)) for axis in launch)
        shared = T.alloc_buffer((tile.shared_words,), problem.element, scope="shared.dyn", align=16)
        kind = TensorCores if tile.tensor else OrdinaryCores
        sums = kind(problem, tile, shared, warp, lane)
        copies = _Copies(problem, tile, gpu, shared, (bx * rows, by * columns), warp * LANES + lane)
        _pipeline(problem, tile, copies, sums)
        with sums.gathered():
            sums.store(bx * rows, by * columns)
    return with_body(func, builder.get().body)


def _pipeline(problem: Problem, tile: Tile, copies: _Copies, sums: Sums) -> None:
    """Count one step of the depth while the next ones are copied."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T

    steps = tile.steps(problem)
    total, ahead = steps * problem.pairs, tile.stages - 1
    for step in range(ahead):
        if step < total:
            copies.start(step, step)
        copies.commit()
    with loop(total) as step:
        copies.wait(ahead - 1)
        T.evaluate(T.cuda.cta_sync())
        if total > ahead:
            with if_(step + ahead < total):
                copies.start(step + ahead, tirx.floormod(step + ahead, tile.stages))
        copies.commit()
        sums.count(tirx.floormod(step, tile.stages), step)
        if problem.pairs > 1:
            with if_(tirx.floormod(step, steps) == steps - 1):
                sums.fold(tirx.floordiv(step, steps))
    if problem.pairs == 1:
        sums.fold(0)


class _Copies:
    """Both operands' steps of the depth, from global to shared memory."""

    def __init__(
        self, problem: Problem, tile: Tile, gpu: Gpu, shared: Any, first: tuple[Any, Any], thread: Any
    ) -> None:
        self.problem, self.tile, self.shared, self.first, self.thread = problem, tile, shared, first, thread
        self.asynchronous = gpu.async_copy

    def start(self, step: Any, stage: Any) -> None:
        from tvm import tirx

        problem, tile = self.problem, self.tile
        steps = tile.steps(problem)
        pair, part = tirx.floordiv(step, steps), tirx.floormod(step, steps)
        planes = tirx.floordiv(pair, len(problem.w)), tirx.floormod(pair, len(problem.w))
        vector = CHUNK if problem.filters is None and problem.depth % CHUNK == 0 else 1
        self._copy(0, stage, part, problem.rows, lambda m, k: problem.patch(m, planes[0], k), problem.vector)
        self._copy(1, stage, part, problem.columns, lambda o, k: problem.filter(o, planes[1], k), vector)

    def _copy(
        self, side: int, stage: Any, part: Any, extent: int, value: Callable[[Any, Any], Any], vector: int
    ) -> None:
        from tvm import tirx

        tile, rows = self.tile, self.tile.block[side]
        across = tile.depth // vector
        each = math.ceil(rows * across / tile.threads)
        base = (stage * sum(tile.block) + side * tile.block[0]) * tile.pitch
        for i in range(each):
            number = i * tile.threads + self.thread
            row, k = tirx.floordiv(number, across), tirx.floormod(number, across) * vector
            at = self.first[side] + (fragment_filter(row) if side and tile.tensor else row)
            valid = [at < extent] if extent % rows else []
            if self.problem.depth % tile.depth:
                valid.append(part * tile.depth + k < self.problem.depth)
            with ExitStack() as guard:
                if rows * across % tile.threads and i == each - 1:
                    guard.enter_context(if_(number < rows * across))
                to = base + row * tile.pitch + swizzled(tile, row, k)
                self._element(to, value(at, part * tile.depth + k), valid, vector)

    def _element(self, to: Any, value: Any, valid: list[Any], vector: int) -> None:
        """A vector that starts with ``value``; zeros where not ``valid``."""
        from tvm import tirx
        from tvm.ir import TensorLoad
        from tvm.script.ir_builder import tirx as T

        zero = tirx.const(0, self.problem.element)
        if not isinstance(value, TensorLoad) and getattr(getattr(value, "op", None), "name", "") == "prim.if_then_else":
            valid, value = [*valid, value.args[0]], value.args[1]
        if self.asynchronous and isinstance(value, TensorLoad):
            inside = tirx.Cast("int32", tirx.all(*valid)) if valid else tirx.const(1, "int32")
            ptx.copy_async(tirx.address_of(self.shared[to]), tirx.address_of(value), 4 * vector, inside)
            return
        if vector > 1:
            *outer, last = value.indices
            value = value.source[(*outer, tirx.Ramp(last, tirx.const(1, "int32"), vector))]
            zero, to = tirx.Broadcast(zero, vector), tirx.Ramp(to, tirx.const(1, "int32"), vector)
        T.buffer_store(self.shared, tirx.if_then_else(tirx.all(*valid), value, zero) if valid else value, [to])

    def commit(self) -> None:
        if self.asynchronous:
            ptx.commit_async()

    def wait(self, groups: int) -> None:
        if self.asynchronous:
            ptx.wait_async(groups)
