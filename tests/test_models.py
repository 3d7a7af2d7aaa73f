"""A contract over every network, quantised and as its float twin, then the sizes that the papers state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline import models
from pipeline.layers import QuantConv2d, QuantLinear
from pipeline.models import Quantize

Weighted = nn.Conv2d | nn.Linear
Quantized = QuantConv2d | QuantLinear


def weighted(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, Weighted)]


def quantized(model: nn.Module) -> list[Quantized]:
    return [layer for layer in model.modules() if isinstance(layer, Quantized)]


@pytest.mark.parametrize("quantize", [Quantize(), Quantize(group=1, input_scale=True, gradient="exact"), None])
@pytest.mark.parametrize("name", models.names())
def test_contract(name: str, quantize: Quantize | None) -> None:
    model = models.build(name, (3, 32, 32), 7, quantize)
    logits = model(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    layers = weighted(model)
    assert not isinstance(layers[0], Quantized)
    assert not isinstance(layers[-1], Quantized)
    if quantize is None:
        assert not quantized(model)
        return
    assert quantized(model)
    for layer in quantized(model):
        assert (layer.weight_quantizer.group, layer.input_scale) == (quantize.group, quantize.input_scale)


@pytest.mark.parametrize("name", models.names())
def test_the_float_twin_has_the_same_weights(name: str) -> None:
    with torch.device("meta"):
        binary, twin = (models.build(name, (3, 32, 32), 10, quantize) for quantize in (Quantize(), None))
    assert [layer.weight.shape for layer in weighted(binary)] == [layer.weight.shape for layer in weighted(twin)]


@pytest.mark.parametrize(
    ("name", "layers", "weights", "scales"),
    [
        ("nin", 7, 949_248, {1: 1216, 16: 76}),
        ("vgg7", 6, 12_959_744, {1: 2688, 16: 168}),
        ("resnet18", 16, 10_985_472, {1: 3840, 16: 240}),
        ("vgg_small", 2, 110_592, {1: 192, 16: 12}),
    ],
)
def test_sizes(name: str, layers: int, weights: int, scales: dict[int, int]) -> None:
    for group, count in scales.items():
        found = quantized(models.build(name, (3, 32, 32), 10, Quantize(group=group)))
        assert len(found) == layers
        assert sum(layer.weight.numel() for layer in found) == weights
        assert sum(len(layer.weight_quantizer.encode(layer.weight).scale) for layer in found) == count


def test_options() -> None:
    small = models.build("vgg_small", (1, 8, 8), 10, Quantize(), widths=(8, 24, 40, 16), pool_after=(0, 3))
    assert [layer.weight.shape[0] for layer in weighted(small)] == [8, 24, 40, 16, 10]
    assert small(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    wide = models.build("resnet18", (3, 64, 32), 5, Quantize(), width=8, stem="imagenet")
    assert [layer.weight.shape[0] for layer in quantized(wide)] == [8] * 4 + [16] * 4 + [32] * 4 + [64] * 4
    assert wide(torch.rand(2, 3, 64, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "shape", "options", "sentence"),
    [
        ("vgg16", (3, 32, 32), {}, "no network 'vgg16': choose one of nin, resnet18"),
        ("vgg_small", (3, 32, 32), {"pool_after": (3,)}, "run from 0 to 2"),
        ("vgg_small", (1, 2, 2), {"pool_after": (0, 1)}, "too many pools"),
        ("resnet18", (3, 20, 32), {}, "divisible by 8"),
        ("resnet18", (3, 40, 32), {"stem": "imagenet"}, "divisible by 32"),
    ],
)
def test_refusals(name: str, shape: tuple[int, int, int], options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        models.build(name, shape, 10, Quantize(), **options)


def test_quantize_refuses_what_a_layer_would_and_draws_nothing() -> None:
    with pytest.raises(ValueError, match="no quantiser 'dorefa9'"):
        Quantize(weight="dorefa9")
    state = torch.get_rng_state()
    Quantize()
    assert torch.equal(state, torch.get_rng_state())
