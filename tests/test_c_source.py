"""Everything that the printer of C can say, against LLVM's code of the same function."""

from __future__ import annotations

import ctypes
import itertools
import math
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import tvm
from hypothesis import example, given
from hypothesis import strategies as st
from tvm import te, tirx
from tvm.s_tir import Schedule

import targets
from pipeline import c_library, c_source, compiler, importer, kernel, program

C = {"kind": "c"}
COUNT = 64
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 1e-40, 0.1, -1.5, 2.5, 3.5, 3.4028235e38, -3.4028235e38]


def parts(function: Any, stack_limit: int = 2048) -> tuple[str, kernel.Kernel]:
    """A function in C, and what it became."""
    target = tvm.target.Target(C)
    made = kernel.make({"main": function}, "net", target, stack_limit)["main"]
    module = kernel.module(made.parts)
    return "\n".join(c_source.define(module[part.symbol]) for part in made.parts), made


def preamble(text: str) -> str:
    """What a library has before its kernels, from its template."""
    source = jinja2.PackageLoader("pipeline").get_source(jinja2.Environment(), "library.c.jinja")[0]
    template = c_library._TEMPLATES.from_string(source[: source.index("[[ constants ]]")])
    names = {"name": "net", "version": "0", "alignment": 64, "cpu": "", "scalar_types": c_library._SCALARS}
    manifest = type("Manifest", (), {"target": "any"})
    return template.render(names | {"kernels": text, "manifest": manifest}).replace(
        '#include "net.h"', "#include <stdint.h>"
    )


def compiled(text: str, folder: Path, *flags: str, entry: str = "") -> ctypes.CDLL:
    """The functions of ``text`` in a library."""
    source, library = folder / "net.c", folder / f"net{len(list(folder.iterdir()))}.so"
    source.write_text(preamble(text) + text + "\n" + entry)
    strict = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function")
    command = ["gcc", *(flags or ("-O2",)), *strict, "-shared", "-fPIC", str(source), "-o", str(library), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stderr, text)
    return ctypes.CDLL(str(library))


def run(function: Any, arrays: Sequence[np.ndarray], folder: Path, *flags: str, stack_limit: int = 2048) -> np.ndarray:
    """What the C of a function writes to the last of ``arrays``; temporaries are full of 0xff."""
    text, made = parts(function, stack_limit)
    assert all(part.extent is None for part in made.parts)
    (part,) = made.parts
    scratch = [np.full(t.size, 255, np.uint8) for t in made.temporaries]
    pointers = [a.ctypes.data for a in (*arrays, *scratch)]
    count = len(pointers)
    declared = ", ".join(f"void *p{i}" for i in range(count))
    given = ", ".join(f"p{i}" for i in range(count))
    entry = f"int run({declared});\nint run({declared}) {{ return {part.symbol}({given}); }}\n"
    library = compiled(text, folder, *flags, entry=entry)
    assert library.run(*map(ctypes.c_void_p, pointers)) == 0
    return arrays[-1]


def by_llvm(function: Any, arrays: Sequence[np.ndarray]) -> np.ndarray:
    tensors = [tvm.runtime.tensor(a) for a in arrays]
    tvm.compile(function.with_attr("global_symbol", "main"), target=targets.host().tvm_target(1))(*tensors)
    return tensors[-1].numpy()


def elementwise(compute: Callable[..., Any], *dtypes: str, count: int = COUNT) -> Any:
    inputs = [te.placeholder((count,), dtype, name=f"p{i}") for i, dtype in enumerate(dtypes)]
    return te.create_prim_func([*inputs, te.compute((count,), lambda i: compute(*(p[i] for p in inputs)), name="out")])


def vectorised(function: Any, lanes: int) -> Any:
    sch = Schedule(tvm.IRModule({"main": function}))
    (block,) = sch.get_child_blocks(sch.get_sblock("root"))
    *_, inner = sch.split(sch.get_loops(block)[-1], [None, lanes])
    sch.vectorize(inner)
    return sch.mod["main"]


def drawn(rng: np.random.Generator, dtype: str, count: int = COUNT) -> np.ndarray:
    """Any bits of an integer, with its bounds; floats with everything special."""
    if dtype.startswith("float"):
        values = rng.normal(0, 10, count).astype(dtype)
        return np.where(rng.random(count) < 0.5, rng.choice(SPECIAL, count).astype(dtype), values)
    if dtype == "bool":
        return rng.random(count) < 0.5
    info = np.iinfo(dtype)
    values = rng.integers(info.min, info.max, count, dtype=dtype, endpoint=True)
    return np.where(rng.random(count) < 0.3, rng.choice(np.array([info.min, info.max, 0, 1], dtype), count), values)


def assert_as_llvm(function: Any, arrays: Sequence[np.ndarray], out: str, folder: Path, exact: bool = True) -> None:
    first, second = np.zeros(COUNT, out), np.zeros(COUNT, out)
    got, expected = run(function, [*arrays, first], folder), by_llvm(function, [*arrays, second])
    if exact:  # signs of zeros too
        bits = f"uint{8 * got.itemsize}"
        same = (got.view(bits) == expected.view(bits)) | ((got != got) & (expected != expected))
        assert same.all(), (got[~same], expected[~same], [a[~same] for a in arrays])
    else:
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


# Literals ------------------------------------------------------------------------------------------------------------

INTEGERS = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]


def test_literals_come_back_to_the_bit(rng: np.random.Generator, tmp_path: Path) -> None:
    lines, expected = [], {}
    for dtype in ("float32", "float64"):
        words = rng.integers(0, 2**63, 500).astype(np.uint64)
        values = words.astype(np.uint32).view(np.float32) if dtype == "float32" else words.view(np.float64)
        tiny = np.finfo(dtype).smallest_subnormal
        special = np.array([*SPECIAL, tiny, -tiny, np.finfo(dtype).max, np.finfo(dtype).tiny], dtype)
        expected[dtype] = np.concatenate([values, special])
    for dtype in INTEGERS:
        info = np.iinfo(dtype)
        edges = np.array([info.min, info.min + 1 if info.min else 1, 0, 1, info.max - 1, info.max], dtype)
        expected[dtype] = np.concatenate([edges, rng.integers(info.min, info.max, 50, dtype=dtype)])
    expected["bool"] = np.array([True, False])
    for dtype, array in expected.items():
        values = ", ".join(c_source.literal(v, dtype) for v in array.tolist())
        lines.append(f"const {c_source.type_name(dtype)} v_{dtype}[] = {{{values}}};")
    library = compiled("\n".join(lines), tmp_path, "-Wno-overflow")
    for dtype, array in expected.items():
        address = ctypes.addressof(ctypes.c_char.in_dll(library, f"v_{dtype}"))
        got = np.frombuffer((ctypes.c_char * array.nbytes).from_address(address), array.dtype)
        nan = array != array
        np.testing.assert_array_equal(got != got, nan)
        assert got[~nan].tobytes() == array[~nan].tobytes(), dtype


@given(st.floats(width=32, allow_nan=False))
@example(-0.0)
@example(1e-45)
def test_hex_floats(value: float) -> None:
    text = c_source.literal(value, "float32")
    if math.isinf(value):
        assert text == ("INFINITY" if value > 0 else "(-INFINITY)")
    else:
        back = float.fromhex(text.strip("()").removesuffix("f"))
        assert struct.pack("f", back) == struct.pack("f", value)


# Operators -----------------------------------------------------------------------------------------------------------

ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "subtract, then shift right": lambda a, b: (a - b) >> 1,
    "multiply, then compare": lambda a, b: tirx.Select(a * b > b, a, b),
    "and or xor": lambda a, b: (a & b) | (a ^ b),
    "not, then shift right": lambda a, b: (~a) >> 2,
    "shift left": lambda a, b: (a << 3) + b,
    "smallest": lambda a, b: tirx.min(a, b),
    "largest": lambda a, b: tirx.max(a, b),
    "comparisons": lambda a, b: tirx.Select(tirx.any(a < b, tirx.all(a >= b, a != b)), b, a),
}


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("lanes", [1, 16])
def test_integers_wrap_as_llvms(dtype: str, lanes: int, rng: np.random.Generator, tmp_path: Path) -> None:
    """Unsigned and narrow types wrap; int32 and int64 may not overflow, in C as in TVM."""
    for compute in ARITHMETIC.values():
        a, b = drawn(rng, dtype), drawn(rng, dtype)
        if dtype in ("int32", "int64"):
            a, b = a >> (np.iinfo(dtype).bits // 2 + 1), b >> (np.iinfo(dtype).bits // 2 + 1)
        function = elementwise(compute, dtype, dtype)
        assert_as_llvm(vectorised(function, lanes) if lanes > 1 else function, [a, b], dtype, tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lanes", [1, 8])
def test_floats_and_what_is_not_a_number(dtype: str, lanes: int, rng: np.random.Generator, tmp_path: Path) -> None:
    """The smaller and the larger of a NaN or of two zeros are those of LLVM's code."""
    pairs = np.array(list(itertools.product(SPECIAL[:8], repeat=2)), dtype)
    for compute in (
        lambda a, b: tirx.min(a, b),
        lambda a, b: tirx.max(a, b),
        lambda a, b: tirx.max(tirx.const(0, dtype), a) - b,
        lambda a, b: a / b + a,
        lambda a, b: tirx.Select(a <= b, a, tirx.const(-np.inf, dtype)),
        lambda a, b: tirx.Select(tirx.Not(a < b), tirx.const(np.nan, dtype), b),
    ):
        function = elementwise(compute, dtype, dtype)
        function = vectorised(function, lanes) if lanes > 1 else function
        assert_as_llvm(function, [pairs[:, 0].copy(), pairs[:, 1].copy()], dtype, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["exp", "sqrt", "tanh", "log", "floor", "ceil", "round", "nearbyint", "trunc", "abs", "sigmoid", "erf", "cos"],
)
def test_functions(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    values = rng.normal(0, 3, COUNT).astype(np.float32)
    values[:8] = [0.5, 1.5, 2.5, -0.5, -1.5, 0, -0.0, 3.5]
    values = np.abs(values) if name in ("sqrt", "log") else values
    exact = name in ("sqrt", "floor", "ceil", "round", "nearbyint", "trunc", "abs")
    assert_as_llvm(elementwise(getattr(tirx, name), "float32"), [values], "float32", tmp_path, exact)


@pytest.mark.parametrize("to", [*INTEGERS, "bool", "float32", "float64"])
def test_conversions(to: str, rng: np.random.Generator, tmp_path: Path) -> None:
    for source in (*INTEGERS, "float32", "bool"):
        values = rng.integers(0, 100, COUNT).astype(source) if source == "float32" else drawn(rng, source)
        function = elementwise(lambda a: a.astype(to), source)
        assert_as_llvm(function, [values], to, tmp_path)


def test_bools(rng: np.random.Generator, tmp_path: Path) -> None:
    for compute in (lambda a, b: ~a, lambda a, b: tirx.Not(tirx.all(a, b)), lambda a, b: a | b):
        function = elementwise(compute, "bool", "bool")
        assert_as_llvm(function, [drawn(rng, "bool"), drawn(rng, "bool")], "bool", tmp_path)


@pytest.mark.parametrize("dtype", [d for d in INTEGERS if "64" not in d])
@pytest.mark.parametrize("flags", [("-O2",), ("-O3", "-march=x86-64-v3"), ("-O2", "-D__AVX512VPOPCNTDQ__")], ids=str)
def test_popcounts(dtype: str, flags: tuple[str, ...], rng: np.random.Generator, tmp_path: Path) -> None:
    """In shifts and adds, and as the compiler's builtin."""
    values = drawn(rng, dtype)
    function = elementwise(lambda a: tirx.popcount(a), dtype)
    bits = values.view(dtype.replace("uint", "int").replace("int", "uint"))
    got = run(function, [values, np.zeros(COUNT, dtype)], tmp_path, *flags)
    np.testing.assert_array_equal(got, np.bitwise_count(bits).astype(dtype))


@pytest.mark.parametrize("lanes", [2, 3, 4, 5, 7, 8, 16, 31, 32, 64])
def test_vectors_of_every_width(lanes: int, rng: np.random.Generator, tmp_path: Path) -> None:
    """A stride, a broadcast, a condition, a conversion in one; and lanes that read in other order."""
    count = 2 * lanes
    a = te.placeholder((2 * count,), "float32", name="a")
    b = te.placeholder((count,), "int32", name="b")
    out = te.compute(
        (count,), lambda i: tirx.Select(a[2 * i + 1] > a[0], a[count - 1 - i], b[i].astype("float32") * 0.5), name="out"
    )
    function = vectorised(te.create_prim_func([a, b, out]), lanes)
    values, integers = drawn(rng, "float32", 2 * count), rng.integers(-99, 99, count).astype(np.int32)
    got = run(function, [values, integers, np.zeros(count, np.float32)], tmp_path)
    with np.errstate(invalid="ignore"):
        chosen = values[1::2] > values[0]
    np.testing.assert_array_equal(got, np.where(chosen, values[count - 1 :: -1][:count], integers * np.float32(0.5)))
    assert "lane" in parts(function)[0]


def test_what_is_not_chosen_is_not_loaded(tmp_path: Path) -> None:
    """An index beyond the memory that is there, as padding has them: at the end of a page that cannot be read."""
    import mmap

    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for edge in (0, 2):
        assert libc.mprotect(ctypes.c_void_p(address + edge * page), page, 0) == 0
    size = page // 4
    a = te.placeholder((size,), "float32", name="a")

    def inside(i: Any, otherwise: float) -> Any:
        return tirx.if_then_else(tirx.all(i >= 64, i < size + 64), a[i - 64], tirx.const(otherwise, "float32"))

    out = te.compute((size + 128,), lambda i: inside(i, 1) * 2.0 + inside(i, 3), name="out")
    text, _ = parts(te.create_prim_func([a, out]))
    values = np.frombuffer((ctypes.c_char * page).from_address(address + page), np.float32)
    values[:] = np.arange(size)
    result = np.zeros(size + 128, np.float32)
    entry = "int run(float *a, float *b);\nint run(float *a, float *b) { return net_k0_main(a, b); }\n"
    for i, flags in enumerate((("-O0",), ("-O3", "-march=native"))):
        folder = tmp_path / str(i)
        folder.mkdir()
        library = compiled(text, folder, *flags, entry=entry)
        result[:] = 0
        assert library.run(ctypes.c_void_p(address + page), ctypes.c_void_p(result.ctypes.data)) == 0
        np.testing.assert_array_equal(result[64:-64], 3 * np.arange(size, dtype=np.float32))
        assert (result[:64] == 5).all() and (result[-64:] == 5).all()
    for edge in (0, 2):
        libc.mprotect(ctypes.c_void_p(address + edge * page), page, 3)


@pytest.mark.parametrize("stack_limit", [0, 10**6])
@pytest.mark.parametrize("count", [64, 1000])
def test_memory_that_serves_as_two_types(
    count: int, stack_limit: int, rng: np.random.Generator, tmp_path: Path
) -> None:
    """TVM gives floats and integers that do not meet one array: large integers must not become floats in between."""
    last = count - 1
    a = te.placeholder((count,), "int32", name="a")
    b = te.compute((count,), lambda i: a[i].astype("float32") * 0.5, name="b")
    c = te.compute((count,), lambda i: b[last - i] + 1.0, name="c")
    d = te.compute((count,), lambda i: a[last - i] + 3 * c[last - i].astype("int32"), name="d")
    e = te.compute((count,), lambda i: d[last - i] - 1, name="e")
    function = te.create_prim_func([a, e])
    values = rng.integers(2**24, 2**26, count).astype(np.int32)
    for flags in (("-O0",), ("-O3", "-fstrict-aliasing", "-march=native")):
        got = run(function, [values, np.zeros(count, np.int32)], tmp_path, *flags, stack_limit=stack_limit)
        np.testing.assert_array_equal(got, by_llvm(function, [values, np.zeros(count, np.int32)]))
    text, made = parts(function, stack_limit)
    assert made.temporaries and "(int32_t *)" in text


def test_parts_of_a_parallel_kernel(rng: np.random.Generator, tmp_path: Path) -> None:
    """Each called on ranges in any order, by workers with memory of their own."""
    a = te.placeholder((32, 100), "float32", name="a")
    b = te.compute((32, 100), lambda i, j: a[i, 99 - j] * 2.0, name="b")
    c = te.compute((32, 100), lambda i, j: b[31 - i, 99 - j] + 1.0, name="c")
    sch = Schedule(tvm.IRModule({"main": te.create_prim_func([a, c])}))
    for name in ("b", "c"):
        sch.parallel(sch.get_loops(sch.get_sblock(name))[0])
    text, made = parts(sch.mod["main"])
    assert [part.extent for part in made.parts] == [32, 32] and [t.each_worker for t in made.temporaries] == [False]
    entry = "".join(
        f"void run{i}(float *a, float *c, float *b, int32_t begin, int32_t end);\n"
        f"void run{i}(float *a, float *c, float *b, int32_t begin, int32_t end)"
        f" {{ {part.symbol}(a, c, b, begin, end, 0); }}\n"
        for i, part in enumerate(made.parts)
    )
    library = compiled(text, tmp_path, entry=entry)
    values = rng.normal(0, 1, (32, 100)).astype(np.float32)
    result, scratch = np.zeros_like(values), np.full_like(values, np.nan)
    for i in range(2):
        cuts = [0, *sorted(rng.integers(0, 33, 4).tolist()), 32]
        for begin, end in rng.permutation(list(itertools.pairwise(cuts))):
            pointers = (ctypes.c_void_p(x.ctypes.data) for x in (values, result, scratch))
            getattr(library, f"run{i}")(*pointers, int(begin), int(end))
    np.testing.assert_array_equal(result, values[::-1] * 2 + 1)


# What C has no word for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "dtype", "words"),
    [
        (lambda a: a.astype("float16").astype("float32"), "float32", "float16 is no type of C99"),
        (lambda a: a, "float16", "float16 is no type of C99"),
        (lambda a: tirx.call_llvm_pure_intrin("int32", "llvm.ctpop", a), "int32", "the intrinsic llvm.ctpop"),
        (lambda a: tirx.call_pure_extern("float32", "TVMBackendThing", a), "float32", "TVMBackendThing"),
        (lambda a: tirx.reinterpret("int32", a), "float32", "tirx.reinterpret"),
        (lambda a: tirx.popcount(a), "uint64", "tirx.popcount"),
        (lambda a: tirx.clz(a), "int32", "clz"),
    ],
)
def test_what_c_has_no_word_for(compute: Callable[..., Any], dtype: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parts(elementwise(compute, dtype))
    assert str(caught.value).endswith("compile with --emit c-lib") and "\n" not in str(caught.value)


def test_the_adder_network_is_one_cpus(small_model: Path) -> None:
    """Kernels that count as x86 does, from tuning records for instance."""
    lowered = compiler.lower(importer.load(small_model, 1, targets.load("x86-avx2")))
    scheduled, _, _ = compiler.scheduled(lowered, targets.load("x86-avx2"), 1)
    made = program.make(scheduled, ("y",), "net", tvm.target.Target(C), 1, 2048)
    module = kernel.module(made.parts)
    with pytest.raises(
        ValueError,
        match=r"^(the intrinsic llvm\.x86\.\S+|tirx\.reinterpret) cannot be written in C99: compile with --emit c-l",
    ):
        list(map(c_source.define, (module[part.symbol] for part in made.parts)))
