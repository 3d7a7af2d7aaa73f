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

import targets
from pipeline import compiler, importer, inspection, models, quantizers
from pipeline.data import to_float
from pipeline.deploy import deploy
from pipeline.export import export
from pipeline.layers import QuantConv2d, QuantLinear
from pipeline.models import Quantize
from pipeline.quantizers import ResidualQuantizer
from pipeline.stacked import Scale, StackedConv2d

WEIGHTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in quantizers.weights()]
WEIGHTS += [("dorefa", {"bits": 3}), ("twn", {"per": "group"})]
ACTIVATIONS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in quantizers.activations()]
ACTIVATIONS += [("dorefa", {"bits": 3}), ("horq", {"order": 3})]
PAIRS = [(w, a) for w in WEIGHTS for a in ACTIVATIONS]


def tolerance(activation: str) -> float:
    """Of the largest output: means and sums of real numbers are taken in another order, all else is exact."""
    return 1e-5 if activation in ("horq", "binarynet", "real") else 0.0


@pytest.mark.parametrize("draw", range(len(PAIRS) // 2))
def test_a_convolution_and_a_dense_layer(draw: int, rng: np.random.Generator, tmp_path: Path) -> None:
    """Batch norm -> conv -> norm -> pool -> ReLU -> dense on shapes that hurt, every pair in one of the two layers."""
    chosen = [PAIRS[draw], PAIRS[draw + len(PAIRS) // 2]]  # of the same activations
    rng.shuffle(chosen)
    options = [
        {"weight": w, "weight_options": w_options, "activation": a, "activation_options": a_options}
        for (w, w_options), (a, a_options) in chosen
    ]
    channels, hidden = int(rng.choice([3, 31, 33])), int(rng.choice([31, 40, 64]))
    kernel, stride = int(rng.choice([1, 3])), int(rng.integers(1, 3))
    pads = tuple(int(p) for p in rng.integers(0, 3, 4))
    if chosen[0][1] == (
        "horq",
        {"order": 3},
    ):  # half a window of zeros leaves a residual of 0, whose sign is rounding's
        pads = (0, 0, 0, 0)
    model = nn.Sequential(
        nn.BatchNorm2d(channels),
        QuantConv2d(channels, hidden, kernel, stride, pads, bias=True, **options[0]),  # type: ignore[arg-type]
        nn.BatchNorm2d(hidden),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(1),
    )
    x = dyadic(rng, (2, channels, 7, 6))
    features = model[:6](torch.from_numpy(x)).shape[1]
    model[6] = QuantLinear(features, 10, **options[1])  # type: ignore[arg-type]
    print(model)
    results = outputs(randomise(model, rng), x, tmp_path)
    assert np.isfinite(results[0]).all()
    within = max(tolerance(activation) for _, (activation, _) in chosen) * np.abs(results[0]).max()
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=0, atol=within)


@pytest.mark.parametrize("activation", [name for name, kind in quantizers.activations().items() if kind.code])
def test_codes_of_zeros_infinities_and_nan(activation: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """The body in the file, and the compiled pattern, against torch's formula."""
    layer = QuantConv2d(40, 8, 1, activation=activation)
    if isinstance(layer.activation_quantizer, ResidualQuantizer):
        pytest.skip("its planes are BinarySign's, and its scales means, of which a NaN leaves nothing")
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 0.5, -0.5, 1.0, -1.0, 0.4 * (2 / np.pi) ** 0.5]
    x = np.where(rng.random((2, 40, 5, 4)) < 0.5, rng.choice(special, (2, 40, 5, 4)), rng.normal(0, 1, (2, 40, 5, 4)))
    assert_identical(layer.eval(), x.astype(np.float32), tmp_path)


@pytest.mark.parametrize("activation", ["xnor", "real", "tbn"])
def test_first_and_last_layer(activation: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """An 8-bit image as bytes or as bit planes; on all images that there are, exactly."""
    quantize, first = Quantize(activation=activation, group=4, first=True, last=True), int(rng.choice([27, 32]))
    widths = (first, 33, 64)
    model = randomise(models.build("vgg_small", (3, 8, 8), 10, quantize, widths=widths, pool_after=(0, 2)), rng)
    images = torch.from_numpy(rng.integers(0, 256, (2, 3, 8, 8)).astype(np.uint8))
    by_torch, *others = outputs(model, to_float(images).numpy(), tmp_path)
    assert by_torch.std() > 0
    for other in others:
        np.testing.assert_allclose(other, by_torch, rtol=0, atol=1e-5 * np.abs(by_torch).max())
    layers = inspection.inspect(tmp_path / "model.onnx").layers
    assert all(layer.method != "float" for layer in layers)
    assert layers[0].method == ("1w32a/4" if activation == "real" else "1w8a/4")


def test_sums_that_float32_cannot_hold_are_refused() -> None:
    layer = QuantConv2d(3072, 8, 5, weight="dorefa", weight_options={"bits": 8}, activation="pixels")
    with pytest.raises(ValueError, match=r"sums may reach 4993920000, and float32 holds integers only to 2\^24"):
        deploy(layer)


def test_stacked_filters_of_real_activations_are_refused(tmp_path: Path) -> None:
    layer = StackedConv2d(64, 32, 3, segments=2, bank=4, activation="real")
    export(layer, (64, 5, 5), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="stacked filters with real activations are not compiled: quantise the act"):
        importer.load(tmp_path / "model.onnx", 1, targets.host())


def test_a_library_holds_the_bank_and_not_its_filters(tmp_path: Path) -> None:
    sizes = {}
    for name, layer in (
        ("filters", QuantConv2d(512, 512, 3)),
        ("expanded", StackedConv2d(512, 512, 3, segments=16, bank=128)),
        ("selected", StackedConv2d(512, 512, 3, segments=2, bank=64)),
    ):
        export(layer, (512, 4, 4), tmp_path / "model.onnx")
        host = targets.host()
        lowered = compiler.lower(importer.load(tmp_path / "model.onnx", 1, host))
        executable, _, _ = compiler.build(lowered, host, 1)
        executable.export_library(str(tmp_path / f"{name}.so"))
        sizes[name] = (tmp_path / f"{name}.so").stat().st_size
    print(sizes)
    assert sizes["filters"] > 512 * 512 * 9 / 8
    assert max(sizes["expanded"], sizes["selected"]) < 512 * 512 * 9 / 8 / 2


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
