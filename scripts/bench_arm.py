"""Bit-serial 3x3 convolutions on ARM cores by a cycle model: checked under QEMU, counted, timed by llvm-mca.

    .venv/bin/python scripts/bench_arm.py [--quick] [--resnet18] [--core NAME] [--json FILE]

The four shapes of `bench_kernels.py`, one thread, default schedules, whole kernels: border, loads, reduction and output
transform. A step is one xor, count and add of 128 bits, 128 binary multiply-accumulates. ``float_io`` packs floats and
writes scaled floats, ``bits_io`` reads bits and writes thresholds' bits. Beside them is the inner loop alone of Larq
Compute Engine, by the same model. No core was timed: see `pipeline/cycle_model.py`. ``quick``: ``float_io`` only.
``resnet18``: instead, all kernels of the network of `bench_resnet18.py`, with the records that crossbit ships.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from bench_kernels import CASES, convolution
from rich.console import Console
from rich.progress import track
from rich.table import Table

# Cycles of a step in LCE's loops for 64, and for 128 and more channels (llvm-mca 16 and 22).
LCE = {"cortex-a53": (5.50, 4.16), "cortex-a72": (1.50, 1.50), "cortex-a76": (1.81, 1.50)}
VARIANTS = ("float_io", "bits_io")
CLOCKS = {
    "cortex-a53": 1.4e9,
    "cortex-a72": 1.5e9,
    "cortex-a76": 2.4e9,
    "cortex-a7": 0.9e9,
}  # Raspberry Pi 3B+, 4, 5, 2
# What a kernel of ResNet-18 with this in its name is; the first that fits.
PARTS = {
    "bitserial": "binary convolutions",
    "bitpack": "packing",
    "fused_conv2d": "shortcuts",
    "avg_pool": "shortcuts",
    "conv2d": "stem",
    "max_pool": "max pool",
    "": "the rest",
}


def program(mod: Any, target: Any, argument: np.ndarray, folder: Path, tuned: bool = False):
    """The kernels of a Relax module as an executable that runs them once on the memory in a file.

    Returns (executable, file, kernel names, output(): what the file holds afterwards).
    """
    from pipeline import compiler, executable, program, tune
    from pipeline.workspace import aligned

    records = tune.shipped_records(target, 1) if tuned else None
    scheduled, _, _ = compiler.scheduled(compiler.lower(mod), target, 1, records)
    llvm = target.tvm_target(1)
    made = program.make(scheduled, ("y",), "k", llvm, 1, target.registers * target.vector_bits // 8)

    (output,) = made.outputs
    held = dict.fromkeys(made.inputs, argument) | {tensor: tensor.data for tensor in made.constants}
    offsets, memory = {}, bytearray()
    for tensor in (*held, output):
        offsets[tensor] = len(memory)
        contents = held[tensor].tobytes() if tensor in held else b""
        memory += contents.ljust(aligned(tensor.bytes), b"\0")
    scratch = len(memory)
    size = scratch + made.workspace_bytes
    (folder / "memory").write_bytes(memory.ljust(size, b"\0"))

    def places(call: Any) -> list[int]:
        return [offsets.get(tensor, scratch + tensor.offset) for tensor in call.tensors]

    calls = [(part.symbol, places(call)) for call in made.calls for part in call.kernel.parts]
    linked = executable.link(made.parts, calls, size, target, folder)

    def result() -> np.ndarray:
        values = np.fromfile(folder / "memory", output.dtype, output.elements, offset=offsets[output])
        return values.reshape(output.shape)

    return linked, folder / "memory", [part.symbol for part in made.parts], result


def measure(core: str, case: str, variant: str, rng: np.random.Generator) -> dict[str, Any]:
    """name of a kernel -> what it executed, after its output was compared with NumPy's."""
    import targets
    from pipeline import cycle_model

    target = targets.load(core)
    mod, argument, expected = convolution(case, variant, rng, target)
    with tempfile.TemporaryDirectory() as folder:
        executable, memory, symbols, result = program(mod, target, argument, Path(folder))
        counts = cycle_model.count(target, executable, [str(memory)], symbols)
        if not np.array_equal(result(), expected):
            raise SystemExit(f"{core} {case} {variant}: differs from NumPy, so nothing is counted")
    return counts


def predict(core: str) -> dict[str, float]:
    """Cycles of each part of ResNet-18, after its output was compared with ONNX Runtime's."""
    from bench_resnet18 import network

    import targets
    from pipeline import cycle_model, importer, models, packaging

    target, parts = targets.load(core), dict.fromkeys(PARTS.values(), 0.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network(models.Quantize(group=16), folder / "model.onnx")
        inputs, outputs = packaging.golden_pair(folder / "model.onnx", 1)
        mod = importer.load(folder / "model.onnx", 1, target)
        executable, memory, symbols, result = program(mod, target, inputs["x"], folder, tuned=True)
        counts = cycle_model.count(target, executable, [str(memory)], symbols)
        error = np.abs(result() - outputs["y"]).max() / np.abs(outputs["y"]).max()
        if error > packaging.TOLERANCE:
            raise SystemExit(f"{core} resnet18: differs from ONNX Runtime by {error:.1e}, so nothing is counted")
    for kernel, count in counts.items():
        parts[next(part for words, part in PARTS.items() if words in kernel)] += count.cycles
    return parts


def show_prediction(core: str) -> list[dict[str, Any]]:
    """The rows of a table, printed."""
    from pipeline import cycle_model

    parts = predict(core)
    table = Table(title=f"ResNet-18 on {core}: {cycle_model.MODELS[core]}'s model, not silicon", title_justify="left")
    for column in ("part", "cycles", "share", f"ms at {CLOCKS[core] / 1e9} GHz"):
        table.add_column(column, justify="left" if column == "part" else "right")
    total = sum(parts.values())
    for part, cycles in (*parts.items(), ("all", total)):
        table.add_row(part, f"{cycles:,.0f}", f"{cycles / total:.1%}", f"{1000 * cycles / CLOCKS[core]:.1f}")
    Console(width=120).print(table)
    return [{"core": core, "part": part, "cycles": cycles} for part, cycles in parts.items()]


def main(
    quick: Annotated[bool, typer.Option(help="Floats in and out only: about a minute.")] = False,
    resnet18: Annotated[bool, typer.Option(help="A whole network instead.")] = False,
    core: Annotated[list[str] | None, typer.Option(help="A core; again for more. Without: all.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the counts there.")] = None,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
) -> None:
    """Check and count the kernels."""
    from pipeline import cycle_model

    cores = core or list(cycle_model.MODELS)
    rows = [row for c in cores for row in show_prediction(c)] if resnet18 else show_kernels(cores, quick, seed)
    if json_ is not None:
        json_.write_text(json.dumps(rows, indent=2) + "\n")


def show_kernels(cores: list[str], quick: bool, seed: int) -> list[dict[str, Any]]:
    """The rows of a table, printed."""
    from pipeline import cycle_model

    rng = np.random.default_rng(seed)
    variants = VARIANTS[:1] if quick else VARIANTS
    runs = [(name, case, variant) for name in cores for case in CASES for variant in variants]
    rows: list[dict[str, Any]] = []
    for name, case, variant in track(runs, "counting", console=Console(stderr=True), transient=True):
        steps = CASES[case].macs / 128
        for kernel, count in measure(name, case, variant, rng).items():
            row = {"core": name, "case": f"{case} packing" if "bitpack" in kernel else case, "variant": variant}
            rows.append({**row, "cycles_per_128": count.cycles / steps, "instructions": count.instructions})
    today = datetime.datetime.now(datetime.UTC).date()
    table = Table(title=f"llvm-mca's models, not silicon; 1 thread, {today}", title_justify="left")
    for column in ("core", "model", "case", "variant", "cycles / 128 bits", "instructions", "LCE's loop"):
        table.add_column(column, justify="left" if column in ("core", "model", "case", "variant") else "right")
    for row in rows:
        name, case = row["core"], row["case"]
        lce = f"{LCE[name][CASES[case][1] > 64]:.2f}" if name in LCE and case in CASES else ""
        numbers = (f"{row['cycles_per_128']:.2f}", f"{row['instructions']:,}", lce)
        table.add_row(name, cycle_model.MODELS[name], case, row["variant"], *numbers)
    Console(width=120).print(table)
    return rows


if __name__ == "__main__":
    typer.run(main)
