"""A contract over every network, quantised and as its float twin, then the sizes that the papers state."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from pipeline import models, quantizers
from pipeline.layers import QuantConv2d, QuantLinear
from pipeline.models import Quantize

Weighted = nn.Conv2d | nn.Linear
Quantized = QuantConv2d | QuantLinear
EXACT = Quantize(input_scale=True, weight_options={"gradient": "exact"})
FEW_BITS = Quantize("dorefa", "dorefa", weight_options={"bits": 2}, activation_options={"bits": 3}, gradient_bits=6)


def image(name: str) -> tuple[int, int, int]:
    """A small one that the network takes."""
    return (3, 67, 67) if name == "alexnet" else (3, 32, 32)


def weighted(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, Weighted)]


def quantized(model: nn.Module) -> list[Quantized]:
    return [layer for layer in model.modules() if isinstance(layer, Quantized)]


@pytest.mark.parametrize("quantize", [Quantize(group=16), EXACT, FEW_BITS, None])
@pytest.mark.parametrize("name", models.names())
def test_contract(name: str, quantize: Quantize | None) -> None:
    model = models.build(name, image(name), 7, quantize)
    logits = model(torch.rand(2, *image(name)))
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
        assert getattr(layer.weight_quantizer, "group", 1) == quantize.group
        assert (layer.input_scale, layer.gradient_bits) == (quantize.input_scale, quantize.gradient_bits)


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize(
    ("quantize", "first"),
    [
        (Quantize(group=4, input_scale=True, first=True, last=True), "pixels"),
        (Quantize("bwn", "horq", activation_options={"order": 3}, first=True, last=True), "pixels"),
        (Quantize("ttq", "real", first=True, last=True), "real"),
    ],
)
def test_first_and_last_layer(name: str, quantize: Quantize, first: str) -> None:
    model = models.build(name, image(name), 7, quantize)
    model(torch.rand(2, *image(name))).sum().backward()
    layers = weighted(model)
    assert isinstance(layers[0], QuantConv2d) and isinstance(layers[-1], Quantized)
    assert type(layers[0].activation_quantizer) is quantizers.activations()[first]
    assert not layers[0].input_scale
    assert type(layers[-1].activation_quantizer) is quantizers.activations()[quantize.activation]
    assert all(isinstance(layer, Quantized) for layer in layers) or name == "resnet18"  # its shortcuts stay float


@pytest.mark.parametrize("name", sorted({*models.names()} - {"resnet18"}))  # whose shortcuts are linear
def test_between_two_layers_of_real_activations_is_a_relu(name: str) -> None:
    with torch.device("meta"):
        model = models.build(name, image(name), 7, Quantize(activation="real"))
    kinds = [type(layer) for layer in model.modules() if isinstance(layer, nn.ReLU | Weighted)]
    assert all(nn.ReLU in pair for pair in itertools.pairwise(kinds))


@pytest.mark.parametrize("name", models.names())
def test_the_float_twin_has_the_same_weights(name: str) -> None:
    with torch.device("meta"):
        binary, twin = (models.build(name, image(name), 10, quantize) for quantize in (Quantize(), None))
    assert [layer.weight.shape for layer in weighted(binary)] == [layer.weight.shape for layer in weighted(twin)]


@pytest.mark.parametrize(
    ("name", "layers", "weights", "scales"),
    [
        ("nin", 7, 949_248, {1: 1216, 16: 76}),
        ("vgg7", 6, 12_959_744, {1: 2688, 16: 168}),
        ("resnet18", 16, 10_985_472, {1: 3840, 16: 240}),
        ("vgg_small", 2, 110_592, {1: 192, 16: 12}),
        ("vgg16", 12, 14_708_736, {1: 4160, 16: 260}),
        ("alexnet", 6, 21_536_768, {1: 9472, 16: 592}),
    ],
)
def test_sizes(name: str, layers: int, weights: int, scales: dict[int, int]) -> None:
    for group, count in scales.items():
        found = quantized(models.build(name, image(name), 10, Quantize(group=group)))
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
        ("lenet", (3, 32, 32), {}, "no network 'lenet': choose one of alexnet, nin, resnet18"),
        ("vgg_small", (3, 32, 32), {"pool_after": (3,)}, "run from 0 to 2"),
        ("vgg_small", (1, 2, 2), {"pool_after": (0, 1)}, "too many pools"),
        ("resnet18", (3, 20, 32), {}, "divisible by 8"),
        ("vgg16", (3, 32, 31), {}, "sides of at least 32"),
        ("alexnet", (3, 66, 227), {}, "sides of at least 67"),
        ("resnet18", (3, 40, 32), {"stem": "imagenet"}, "divisible by 32"),
    ],
)
def test_refusals(name: str, shape: tuple[int, int, int], options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        models.build(name, shape, 10, Quantize(), **options)


def test_quantize_refuses_what_a_layer_would_and_draws_nothing() -> None:
    with pytest.raises(ValueError, match="no weight quantiser 'dorefa9'"):
        Quantize(weight="dorefa9")
    with pytest.raises(ValueError, match="weight 'bc' has no scale per filter to share"):
        Quantize(weight="bc", group=16)
    state = torch.get_rng_state()
    Quantize()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", quantizers.methods())
def test_the_label_has_the_bits_of_the_method(name: str) -> None:
    method = quantizers.methods()[name]
    assert Quantize(method.weight, method.activation).label == method.bits


@pytest.mark.parametrize(
    ("quantize", "label"),
    [
        (Quantize(group=16), "1w1a/16"),
        (Quantize("dorefa", "dorefa", weight_options={"bits": 3}, activation_options={"bits": 2}), "3w2a"),
        (Quantize("twn", "horq", 4, {"per": "group"}, {"order": 5}), "2w5a/4"),
    ],
)
def test_labels(quantize: Quantize, label: str) -> None:
    assert quantize.label == label
