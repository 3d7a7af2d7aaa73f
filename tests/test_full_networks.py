"""The five networks of the papers at full size: torch == ONNX Runtime == compiled code, and the bytes that are stored.

Weights are random. Float sums are made exact in any order, or else one activation at its threshold would decide: float
filters have few dyadic entries, the shortcuts' 1x1 filters one power of two each.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from networks import dyadic, outputs, randomise
from onnx import numpy_helper
from torch import nn

from pipeline import inspection, models
from pipeline.layers import QuantConv2d, QuantLinear
from pipeline.models import Quantize
from pipeline.stacked import StackedConv2d

NETWORKS = {
    "nin": ((3, 32, 32), 10, {}),
    "vgg7": ((3, 32, 32), 10, {}),
    "vgg16": ((3, 32, 32), 10, {}),
    "resnet18": ((3, 224, 224), 1000, {"stem": "imagenet"}),
    "alexnet": ((3, 227, 227), 1000, {}),
}
METHODS = {
    "xnor-cf16": Quantize(group=16),
    "tbn-cf4": Quantize(activation="tbn", group=4),
    "dorefa-1w2a": Quantize(weight="dorefa", activation="dorefa", activation_options={"bits": 2}),
    "slbf": Quantize(stacked=models.Stacked(segments=4, bank_ratio=2)),
}


def exact(model: nn.Module, rng: np.random.Generator) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.Conv2d and module.kernel_size == (1, 1):
            one = np.zeros(tuple(module.weight.shape), np.float32)
            chosen = rng.choice([-1, 0.5, 1], len(one))
            one[np.arange(len(one)), rng.integers(0, one.shape[1], len(one)), 0, 0] = chosen
            module.weight.data = torch.from_numpy(one)
        elif type(module) in (nn.Conv2d, nn.Linear):
            module.weight.data = torch.from_numpy(dyadic(rng, tuple(module.weight.shape)))
    return randomise(model, rng)


def stored_bits(model: nn.Module) -> int:
    """What the methods' formulas count: bits of codes, 32 of every scale; indices of stacked filters."""
    bits = 0
    for layer in model.modules():
        if isinstance(layer, StackedConv2d):
            bits += layer.encode().bits()
        elif isinstance(layer, QuantConv2d | QuantLinear):
            weight = layer.weight_quantizer.encode(layer.weight)
            bits += weight.codes.numel() * weight.code.bits + 32 * weight.scale.numel()
    return bits


CASES = [(network, "xnor-cf16") for network in NETWORKS]
CASES += [("vgg7", "tbn-cf4"), ("nin", "dorefa-1w2a"), ("resnet18", "slbf")]


@pytest.mark.slow
@pytest.mark.parametrize(("network", "method"), CASES)
def test_network(network: str, method: str, rng: np.random.Generator, tmp_path: Path) -> None:
    shape, classes, options = NETWORKS[network]
    model = exact(models.build(network, shape, classes, METHODS[method], **options), rng)
    results = outputs(model, dyadic(rng, (1, *shape)), tmp_path)
    assert results[0].std() > 0
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=0, atol=1e-5 * np.abs(results[0]).max())

    quantised = [layer for layer in inspection.inspect(tmp_path / "model.onnx").layers if layer.method != "float"]
    assert sum(layer.stored_bytes for layer in quantised) == pytest.approx(stored_bits(model) / 8, rel=0.01)
    floats = [m for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    biases = [m.bias for m in model.modules() if isinstance(m, QuantConv2d | QuantLinear) and m.bias is not None]
    float_parameters = sum(p.nbytes for m in floats for p in m.parameters()) + sum(b.nbytes for b in biases)
    initializers = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / "model.onnx").graph.initializer}
    norms = sum(8 * m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d))
    total = sum(array.nbytes for array in initializers.values())
    assert total == pytest.approx(stored_bits(model) / 8 + float_parameters + norms, rel=0.02)
