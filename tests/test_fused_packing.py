"""Kernels that give floats and the words of their signs: what is fused, and that no bit differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from networks import dyadic, randomise
from torch import nn
from tvm import relax, te
from tvm.s_tir import Schedule

import targets
from pipeline import compiler, importer, models, packaging, session, work
from pipeline.export import export
from pipeline.models.resnet18 import Block
from pipeline.values import Channelwise, Codes, Emitter, FloatSum, MaxPool, Real, Sum
from tvm_ops import schedule_cpu
from tvm_ops.bitplanes import BINARY, pack
from tvm_ops.ops.bitserial_conv2d import Geometry
from tvm_ops.output_transform import Step, apply

FUSING = ["x86-avx512bw", "x86-avx512vnni"]
PRODUCERS = ("binary", "float", "spread", "pooled")
SIDES = (6, 7)  # columns that two divides, and rows that it does not


def module(
    producer: str, filters: int, rng: np.random.Generator, target: targets.Target, readers: int = 1
) -> tuple[tvm.IRModule, list[np.ndarray], list[np.ndarray]]:
    """A lowered function of a map and a residual, its inputs, and NumPy's outputs.

    It gives the scaled sums of a convolution and the residual, or the maxima of a pool, and the words of their sign
    after each reader's norm. A 'spread' convolution is of one pixel, which is added to all of the residual.
    """
    h, w = (1, 1) if producer == "spread" else SIDES
    channels = filters if producer == "pooled" else 64
    geometry = Geometry((h, w), (3, 3), (1, 1), (1, 1, 1, 1))
    shape, out = (1, channels, h, w), (1, filters, h, w)
    emitter = Emitter(relax.BlockBuilder(), target)
    x = rng.choice([-1, 1], (1, h, w, channels))
    argument = pack(x)[..., None, :] if producer in ("binary", "spread") else x.astype(np.float32)
    residual = dyadic(rng, (1, *SIDES, filters))
    residual[rng.random(residual.shape) < 0.1] = np.nan
    variables = [relax.Var(n, relax.TensorType(a.shape, str(a.dtype))) for n, a in (("x", argument), ("r", residual))]
    weights = rng.choice([-1, 1], (filters, channels, 3, 3))
    scale = rng.choice(np.array([0.5, -0.25, 0.3], np.float32), filters)

    with emitter.builder.function("main", variables):
        with emitter.builder.dataflow():
            real = Channelwise(Real(emitter, variables[0], shape))
            if producer in ("binary", "spread"):
                codes = Codes(emitter, real, BINARY, lambda value: value, [variables[0]])
                value: Any = Channelwise(Sum(emitter, codes, weights, BINARY, geometry, out), (Step("mul", scale),))
            elif producer == "float":
                of_floats = FloatSum(emitter, real, weights.astype(np.float32), geometry, out)
                value = Channelwise(of_floats, (Step("mul", scale),))
            else:
                value = Channelwise(MaxPool(emitter, real, geometry, out))
            floats = value.real()
            if producer != "pooled":
                floats = emitter.te("add", _sum, floats, variables[1])
            norms = [_norm(rng, filters) for _ in range(readers)]
            packed = [Real(emitter, floats, (1, filters, *SIDES)).words(norm) for norm in norms]
            result = emitter.builder.emit_output([floats, *packed])
        emitter.builder.emit_func_output(result)

    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]), (3, 3), (1, 2))
    if producer == "pooled":
        padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-2)
        expected = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2)).max((-1, -2)).astype(np.float32)
    else:
        expected = np.einsum("nhwcij,ocij->nhwo", windows, weights).astype(np.float32) * scale + residual
    bits = [pack(apply(norm, expected) >= 0)[..., None, :] for norm in norms]
    return compiler.lower(emitter.builder.get()), [argument, residual], [expected, *bits]


def _sum(p: Any, q: Any) -> Any:
    def value(n: Any, h: Any, w: Any, c: Any) -> Any:
        return (p[n, 0, 0, c] if int(p.shape[1]) == 1 else p[n, h, w, c]) + q[n, h, w, c]

    return te.compute(q.shape, value, name="add")


def _norm(rng: np.random.Generator, channels: int) -> list[Step]:
    """A batch norm some of whose factors are negative; or, of every other draw, none."""
    some = [-1.5, 0.7, 1.0] if rng.random() < 0.5 else [0.7, 1.0]
    factors = rng.choice(np.array(some, np.float32), channels)
    return [Step("mul", factors), Step("add", rng.integers(-9, 9, channels).astype(np.float32))]


def kernels(mod: tvm.IRModule) -> list[str]:
    return [call.kernel for call in work.calls(mod)]


@pytest.mark.parametrize("name", FUSING)
@pytest.mark.parametrize("producer", PRODUCERS)
def test_floats_and_their_words(producer: str, name: str, rng: np.random.Generator) -> None:
    """Of one kernel; NaN is no 1, and channels may descend."""
    target, filters, threads = targets.load(name), int(rng.choice([32, 64, 96, 128])), int(rng.integers(1, 3))
    if missing := target.missing_features():
        pytest.skip(f"this CPU lacks {missing}")
    mod, inputs, expected = module(producer, filters, rng, target)
    assert len(kernels(mod)) == 1
    executable, *_ = compiler.build(mod, target, threads)
    found = relax.VirtualMachine(executable.jit(), tvm.cpu())["main"](*map(tvm.runtime.tensor, inputs))
    for result, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(result.numpy(), right)


@pytest.mark.parametrize("draw", range(3))
@pytest.mark.parametrize("producer", PRODUCERS)
def test_every_schedule_that_tuning_draws(producer: str, draw: int, rng: np.random.Generator) -> None:
    mod, inputs, expected = module(producer, int(rng.choice([32, 64, 96, 128])), rng, targets.host())
    if len(kernels(mod)) > 1:
        pytest.skip(f"{targets.host().name} packs in a kernel of its own")
    (name,) = kernels(mod)
    sch = Schedule(tvm.IRModule({"main": mod[name]}), seed=int(rng.integers(1, 1 << 30)))
    schedule_cpu.schedule(sch, targets.host(), 1 + draw % 2, sample=True)
    print(sch.trace)
    mod[name] = sch.mod["main"].with_attr("tirx.is_scheduled", True)
    executable, *_ = compiler.build(mod, targets.host(), 1)
    found = relax.VirtualMachine(executable.jit(), tvm.cpu())["main"](*map(tvm.runtime.tensor, inputs))
    for result, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(result.numpy(), right)


@pytest.mark.parametrize(
    ("name", "filters", "readers", "count"),
    [
        ("x86-avx512", 64, 1, 1),
        ("x86-avx512bw", 64, 1, 1),
        ("x86-avx512bw", 64, 2, 2),  # another threshold has a kernel of its own
        ("x86-avx512bw", 48, 1, 2),  # no whole words
        ("x86-avx2", 64, 1, 2),  # no comparison that gives bits
        ("cortex-a72", 64, 1, 2),
    ],
)
def test_what_is_fused(name: str, filters: int, readers: int, count: int, rng: np.random.Generator) -> None:
    mod, *_ = module("binary", filters, rng, targets.load(name), readers)
    assert len(kernels(mod)) == count
    fused = [mod[kernel] for kernel in kernels(mod) if kernel.startswith("fused_fused")]
    assert len(fused) == (count == readers)
    flops = 2 * 9 * 64 * filters * int(np.prod(SIDES))  # without them, MetaSchedule refuses to tune
    assert all(int(function.attrs["estimated_flops"]) == flops for function in fused)


@pytest.mark.parametrize("emit", ["vm", "c-lib"])
def test_blocks_of_a_resnet(emit: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """Packaged: no kernel only packs but that of the input, and ONNX Runtime gives the same bit for bit."""
    model = nn.Sequential(*(Block(64, 64, 1, models.Quantize(group=group)) for group in (16, 4, 1)))
    export(randomise(model, rng), (64, *SIDES), tmp_path / "model.onnx")
    if targets.host().vector_bits == 512:
        lowered = compiler.lower(importer.load(tmp_path / "model.onnx", 1, targets.host()))
        assert [kernel for kernel in kernels(lowered) if kernel.startswith("bitpack")] == ["bitpack"]
    packaging.compile_network(tmp_path / "model.onnx", tmp_path / "lib", targets.host(), 1, emit=emit)  # type: ignore[arg-type]
    x = dyadic(rng, (1, 64, *SIDES))
    (expected,) = packaging.oracle(tmp_path / "model.onnx").run(None, {"x": x})
    (found,) = session.open_session(tmp_path / "lib").run({"x": x}).values()
    np.testing.assert_array_equal(found, expected)
