"""The other half of the cost model: an XNOR convolution and the same float one, compiled by us and timed on this CPU.

Both take and give float images, channels last, so the binary one pays for packing its input too, which the model does
not count. Both get the default schedule; each is checked against NumPy before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

import targets
from pipeline import compiler
from pipeline.importer import OPERATORS
from pipeline.values import Channelwise, Constant, Emitter, Real
from tvm_ops import opset

SIZE = 14  # of the images: 14 x 14, where ResNet-18 has 256 channels


@dataclass(frozen=True)
class Point:
    """One layer: medians of a call in microseconds, and float over binary."""

    channels: int
    kernel: int
    group: int
    float_us: float
    binary_us: float
    speedup: float


def measure(
    channels: Sequence[int],
    kernel: int,
    groups: Sequence[int],
    rounds: int = 20,
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
    timers: dict[tuple[int, int], Callable[[int], float]] = {}  # M = 0 is the float convolution
    for c in channels:
        for group in (0, *groups):
            timers[c, group] = _timer(c, kernel, group, np.random.default_rng([seed, c]))
    calls = {key: max(1, int(0.005 / seconds(2))) for key, seconds in timers.items()}
    times: dict[tuple[int, int], list[float]] = {key: [] for key in timers}
    for done in range(rounds):
        for key, seconds in timers.items():
            times[key].append(seconds(calls[key]))
        on_round(done + 1, rounds)
    us = {key: float(np.median(t)) * 1e6 for key, t in times.items()}
    return [Point(c, kernel, m, us[c, 0], us[c, m], us[c, 0] / us[c, m]) for c in channels for m in groups]


def _timer(channels: int, kernel: int, group: int, rng: np.random.Generator) -> Callable[[int], float]:
    """seconds(calls) of a call of the convolution, checked; ``group`` 0 is the float one."""
    x = rng.standard_normal((1, SIZE, SIZE, channels)).astype(np.float32)
    weight = rng.standard_normal((channels, channels, kernel, kernel)).astype(np.float32)
    scale = rng.uniform(0.5, 1, -(-channels // max(group, 1))).astype(np.float32).repeat(max(group, 1))[:channels]
    if group:
        weight = np.where(weight >= 0, 1, -1).astype(np.float32)
    machine = relax.VirtualMachine(_compile(x.shape, weight, scale if group else None).jit(), tvm.cpu())
    tensor = tvm.runtime.tensor(x)
    found = machine["main"](tensor).numpy()

    pad = kernel // 2
    inputs = np.where(x >= 0, 1, -1).astype(np.float32) if group else x
    padded = np.pad(inputs, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (1, 2))
    expected = np.tensordot(windows, weight, axes=([3, 4, 5], [1, 2, 3]))
    # integers below 2^24 and one product are exact; float sums of q products may come in any order
    right = np.array_equal(found, expected * scale) if group else np.allclose(found, expected, rtol=0, atol=1e-2)
    if not right:
        raise ArithmeticError(f"{kernel}x{kernel} convolution of {channels} channels, M = {group}: differs from NumPy")
    return lambda calls: float(machine.time_evaluator("main", tvm.cpu(), number=calls, repeat=1)(tensor).mean)


def _compile(shape: tuple[int, ...], weight: np.ndarray, scale: np.ndarray | None) -> Any:
    """The executable of [sign ->] convolution [-> scale per filter], NHWC; ``scale`` None: the float one."""
    batch, height, width, channels = shape
    pad = weight.shape[-1] // 2
    variable = relax.Var("x", relax.TensorType(shape, "float32"))
    emitter = Emitter(relax.BlockBuilder())
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
