"""scripts/openvino_network.py: OpenVINO computes what our file says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import models
from pipeline.export import export
from pipeline.models import GlobalAverage, first_conv2d, resnet18
from pipeline.packaging import golden_pair


def randomise(model: nn.Module, rng: np.random.Generator) -> nn.Module:
    """Norms of any sign, but none that makes an exact 0, whose sign OpenVINO takes for -1."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            count = norm.num_features
            norm.weight.data = torch.tensor(rng.choice([-1, 1], count) * rng.uniform(0.5, 1.5, count)).float()
            norm.bias.data = torch.tensor(rng.normal(0, 0.3, count)).float()
            norm.running_mean = torch.tensor(rng.normal(0, 0.5, count)).float()
            norm.running_var = torch.tensor(rng.uniform(0.1, 3, count)).float()
    return model.eval()


@pytest.mark.parametrize("first", [False, True])
def test_the_same_scores(
    first: bool, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install openvino")
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "scripts"), *sys.path])
    import openvino_network

    quantize = models.Quantize(group=int(rng.choice([1, 16])), first=first)
    blocks = (resnet18.Block(32, 32, 1, quantize), resnet18.Block(32, 64, 2, quantize))
    stem = (first_conv2d(3, 32, 7, quantize, stride=2, padding=3), nn.MaxPool2d(3, 2, 1))
    head = (nn.BatchNorm2d(64), nn.ReLU(), GlobalAverage(), nn.Linear(64, 10))
    path = tmp_path / "model.onnx"
    export(randomise(nn.Sequential(*stem, *blocks, *head), rng), (3, 32, 32), path)
    (image,), (expected,) = (tuple(pairs.values()) for pairs in golden_pair(path, 1))
    run, seconds = openvino_network.compiled(openvino_network.binary(path, image.shape), threads=1)
    np.testing.assert_allclose(run(image), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert seconds(2) > 0


def test_what_it_does_not_have_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install openvino")
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "scripts"), *sys.path])
    import openvino_network

    export(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sigmoid()), (1, 4, 4), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="Sigmoid: no operator of OpenVINO stands for it here"):
        openvino_network.binary(tmp_path / "model.onnx", (1, 1, 4, 4))
