"""A contract over every quantiser, then the closed forms of each in NumPy (float64), without the code's help."""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import quantizers
from pipeline.data import to_float
from pipeline.quantizers import ResidualQuantizer, bc, binarynet, bwn, dorefa, horq, pixels, tbn, ttq, twn

Array = NDArray[np.float64]
OPTIONS: dict[str, list[dict[str, Any]]] = {  # to try beside the defaults
    "bc": [{"stochastic": True}],
    "bwn": [{"group": 3}, {"gradient": "exact"}],
    "dorefa": [{"bits": 2}, {"bits": 8}],
    "horq": [{"order": 1}, {"order": 5}],
    "pixels": [{"bits": 1}, {"bits": 3}],
    "tbn": [{"delta": 0.0}, {"delta": 1}],
    "ttq": [{"threshold": 0.5}],
    "twn": [{"per": "group"}, {"per": "group", "group": 2}],
}


def cases(known: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(n, o) for n in known for o in ({}, *OPTIONS.get(n, ())) if set(o) <= set(signature(known[n]).parameters)]


GROUPS = [1, 2, 3, 4, 16, 100]
SHAPES = [(5, 3, 3, 2), (17, 4, 1, 1), (16, 7), (1, 1, 3, 3)]


def latent(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """A latent weight with entries inside and outside [-1, 1], a zero and a negative zero."""
    weight = rng.normal(0, 1, shape).astype(np.float32)
    weight.flat[0], weight.flat[-1] = 0.0, -0.0
    return torch.from_numpy(weight).requires_grad_()


def run(quantizer: nn.Module, x: Tensor, upstream: Array) -> tuple[Tensor, Tensor]:
    """(value, gradient of x)."""
    x.grad = None
    value = quantizer(x)
    value.backward(torch.from_numpy(upstream).float())
    assert x.grad is not None
    return value.detach(), x.grad


def no_tie(x: Array) -> NDArray[np.bool_]:
    """Where float32 rounds to the same integer as float64."""
    return np.abs(x - np.floor(x) - 0.5) > 1e-4


def array(x: Tensor) -> Array:
    return x.detach().double().numpy()


# ---- contract ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "options"), cases(quantizers.weights()))
def test_weight_contract(name: str, options: dict[str, Any], shape: tuple[int, ...], rng: np.random.Generator) -> None:
    quantizer, weight = quantizers.weights()[name](**options), latent(rng, shape)
    trained, gradient = run(quantizer, weight, rng.normal(size=shape))
    assert trained.shape == weight.shape
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    penalty = quantizer.penalty(weight)
    assert penalty is None or (penalty.shape == () and penalty.isfinite())
    quantized, coded = quantizer.eval()(weight), quantizer.encode(weight)
    assert quantized.dtype == coded.codes.dtype == coded.scale.dtype == torch.float32
    assert torch.equal(quantized, coded.dequantize())
    assert coded.codes.shape == weight.shape
    assert set(coded.codes.unique().tolist()) <= set(coded.code.values)
    assert coded.scale.shape == (-(-shape[0] // coded.group),)
    assert coded.negative is None or coded.negative.shape == coded.scale.shape
    assert coded.per_filter().shape == (shape[0],)
    assert not any(t.requires_grad for t in (coded.codes, coded.scale, coded.negative) if t is not None)
    quantizer.constrain_(weight)
    assert weight.isfinite().all()
    assert weight.requires_grad


@pytest.mark.parametrize(("name", "options"), cases(quantizers.weights()))
def test_zero_weights(name: str, options: dict[str, Any], rng: np.random.Generator) -> None:
    weight = torch.zeros(5, 2, 3, 3).requires_grad_()
    quantizer = quantizers.weights()[name](**options)
    value, gradient = run(quantizer, weight, rng.normal(size=weight.shape))
    assert value.isfinite().all() and gradient.isfinite().all()
    assert quantizer.encode(weight).scale.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 8)])
@pytest.mark.parametrize(("name", "options"), cases(quantizers.activations()))
def test_activation_contract(
    name: str, options: dict[str, Any], shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    quantizer, x = quantizers.activations()[name](**options), latent(rng, shape)
    for _ in range(2):
        value, gradient = run(quantizer, x, rng.normal(size=shape))
        assert (value.shape, value.dtype) == (x.shape, torch.float32)
        assert value.isfinite().all() and gradient.isfinite().all()
        assert gradient.abs().sum() > 0
        quantizer.eval()
    if isinstance(quantizer, ResidualQuantizer):
        planes = quantizer.planes(x.detach(), quantizers.sign)
        assert len(planes) == quantizer.order
        assert all(set(codes.unique().tolist()) <= {-1.0, 1.0} for codes, _ in planes)
        assert torch.equal(value, sum(scale * codes for codes, scale in planes))
    elif quantizer.code is None:
        assert torch.equal(value, x)
    else:
        x = torch.cat([x.detach().flatten(), torch.tensor([torch.nan, torch.inf, -torch.inf, 1, -1, 1e-45, -1e-45])])
        codes = quantizer.codes(x)
        assert set(codes.unique().tolist()) <= set(quantizer.code.values)
        assert torch.equal(quantizer(x), codes * quantizer.scale)
        constants, attributes = quantizer.operands()
        assert all(constant.shape == (1,) for constant in constants)
        assert all(type(value) is int for value in attributes.values())


def test_every_file_is_of_use_and_every_method_has_its_quantisers() -> None:
    weights, activations, methods = quantizers.weights(), quantizers.activations(), quantizers.methods()
    assert {*weights, *activations, *methods} == {*quantizers.names()}
    for method in methods.values():
        weight = weights[method.weight]()
        activation = activations[method.activation]()
        assert weight.encode(torch.randn(2, 3)).code.bits == method.weight_bits
        planes = activation.order if isinstance(activation, ResidualQuantizer) else 1
        assert (activation.code.bits * planes if activation.code else 32) == method.activation_bits
        assert method.title and method.operations and method.formula and method.source
    assert len({method.title for method in methods.values()}) == len(methods)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: bwn.CrossFilterBinary(0), "group = 0: a scale is shared"),
        (lambda: bwn.CrossFilterBinary(1, "straight"), "gradient = 'straight'"),  # type: ignore[arg-type]
        (lambda: binarynet.PushedToOne(-1), "strength = -1"),
        (lambda: dorefa.DoReFaWeight(9), "bits = 9: give an integer from 1 to 8"),
        (lambda: dorefa.DoReFaActivation(0), "bits = 0"),
        (lambda: pixels.Pixels(2.0), r"bits = 2\.0"),  # type: ignore[arg-type]
        (lambda: horq.ResidualOfWindow(9), "order = 9"),
        (lambda: tbn.Ternary(-0.1), r"delta = -0\.1"),
        (lambda: tbn.Ternary(momentum=0), "momentum = 0"),
        (lambda: ttq.TrainedTernary(1), "threshold = 1"),
        (lambda: twn.TernaryWeight(2), "group = 2: twn shares one scale per layer"),
        (lambda: twn.TernaryWeight(0, "group"), "group = 0"),
        (lambda: twn.TernaryWeight(1, "filter"), "per = 'filter'"),  # type: ignore[arg-type]
    ],
)
def test_refusals(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


# ---- bwn ----


def slices(weight: np.ndarray, group: int) -> list[np.ndarray]:
    return [weight[i : i + group] for i in range(0, len(weight), group)]


def signs(weight: np.ndarray) -> np.ndarray:
    return np.where(weight >= 0, 1.0, -1.0)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bwn_forward(shape: tuple[int, ...], group: int, rng: np.random.Generator) -> None:
    weight = latent(rng, shape)
    parts = slices(weight.detach().double().numpy(), group)
    expected = np.concatenate([np.abs(part).mean() * signs(part) for part in parts])
    np.testing.assert_allclose(bwn.CrossFilterBinary(group)(weight).detach(), expected, rtol=1e-6)
    np.testing.assert_allclose(
        bwn.CrossFilterBinary(group).encode(weight).scale, [np.abs(part).mean() for part in parts], rtol=1e-6
    )


@pytest.mark.parametrize("gradient", ["published", "exact"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bwn_gradient(shape: tuple[int, ...], group: int, gradient: str, rng: np.random.Generator) -> None:
    weight, upstream = latent(rng, shape), rng.normal(size=shape).astype(np.float32)
    bwn.CrossFilterBinary(group, gradient)(weight).backward(torch.from_numpy(upstream))  # type: ignore[arg-type]
    expected = []
    for w, g in zip(
        slices(weight.detach().double().numpy(), group), slices(upstream.astype(np.float64), group), strict=True
    ):
        direct = g if gradient == "published" else signs(w) * (g * signs(w)).sum()
        expected.append(direct / w.size + np.abs(w).mean() * g * (np.abs(w) <= 1))
    np.testing.assert_allclose(weight.grad, np.concatenate(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("group", GROUPS)
def test_bwn_of_a_filterwise_model_keeps_bits_and_averages_scales(group: int, rng: np.random.Generator) -> None:
    weight = latent(rng, (17, 3, 3, 3))
    filterwise = bwn.CrossFilterBinary(1).encode(weight)
    coded = bwn.CrossFilterBinary(group).encode(filterwise.dequantize())
    assert torch.equal(coded.codes, filterwise.codes)
    means = [part.mean() for part in slices(filterwise.scale.double().numpy(), group)]
    np.testing.assert_allclose(coded.scale, means, rtol=1e-6)
    np.testing.assert_allclose(coded.scale, bwn.CrossFilterBinary(group).encode(weight).scale, rtol=1e-6)


@pytest.mark.parametrize("group", GROUPS)
def test_bwn_price_of_sharing(group: int, rng: np.random.Generator) -> None:
    """J_CF - J_filterwise = q sum_i (a_i - mean a)^2 over every group (papers' section 1.3)."""
    weight = latent(rng, (17, 3, 3, 3)).detach()
    shared, filterwise = (
        ((weight - bwn.CrossFilterBinary(m).encode(weight).dequantize()).double() ** 2).sum() for m in (group, 1)
    )
    scales = slices(bwn.CrossFilterBinary(1).encode(weight).scale.double().numpy(), group)
    price = 27 * sum(((a - a.mean()) ** 2).sum() for a in scales)
    np.testing.assert_allclose(shared - filterwise, price, rtol=1e-4, atol=1e-4)


def test_bwn_constraint(rng: np.random.Generator) -> None:
    small, large = (torch.from_numpy(rng.normal(0, spread, (8, 4, 3, 3))) for spread in (0.1, 10))
    bwn.CrossFilterBinary().constrain_(small)
    np.testing.assert_allclose(small.mean(1), 0, atol=1e-12)
    bwn.CrossFilterBinary().constrain_(large)
    assert large.abs().max() == 1
    one = torch.full((8, 1, 3, 3), 0.5)
    bwn.CrossFilterBinary().constrain_(one)
    assert torch.equal(one, torch.full((8, 1, 3, 3), 0.5))


# ---- the other weights ----


def test_bc_and_binarynet(rng: np.random.Generator) -> None:
    weight, g = latent(rng, (4, 3, 3, 3)), rng.normal(size=(4, 3, 3, 3))
    w = array(weight)
    for quantizer in (bc.BinaryConnect(), binarynet.PushedToOne(strength=0.25)):
        value, gradient = run(quantizer, weight, g)
        np.testing.assert_array_equal(value, signs(w))
        np.testing.assert_allclose(gradient, g, rtol=1e-6)
        assert quantizer.encode(weight).per_filter().tolist() == [1] * 4
        clipped = weight.detach().clone()
        quantizer.constrain_(clipped)
        np.testing.assert_array_equal(clipped, w.clip(-1, 1))
    assert bc.BinaryConnect().penalty(weight) is None
    weight.grad = None
    penalty = binarynet.PushedToOne(strength=0.25).penalty(weight)
    penalty.backward()
    assert penalty.item() == pytest.approx(0.25 * (1 - w**2).sum(), rel=1e-5)
    np.testing.assert_allclose(weight.grad, -0.5 * w, rtol=1e-6)


def test_stochastic_bc_is_right_on_average(seed: int) -> None:
    levels = torch.tensor([-2, -1, -0.5, 0, 0.25, 1, 3])
    quantizer = bc.BinaryConnect(stochastic=True)
    drawn = quantizer(levels.repeat(40_000, 1).requires_grad_())
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    np.testing.assert_allclose(drawn.mean(0).detach(), levels.clamp(-1, 1), atol=0.03)  # 6 sigma
    assert torch.equal(quantizer.eval()(levels), quantizers.sign(levels))


@pytest.mark.parametrize("group", [None, *GROUPS])
@pytest.mark.parametrize("shape", SHAPES)
def test_twn(shape: tuple[int, ...], group: int | None, rng: np.random.Generator) -> None:
    weight, g = latent(rng, shape), rng.normal(size=shape)
    quantizer = twn.TernaryWeight() if group is None else twn.TernaryWeight(group, "group")
    value, gradient = run(quantizer, weight, g)
    expected = []
    for part in slices(array(weight), group or shape[0]):
        selected = np.abs(part) > 0.7 * np.abs(part).mean()
        expected.append(np.abs(part)[selected].mean() * np.sign(part) * selected)
    np.testing.assert_allclose(value, np.concatenate(expected), rtol=1e-6)
    np.testing.assert_allclose(gradient, g, rtol=1e-6)


@pytest.mark.parametrize("group", GROUPS)
def test_twn_shared_among_filters_is_the_least_squares_scale(group: int, rng: np.random.Generator) -> None:
    weight = latent(rng, (17, 3, 3, 3)).detach()
    weight[3] = 0  # a filter that selects nothing
    stored = twn.TernaryWeight(1, "group").encode(weight)
    assert stored.scale[3] == 0
    shared = twn.share(stored, group)
    assert torch.equal(shared.codes, stored.codes)
    real, codes = slices(array(stored.dequantize()), group), slices(array(stored.codes), group)
    best = [(w * t).sum() / max((t * t).sum(), 1) for w, t in zip(real, codes, strict=True)]
    np.testing.assert_allclose(shared.scale, best, rtol=1e-6)


def test_ttq(rng: np.random.Generator) -> None:
    weight, g = latent(rng, (4, 3, 3, 3)), rng.normal(size=(4, 3, 3, 3))
    quantizer = ttq.TrainedTernary(0.3)
    with torch.no_grad():
        quantizer.positive.fill_(1.75)
        quantizer.negative.fill_(0.5)
    value, gradient = run(quantizer, weight, g)
    w = array(weight)
    delta = 0.3 * np.abs(w).max()
    above, below = w > delta, w < -delta
    assert above.any() and below.any()
    np.testing.assert_array_equal(value, 1.75 * above - 0.5 * below)
    np.testing.assert_allclose(gradient, g * np.where(above, 1.75, np.where(below, 0.5, 1)), rtol=1e-6)
    np.testing.assert_allclose(quantizer.positive.grad, [g[above].sum()], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(quantizer.negative.grad, [-g[below].sum()], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        quantizer.positive.fill_(-1)
    quantizer.constrain_(weight)
    assert quantizer.positive > 0
    assert quantizer.negative == 0.5


@pytest.mark.parametrize("bits", range(1, 9))
def test_dorefa_weights(bits: int, rng: np.random.Generator) -> None:
    weight, g = latent(rng, (4, 3, 3, 3)), rng.normal(size=(4, 3, 3, 3))
    value, gradient = run(dorefa.DoReFaWeight(bits), weight, g)
    w, most = array(weight), 2**bits - 1
    if bits == 1:
        np.testing.assert_allclose(value, np.abs(w).mean() * signs(w), rtol=1e-6)
        np.testing.assert_allclose(gradient, g, rtol=1e-6)
        return
    t = np.tanh(w)
    largest = np.abs(t).max()
    unit = most * (t / (2 * largest) + 0.5)
    sure = no_tie(unit)
    np.testing.assert_allclose(value[sure], (2 * np.round(unit) / most - 1)[sure], atol=1e-6)
    dt = g / largest  # of t / max|t|; the largest entry also scales all
    dt.flat[np.abs(t).argmax()] -= (g * t).sum() / largest**2 * np.sign(t.flat[np.abs(t).argmax()])
    np.testing.assert_allclose(gradient, dt * (1 - t**2), rtol=1e-4, atol=1e-5)


# ---- activations ----


@pytest.mark.parametrize(("name", "at_one"), [("xnor", False), ("bnn", True)])
def test_sign_and_its_clipped_gradient(name: str, at_one: bool) -> None:
    x = torch.tensor([-2, -1, -0.5, -0.0, 0.0, 0.5, 1, 2, float("nan")], requires_grad=True)
    codes = quantizers.activations()[name]()(x)
    codes.backward(torch.arange(1.0, 10.0))
    assert codes.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1, -1]
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2 * at_one, 3, 4, 5, 6, 7 * at_one, 0, 0]


@pytest.mark.parametrize("bits", range(1, 9))
def test_dorefa_activations(bits: int, rng: np.random.Generator) -> None:
    x, g = latent(rng, (2, 3, 4, 5)), rng.normal(size=(2, 3, 4, 5))
    value, gradient = run(dorefa.DoReFaActivation(bits), x, g)
    most = 2**bits - 1
    unit = array(x).clip(0, 1) * most
    sure = no_tie(unit)
    np.testing.assert_allclose(value[sure], np.round(unit)[sure] / most, atol=1e-6)
    np.testing.assert_allclose(gradient, g * (array(x) >= 0) * (array(x) <= 1), rtol=1e-6)


def test_dorefa_codes_round_half_to_even_and_a_nan_is_0() -> None:
    x = torch.tensor([torch.nan, -1, -0.0, 0.5, 1 / 6, 5 / 6, 1, 7])
    assert dorefa.DoReFaActivation(1).codes(x).tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert dorefa.DoReFaActivation(2).codes(x).tolist() == [0, 0, 0, 2, 0, 2, 3, 3]


@pytest.mark.parametrize("bits", [1, 2, 6])
def test_dorefa_gradient_has_few_levels_and_is_right_on_average(bits: int, seed: int) -> None:
    g = torch.randn(3, 4, 5)
    g[1] *= 1e-6  # every example has its own scale
    g[2] = 0
    total = torch.zeros_like(g)
    for _ in range(2000):
        y = torch.zeros_like(g, requires_grad=True)
        out = dorefa.quantize_gradient(y, bits)
        assert torch.equal(out, y)
        out.backward(g)
        assert y.grad is not None
        total += y.grad
        for example, upstream in zip(y.grad, g, strict=True):
            assert len(example.unique()) <= 2**bits
            assert example.abs().max() <= upstream.abs().max() * (1 + 1e-6)
    for mean, expected in zip(total / 2000, g, strict=True):
        np.testing.assert_allclose(mean, expected, atol=0.15 * float(expected.abs().max()) / (2**bits - 1))  # 6 sigma


@pytest.mark.parametrize("bits", range(1, 9))
def test_pixels(bits: int, rng: np.random.Generator) -> None:
    x, g = latent(rng, (2, 3, 4, 5)), rng.normal(size=(2, 3, 4, 5))
    value, gradient = run(pixels.Pixels(bits), x, g)
    most = 2**bits - 1
    unit = (array(x).clip(-1, 1) + 1) * most / 2
    sure = no_tie(unit)
    np.testing.assert_allclose(value[sure], (2 * np.round(unit) - most)[sure] / most, atol=1e-6)
    np.testing.assert_allclose(gradient, g * (np.abs(array(x)) <= 1), rtol=1e-6)
    assert pixels.Pixels(bits).codes(torch.tensor([torch.nan, -9, 9])).tolist() == [-most, -most, most]


def test_pixels_are_exact_on_images() -> None:
    images = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pixels.Pixels().codes(to_float(images)), 2 * images.float() - 255)


def test_tbn(rng: np.random.Generator) -> None:
    quantizer = tbn.Ternary(0.4, momentum=0.25)
    running = np.sqrt(2 / np.pi)
    for _ in range(3):
        x, g = latent(rng, (2, 3, 4, 5)), rng.normal(size=(2, 3, 4, 5))
        mean = np.abs(array(x)).mean()
        running += 0.25 * (mean - running)
        value, gradient = run(quantizer, x, g)
        np.testing.assert_array_equal(value, np.sign(array(x)) * (np.abs(array(x)) >= 0.4 * mean))
        np.testing.assert_allclose(gradient, g * (np.abs(array(x)) <= 1), rtol=1e-6)
    value, gradient = run(quantizer.eval(), x, g)
    np.testing.assert_array_equal(value, np.sign(array(x)) * (np.abs(array(x)) >= 0.4 * running))
    np.testing.assert_allclose(gradient, g * (np.abs(array(x)) <= 1), rtol=1e-6)
    ((threshold,), _) = quantizer.operands()
    np.testing.assert_allclose(threshold, [0.4 * running], rtol=1e-6)


def test_tbn_at_its_threshold() -> None:
    quantizer = tbn.Ternary(1.0).eval()
    quantizer.running_mean.fill_(0.5)
    x = torch.tensor([torch.nan, -0.5, -0.49, -0.0, 0.0, 0.49, 0.5])
    assert quantizer.codes(x).tolist() == [0, -1, 0, 0, 0, 0, 1]
    quantizer.running_mean.zero_()
    assert quantizer.codes(x).tolist() == [0, -1, -1, 1, 1, 1, 1]


@pytest.mark.parametrize("order", range(1, 9))
@pytest.mark.parametrize("shape", [(2, 27, 4, 5), (3, 8)])
def test_horq(shape: tuple[int, ...], order: int, rng: np.random.Generator) -> None:
    x, g = latent(rng, shape), rng.normal(size=shape)
    value, gradient = run(horq.ResidualOfWindow(order), x, g)
    expected, sure, error = residual(array(x), order, (1,))
    np.testing.assert_allclose(value[sure], expected[sure], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient, g * (np.abs(array(x)) <= 1), rtol=1e-6)
    np.testing.assert_allclose(((array(x) - array(value)) ** 2).sum(1, keepdims=True), error, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 8)])
def test_binarynet_activations(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    x, g = latent(rng, shape), rng.normal(size=shape)
    value, gradient = run(binarynet.ResidualOfMap(), x, g)
    expected, sure, _ = residual(array(x), 2, tuple(range(1, len(shape))))
    np.testing.assert_allclose(value[sure], expected[sure], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient, g * (np.abs(array(x)) <= 1), rtol=1e-6)


def residual(x: Array, order: int, axes: tuple[int, ...]) -> tuple[Array, NDArray[np.bool_], Array]:
    """The approximation, where float32 finds the same signs, and ||x||^2 - N sum_j b_j^2, the squared error."""
    left, error, sure = x, (x**2).sum(axes, keepdims=True), np.ones_like(x, bool)
    for _ in range(order):
        scale = np.abs(left).mean(axes, keepdims=True)
        error = error - x.size / error.size * scale**2
        left = left - scale * signs(left)
        sure &= np.abs(left) > 1e-5
    return x - left, sure, error
