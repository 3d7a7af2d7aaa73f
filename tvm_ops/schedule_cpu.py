"""The schedule of every operator that has no tuning record: one rule for all reductions, one for the rest.

A reduction (bit-serial or float convolution, dense, pooling) is made by tiles of W columns x V vectors of channels
that stay in registers over the whole reduction; channels are innermost, so a lane is a channel and the activation is
broadcast. What follows the sum is computed while the tile is in cache. `Target` gives the lanes and the registers.
"""

from __future__ import annotations

from typing import Any

from targets import Target
from tvm_ops.bitplanes import WORD_BITS
from tvm_ops.ops import bitpack

_DATA_PARALLEL, _REDUCTION = 0, 2
# A fork and join of TVM's thread pool takes some 5 us, in which a core does about this many vector operations.
_MIN_PARALLEL_STEPS = 16384


def schedule(sch: Any, target: Target, threads: int) -> None:
    """Schedule the function ``main`` of ``sch``, an ``s_tir.Schedule``, in place.

    A function with several reductions that depend on each other (softmax) is left as it is: its tensors are small.
    """
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    reductions = [block for block in blocks if _is_reduction(sch, block)]
    if len(reductions) > 1:
        return
    main = reductions[0] if reductions else None
    blocks = _inline(sch, blocks, main)
    for block in blocks:
        if main is None or not (sch.get(block).same_as(sch.get(main)) or _consumes(sch, block, main)):
            _schedule_map(sch, block, target, threads)
    if main is not None:
        _schedule_reduction(sch, main, target, threads)


def has_reduction(mod: Any) -> bool:
    """Whether the function ``main`` of ``mod`` sums anything, so that there is a loop nest worth searching."""
    from tvm.s_tir import Schedule

    sch = Schedule(mod)
    return any(_is_reduction(sch, block) for block in sch.get_child_blocks(sch.get_sblock("root")))


def _is_reduction(sch: Any, block: Any) -> bool:
    return any(v.iter_type == _REDUCTION for v in sch.get(block).iter_vars)


def _packs(sch: Any, block: Any) -> bool:
    return sch.get(block).name_hint == bitpack.BLOCK


def _consumes(sch: Any, block: Any, producer: Any) -> bool:
    return any(sch.get(c).same_as(sch.get(block)) for c in sch.get_consumers(producer))


def _inline(sch: Any, blocks: list[Any], main: Any | None) -> list[Any]:
    """Inline every map into its only readers, but not into a reduction's window, where it would be done once a tap,
    nor in or out of a packing, which reads vectors. Returns the blocks that are left."""
    left = []
    for block in blocks:
        consumers = sch.get_consumers(block)
        into_vectors = _packs(sch, block) or any(_packs(sch, c) for c in consumers)
        if not consumers or into_vectors or any(_is_reduction(sch, b) for b in (block, *consumers)):
            left.append(block)
        else:
            sch.compute_inline(block)
    return left


def _extents(sch: Any, loops: list[Any]) -> list[int]:
    return [int(sch.get(loop).extent) for loop in loops]


def _largest_divisor(extent: int, limit: int) -> int:
    return max(d for d in range(1, max(1, min(limit, extent)) + 1) if extent % d == 0)


def _schedule_map(sch: Any, block: Any, target: Target, threads: int) -> None:
    """Vectorise the innermost axis, and share out the rest."""
    loops = sch.get_loops(block)
    extents = _extents(sch, loops)
    if not loops:
        return
    if not _packs(sch, block):  # a packing is already written in vectors
        lanes = _largest_divisor(extents[-1], target.lanes)
        *_, inner = sch.split(loops[-1], [None, lanes])
        sch.vectorize(inner)
        loops = sch.get_loops(block)[:-1]
    _share(sch, loops, _product(extents) // target.lanes, threads)


def _share(sch: Any, loops: list[Any], steps: int, threads: int) -> None:
    if threads > 1 and steps >= _MIN_PARALLEL_STEPS and loops:
        sch.parallel(sch.fuse(*loops) if len(loops) > 1 else loops[0])


def _product(extents: list[int]) -> int:
    total = 1
    for extent in extents:
        total *= extent
    return total


def _tile(columns: int, channels: int, target: Target) -> tuple[int, int]:
    """Columns and channels of the register tile: the one with most operations per load whose accumulators leave
    a quarter of the registers free."""
    budget = target.registers * 3 // 4
    tiles = [
        (_largest_divisor(columns, c), lanes)
        for c in range(1, budget + 1)
        for lanes in {_largest_divisor(channels, v * target.lanes) for v in (1, 2, 4)}
    ]
    vectors = {lanes: -(-lanes // target.lanes) for _, lanes in tiles}
    fitting = [t for t in tiles if t[0] * vectors[t[1]] <= budget]
    return max(fitting, key=lambda t: (t[0] * vectors[t[1]] / (t[0] + vectors[t[1]]), t[1]))


def _schedule_reduction(sch: Any, main: Any, target: Target, threads: int) -> None:
    consumers = sch.get_consumers(main)
    writer = consumers[0] if consumers else sch.cache_write(main, 0, "global")
    packs = _packs(sch, writer)
    work = _product(_extents(sch, sch.get_loops(main))) // target.lanes

    *outer, channel = sch.get_loops(writer)
    extents = _extents(sch, [*outer, channel])
    columns = max((i for i, e in enumerate(extents[:-1]) if e > 1), default=None)
    reduced = [int(v.dom.extent) for v in sch.get(main).iter_vars if v.iter_type == _REDUCTION]
    unit = WORD_BITS if packs else 1  # so many channels make one word
    wide, lanes = _tile(extents[columns] if columns is not None else 1, extents[-1] * unit, target)
    channel_outer, channel_inner = sch.split(channel, [None, max(1, lanes // unit)])
    tiled = [channel_inner]
    if columns is not None:
        column_outer, column_inner = sch.split(outer[columns], [None, wide])
        outer[columns] = column_outer
        tiled.insert(0, column_inner)
    sch.reorder(*outer, channel_outer, *tiled)
    sch.compute_at(main, channel_outer, preserve_unit_loops=True)

    inner = sch.get_loops(main)[len(outer) + 1 :]
    kinds = [v.iter_type for v in sch.get(main).iter_vars]
    spatial = [loop for loop, kind in zip(inner, kinds, strict=True) if kind == _DATA_PARALLEL]
    reduction = [loop for loop, kind in zip(inner, kinds, strict=True) if kind == _REDUCTION]
    sch.reorder(*reduction, *spatial)
    _share(sch, outer, work, threads)  # before the sum loses its initial value: then a loop is no longer shareable
    for loop in spatial[:-1]:
        sch.unroll(loop)
    if _product(reduced[:-1]) <= 9 and reduced[-1] > 1:
        for loop in reduction[:-1]:
            sch.unroll(loop)
    sch.vectorize(spatial[-1])
    sch.decompose_reduction(main, reduction[0])
    if not packs:
        sch.vectorize(channel_inner)
    if columns is not None:
        sch.unroll(tiled[0])
