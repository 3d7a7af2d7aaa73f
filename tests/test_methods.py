"""Every pair of a weight and an activation quantiser: torch == ONNX Runtime == compiled code, bit for bit.

A new file in `pipeline.quantizers` joins by existing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from networks import assert_identical, dyadic, outputs, randomise
from torch import nn

from pipeline import quantizers
from pipeline.layers import QuantConv2d, QuantLinear
from pipeline.stacked import Scale, StackedConv2d

WEIGHTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in quantizers.weights()]
WEIGHTS += [("dorefa", {"bits": 3}), ("twn", {"per": "group"})]
ACTIVATIONS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in quantizers.activations()]
ACTIVATIONS += [("dorefa", {"bits": 3}), ("horq", {"order": 3})]
PAIRS = [
    pytest.param(w, a, id=" ".join(map(str, (w[0], *w[1].values(), "x", a[0], *a[1].values()))))
    for w in WEIGHTS
    for a in ACTIVATIONS
]


def tolerance(activation: str) -> float:
    """Of the largest output: means and sums of real numbers are taken in another order, all else is exact."""
    return 1e-5 if activation in ("horq", "binarynet", "real") else 0.0


@pytest.mark.parametrize(("weight", "activation"), PAIRS)
def test_a_convolution_and_a_dense_layer(
    weight: tuple[str, dict[str, Any]], activation: tuple[str, dict[str, Any]], rng: np.random.Generator, tmp_path: Path
) -> None:
    """Batch norm -> conv -> norm -> ReLU -> conv -> dense on shapes that hurt."""
    options = {
        "weight": weight[0],
        "weight_options": weight[1],
        "activation": activation[0],
        "activation_options": activation[1],
    }
    channels, hidden = int(rng.choice([3, 31, 33])), int(rng.choice([31, 40, 64]))
    kernel, stride = int(rng.choice([1, 3])), int(rng.integers(1, 3))
    pads = tuple(int(p) for p in rng.integers(0, 3, 4))
    if activation == ("horq", {"order": 3}):  # half a window of zeros leaves a residual of 0, whose sign is rounding's
        pads = (0, 0, 0, 0)
    model = nn.Sequential(
        nn.BatchNorm2d(channels),
        QuantConv2d(channels, hidden, kernel, stride, pads, bias=True, **options),  # type: ignore[arg-type]
        nn.BatchNorm2d(hidden),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(1),
    )
    x = dyadic(rng, (2, channels, 7, 6))
    features = model[:6](torch.from_numpy(x)).shape[1]
    model[6] = QuantLinear(features, 10, **options)  # type: ignore[arg-type]
    print(model)
    results = outputs(randomise(model, rng), x, tmp_path)
    assert np.isfinite(results[0]).all()
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=0, atol=tolerance(activation[0]) * np.abs(results[0]).max())


@pytest.mark.parametrize("activation", ["xnor", "tbn", "dorefa"])
@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("segments", [1, 2, 5])
def test_stacked_filters(
    segments: int, scale: Scale, activation: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Segments that fill no word and such that do, selected (large ones) and expanded."""
    d, bank, filters = int(rng.choice([3, 32, 40, 96])), int(rng.choice([2, 5, 16])), int(rng.choice([31, 64]))
    layer = StackedConv2d(
        segments * d,
        filters,
        (3, int(rng.choice([1, 3]))),
        int(rng.integers(1, 3)),
        tuple(int(p) for p in rng.integers(0, 3, 4)),  # type: ignore[arg-type]
        bias=bool(rng.integers(2)),
        segments=segments,
        bank=bank,
        scale=scale,
        activation=activation,
        **({"group": 4} if scale == "filter" else {}),
    )
    model = nn.Sequential(
        nn.BatchNorm2d(segments * d), layer, nn.BatchNorm2d(filters), QuantConv2d(filters, 8, 1, activation="xnor")
    )
    print(model)
    assert_identical(randomise(model, rng), dyadic(rng, (2, segments * d, 7, 6)), tmp_path)
