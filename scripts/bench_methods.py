"""Every method: what it stores, what it computes, and how long that takes here; the table of docs/methods.md.

    .venv/bin/python scripts/bench_methods.py [--quick] [--json FILE] [--markdown FILE]

One quantised 3x3 convolution of 256 channels at 14x14, floats in, floats out, and VGG-7 on 32x32 images, random
weights, one thread, default schedules. Each is compared with ONNX Runtime first, then all are timed in turns; but VGG-7
with residual planes is not compared: its signs depend on means, and one that a rounding flips changes all behind it.
``quick`` leaves VGG-7 out.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table


def subjects() -> dict[str, Any]:
    """label -> how it is quantised: the published methods, cross-filter forms, and stacked filters; None: float."""
    from pipeline import quantizers
    from pipeline.models import Quantize, Stacked

    found: dict[str, Any] = {"float": None}
    for name, method in quantizers.methods().items():
        found[name] = Quantize(weight=method.weight, activation=method.activation)
    found["bwn, M = 16"] = Quantize(activation="real", group=16)
    found["xnor, M = 16"] = Quantize(group=16)
    found["xnor, M = 16, K"] = Quantize(group=16, input_scale=True)
    found["dorefa 1w2a"] = Quantize(weight="dorefa", activation="dorefa", activation_options={"bits": 2})
    found["dorefa 2w2a"] = Quantize(
        weight="dorefa", weight_options={"bits": 2}, activation="dorefa", activation_options={"bits": 2}
    )
    found["twn x xnor"] = Quantize(weight="twn", activation="xnor")
    for segments, ratio in ((2, 1), (4, 2), (4, 4)):
        found[f"slbf s = {segments}, rho = {ratio}"] = Quantize(stacked=Stacked(segments, ratio, "none"))
    return found


def compiled(
    model: Any, shape: tuple[int, ...], folder: Path, rng: np.random.Generator, compare: bool = True
) -> tuple[Any, Any, Any]:
    """(inspection, file bytes, seconds(calls)) of a network, after its outputs were compared."""
    import tvm
    from tvm import relax

    import targets
    from pipeline import compiler, importer, inspection
    from pipeline.export import export
    from pipeline.packaging import oracle

    path = folder / "model.onnx"
    export(model, shape, path)
    host = targets.host()
    executable, _, _ = compiler.build(compiler.lower(importer.load(path, 1, host)), host, threads=1)
    executable.export_library(str(folder / "model.so"))
    machine = relax.VirtualMachine(executable.jit(), tvm.cpu())
    x = (rng.integers(-64, 65, (1, *shape)) / 16).astype(np.float32)
    tensor = tvm.runtime.tensor(x)
    found, expected = machine["main"](tensor).numpy(), oracle(path).run(None, {"x": x})[0]
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if compare and not error < 1e-4:
        raise SystemExit(
            f"{model}: differs from ONNX Runtime by {error:.3g} of its largest output, so nothing is timed"
        )

    def seconds(calls: int) -> float:
        return float(machine.time_evaluator("main", tvm.cpu(), number=calls, repeat=1)(tensor).mean)

    return inspection.inspect(path), path.stat().st_size, seconds


def main(
    quick: Annotated[bool, typer.Option(help="Without VGG-7, fewer rounds.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the measurements there.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table there.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and inputs.")] = 0,
) -> None:
    """Check, then time."""
    import torch
    from torch import nn

    import targets
    from pipeline import models

    console, rng = Console(), np.random.default_rng(seed)
    torch.manual_seed(seed)
    rows: dict[str, dict[str, Any]] = {}
    timers: dict[tuple[str, str], Any] = {}
    for label, quantize in track(subjects().items(), "compiling", console=Console(stderr=True), transient=True):
        conv = nn.Conv2d(256, 256, 3, 1, 1, bias=False) if quantize is None else quantize.conv2d(256, 256, 3, 1, 1)
        with tempfile.TemporaryDirectory() as folder:
            found, size, timers[label, "conv_us"] = compiled(conv.eval(), (256, 14, 14), Path(folder), rng)
        (layer,) = found.layers
        rows[label] = {
            "method": layer.method,
            "bits_per_weight": layer.bits_per_weight,
            "binary_macs": layer.binary_macs,
            "float_macs": layer.float_macs,
            "conv_file_bytes": size,
        }
        if not quick:
            with tempfile.TemporaryDirectory() as folder:
                network = models.build("vgg7", (3, 32, 32), 10, quantize).eval()
                stem = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
                stem.weight.data = (stem.weight.data * 256).round() / 256  # so that its sums are exact in any order
                _, rows[label]["vgg7_file_bytes"], timers[label, "vgg7_us"] = compiled(
                    network, (3, 32, 32), Path(folder), rng, label not in ("horq", "binarynet")
                )
    times: dict[tuple[str, str], list[float]] = {key: [] for key in timers}
    for _ in track(range(10 if quick else 30), "timing", console=Console(stderr=True), transient=True):
        for key, seconds in timers.items():
            times[key].append(seconds(2 if key[1] == "conv_us" else 1))
    for (label, what), seconds in times.items():
        rows[label][what] = float(np.median(seconds) * 1e6)

    columns = {
        "method": "method",
        "bits_per_weight": "bits / weight",
        "binary_macs": "binary MACs",
        "conv_file_bytes": "file bytes",
        "conv_us": "us",
        "vgg7_file_bytes": "VGG-7 bytes",
        "vgg7_us": "VGG-7 us",
    }
    shown = [key for key in columns if key in next(iter(rows.values()))]
    cells = [[label, *(_cell(key, row[key]) for key in shown)] for label, row in rows.items()]
    today = datetime.datetime.now(datetime.UTC).date()
    table = Table(title=f"{targets.cpu_name()}, {targets.host().name}, 1 thread, {today}", title_justify="left")
    table.add_column("")
    for key in shown:
        table.add_column(columns[key], justify="left" if key == "method" else "right")
    for row in cells:
        table.add_row(*row)
    console.print(table)
    if json_ is not None:
        json_.write_text(json.dumps([{"case": label, **row} for label, row in rows.items()], indent=2) + "\n")
    if markdown is not None:
        header = ["", *(columns[key] for key in shown)]
        lines = [header, ["---", *("---" if key == "method" else "---:" for key in shown)], *cells]
        markdown.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def _cell(key: str, value: Any) -> str:
    if key == "method":
        return value
    if key == "bits_per_weight":
        return f"{value:.3f}"
    if key == "binary_macs":
        return f"{value / 1e6:.1f} M" if value else "-"
    return f"{value:,.0f}"


if __name__ == "__main__":
    typer.run(main)
