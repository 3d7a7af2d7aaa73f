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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import tvm_ffi

from targets import Gpu
from tvm_ops.bitplanes import WORD_BITS
from tvm_ops.ops import bitpack, implicit_gemm
from tvm_ops.ops.bitserial_gemm import FRAGMENT_WORDS, MIN_FRAGMENT_ROWS

LANES = 32
_CHUNK = 4  # words that a thread copies at once, and that ldmatrix reads of a row


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
        return self.depth + (0 if self.tensor else _CHUNK)

    @property
    def shared_words(self) -> int:
        return self.stages * sum(self.block) * self.pitch


# Reading the function --------------------------------------------------------------------------------------------


def _replaced(expression: Any, variables: Sequence[Any], values: Sequence[Any]) -> Any:
    from tvm.ir import Var

    def look(variable: Any) -> Any:
        return next((v for name, v in zip(variables, values, strict=True) if variable.same_as(name)), variable)

    return tvm_ffi.structural_map(expression, (Var, look))


def _loads(expression: Any, buffer: Any, value: Any) -> Any:
    """An expression whose loads from ``buffer`` are ``value``."""
    from tvm.ir import TensorLoad

    return tvm_ffi.structural_map(expression, (TensorLoad, lambda load: value if load.source.same_as(buffer) else load))


class Block:
    """A TIR block that stores one value a point: its extents, and the value at a point."""

    def __init__(self, block: Any) -> None:
        self.name = str(block.name_hint)
        self.annotations = block.annotations
        self.buffer = block.body.buffer
        self.extents = [int(v.dom.extent) for v in block.iter_vars]
        self._variables = [v.var for v in block.iter_vars]
        self._store = block.body

    def value(self, *at: Any) -> Any:
        return _replaced(self._store.value, self._variables, at)

    def indices(self, *at: Any) -> list[Any]:
        return [_replaced(index, self._variables, at) for index in self._store.indices]


def blocks(func: Any) -> dict[str, Block]:
    """The blocks of a function by name."""
    from tvm.s_tir import SBlock

    found: list[Any] = []
    tvm_ffi.structural_walk(func.body, (SBlock, lambda b: found.append(b) if len(b.iter_vars) else None))
    return {str(b.name_hint): Block(b) for b in found}


def unravel(index: Any, extents: Sequence[int]) -> list[Any]:
    """A row-major number as indices."""
    from tvm import tirx

    found = []
    for extent in reversed(extents[1:]):
        found.append(tirx.floormod(index, extent))
        index = tirx.floordiv(index, extent)
    return [index, *reversed(found)]


def with_body(func: Any, body: Any) -> Any:
    """The function with another body, in a block as TVM's passes expect it."""
    from tvm import tirx
    from tvm.s_tir import SBlock, SBlockRealize

    return func.with_body(SBlockRealize([], tirx.const(True, "bool"), SBlock([], [], [], "root", body)))


class Problem:
    """What a function multiplies, and what it makes of the sums."""

    def __init__(self, func: Any) -> None:
        self.blocks = blocks(func)
        self.products = self.blocks[implicit_gemm.BLOCK]
        self.patches = self.blocks[implicit_gemm.PATCHES]
        self.filters = self.blocks.get(implicit_gemm.FILTERS)
        self.flags = self.blocks.get(bitpack.FLAGS)
        self.last = next(b for b in self.blocks.values() if b.buffer.same_as(func.params[-1]))
        annotations = self.products.annotations
        self.operation = str(annotations["operation"])
        self.x, self.w, self.counts = ([int(v) for v in annotations[key]] for key in ("x", "w", "counts"))
        self.vector = int(annotations["vector"])
        self.rows, self.columns, *_ = self.products.extents
        self.depth = self.patches.extents[-1]
        weight = self.filters.buffer if self.filters else _operand(self.products, self.patches.buffer)
        self.weight = weight
        self.element = str(self.patches.buffer.dtype)

    @property
    def pairs(self) -> int:
        """Pairs of planes."""
        return len(self.x) * len(self.w)

    def patch(self, m: Any, plane: Any, k: Any) -> Any:
        return self.patches.value(m, plane, k)

    def filter(self, o: Any, plane: Any, k: Any) -> Any:
        if self.filters:
            return self.filters.value(o, plane, k)
        return self.weight[o, plane, k] if len(self.weight.shape) == 3 else self.weight[o, k]

    def finished(self, m: Any, o: Any, total: Any) -> Any:
        """What is stored for a sum, or its bit."""
        block = self.flags or self.last
        *pixel, _ = block.extents
        return _loads(block.value(*unravel(m, pixel), o), self.products.buffer, total)


def _operand(products: Block, patches: Any) -> Any:
    from tvm.ir import TensorLoad

    found: list[Any] = []
    tvm_ffi.structural_walk(products._store.value, (TensorLoad, lambda load: found.append(load.source)))
    return next(b for b in found if not b.same_as(patches) and not b.same_as(products.buffer))


# Instructions ----------------------------------------------------------------------------------------------------


def _call(name: str, source: str, *args: Any) -> None:
    from tvm.script.ir_builder import tirx as T

    T.evaluate(T.cuda.func_call(name, *args, source_code=source))


def _mma(shape: str, operation: str, d: Sequence[Any], a: Sequence[Any], b: Sequence[Any]) -> None:
    """d += popc(a op b) over a fragment."""
    name = f"mma_{shape}_{operation}"
    counts = len(d), len(a), len(b), len(d)
    places, operands = [], 0
    for count in counts:
        places.append("{" + ", ".join(f"%{operands + i}" for i in range(count)) + "}")
        operands += count
    outputs = ", ".join(f'"=r"(d{i})' for i in range(len(d)))
    inputs = ", ".join(f'"r"({v}{i})' for v, count in zip("abd", counts[1:], strict=True) for i in range(count))
    parameters = [f"int& d{i}" for i in range(len(d))]
    parameters += [f"unsigned {v}{i}" for v, count in (("a", len(a)), ("b", len(b))) for i in range(count)]
    instruction = f"mma.sync.aligned.{shape}.row.col.s32.b1.b1.s32.{operation}.popc"
    source = f"""__device__ __forceinline__ void {name}({", ".join(parameters)}) {{
  asm volatile("{instruction} {", ".join(places)};" : {outputs} : {inputs});
}}
"""
    _call(name, source, *d, *a, *b)


_LDMATRIX = """__device__ __forceinline__ void ldmatrix_x4(
    unsigned& d0, unsigned& d1, unsigned& d2, unsigned& d3, const void* row) {
  unsigned address = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d0), "=r"(d1), "=r"(d2), "=r"(d3) : "r"(address));
}
"""
_COMMIT = """__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" : : : "memory");
}
"""


def _copy_async(to: Any, source: Any, size: int, valid: Any) -> None:
    """Start copying ``size`` bytes to shared memory; zeros where not ``valid``."""
    name = f"cp_async_{size}"
    cache = "cg" if size == 16 else "ca"  # past the first cache, which only whole vectors can
    text = f"""__device__ __forceinline__ void {name}(void* to, const void* from, int valid) {{
  unsigned address = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.{cache}.shared.global [%0], [%1], {size}, %2;"
               : : "r"(address), "l"(from), "r"(valid ? {size}u : 0u) : "memory");
}}
"""
    _call(name, text, to, source, valid)


def _wait_async(groups: int) -> None:
    """Wait until at most so many of this thread's committed copies are under way."""
    name = f"cp_async_wait_{groups}"
    text = f"""__device__ __forceinline__ void {name}() {{
  asm volatile("cp.async.wait_group {groups};" : : : "memory");
}}
"""
    _call(name, text)


# Writing the kernel ----------------------------------------------------------------------------------------------


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
        kind = _TensorCores if tile.tensor else _OrdinaryCores
        sums = kind(problem, tile, shared, warp, lane)
        copies = _Copies(problem, tile, gpu, shared, (bx * rows, by * columns), warp * LANES + lane)
        _pipeline(problem, tile, copies, sums)
        with sums.gathered():
            sums.store(bx * rows, by * columns)
    return with_body(func, builder.get().body)


def _steps(problem: Problem, tile: Tile) -> int:
    return math.ceil(problem.depth / tile.depth)


def _pipeline(problem: Problem, tile: Tile, copies: _Copies, sums: Any) -> None:
    """Count one step of the depth while the next ones are copied."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T

    steps = _steps(problem, tile)
    total, ahead = steps * problem.pairs, tile.stages - 1
    for step in range(ahead):
        if step < total:
            copies.start(step, step)
        copies.commit()
    with _loop(total) as step:
        copies.wait(ahead - 1)
        T.evaluate(T.cuda.cta_sync())
        if total > ahead:
            with _if(step + ahead < total):
                copies.start(step + ahead, tirx.floormod(step + ahead, tile.stages))
        copies.commit()
        sums.count(tirx.floormod(step, tile.stages), step)
        if problem.pairs > 1:
            with _if(tirx.floormod(step, steps) == steps - 1):
                sums.fold(tirx.floordiv(step, steps))
    if problem.pairs == 1:
        sums.fold(0)


@contextmanager
def _if(condition: Any) -> Iterator[None]:
    from tvm.script.ir_builder import tirx as T

    with T.If(condition), T.Then():
        yield


@contextmanager
def _loop(extent: int) -> Iterator[Any]:
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T

    if extent == 1:
        yield tirx.const(0, "int32")
    else:
        with T.serial(0, extent) as step:
            yield step


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
        steps = _steps(problem, tile)
        pair, part = tirx.floordiv(step, steps), tirx.floormod(step, steps)
        planes = tirx.floordiv(pair, len(problem.w)), tirx.floormod(pair, len(problem.w))
        vector = _CHUNK if problem.filters is None and problem.depth % _CHUNK == 0 else 1
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
                    guard.enter_context(_if(number < rows * across))
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
            _copy_async(tirx.address_of(self.shared[to]), tirx.address_of(value), 4 * vector, inside)
            return
        if vector > 1:
            *outer, last = value.indices
            value = value.source[(*outer, tirx.Ramp(last, tirx.const(1, "int32"), vector))]
            zero, to = tirx.Broadcast(zero, vector), tirx.Ramp(to, tirx.const(1, "int32"), vector)
        T.buffer_store(self.shared, tirx.if_then_else(tirx.all(*valid), value, zero) if valid else value, [to])

    def commit(self) -> None:
        if self.asynchronous:
            _call("cp_async_commit", _COMMIT)

    def wait(self, groups: int) -> None:
        if self.asynchronous:
            _wait_async(groups)


def swizzled(tile: Tile, row: Any, k: Any) -> Any:
    """Where word k of a row lies: chunks change places, so that eight rows' chunks k lie in different banks."""
    from tvm import tirx

    chunks = tile.depth // _CHUNK
    if not tile.tensor or chunks == 1:
        return k
    key = tirx.floormod(tirx.floordiv(row, max(1, 8 // chunks)), chunks)
    return (tirx.floordiv(k, _CHUNK) ^ key) * _CHUNK + tirx.floormod(k, _CHUNK)


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


class _Sums:
    """The sums that a thread holds, of some rows and columns."""

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
        for buffer in (self.sums, self.totals):
            for i in range(size):
                T.buffer_store(buffer, tirx.const(0, self.dtype), [i])

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

        with _if(self.part > 0):
            for i in range(size):
                T.buffer_store(shared, self.totals[i], [at(self.part - 1, i)])
        T.evaluate(T.cuda.cta_sync())
        with _if(tirx.EQ(self.part, 0)):
            for i in range(size):
                total = self.totals[i]
                for part in range(tile.split - 1):
                    total = total + shared[at(part, i)]
                T.buffer_store(self.totals, total, [i])
            yield


class _OrdinaryCores(_Sums):
    """Lanes are columns; each holds ``rows`` x ``columns / 32`` sums."""

    def __init__(self, problem: Problem, tile: Tile, shared: Any, warp: Any, lane: Any) -> None:
        from tvm.script.ir_builder import tirx as T

        self.vectors = tile.columns // LANES
        super().__init__(problem, tile, shared, warp, lane, tile.rows * self.vectors)
        self.a = T.alloc_buffer((tile.rows * _CHUNK,), problem.element, scope="local")
        self.b = T.alloc_buffer((self.vectors * _CHUNK,), problem.element, scope="local")

    def count(self, stage: Any, step: Any) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        tile, one = self.tile, tirx.const(1, "int32")
        own = tile.depth // _CHUNK // tile.split
        with _loop(own) as number:
            chunk = self.part * own + number
            sides = (
                (self.a, 0, [self.down * tile.rows + r for r in range(tile.rows)]),
                (self.b, 1, [self.across * tile.columns + j * LANES + self.lane for j in range(self.vectors)]),
            )
            for registers, side, rows in sides:
                for i, row in enumerate(rows):
                    at = self.row(stage, side, row) + chunk * _CHUNK
                    words = self.shared[tirx.Ramp(at, one, _CHUNK)]
                    T.buffer_store(registers, words, [tirx.Ramp(tirx.const(i * _CHUNK, "int32"), one, _CHUNK)])
            for r in range(tile.rows):
                for j in range(self.vectors):
                    for e in range(_CHUNK):
                        a, b = self.a[r * _CHUNK + e], self.b[j * _CHUNK + e]
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
                            guard.enter_context(_if(tirx.all(*inside)))
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
                    with _if(tirx.all(*there)):
                        pixel = unravel(m, extents[:-2])
                        T.buffer_store(problem.last.buffer, made, problem.last.indices(*pixel, word, 0))


def _inside(problem: Problem, tile: Tile, m: Any, o: Any) -> list[Any]:
    """Conditions that a row and a column exist."""
    rows, columns = tile.block
    down = [m < problem.rows] if problem.rows % rows else []
    return down + ([o < problem.columns] if problem.columns % columns else [])


class _TensorCores(_Sums):
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
        steps = _steps(problem, tile)
        part, plane = tirx.floormod(step, steps), tirx.floormod(tirx.floordiv(step, steps), len(problem.w))
        own = tile.depth // FRAGMENT_WORDS // tile.split
        for number in range(own):
            first = (self.part * own + number) * FRAGMENT_WORDS if tile.split > 1 else number * FRAGMENT_WORDS
            with ExitStack() as guard:
                if (number or tile.split > 1) and problem.depth % tile.depth:
                    guard.enter_context(_if(part * tile.depth + first < problem.depth))
                self._fragments(stage, first, plane)

    def _fragments(self, stage: Any, first: Any, plane: Any) -> None:
        """Count 256 bits of the depth; rows of ones with the first plane of weights only."""
        from tvm import tirx

        tile, lane = self.tile, self.lane
        for i in range(self.down_fragments):
            row = self.down * tile.rows + i * 16 + tirx.floormod(lane, 16)
            self._load(self.a, i, stage, 0, row, first + tirx.floordiv(lane, 16) * _CHUNK)
        for j in range(self.across_fragments // 2):
            row = self.across * tile.columns + j * 16 + tirx.floormod(lane, 8) + tirx.floordiv(lane, 16) * 8
            self._load(self.b, j, stage, 1, row, first + tirx.floormod(tirx.floordiv(lane, 8), 2) * _CHUNK)
        for i in range(self.down_fragments):
            for j in range(self.across_fragments):
                self._multiply(self.sums, i * self.across_fragments + j, i, [self.b[2 * j], self.b[2 * j + 1]])
        if self.counted:
            with ExitStack() as guard:
                if len(self.problem.w) > 1:
                    guard.enter_context(_if(plane == 0))
                for i in range(self.down_fragments):
                    self._multiply(self.row_ones, i, i, [tirx.const(0xFFFFFFFF, "uint32")] * 2)

    def _load(self, registers: Any, number: int, stage: Any, side: int, row: Any, k: Any) -> None:
        from tvm import tirx

        at = self.row(stage, side, row) + swizzled(self.tile, row, k)
        four = [registers[4 * number + i] for i in range(4)]
        _call("ldmatrix_x4", _LDMATRIX, *four, tirx.address_of(self.shared[at]))

    def _multiply(self, sums: Any, number: int, i: int, b: list[Any]) -> None:
        """A fragment's sums, with fragment ``i`` of the rows."""
        a, d = [self.a[4 * i + e] for e in range(4)], [sums[4 * number + e] for e in range(4)]
        if self.problem.operation == "and":
            _mma("m16n8k256", "and", d, a, b)
            return
        for half in range(2):
            for part in range(2):
                _mma("m8n8k128", "xor", d[2 * half : 2 * half + 2], [a[half + 2 * part]], [b[part]])

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
            if self.problem.flags is None:
                self._store_values(rows, o + tirx.floormod(self.lane, 4) * 8)
            else:
                self._store_words(rows, o)

    def _value(self, start: int, m: Any, o: Any, e: int) -> Any:
        """What is made of the sum of filter o + e."""
        return self.problem.finished(m, o + e, self.totals[start + 4 * (e // 2) + e % 2])

    def _store_values(self, rows: list[tuple[int, Any]], o: Any) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        problem = self.problem
        whole = problem.columns % 8 == 0
        out = problem.last.buffer
        for start, m in rows:
            at = problem.last.indices(*unravel(m, problem.last.extents[:-1]), o)
            with ExitStack() as guard:
                if inside := _inside(problem, self.tile, m, o):
                    guard.enter_context(_if(tirx.all(*inside)))
                values = T.alloc_buffer((8,), str(out.dtype), scope="local")
                for e in range(8):
                    with ExitStack() as last:
                        if not whole:
                            last.enter_context(_if(o + e < problem.columns))
                        value = self._value(start, m, o, e)
                        T.buffer_store(*((values, value, [e]) if whole else (out, value, [*at[:-1], at[-1] + e])))
                for e in range(0, 8 if whole else 0, 4):
                    one = tirx.const(1, "int32")
                    four = values[tirx.Ramp(tirx.const(e, "int32"), one, 4)]
                    T.buffer_store(out, four, [*at[:-1], tirx.Ramp(at[-1] + e, one, 4)])

    def _store_words(self, rows: list[tuple[int, Any]], first: Any) -> None:
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
            for e in range(8):
                bit = self._value(start, m, o, e)
                if problem.columns % self.tile.block[1]:
                    bit = tirx.if_then_else(o + e < problem.columns, bit, tirx.const(0, "uint32"))
                octet = octet | (bit << tirx.const(e, "uint32"))
            made = T.bind(octet << shift)
            for step in (1, 2):
                made = T.bind(made | T.tvm_warp_shuffle_xor(every, made, step, LANES, LANES))
            there = [t == number % 4]
            there += [m < problem.rows] if problem.rows % self.tile.block[0] else []
            there += [word < extents[-2]] if extents[-2] * WORD_BITS % self.tile.block[1] else []
            with _if(tirx.all(*there)):
                T.buffer_store(problem.last.buffer, made, problem.last.indices(*unravel(m, extents[:-2]), word, 0))


# Choosing a tile -------------------------------------------------------------------------------------------------


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


def tiles(func: Any, gpu: Gpu) -> list[Tile]:
    """The tiles that suit a function, the one of the rule first: the largest that fills the GPU."""
    problem = Problem(func)
    tensor = problem.operation != "" and problem.operation == gpu.bit_product and problem.rows >= MIN_FRAGMENT_ROWS
    few = problem.rows <= _FEW_ROWS[0][0]
    found = []
    for sizes in _TENSOR if tensor else _FEW_ROWS if few else _ORDINARY:
        split = sizes[-1]
        least = split * (FRAGMENT_WORDS if tensor else _CHUNK)
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
