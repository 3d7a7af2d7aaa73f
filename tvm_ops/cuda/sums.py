"""The sums that the threads of a block hold: how they count a step of the depth, and what they store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import tvm_ffi

from tvm_ops.bitplanes import WORD_BITS
from tvm_ops.cuda import ptx
from tvm_ops.cuda.problem import Problem
from tvm_ops.cuda.ptx import LANES
from tvm_ops.cuda.tile import CHUNK, Tile
from tvm_ops.ops.bitserial_gemm import FRAGMENT_WORDS
from tvm_ops.tir import if_, loop, replaced, replaced_load, unravel


def swizzled(tile: Tile, row: Any, k: Any) -> Any:
    """Where word k of a row lies: chunks change places, so that eight rows' chunks k lie in different banks."""
    from tvm import tirx

    chunks = tile.depth // CHUNK
    if not tile.tensor or chunks == 1:
        return k
    key = tirx.floormod(tirx.floordiv(row, max(1, 8 // chunks)), chunks)
    return (tirx.floordiv(k, CHUNK) ^ key) * CHUNK + tirx.floormod(k, CHUNK)


def fragment_filter(row: Any) -> Any:
    """Which of a tile's filters stands in a row: a thread's columns of four fragments are neighbouring filters."""
    from tvm import tirx

    fragment, column = tirx.floordiv(tirx.floormod(row, 32), 8), tirx.floormod(row, 8)
    own = 8 * tirx.floordiv(column, 2) + 2 * fragment + tirx.floormod(column, 2)
    return tirx.floordiv(row, 32) * 32 + own


def _chosen(values: Sequence[int], index: Any) -> Any:
    """values[index] as an expression."""
    from tvm import tirx

    found: Any = tirx.const(values[-1], "int32")
    for number, value in reversed(list(enumerate(values[:-1]))):
        if value != values[-1]:
            found = tirx.Select(index == number, tirx.const(value, "int32"), found)
    return found


class Sums:
    """The sums of a thread, of some rows and columns."""

    def __init__(self, problem: Problem, tile: Tile, shared: Any, warp: Any, lane: Any, size: int) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        self.problem, self.tile, self.shared, self.lane = problem, tile, shared, lane
        place = tirx.floormod(warp, tile.down * tile.across)
        self.down, self.across = tirx.floordiv(place, tile.across), tirx.floormod(place, tile.across)
        self.part = tirx.floordiv(warp, tile.down * tile.across)
        self.place = place
        self.dtype = str(problem.products.buffer.dtype)
        self.sums = T.alloc_buffer((size,), self.dtype, scope="local")
        self.totals = T.alloc_buffer((size,), self.dtype, scope="local") if problem.pairs > 1 else self.sums
        for buffer in (self.sums, self.totals) if problem.pairs > 1 else (self.sums,):
            for i in range(size):
                T.buffer_store(buffer, tirx.const(0, self.dtype), [i])

    def count(self, stage: Any, step: Any) -> None:
        """Add a step of the depth."""
        raise NotImplementedError

    def store(self, m0: Any, o0: Any) -> None:
        """Store what is made of the sums of the block that starts at a row and a column."""
        raise NotImplementedError

    def row(self, stage: Any, side: int, number: Any) -> Any:
        """Where a row of an operand starts in shared memory."""
        tile = self.tile
        return (stage * sum(tile.block) + side * tile.block[0] + number) * tile.pitch

    def factor(self, pair: Any) -> Any:
        """What a pair of planes is worth."""
        from tvm import tirx

        x, w = self.problem.x, self.problem.w
        return _chosen(x, tirx.floordiv(pair, len(w))) * _chosen(w, tirx.floormod(pair, len(w)))

    def fold(self, pair: Any) -> None:
        """A pair of planes is counted: its sums, weighted, to the totals."""
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        if self.problem.operation == "":
            return
        for i in range(int(self.sums.shape[0])):
            worth = self.sums[i] * self.factor(pair) + self.ones(i, pair)
            if self.problem.pairs == 1:
                T.buffer_store(self.sums, worth, [i])
            else:
                T.buffer_store(self.totals, self.totals[i] + worth, [i])
                T.buffer_store(self.sums, tirx.const(0, "int32"), [i])

    def ones(self, i: int, pair: Any) -> Any:
        """What sum ``i``'s row counts by itself."""
        return 0

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """For the warps that hold whole sums, after they added those of the warps that shared the depth."""
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        tile, size = self.tile, int(self.totals.shape[0])
        if tile.split == 1:
            yield
            return
        places = tile.down * tile.across
        shared = T.alloc_buffer(((tile.split - 1) * places * size * LANES,), self.dtype, scope="shared")

        def at(part: Any, i: int) -> Any:
            return ((part * places + self.place) * size + i) * LANES + self.lane

        with if_(self.part > 0):
            for i in range(size):
                T.buffer_store(shared, self.totals[i], [at(self.part - 1, i)])
        T.evaluate(T.cuda.cta_sync())
        with if_(tirx.EQ(self.part, 0)):
            for i in range(size):
                total = self.totals[i]
                for part in range(tile.split - 1):
                    total = total + shared[at(part, i)]
                T.buffer_store(self.totals, total, [i])
            yield


class OrdinaryCores(Sums):
    """Lanes are columns; each holds ``rows`` x ``columns / 32`` sums."""

    def __init__(self, problem: Problem, tile: Tile, shared: Any, warp: Any, lane: Any) -> None:
        from tvm.script.ir_builder import tirx as T

        self.vectors = tile.columns // LANES
        super().__init__(problem, tile, shared, warp, lane, tile.rows * self.vectors)
        self.a = T.alloc_buffer((tile.rows * CHUNK,), problem.element, scope="local")
        self.b = T.alloc_buffer((self.vectors * CHUNK,), problem.element, scope="local")

    def count(self, stage: Any, step: Any) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        tile, one = self.tile, tirx.const(1, "int32")
        own = tile.depth // CHUNK // tile.split
        with loop(own) as number:
            chunk = self.part * own + number
            sides = (
                (self.a, 0, [self.down * tile.rows + r for r in range(tile.rows)]),
                (self.b, 1, [self.across * tile.columns + j * LANES + self.lane for j in range(self.vectors)]),
            )
            for registers, side, rows in sides:
                for i, row in enumerate(rows):
                    at = self.row(stage, side, row) + chunk * CHUNK
                    words = self.shared[tirx.Ramp(at, one, CHUNK)]
                    T.buffer_store(registers, words, [tirx.Ramp(tirx.const(i * CHUNK, "int32"), one, CHUNK)])
            for r in range(tile.rows):
                for j in range(self.vectors):
                    for e in range(CHUNK):
                        a, b = self.a[r * CHUNK + e], self.b[j * CHUNK + e]
                        at = r * self.vectors + j
                        T.buffer_store(self.sums, self.sums[at] + self._product(a, b), [at])

    def _product(self, a: Any, b: Any) -> Any:
        from tvm import tirx

        if self.problem.operation == "":
            return a * b
        return tirx.Cast("int32", tirx.popcount(a & b if self.problem.operation == "and" else a ^ b))

    def store(self, m0: Any, o0: Any) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        problem, tile = self.problem, self.tile
        for r in range(tile.rows):
            m = m0 + self.down * tile.rows + r
            for j in range(self.vectors):
                first = o0 + self.across * tile.columns + j * LANES
                total = self.totals[r * self.vectors + j]
                inside = _inside(problem, tile, m, first + self.lane)
                if problem.flags is None:
                    o = first + self.lane
                    with ExitStack() as guard:
                        if inside:
                            guard.enter_context(if_(tirx.all(*inside)))
                        value = problem.finished(m, o, total)
                        pixel = unravel(m, problem.last.extents[:-1])
                        T.buffer_store(problem.last.buffer, value, problem.last.indices(*pixel, o))
                else:
                    word = tirx.floordiv(first, WORD_BITS)
                    extents = problem.last.extents
                    bit = problem.finished(m, first + self.lane, total)
                    if inside:
                        bit = tirx.if_then_else(tirx.all(*inside), bit, tirx.const(0, "uint32"))
                    every = tirx.const(0xFFFFFFFF, "uint32")
                    made = T.bind(T.cuda.ballot_sync(every, tirx.Cast("int32", bit)))
                    there = [self.lane == 0, m < problem.rows, word < extents[-2]]
                    with if_(tirx.all(*there)):
                        pixel = unravel(m, extents[:-2])
                        T.buffer_store(problem.last.buffer, made, problem.last.indices(*pixel, word, 0))


def _inside(problem: Problem, tile: Tile, m: Any, o: Any) -> list[Any]:
    """Conditions that a row and a column exist."""
    rows, columns = tile.block
    down = [m < problem.rows] if problem.rows % rows else []
    return down + ([o < problem.columns] if problem.columns % columns else [])


class TensorCores(Sums):
    """A warp's fragments of 16 rows x 8 columns. Lane 4 g + t holds of each rows g and g + 8, columns 2 t and 2 t + 1;
    with `fragment_filter`, filters 8 t to 8 t + 7 of every 32."""

    def __init__(self, problem: Problem, tile: Tile, shared: Any, warp: Any, lane: Any) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        self.down_fragments, self.across_fragments = tile.rows // 16, tile.columns // 8
        super().__init__(problem, tile, shared, warp, lane, self.down_fragments * self.across_fragments * 4)
        self.a = T.alloc_buffer((self.down_fragments * 4,), "uint32", scope="local")
        self.b = T.alloc_buffer((self.across_fragments * 2,), "uint32", scope="local")
        self.counted = any(problem.counts)
        if self.counted:
            self.row_ones = T.alloc_buffer((self.down_fragments * 4,), "int32", scope="local")
            for i in range(self.down_fragments * 4):
                T.buffer_store(self.row_ones, tirx.const(0, "int32"), [i])

    def count(self, stage: Any, step: Any) -> None:
        from tvm import tirx

        problem, tile = self.problem, self.tile
        steps = tile.steps(problem)
        part, plane = tirx.floormod(step, steps), tirx.floormod(tirx.floordiv(step, steps), len(problem.w))
        own = tile.depth // FRAGMENT_WORDS // tile.split
        for number in range(own):
            first = (self.part * own + number) * FRAGMENT_WORDS if tile.split > 1 else number * FRAGMENT_WORDS
            with ExitStack() as guard:
                if (number or tile.split > 1) and problem.depth % tile.depth:
                    guard.enter_context(if_(part * tile.depth + first < problem.depth))
                self._fragments(stage, first, plane)

    def _fragments(self, stage: Any, first: Any, plane: Any) -> None:
        """Count 256 bits of the depth; rows of ones with the first plane of weights only."""
        from tvm import tirx

        tile, lane = self.tile, self.lane
        for i in range(self.down_fragments):
            row = self.down * tile.rows + i * 16 + tirx.floormod(lane, 16)
            self._load(self.a, i, stage, 0, row, first + tirx.floordiv(lane, 16) * CHUNK)
        for j in range(self.across_fragments // 2):
            row = self.across * tile.columns + j * 16 + tirx.floormod(lane, 8) + tirx.floordiv(lane, 16) * 8
            self._load(self.b, j, stage, 1, row, first + tirx.floormod(tirx.floordiv(lane, 8), 2) * CHUNK)
        for i in range(self.down_fragments):
            for j in range(self.across_fragments):
                self._multiply(self.sums, i * self.across_fragments + j, i, [self.b[2 * j], self.b[2 * j + 1]])
        if self.counted:
            with ExitStack() as guard:
                if len(self.problem.w) > 1:
                    guard.enter_context(if_(plane == 0))
                for i in range(self.down_fragments):
                    self._multiply(self.row_ones, i, i, [tirx.const(0xFFFFFFFF, "uint32")] * 2)

    def _load(self, registers: Any, number: int, stage: Any, side: int, row: Any, k: Any) -> None:
        from tvm import tirx

        at = self.row(stage, side, row) + swizzled(self.tile, row, k)
        four = [registers[4 * number + i] for i in range(4)]
        ptx.ldmatrix(four, tirx.address_of(self.shared[at]))

    def _multiply(self, sums: Any, number: int, i: int, b: list[Any]) -> None:
        """A fragment's sums, with fragment ``i`` of the rows."""
        a, d = [self.a[4 * i + e] for e in range(4)], [sums[4 * number + e] for e in range(4)]
        if self.problem.operation == "and":
            ptx.mma("m16n8k256", "and", d, a, b)
            return
        for half in range(2):
            for part in range(2):
                ptx.mma("m8n8k128", "xor", d[2 * half : 2 * half + 2], [a[half + 2 * part]], [b[part]])

    def ones(self, i: int, pair: Any) -> Any:
        from tvm import tirx

        if not self.counted:
            return 0
        x, w = self.problem.counts, len(self.problem.w)
        row = self.row_ones[i // (4 * self.across_fragments) * 4 + i % 4]
        return row * _chosen(x, tirx.floordiv(pair, w))

    def fold(self, pair: Any) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        super().fold(pair)
        if self.counted and self.problem.pairs > 1:  # the next pair's rows of ones are another plane's, or none
            for i in range(self.down_fragments * 4):
                T.buffer_store(self.row_ones, tirx.const(0, "int32"), [i])

    def _thread_rows(self, m0: Any) -> list[tuple[int, Any]]:
        """Where the sums of each row of this thread start, and which row that is."""
        from tvm import tirx

        group = tirx.floordiv(self.lane, 4)
        return [
            (i * self.across_fragments * 4 + 2 * half, m0 + self.down * self.tile.rows + i * 16 + half * 8 + group)
            for i in range(self.down_fragments)
            for half in range(2)
        ]

    def store(self, m0: Any, o0: Any) -> None:
        from tvm import tirx

        for q in range(self.across_fragments // 4):
            o = o0 + self.across * self.tile.columns + q * 32
            rows = [(start + 16 * q, m) for start, m in self._thread_rows(m0)]
            own = o + tirx.floormod(self.lane, 4) * 8
            filters = _Filters(self.problem, own, self.tile)
            if self.problem.flags is None:
                self._store_values(rows, own, filters)
            else:
                self._store_words(rows, o, filters)

    def _totals(self, start: int) -> list[Any]:
        """A row's sums of eight neighbouring filters."""
        return [self.totals[start + 4 * (e // 2) + e % 2] for e in range(8)]

    def _store_values(self, rows: list[tuple[int, Any]], o: Any, filters: _Filters) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        problem = self.problem
        out = problem.last.buffer
        for start, m in rows:
            at = problem.last.indices(*unravel(m, problem.last.extents[:-1]), o)
            with ExitStack() as guard:
                if inside := _inside(problem, self.tile, m, o):
                    guard.enter_context(if_(tirx.all(*inside)))
                made = filters.finished(m, self._totals(start))
                if not filters.whole:
                    for e, value in enumerate(made):
                        with if_(o + e < problem.columns):
                            T.buffer_store(out, value, [*at[:-1], at[-1] + e])
                    continue
                values = T.alloc_buffer((8,), str(out.dtype), scope="local")
                for e, value in enumerate(made):
                    T.buffer_store(values, value, [e])
                for e in (0, 4):
                    four = values[tirx.Ramp(tirx.const(e, "int32"), tirx.const(1, "int32"), 4)]
                    T.buffer_store(out, four, [*at[:-1], tirx.Ramp(at[-1] + e, tirx.const(1, "int32"), 4)])

    def _store_words(self, rows: list[tuple[int, Any]], first: Any, filters: _Filters) -> None:
        """A thread's eight bits are a byte; the bytes of four neighbours are a word, which one of them stores."""
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        problem = self.problem
        extents = problem.last.extents
        t = tirx.floormod(self.lane, 4)
        o, shift, word = first + t * 8, tirx.Cast("uint32", t * 8), tirx.floordiv(first, WORD_BITS)
        every = tirx.const(0xFFFFFFFF, "uint32")
        for number, (start, m) in enumerate(rows):
            octet: Any = tirx.const(0, "uint32")
            for e, bit in enumerate(filters.finished(m, self._totals(start))):
                if problem.columns % self.tile.block[1] and not filters.whole:
                    bit = tirx.if_then_else(o + e < problem.columns, bit, tirx.const(0, "uint32"))
                octet = octet | (bit << tirx.const(e, "uint32"))
            made = T.bind(octet << shift)
            for step in (1, 2):
                made = T.bind(made | T.tvm_warp_shuffle_xor(every, made, step, LANES, LANES))
            there = [tirx.EQ(t, number % 4)]
            there += [m < problem.rows] if problem.rows % self.tile.block[0] else []
            there += [word < extents[-2]] if extents[-2] * WORD_BITS % self.tile.block[1] else []
            with if_(tirx.all(*there)):
                T.buffer_store(problem.last.buffer, made, problem.last.indices(*unravel(m, extents[:-2]), word, 0))


class _Filters:
    """What follows the sums of eight neighbouring filters, whose constants are loaded four at a time.

    whole: whether all eight are there, if the first is.
    """

    def __init__(self, problem: Problem, first: Any, tile: Tile) -> None:
        from tvm import tirx

        self.problem, self.first = problem, first
        self.whole = problem.columns % 8 == 0
        # The filters of threads beyond the last one have no constants: any will do, for what is made is not stored.
        beyond = problem.columns % tile.block[1] != 0
        self.loaded = tirx.min(first, problem.columns - 8) if beyond else first
        self.common: list[tuple[Any, Any]] = []  # what all rows share
        if self.whole:
            filter_ = tirx.Var("filter", "int32")
            value = problem.finished(0, filter_, tirx.Var("total", str(problem.products.buffer.dtype)))
            self.common = [found for found in self._eights(value, filter_) if len(found[0].indices) == 1]

    def _eights(self, value: Any, filter_: Any) -> list[tuple[Any, Any]]:
        """The loads for a filter, and for all eight in registers."""
        from tvm.ir import TensorLoad

        loads: list[Any] = []
        tvm_ffi.structural_walk(value, (TensorLoad, loads.append))
        mine = [load for load in loads if load.indices[-1].same_as(filter_) and _is_word(load)]
        return [(load, self._eight(load)) for load in mine]

    def finished(self, m: Any, totals: list[Any]) -> list[Any]:
        """What is stored for each filter's sum, or its bit."""
        from tvm import tirx

        filter_ = tirx.Var("filter", "int32")
        total = tirx.Var("total", str(self.problem.products.buffer.dtype))
        value = self.problem.finished(m, filter_, total)
        eights = self._eights(value, filter_) if self.whole else []
        made = []
        for e, own in enumerate(totals):
            each = value
            for load, eight in eights:
                each = replaced_load(each, load, eight[e])
            made.append(replaced(each, [filter_, total], [self.first + e, own]))
        return made

    def _eight(self, load: Any) -> Any:
        """The elements of a load for all filters, in registers."""
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        for known, eight in self.common:
            if known.source.same_as(load.source) and len(load.indices) == 1:
                return eight
        eight = T.alloc_buffer((8,), str(load.ty.dtype), scope="local")
        *outer, _ = load.indices
        for e in (0, 4):
            here, there = (tirx.Ramp(at + e, tirx.const(1, "int32"), 4) for at in (tirx.const(0, "int32"), self.loaded))
            T.buffer_store(eight, load.source[(*outer, there)], [here])
        return eight


def _is_word(load: Any) -> bool:
    return str(load.ty.dtype) in ("float32", "int32")
