"""ResNet-18 with cross-filter binary convolutions next to its float twin in ONNX Runtime: checked, then timed.

    .venv/bin/python scripts/bench_resnet18.py [--threads N] [--records DIR] [--json FILE]

Random weights, 224x224, batch 1: ImageNet stem, shortcuts and last layer float, sixteen binary convolutions with one
scale for 16 filters. Writes {"crossbit_ms": .., "peers_ms": {name: ..}}.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn

import targets
from pipeline import models, packaging, tune
from pipeline.bench import bench
from pipeline.export import export

SHAPE, CLASSES = (3, 224, 224), 1000


def network(quantize: models.Quantize | None, path: Path) -> None:
    """Export a ResNet-18 whose norms have seen a batch."""
    model: nn.Module = models.build("resnet18", SHAPE, CLASSES, quantize, stem="imagenet").train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, *SHAPE))
    export(model.eval(), SHAPE, path)


def main(
    threads: Annotated[int, typer.Option(min=1, help="Of every subject.")] = 1,
    records: Annotated[Path | None, typer.Option(help="Root of tuning records; default: none.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Of all subjects in turn.")] = 30,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the measurements there.")] = None,
) -> None:
    """Build, check, time."""
    console, target = Console(), targets.host()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network(models.Quantize(group=16), folder / "binary.onnx")
        network(None, folder / "float.onnx")
        own_records = tune.records_folder(records, target, threads) if records else None
        artifact = folder / "artifact"
        manifest = packaging.compile_network(folder / "binary.onnx", artifact, target, threads, records=own_records)
        peers = {"onnxruntime fp32": folder / "float.onnx", "onnxruntime, binary file": folder / "binary.onnx"}
        result = bench([artifact], list(peers.values()), threads, rounds)
        sizes = {"crossbit": manifest.files["model.so"].bytes}
        sizes |= {peer: path.stat().st_size for peer, path in peers.items()}
    ours, *others = (measurement.median_us / 1000 for measurement in result.measurements)
    summary = {"crossbit_ms": ours, "peers_ms": dict(zip(peers, others, strict=True))}
    console.print(f"{result.cpu}, {target.name}, {threads} thread(s), {result.date}")
    for peer, ms in {"crossbit": ours, **summary["peers_ms"]}.items():
        console.print(f"{peer:28} {ms:8.2f} ms  {ms / ours:5.2f} x  {sizes[peer]:>12,} bytes", highlight=False)
    if json_ is not None:
        json_.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
