"""A contract over every quantiser, then the closed forms of each in NumPy (float64), without the code's help."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline import quantizers
from pipeline.quantizers import ActivationQuantizer, WeightQuantizer
from pipeline.quantizers.bwn import CrossFilterBinary
from pipeline.quantizers.sign import Sign

WEIGHTS = [name for name in quantizers.names() if issubclass(quantizers.load(name), WeightQuantizer)]
ACTIVATIONS = [name for name in quantizers.names() if issubclass(quantizers.load(name), ActivationQuantizer)]
GROUPS = [1, 2, 3, 4, 16, 100]
SHAPES = [(5, 3, 3, 2), (17, 4, 1, 1), (16, 7), (1, 1, 3, 3)]


@pytest.fixture
def rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def latent(rng: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """A latent weight with entries inside and outside [-1, 1], a zero and a negative zero."""
    weight = rng.normal(0, 1, shape).astype(np.float32)
    weight.flat[0], weight.flat[-1] = 0.0, -0.0
    return torch.from_numpy(weight).requires_grad_()


# ---- contract ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_contract(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    quantizer, weight = quantizers.load(name)(), latent(rng, shape)
    quantized, bits = quantizer(weight), quantizer.encode(weight)
    assert quantized.shape == weight.shape
    assert quantized.dtype == torch.float32
    assert torch.equal(quantized, bits.dequantize())
    assert bits.signs.shape == weight.shape
    assert set(bits.signs.unique().tolist()) <= {-1.0, 1.0}
    assert bits.scale.shape == (-(-shape[0] // bits.group),)
    assert bits.scale.dtype == torch.float32
    assert bits.per_filter().shape == (shape[0],)
    quantized.backward(torch.from_numpy(rng.normal(size=shape).astype(np.float32)))
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().sum() > 0
    quantizer.constrain_(weight)
    assert weight.isfinite().all()
    assert weight.requires_grad


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_contract(name: str, rng: np.random.Generator) -> None:
    quantizer, x = quantizers.load(name)(), latent(rng, (2, 3, 4, 5))
    codes = quantizer(x)
    assert codes.shape == x.shape
    assert codes.dtype == torch.float32
    assert codes.isfinite().all()
    codes.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", quantizers.names())
def test_method_is_told(name: str) -> None:
    kind = quantizers.load(name)
    assert kind.method.operand == ("weight" if issubclass(kind, WeightQuantizer) else "activation")
    assert kind.method.bits >= 1
    assert kind.method.formula
    assert kind.method.source


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'binary': choose one of .*bwn.*sign"):
        quantizers.load("binary")


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
    np.testing.assert_allclose(CrossFilterBinary(group)(weight).detach(), expected, rtol=1e-6)
    np.testing.assert_allclose(
        CrossFilterBinary(group).encode(weight).scale, [np.abs(part).mean() for part in parts], rtol=1e-6
    )


@pytest.mark.parametrize("gradient", ["published", "exact"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bwn_gradient(shape: tuple[int, ...], group: int, gradient: str, rng: np.random.Generator) -> None:
    weight, upstream = latent(rng, shape), rng.normal(size=shape).astype(np.float32)
    CrossFilterBinary(group, gradient)(weight).backward(torch.from_numpy(upstream))  # type: ignore[arg-type]
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
    filterwise = CrossFilterBinary(1).encode(weight)
    bits = CrossFilterBinary(group).encode(filterwise.dequantize())
    assert torch.equal(bits.signs, filterwise.signs)
    means = [part.mean() for part in slices(filterwise.scale.double().numpy(), group)]
    np.testing.assert_allclose(bits.scale, means, rtol=1e-6)
    np.testing.assert_allclose(bits.scale, CrossFilterBinary(group).encode(weight).scale, rtol=1e-6)


@pytest.mark.parametrize("group", GROUPS)
def test_bwn_price_of_sharing(group: int, rng: np.random.Generator) -> None:
    """J_CF - J_filterwise = q sum_i (a_i - mean a)^2 over every group (papers' section 1.3)."""
    weight = latent(rng, (17, 3, 3, 3)).detach()
    shared, filterwise = (
        ((weight - CrossFilterBinary(m).encode(weight).dequantize()).double() ** 2).sum() for m in (group, 1)
    )
    scales = slices(CrossFilterBinary(1).encode(weight).scale.double().numpy(), group)
    price = 27 * sum(((a - a.mean()) ** 2).sum() for a in scales)
    np.testing.assert_allclose(shared - filterwise, price, rtol=1e-4, atol=1e-4)


def test_bwn_constraint(rng: np.random.Generator) -> None:
    small, large = (torch.from_numpy(rng.normal(0, spread, (8, 4, 3, 3))) for spread in (0.1, 10))
    CrossFilterBinary().constrain_(small)
    np.testing.assert_allclose(small.mean(1), 0, atol=1e-12)
    CrossFilterBinary().constrain_(large)
    assert large.abs().max() == 1
    one = torch.full((8, 1, 3, 3), 0.5)
    CrossFilterBinary().constrain_(one)
    assert torch.equal(one, torch.full((8, 1, 3, 3), 0.5))


@pytest.mark.parametrize(("group", "gradient"), [(0, "published"), (-2, "exact"), (1, "straight")])
def test_bwn_refuses(group: int, gradient: str) -> None:
    with pytest.raises(ValueError, match=r"^(group|gradient) = "):
        CrossFilterBinary(group, gradient)  # type: ignore[arg-type]


# ---- sign ----


def test_sign_and_its_clipped_gradient() -> None:
    x = torch.tensor([-2, -1, -0.5, -0.0, 0.0, 0.5, 1, 2, float("nan")], requires_grad=True)
    codes = Sign()(x)
    codes.backward(torch.arange(1.0, 10.0))
    assert codes.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1, -1]
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 6, 0, 0, 0]
