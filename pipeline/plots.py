"""Figures that commands write to PNG files; matplotlib is imported where one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pipeline import cost
from pipeline.similarity import LayerScales

if TYPE_CHECKING:
    from pipeline.cost_measured import Point

BLUE, GREY, RED = "#1b6ca8", "#8c8c8c", "#c0392b"
_COLOURS = {1: "#1b6ca8", 3: "#c0392b", 5: "#2e8b57"}  # by kernel


def dress(axes: Any, title: str, x: str, y: str = "") -> None:
    """The look of every plot."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _doubling_axis(axes: Any, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(c) for c in ticks])
    axes.minorticks_off()


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=130)


def speedups(file: Path, word: int, group: int, measured: Sequence[Point] = (), cpu: str = "") -> None:
    """Eq 17 over channels, kernels 1, 3, 5, M = 1 and ``group``; beside it what was measured, on its own scale."""
    from matplotlib.figure import Figure

    panels = 2 if measured else 1
    figure = Figure(figsize=(5.6 * panels, 3.8), layout="constrained")
    axes, *others = figure.subplots(1, panels, squeeze=False)[0]
    channels = [2**i for i in range(4, 11)]
    for kernel, colour in _COLOURS.items():
        for m, style in {1: "--", group: "-"}.items():
            values = [cost.speedup(c, kernel, word, m) for c in channels]
            axes.plot(channels, values, style, color=colour, label=f"{kernel}x{kernel}, M = {m}", linewidth=1.5)
    axes.axhline(cost.GAMMA * word, color=GREY, linewidth=0.8, linestyle=":")
    axes.text(channels[0], cost.GAMMA * word, "limit, gamma L", color=GREY, fontsize=8, va="bottom")
    dress(axes, f"model: operations counted, eq 17, L = {word}", "channels", "times faster than float")
    _doubling_axis(axes, channels)
    axes.set_ylim(0)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    for panel in others:
        ticks = sorted({p.channels for p in measured})
        for m, mark, style in zip(sorted({p.group for p in measured}), ("o", "x"), ("--", "-"), strict=False):
            points = [p for p in measured if p.group == m]
            ours, theirs = [p.speedup for p in points], [p.onnxruntime_us / p.binary_us for p in points]
            for gains, baseline, colour in ((ours, "ours", BLUE), (theirs, "ONNX Runtime's", GREY)):
                label = f"M = {m}, over {baseline}"
                panel.plot(ticks, gains, mark + style, color=colour, label=label, markersize=8, markerfacecolor="none")
        kernel = measured[0].kernel
        dress(
            panel, f"measured: XNOR {kernel}x{kernel} at 14x14, 1 thread\n{cpu}", "channels", "times faster than float"
        )
        _doubling_axis(panel, ticks)
        panel.set_ylim(0)
        panel.legend(fontsize=8, frameon=False)
    _save(figure, file)


def similarity(file: Path, layers: Sequence[LayerScales], chosen: Mapping[str, int] = MappingProxyType({})) -> None:
    """A histogram of every layer's filter-wise scales, and the price of sharing over M; ``chosen`` M are marked."""
    from matplotlib.figure import Figure

    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(max(6.4, 2.6 * columns), 1.9 * rows + 3.4), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.9 * rows, 3.4))[:, 0]
    grid = above.subplots(rows, columns, squeeze=False).flat
    for axes, layer in zip(grid, layers, strict=False):
        axes.hist(layer.scales, bins=min(30, max(5, len(layer.scales) // 4)), color=BLUE)
        axes.axvline(layer.scales.mean(), color=RED, linewidth=1)
        dress(axes, f"layer {layer.name}, {len(layer.scales)} filters", "", "")
        axes.locator_params(nbins=4)
    for axes in list(grid):
        axes.set_visible(False)
    above.supxlabel("filter-wise scale, mean in red", fontsize=9)
    above.supylabel("filters", fontsize=9)

    axes = below.subplots()
    for i, layer in enumerate(layers):
        shade = _shade(i, len(layers))
        prices = {m: 100 * layer.relative_price(m) for m in layer.groups()}
        axes.plot(list(prices), list(prices.values()), "-o", color=shade, label=layer.name, markersize=3, linewidth=1.2)
        if layer.name in chosen:
            m = min(chosen[layer.name], len(layer.scales))
            axes.plot(m, 100 * layer.relative_price(m), "o", color=shade, markersize=10, markerfacecolor="none")
    title = "price of sharing a scale" + (", chosen M circled" if chosen else "")
    dress(axes, title, "M, filters that share a scale", "% of the weights' energy")
    _doubling_axis(axes, sorted({m for layer in layers for m in layer.groups()}))
    axes.set_ylim(0)
    axes.legend(
        title="layer",
        title_fontsize=8,
        fontsize=8,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1, 1),
        ncols=-(-len(layers) // 10),
    )
    _save(figure, file)


def _shade(i: int, count: int) -> Any:
    """Colours from the first layer to the last, dark to light."""
    from matplotlib import colormaps

    return colormaps["viridis"](i / max(1, count - 1) * 0.85)
