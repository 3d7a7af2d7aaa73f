"""ResNet-18 with cross-filter binary convolutions next to other runtimes and to what the core can do: checked, timed.

    .venv/bin/python scripts/bench_resnet18.py [--first-8-bit] [--threads N] [--records DIR] [--json FILE]

Random weights, 224x224, batch 1: ImageNet stem, shortcuts and last layer float, sixteen binary convolutions with one
scale for 16 filters; with ``--first-8-bit`` the stem is binary too, on 8-bit images. OpenVINO (`pip install openvino`)
runs the same graph with its own binary convolutions. The float twin runs in ONNX Runtime, and quantised to 8 bits there
and in OpenVINO. Writes {"crossbit_ms": .., "peers_ms": {name: ..}}.

The limit is what the network's multiply-accumulates would take alone: floats, bits and bytes at the core's ceilings
(`pipeline/ceiling.c`); with several threads, divided by their number.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import targets
from pipeline import artifact, bench, ceiling, models, packaging, session, tune
from pipeline.export import export

SHAPE, CLASSES = (3, 224, 224), 1000
LEAST_COSINE = 0.98  # of the scores of an 8-bit network and its float twin

Timers = dict[str, Callable[[int], float]]


def network(quantize: models.Quantize | None, path: Path) -> None:
    """Export a ResNet-18 whose norms have seen a batch."""
    model: nn.Module = models.build("resnet18", SHAPE, CLASSES, quantize, stem="imagenet").train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, *SHAPE))
    export(model.eval(), SHAPE, path)


def quantised(path: Path, images: list[np.ndarray], to: Path) -> None:
    """Write the 8-bit twin of an ONNX file: convolutions and dense layer of uint8 and int8, int8 scales per channel."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(({"x": image} for image in self.left), None)

    logging.getLogger().setLevel(logging.ERROR)  # it advises a preparation that changes nothing here
    quantization.quantize_static(
        path,
        to,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Gemm"],  # with sums and pools both runtimes are as fast or slower
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def openvino_peers(binary: Path, int8: Path, golden: Path, scores: np.ndarray, threads: int) -> Timers:
    """OpenVINO's networks, after both were checked.

    Args:
        golden: an artifact of ``binary``. Its input is far from all thresholds; elsewhere one flipped sign changes all.
        scores: of the float twin for that input.
    """
    import openvino_network as openvino

    (image,), (expected,) = (tuple(pairs.values()) for pairs in artifact.golden(golden))
    run, seconds = openvino.compiled(openvino.binary(binary, image.shape), threads)
    if not (error := np.abs(run(image) - expected).max() / np.abs(expected).max()) < packaging.TOLERANCE:
        raise SystemExit(f"OpenVINO, binary: {error:.3g} of the largest score off our file: nothing is timed")
    timers = {"OpenVINO, binary": seconds}
    run, timers["OpenVINO, int8 twin"] = openvino.compiled(openvino.read(int8, image.shape), threads)
    if not (cosine := _cosine(run(image), scores)) > LEAST_COSINE:
        raise SystemExit(f"OpenVINO, int8 twin: cosine {cosine:.4f} with the float twin: nothing is timed")
    return timers


def limit_ms(manifest: artifact.Manifest, rates: dict[ceiling.Kind, float], threads: int) -> float:
    """What the multiply-accumulates of a network take at ``rates`` a second and core; of floats those of its layers,
    for kernels sum some rows of a stem twice."""
    floats = sum(layer.float_macs for layer in manifest.layers) / rates["float"]
    codes = sum(call.macs / rates[call.kind] for call in manifest.calls if call.kind not in ("", "float"))
    return (floats + codes) / threads * 1000


def main(
    first_8_bit: Annotated[bool, typer.Option(help="Binary weights and 8-bit images in the stem, too.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Of every subject.")] = 1,
    records: Annotated[Path | None, typer.Option(help="Root of tuning records; default: none.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Of all subjects in turn.")] = 30,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the measurements there.")] = None,
) -> None:
    """Build, check, time."""
    console, target = Console(), targets.host()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        binary, twin, int8, folder = (Path(name) / file for file in ("binary.onnx", "float.onnx", "int8.onnx", "lib"))
        network(models.Quantize(group=16, first=first_8_bit), binary)
        network(None, twin)
        quantised(twin, [rng.standard_normal((1, *SHAPE), np.float32) for _ in range(4)], int8)
        own_records = tune.records_folder(records, target, threads) if records else None
        manifest = packaging.compile_network(binary, folder, target, threads, records=own_records)
        image = artifact.golden(folder)[0]
        scores = packaging.oracle(twin).run(None, image)[0]
        if not (cosine := _cosine(packaging.onnxruntime(int8, threads).run(None, image)[0], scores)) > LEAST_COSINE:
            raise SystemExit(f"ONNX Runtime, int8 twin: cosine {cosine:.4f} with the float twin: nothing is timed")

        timers: Timers = {"crossbit": bench.artifact_subject(session.open_session(folder), threads).seconds}
        files = {"onnxruntime fp32": twin, "onnxruntime int8": int8, "onnxruntime, binary file": binary}
        timers |= {peer: bench.onnx_subject(path, threads, batch=1).seconds for peer, path in files.items()}
        if importlib.util.find_spec("openvino") is not None:
            timers |= openvino_peers(binary, int8, folder, scores, threads)
        else:
            console.print("OpenVINO is not installed, and its rows are missing: pip install openvino")
        loops = ceiling.loops(target)
        rates: dict[ceiling.Kind, list[float]] = {kind: [] for kind in loops}

        def measure_ceilings(_done: int, _total: int) -> None:
            for kind, loop in loops.items():
                rates[kind].append(loop())

        seconds = bench.in_turns(list(timers.values()), threads, rounds, measure_ceilings)
        sizes = {"crossbit": manifest.files["model.so"].bytes}
        sizes |= {peer: path.stat().st_size for peer, path in files.items()}
    ours, *others = (float(np.median(times)) * 1000 for times in seconds)
    summary = {"crossbit_ms": ours, "peers_ms": dict(zip(list(timers)[1:], others, strict=True))}
    limit = limit_ms(manifest, {kind: float(np.median(found)) for kind, found in rates.items()}, threads)
    stem = "8-bit" if first_8_bit else "float"
    title = f"{targets.cpu_name()}, {target.name}, {threads} thread(s), {stem} stem, {manifest.created}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("ms", "/ crossbit", "/ limit", "bytes"):
        table.add_column(column, justify="right")
    for peer, ms in {"crossbit": ours, **summary["peers_ms"], "limit": limit}.items():
        size = f"{sizes[peer]:,}" if peer in sizes else ""
        table.add_row(peer, f"{ms:.2f}", f"{ms / ours:.2f}", f"{ms / limit:.2f}", size)
    console.print(table)
    if json_ is not None:
        json_.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
