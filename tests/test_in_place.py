"""Kernels that write a map over one that they read: which may, and that nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import c_apps
import machines
import numpy as np
import pytest
import tvm
from networks import dyadic, randomise
from torch import nn
from tvm import relax, te, tirx

import targets
from pipeline import compiler, importer, in_place, models, session
from pipeline.export import export
from pipeline.models.resnet18 import Block

LENGTH = 8


def add(p: Any, q: Any) -> Any:
    return te.compute(p.shape, lambda i: p[i] + q[i], name="add")


def add_reversed(p: Any, q: Any) -> Any:
    return te.compute(p.shape, lambda i: p[LENGTH - 1 - i] + q[i], name="add_reversed")


def add_next(p: Any, q: Any) -> Any:
    return te.compute(p.shape, lambda i: p[i] + p[tirx.min(i + 1, LENGTH - 1)] + q[i], name="add_next")


def add_twice(p: Any, q: Any) -> list[Any]:
    total = te.compute(p.shape, lambda i: p[i] + q[i], name="total")
    return [te.compute(p.shape, lambda i: total[i] * tirx.const(2, "uint32"), name="twice"), total]


def add_sum(p: Any, q: Any) -> Any:
    k = te.reduce_axis((0, LENGTH), "k")
    return te.compute(p.shape, lambda i: te.sum(p[k] + q[i], axis=k), name="add_sum")


def add_to_bytes(p: Any, q: Any) -> Any:
    return te.compute(p.shape, lambda i: (p[i] + q[i]).astype("uint8").astype("uint32"), name="add_to_bytes")


KERNELS = {
    add: lambda p, q: [p + q],
    add_reversed: lambda p, q: [p[::-1] + q],
    add_next: lambda p, q: [p + np.append(p[1:], p[-1]) + q],
    add_twice: lambda p, q: [2 * (p + q), p + q],
    add_sum: lambda p, q: [p.sum(dtype=np.uint32) + np.uint32(LENGTH) * q],
    add_to_bytes: lambda p, q: [(p + q) & np.uint32(255)],
}


def in_place_calls(mod: tvm.IRModule) -> list[tuple[str, list[int]]]:
    """Name and `inplace_indices` of a module's kernels in place, in their order."""
    found = [binding.value for block in mod["main"].body.blocks for binding in block.bindings]
    found = [v for v in found if isinstance(v, tvm.ir.Call) and v.op == tvm.ir.Op.get("relax.call_tir_inplace")]
    return [(call.args[0].name_hint, [int(i) for i in call.attrs.inplace_indices]) for call in found]


def run(mod: tvm.IRModule, *inputs: np.ndarray) -> list[np.ndarray]:
    executable = relax.build(mod, targets.host().tvm_target(1))
    result = relax.VirtualMachine(executable, tvm.cpu())["main"](*map(tvm.runtime.tensor, inputs))
    return [r.numpy() for r in ([result] if isinstance(result, tvm.runtime.Tensor) else result)]


def straight_line(rng: np.random.Generator, steps: int) -> tuple[tvm.IRModule, np.ndarray, list[np.ndarray]]:
    """Random kernels on random maps of late: a module, its input, and what it returns, one map by another shape."""
    x = rng.integers(0, 1 << 32, LENGTH, np.uint32)
    builder = relax.BlockBuilder()
    parameter = relax.Var("x", relax.TensorType(x.shape, "uint32"))
    known: list[tuple[Any, np.ndarray]] = [(parameter, x), (relax.const(x[::-1].copy()), x[::-1])]
    with builder.function("main", [parameter]):
        with builder.dataflow():
            for kernel in rng.choice(np.array(list(KERNELS)), steps):
                (p, p_values), (q, q_values) = (known[i] for i in rng.integers(max(0, len(known) - 3), len(known), 2))
                values = KERNELS[kernel](p_values, q_values)
                made = builder.emit_te(kernel, p, q)
                names = [builder.emit(made[i]) for i in range(len(values))] if len(values) > 1 else [made]
                known += zip(names, values, strict=True)
            chosen = [known[i] for i in rng.integers(0, len(known), 3)]
            alias = builder.emit(relax.op.reshape(chosen[0][0], (2, LENGTH // 2)))
            result = builder.emit_output([alias, *(variable for variable, _ in chosen[1:])])
        builder.emit_func_output(result)
    return builder.get(), x, [chosen[0][1].reshape(2, -1), *(values for _, values in chosen[1:])]


@pytest.mark.parametrize("draw", range(8))
def test_random_lines_of_kernels(draw: int, rng: np.random.Generator) -> None:
    mod, x, expected = straight_line(rng, 3 * (draw + 1))
    changed = in_place.reuse(mod)
    print(in_place_calls(changed))
    for found, right in zip(run(changed, x), expected, strict=True):
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize(
    ("kernel", "first", "second"),
    [
        (add, True, True),
        (add_reversed, False, True),
        (add_next, False, True),
        (add_sum, False, False),
        (add_twice, False, False),
        (add_to_bytes, True, True),
    ],
)
def test_which_argument_may_be_written_over(kernel: Any, first: bool, second: bool) -> None:
    """One that is read where the same element is stored, and nowhere else; `add_twice` stores a total before that is
    read."""
    p, q = (te.placeholder((LENGTH,), "uint32", name) for name in "pq")
    made = kernel(p, q)
    function = te.create_prim_func([p, q, *(made if isinstance(made, list) else [made])])
    given, output = function.params[:2], function.params[2]
    assert [in_place.fits(function, each, output) for each in given] == [first, second]


@pytest.mark.parametrize("kind", ["int32", "uint32"])
def test_only_memory_of_the_same_shape_and_type_is_written_over(kind: str) -> None:
    larger = te.placeholder((LENGTH + (kind == "uint32"),), kind)
    function = te.create_prim_func([larger, te.compute((LENGTH,), lambda i: larger[i].astype("uint32"))])
    assert not in_place.fits(function, *function.params)


def chain(read_later: bool, twice: bool) -> tvm.IRModule:
    """y = x + x, z = y + x, or y + y; y is returned too, or not."""
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType((LENGTH,), "uint32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_te(add, x, x)
            z = builder.emit_te(add_reversed, x, y) if not twice else builder.emit_te(add_reversed, y, y)
            result = builder.emit_output([z, y] if read_later else [z])
        builder.emit_func_output(result)
    return builder.get()


def test_what_is_read_later_is_kept() -> None:
    """And what is the network's input, or read twice by the kernel."""
    assert in_place_calls(in_place.reuse(chain(read_later=False, twice=False))) == [("add_reversed", [1])]
    assert not in_place_calls(in_place.reuse(chain(read_later=True, twice=False)))
    assert not in_place_calls(in_place.reuse(chain(read_later=False, twice=True)))


@pytest.mark.parametrize("name", ["x86-avx512vnni", "x86-avx2", "cortex-a72", "cortex-m4", "cuda-sm80"])
def test_residual_blocks_have_one_map(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """Each sum is written over its residual; of the first, that is the input with its channels last."""
    target = targets.load(name)
    model = nn.Sequential(*(Block(64, 64, 1, models.Quantize(group=16)) for _ in range(2)))
    export(randomise(model, rng), (64, 6, 7), tmp_path / "model.onnx")
    lowered = compiler.lower(importer.load(tmp_path / "model.onnx", 1, target))
    mod, *_ = compiler.scheduled(lowered, target, 1)
    assert len(in_place_calls(mod)) == (0 if target.gpu else 2)


@pytest.mark.parametrize(
    ("emit", "name"),
    [
        ("vm", "host"),
        ("vm", "x86-avx2"),
        ("c-lib", "host"),
        ("c-lib", "x86-avx2"),
        ("c-lib", "cortex-a72"),
        ("c-lib", "cortex-a76"),
        ("c-lib", "cortex-a7"),
        ("c-source", "host"),
    ],
)
def test_networks_in_place(emit: Any, name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """With shortcuts and a pool, on one thread or two, twice: what a call leaves in memory changes nothing."""
    target, threads = targets.load(name), int(rng.integers(1, 3))
    machines.need(target)
    quantize = models.Quantize(group=int(rng.choice([1, 4, 16])))
    model = nn.Sequential(Block(32, 32, 1, quantize), Block(32, 64, 2, quantize), Block(64, 64, 1, quantize))
    path, images = tmp_path / "model.onnx", [{"x": dyadic(rng, (1, 32, 8, 8))} for _ in range(2)]
    export(randomise(model, rng), (32, 8, 8), path)
    folder = c_apps.compiled(path, tmp_path, emit, name, threads)
    if emit == "vm":
        opened = session.open_session(folder)
        found = [opened.run(image) for image in images]
    else:
        found = c_apps.build(folder).run(images, workers=threads)
    for outputs, image in zip(found, images, strict=True):
        (right,) = c_apps.by_runtime(path, image).values()
        (output,) = outputs.values()
        np.testing.assert_allclose(output, right, rtol=0, atol=1e-4 * np.abs(right).max())
