"""Bit-serial 3x3 convolutions next to the most that a core can do: checked, then timed, in turns.

    .venv/bin/python scripts/bench_kernels.py [--quick] [--json FILE]

Four shapes of 115.6 M multiply-accumulates, one thread, default schedules, in three forms: ``kernel`` (bits in, sums
out), ``float_io`` (floats in, packed, scaled floats out) and ``bits_io`` (bits in, thresholds, bits out). The ceiling
is a register loop, `pipeline/ceiling.c`, timed between the kernels. Unless ``--quick``, so are other runtimes that are
installed (`peers.py`; `pip install openvino` for the one with binary convolutions).
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import peers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

CASES = {"56x56x64": (56, 64), "28x28x128": (28, 128), "14x14x256": (14, 256), "7x7x512": (7, 512)}
VARIANTS = ("kernel", "float_io", "bits_io")


def convolution(case: str, variant: str, rng: np.random.Generator, target: Any):
    """A variant as a Relax module for a target, its input, and NumPy's output."""
    from tvm import relax

    from pipeline.values import Channelwise, Emitter, Real, Signs, Sum
    from tvm_ops import bitplanes
    from tvm_ops.ops.bitserial_conv2d import Geometry
    from tvm_ops.output_transform import Step

    size, channels = CASES[case]
    shape = (1, channels, size, size)
    x = rng.standard_normal((1, size, size, channels)).astype(np.float32)
    signs = rng.choice([-1, 1], (channels, channels, 3, 3)).astype(np.int8)
    packed = variant != "float_io"
    argument = bitplanes.pack(x >= 0)[..., None, :] if packed else x
    variable = relax.Var("x", relax.TensorType(argument.shape, str(argument.dtype)))
    emitter = Emitter(relax.BlockBuilder(), target)
    scale, shift = rng.uniform(0.01, 1, channels).astype(np.float32), rng.normal(0, 20, channels).astype(np.float32)
    steps = {
        "kernel": (),
        "float_io": (Step("mul", scale),),
        "bits_io": (Step("mul", scale), Step("add", shift)),
    }[variant]
    with emitter.builder.function("main", [variable]):
        with emitter.builder.dataflow():
            codes = Signs(emitter, Channelwise(Real(emitter, variable, shape)), _words=[variable] if packed else [])
            geometry = Geometry((size, size), (3, 3), pads=(1, 1, 1, 1))
            sums = Channelwise(Sum(emitter, codes, signs, bitplanes.BINARY, geometry, shape), steps)
            result = emitter.builder.emit_output(sums.words() if variant == "bits_io" else sums.real())
        emitter.builder.emit_func_output(result)

    padded = np.pad(np.where(x >= 0, 1, -1).astype(np.float32), [(0, 0), (1, 1), (1, 1), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    expected = np.einsum("nhwcij,ocij->nhwo", windows, signs.astype(np.float32), optimize=True)
    for step in steps:
        expected = expected * step.value if step.op == "mul" else expected + step.value
    if variant == "bits_io":
        expected = bitplanes.pack(expected >= 0)[..., None, :]
    return emitter.builder.get(), argument, expected


def kernel(case: str, variant: str, rng: np.random.Generator):
    """A compiled variant: its output, NumPy's, and seconds(calls) of a call."""
    import tvm
    from tvm import relax

    import targets
    from pipeline import compiler

    mod, argument, expected = convolution(case, variant, rng, targets.host())
    executable, _, _ = compiler.build(compiler.lower(mod), targets.host(), threads=1)
    machine = relax.VirtualMachine(executable.jit(), tvm.cpu())
    tensor = tvm.runtime.tensor(argument)

    def seconds(calls: int) -> float:
        return float(machine.time_evaluator("main", tvm.cpu(), number=calls, repeat=1)(tensor).mean)

    return machine["main"](tensor).numpy(), expected, seconds


def peer_inputs(case: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Floats in [-1, 1] and signs of a case, as `peers` takes them."""
    size, channels = CASES[case]
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
    loop = ceiling.loops(targets.host())["binary"]
    timers = {}
    for case in CASES:
        for variant in VARIANTS:
            found, expected, seconds = kernel(case, variant, rng)
            if not np.array_equal(found, expected):
                raise SystemExit(f"{case} {variant}: differs from NumPy (seed {seed}), so nothing is timed")
            timers[case, variant] = seconds
        if not quick:
            timers |= {(case, name): timer for name, timer in peers.all_of(*peer_inputs(case, rng)).items()}
    rounds = 15 if quick else 60
    times = {key: [] for key in timers}
    rates = []
    for _ in track(range(rounds), "timing", console=Console(stderr=True), transient=True):
        rates.append(loop())
        for key, seconds in timers.items():
            times[key].append(seconds(5))
    rows = []
    for (case, variant), seconds in times.items():
        size, channels = CASES[case]
        macs = size * size * channels * channels * 9
        us, ceiling_us = np.median(seconds) * 1e6, macs / np.median(rates) * 1e6
        rows.append({"case": case, "variant": variant, "us": us, "ceiling_us": ceiling_us, "ratio": us / ceiling_us})
    today = datetime.datetime.now(datetime.UTC).date()
    table = Table(title=f"{targets.cpu_name()}, {targets.host().name}, 1 thread, {today}", title_justify="left")
    for column in ("case", "variant", "us", "ceiling us", "ratio"):
        table.add_column(column, justify="left" if column in ("case", "variant") else "right")
    for row in rows:
        table.add_row(
            row["case"], row["variant"], f"{row['us']:.1f}", f"{row['ceiling_us']:.1f}", f"{row['ratio']:.2f}"
        )
    console.print(table)
    if json_ is not None:
        json_.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
