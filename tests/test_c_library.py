"""C libraries and C source, run by an app in C: equal to ONNX Runtime wherever arithmetic is exact.

Workspaces are full of NaN before every call, tensors lie anywhere, and what is around all of them must stay.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import c_apps
import machines
import numpy as np
import onnx
import pytest
import torch
from c_apps import EMITS
from networks import compiled as by_vm
from networks import dyadic, randomise
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import targets
from pipeline import artifact, c_names, models, toolchain
from pipeline.artifact import Emit
from pipeline.data import to_float
from pipeline.export import export
from pipeline.layers import QuantConv2d, QuantLinear
from pipeline.models import Quantize
from pipeline.stacked import StackedConv2d
from tvm_ops import schedule_cpu

BOTH = pytest.mark.parametrize("emit", EMITS)
TOLERANCE = 1e-5  # of the largest output, where real numbers are summed
BOARDS = ("cortex-a53", "cortex-a72", "cortex-a7")

# Networks ----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two blocks with shortcuts, the second of which strides."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        a, b = (int(n) for n in rng.choice([31, 33, 64], 2))
        self.first = nn.Sequential(nn.BatchNorm2d(a), QuantConv2d(a, a, 3, 1, 1, group=16), nn.BatchNorm2d(a))
        self.second = nn.Sequential(QuantConv2d(a, b, 3, 2, (1, 0, 1, 2), group=16), nn.BatchNorm2d(b))
        self.shortcut = QuantConv2d(a, b, 1, 2)
        self.shape = (a, 8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) + x
        return self.second(x) + self.shortcut(x)


def convolutions(rng: np.random.Generator, weight: str, activation: str, group: int = 1, **options: Any) -> nn.Module:
    """Norms of any sign, odd channels, strides, asymmetric pads, 1x1 kernels, pooling, a dense layer."""
    channels, hidden = int(rng.choice([3, 31, 33])), int(rng.choice([31, 40, 64]))
    kernel, stride = int(rng.choice([1, 3])), int(rng.integers(1, 3))
    pads: Any = tuple(int(p) for p in rng.integers(0, 3, 4))
    kind: Any = {"weight": weight, "activation": activation, "group": group, **options}
    layers = [
        nn.BatchNorm2d(channels),
        QuantConv2d(channels, hidden, kernel, stride, pads, bias=True, **kind),
        nn.BatchNorm2d(hidden),
        nn.MaxPool2d(2),
        nn.ReLU(),
        QuantConv2d(hidden, 24, 1, **kind),
        nn.BatchNorm2d(24),
        nn.Flatten(),
    ]
    features = nn.Sequential(*layers).eval()(torch.zeros(1, channels, 8, 6)).shape[1]
    model = nn.Sequential(*layers, QuantLinear(features, 10, **kind))
    model.shape = (channels, 8, 6)  # type: ignore[assignment]
    return model


def stacked(rng: np.random.Generator) -> nn.Module:
    d, segments = int(rng.choice([32, 40])), 2
    layer = StackedConv2d(segments * d, 31, 3, 2, 1, segments=segments, bank=int(rng.choice([2, 16])))
    model = nn.Sequential(nn.BatchNorm2d(segments * d), layer, nn.BatchNorm2d(31), QuantConv2d(31, 8, 1))
    model.shape = (segments * d, 7, 6)  # type: ignore[assignment]
    return model


def from_pixels(rng: np.random.Generator) -> nn.Module:
    """Filters of the first layer that make vectors of products of bytes, or do not."""
    quantize, first = Quantize(group=4, first=True, last=True), int(rng.choice([27, 32]))
    model = models.build("vgg_small", (3, 8, 8), 10, quantize, widths=(first, 33, 64), pool_after=(0, 2))
    model.shape = (3, 8, 8)  # type: ignore[assignment]
    return model


BITS = {"weight_options": {"bits": 2}, "activation_options": {"bits": 2}}
METHODS: dict[str, Callable[[np.random.Generator], nn.Module]] = {
    "binary": lambda rng: convolutions(rng, "bwn", "xnor"),
    "binary, 16 filters a scale": lambda rng: convolutions(rng, "bwn", "xnor", 16),
    "ternary": lambda rng: convolutions(rng, "twn", "tbn"),
    "ternary weights of two scales": lambda rng: convolutions(rng, "ttq", "xnor"),
    "k bits": lambda rng: convolutions(rng, "dorefa", "dorefa", **BITS),
    "weights only": lambda rng: convolutions(rng, "bwn", "real", 4),
    "residual": Residual,
    "stacked": stacked,
    "8-bit image": from_pixels,
}
REAL = ("weights only", "8-bit image")
ONE_BIT = ("binary", "binary, 16 filters a scale", "residual", "stacked")


def images(model: nn.Module, rng: np.random.Generator, batch: int = 1) -> np.ndarray:
    shape = (batch, *model.shape)  # type: ignore[misc]
    if shape[1:] == (3, 8, 8):
        return to_float(torch.from_numpy(rng.integers(0, 256, shape).astype(np.uint8))).numpy()
    return dyadic(rng, shape)


def assert_equal(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 0) -> None:
    assert set(got) == set(expected)
    for name, values in expected.items():
        if not tolerance:
            np.testing.assert_array_equal(got[name], values, err_msg=name)
            continue
        np.testing.assert_allclose(got[name], values, rtol=0, atol=tolerance * np.abs(values).max(), err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """C99 without a warning, ONNX Runtime's values."""
    model = randomise(METHODS[method](rng), rng)
    print(model)
    batch = int(rng.choice([1, 3]))
    inputs = [{"x": images(model, rng, batch)} for _ in range(2)]
    path = tmp_path / "model.onnx"
    export(model, model.shape, path)  # type: ignore[arg-type]
    expected = [c_apps.by_runtime(path, one) for one in inputs]
    assert all(np.isfinite(e["y"]).all() for e in expected) and expected[0]["y"].std() > 0
    tolerance = TOLERANCE if method in REAL else 0
    if method in REAL:
        (vm,) = by_vm(path, [inputs[0]["x"]])
        assert_equal({"y": vm}, expected[0], tolerance)
    for emit in EMITS:
        folder = c_apps.compiled(path, tmp_path, emit, batch=batch)
        app = c_apps.build(folder)
        for got, value in zip(app.run(inputs, shift=int(rng.integers(16))), expected, strict=True):
            assert_equal(got, value, tolerance)
        record = artifact.read(folder).c_library
        assert record is not None and record.workspace_bytes <= 1.1 * max(record.workspace_bound, 64)
        if emit == "c-lib" and method in ONE_BIT:  # the code of one product a pair of planes is long
            for library in (folder / "libnet.so", folder / "libnet.a"):
                assert library.stat().st_size <= 1.05 * record.constant_bytes + 65536, (library, record)


# Graphs that are no networks -----------------------------------------------------------------------------------------


def graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int]],
    outputs: dict[str, list[int]],
    constants: dict[str, np.ndarray] | None = None,
) -> Path:
    def specs(shapes: dict[str, list[int]]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    stored = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    made = helper.make_graph(nodes, "g", specs(inputs), specs(outputs), stored)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def drawn(path: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Dyadic inputs of a file."""
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in onnx.load(path).graph.input}
    return {name: dyadic(rng, tuple(shape)) for name, shape in shapes.items()}


@BOTH
def test_outputs_that_are_inputs_constants_or_each_other(emit: Emit, rng: np.random.Generator, tmp_path: Path) -> None:
    node = helper.make_node
    shape, flat = [1, 3, 5, 4], [1, 60]
    nodes = [
        node("Identity", ["x"], ["same"]),
        node("Identity", ["k"], ["constant"]),
        node("Add", ["x", "z"], ["sum"]),
        node("Identity", ["sum"], ["twice"]),
        node("Flatten", ["sum"], ["flat"]),
        node("Flatten", ["z"], ["flat_input"]),
        node("Relu", ["flat"], ["positive"]),
        node("Mul", ["positive", "positive"], ["square"]),
    ]
    outputs = dict.fromkeys(("same", "sum", "twice"), shape) | {"constant": [1, 7]}
    outputs |= dict.fromkeys(("flat", "flat_input", "positive", "square"), flat)
    constant = rng.normal(0, 1, (1, 7)).astype(np.float32)
    constant[0, :4] = -0.0, np.inf, 1e-45, np.finfo(np.float32).max
    path = graph(tmp_path / "m.onnx", nodes, {"x": shape, "unused": [1, 2], "z": shape}, outputs, {"k": constant})
    inputs = [drawn(path, rng) for _ in range(3)]
    app = c_apps.build(c_apps.compiled(path, tmp_path, emit))
    for got, one in zip(app.run(inputs, shift=5), inputs, strict=True):
        assert_equal(got, c_apps.by_runtime(path, one))
        assert np.signbit(got["constant"][0, 0])


@BOTH
def test_an_input_that_is_an_output(emit: Emit, rng: np.random.Generator, tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    path = graph(tmp_path / "m.onnx", nodes, {"x": [1, 9]}, {"x": [1, 9], "y": [1, 9]})
    one = drawn(path, rng)
    folder = c_apps.compiled(path, tmp_path, emit)
    assert c_apps.ids(folder) == (["X"], ["X_2", "Y"])
    (got,) = c_apps.build(folder).run([one])
    assert_equal(got, {"x": one["x"], "y": np.maximum(one["x"], 0)})


@BOTH
def test_no_kernel_and_no_constant(emit: Emit, rng: np.random.Generator, tmp_path: Path) -> None:
    path = graph(tmp_path / "m.onnx", [helper.make_node("Identity", ["x"], ["y"])], {"x": [1, 9]}, {"y": [1, 9]})
    one = drawn(path, rng)
    (got,) = c_apps.build(c_apps.compiled(path, tmp_path, emit)).run([one], shift=3)
    assert_equal(got, {"y": one["x"]})


@BOTH
def test_functions_of_real_numbers(emit: Emit, rng: np.random.Generator, tmp_path: Path) -> None:
    node, shape = helper.make_node, [1, 5, 6, 4]
    nodes = [
        node("Sigmoid", ["x"], ["a"]),
        node("Tanh", ["x"], ["b"]),
        node("Abs", ["x"], ["c"]),
        node("Div", ["b", "c1"], ["d"]),
        node("Concat", ["a", "d"], ["e"], axis=1),
        node("AveragePool", ["e"], ["f"], kernel_shape=[3, 3], pads=[1, 0, 1, 2], count_include_pad=1),
        node("MaxPool", ["e"], ["g"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 1]),
        node("GlobalAveragePool", ["g"], ["h"]),
        node("Flatten", ["h"], ["i"]),
        node("Softmax", ["i"], ["j"], axis=1),
    ]
    outputs = {"c": shape, "f": [1, 10, 6, 4], "g": [1, 10, 3, 4], "j": [1, 10]}
    constant = np.array([3], np.float32).reshape(1, 1, 1, 1)
    path = graph(tmp_path / "m.onnx", nodes, {"x": shape}, outputs, {"c1": constant})
    one = drawn(path, rng)
    (got,) = c_apps.build(c_apps.compiled(path, tmp_path, emit)).run([one])
    assert_equal(got, c_apps.by_runtime(path, one), TOLERANCE)


# Names -------------------------------------------------------------------------------------------------------------

NASTY = [
    *(
        "x",
        "X",
        "x_2",
        "X_",
        "int",
        "class",
        "static_assert",
        "nullptr",
        "and",
        "a",
        "A",
        "memory",
        "pool",
        "workspace",
    ),
    *("interface_id", "workspace_bytes", "constant0", "constant1", "memcpy", "share", "apart", "inputs", "supported"),
    *("linux", "unix", "NULL", "NAN", "INT32_MAX", "I", "size_t", "uint32_t", "crossbit_pool", "CROSSBIT_OK", "bool"),
    *(
        "net_run_with",
        "net_model",
        "NET_WORKSPACE",
        "1st",
        "_",
        "__x",
        "a b",
        "a.b",
        "a-b",
        "a/b",
        "a*/b",
        "a/*b",
        "//",
    ),
    *('quo"te', "back\\slash", "??/", "%s%n", "ümlaut", "\U0001f600", "Ω", "line\nbreak", "'", '"""', "{x}", "[[ x ]]"),
]


@BOTH
@pytest.mark.parametrize("part", range(4))
def test_tensors_of_any_name(part: int, emit: Emit, rng: np.random.Generator, tmp_path: Path) -> None:
    """Identifiers in C, the names as they are in the model's description."""
    names = NASTY[part::4]
    nodes = [helper.make_node("Mul", [name, "k"], [f"{name}/out"], name=name) for name in names]
    inputs = {name: [1, 1 + i % 5] for i, name in enumerate(names)}
    outputs = {f"{name}/out": shape for name, shape in inputs.items()}
    path = graph(tmp_path / "m.onnx", nodes, inputs, outputs, {"k": np.array([[0.5]], np.float32)})
    folder = c_apps.compiled(path, tmp_path, emit)
    one = drawn(path, rng)
    (got,) = c_apps.build(folder).run([one], shift=1)
    assert_equal(got, {f"{name}/out": value / 2 for name, value in one.items()})
    assert len({name.lower() for names in c_apps.ids(folder) for name in names}) == 2 * len(names)
    assert_warns_of_nothing(folder)
    assert described(folder) == [*inputs, *outputs]


def described(folder: Path) -> list[str]:
    """The names in ``net_model``, by a program that prints them."""
    source, program = folder.parent / "describe.c", folder.parent / "describe"
    source.write_text(
        '#include <stdio.h>\n#include "net.h"\nint main(void) {\n'
        '  for (int i = 0; i < net_model.inputs; i++) printf("%s%c", net_model.input[i].name, 0);\n'
        '  for (int i = 0; i < net_model.outputs; i++) printf("%s%c", net_model.output[i].name, 0);\n'
        "  return 0;\n}\n"
    )
    library = folder / "net.c" if (folder / "net.c").exists() else folder / "libnet.a"
    subprocess.run(["gcc", f"-I{folder}", str(source), str(library), "-o", str(program), "-lm"], check=True)
    text = subprocess.run([str(program)], capture_output=True, check=True).stdout.decode()
    return text.split("\0")[:-1]


@pytest.mark.parametrize(
    "name", ["int", "class", "math", "String", "numpy", "crossbit", "m", "pthread", "test", "None"]
)
def test_names_that_something_else_has(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"^'{name}' cannot name a C library: a word or library of C, C.. or Python is"
    ):
        c_names.check_library(name)


@pytest.mark.parametrize("name", ["", "1a", "a-b", "a b", "é", "_a", "a\n", "a/b"])
def test_names_that_are_no_identifiers(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a C library: give --name with letters, digits and underscores"):
        c_names.check_library(name)
    assert c_names.check_library("x") == "x" and c_names.check_library("Net_2") == "Net_2"


@BOTH
@pytest.mark.parametrize("name", ["NULL", "linux", "x", "run", "workspace"])
def test_names_that_are_odd(name: str, emit: Emit, rng: np.random.Generator, tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    path = graph(tmp_path / "m.onnx", nodes, {"x": [1, 9]}, {"y": [1, 9]})
    one = drawn(path, rng)
    (got,) = c_apps.build(c_apps.compiled(path, tmp_path, emit, name=name)).run([one])
    assert_equal(got, c_apps.by_runtime(path, one))


# The shared small network: a float convolution, two binary ones, a float tail ---------------------------------------


@pytest.fixture(scope="session")
def libraries(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`small_model` as a C library and as C source, for this CPU."""
    folder = tmp_path_factory.mktemp("libraries")
    return {emit: c_apps.compiled(small_model, folder, emit) for emit in EMITS}


def assert_warns_of_nothing(folder: Path) -> None:
    """In C99, C11 and C++, by every compiler that is here."""
    for compiler in filter(shutil.which, ("gcc", "clang", "g++", "clang++")):
        standards = ("c++17", "c++98") if compiler.endswith("++") else ("c99", "c11", "gnu17")
        for standard in standards:
            strict = (f"-std={standard}", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{folder}")
            strict = tuple(flag for flag in strict if not (standard == "c++98" and flag == "-pedantic"))  # long long
            app = folder.parent / f"app.{'cc' if compiler.endswith('++') else 'c'}"
            app.write_text('#include "net.h"\n#include "net.h"\nint main() { return net_model.inputs < 0; }\n')
            if not compiler.endswith("++"):
                app.write_text(app.read_text().replace("main()", "main(void)"))
            done = subprocess.run([compiler, *strict, str(app)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, (compiler, standard, done.stderr)
            if (folder / "net.c").exists() and not compiler.endswith("++"):
                command = [compiler, *strict, "-Wundef", str(folder / "net.c")]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert done.returncode == 0, (compiler, standard, done.stderr)


@BOTH
def test_no_compiler_warns(emit: Emit, libraries: dict[str, Path]) -> None:
    assert_warns_of_nothing(libraries[emit])


@BOTH
def test_the_golden_pair(emit: Emit, libraries: dict[str, Path]) -> None:
    inputs, outputs = artifact.golden(libraries[emit])
    (got,) = c_apps.build(libraries[emit]).run([inputs])
    assert_equal(got, outputs, TOLERANCE)


def some_inputs(rng: np.random.Generator, count: int) -> list[dict[str, np.ndarray]]:
    return [{"x": rng.normal(0, 1, (1, 1, 8, 8)).astype(np.float32)} for _ in range(count)]


@pytest.mark.slow
def test_flags_change_no_bit(libraries: dict[str, Path], rng: np.random.Generator) -> None:
    """Contraction, vectors and other compilers: floats too are rounded where the program says."""
    inputs = some_inputs(rng, 8)
    reference = c_apps.build(libraries["c-source"], both=("-O0",), cc=("gcc",)).run(inputs)
    for i, (compiler, *flags) in enumerate(
        [
            ("gcc", "-O3", "-march=native", "-std=gnu11"),
            ("gcc", "-Os", "-std=gnu17", "-flto"),
            ("gcc", "-O2", "-march=x86-64-v3", "-std=gnu11", "-D__AVX512VPOPCNTDQ__"),
            ("clang", "-O3", "-march=native", "-std=gnu11"),
            ("clang", "-O2", "-std=c99"),
        ]
    ):
        if shutil.which(compiler):
            app = c_apps.build(libraries["c-source"], flags, both=(flags[0],), cc=(compiler,), name=f"flags{i}")
            for got, expected in zip(app.run(inputs), reference, strict=True):
                assert_equal(got, expected)


def test_fast_math_is_refused(libraries: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"-ffast-math changes results: compile net\.c without it"):
        c_apps.build(libraries["c-source"], ("-ffast-math",), name="fast")


@BOTH
def test_four_threads_at_a_time(emit: Emit, libraries: dict[str, Path], rng: np.random.Generator) -> None:
    """Each with a workspace of its own, the same call again and again."""
    inputs = some_inputs(rng, 4)
    app = c_apps.build(libraries[emit])
    together = app.run(inputs, repeats=200)
    for one, got in zip(inputs, together, strict=True):
        assert_equal(got, app.run([one])[0])


def test_the_shared_library(libraries: dict[str, Path], rng: np.random.Generator) -> None:
    folder, inputs = libraries["c-lib"], some_inputs(rng, 2)
    dynamic = c_apps.build(folder, link=(), name="dynamic").run(inputs)
    static = c_apps.build(folder, name="static").run(inputs)
    for got, expected in zip(dynamic, static, strict=True):
        assert_equal(got, expected)
    sys.path.insert(0, str(folder))
    try:
        from net import Network  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    assert_equal(Network().run(inputs[0]), static[0])


def test_names_in_python(rng: np.random.Generator, tmp_path: Path) -> None:
    names = NASTY[int(rng.integers(5)) :: 5]
    nodes = [helper.make_node("Relu", [name], [f"{name}/out"]) for name in names]
    inputs = {name: [1, 3] for name in names}
    path = graph(tmp_path / "m.onnx", nodes, inputs, {f"{name}/out": [1, 3] for name in names})
    folder = c_apps.compiled(path, tmp_path, "c-lib", name="odd")
    spec = importlib.util.spec_from_file_location("odd", folder / "odd.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    one = drawn(path, rng)
    assert_equal(module.Network().run(one), {f"{name}/out": np.maximum(value, 0) for name, value in one.items()})


def test_two_libraries_in_one_app(libraries: dict[str, Path], small_model: Path, tmp_path: Path) -> None:
    """Of the same network, so that everything but the name is the same."""
    other = c_apps.compiled(small_model, tmp_path, "c-source", name="other")
    third = c_apps.compiled(small_model, tmp_path, "c-lib", name="third")
    (tmp_path / "app.c").write_text(
        '#include "net.h"\n#include "other.h"\n#include "third.h"\n#include <stdlib.h>\nint main(void) {\n'
        "  static float x[64], y[3][10];\n  void *memory = 0;\n"
        "  if (posix_memalign(&memory, 64, NET_WORKSPACE_BYTES + OTHER_WORKSPACE_BYTES)) return 1;\n"
        "  for (int i = 0; i < 64; i++) x[i] = (float)(i % 7) - 3;\n"
        "  if (net_run(x, y[0], memory) || other_run(x, y[1], memory) || third_run(x, y[2], memory)) return 2;\n"
        "  for (int i = 0; i < 10; i++) if (y[0][i] != y[2][i] || !(y[0][i] - y[1][i] < 1e-3)) return 3;\n"
        "  return other_run_with(NET_INTERFACE, x, y[0], memory, NET_WORKSPACE_BYTES, 0) != CROSSBIT_INTERFACE;\n}\n"
    )
    net = libraries["c-lib"]
    include = [f"-I{folder}" for folder in (net, other, third)]
    sources = [tmp_path / "app.c", net / "libnet.a", third / "libthird.a", other / "other.c"]
    command = ["gcc", *include, *map(str, sources), "-o", str(tmp_path / "app"), "-lm"]
    subprocess.run(command, check=True)
    assert subprocess.run([str(tmp_path / "app")], check=False).returncode == 0


# Pools -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 4])
@BOTH
def test_shared_work_gives_the_same(
    emit: Emit, threads: int, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serial, with every number of workers, several callers of one pool: all equal, and equal to ONNX Runtime."""
    monkeypatch.setattr(schedule_cpu, "_MIN_PARALLEL_STEPS", 1)
    method = str(rng.choice([name for name in METHODS if name not in REAL]))
    model = randomise(METHODS[method](rng), rng)
    print(method, model)
    path = tmp_path / "model.onnx"
    export(model, model.shape, path)  # type: ignore[arg-type]
    inputs = [{"x": images(model, rng)} for _ in range(3)]
    folder = c_apps.compiled(path, tmp_path, emit, threads=threads)
    app = c_apps.build(folder)
    assert_warns_of_nothing(folder)
    for workers in range(threads + 1):
        for one, got in zip(inputs, app.run(inputs, workers=workers, repeats=10), strict=True):
            assert_equal(got, c_apps.by_runtime(path, one))
    assert app.pool_calls[0] == 0 and min(app.pool_calls[1:]) > 0


@BOTH
def test_workers_that_pool_a_stem_in_strips(emit: Emit, rng: np.random.Generator, tmp_path: Path) -> None:
    """With AVX-512, every worker has memory for a strip of its own."""
    stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    stem.weight.data = torch.from_numpy(dyadic(rng, tuple(stem.weight.shape)))
    path = tmp_path / "model.onnx"
    export(randomise(nn.Sequential(stem, nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(64)), rng), (3, 80, 72), path)
    inputs = [{"x": dyadic(rng, (1, 3, 80, 72))} for _ in range(2)]
    app = c_apps.build(c_apps.compiled(path, tmp_path, emit, threads=2))
    for workers in range(3):
        for one, got in zip(inputs, app.run(inputs, workers=workers), strict=True):
            assert_equal(got, c_apps.by_runtime(path, one))
    assert min(app.pool_calls[1:]) > 0


@BOTH
def test_real_numbers_in_parallel_are_those_of_one_thread(
    emit: Emit, small_model: Path, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule_cpu, "_MIN_PARALLEL_STEPS", 1)
    app, inputs = c_apps.build(c_apps.compiled(small_model, tmp_path, emit, threads=3)), some_inputs(rng, 3)
    serial = app.run(inputs)
    for got, expected in zip(app.run(inputs, workers=3, repeats=10), serial, strict=True):
        assert_equal(got, expected)
    assert app.pool_calls[0] == 0 < app.pool_calls[1]


# Other machines ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("board", BOARDS)
def test_boards(board: str, emit: Emit, small_model: Path, rng: np.random.Generator, tmp_path: Path) -> None:
    """Emulated: integers bit for bit on a network of any method, floats of the golden pair nearly."""
    target = targets.load(board)
    machines.need(target)
    method = str(rng.choice([name for name in METHODS if name not in REAL]))
    model = randomise(METHODS[method](rng), rng)
    print(method, model)
    path = tmp_path / "model.onnx"
    export(model, model.shape, path)  # type: ignore[arg-type]
    inputs = [{"x": images(model, rng)} for _ in range(2)]
    app = c_apps.build(c_apps.compiled(path, tmp_path, emit, board))
    for one, got in zip(inputs, app.run(inputs, shift=1), strict=True):
        assert_equal(got, c_apps.by_runtime(path, one))
    folder = c_apps.compiled(small_model, tmp_path, emit, board, name="small")
    given, golden = artifact.golden(folder)
    app = c_apps.build(folder, both=("-O3",))
    assert_equal(app.run([given])[0], golden, TOLERANCE)


@pytest.mark.parametrize(
    "name", [n for n in targets.names() if targets.load(n).tvm_runtime and not targets.load(n).gpu]
)
def test_every_target_makes_a_library(name: str, small_model: Path, tmp_path: Path) -> None:
    target = targets.load(name)
    try:
        toolchain.find(target)
    except ValueError as error:
        pytest.skip(str(error))
    folder = c_apps.compiled(small_model, tmp_path, "c-lib", name)
    assert artifact.read(folder).machine == target.machine


# What is in the files ------------------------------------------------------------------------------------------------

_LIBC = {"memcpy", "memset", "memmove", "getauxval"}
_LIBM = {f"{f}f" for f in ("exp", "tanh", "sqrt", "log", "floor", "ceil", "round", "pow", "erf", "nearbyint", "fabs")}
_COMPILER = {
    "_GLOBAL_OFFSET_TABLE_",
    "__cpu_model",
    "__cpu_features2",
    "__cpu_indicator_init",
    "__aeabi_memcpy",
    "__aeabi_memset",
    "__aeabi_memclr",
}
_LOADER = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize", "__gmon_start__"}


@pytest.mark.parametrize("name", ["host", "cortex-a53", "cortex-a7"])
@BOTH
def test_symbols_and_sections(emit: Emit, name: str, small_model: Path, tmp_path: Path) -> None:
    """Nothing of TVM, no allocation, no writable data of ours; three names are visible."""
    target = targets.load(name)
    try:
        tools = toolchain.find(target)
    except ValueError as error:
        pytest.skip(str(error))
    folder = c_apps.compiled(small_model, tmp_path, emit, name)
    ours = {"net_run_with", "net_strerror", "net_model"}
    nm = ("nm" if target is targets.host() else f"{target.gnu_triple}-nm",)
    if emit == "c-source":
        part = tmp_path / "net.o"
        tools.run(*tools.cc, "-O3", "-c", str(folder / "net.c"), "-o", str(part))
        assert symbols(nm, part, defined=True) == ours
    else:
        part = folder / "libnet.a"
        assert {s for s in symbols(nm, part, defined=True) if not s.startswith("net_")} <= {
            "__truncsfhf2",
            "__extendhfsf2",
        }
        assert symbols((*nm, "-D"), folder / "libnet.so", defined=True) == ours
        assert symbols((*nm, "-D"), folder / "libnet.so", defined=False) <= _LIBC | _LIBM | _LOADER
    undefined = symbols(nm, part, defined=False)
    assert undefined <= _LIBC | _LIBM | _COMPILER, undefined
    sections = subprocess.run(["readelf", "-SW", str(part)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\] (\S+) +\w+ +[0-9a-f]+ [0-9a-f]+ ([0-9a-f]+) [0-9a-f]+ +([A-Za-z]*) ", sections)
    assert ".text" in {name for name, _, _ in found} and len(found) > 5
    writable = {
        name: int(size, 16) for name, size, flags in found if "W" in flags and not name.startswith(".data.rel.ro")
    }
    assert all(size == 0 for size in writable.values()), writable


def symbols(nm: tuple[str, ...], file: Path, defined: bool) -> set[str]:
    """Global names, without versions."""
    option = ("--defined-only", "--extern-only") if defined else ("--undefined-only",)
    text = subprocess.run([*nm, *option, str(file)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in text.splitlines() if len(line.split()) > 1}
