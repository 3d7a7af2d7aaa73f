"""The schedule of every operator on a GPU.

Matrix products (`implicit_gemm`) and packings become kernels that are written out (`tvm_ops.cuda`): what
is scheduled is which tile they have. Everything else is a thread an output; sums to few outputs are shared between the
threads of a warp. No tensor between the stages of a function is ever stored in global memory.
"""

from __future__ import annotations

import math
from typing import Any

import tvm_ffi

from targets import Target
from tvm_ops.cuda import gemm, pack
from tvm_ops.cuda.problem import Problem
from tvm_ops.cuda.ptx import LANES
from tvm_ops.cuda.tile import Tile, tiles
from tvm_ops.ops import bitpack, implicit_gemm
from tvm_ops.tir import blocks

_THREADS = 256
_DATA_PARALLEL, _REDUCTION = 0, 2
_KEPT = {implicit_gemm.BLOCK, implicit_gemm.PATCHES, implicit_gemm.FILTERS, bitpack.FLAGS}
# A grid of fewer blocks leaves multiprocessors idle; the largest of today's GPUs have some 130.
_MIN_BLOCKS = 128


def schedule(sch: Any, target: Target, sample: bool = False) -> None:
    """Schedule the function ``main`` of ``sch``, an ``s_tir.Schedule``, in place; `written` finishes it.

    Args:
        sample: draw the tile of a matrix product instead of applying the rule.
    """
    left = _inline(sch)
    names = {str(sch.get(block).name_hint) for block in left}
    if implicit_gemm.BLOCK in names:
        _choose_tile(sch, target, sample)
    elif bitpack.FLAGS not in names:
        _schedule_reduction_or_map(sch, left)


def tilings(mod: Any, target: Target) -> list[Any]:
    """A schedule of the function ``main`` of ``mod`` for every tile, as if it had been drawn; that of the rule first.

    None where there is no tile to choose.
    """
    from tvm.s_tir import Schedule

    drawn = Schedule(mod)
    schedule(drawn, target, sample=True)
    made = []
    for choice in drawn.trace.decisions:
        for decision in range(len(choice.attrs[0])):
            made.append(Schedule(mod))
            drawn.trace.with_decision(choice, decision, True).apply_to_schedule(made[-1], False)
    return made


def drawn_tile(trace: Any) -> int | None:
    """The number of the tile that a trace draws; None: the rule chose."""
    return next((int(choice.attrs[0][int(decision)]) for choice, decision in trace.decisions.items()), None)


def written(func: Any, target: Target) -> Any:
    """A scheduled function as it is built: matrix products and packings written out, floats rounded as on CPUs."""
    from tvm import IRModule
    from tvm.tirx.transform import ForceNarrowIndexToInt32

    assert target.gpu is not None
    func = ForceNarrowIndexToInt32()(IRModule({"main": func}))["main"]
    found = blocks(func)
    if implicit_gemm.BLOCK in found:
        tile = Tile.of(int(found[implicit_gemm.BLOCK].annotations["tile"]))
        func = gemm.write(func, tile, target.gpu)
    elif bitpack.FLAGS in found:
        func = pack.write(func)
    return func.with_body(_rounded(func.body))


def _rounded(body: Any) -> Any:
    """A body whose products are rounded before they are added, and whose maximum with a NaN is that on CPUs.

    nvcc contracts a product and a sum, and its max drops a NaN; LLVM returns the second operand.
    """
    from tvm import tirx
    from tvm.ir import Call
    from tvm.s_tir import SBlock

    exchanged: list[Any] = []  # what several reductions of a function make; TVM has to recognise their operators
    tvm_ffi.structural_walk(body, (SBlock, lambda b: exchanged.append(b.body.buffer) if b.init is not None else None))
    exchanged = exchanged if len(exchanged) > 1 else []

    def call(value: Any) -> Any:
        name = getattr(value.op, "name", "")
        if name == "tirx.call_llvm_pure_intrin":  # of `output_transform.product`, the only one on a GPU
            product = value.args[-1]
            return tirx.call_pure_extern("float32", "__fmul_rn", product.a, product.b)
        return value

    def compared(value: Any) -> Any:
        if "float" not in str(value.ty.dtype) or any(_is_load(value.a, buffer) for buffer in exchanged):
            return value
        first = value.a > value.b if isinstance(value, tirx.Max) else value.a < value.b
        return tirx.Select(first, value.a, value.b)

    return tvm_ffi.structural_map(body, [(Call, call), (tirx.Max, compared), (tirx.Min, compared)])


def _is_load(value: Any, buffer: Any) -> bool:
    from tvm.ir import TensorLoad

    return isinstance(value, TensorLoad) and value.source.same_as(buffer)


def _inline(sch: Any) -> list[Any]:
    """Inline every map into its readers, but not what kernels that are written out make themselves."""
    left = []
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        consumers = sch.get_consumers(block)
        kept = _is_reduction(sch, block) or not consumers or str(sch.get(block).name_hint) in _KEPT
        if kept:
            left.append(block)
        else:
            sch.compute_inline(block)
    return left


def _is_reduction(sch: Any, block: Any) -> bool:
    return any(v.iter_type == _REDUCTION for v in sch.get(block).iter_vars)


def _choose_tile(sch: Any, target: Target, sample: bool) -> None:
    block = sch.get_sblock(implicit_gemm.BLOCK)
    assert target.gpu is not None
    numbers = [tile.number for tile in tiles(Problem(sch.mod["main"]), target.gpu)]
    chosen = sch.sample_categorical(numbers, [1 / len(numbers)] * len(numbers)) if sample else numbers[0]
    sch.annotate(block, "tile", chosen)


def _schedule_reduction_or_map(sch: Any, blocks: list[Any]) -> None:
    reductions = [block for block in blocks if _is_reduction(sch, block)]
    last = blocks[-1]
    if len(reductions) > 1:
        _schedule_rows(sch, reductions, last)
        return
    if not reductions:
        _bind(sch, sch.get_loops(last))
        return
    (main,) = reductions
    spatial = [v for v in sch.get(last).iter_vars if v.iter_type == _DATA_PARALLEL]
    outputs = math.prod(int(v.dom.extent) for v in spatial)
    summed = math.prod(int(v.dom.extent) for v in sch.get(main).iter_vars if v.iter_type == _REDUCTION)
    alone = sch.get(last).same_as(sch.get(main))
    if outputs < _MIN_BLOCKS * LANES and summed >= LANES and not _is_extremum(sch, main):  # too few for a thread each
        _sum_across(sch, main, None if alone else last)
        return
    if alone:
        loops = sch.get_loops(main)
        _bind(sch, loops[: len(spatial)])
    else:
        thread = _bind(sch, sch.get_loops(last))
        sch.compute_at(main, thread, preserve_unit_loops=True)
        sch.set_scope(main, 0, "local")


def _is_extremum(sch: Any, block: Any) -> bool:
    """Whether a reduction is a maximum or a minimum, which warps exchange without regard to NaNs."""
    from tvm import tirx

    return isinstance(sch.get(block).body.value, tirx.Max | tirx.Min | tirx.Select)


def _schedule_rows(sch: Any, reductions: list[Any], last: Any) -> None:
    """A block of one warp for the last axis, with all reductions on the way to it (softmax)."""
    *rows, inner = sch.get_loops(last)
    row = sch.fuse(*rows) if len(rows) > 1 else rows[0]
    sch.bind(row, "blockIdx.x")
    _bind_lanes(sch, inner)
    for block in reversed(reductions):
        sch.compute_at(block, row, preserve_unit_loops=True)
        sch.set_scope(block, 0, "shared")
        count = sum(v.iter_type == _REDUCTION for v in sch.get(block).iter_vars)
        reduced = sch.get_loops(block)[-count:]
        _bind_lanes(sch, sch.fuse(*reduced) if count > 1 else reduced[0])


def _bind_lanes(sch: Any, loop: Any) -> None:
    _, lane = sch.split(loop, [None, LANES])
    sch.bind(lane, "threadIdx.x")


def _sum_across(sch: Any, main: Any, consumer: Any) -> None:
    """A warp a sum, and what follows it on all lanes."""
    spatial = sum(v.iter_type == _DATA_PARALLEL for v in sch.get(main).iter_vars)
    if consumer is not None:
        row = _bind_warps(sch, sch.get_loops(consumer))
        sch.compute_at(main, row, preserve_unit_loops=True)
        sch.set_scope(main, 0, "shared")
        reduced = sch.get_loops(main)[-(len(sch.get(main).iter_vars) - spatial) :]
    else:
        loops = sch.get_loops(main)
        reduced = loops[spatial:]
        _bind_warps(sch, loops[:spatial])
    fused = sch.fuse(*reduced) if len(reduced) > 1 else reduced[0]
    _bind_lanes(sch, fused)


def _bind_warps(sch: Any, loops: list[Any]) -> Any:
    fused = sch.fuse(*loops) if len(loops) > 1 else loops[0]
    # A divisor: TVM forgets, where it stores a sum, that the last block may have warps to spare.
    block, warp = sch.split(fused, [None, math.gcd(4, int(sch.get(fused).extent))])
    sch.bind(block, "blockIdx.x")
    sch.bind(warp, "threadIdx.y")
    return warp


def _bind(sch: Any, loops: list[Any]) -> Any:
    """A thread an output; returns its loop."""
    fused = sch.fuse(*loops) if len(loops) > 1 else loops[0]
    block, thread = sch.split(fused, [None, min(_THREADS, int(sch.get(fused).extent))])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    return thread
