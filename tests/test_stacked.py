"""Stacked binary filters against their formulas in NumPy (float64), on windows cut out of the image."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline import models, recipe, train
from pipeline.data import Dataset, Split
from pipeline.models import Quantize, Stacked
from pipeline.stacked import Scale, StackedConv2d, StackedWeight, begin_epoch, constrain_, from_dense, ratio

SCALES: tuple[Scale, ...] = ("none", "filter", "selection", "bank")
# channels, filters, kernel, stride, padding, dilation, segments, bank
LAYERS = [
    (4, 5, (3, 3), 1, 1, 1, 1, 2),
    (8, 6, (1, 1), 1, 0, 1, 2, 3),
    (8, 7, (3, 2), (2, 1), (1, 0, 2, 1), 1, 4, 5),
    (16, 9, (2, 3), (1, 3), (0, 3, 1, 0), (2, 1), 8, 7),
    (6, 12, (3, 3), 2, (0, 1, 1, 0), 1, 3, 11),
]


def make(
    rng: np.random.Generator, shape: tuple[Any, ...], scale: Scale = "filter", **options: Any
) -> tuple[StackedConv2d, torch.Tensor]:
    """A layer with proxies inside and outside [-1, 1] and a scale of either sign, and images for it."""
    channels, filters, kernel, stride, padding, dilation, segments, bank = shape
    layer = StackedConv2d(
        channels, filters, kernel, stride, padding, dilation, segments=segments, bank=bank, scale=scale, **options
    )
    for parameter in layer.parameters():
        parameter.data = torch.from_numpy(rng.normal(0, 1, parameter.shape).astype(np.float32))
    return layer, torch.from_numpy(rng.normal(0, 1, (2, channels, 9, 8)).astype(np.float32))


def windows(x: np.ndarray, layer: StackedConv2d) -> np.ndarray:
    """What every output pixel sees: [N, C, H, W] -> [N, s, d, OH, OW, kh, kw]."""
    (kh, kw), (dy, dx) = layer.kernel_size, layer.dilation
    x = np.pad(x, [(0, 0), (0, 0), layer.pads[::2], layer.pads[1::2]])
    span = (dy * (kh - 1) + 1, dx * (kw - 1) + 1)
    x = np.lib.stride_tricks.sliding_window_view(x, span, (2, 3))[:, :, :: layer.stride[0], :: layer.stride[1]]
    return x[..., ::dy, ::dx].reshape(len(x), layer.segments, -1, *x.shape[2:4], kh, kw)


def signs(x: Any) -> np.ndarray:
    return np.where(np.asarray(x) >= 0, 1.0, -1.0)


def scales(layer: StackedConv2d, z: np.ndarray) -> np.ndarray:
    """a_tj by the definition of each kind."""
    a = np.ones(z.shape)
    if layer.scale is None:
        return a
    stored = layer.scale.detach().double().numpy()
    for t, j in np.ndindex(*z.shape):
        a[t, j] = stored[{"filter": t // layer.group, "selection": (t, j), "bank": z[t, j]}[layer.kind]]
    return a


# ---- forward ----


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "group"), [("none", 1), ("filter", 1), ("filter", 4), ("selection", 1), ("bank", 1)])
@pytest.mark.parametrize("shape", LAYERS)
def test_forward(shape: tuple[Any, ...], scale: Scale, group: int, bias: bool, rng: np.random.Generator) -> None:
    layer, x = make(rng, shape, scale, group=group, bias=bias)
    z = layer.selection.detach().numpy().argmax(2).T
    maps = np.einsum("bsdyxij,mdij->bsmyx", windows(signs(x), layer), signs(layer.bank.detach()))
    a = scales(layer, z)
    expected = np.stack([sum(a[t, j] * maps[:, j, z[t, j]] for j in range(z.shape[1])) for t in range(len(z))], 1)
    if layer.bias is not None:
        expected += layer.bias.detach().numpy()[:, None, None]
    training, evaluation = layer.train()(x), layer.eval()(x)
    np.testing.assert_allclose(training.detach(), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(evaluation.detach(), expected, rtol=1e-5, atol=1e-4)
    if scale in ("none", "filter"):
        assert torch.equal(training, evaluation)


@pytest.mark.parametrize("segments", range(1, 9))
def test_split_transform_merge_is_the_stack_on_integers(segments: int, rng: np.random.Generator) -> None:
    """Of every kind, with scales that keep the sums whole, for random shapes."""
    for scale in SCALES:
        filters, bank, kernel = (int(rng.integers(low, high)) for low, high in ((1, 20), (2, 14), (1, 4)))
        shape = (segments * 5, filters, kernel, int(rng.integers(1, 3)), tuple(rng.integers(0, 3, 4)), 1)
        layer, x = make(rng, (*shape, segments, bank), scale)
        if layer.scale is not None:
            layer.scale.data.round_()
        assert torch.equal(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", LAYERS)
def test_record(shape: tuple[Any, ...], scale: Scale, rng: np.random.Generator) -> None:
    layer, x = make(rng, shape, scale)
    record = layer.encode()
    assert record.bank.shape == layer.bank.shape and record.bank.abs().unique().tolist() == [1]
    assert record.indices.shape == (layer.out_channels, layer.segments) and record.indices.dtype == torch.int64
    z, a = record.indices.numpy(), scales(layer, record.indices.numpy())
    stack = [[a[t, j] * record.bank[z[t, j]].numpy() for j in range(z.shape[1])] for t in range(len(z))]
    expected = np.array(stack).reshape(layer.out_channels, layer.in_channels, *layer.kernel_size)
    np.testing.assert_allclose(record.dequantize(), expected, rtol=1e-6)
    np.testing.assert_array_equal(
        record.signs(), signs(expected) * signs(np.repeat(a, shape[0] // shape[6], 1))[:, :, None, None]
    )
    assert not record.dequantize().requires_grad
    again = StackedConv2d(*shape[:6], segments=shape[6], bank=shape[7], scale=scale)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.eval()(x), layer.eval()(x))


# ---- gradients ----


@pytest.mark.parametrize(("scale", "group"), [("none", 1), ("filter", 1), ("filter", 4), ("selection", 1), ("bank", 1)])
@pytest.mark.parametrize("shape", LAYERS)
def test_gradients(shape: tuple[Any, ...], scale: Scale, group: int, rng: np.random.Generator) -> None:
    layer, x = make(rng, shape, scale, group=group, balance=0.0)
    y = layer.train()(x)
    upstream = rng.normal(size=y.shape).astype(np.float32)
    y.backward(torch.from_numpy(upstream))
    seen, g = windows(signs(x), layer), upstream.astype(np.float64)
    maps = np.einsum("bsdyxij,mdij->bsmyx", seen, signs(layer.bank.detach()))
    z = layer.selection.detach().numpy().argmax(2).T
    a = scales(layer, z)

    every = np.broadcast_to(layer.scale.detach(), (*z.shape, shape[7])) if scale == "bank" else a[:, :, None]
    selection = np.einsum("tjl,btyx,bjlyx->jtl", np.broadcast_to(every, (*z.shape, shape[7])), g, maps)
    np.testing.assert_allclose(layer.selection.grad, selection, rtol=1e-4, atol=1e-3)

    bank = np.zeros(layer.bank.shape)
    for t, j in np.ndindex(*z.shape):
        bank[z[t, j]] += a[t, j] * np.einsum("byx,bdyxij->dij", g[:, t], seen[:, j])
    np.testing.assert_allclose(layer.bank.grad, bank * (layer.bank.detach().abs() <= 1).numpy(), rtol=1e-4, atol=1e-3)

    if layer.scale is None:
        return
    stored = np.zeros(layer.scale.shape)
    for t, j in np.ndindex(*z.shape):
        where = {"filter": t // group, "selection": (t, j), "bank": z[t, j]}[scale]
        stored[where] += (g[:, t] * maps[:, j, z[t, j]]).sum()
    np.testing.assert_allclose(layer.scale.grad, stored, rtol=1e-4, atol=1e-3)


def test_gradient_reaches_the_input(rng: np.random.Generator) -> None:
    layer, x = make(rng, LAYERS[2])
    layer(x.requires_grad_()).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert x.grad[x.abs() >= 1].abs().sum() == 0


@pytest.mark.parametrize("activation", ["real", "dorefa", "tbn", "bnn"])
def test_other_activations(activation: str, rng: np.random.Generator) -> None:
    layer, x = make(rng, LAYERS[2], activation=activation)
    layer(x)  # some keep a statistic of x
    evaluation = layer.eval()(x)
    layer.training = True  # the activation's quantiser stays in evaluation
    torch.testing.assert_close(layer(x), evaluation, rtol=1e-5, atol=1e-4)


# ---- selection: balance and warm-up ----


def test_balance_moves_the_gradient_of_filters_in_the_wrong_demand(rng: np.random.Generator) -> None:
    shape, weight = LAYERS[4], 0.25
    plain, x = make(rng, shape, "none", balance=0.0)
    balanced = StackedConv2d(*shape[:6], segments=shape[6], bank=shape[7], scale="none", balance=weight)
    balanced.load_state_dict(plain.state_dict())
    for layer in (plain, balanced):
        layer(x).square().sum().backward()
    assert plain.selection.grad is not None and balanced.selection.grad is not None
    demand = np.bincount(plain.encode().indices.flatten(), minlength=shape[7])
    mean = shape[1] * shape[6] / shape[7]
    over, under = np.maximum(demand - math.ceil(mean), 0), np.maximum(math.floor(mean) - demand, 0)
    expected = np.broadcast_to(weight * (over - under), plain.selection.shape)
    np.testing.assert_allclose(balanced.selection.grad - plain.selection.grad, expected, rtol=1e-2, atol=1e-2)


def test_balance_alone_evens_the_demand(rng: np.random.Generator) -> None:
    layer, x = make(rng, (8, 32, 3, 1, 1, 1, 2, 8), "none", balance=1e-2)
    layer.selection.data[:, :, 0] += 2  # all want the first
    optimizer = torch.optim.SGD([layer.selection], 0.1)
    worst = []
    for _ in range(300):
        worst.append(int(layer.encode().indices.flatten().bincount(minlength=8).max()))
        optimizer.zero_grad()
        (layer(x) * 0).sum().backward()
        optimizer.step()
    assert min(worst[-20:]) < worst[0] / 2


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_selection_trains_in_the_warm_up_only(optimizer: Any, rng: np.random.Generator) -> None:
    layer, x = make(rng, LAYERS[4])
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    steps, moved = optimizer(layer.parameters(), 0.1, weight_decay=0.1, **options), []
    for epoch in range(4):
        before = [parameter.detach().clone() for parameter in (layer.selection, layer.bank)]
        begin_epoch(nn.Sequential(layer), epoch, 2)
        layer(x).square().mean().backward()
        steps.step()
        steps.zero_grad()
        moved.append([not torch.equal(a, b) for a, b in zip(before, (layer.selection, layer.bank), strict=True)])
    assert moved == [[True, True], [True, True], [False, True], [False, True]]


# ---- bits ----


VGG16 = [64, 64, 128, 128, *[256] * 3, *[512] * 6]
RESNET18 = [*[64] * 5, *[128] * 4, *[256] * 4, *[512] * 4]
RESNET20 = [*[16] * 7, *[32] * 6, *[64] * 6]


@pytest.mark.parametrize(
    ("widths", "segments", "rho", "ratios"),
    [
        (VGG16, 2, 1, (63.4, 62.3, 61.2)),
        (VGG16, 2, 2, (125.8, 121.5, 117.5)),
        (VGG16, 4, 2, (239.4, 224.3, 188.4)),
        (VGG16, 4, 4, (457.0, 404.7, 301.3)),
        (VGG16, 8, 4, (691.3, 578.3, 269.6)),
        (RESNET18, 2, 2, (125.5, 120.2, 115.3)),
        (RESNET18, 4, 2, (236.8, 218.7, 177.9)),
        (RESNET18, 4, 4, (449.1, 388.1, 275.9)),
        (RESNET20, 2, 2, (117.5, 90.7, 73.9)),
        (RESNET20, 4, 2, (188.8, 128.0, 65.1)),
    ],
)
def test_bits_of_whole_networks(widths: list[int], segments: int, rho: int, ratios: tuple[float, ...]) -> None:
    """The 3x3 convolutions after the first, all others dense: without scales, per filter, per selection."""
    kinds: tuple[Scale, ...] = ("none", "filter", "selection")
    bits, dense = dict.fromkeys(kinds, 0), 0
    for c, n in itertools.pairwise(widths):
        dense += 32 * 9 * n * c
        for kind in kinds:
            layer = StackedConv2d(c, n, 3, segments=segments, bank=-(-n // rho), scale=kind)
            bits[kind] += layer.encode().bits()
    for kind, expected in zip(kinds, ratios, strict=True):
        assert dense / bits[kind] == pytest.approx(expected, abs=0.06), kind


@pytest.mark.parametrize("segments", [1, 2, 8])
@pytest.mark.parametrize("bank", [2, 64, 256])
def test_ratio_is_the_bits_of_a_power_of_two(segments: int, bank: int) -> None:
    record = StackedConv2d(64, 256, 3, segments=segments, bank=bank, scale="none").encode()
    assert ratio(64, 256, 9, segments, bank) == pytest.approx(32 * 256 * 64 * 9 / record.bits())


def test_bits_of_a_bank_that_is_no_power_of_two() -> None:
    record = StackedWeight(torch.ones(5, 2, 3, 3), torch.zeros(7, 4, dtype=torch.int64), torch.ones(5), "bank")
    assert record.bits() == 5 * 2 * 9 + 7 * 4 * 3 + 5 * 32


# ---- data-free start ----


def error(weight: torch.Tensor, record: StackedWeight) -> float:
    """||W - W^||^2; of kind 'none' with the best scale >= 0 per filter, which batch norm holds."""
    w, stack = (v.double().flatten(1) for v in (weight, record.dequantize()))
    if record.scale is None:
        stack = stack * (w * stack).mean(1, keepdim=True).clamp_min(0)
    return ((w - stack) ** 2).sum().item()


@pytest.mark.parametrize(("scale", "group"), [("none", 1), ("filter", 1), ("filter", 4), ("selection", 1), ("bank", 1)])
@pytest.mark.parametrize(("segments", "bank"), [(1, 5), (2, 16), (4, 7), (4, 100)])
def test_data_free_start_never_gets_worse(
    scale: Scale, group: int, segments: int, bank: int, rng: np.random.Generator
) -> None:
    weight = torch.from_numpy(rng.normal(0.02, rng.uniform(0.1, 1, (18, 1, 1, 1)), (18, 8, 3, 3)).astype(np.float32))
    seed = int(rng.integers(2**31))
    records = [from_dense(weight, segments, bank, scale, group, iterations, seed) for iterations in range(9)]
    errors = [error(weight, record) for record in records]
    print(errors)
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    assert errors[-1] < errors[0] or bank > 72  # a filter for every segment is right from the start
    assert errors[-1] < (weight.double() ** 2).sum()


def test_data_free_start_finds_a_weight_that_is_stacked(rng: np.random.Generator) -> None:
    """Two clusters apart enough for any start: the dense weight comes back whole."""
    bank = torch.tensor([1.0, -1.0])[:, None, None, None].expand(2, 4, 3, 3)
    indices = torch.from_numpy(rng.permuted(np.arange(2).repeat(16)).reshape(16, 2))
    scale = torch.from_numpy(rng.uniform(0.5, 2, 16).astype(np.float32))
    weight = StackedWeight(bank, indices, scale, "filter").dequantize()
    assert torch.allclose(from_dense(weight, 2, 2, "filter", seed=int(rng.integers(2**31))).dequantize(), weight)


def test_empty_clusters_are_seeded_again() -> None:
    """Six equal filters and two others: a bank drawn from the equal ones alone still finds all."""
    weight = torch.ones(8, 4, 3, 3)
    weight[6, ::2], weight[7, 1::2] = -1, -2
    for seed in range(20):
        assert torch.equal(from_dense(weight, 1, 3, "selection", iterations=4, seed=seed).signs(), weight.sign())


@pytest.mark.parametrize("scale", SCALES)
def test_load_dense(scale: Scale, rng: np.random.Generator) -> None:
    layer, x = make(rng, LAYERS[2], scale)
    layer.bank.data[0] = 0
    weight = torch.from_numpy(rng.normal(size=(7, 8, 3, 2)).astype(np.float32))
    before = layer.selection.detach().sort(2).values
    layer.load_dense_(weight, iterations=5, seed=3)
    start, record = from_dense(weight, 4, 5, scale, iterations=5, seed=3), layer.encode()
    assert torch.equal(record.bank, start.bank)
    assert torch.equal(record.indices, start.indices)
    assert torch.equal(record.dequantize(), start.dequantize())
    assert torch.equal(layer.selection.detach().sort(2).values, before)
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("scale", SCALES)
def test_a_new_layer_has_the_scale_that_fits_its_proxies(scale: Scale) -> None:
    layer = StackedConv2d(8, 12, 3, segments=2, bank=5, scale=scale, group=4 if scale == "filter" else 1)
    z = layer.encode().indices
    magnitude = layer.bank.detach().abs().mean((1, 2, 3))
    expected = {"filter": magnitude[z].view(3, 8).mean(1), "selection": magnitude[z], "bank": magnitude}
    assert (layer.scale is None) if scale == "none" else torch.allclose(layer.scale, expected[scale])


# ---- refusals ----


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"segments": 3}, r"segments = 3 does not divide 8 input channels: give a divisor"),
        ({"segments": 0}, r"segments = 0 does not divide"),
        ({"bank": 1}, r"bank = 1 leaves nothing to select: give 2"),
        ({"kernel_size": 1, "segments": 2, "bank": 16}, r"bank = 16: an index is no shorter .* 4 bits, give less"),
        ({"scale": "layer"}, r"scale = 'layer': choose one of none, filter, selection, bank"),
        ({"scale": "bank", "group": 2}, r"group = 2 with scale = 'bank'"),
        ({"group": 0}, r"group = 0"),
        ({"activation": "horq"}, r"activation = 'horq': stacked filters take one plane"),
        ({"activation": "relu9"}, r"no activation quantiser 'relu9'"),
    ],
)
def test_refusals(arguments: dict[str, Any], sentence: str) -> None:
    settings = {"kernel_size": 3, "segments": 2, "bank": 4} | arguments
    with pytest.raises(ValueError, match=sentence):
        StackedConv2d(8, 4, **settings)
    if "activation" not in arguments:
        kernel = settings.pop("kernel_size")
        with pytest.raises(ValueError, match=sentence):
            from_dense(torch.ones(4, 8, kernel, kernel), **settings)


# ---- training ----


def test_digits_are_learnt(seed: int) -> None:
    """Four epochs, the selection frozen after two."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    images = (images.float() / 8 - 1).view(-1, 1, 8, 8)
    model = nn.Sequential(
        *[nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)],
        *[StackedConv2d(16, 32, 3, 2, 1, segments=4, bank=8), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(512, 10)],
    )
    layer, losses, selected = model[2], [], []
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for epoch in range(4):
        begin_epoch(model, epoch, 2)
        total = 0.0
        for picked in torch.randperm(1792).view(-1, 64):
            loss = F.cross_entropy(model(images[picked]), labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            constrain_(model)
            total += loss.item() / 28
        losses.append(total)
        selected.append(layer.encode().indices)
    print(losses)
    assert layer.bank.abs().max() <= 1
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(selected[0], selected[1])
    assert torch.equal(selected[1], selected[3])


# ---- networks and recipes ----


@pytest.mark.parametrize("name", models.names())
def test_networks_stack_their_inner_convolutions(name: str) -> None:
    side = 67 if name == "alexnet" else 32
    plain, stacked = (
        models.build(name, (3, side, side), 10, Quantize(group=4, stacked=choice)) for choice in (None, Stacked(4, 3))
    )
    kinds = [
        [type(layer).__name__ for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear | StackedConv2d)]
        for model in (plain, stacked)
    ]
    assert kinds[1] == [kind.replace("QuantConv2d", "StackedConv2d") for kind in kinds[0]]
    layers = [layer for layer in stacked.modules() if isinstance(layer, StackedConv2d)]
    assert layers
    assert all(len(layer.bank) == math.ceil(layer.out_channels / 3) and layer.group == 4 for layer in layers)
    assert stacked(torch.rand(2, 3, side, side)).isfinite().all()


TOY: dict[str, Any] = {
    "model": {"name": "vgg_small", "widths": [8, 12], "pool_after": [0]},
    "quantize": {"stacked": {"segments": 2, "bank_ratio": 2, "scale": "selection", "warmup": 2}},
    "train": {"epochs": 4, "batch": 8, "lr": 0.01, "weight_decay": 0.1},
    "data": {"name": "digits"},
}


def test_a_run_resumed_behind_the_warm_up(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as in one go, the selection of the second epoch, and no decay of what is not a float weight."""
    chosen = recipe.parse(TOY, "toy")
    half = Split(torch.randint(0, 256, (16, 1, 6, 6), dtype=torch.uint8), torch.arange(16) % 2)
    toy, epoch, selected = Dataset("toy", ("even", "odd"), half, half), train._Run.epoch, []

    def recorded(run: train._Run, advance: Any) -> Any:
        if len(run.history) == 3 and not resumed:
            raise KeyboardInterrupt
        done = epoch(run, advance)
        selected.append(next(m for m in run.model.modules() if isinstance(m, StackedConv2d)).selection.detach().clone())
        return done

    monkeypatch.setattr(train._Run, "epoch", recorded)
    resumed = True
    train.train(chosen, toy, tmp_path / "whole")
    assert not torch.equal(selected[0], selected[1])
    assert torch.equal(selected[1], selected[2]) and torch.equal(selected[1], selected[3])
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        train.train(chosen, toy, tmp_path / "parts")
    resumed = True
    train.train(chosen, toy, tmp_path / "parts", resume=True)
    whole, parts = (train.load(tmp_path / out).model.state_dict() for out in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    decayed, _ = train._optimizer(train.load(tmp_path / "whole").model, chosen.train).param_groups
    assert [parameter.shape for parameter in decayed["params"]] == [(8, 1, 3, 3), (2, 12)]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"segments": 2}, "quantize.stacked.bank_ratio is missing"),
        ({"segments": 2, "bank_ratio": 0}, "bank_ratio = 0: a layer shares no more filters than it has"),
        ({"segments": 2, "bank_ratio": 2, "rho": 2}, "quantize.stacked.rho does not exist: choose from segments"),
        ({"segments": 2, "bank_ratio": 2, "scale": "layer"}, "quantize.stacked.scale = 'layer': should be 'none'"),
    ],
)
def test_a_recipe_refuses(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        recipe.parse(TOY | {"quantize": {"stacked": settings}}, "toy")


@pytest.mark.parametrize("option", [{"input_scale": True}, {"gradient_bits": 4}])
def test_what_stacked_filters_do_not_know(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="know neither input_scale nor gradient_bits"):
        Quantize(stacked=Stacked(2, 2), **option)
