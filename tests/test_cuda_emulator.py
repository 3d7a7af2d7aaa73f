"""The emulator of generated CUDA: kernels equal NumPy, and what a GPU would not allow, or only by luck, is refused."""

# ruff: noqa: N803, N806, SIM300 - buffers of TVMScript carry the names of matrices
from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi
from cuda_emulator import emulator
from tvm import s_tir, te, tirx
from tvm.script import tirx as T

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=emulator.missing())
ORDERS = ("0", "1", "2", "3")


def run(function, *arrays: np.ndarray) -> np.ndarray:
    """Call with copies of the arrays; the last one is the output."""
    tensors = [tvm.runtime.tensor(a) for a in arrays]
    function(*tensors)
    return tensors[-1].numpy()


def words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 2**32, shape, dtype="uint32")


def count_bits(a: np.ndarray, b: np.ndarray, op) -> np.ndarray:
    """Bits of op(row of a, row of b), for each pair of rows."""
    return np.bitwise_count(op(a[:, None], b[None])).sum(-1, dtype="int32")


# ---- kernels


def popc_gemm(m: int, n: int, k: int, scope: str = "shared") -> tvm.IRModule:
    """C = bits of A xor B, in tiles of 32 x 32 x 4 words that go through shared memory."""
    a = te.placeholder((m, k), "uint32", name="A")
    b = te.placeholder((n, k), "uint32", name="B")
    r = te.reduce_axis((0, k), "r")
    c = te.compute((m, n), lambda i, j: te.sum(tirx.popcount(a[i, r] ^ b[j, r]).astype("int32"), axis=r), name="C")
    sch = s_tir.Schedule(te.create_prim_func([a, b, c]).with_attr("global_symbol", "gemm"))
    block = sch.get_sblock("C")
    i, j, kk = sch.get_loops(block)
    (by, ty, i), (bx, tx, j), (ko, ki) = (
        sch.split(i, [None, 8, 4]),
        sch.split(j, [None, 8, 4]),
        sch.split(kk, [None, 4]),
    )
    sch.reorder(by, bx, ty, tx, ko, ki, i, j)
    for loop, axis in ((by, "blockIdx.y"), (bx, "blockIdx.x"), (ty, "threadIdx.y"), (tx, "threadIdx.x")):
        sch.bind(loop, axis)
    sch.reverse_compute_at(sch.cache_write(block, 0, "local"), tx, preserve_unit_loops=True)
    for operand in (0, 1):
        read = sch.cache_read(block, operand, scope)
        sch.compute_at(read, ko, preserve_unit_loops=True)
        y, x, vector = sch.split(sch.fuse(*sch.get_loops(read)[-2:]), [8, None, 2])
        sch.bind(y, "threadIdx.y")
        sch.bind(x, "threadIdx.x")
        sch.vectorize(vector)
    sch.decompose_reduction(block, ko)
    return sch.mod


def tensor_core_gemm(m: int, n: int, k: int, op: str):
    """C = A (op) B on a warp a tile of 16 x 8, through shared memory and ldmatrix; k in words, 8 a step."""
    types = "s8.s8.s32" if op == "s8" else f"b1.b1.s32.{op}.popc"
    mma = f"mma.sync.aligned.m16n8k{32 if op == 's8' else 256}.row.col.s32.{types}"

    @T.prim_func(s_tir=True)
    def gemm(A: T.Buffer((m, k), "uint32"), B: T.Buffer((n, k), "uint32"), C: T.Buffer((m, n), "int32")):
        T.func_attr({"global_symbol": "gemm", "tirx.noalias": True})
        by = T.env_thread("blockIdx.y")
        bx = T.env_thread("blockIdx.x")
        lane = T.env_thread("threadIdx.x")
        T.launch_thread(by, m // 16)
        T.launch_thread(bx, n // 8)
        T.launch_thread(lane, 32)
        rows = T.decl_buffer((16, 12), "uint32", scope="shared")
        columns = T.decl_buffer((8, 12), "uint32", scope="shared")
        a = T.decl_buffer((4,), "uint32", scope="local")
        b = T.decl_buffer((2,), "uint32", scope="local")
        d = T.decl_buffer((4,), "uint32", scope="local")
        for i in T.unroll(4):
            d[i] = T.uint32(0)
        for step in range(k // 8):
            T.tvm_storage_sync("shared")
            for i in T.unroll(4):
                rows[i * 4 + lane // 8, lane % 8] = A[by * 16 + i * 4 + lane // 8, step * 8 + lane % 8]
            for i in T.unroll(2):
                columns[i * 4 + lane // 8, lane % 8] = B[bx * 8 + i * 4 + lane // 8, step * 8 + lane % 8]
            T.tvm_storage_sync("shared")
            T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                a[0], a[1], a[2], a[3], T.address_of(rows[lane % 16, lane // 16 * 4])
            )
            T.ptx["ldmatrix.sync.aligned.m8n8.x2.shared.b16"](
                b[0], b[1], T.address_of(columns[lane % 8, lane // 8 % 2 * 4])
            )
            T.ptx[mma](d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b[0], b[1], d[0], d[1], d[2], d[3])
        for i in T.unroll(4):
            C[by * 16 + lane // 4 + i // 2 * 8, bx * 8 + lane % 4 * 2 + i % 2] = T.Cast("int32", d[i])

    return gemm


def turing_gemm(k: int):
    """8 x 8 results of xor on a Turing tensor core, operands straight from global memory; k in words, 4 a step."""

    @T.prim_func(s_tir=True)
    def gemm(A: T.Buffer((8, k), "uint32"), B: T.Buffer((8, k), "uint32"), C: T.Buffer((8, 8), "int32")):
        T.func_attr({"global_symbol": "gemm", "tirx.noalias": True})
        lane = T.env_thread("threadIdx.x")
        T.launch_thread(lane, 32)
        d = T.decl_buffer((2,), "uint32", scope="local")
        for i in T.unroll(2):
            d[i] = T.uint32(0)
        for step in range(k // 4):
            T.ptx["mma.sync.aligned.m8n8k128.row.col.s32.b1.b1.s32.xor.popc"](
                d[0], d[1], A[lane // 4, step * 4 + lane % 4], B[lane // 4, step * 4 + lane % 4], d[0], d[1]
            )
        for i in T.unroll(2):
            C[lane // 4, lane % 4 * 2 + i] = T.Cast("int32", d[i])

    return gemm


def padded_copy(rows: int, width: int):
    """Each row of A doubled, with a zero on both sides: cp.async two buffers deep, zeros by its predicate."""

    @T.prim_func(s_tir=True)
    def copy(A: T.Buffer((rows, width), "float32"), B: T.Buffer((rows, width + 2), "float32")):
        T.func_attr({"global_symbol": "copy", "tirx.noalias": True})
        for tx in T.thread_binding(rows, thread="threadIdx.x"):
            for i in T.serial(
                width + 2,
                annotations={
                    "software_pipeline_stage": [0, 1],
                    "software_pipeline_order": [0, 1],
                    "software_pipeline_async_stages": [0],
                },
            ):
                with T.sblock("compute"):
                    T.reads(A[tx, i])
                    T.writes(B[tx, i])
                    S = T.sblock_alloc_buffer((rows, 1), "float32", scope="shared")
                    with T.sblock():
                        T.reads(A[tx, i])
                        T.writes(S[tx, 0])
                        S[tx, 0] = T.if_then_else(1 <= i and i < width + 1, A[tx, i - 1], T.float32(0))
                    with T.sblock():
                        T.reads(S[tx, 0])
                        T.writes(B[tx, i])
                        B[tx, i] = S[tx, 0] * T.float32(2)

    return copy


def reversed_blocks(blocks: int):
    """Four words a thread, threads of a block in reverse; cp.async of 16 bytes, or of none where `keep` is 0."""

    @T.prim_func(s_tir=True)
    def copy(
        A: T.Buffer((blocks, 256), "uint32"),
        keep: T.Buffer((blocks, 64), "int32"),
        B: T.Buffer((blocks, 256), "uint32"),
    ):
        T.func_attr({"global_symbol": "copy", "tirx.noalias": True})
        tx = T.env_thread("threadIdx.x")
        T.launch_thread(tx, 64)
        S = T.decl_buffer((2, 256), "uint32", scope="shared.dyn")
        T.ptx["cp.async.cg.shared.global"](T.address_of(S[0, tx * 4]), T.address_of(A[0, tx * 4]), 16, keep[0, tx] == 0)
        T.ptx["cp.async.commit_group"]()
        for i in range(blocks):
            if i + 1 < blocks:
                T.ptx["cp.async.cg.shared.global"](
                    T.address_of(S[(i + 1) % 2, tx * 4]), T.address_of(A[i + 1, tx * 4]), 16, keep[i + 1, tx] == 0
                )
            T.ptx["cp.async.commit_group"]()
            T.ptx["cp.async.wait_group"](1)
            T.tvm_storage_sync("shared")
            for j in T.vectorized(4):
                B[i, tx * 4 + j] = S[i % 2, (63 - tx) * 4 + j]
            T.tvm_storage_sync("shared")

    return copy


def packing(n: int):
    """A bit for each value that is not negative, 32 a word, by ballot."""

    @T.prim_func(s_tir=True)
    def pack(X: T.Buffer((n,), "float32"), B: T.Buffer((n // 32,), "uint32")):
        T.func_attr({"global_symbol": "pack", "tirx.noalias": True})
        bx = T.env_thread("blockIdx.x")
        tx = T.env_thread("threadIdx.x")
        T.launch_thread(bx, n // 64)
        T.launch_thread(tx, 64)
        word = T.decl_buffer((1,), "uint32", scope="local")
        word[0] = T.cuda.ballot_sync(T.uint32(0xFFFFFFFF), T.Cast("int32", X[bx * 64 + tx] >= T.float32(0)))
        if tx % 32 == 0:
            B[bx * 2 + tx // 32] = word[0]

    return pack


def sums(rows: int, width: int) -> tvm.IRModule:
    """Sums of rows by TVM's own reduction over threads: shuffles, and shared memory between warps."""
    x = te.placeholder((rows, width), "float32", name="X")
    r = te.reduce_axis((0, width), "r")
    y = te.compute((rows,), lambda i: te.sum(x[i, r], axis=r), name="Y")
    sch = s_tir.Schedule(te.create_prim_func([x, y]).with_attr("global_symbol", "sums"))
    i, kk = sch.get_loops(sch.get_sblock("Y"))
    sch.bind(i, "blockIdx.x")
    sch.bind(sch.split(kk, [None, 128])[1], "threadIdx.x")
    return sch.mod


def device_code(body: str, threads: int = 64):
    """A block of threads that runs CUDA C++, which sees `a` and `b`, 64 words each, and `tx`."""
    source = f"__device__ void body(unsigned* a, unsigned* b) {{\n  int tx = threadIdx.x;\n{body}\n}}\n"

    @T.prim_func(s_tir=True)
    def kernel(A: T.Buffer((64,), "uint32"), B: T.Buffer((64,), "uint32")):
        T.func_attr({"global_symbol": "kernel", "tirx.noalias": True})
        tx = T.env_thread("threadIdx.x")
        T.launch_thread(tx, threads)
        T.evaluate(T.cuda.func_call("body", T.address_of(A[0]), T.address_of(B[0]), source_code=source))

    return kernel


# ---- they equal NumPy


@pytest.mark.parametrize("scope", ["shared", "shared.dyn"])
def test_popc_gemm(rng, scope):
    module = emulator.build(popc_gemm(64, 96, 12, scope), "sm_75")
    a, b = words(rng, 64, 12), words(rng, 96, 12)
    np.testing.assert_array_equal(run(module.gemm, a, b, np.zeros((64, 96), "int32")), count_bits(a, b, np.bitwise_xor))


@pytest.mark.parametrize("op", ["and", "xor", "s8"])
def test_tensor_core_gemm(rng, op):
    a, b = words(rng, 32, 16), words(rng, 16, 16)
    if op == "s8":
        expected = a.view("int8").astype("int32") @ b.view("int8").astype("int32").T
    else:
        expected = count_bits(a, b, {"and": np.bitwise_and, "xor": np.bitwise_xor}[op])
    module = emulator.build(tensor_core_gemm(32, 16, 16, op), "sm_80")
    np.testing.assert_array_equal(run(module.gemm, a, b, np.zeros((32, 16), "int32")), expected)


def test_turing_tensor_core(rng):
    a, b = words(rng, 8, 12), words(rng, 8, 12)
    module = emulator.build(turing_gemm(12), "sm_75")
    np.testing.assert_array_equal(run(module.gemm, a, b, np.zeros((8, 8), "int32")), count_bits(a, b, np.bitwise_xor))


def test_pipelined_copy(rng):
    with tvm.transform.PassContext(config={"tirx.use_async_copy": 1}):
        source = emulator.cuda_source(padded_copy(16, 21), "sm_80")
    assert "@!p st.shared.u32" in source  # TVM's predicated form, several instructions in a block
    x = rng.standard_normal((16, 21)).astype("float32")
    out = run(emulator.load(source, "sm_80").copy, x, np.full((16, 23), np.nan, "float32"))
    np.testing.assert_array_equal(out, np.pad(2 * x, ((0, 0), (1, 1))))


def test_copies_of_16_bytes(rng):
    a, keep = words(rng, 5, 256), rng.integers(0, 2, (5, 64), dtype="int32")
    out = run(emulator.build(reversed_blocks(5), "sm_80").copy, a, keep, np.zeros_like(a))
    np.testing.assert_array_equal(
        out.reshape(5, 64, 4), (a.reshape(5, 64, 4) * keep[..., None].astype("uint32"))[:, ::-1]
    )


def test_packing(rng):
    x = rng.standard_normal(256).astype("float32")
    out = run(emulator.build(packing(256), "sm_80").pack, x, np.zeros(8, "uint32"))
    np.testing.assert_array_equal(out, np.packbits(x >= 0, bitorder="little").view("uint32"))


def test_sums(rng):
    x = rng.integers(-100, 100, (6, 300)).astype("float32")  # exact in any order
    np.testing.assert_array_equal(run(emulator.build(sums(6, 300), "sm_80").sums, x, np.zeros(6, "float32")), x.sum(1))


def test_warp_collectives(rng):
    body = """
  unsigned v = a[tx % 32], m = 0xffffffffu, r = 0;
  switch (a[32] + tx / 32) {  // another collective in each warp
    case 0: r = __shfl_sync(m, v, tx + 5, 8); break;
    case 1: r = __shfl_up_sync(m, v, 3, 16); break;
    case 2: r = __shfl_down_sync(m, v, 3, 16); break;
    case 3: r = __shfl_xor_sync(m, v, 9); break;
    case 4: r = __any_sync(m, v > a[33]) * 2 + __all_sync(m, v > a[33]); break;
    case 5: r = __reduce_add_sync(m, v); break;
    case 6: r = __reduce_or_sync(m, v & 0xff00ff00u); break;
    case 7: r = tx % 2 ? __ballot_sync(0xaaaaaaaau, v > a[33]) : __ballot_sync(0x55555555u, v > a[33]); break;
  }
  b[tx] = r;"""
    module = emulator.build(device_code(body), "sm_80")
    a, lane = words(rng, 64), np.arange(32)
    a[33] = a[:32].min()  # exceeded by some, not by all
    v, limit = a[:32], a[33]
    votes = np.packbits(v > limit, bitorder="little").view("uint32")[0]
    expected = [
        v[lane // 8 * 8 + (lane + 5) % 8],
        np.where(lane % 16 >= 3, np.roll(v, 3), v),
        np.where(lane % 16 < 13, np.roll(v, -3), v),
        v[lane ^ 9],
        np.full(32, 2),
        np.full(32, v.sum(dtype="uint32")),
        np.full(32, np.bitwise_or.reduce(v & 0xFF00FF00)),
        np.where(lane % 2, votes & 0xAAAAAAAA, votes & 0x55555555),
    ]
    for case in range(0, 8, 2):
        a[32] = case
        np.testing.assert_array_equal(
            run(module.kernel, a, np.zeros(64, "uint32")), np.concatenate(expected[case : case + 2])
        )


def test_ldmatrix_transposes(rng):
    body = """
  __shared__ alignas(16) unsigned short s[2][8][8];
  for (int i = 0; i < 4; i++) s[tx / 16][tx / 2 % 8][tx % 2 * 4 + i] = a[tx * 2 + i / 2] >> i % 2 * 16;
  __syncwarp();
  unsigned r0, r1, p = __cvta_generic_to_shared(&s[tx / 8 % 2][tx % 8][0]);
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r0), "=r"(r1) : "r"(p));
  b[tx] = r0;
  b[32 + tx] = r1;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared::cta.b16 {%0}, [%1];\\n" : "=r"(r0) : "r"(p));
  if (r0 != a[tx]) b[tx] = 0;"""
    a = words(rng, 64)
    out = run(emulator.build(device_code(body, threads=32), "sm_75").kernel, a, np.zeros(64, "uint32"))
    np.testing.assert_array_equal(
        out.view("uint16").reshape(2, 8, 8), a.view("uint16").reshape(2, 8, 8).transpose(0, 2, 1)
    )


# ---- and mistakes are found


def found(sources: list[str], arch: str, call, monkeypatch) -> list[tuple[str, ...]]:
    """For each source, the orders of threads in which its kernel fails or computes something else."""
    emulator.once()
    with ThreadPoolExecutor(2) as pool:
        modules = list(pool.map(lambda source: emulator.load(source, arch), sources))
    orders: list[tuple[str, ...]] = [() for _ in sources]
    for order in ORDERS:
        monkeypatch.setenv("CUDA_EMULATOR_ORDER", order)
        for i, module in enumerate(modules):
            try:
                wrong = not np.array_equal(*call(module))
            except RuntimeError:
                wrong = True
            orders[i] += (order,) * wrong
    return orders


def without(source: str, text: str) -> list[str]:
    """The sources with one occurrence of ``text`` taken out."""
    places = [m.start() for m in re.finditer(re.escape(text), source)]
    assert places, text
    return [source[:p] + ";" + source[p + len(text) :] for p in places]


def test_every_barrier_of_a_popc_gemm(rng, monkeypatch):
    source = emulator.cuda_source(popc_gemm(32, 64, 12), "sm_75")
    a, b = words(rng, 32, 12), words(rng, 64, 12)

    def call(module):
        return run(module.gemm, a, b, np.zeros((32, 64), "int32")), count_bits(a, b, np.bitwise_xor)

    mutants = without(source, "__syncthreads();")
    assert found([source, *mutants], "sm_75", call, monkeypatch) == [(), *[ORDERS] * len(mutants)]


def test_every_barrier_and_lane_of_a_tensor_core_gemm(rng, monkeypatch):
    source = emulator.cuda_source(tensor_core_gemm(16, 8, 16, "and"), "sm_80")
    a, b = words(rng, 16, 16), words(rng, 8, 16)

    def call(module):
        return run(module.gemm, a, b, np.zeros((16, 8), "int32")), count_bits(a, b, np.bitwise_and)

    lanes = source.replace("a_ptr[2], a_ptr[3], b", "a_ptr[3], a_ptr[2], b"), source.replace("d_ptr[1]);", "d_ptr[2]);")
    assert source not in lanes
    mutants = [*without(source, "__syncthreads();"), *lanes]
    assert found([source, *mutants], "sm_80", call, monkeypatch) == [(), *[ORDERS] * len(mutants)]


def test_every_wait_of_a_pipelined_copy(rng, monkeypatch):
    source = emulator.cuda_source(reversed_blocks(4), "sm_80")
    a, keep = words(rng, 4, 256), np.ones((4, 64), "int32")

    def call(module):
        return run(module.copy, a, keep, np.zeros_like(a)), a.reshape(4, 64, 4)[:, ::-1].reshape(4, 256)

    late = source.replace("cp.async.wait_group 1", "cp.async.wait_group 2")
    assert late != source
    mutants = [late]
    for text in ("__syncthreads();", "cp.async.wait_group 1;", "cp.async.commit_group;"):
        mutants += without(source, text)
    assert found([source, *mutants], "sm_80", call, monkeypatch) == [(), *[ORDERS] * len(mutants)]


MISTAKES = {
    "divergent barriers": "if (tx < 32) __syncthreads();\nelse __syncthreads();",
    "1 threads returned before the __syncthreads": "if (tx == 3) return; __syncthreads();",
    "lanes of a warp in different collectives": "b[tx] = tx % 2 ? __shfl_sync(~0u, tx, 0) : __ballot_sync(~0u, tx);",
    "deadlock: 31 threads wait at the __ballot_sync of line .*; 33 threads wait at the __syncthreads of line": (
        "if (tx > 30) __syncthreads(); else b[tx] = __ballot_sync(~0u, tx); __syncthreads();"
    ),
    "mask 0x00000001 of __syncwarp does not name the calling lane": "__syncwarp(1);",
    "reads 4 bytes at byte 256 of shared array s, which has 256": "s[tx] = 1; __syncthreads(); b[tx] = s[tx + 1];",
    "writes 4 bytes at byte 256 of shared array s": "s[tx + 1] = 1;",
    "reads 4 bytes at byte 256 of tensor argument 0": "if (tx == 63) b[tx] = a[tx + 1];",
    "writes 4 bytes at 4 bytes before tensor argument 1": "b[tx - 1] = 0;",
    "(reads|writes) byte .* of shared array s, which thread .* (wrote|read) with no barrier since": (
        "s[tx] = tx; b[tx] = s[tx ^ 1];"
    ),
    "writes byte 0 of shared array s, which other threads read with no barrier since": (
        "s[tx] = tx; __syncthreads(); if (tx < 32) { b[tx] = s[0]; __ballot_sync(~0u, 1); if (tx == 9) s[0] = 9; }"
    ),
    "writes byte 0 of shared array s, which thread .* wrote with no barrier": "s[0] = tx;",
    "reads byte .* of shared array s, which thread .* wrote with no barrier since": (  # only some of the lanes write
        "unsigned r; if (tx % 32 < 8) for (int i = 0; i < 4; i++) s[tx % 32 * 4 + i + tx / 32 * 32] = i; "
        'asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : '
        '"r"(__cvta_generic_to_shared(s + tx % 8 * 4 + tx / 32 * 32)));'
    ),
    "the address of a 'struct uint4' is not 16-aligned": "*(uint4*)(s + tx % 8) = make_uint4(0, 0, 0, 0);",
    "cp.async of 16 bytes to a shared address that is not 16-aligned": 'COPY("16", s + tx % 16, a);',
    "cp.async of 8 bytes from an address that is not 8-aligned": 'COPY("8", s + tx % 16 * 2, a + 1);',
    "cp.async reads 8 bytes at byte 256 of tensor argument 0": 'if (tx == 32) COPY("8", s, a + tx * 2);',
    "while a cp.async of thread .* is in flight: a commit or wait is missing": (
        'COPY("4", s + tx, a + tx); asm volatile("cp.async.wait_group 0;"); __syncthreads(); b[tx] = s[tx];'
    ),
    "the row address of lane 1 is not 16-aligned": (
        'unsigned r; asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : '
        '"r"((unsigned)__cvta_generic_to_shared(s + tx % 32 * 2)));'
    ),
    "shared address of a pointer that is not to shared memory": "b[tx] = __cvta_generic_to_shared(a);",
}


@pytest.fixture(scope="module")
def mistakes():
    body = "__shared__ alignas(16) unsigned s[64];\nswitch (a[0]) {\n"
    copy = r'asm volatile("cp.async.ca.shared.global [%0], [%1], \1;" :: "r"(__cvta_generic_to_shared(\2)), "l"(\3))'
    for case, code in enumerate(MISTAKES.values()):
        body += f"case {case}: {{ " + re.sub(r'COPY\("(\d+)", (.*?), (.*?)\)', copy, code) + " break; }\n"
    return emulator.build(device_code(body + "default: s[0] = 7; __syncthreads(); b[tx] = s[0];\n}"), "sm_80")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message, order, mistakes, monkeypatch):
    monkeypatch.setenv("CUDA_EMULATOR_ORDER", order)
    a = np.full(64, list(MISTAKES).index(message), "uint32")
    with pytest.raises(RuntimeError, match=message):
        run(mistakes.kernel, a, np.zeros(64, "uint32"))
    a[0] = len(MISTAKES)
    assert run(mistakes.kernel, a, np.zeros(64, "uint32"))[63] == 7  # one failure spoils no later call


def test_one_value_may_be_written_twice(mistakes):
    out = run(mistakes.kernel, np.full(64, len(MISTAKES), "uint32"), np.zeros(64, "uint32"))
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("body", "arch", "message"),
    [
        (
            'asm volatile("wgmma.fence.sync.aligned;");',
            "sm_90",
            "PTX instruction wgmma.fence.sync.aligned is not emulated",
        ),
        ('asm volatile("cp.async.wait_all;");', "sm_75", "cp.async.wait_all needs sm_80, not sm_75"),
        ("b[tx] = __reduce_add_sync(~0u, tx);", "sm_75", "__reduce_add_sync needs sm_80"),
        ("__shared__ cuda::barrier<cuda::thread_scope_block> s;", "sm_80", "declaration of shared memory that is not"),
        ("", "sm_70", "sm_70 is not emulated"),
    ],
)
def test_what_is_not_emulated_is_refused(body, arch, message):
    with pytest.raises(ValueError, match=message):
        emulator.build(device_code(body), arch)


def test_shared_memory_is_limited():
    arch, kib = "sm_75", 64

    @T.prim_func(s_tir=True)
    def kernel(B: T.Buffer((32,), "float32")):
        T.func_attr({"global_symbol": "kernel"})
        tx = T.env_thread("threadIdx.x")
        T.launch_thread(tx, 32)
        S = T.decl_buffer((kib * 256 + 1,), "float32", scope="shared.dyn")
        S[tx] = T.float32(1)
        S[kib * 256 - tx] = T.float32(1)
        B[tx] = S[kib * 256 - tx] + S[tx]

    with pytest.raises(RuntimeError, match=f"dynamic shared memory; this architecture has {kib * 1024}"):
        run(emulator.build(kernel, arch).kernel, np.zeros(32, "float32"))


def test_objects_link_into_one_library(rng, tmp_path):
    objects = []
    for name in ("one", "two"):
        kernels = {"pack": packing(64), "sums": sums(2, 200)["main"]}
        mod = tvm.IRModule({f"{k}_{name}": f.with_attr("global_symbol", f"{k}_{name}") for k, f in kernels.items()})
        source = emulator.cuda_source(mod, "sm_80")
        objects.append(emulator.emulate_source(source, tmp_path / f"{name}.o", shared=False))
    library = tmp_path / "both.so"
    tvm_ffi_folder = Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent
    subprocess.run(["g++", "-shared", "-o", library, *objects, f"-L{tvm_ffi_folder}", "-ltvm_ffi"], check=True)
    module = tvm_ffi.load_module(str(library))
    x = rng.integers(-9, 9, (2, 200)).astype("float32")
    bits = np.packbits(x[0, :64] >= 0, bitorder="little").view("uint32")
    for name in ("one", "two"):
        np.testing.assert_array_equal(run(module[f"sums_{name}"], x, np.zeros(2, "float32")), x.sum(1))
        np.testing.assert_array_equal(run(module[f"pack_{name}"], x[0, :64].copy(), np.zeros(2, "uint32")), bits)
