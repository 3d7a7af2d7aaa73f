"""The schedule of every operator: one rule for all reductions, one for the rest.

A reduction (bit-serial or float convolution, dense, pooling) is made by tiles of rows x columns x channels whose sums
stay in registers over the whole reduction; channels are innermost, so a lane is a channel and the activation is
broadcast. What follows the sum is computed while the tile is in cache. `Target` gives the lanes and the registers.

Untuned, the tile comes from a rule; while tuning, from MetaSchedule's samplers, so the search space is exactly what
this rule can make. (MetaSchedule's own space cannot see the vectors of a packing, and on these kernels most of its
candidates spill: nine trials of a 3x3 convolution took three minutes and found nothing better, November 2026.)
"""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass
from typing import Any

from targets import ByteCounter, BytePopcount, ByteProduct, Target
from tvm_ops import adder_network, byte_products, byte_sums
from tvm_ops.bitplanes import WORD_BITS
from tvm_ops.ops import bitpack, bitserial_conv2d, bitweight_conv2d, byte_conv2d, float_conv2d, pooled_conv2d

_DATA_PARALLEL, _REDUCTION = 0, 2
# A fork and join of TVM's thread pool takes some 5 us, in which a core does about this many vector operations.
_MIN_PARALLEL_STEPS = 16384
_MAP_STEPS = 4  # that one vector of a map takes: it waits for memory
# Of three channels, LLVM makes better vectors than TVM: it takes several pixels, and deals them out. Where a copy says
# which columns lie inside the image, those beside it have loops of their own. (224x224x3: a transposition 50 us instead
# of 80, on AVX2 55 instead of 73; a padded copy 58 instead of 85, November 2026. Not tried on narrower vectors.)
_COLOURS, _COLOUR_LANES = 3, 8
# Channels of a sum of floats in straight code, with vectors of 512 bits: of a 1x1 convolution's inner loop, four
# instructions of 28 were the loop's own. 1x1 convolutions are 4 to 8 % faster, 3x3 ones 2 to 8 %, a dense layer, which
# waits for its weights, and AVX2 no faster (November 2026).
_STRAIGHT, _STRAIGHT_BITS = 2, 512
# Pieces of work for each thread that hide one piece more or less.
_PIECES = 16
# Of a tile that ends in floats, where sums are made one pixel after the other whatever the tile. The products and sums
# of four pixels in a row already slow a core with AVX-512 down, for all that comes after: 56x56x64 and a residual run
# at 2.38 GHz and 218 us with 4 columns, 2.68 and 181 with 2, 188 with 1 (Cascade Lake, November 2026).
_FLOAT_COLUMNS = 2
# From so many pixels on, a tile of packed weights is better unpacked to cache than in registers again and again.
_MANY_PIXELS = 32
# Three quarters of the smallest first-level data cache of a CPU that has vectors.
_CACHE_BYTES = 24 << 10
# What TVM puts on the stack is less. Sums beyond live in memory, to which LLVM stores them though nobody reads them:
# 8 columns of 32 sums, pooled products of bytes, 705 us, 7 columns 669 (Cascade Lake, November 2026; floats as fast).
_STACK_BYTES = 1024
_STREAM_PIXELS = 64  # that share weights which do not stay in that cache, with their activations and sums
# Registers that a tile of `byte_sums` may have for sums and for what it loads, of all that there are. With more of 32,
# LLVM spills; with more of 16, it makes one sum after the other and the Cortex-A9's model stalls (November 2026).
_BYTE_REGISTERS = {32: 24, 16: 6}


def schedule(sch: Any, target: Target, threads: int, sample: bool = False) -> None:
    """Schedule the function ``main`` of ``sch``, an ``s_tir.Schedule``, in place.

    A function with several reductions that depend on each other is left as it is, for its tensors are small (softmax),
    but sums that are pooled in strips.

    Args:
        threads: cores to share large functions between.
        sample: draw the tile of a reduction instead of applying the rule.
    """
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    reductions = [block for block in blocks if _is_reduction(sch, block)]
    if _pools(sch, reductions):
        _inline(sch, blocks)
        sums, pool = reductions
        _schedule_pooled(sch, sums, pool, target, threads)
        return
    if len(reductions) > 1:
        return
    main = reductions[0] if reductions else None
    left = _inline(sch, blocks)
    made = [] if main is None else _made_of(sch, main)
    for block in left:
        alone = not any(sch.get(block).same_as(sch.get(other)) for other in made)
        if alone and sch.get(block).name_hint != bitweight_conv2d.UNPACKED:
            _schedule_map(sch, block, target, threads)
    if main is not None:
        _schedule_reduction(sch, main, target, threads, sample)


def has_reduction(mod: Any) -> bool:
    """Whether the function ``main`` of ``mod`` sums to channels, so that there is a loop nest worth searching."""
    from tvm.s_tir import Schedule

    sch = Schedule(mod)
    blocks = [block for block in sch.get_child_blocks(sch.get_sblock("root")) if _is_reduction(sch, block)]
    return any(_sums(sch, block)[-1] > 1 for block in blocks)


def _is_reduction(sch: Any, block: Any) -> bool:
    return bool(_reductions(sch, block))


def _pools(sch: Any, reductions: list[Any]) -> bool:
    return any(sch.get(block).name_hint == pooled_conv2d.BLOCK for block in reductions)


def _packs(sch: Any, block: Any) -> bool:
    return sch.get(block).name_hint == bitpack.BLOCK


def _made_of(sch: Any, main: Any) -> list[Any]:
    """A reduction, what is made of its sums, and what packs that."""
    consumers = sch.get_consumers(main)
    return [main, *consumers, *(c for consumer in consumers for c in sch.get_consumers(consumer))]


def _inline(sch: Any, blocks: list[Any]) -> list[Any]:
    """Inline every map into its only readers, but not into a reduction's window, where it would be done once a tap,
    nor in or out of a packing, which reads vectors. Returns the blocks that are left."""
    left = []
    for block in blocks:
        consumers = sch.get_consumers(block)
        if sch.get(block).name_hint == byte_conv2d.ROWS and sch.get_producers(block):
            sch.reverse_compute_inline(block)
            continue
        into_vectors = _packs(sch, block) or any(_packs(sch, c) for c in consumers)
        into_vectors |= any(sch.get(c).name_hint in (bitserial_conv2d.SPREAD, byte_conv2d.ROWS) for c in consumers)
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
    elements = math.prod(extents) * (WORD_BITS if _packs(sch, block) else 1)
    if _packs(sch, block):  # already written in vectors
        loops = _hold_bounds(sch, block, target, target.shift_insert.pixels) if target.shift_insert else loops
    elif sch.get(block).name_hint == bitserial_conv2d.SPREAD and target.byte_counter:
        words = _largest_divisor(extents[-1] // 4, target.lanes // 4)
        *loops, inner = loops
        outer, inner = sch.split(inner, [None, 4 * words])
        loops.append(outer)
        sch.tensorize(inner, adder_network.spread(words, bool(sch.get(block).annotations["summable"])))
    elif len(loops) > 1 and extents[-1] == _COLOURS and target.lanes >= _COLOUR_LANES:
        *loops, column, _ = loops
        left, width = (int(n) for n in sch.get(block).annotations.get("columns", (0, extents[-2])))
        parts = [extent for extent in (left, width, extents[-2] - left - width) if extent]
        if len(parts) > 1:
            sch.loop_partition(column, parts[:-1])
    else:
        lanes = _largest_divisor(extents[-1], target.lanes)
        *_, inner = sch.split(loops[-1], [None, lanes])
        sch.vectorize(inner)
        loops = sch.get_loops(block)[:-1]
    _share(sch, loops, _MAP_STEPS * elements // target.lanes, threads)


def _hold_bounds(sch: Any, block: Any, target: Target, pixels: int) -> list[Any]:
    """Pack a row of pixels for a few words at a time, whose bounds stay in half of the registers, and up to ``pixels``
    in straight code. Returns the loops that threads may share."""
    *outer, word = sch.get_loops(block)
    extents = _extents(sch, outer)
    row = max((i for i, extent in enumerate(extents) if extent > 1), default=0)
    bounds = max(1, len(sch.get(block).reads) - 1) * WORD_BITS // target.lanes
    held = _largest_divisor(_extents(sch, [word])[0], target.registers // 2 // bounds)
    word, words_inside = sch.split(word, [None, held])
    outer[row], pixels_inside = sch.split(outer[row], [None, _largest_divisor(extents[row], pixels)])
    sch.reorder(word, *outer[row:], pixels_inside, words_inside)
    sch.unroll(pixels_inside)
    sch.unroll(words_inside)
    return [*outer[:row], word]


def _share(sch: Any, loops: list[Any], steps: int, threads: int) -> None:
    """Share out the outermost loops that divide between the threads, evenly or into many pieces; what is inside stays a
    loop, from which LLVM moves what does not change."""
    if threads == 1 or steps < _MIN_PARALLEL_STEPS or not loops:
        return
    extents = _extents(sch, loops)
    products = list(itertools.accumulate(extents, operator.mul))
    count = next((i for i, n in enumerate(products, 1) if n % threads == 0 or n >= _PIECES * threads), len(loops))
    sch.parallel(sch.fuse(*loops[:count]) if count > 1 else loops[0])


def _tile(columns: int, channels: int, unit: int, target: Target, reads: int = 0) -> tuple[int, int]:
    """Columns and channels, a multiple of ``unit``, of the register tile: the one with most operations per load whose
    accumulators leave a quarter of the registers free.

    reads: bytes of weights of one channel, where tiles of the same channels follow each other. A tile whose weights
    the nearest cache does not hold has to do a third more with each load to be as fast.
    """
    budget = target.registers * 3 // 4
    tiles = [
        (_largest_divisor(columns, c), unit * lanes)
        for c in range(1, budget + 1)
        for lanes in {_largest_divisor(channels // unit, max(1, v * target.lanes // unit)) for v in (1, 2, 4)}
    ]
    vectors = {lanes: -(-lanes // target.lanes) for _, lanes in tiles}
    fitting = [t for t in tiles if t[0] * vectors[t[1]] <= budget] or [min(tiles)]

    def worth(tile: tuple[int, int]) -> float:
        c, v = tile[0], vectors[tile[1]]
        return c * v / (c + v) * (1 if tile[1] * reads <= _CACHE_BYTES else 0.75)

    return max(fitting, key=lambda tile: (worth(tile), tile[1]))


def _byte_tile(columns: int, channels: int, whole: int, target: Target) -> tuple[int, int]:
    """Columns and channels of a tile of `byte_sums`: the one with most operations per load that fits. Where ``whole``
    channels become a word, one that holds those, if two columns do: the word is made in registers."""
    vectors = channels // byte_sums.LANES
    tiles = [(_largest_divisor(columns, c), _largest_divisor(vectors, v)) for c in range(1, 17) for v in (1, 2, 4, 8)]
    fitting = [(c, v) for c, v in tiles if c * v + c + v <= _BYTE_REGISTERS[target.registers]]
    words = [(c, v) for c, v in tiles if v * byte_sums.LANES == whole and 1 < c <= target.registers // 2 // v]
    c, v = max(words or fitting, key=lambda tile: (tile[0] * tile[1] / sum(tile), tile[1]))
    return c, v * byte_sums.LANES


@dataclass(frozen=True)
class _Reduction:
    """A reduction, the block that writes what is made of its sums, and what decides how both are made.

    Attributes:
        also_packed: where the function gives both floats and the words of their signs, what makes the words.
        sums: the shape of what the reduction gives.
        packs: whether the writer makes words of signs.
        unpacks, of_floats: whether its weights are of few bits, or floats.
        octets, of_bytes: filters of a block of weights in bytes, or of byte products; 0: it is no such sum.
        stored: bytes of a block of ``octets``.
        window: that `byte_sums` counts, if it does.
    """

    main: Any
    writer: Any
    also_packed: list[Any]
    sums: list[int]
    packs: bool
    unpacks: bool
    of_floats: bool
    octets: int
    of_bytes: int
    stored: int
    window: adder_network.Window | None

    @property
    def unit(self) -> int:
        """So many channels make one step of the writer's last loop."""
        return WORD_BITS if self.packs else 1

    @property
    def whole(self) -> int:
        """So many channels stay together."""
        whole = self.octets or self.of_bytes or (WORD_BITS if self.packs or self.unpacks else 1)
        return math.lcm(whole, WORD_BITS) if self.also_packed else whole

    @property
    def streams(self) -> bool:
        """Whether a block of weights is too large for the nearest cache."""
        return self.stored > _CACHE_BYTES


@dataclass
class _Loops:
    """The loops of a writer around a tile and inside it, the extents of all but its channels before they were split,
    and the tile: columns and channels."""

    outer: list[Any]
    inner: list[Any]
    extents: list[int]
    wide: int
    lanes: int


def _schedule_reduction(sch: Any, main: Any, target: Target, threads: int, sample: bool) -> None:
    consumers = sch.get_consumers(main)
    sums = _sums(sch, main)
    spreads = bool(consumers) and not _packs(sch, consumers[0]) and _spreads(sch, consumers[0], sums)
    if spreads:  # made at the consumer's tiles, the sums would be made again and again
        for block in (*consumers, *sch.get_consumers(consumers[0])):
            _schedule_map(sch, block, target, threads)
    if sums[-1] == 1 and _sum_across(sch, main, target):
        return
    given = any(sch.get(main).same_as(sch.get(block)) for block in sch.get_output_blocks("root"))
    writer = sch.cache_write(main, 0, "global") if given or spreads else consumers[0]
    of = _facts(sch, main, writer, target)
    work = math.prod(_extents(sch, sch.get_loops(main))) // target.lanes
    if of.window:
        _spread(sch, main, threads)
    loops = _split_writer(sch, of, target, sample)
    filters_first = _order(sch, of, loops, target)
    sch.compute_at(main, loops.outer[-1], preserve_unit_loops=True)
    _pack_beside(sch, of, loops)
    if of.unpacks:
        _place_unpacked(sch, loops.outer[0] if filters_first else None)
    # Before the sum loses its initial value: then a loop is no longer shareable.
    _share(sch, loops.outer[:1] if of.unpacks and filters_first else loops.outer, work, threads)
    straight = [*_make_sums(sch, of, loops, target, sample), *loops.inner[:-1]]
    for loop in straight if not of.streams else ():
        sch.unroll(loop)
    if not of.packs:
        sch.vectorize(loops.inner[-1])


def _facts(sch: Any, main: Any, writer: Any, target: Target) -> _Reduction:
    name, sums, popcount = sch.get(main).name_hint, _sums(sch, main), target.byte_popcount
    return _Reduction(
        main=main,
        writer=writer,
        also_packed=[block for block in sch.get_consumers(writer) if _packs(sch, block)],
        sums=sums,
        packs=_packs(sch, writer),
        unpacks=name == bitweight_conv2d.BLOCK,
        of_floats=name == float_conv2d.BLOCK,
        octets=_octets(sch, main),
        of_bytes=int(sch.get(main).annotations["filters"]) if name == byte_conv2d.BLOCK else 0,
        stored=_stored_bytes(sch, main),
        window=_window(sch, main, sums[-1], byte_sums.LANES, popcount.most) if popcount else None,
    )


def _register_tile(sch: Any, of: _Reduction, target: Target, columns: int, channels: int) -> tuple[int, int]:
    """Columns and channels whose sums are made at a time."""
    if of.window:
        wide, lanes = _byte_tile(columns, channels, of.whole, target)
        return wide, max(lanes, of.whole)
    reads = 4 * math.prod(_reductions(sch, of.main)) if of.of_floats else 0
    wide, lanes = _tile(columns, channels, of.whole, target, reads)
    return _largest_divisor(columns, _FLOAT_COLUMNS) if of.octets and not of.packs else wide, lanes


def _split_writer(sch: Any, of: _Reduction, target: Target, sample: bool) -> _Loops:
    """Split the writer's loops into tiles, by the rule or as drawn."""
    *outer, channel = sch.get_loops(of.writer)
    *extents, steps = _extents(sch, [*outer, channel])
    columns = next((e for e in reversed(extents) if e > 1), 1)
    wide, lanes = _register_tile(sch, of, target, columns, steps * of.unit)
    inner = [_inner_channels(sch, channel, target, of.unit, of.whole, lanes, sample)]
    axes, sizes = _last_axes(extents), [wide, 1]
    if of.streams:  # each window of weights serves a tile of pixels before the next
        wide = _largest_divisor(columns, _STREAM_PIXELS)
        sizes = [wide, _largest_divisor(extents[axes[-1]], _STREAM_PIXELS // wide)] if axes else []
    for axis, limit, size in zip(axes, (16, 4), sizes, strict=False):
        factors = sch.sample_perfect_tile(outer[axis], 2, limit) if sample else [None, size]
        outer[axis], inside = sch.split(outer[axis], factors)
        inner.insert(0, inside)
    channel_outer, inner[-1] = sch.split(channel, [None, inner[-1]])
    return _Loops([*outer, channel_outer], inner, extents, wide, lanes)


def _order(sch: Any, of: _Reduction, loops: _Loops, target: Target) -> bool:
    """Put the loops in their order. Returns whether filters are outermost: a tile of them is unpacked once for all
    pixels, or stays in the nearest cache."""
    many = of.octets and of.stored * of.sums[-1] // of.octets > _CACHE_BYTES
    wanted = of.unpacks or of.of_floats or of.of_bytes or many
    filters_first = bool(wanted and math.prod(loops.extents) >= _MANY_PIXELS)
    if filters_first:
        *pixels, channel = loops.outer
        loops.outer = [channel, *pixels]
    sch.reorder(*loops.outer, *loops.inner)
    popcount = target.byte_popcount
    if popcount and of.window and math.prod(_reductions(sch, of.main)) <= popcount.straight:
        # In straight code, LLVM would load all activations of a pixel before the loop over filters, and spill them.
        pixel = next(iter(_last_axes(loops.extents)), len(loops.outer) - 1)
        loops.outer[pixel:] = [sch.fuse(*loops.outer[pixel:])]
    return filters_first


def _pack_beside(sch: Any, of: _Reduction, loops: _Loops) -> None:
    """Make words of floats as they are stored: loaded again at once, they stay in registers in between."""
    for packing in of.also_packed:
        around = [*loops.outer, *loops.inner[:-1]]
        vectors, loops.inner[-1] = sch.split(loops.inner[-1], [None, WORD_BITS])
        sch.reverse_compute_at(packing, around[-1], preserve_unit_loops=True)
        for loop in (vectors, *sch.get_loops(packing)[len(around) :]):
            sch.unroll(loop)


def _place_unpacked(sch: Any, loop: Any) -> None:
    """Unpack weights at a loop over filters, or None: in registers, again and again."""
    unpacked = sch.get_sblock(bitweight_conv2d.UNPACKED)
    if loop is None:
        sch.compute_inline(unpacked)
    else:
        sch.compute_at(unpacked, loop, preserve_unit_loops=True)
        sch.vectorize(sch.get_loops(unpacked)[-1])


def _make_sums(sch: Any, of: _Reduction, loops: _Loops, target: Target, sample: bool) -> list[Any]:
    """The sums of a tile, by an intrinsic where there is one. Returns loops that are better unrolled."""
    main, popcount, counter = of.main, target.byte_popcount, target.byte_counter
    spatial, reduction = _own_loops(sch, main)
    most = adder_network.MOST_OCTET_WORDS if of.octets else adder_network.MOST_WORDS
    network = counter and _window(sch, main, loops.lanes, of.octets or counter.lanes, most)
    if popcount and of.window:
        _sum_bytes(sch, main, spatial, reduction, of.window, popcount, of.whole, target)
        return []
    if of.of_bytes and target.byte_product:
        _multiply_bytes(sch, main, spatial, reduction, target.byte_product, loops.wide)
        return []
    if counter and network:
        _count_bytes(sch, main, spatial, reduction, network, counter, of.streams)
        return []  # left as loops: a network is long enough, and four of them miss the instruction cache
    # A vector tests the bits of a word, or reads a block.
    together = WORD_BITS if of.unpacks else float_conv2d.FILTERS if of.of_floats or of.also_packed else 1
    if together > 1 and _extents(sch, spatial[-1:])[0] % together == 0:
        spatial[-1:] = sch.split(spatial[-1], [None, together])
    # Parts of vectors make long code, and nine times that is too much.
    unrolled = sample or loops.lanes % target.lanes == 0
    straight = _STRAIGHT if of.of_floats and not sample and target.vector_bits >= _STRAIGHT_BITS else 1
    _sum_taps(sch, main, spatial, reduction, unrolled, straight, sample)
    return spatial[:-1]


def _sum_taps(
    sch: Any,
    block: Any,
    spatial: list[Any],
    reduction: list[Any],
    unrolled: bool = True,
    straight: int = 1,
    sample: bool = False,
) -> None:
    """Vectors of channels in registers over all taps, in code ``unrolled`` or not, ``straight`` channels at a time."""
    sch.reorder(*reduction, *spatial)
    if unrolled:
        _unroll_taps(sch, reduction, _reductions(sch, block), sample)
    if straight > 1:
        count = _largest_divisor(_extents(sch, reduction[-1:])[0], straight)
        reduction[-1:] = sch.split(reduction[-1], [None, count])
        sch.unroll(reduction[-1])
    sch.vectorize(spatial[-1])
    sch.decompose_reduction(block, reduction[0])


def _schedule_pooled(sch: Any, sums: Any, pool: Any, target: Target, threads: int) -> None:
    """A block of filters and a strip of rows at a time: sums by register tiles, then the maximum of their windows."""
    (strips,), (made,) = sch.get_producers(sums), sch.get_consumers(sums)
    of_bytes = target.byte_product if sch.get(sums).name_hint == byte_conv2d.BLOCK else None
    filters = int(sch.get(sums).annotations["filters"]) if of_bytes else float_conv2d.FILTERS
    _schedule_map(sch, strips, target, threads)
    work = math.prod(_extents(sch, sch.get_loops(sums))) // target.lanes
    maps = [block for block in sch.get_consumers(pool) if not _packs(sch, block)]
    writer = maps[0] if maps else sch.cache_write(pool, 0, "global")
    n, i, j, c = sch.get_loops(writer)
    strip, i = sch.split(i, [None, int(sch.get(pool).annotations["strip"])])
    j, pixels = sch.split(j, [None, _largest_divisor(_extents(sch, [j])[0], 4)])
    c, lane = sch.split(c, [None, filters])
    sch.reorder(c, n, strip, i, j, pixels, lane)
    sch.compute_at(pool, j, preserve_unit_loops=True)
    sch.compute_at(made, strip, preserve_unit_loops=True)
    *_, column, sum_lane = sch.get_loops(made)
    (extent,) = _extents(sch, [column])
    wide, _ = _tile(extent, filters, filters, target)
    wide = _largest_divisor(extent, (_STACK_BYTES - 1) // (4 * filters)) if of_bytes else wide
    column, columns = sch.split(column, [None, wide])
    sch.compute_at(sums, column, preserve_unit_loops=True)
    for packing in [block for block in sch.get_consumers(writer) if _packs(sch, block)]:
        sch.reverse_compute_at(packing, pixels, preserve_unit_loops=True)
    _share(sch, [c, n, strip], work, threads)
    straight = [columns, pixels]
    for block in (sums, pool):
        spatial, reduction = _own_loops(sch, block)
        if of_bytes and block is sums:
            _multiply_bytes(sch, sums, spatial, reduction, of_bytes, wide)
        else:
            _sum_taps(sch, block, spatial, reduction)
            straight += spatial[:-1]
    for loop in straight:
        sch.unroll(loop)
    for vector in (sum_lane, lane):
        sch.vectorize(vector)


def _spreads(sch: Any, consumer: Any, sums: list[int]) -> bool:
    """Whether a consumer broadcasts the sums."""
    return math.prod(_extents(sch, sch.get_loops(consumer))) != math.prod(sums)


def _sum_across(sch: Any, main: Any, target: Target) -> bool:
    """Sum over channels, to one a pixel: a partial sum a lane, then the lanes. False: they fill no vectors."""
    *_, channel = sch.get_loops(main)
    if target.lanes == 1 or _extents(sch, [channel])[0] % target.lanes:
        return False
    _, lane = sch.split(channel, [None, target.lanes])
    partial = sch.rfactor(lane, len(_sums(sch, main)))
    *_, pixel, _ = sch.get_loops(main)
    sch.compute_at(partial, pixel, preserve_unit_loops=True)
    spatial, reduction = _own_loops(sch, partial)
    (vector,) = (loop for loop in spatial if _extents(sch, [loop]) == [target.lanes])
    sch.reorder(*reduction, vector)
    sch.vectorize(vector)
    sch.decompose_reduction(partial, reduction[0])
    return True


def _sums(sch: Any, block: Any) -> list[int]:
    """The shape of what a reduction gives."""
    return [int(v.dom.extent) for v in sch.get(block).iter_vars if v.iter_type == _DATA_PARALLEL]


def _reductions(sch: Any, block: Any) -> list[int]:
    """The extents that a block sums over; of a map, none."""
    return [int(v.dom.extent) for v in sch.get(block).iter_vars if v.iter_type == _REDUCTION]


def _own_loops(sch: Any, block: Any) -> tuple[list[Any], list[Any]]:
    """The loops of a block below those that it was computed at: of its outputs, and of what it sums over."""
    variables = sch.get(block).iter_vars
    made = list(zip(sch.get_loops(block)[-len(variables) :], variables, strict=True))
    spatial = [loop for loop, v in made if v.iter_type == _DATA_PARALLEL]
    return spatial, [loop for loop, v in made if v.iter_type == _REDUCTION]


def _window(sch: Any, main: Any, channels: int, lanes: int, most: int) -> adder_network.Window | None:
    """The window of a bit-serial sum, ``most`` words at most, that an intrinsic counts for whole vectors of
    ``lanes`` channels; None for what no intrinsic counts."""
    block = sch.get(main)
    if block.name_hint != bitserial_conv2d.BLOCK or channels % lanes:
        return None
    kh, kw, words = _reductions(sch, main)
    dy, dx = (int(d) for d in block.annotations["dilations"])
    x, w, x_masked, w_masked = (int(p) for p in block.annotations["planes"])
    planes = bitserial_conv2d.Planes(x, w, bool(x_masked), bool(w_masked))
    return adder_network.window((kh, kw), words, (dy, dx), planes, most, octets=bool(_octets(sch, main)))


def _octets(sch: Any, main: Any) -> int:
    """The filters of a block of a bit-serial sum whose weights lie in bytes; 0: they lie in words."""
    return int(sch.get(main).annotations.get("octets", 0))


def _stored_bytes(sch: Any, main: Any) -> int:
    """What a block of filters takes whose weights lie in bytes; 0: they do not."""
    _, planes, _, masked = (int(p) for p in sch.get(main).annotations.get("planes", [0] * 4))
    return 4 * _octets(sch, main) * math.prod(_reductions(sch, main)) * (planes + masked)


def _count_bytes(
    sch: Any,
    main: Any,
    spatial: list[Any],
    reduction: list[Any],
    window: adder_network.Window,
    counter: ByteCounter,
    streams: bool,
) -> None:
    """One pixel and one vector of filters at a time, a window of words each; where weights come as streams, all pixels
    of the tile before the next window."""
    ry, rx, rk = reduction
    vectors, lane = sch.split(spatial[-1], [None, counter.octets if window.octets else counter.lanes])
    rows, ry = sch.split(ry, [None, window.height])
    words, rk = sch.split(rk, [None, window.words])
    pixels, windows = [*spatial[:-1], vectors], [rows, words]
    sch.reorder(*(windows + pixels if streams else pixels + windows), ry, rx, rk, lane)
    initial = sch.decompose_reduction(main, rows)
    sch.vectorize(sch.get_loops(initial)[-1])
    sch.tensorize(ry, adder_network.intrinsic(counter, window))


def _spread(sch: Any, main: Any, threads: int) -> None:
    """Give a bit-serial sum a copy of its activations with every word in all lanes of a vector."""
    from tvm import tirx

    copy = sch.cache_read(main, 0, "global")
    sch.transform_layout(copy, ("write", 0), lambda *at: [*at, tirx.const(0, "int32")])
    *outer, word = sch.get_loops(copy)
    word, one = sch.split(word, [None, 1])
    sch.tensorize(one, byte_sums.spread())
    (tensorized,) = sch.get_child_blocks(word)
    sch.storage_align(tensorized, 0, axis=4, factor=byte_sums.LANES, offset=0)  # memory for the vectors
    _share(sch, outer, math.prod(_extents(sch, [*outer, word])), threads)


def _sum_bytes(
    sch: Any,
    main: Any,
    spatial: list[Any],
    reduction: list[Any],
    window: adder_network.Window,
    popcount: BytePopcount,
    whole: int,
    target: Target,
) -> None:
    """A register tile of pixels and vectors of filters at a time, a window of words each."""
    *pixels, column, filters = spatial
    width, channels = _extents(sch, [column, filters])
    columns, lanes = _byte_tile(width, channels, whole, target)
    column, columns_inside = sch.split(column, [None, columns])
    filters, lane = sch.split(filters, [None, lanes])
    ry, rx, rk = reduction
    rows, ry = sch.split(ry, [None, window.height])
    words, rk = sch.split(rk, [None, window.words])
    sch.reorder(*pixels, column, filters, rows, words, columns_inside, ry, rx, rk, lane)
    _clear(sch, sch.decompose_reduction(main, rows), byte_sums.LANES)
    stride = int(sch.get(main).annotations["strides"][1])
    tile = byte_sums.Tile(window, columns, stride, lanes // byte_sums.LANES)
    sch.tensorize(columns_inside, byte_sums.intrinsic(popcount, tile))


def _multiply_bytes(
    sch: Any, main: Any, spatial: list[Any], reduction: list[Any], product: ByteProduct, most_columns: int
) -> None:
    """A register tile of pixels and a block of filters at a time, as much of the window as 16 bits hold."""
    marks = sch.get(main).annotations
    filters, most, step, dilation = (int(marks[name]) for name in ("filters", "most", "step", "dilation"))
    form = byte_conv2d.Form(str(marks["kind"]), product.lanes, most)  # type: ignore[arg-type]
    *pixels, column, channel = spatial
    columns = _largest_divisor(_extents(sch, [column])[0], most_columns)
    column, columns_inside = sch.split(column, [None, columns])
    block, lane = sch.split(channel, [None, filters])
    row, group, neighbour = reduction
    heights, widths = _extents(sch, [row, group])
    groups = _largest_divisor(widths, most or widths)
    rows = _largest_divisor(heights, most // groups if most else heights) if groups == widths else 1
    row, rows_inside = sch.split(row, [None, rows])
    group, groups_inside = sch.split(group, [None, groups])
    sch.reorder(*pixels, column, block, row, group, columns_inside, rows_inside, groups_inside, lane, neighbour)
    _clear(sch, sch.decompose_reduction(main, row), product.lanes)
    tile = byte_products.Tile(form, filters, columns, step, rows, dilation, groups)
    sch.tensorize(columns_inside, byte_products.intrinsic(product, tile))


def _clear(sch: Any, initial: Any, lanes: int) -> None:
    """Give the sums of a register tile their initial value in straight code, a vector of ``lanes`` at a time."""
    *_, pixel, filter_ = sch.get_loops(initial)
    vector, lane = sch.split(filter_, [None, lanes])
    sch.unroll(pixel)
    sch.unroll(vector)
    sch.vectorize(lane)


def _last_axes(extents: list[int]) -> list[int]:
    """The last two axes longer than 1: columns, then rows."""
    return [i for i in reversed(range(len(extents))) if extents[i] > 1][:2]


def _inner_channels(sch: Any, channel: Any, target: Target, unit: int, whole: int, lanes: int, sample: bool) -> Any:
    """The extent of the writer's inner channel loop, by the rule or drawn from whole vectors and words."""
    steps = int(sch.get(channel).extent)
    if not sample:
        return max(1, lanes // unit)
    sizes = {_largest_divisor(steps, max(1, v * target.lanes // unit)) for v in (1, 2, 4, 8)}
    sizes = {size for size in sizes if size * unit % max(target.lanes, whole) == 0} or {lanes // unit}
    return sch.sample_categorical(sorted(sizes), [1 / len(sizes)] * len(sizes))


def _unroll_taps(sch: Any, reduction: list[Any], extents: list[int], sample: bool) -> None:
    """Unroll the window around the loop over words, so that every address is a constant away from the next."""
    if sample:
        most = sch.sample_categorical([0, 16, 64, 256], [0.25] * 4)
        sch.annotate(reduction[0], "pragma_auto_unroll_max_step", most)
        sch.annotate(reduction[0], "pragma_unroll_explicit", 1)
    elif math.prod(extents[:-1]) <= 9 and extents[-1] > 1:
        for loop in reduction[:-1]:
            sch.unroll(loop)
