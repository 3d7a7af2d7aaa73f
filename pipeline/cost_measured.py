"""The other half of the cost model: an XNOR convolution and the same float one, compiled by us and timed on this CPU.

Both take and give float images, channels last, so the binary one pays for packing its input too, which the model does
not count. Both get the default schedule; each is checked against NumPy before it is timed. The default schedule is made
for bits, so ONNX Runtime's float convolution is timed in the same run: what a good float baseline takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax

import targets
from pipeline import compiler
from pipeline.importer import OPERATORS
from pipeline.timer import timer
from pipeline.values import Channelwise, Constant, Emitter, Real
from tvm_ops import opset

SIZE = 14  # of the images: 14 x 14, where ResNet-18 has 256 channels


@dataclass(frozen=True)
class Point:
    """One layer: medians of a call in microseconds; ``speedup`` is float over binary, both compiled by us."""

    channels: int
    kernel: int
    group: int
    float_us: float
    onnxruntime_us: float
    binary_us: float
    speedup: float


def measure(
    channels: Sequence[int],
    kernel: int,
    groups: Sequence[int],
    rounds: int = 40,
    seed: int = 0,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> list[Point]:
    """Time every pair in turns, with one thread: each channel count with each M.

    Raises:
        ValueError: an even kernel.
        ArithmeticError: a kernel that differs from NumPy.
    """
    if kernel % 2 == 0:
        raise ValueError(f"kernel = {kernel}: the layers are padded to keep their size, give an odd kernel to measure")
    timers: dict[tuple[int, int | str], Callable[[int], float]] = {}
    for c in channels:
        rng = np.random.default_rng([seed, c])
        x = rng.standard_normal((1, SIZE, SIZE, c)).astype(np.float32)
        weight = rng.standard_normal((c, c, kernel, kernel)).astype(np.float32)
        timers[c, "onnxruntime"] = _onnxruntime(x, weight)
        timers[c, "float"] = _compiled(x, weight, None)
        for group in groups:
            scale = rng.uniform(0.5, 1, -(-c // group)).astype(np.float32).repeat(group)[:c]
            timers[c, group] = _compiled(x, weight, scale)
    calls = {key: max(1, int(0.005 / seconds(2))) for key, seconds in timers.items()}
    times: dict[tuple[int, int | str], list[float]] = {key: [] for key in timers}
    for done in range(rounds):
        for key, seconds in timers.items():
            times[key].append(seconds(calls[key]))
        on_round(done + 1, rounds)
    us = {key: float(np.median(t)) * 1e6 for key, t in times.items()}
    return [
        Point(c, kernel, m, us[c, "float"], us[c, "onnxruntime"], us[c, m], us[c, "float"] / us[c, m])
        for c in channels
        for m in groups
    ]


def _onnxruntime(x: np.ndarray, weight: np.ndarray) -> Callable[[int], float]:
    """seconds(calls) of a call of ONNX Runtime's float convolution, on images of its own layout."""
    from pipeline.packaging import onnxruntime

    image = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    conv = onnx.helper.make_node("Conv", ["x", "weight"], ["y"], pads=[weight.shape[-1] // 2] * 4)
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, image.shape) for name in "xy"]
    graph = onnx.helper.make_graph([conv], "conv", ends[:1], ends[1:], [onnx.numpy_helper.from_array(weight, "weight")])
    opsets = [onnx.helper.make_opsetid("", opset.OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=opset.IR_VERSION)
    session = onnxruntime(model.SerializeToString(), threads=1)
    return timer(lambda: session.run(None, {"x": image}))


def _compiled(x: np.ndarray, weight: np.ndarray, scale: np.ndarray | None) -> Callable[[int], float]:
    """seconds(calls) of a call of our convolution, checked; with a ``scale`` per filter the XNOR one."""
    kernel, pad = weight.shape[-1], weight.shape[-1] // 2
    inputs = x
    if scale is not None:
        inputs, weight = (np.where(a >= 0, 1, -1).astype(np.float32) for a in (x, weight))
    machine = relax.VirtualMachine(_build(x.shape, weight, scale).jit(), tvm.cpu())
    tensor = tvm.runtime.tensor(x)
    found = machine["main"](tensor).numpy()

    padded = np.pad(inputs, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (1, 2))
    expected = np.tensordot(windows, weight, axes=([3, 4, 5], [1, 2, 3]))
    if scale is None:  # a sum of q products may come in any order
        right = np.allclose(found, expected, rtol=0, atol=1e-2)
    else:  # integers below 2^24 and one product are exact
        right = np.array_equal(found, expected * scale)
    if not right:
        kind = "float" if scale is None else "XNOR"
        raise ArithmeticError(f"the {kind} convolution of {weight.shape} differs from NumPy, so nothing is timed")
    return lambda calls: float(machine.time_evaluator("main", tvm.cpu(), number=calls, repeat=1)(tensor).mean)


def _build(shape: tuple[int, ...], weight: np.ndarray, scale: np.ndarray | None) -> Any:
    """The executable of [sign ->] convolution [-> scale per filter], NHWC; ``scale`` None: the float one."""
    batch, height, width, channels = shape
    pad = weight.shape[-1] // 2
    variable = relax.Var("x", relax.TensorType(shape, "float32"))
    emitter = Emitter(relax.BlockBuilder(), targets.host())
    with emitter.builder.function("main", [variable]):
        with emitter.builder.dataflow():
            value: Any = Channelwise(Real(emitter, variable, (batch, channels, height, width)))
            if scale is not None:
                value = OPERATORS[f"{opset.DOMAIN}::BinarySign"](emitter, [value], {})
            value = OPERATORS["Conv"](emitter, [value, Constant(weight)], {"pads": [pad] * 4})
            if scale is not None:
                value = OPERATORS["Mul"](emitter, [value, Constant(scale.reshape(1, -1, 1, 1))], {})
            result = emitter.builder.emit_output(value.real())
        emitter.builder.emit_func_output(result)
    executable, _, _ = compiler.build(compiler.lower(emitter.builder.get()), targets.host(), threads=1)
    return executable
