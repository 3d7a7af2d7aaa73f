"""Thresholds against brute force: the float32 formula itself, on every integer and on the floats where it turns."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_ops.output_transform import Step, apply, direction, emit, float_threshold, integer_threshold

CHANNELS = 64
SCALES = np.array([-2.0, -0.7, -1e-3, -1e-38, 1e-38, 1e-6, 0.3, 1.0, 7.5, -0.0, 0.0], np.float32)
NONZERO = SCALES[:-2]
SPECIALS = np.array(
    [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1.1754944e-38, 3.4028235e38, -3.4028235e38, np.inf, -np.inf, np.nan],
    np.float32,
)


def step(rng: np.random.Generator, op: str, spread: float, scales: np.ndarray = NONZERO) -> Step:
    """A step with constants of the size of what it meets; a third of the sums and bounds are zero."""
    if op in ("mul", "div"):
        return Step(op, rng.choice(scales, CHANNELS))
    kept = (rng.random(CHANNELS) < 0.67).astype(np.float32)
    return Step(op, rng.normal(0, spread, CHANNELS).astype(np.float32) * kept)  # type: ignore[arg-type]


def chains(rng: np.random.Generator, spread: float) -> dict[str, list[Step]]:
    """Every order of steps that a network makes, and some that it could."""
    zero, six = np.zeros(CHANNELS, np.float32), np.full(CHANNELS, 6, np.float32)
    scale, norm = step(rng, "mul", spread, SCALES), [step(rng, "mul", spread), step(rng, "add", spread / 2)]
    mixed = [step(rng, str(op), spread) for op in rng.choice(("mul", "div", "add", "max", "min"), 6)]
    return {
        "nothing": [],
        "scale": [scale],
        "scale, bias": [scale, step(rng, "add", spread)],
        "scale, norm": [scale, *norm],
        "norm, relu, norm": [*norm, Step("max", zero), *norm],
        "norm, clip, norm": [*norm, Step("max", zero), Step("min", six), *norm],
        "only a bound": [step(rng, "max", spread)],
        "quotient": [step(rng, "div", spread), step(rng, "add", spread)],
        "mixed": mixed,
        "tiny sum": [Step("add", rng.choice(np.float32([1e-45, -1e-45, 1e-38, -1e-30]), CHANNELS)), *norm],
    }


CHAINS = sorted(chains(np.random.default_rng(0), 1.0))


def integer_bits(steps: list[Step], values: np.ndarray) -> np.ndarray:
    """What the formula says: bool [values, C]."""
    return apply(steps, np.broadcast_to(values[:, None].astype(np.float32), (len(values), CHANNELS))) >= 0


@pytest.mark.parametrize("limit", [1, 9, 288, 4608])
@pytest.mark.parametrize("chain", CHAINS)
def test_integer_threshold_on_every_integer(chain: str, limit: int, rng: np.random.Generator) -> None:
    steps = chains(rng, limit / 2)[chain]
    threshold = integer_threshold(steps, CHANNELS, limit)
    assert threshold.at.dtype == np.int64
    assert set(threshold.flip.tolist()) <= {-1, 1}
    assert threshold.at.min() >= -limit
    assert threshold.at.max() <= limit + 1
    values = np.arange(-limit, limit + 1)
    expected = integer_bits(steps, values)
    np.testing.assert_array_equal(threshold.flip * values[:, None] >= threshold.at, expected)
    np.testing.assert_array_equal(threshold.at == limit + 1, ~expected.any(0))


@pytest.mark.parametrize("chain", CHAINS)
def test_integer_threshold_at_the_largest_limit(chain: str, rng: np.random.Generator) -> None:
    limit = (1 << 24) - 1
    steps = chains(rng, limit / 2)[chain]
    threshold = integer_threshold(steps, CHANNELS, limit)
    turns = (threshold.flip * threshold.at)[:, None] + np.arange(-3, 4)
    values = np.concatenate((turns.ravel(), rng.integers(-limit, limit, 1000), [-limit, 0, limit]))
    values = np.unique(values.clip(-limit, limit))
    np.testing.assert_array_equal(threshold.flip * values[:, None] >= threshold.at, integer_bits(steps, values))


@pytest.mark.parametrize("limit", [1 << 24, 1 << 30])
def test_sums_that_float32_cannot_hold_are_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=f"a sum may reach {limit}, .*: split the layer"):
        integer_threshold([], 1, limit)


@pytest.mark.parametrize("chain", CHAINS)
def test_float_threshold_on_floats_of_every_size(chain: str, rng: np.random.Generator) -> None:
    steps = chains(rng, 1.0)[chain]
    threshold = float_threshold(steps, CHANNELS)
    assert threshold.at.dtype == np.float32
    turn = np.where(np.isnan(threshold.at), np.float32(0), threshold.flip * threshold.at).astype(np.float32)
    beside = [turn]
    with np.errstate(over="ignore"):
        for toward in (np.float32(np.inf), np.float32(-np.inf)):
            at = turn
            for _ in range(3):
                at = np.nextafter(at, toward)
                beside.append(at)
    anywhere = rng.integers(0, 1 << 32, (2000, CHANNELS), dtype=np.uint32).view(np.float32)
    usual = rng.normal(0, 2, (2000, CHANNELS)).astype(np.float32)
    specials = np.broadcast_to(SPECIALS[:, None], (len(SPECIALS), CHANNELS))
    x = np.concatenate((np.stack(beside), anywhere, usual, specials))
    with np.errstate(invalid="ignore"):
        bits, expected = threshold.flip * x >= threshold.at, apply(steps, x) >= 0
    compared = np.isfinite(x) | np.isnan(x) | (direction(steps, CHANNELS) != 0)  # an infinity times 0: see the module
    np.testing.assert_array_equal(bits[compared], expected[compared])
    assert not bits[np.isnan(x)].any()


def test_a_sign_without_steps_is_a_comparison_with_zero() -> None:
    assert integer_threshold([], 3, 10).at.tolist() == [0, 0, 0]
    threshold = float_threshold([], 1)
    values = np.array([0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, np.nan], np.float32)
    assert (values >= threshold.at).tolist() == [True, True, True, False, True, False, False]


def test_constant_channels_are_always_or_never() -> None:
    steps = [Step("mul", np.zeros(2, np.float32)), Step("add", np.array([0.5, -0.5], np.float32))]
    assert integer_threshold(steps, 2, 7).at.tolist() == [-7, 8]
    always, never = float_threshold(steps, 2).at
    assert always <= np.finfo(np.float32).min
    assert np.isnan(never)


def test_direction_is_the_sign_of_the_product_of_factors() -> None:
    first, second = np.array([2, -2, 3, 0, -1], np.float32), np.array([1, -4, -5, 6, 2], np.float32)
    steps = [Step("mul", first), Step("add", -first), Step("div", second), Step("max", first)]
    assert direction(steps, 5).tolist() == [1, 1, -1, 0, -1]
    by_zero = np.array([0.0, -0.0], np.float32)
    assert direction([Step("div", by_zero)], 2).tolist() == [1, -1]


def test_division_by_zero() -> None:
    steps = [Step("div", np.resize(np.array([0.0, -0.0], np.float32), CHANNELS))]
    threshold, values = integer_threshold(steps, CHANNELS, 5), np.arange(-5, 6)
    np.testing.assert_array_equal(threshold.flip * values[:, None] >= threshold.at, integer_bits(steps, values))


def test_steps_round_one_by_one() -> None:
    """A fused multiply-add would give another last bit, and after cancellation another sign."""
    one = np.float32(1 + 2**-12)
    steps = [Step("mul", np.array([one])), Step("add", np.array([-np.float32(one * one)]))]
    exact = float(one) * float(one) - float(np.float32(one * one))
    assert exact != 0
    assert apply(steps, np.array([[one]], np.float32)) == 0


@pytest.mark.parametrize("scheduled", [True, False])
@pytest.mark.parametrize("chain", CHAINS)
def test_compiled_steps_are_those_of_numpy(chain: str, scheduled: bool, rng: np.random.Generator) -> None:
    import tvm
    from tvm import te

    import targets
    from pipeline.compiler import default_schedule

    steps = chains(rng, 1.0)[chain]
    x = rng.normal(0, 2, (40, CHANNELS)).astype(np.float32)
    x[: len(SPECIALS)] = SPECIALS[:, None]
    data = te.placeholder(x.shape, "float32", "x")
    constants = [te.placeholder((CHANNELS,), "float32", f"c{i}") for i in range(len(steps))]
    out = te.compute(x.shape, lambda *i: emit(steps, constants, data[i], i[-1]) + 0.0, name="transformed")
    mod = tvm.IRModule({"main": te.create_prim_func([data, *constants, out])})
    target = targets.host()
    mod = default_schedule(mod, target, 1).mod if scheduled else mod
    result = tvm.runtime.tensor(np.empty_like(x))
    tensors = [tvm.runtime.tensor(a) for a in (x, *(s.value for s in steps))]
    tvm.tirx.build(mod, target=target.tvm_target(1))["main"](*tensors, result)
    np.testing.assert_array_equal(result.numpy(), apply(steps, x))
