"""Bit-serial 3x3 convolutions on ARM cores by a cycle model: checked under QEMU, counted, timed by llvm-mca.

    .venv/bin/python scripts/bench_arm.py [--quick] [--core NAME] [--json FILE]

The four shapes of `bench_kernels.py`, one thread, default schedules, whole kernels: border, loads, reduction and output
transform. A step is one xor, count and add of 128 bits, 128 binary multiply-accumulates. ``float_io`` packs floats and
writes scaled floats, ``bits_io`` reads bits and writes thresholds' bits. Beside them is the inner loop alone of Larq
Compute Engine, by the same model. No core was timed: see `pipeline/cycle_model.py`. ``quick``: ``float_io`` only.
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

_MAIN = """
#include <stdio.h>
#include <stdlib.h>
{declarations}
int main(int count, char **paths) {{
  unsigned char *memory;
  if (count != 2 || posix_memalign((void **)&memory, 64, {size})) return 2;
  FILE *file = fopen(paths[1], "r+b");
  if (!file || fread(memory, 1, {size}, file) != {size}) return 2;
{calls}
  rewind(file);
  return fwrite(memory, 1, {size}, file) != {size} || fclose(file);
}}
"""


def program(mod: Any, target: Any, argument: np.ndarray, folder: Path):
    """The kernels of a Relax module as an executable that runs them once on the memory in a file.

    Returns (executable, file, kernel names, output(): what the file holds afterwards).
    """
    import tvm

    from pipeline import compiler, program, toolchain
    from pipeline.workspace import aligned

    scheduled, _, _ = compiler.scheduled(compiler.lower(mod), target, 1)
    llvm = target.tvm_target(1)
    made = program.make(scheduled, ("y",), "k", llvm, 1, target.registers * target.vector_bits // 8)
    parts = made.parts
    tvm.get_global_func("target.build.llvm")(made.module(), llvm).write_to_file(str(folder / "kernels.o"))

    (output,) = made.outputs
    held = dict.fromkeys(made.inputs, argument) | {tensor: tensor.data for tensor in made.constants}
    offsets, memory = {}, b""
    for tensor in (*held, output):
        offsets[tensor] = len(memory)
        contents = held[tensor].tobytes() if tensor in held else b""
        memory += contents.ljust(aligned(tensor.bytes), b"\0")
    scratch = len(memory)
    size = scratch + made.workspace_bytes
    (folder / "memory").write_bytes(memory.ljust(size, b"\0"))

    def place(tensor: Any) -> str:
        return f"memory + {offsets.get(tensor, scratch + tensor.offset)}"

    declarations = "".join(
        f"int {part.symbol}({', '.join(['void *'] * len(part.function.params))});\n" for part in parts
    )
    calls = "".join(
        f"  {part.symbol}({', '.join(map(place, call.tensors))});\n"
        for call in made.calls
        for part in call.kernel.parts
    )
    (folder / "main.c").write_text(_MAIN.format(declarations=declarations, calls=calls, size=size))
    tools = toolchain.find(target)
    tools.run(*tools.cc, "-std=gnu11", "-static", "-o", f"{folder}/run", f"{folder}/main.c", f"{folder}/kernels.o")

    def result() -> np.ndarray:
        values = np.fromfile(folder / "memory", output.dtype, output.elements, offset=offsets[output])
        return values.reshape(output.shape)

    return folder / "run", folder / "memory", [part.symbol for part in parts], result


def measure(core: str, case: str, variant: str, rng: np.random.Generator) -> dict[str, Any]:
    """name of a kernel -> what it executed, after its output was compared with NumPy's."""
    import targets
    from pipeline import cycle_model

    target = targets.load(core)
    mod, argument, expected = convolution(case, variant, rng)
    with tempfile.TemporaryDirectory() as folder:
        executable, memory, symbols, result = program(mod, target, argument, Path(folder))
        counts = cycle_model.count(target, executable, [str(memory)], symbols)
        if not np.array_equal(result(), expected):
            raise SystemExit(f"{core} {case} {variant}: differs from NumPy, so nothing is counted")
    return counts


def main(
    quick: Annotated[bool, typer.Option(help="Floats in and out only: about a minute.")] = False,
    core: Annotated[list[str] | None, typer.Option(help="A core; again for more. Without: all.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the counts there.")] = None,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
) -> None:
    """Check and count the kernels."""
    from pipeline import cycle_model

    rng = np.random.default_rng(seed)
    variants = VARIANTS[:1] if quick else VARIANTS
    runs = [(name, case, variant) for name in core or cycle_model.MODELS for case in CASES for variant in variants]
    rows: list[dict[str, Any]] = []
    for name, case, variant in track(runs, "counting", console=Console(stderr=True), transient=True):
        size, channels = CASES[case]
        steps = size * size * channels * channels * 9 / 128
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
    if json_ is not None:
        json_.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
