"""Bit-serial convolutions next to the most that a core can do: checked, then timed, in turns.

    .venv/bin/python scripts/bench_kernels.py [--quick] [--json FILE]

Four shapes of 115.6 M multiply-accumulates, one thread, default schedules, in three forms: ``kernel`` (bits in, sums
out), ``float_io`` (floats in, packed, scaled floats out) and ``bits_io`` (bits in, thresholds, bits out). The ceiling
is a register loop, `pipeline/ceiling.c`, timed between the kernels, and so is the floor of memory: what the core takes
to read from end to end as many bytes as all kernels' inputs, constants (as the library has them) and outputs have.
Unless ``--quick``, so are kernels of other windows and codes, and other runtimes that are installed (`peers.py`; `pip
install openvino` for the one with binary convolutions).
"""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import peers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table


class Case(NamedTuple):
    """A convolution with padding: image, channels, filters, kernel and stride; bits of activations (0: ternary)."""

    size: int
    channels: int
    filters: int
    kernel: int = 3
    stride: int = 1
    bits: int = 1

    @property
    def geometry(self) -> Any:
        from tvm_ops.ops.bitserial_conv2d import Geometry

        half = self.kernel // 2
        return Geometry((self.size,) * 2, (self.kernel,) * 2, (self.stride,) * 2, (half,) * 4)

    @property
    def macs(self) -> int:
        return math.prod(self.geometry.output) * self.filters * self.channels * self.kernel**2


CASES = {
    "56x56x64": Case(56, 64, 64),
    "28x28x128": Case(28, 128, 128),
    "14x14x256": Case(14, 256, 256),
    "7x7x512": Case(7, 512, 512),
}
MORE = {
    "14x14x256, 1x1": Case(14, 256, 256, 1),
    "56x56x64 to 128, stride 2": Case(56, 64, 128, stride=2),
    "16x16x192, 5x5": Case(16, 192, 192, 5),
    "dense 4096x4096": Case(1, 4096, 4096, 1),
    "14x14x256, ternary": Case(14, 256, 256, bits=0),
    "14x14x256, 2 bits": Case(14, 256, 256, bits=2),
}
VARIANTS = ("kernel", "float_io", "bits_io")
PACKED = ("kernel", "bits_io")
CALLS = 20  # in a row; the first pay for what others have left in the caches


def convolution(case: str, variant: str, rng: np.random.Generator, target: Any):
    """A variant as a Relax module for a target, its input, and NumPy's output."""
    from tvm import relax

    from pipeline.values import Channelwise, Codes, Emitter, Real, Signs, Sum
    from tvm_ops import bitplanes
    from tvm_ops.output_transform import Step

    of = (CASES | MORE)[case]
    code = {0: bitplanes.TERNARY, 1: bitplanes.BINARY, 2: bitplanes.unsigned(2)}[of.bits]
    geometry, shape = of.geometry, (1, of.channels, of.size, of.size)
    floats = rng.standard_normal((1, of.size, of.size, of.channels)).astype(np.float32)
    signs = rng.choice([-1, 1], (of.filters, of.channels, of.kernel, of.kernel)).astype(np.int8)
    if packed := variant != "float_io":
        x = rng.choice(code.values, floats.shape)
        planes = bitplanes.encode(x, code)
        planes = np.stack([planes[0], planes[0] | planes[1]]) if code == bitplanes.TERNARY else planes
        argument = bitplanes.pack(np.moveaxis(planes, 0, -2))
    else:
        x, argument = np.where(floats >= 0, 1, -1), floats
    variable = relax.Var("x", relax.TensorType(argument.shape, str(argument.dtype)))
    emitter = Emitter(relax.BlockBuilder(), target)
    scale = rng.uniform(0.01, 1, of.filters).astype(np.float32)
    shift = rng.normal(0, 20, of.filters).astype(np.float32)
    steps = {
        "kernel": (),
        "float_io": (Step("mul", scale),),
        "bits_io": (Step("mul", scale), Step("add", shift)),
    }[variant]
    with emitter.builder.function("main", [variable]):
        with emitter.builder.dataflow():
            real = Channelwise(Real(emitter, variable, shape))
            codes = Codes(emitter, real, code, lambda value: value, [variable]) if packed else Signs(emitter, real)
            out = (1, of.filters, *geometry.output)
            sums = Channelwise(Sum(emitter, codes, signs, bitplanes.BINARY, geometry, out), steps)
            result = emitter.builder.emit_output(sums.words() if variant == "bits_io" else sums.real())
        emitter.builder.emit_func_output(result)

    half = of.kernel // 2
    padded = np.pad(x.astype(np.float32), [(0, 0), (half, half), (half, half), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (of.kernel,) * 2, (1, 2))[:, :: of.stride, :: of.stride]
    expected = np.einsum("nhwcij,ocij->nhwo", windows, signs.astype(np.float32), optimize=True)
    for step in steps:
        expected = expected * step.value if step.op == "mul" else expected + step.value
    if variant == "bits_io":
        expected = bitplanes.pack(expected >= 0)[..., None, :]
    return emitter.builder.get(), argument, expected


def kernel(case: str, variant: str, rng: np.random.Generator):
    """A compiled variant: its output, NumPy's, seconds(calls) of a call, and the bytes it must read and write."""
    import tvm
    from tvm import relax

    import targets
    from pipeline import compiler, work

    mod, argument, expected = convolution(case, variant, rng, targets.host())
    lowered = compiler.lower(mod)
    executable, _, _ = compiler.build(lowered, targets.host(), threads=1)
    machine = relax.VirtualMachine(executable.jit(), tvm.cpu())
    tensor = tvm.runtime.tensor(argument)

    def seconds(calls: int) -> float:
        return float(machine.time_evaluator("main", tvm.cpu(), number=calls, repeat=1)(tensor).mean)

    size = sum(call.bytes for call in work.calls(lowered))
    return machine["main"](tensor).numpy(), expected, seconds, size


def peer_inputs(case: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Floats in [-1, 1] and signs of a case, as `peers` takes them."""
    size, channels, *_ = CASES[case]
    x = rng.uniform(-1, 1, (1, channels, size, size)).astype(np.float32)
    return x, rng.choice([-1, 1], (channels, channels, 3, 3)).astype(np.int8)


def main(
    quick: Annotated[bool, typer.Option(help="A minute at most: fewer rounds, no peers.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the measurements there.")] = None,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
) -> None:
    """Check and time the kernels."""
    import targets
    from pipeline import ceiling

    console = Console()
    rng = np.random.default_rng(seed)
    loop, reading = ceiling.loops(targets.host())["binary"], ceiling.reading(targets.host())
    timers, sizes = {}, {}
    for case in CASES if quick else CASES | MORE:
        for variant in VARIANTS if case in CASES else PACKED:
            found, expected, seconds, size = kernel(case, variant, rng)
            if not np.array_equal(found, expected):
                raise SystemExit(f"{case} {variant}: differs from NumPy (seed {seed}), so nothing is timed")
            timers[case, variant], sizes[case, variant] = seconds, size
        if case in CASES and not quick:
            timers |= {(case, name): timer for name, timer in peers.all_of(*peer_inputs(case, rng)).items()}
    rounds = 15 if quick else 60
    times = {key: [] for key in timers}
    rates: list[float] = []
    floors: dict[tuple[str, str], list[float]] = {key: [] for key in sizes}
    for _ in track(range(rounds), "timing", console=Console(stderr=True), transient=True):
        rates.append(loop())
        for key, seconds in timers.items():
            times[key].append(seconds(CALLS))
        for key, size in sizes.items():
            floors[key].append(size / reading(size))
    rows = []
    for key, seconds in times.items():
        case, variant = key
        us, ceiling_us = np.median(seconds) * 1e6, (CASES | MORE)[case].macs / np.median(rates) * 1e6
        row = {"case": case, "variant": variant, "us": us, "ceiling_us": ceiling_us, "ratio": us / ceiling_us}
        if key in floors:
            floor_us = np.median(floors[key]) * 1e6
            row |= {"floor_us": floor_us, "larger_ratio": us / max(ceiling_us, floor_us)}
        rows.append(row)
    today = datetime.datetime.now(datetime.UTC).date()
    table = Table(title=f"{targets.cpu_name()}, {targets.host().name}, 1 thread, {today}", title_justify="left")
    for column in ("case", "variant", "us", "ceiling us", "ratio", "floor us", "/ larger"):
        table.add_column(column, justify="left" if column in ("case", "variant") else "right")
    columns = {"us": 1, "ceiling_us": 1, "ratio": 2, "floor_us": 1, "larger_ratio": 2}
    for row in rows:
        numbers = [f"{row[name]:.{digits}f}" if name in row else "" for name, digits in columns.items()]
        table.add_row(row["case"], row["variant"], *numbers)
    console.print(table)
    if json_ is not None:
        json_.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
