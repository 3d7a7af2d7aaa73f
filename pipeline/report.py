"""One self-contained HTML page of what crossbit left below a folder: accuracy, size, latency, layers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline import inspection, plots
from pipeline.artifact import MANIFEST, Manifest
from pipeline.bench import Bench, Measurement

T = TypeVar("T")
_COLOURS = {"float": "#8c8c8c", "onnxruntime": "#8c8c8c", "crossbit": "#1b6ca8", "binary": "#1b6ca8"}


@dataclass(frozen=True)
class Training:
    """A training folder: what `crossbit train` measured, and the ONNX file beside it if there is one."""

    name: str
    method: str
    accuracy: float
    compiled_accuracy: float | None
    seconds: float
    epochs: list[dict[str, Any]]
    inspection: inspection.Inspection | None


def write(folder: Path, path: Path) -> None:
    """Write the page.

    Raises:
        ValueError: nothing of crossbit's lies below the folder.
    """
    from jinja2 import Environment, PackageLoader, select_autoescape

    trainings = [_read(file, _training) for file in sorted(folder.rglob("result.json"))]
    bench_file = folder / "bench.json"
    bench = _read(bench_file, lambda f: Bench.model_validate_json(f.read_text())) if bench_file.is_file() else None
    artifacts = [
        (str(file.parent.relative_to(folder)), _read(file, lambda f: Manifest.model_validate_json(f.read_text())))
        for file in sorted(folder.rglob(MANIFEST))
    ]
    if not (trainings or bench or artifacts):
        raise ValueError(f"{folder}: holds no result.json, bench.json or {MANIFEST}; train, compile or bench first")
    environment = Environment(loader=PackageLoader("pipeline", ""), autoescape=select_autoescape())
    page = environment.get_template("report.html").render(
        title=folder.name,
        trainings=trainings,
        bench=bench,
        slowest=max((m.median_us for m in bench.measurements), default=0.0) if bench else 0.0,
        artifacts=artifacts,
        plots=[*_training_plots(trainings), *([_latency_plot(bench.measurements)] if bench else [])],
    )
    path.write_text(page)


def _read(file: Path, parse: Callable[[Path], T]) -> T:
    try:
        return parse(file)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: this crossbit did not write it; move it out of the folder") from error


def _training(file: Path) -> Training:
    result = json.loads(file.read_text())
    model = file.parent / "model.onnx"
    verified = [json.loads(f.read_text()) for f in sorted(file.parent.glob("*.verify.json"))]
    return Training(
        result["name"],
        result["method"],
        result["accuracy"],
        verified[-1]["accuracy"] if verified else None,
        result["seconds"],
        result["epochs"],
        inspection.inspect(model) if model.is_file() else None,
    )


def _png(figure: Any) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110, bbox_inches="tight")
    return base64.b64encode(stream.getvalue()).decode()


def _axes(title: str, label: str, size: tuple[float, float] = (6.0, 3.0)) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    plots.dress(axes, title, label)
    return figure, axes


def _bars(title: str, label: str, rows: Sequence[tuple[str, float, str]], written: str) -> str:
    """Horizontal bars: (name, value, colour key)."""
    figure, axes = _axes(title, label, (6.0, 0.8 + 0.4 * len(rows)))
    names, values, kinds = zip(*reversed(rows), strict=True)
    bars = axes.barh(names, values, color=[_COLOURS[kind] for kind in kinds])
    axes.bar_label(bars, labels=[written.format(v) for v in values], padding=3, fontsize=8)
    axes.margins(x=0.15)
    return _png(figure)


def _training_plots(trainings: list[Training]) -> list[str]:
    if not trainings:
        return []
    figure, axes = _axes("test accuracy while training", "epoch")
    for training in trainings:
        accuracies = [100 * epoch["test"] for epoch in training.epochs]
        axes.plot(range(1, len(accuracies) + 1), accuracies, label=f"{training.name} ({training.method})")
    axes.set_ylabel("%", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    plots = [_png(figure)]
    sized = [(t, t.inspection) for t in trainings if t.inspection is not None]
    if sized:
        rows = [(t.name, i.file_bytes / 1000, "float" if t.method == "float" else "binary") for t, i in sized]
        plots.append(_bars("size of the ONNX file", "kB", rows, "{:.1f}"))
    return plots


def _latency_plot(measurements: tuple[Measurement, ...]) -> str:
    rows = [(m.name, m.median_us, m.runtime) for m in measurements]
    return _bars("latency, median of one run", "microseconds", rows, "{:.1f}")
