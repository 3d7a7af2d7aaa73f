"""What kernels have to do, by formulas of their own, and that those are the kernels that run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import randomise
from torch import nn

import targets
from pipeline import artifact, compiler, importer, models, work
from pipeline.artifact import Call
from pipeline.export import export
from pipeline.layers import QuantConv2d, QuantLinear
from pipeline.models import resnet18
from pipeline.packaging import compile_network
from pipeline.session import Session


def calls(model: nn.Module, shape: tuple[int, ...], batch: int, folder: Path, target: str = "host") -> tuple[Call, ...]:
    export(model.eval(), shape, folder / "model.onnx")
    chosen = targets.load(target)
    return work.calls(compiler.lower(importer.load(folder / "model.onnx", batch, chosen)))


def multiplying(found: tuple[Call, ...]) -> list[Call]:
    return [call for call in found if call.macs]


def filled(count: int, whole: int = 32) -> int:
    return -(-count // whole) * whole


# Arguments, planes of activations, of weights, and stored of weights (one a mask).
METHODS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "xnor": ({}, 1, 1, 1),
    "dorefa 2w3a": (
        {
            "weight": "dorefa",
            "weight_options": {"bits": 2},
            "activation": "dorefa",
            "activation_options": {"bits": 3},
        },
        3,
        2,
        2,
    ),
    "twn x xnor": ({"weight": "twn"}, 1, 1, 2),
}


@pytest.mark.parametrize("target", ["host", "x86-avx512", "cortex-a72"])
@pytest.mark.parametrize("method", METHODS)
def test_a_convolution_of_codes(method: str, target: str, rng: np.random.Generator, tmp_path: Path) -> None:
    arguments, x_planes, w_planes, stored = METHODS[method]
    batch, channels, filters = int(rng.integers(1, 3)), int(rng.integers(1, 100)), int(rng.integers(1, 100))
    h, w, pad = int(rng.integers(5, 9)), int(rng.integers(5, 9)), int(rng.integers(2))
    layer = QuantConv2d(channels, filters, 3, padding=pad, **arguments)
    (sums,) = multiplying(calls(layer, (channels, h, w), batch, tmp_path, target))
    pixels = batch * (h + 2 * pad - 2) * (w + 2 * pad - 2)
    assert (sums.kind, sums.macs) == ("binary", pixels * filters * 9 * filled(channels) * x_planes * w_planes)
    plane = filled(channels) // 8  # bytes of a pixel
    borders = 9 if pad and x_planes == 1 else 1  # a code that has a 0 needs no correction beside the image
    constants = 9 * plane * stored * filters + 4 * filters * (borders + 1)  # the last are scales
    assert sums.bytes == batch * h * w * plane * x_planes + constants + 4 * pixels * filters


def test_bits_fill_up_words_of_filters(rng: np.random.Generator, tmp_path: Path) -> None:
    channels, filters = int(rng.integers(1, 70)), int(rng.integers(1, 70))
    model = nn.Sequential(QuantConv2d(channels, filters, 1), nn.BatchNorm2d(filters), QuantConv2d(filters, 8, 1))
    bits, last = multiplying(calls(randomise(model, rng), (channels, 4, 5), 1, tmp_path, "cortex-a72"))
    assert bits.macs == 20 * filled(filters) * filled(channels)
    assert last.macs == 20 * 8 * filled(filters)
    words, outputs = filled(channels) // 8, filled(filters) // 8
    assert bits.bytes == 20 * (words + outputs) + (words + 4) * filled(filters)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_float_convolution(groups: int, rng: np.random.Generator, tmp_path: Path) -> None:
    batch, channels = int(rng.integers(1, 3)), groups * int(rng.integers(1, 20))
    filters = groups * int(rng.integers(1, 31 // groups))  # fewer than fill up a block of 32
    stride = int(rng.integers(1, 3))
    layer = nn.Conv2d(channels, filters, (3, 2), stride, groups=groups, bias=False)
    (sums,) = multiplying(calls(layer, (channels, 9, 8), batch, tmp_path))
    pixels = batch * ((9 - 3) // stride + 1) * ((8 - 2) // stride + 1)
    weights = 6 * channels // groups * filters
    assert (sums.kind, sums.macs) == ("float", pixels * weights)
    assert sums.bytes == 4 * (batch * 72 * channels + weights + pixels * filters)


def test_layers_of_vectors(rng: np.random.Generator, tmp_path: Path) -> None:
    batch, features = int(rng.integers(1, 4)), int(rng.integers(1, 100))
    (dense,) = calls(nn.Linear(features, 40), (features,), batch, tmp_path)
    assert dense == Call(
        kernel=dense.kernel,
        kind="float",
        macs=batch * features * 40,
        bytes=4 * (batch * features + 40 * features + 40 + batch * 40),
    )
    (real,) = multiplying(calls(QuantLinear(features, 40, activation="real"), (features,), batch, tmp_path))
    assert (real.kind, real.macs) == ("float", batch * features * filled(40))


def test_moves_and_pools_multiply_nothing(rng: np.random.Generator, tmp_path: Path) -> None:
    model = nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.ReLU(), nn.Flatten(), nn.Softmax(1))
    found = calls(model, (int(rng.integers(2, 9)), 8, 8), 1, tmp_path)
    assert found and all((c.kind, c.macs) == ("", 0) and c.bytes > 0 for c in found)


def test_a_gpu_multiplies_as_much(rng: np.random.Generator, tmp_path: Path) -> None:
    """But its windows are filled up to 256 bits, not each tap to words."""
    channels, filters = 64 * int(rng.integers(1, 4)), int(rng.integers(1, 100))
    (gpu,) = multiplying(calls(QuantConv2d(channels, filters, 3), (channels, 6, 6), 1, tmp_path, "cuda-sm80"))
    assert (gpu.kind, gpu.macs) == ("binary", 16 * filters * filled(9 * channels, 256))


@pytest.mark.parametrize("threads", [1, 2])
def test_these_are_the_kernels_that_run(threads: int, rng: np.random.Generator, tmp_path: Path) -> None:
    """Reshapes among them, of what has one channel or one pixel and of what has more."""
    channels, side = int(rng.choice([1, 3])), int(rng.choice([4, 8]))
    block = resnet18.Block(32, 64, 2, models.Quantize(group=16))
    tail = (nn.Flatten(), nn.Linear(side**2 * 16, 10))
    model = nn.Sequential(nn.Conv2d(channels, 32, 3, 1, 1), block, *tail)
    export(randomise(model, rng), (channels, side, side), tmp_path / "model.onnx")
    manifest = compile_network(tmp_path / "model.onnx", tmp_path / "lib", targets.host(), threads)
    timed = Session(tmp_path / "lib").kernel_seconds(artifact.golden(tmp_path / "lib")[0], 1)
    assert [key.split()[1] for key in timed] == [call.kernel for call in manifest.calls]
    for kind in ("binary", "float"):
        in_layers = sum(layer.binary_macs if kind == "binary" else layer.float_macs for layer in manifest.layers)
        assert sum(call.macs for call in manifest.calls if call.kind == kind) == in_layers > 0
    assert sum(call.bytes for call in manifest.calls) > sum(layer.stored_bytes for layer in manifest.layers)
