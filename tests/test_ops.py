"""Every TE operator, scheduled and not, against naive loops over windows; and what each target makes of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machines
import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import te, tirx
from tvm.s_tir import Schedule

import targets
from pipeline import compiler
from pipeline.compiler import default_schedule
from tvm_ops import output_transform, schedule_cpu
from tvm_ops.bitplanes import BINARY, TERNARY, Code, encode, odd, pack, unsigned
from tvm_ops.ops import binary_max_pool2d, bitpack, bitserial_conv2d, float_conv2d, max_pool2d, pooled_conv2d, quantize
from tvm_ops.ops.bitserial_conv2d import Border, Geometry, Product
from tvm_ops.output_transform import Step, Threshold, apply

SCHEDULED = pytest.mark.parametrize("scheduled", [True, False], ids=["scheduled", "plain"])
# (batch, channels, filters, geometry)
CASES = {
    "1x1 of one channel": (1, 1, 1, Geometry((4, 5), (1, 1))),
    "dense": (1, 100, 10, Geometry((1, 1), (1, 1))),
    "dense batch": (5, 64, 33, Geometry((1, 1), (1, 1))),
    "1x1 strided": (2, 33, 32, Geometry((7, 6), (1, 1), (2, 3))),
    "3x3": (1, 32, 64, Geometry((8, 8), (3, 3), (1, 1), (1, 1, 1, 1))),
    "3x3 batch": (3, 31, 10, Geometry((5, 7), (3, 3), (2, 1), (1, 0, 2, 1))),
    "3x3 wide pads": (1, 33, 33, Geometry((3, 4), (3, 3), (1, 2), (3, 2, 0, 4))),
    "3x3 dilated": (1, 100, 32, Geometry((9, 8), (3, 3), (1, 1), (2, 1, 2, 3), (2, 3))),
    "1x3": (2, 64, 1, Geometry((5, 9), (1, 3), (1, 1), (0, 1, 0, 0))),
    "5x5": (1, 32, 10, Geometry((9, 7), (5, 5), (2, 2), (2, 2, 2, 2))),
    "5x5 beyond the image": (1, 33, 64, Geometry((2, 3), (5, 5), (1, 1), (2, 2, 2, 2))),
    "5x3 beyond one side": (2, 1, 33, Geometry((2, 6), (5, 3), (1, 1), (4, 0, 1, 1))),
}
CONVOLUTIONS = pytest.mark.parametrize(
    ("case", "scheduled"),
    [*((case, True) for case in CASES), *((case, False) for case in list(CASES)[1::3])],  # LLVM takes most of the time
)


def signs(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.choice(np.array([-1, 1], np.int8), shape)


def drawn(rng: np.random.Generator, code: Code, *shape: int) -> np.ndarray:
    return rng.choice(np.array(code.values, np.int64), shape)


def words(values: np.ndarray, code: Code = BINARY) -> np.ndarray:
    """Activations [N, H, W, C] as kernels take them; ternary ones as sign and mask."""
    planes = encode(values, code)
    planes = np.stack([planes[0], planes[0] | planes[1]]) if code == TERNARY else planes
    return pack(np.moveaxis(planes, 0, -2))


def lower(compute: Callable[..., Any], arrays: list[np.ndarray]) -> tuple[tvm.IRModule, np.ndarray]:
    """The function of placeholders like ``arrays``, and an array for its result."""
    inputs = [te.placeholder(a.shape, str(a.dtype), f"input{i}") for i, a in enumerate(arrays)]
    output = compute(*inputs)
    garbage = np.full([int(extent) for extent in output.shape], 77, str(output.dtype))
    return tvm.IRModule({"main": te.create_prim_func([*inputs, output])}), garbage


def build(mod: tvm.IRModule, target: targets.Target, scheduled: bool = True, threads: int = 1) -> Any:
    mod = default_schedule(mod, target, threads).mod if scheduled else mod
    return tirx.build(tvm.IRModule({"main": compiler.finish(mod["main"], target)}), target=target.tvm_target(threads))


def run(
    compute: Callable[..., Any],
    arrays: list[np.ndarray],
    scheduled: bool,
    threads: int = 1,
    emulated: tuple[targets.Target, Path] | None = None,
) -> np.ndarray:
    """Built for the host and called; or for another target, and run in a folder by `machines`."""
    mod, garbage = lower(compute, arrays)
    if emulated is not None:
        target, folder = emulated
        return machines.call(target, build(mod, target, scheduled), arrays, garbage, folder)
    return call(build(mod, targets.host(), scheduled, threads), arrays, garbage)


def call(library: Any, arrays: list[np.ndarray], garbage: np.ndarray) -> np.ndarray:
    out = tvm.runtime.tensor(garbage)
    library["main"](*map(tvm.runtime.tensor, arrays), out)
    return out.numpy()


def windows(geometry: Geometry) -> list[tuple[int, int, list[tuple[int, int, int, int]]]]:
    """(row, column, [(tap row, tap column, image row, image column)]) of every output, taps outside left out."""
    found = []
    (h, w), (kh, kw) = geometry.image, geometry.kernel
    (sy, sx), (dy, dx), (top, left, bottom, right) = geometry.strides, geometry.dilations, geometry.pads
    for row in range((top + h + bottom - dy * (kh - 1) - 1) // sy + 1):
        for column in range((left + w + right - dx * (kw - 1) - 1) // sx + 1):
            taps = []
            for ky in range(kh):
                for kx in range(kw):
                    y, x = row * sy - top + ky * dy, column * sx - left + kx * dx
                    if 0 <= y < h and 0 <= x < w:
                        taps.append((ky, kx, y, x))
            found.append((row, column, taps))
    return found


def convolution(x: np.ndarray, weight: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Integer sums [N, OH, OW, O] of [N, H, W, C] and [O, C, KH, KW], zeros around."""
    positions = windows(geometry)
    sums = np.zeros((len(x), positions[-1][0] + 1, positions[-1][1] + 1, len(weight)), np.int64)
    for row, column, taps in positions:
        for ky, kx, y, at in taps:
            sums[:, row, column] += x[:, y, at].astype(np.int64) @ weight[:, :, ky, kx].T.astype(np.int64)
    return sums


def transform(rng: np.random.Generator, filters: int, spread: float) -> list[Step]:
    """Scale, norm and ReLU whose factors may be negative and zero."""
    scale = rng.choice(np.array([0.25, -0.3, 1e-30, 0.0, 1.0], np.float32), filters)
    gamma = rng.choice(np.array([1.5, -0.7, 0.1], np.float32), filters)
    shift = (rng.normal(0, spread / 4, filters) * rng.integers(0, 2, filters)).astype(np.float32)
    return [Step("mul", scale), Step("max", shift), Step("mul", gamma), Step("add", -shift / 2)]


# Bit-serial convolution ------------------------------------------------------------------------------------------


CODES = {
    "1a": BINARY,
    "ternary a": TERNARY,
    "2a": unsigned(2),
    "8a": unsigned(8),
    "signed 8a": odd(8),
    "1w": BINARY,
    "ternary w": TERNARY,
    "2w": odd(2),
    "8w": odd(8),
}
ACTIVATIONS, WEIGHTS = [c for c in CODES if c.endswith("a")], [c for c in CODES if c.endswith("w")]


def float_kernel(product: Product, edge: Border, steps: list[Step], x: Any, w: Any, *rest: Any) -> Any:
    return bitserial_conv2d.compute_float(product, edge, steps, bitserial_conv2d.popcounts(x, w, product), *rest)


def bit_kernel(product: Product, edge: Border, x: Any, w: Any, *rest: Any) -> Any:
    return bitserial_conv2d.compute_bits(product, edge, bitserial_conv2d.popcounts(x, w, product), *rest)


def bit_weight(weight: np.ndarray, product: Product, steps: list[Step]) -> tuple[np.ndarray, Any, np.ndarray]:
    """Words, border and thresholds for a kernel that writes bits."""
    flip, edge, most = bitserial_conv2d.bit_threshold(weight, product, steps)
    packed = bitserial_conv2d.pack_weight(weight * flip.reshape(-1, 1, 1, 1), product.w)
    return np.pad(packed, [*[(0, 0)] * 4, (0, most.shape[-1] - len(flip))]), edge, most


def check_convolution(
    x: np.ndarray, weight: np.ndarray, product: Product, steps: list[Step], to: str, **options: Any
) -> None:
    """A kernel of codes [N, H, W, C] and [O, C, KH, KW] against loops."""
    expected = apply(steps, convolution(x, weight, product.geometry).astype(np.float32))
    packed = words(x, product.x)
    target = options["emulated"][0] if "emulated" in options else targets.host()
    rest = []
    if product.nonzeros:
        counted = run(lambda t: bitserial_conv2d.nonzeros(t, product), [packed], **options)
        ones = np.ones_like(weight[:1])
        expected_count = product.nonzeros * convolution(np.abs(x), ones, product.geometry)[..., 0]
        np.testing.assert_array_equal(counted, expected_count)
        rest = [counted]
    if to == "floats":
        edge = bitserial_conv2d.border(weight, product)
        for weights in forms(bitserial_conv2d.pack_weight(weight, product.w), product, target):
            arrays = [packed, weights, *rest, *bitserial_conv2d.float_constants(edge, steps)]
            result = run(lambda *t: float_kernel(product, edge, steps, *t), arrays, **options)
            np.testing.assert_array_equal(result, expected)
    else:
        in_words, edge, most = bit_weight(weight, product, steps)
        for weights in forms(in_words, product, target):
            bounds = bitserial_conv2d.octet_thresholds(most, product) if weights.dtype == np.uint8 else most
            arrays = [packed, weights, *rest, bounds]
            result = run(lambda *t: bit_kernel(product, edge, *t), arrays, **options)
            np.testing.assert_array_equal(result[..., 0, :], pack(expected >= 0))


def forms(words: np.ndarray, product: Product, target: targets.Target) -> list[np.ndarray]:
    """Weights as words, and as bytes where the target takes those for so many filters."""
    counter, (kh, kw, _, depth, filters) = target.byte_counter, words.shape
    fits = bitserial_conv2d.fits_octets(product, kh * kw * depth * 32)
    if counter is None or filters % counter.octets or not fits:
        return [words]
    return [words, bitserial_conv2d.octets(words, counter.octets, product.planes)]


@CONVOLUTIONS
@pytest.mark.parametrize("to", ["floats", "bits"])
def test_convolution(case: str, scheduled: bool, to: str, rng: np.random.Generator) -> None:
    batch, channels, filters, geometry = CASES[case]
    x, weight = signs(rng, batch, *geometry.image, channels), signs(rng, filters, channels, *geometry.kernel)
    steps = transform(rng, filters, (channels * weight[0, 0].size) ** 0.5)
    threads = 1 + int(rng.integers(2))
    check_convolution(x, weight, Product(geometry), steps, to, scheduled=scheduled, threads=threads)


@pytest.mark.parametrize("w", WEIGHTS)
@pytest.mark.parametrize("a", ACTIVATIONS)
def test_convolution_of_every_pair_of_codes(a: str, w: str, rng: np.random.Generator) -> None:
    """Padded, on channels that fill no word; through a transform to floats, and to bits."""
    cases = [CASES[case] for case in ("3x3 batch", "3x3 wide pads", "1x3", "dense")]
    fitting = [c for c in cases if Product(c[3], CODES[a], CODES[w]).limit(c[1] * int(np.prod(c[3].kernel))) < 1 << 24]
    batch, channels, filters, geometry = fitting[int(rng.integers(len(fitting)))]
    x = drawn(rng, CODES[a], batch, *geometry.image, channels)
    weight = drawn(rng, CODES[w], filters, channels, *geometry.kernel)
    product = Product(geometry, CODES[a], CODES[w])
    steps = transform(rng, filters, 20.0 * CODES[a].largest * CODES[w].largest)
    print(geometry, channels, filters)
    check_convolution(x, weight, product, steps, str(rng.choice(["floats", "bits"])), scheduled=True)


@pytest.mark.parametrize("pair", [("1a", "1w"), ("2a", "2w"), ("ternary a", "1w"), ("ternary a", "ternary w")])
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][3].image != (1, 1)])
@pytest.mark.parametrize("target", ["x86-avx2", "x86-avx512bw"])
def test_convolution_in_bytes(
    target: str, case: str, pair: tuple[str, str], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many filters as make blocks of bytes: vectors of one and of several blocks, windows of several networks."""
    host = targets.load(target)
    if missing := host.missing_features():
        pytest.skip(f"this CPU lacks {missing}")
    monkeypatch.setattr(targets, "host", lambda: host)
    batch, channels, _, geometry = CASES[case]
    a, w = (CODES[name] for name in pair)
    filters = 64 * int(rng.integers(1, 4))
    product = Product(geometry, a, w)
    x, weight = drawn(rng, a, batch, *geometry.image, channels), drawn(rng, w, filters, channels, *geometry.kernel)
    assert len(forms(bitserial_conv2d.pack_weight(weight, w), product, host)) == 2
    steps = transform(rng, filters, 20.0 * a.largest * w.largest)
    threads = 1 + int(rng.integers(2))
    check_convolution(x, weight, product, steps, str(rng.choice(["floats", "bits"])), scheduled=True, threads=threads)


@pytest.mark.parametrize(
    ("size", "depth", "bits"),
    [(1, 1, 1), (1, 3, 2), (1, 7, 1), (1, 8, 1), (3, 2, 1), (3, 3, 2), (3, 4, 1), (3, 4, 3)],
)
@pytest.mark.parametrize("target", ["x86-avx2", "x86-avx512bw"])
def test_networks_up_to_all_that_differ(
    target: str, size: int, depth: int, bits: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows whose bits all differ, all agree, or all but one, in networks of many forms; thresholds up to beyond."""
    host = targets.load(target)
    if missing := host.missing_features():
        pytest.skip(f"this CPU lacks {missing}")
    monkeypatch.setattr(targets, "host", lambda: host)
    filters, code = 64, BINARY if bits == 1 else unsigned(bits)
    pattern = signs(rng, 1, 32 * depth, size, size)
    weight = pattern * signs(rng, filters, 1, 1, 1)
    least, most = min(code.values), max(code.values)
    x = drawn(rng, code, 4, size, size, 32 * depth)
    x[:3] = np.where(pattern > 0, most, least).transpose(0, 2, 3, 1)
    x[1] = most + least - x[0]
    x[2, 0, 0, 0] = most + least - x[0, 0, 0, 0]
    product = Product(Geometry((size, size), (size, size)), code)
    largest = int(np.abs(convolution(x, weight, product.geometry)).max())
    at = rng.choice([s * (largest - off) for s in (-1, 1) for off in (-1, 0, 1, 2, 3)] + [0], filters)
    check_convolution(x, weight, product, [], "floats", scheduled=True)
    check_convolution(x, weight, product, [Step("add", -at.astype(np.float32))], "bits", scheduled=True)


def test_sums_of_bytes_that_16_bits_just_hold(rng: np.random.Generator) -> None:
    """A dense layer of 2^15 - 32 channels that all differ; with a word more, its weights are no bytes."""
    counter = targets.host().byte_counter
    if counter is None:
        pytest.skip(f"{targets.host().name} takes no weights in bytes")
    channels, filters = (1 << 15) - 32, counter.octets
    weight = signs(rng, filters, channels, 1, 1)
    x = (-weight[0, :, 0, 0]).reshape(1, 1, 1, channels)
    product = Product(Geometry((1, 1), (1, 1)))
    for steps, to in (
        ([], "floats"),
        ([Step("add", np.float32(channels - 0.5) * np.ones(filters, np.float32))], "bits"),
    ):
        check_convolution(x, weight, product, steps, to, scheduled=True)
    assert bitserial_conv2d.fits_octets(product, channels)
    assert not bitserial_conv2d.fits_octets(product, channels + 32)


@pytest.mark.parametrize("case", CASES)
def test_convolution_without_vectors(case: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the schedule of a Cortex-M4, on this CPU."""
    scalar = dataclasses.replace(targets.host(), vector_bits=32, registers=8, byte_counter=None)
    monkeypatch.setattr(targets, "host", lambda: scalar)
    batch, channels, filters, geometry = CASES[case]
    x, weight = signs(rng, batch, *geometry.image, channels), signs(rng, filters, channels, *geometry.kernel)
    steps = transform(rng, filters, (channels * weight[0, 0].size) ** 0.5)
    check_convolution(x, weight, Product(geometry), steps, str(rng.choice(["floats", "bits"])), scheduled=True)


def test_unsigned_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="is no code of weights"):
        Product(Geometry((1, 1), (1, 1)), BINARY, unsigned(2))


@SCHEDULED
def test_sums_beyond_16_bits(scheduled: bool, rng: np.random.Generator) -> None:
    """5x5x3072 taps that agree, disagree, or nearly so: up to +-76800."""
    geometry = Geometry((6, 5), (5, 5), (1, 1), (1, 0, 0, 1))
    filters = int(rng.choice([33, 64]))
    x, weight = signs(rng, 1, 6, 5, 3072), signs(rng, filters, 3072, 5, 5)
    weight[0] = x[0, :5, :5].transpose(2, 0, 1)
    weight[1] = -weight[0]
    weight[2] = weight[0]
    weight[2, 0, 0, 0] *= -1
    sums = convolution(x, weight, geometry)
    assert sums[0, 1, 0, :3].tolist() == [76800, -76800, 76798]
    steps = [Step("add", np.resize(np.array([-76800, 76799, -76799], np.float32), filters))]
    assert (apply(steps, sums.astype(np.float32)) >= 0)[0, 1, 0, :3].tolist() == [True, False, False]
    for to in ("floats", "bits"):
        check_convolution(x, weight, Product(geometry), steps, to, scheduled=scheduled)


pairs = st.tuples(st.integers(1, 6), st.integers(1, 6))
small = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(pairs, pairs, small, st.tuples(*[st.integers(0, 4)] * 4), small, st.integers(0, 2**32 - 1))
def test_border_constants(
    image: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilations: tuple[int, int],
    seed: int,
) -> None:
    """dot = border - 2 popcounts over zero-padded words, looked up as kernels do, for any window."""
    geometry = Geometry(image, kernel, strides, pads, dilations)
    if min(geometry.output) < 1:
        return
    rng = np.random.default_rng(seed)
    x, weight = signs(rng, 1, *image, 3), signs(rng, 2, 3, *kernel)
    edge = bitserial_conv2d.border(weight, Product(geometry))
    counts = np.zeros((*geometry.output, 2), np.int64)
    for row, column, taps in windows(geometry):
        inside = {(ky, kx): x[0, y, at] > 0 for ky, kx, y, at in taps}
        for ky, kx in np.ndindex(*kernel):
            bits = inside.get((ky, kx), np.zeros(3, bool))
            counts[row, column] += (bits != (weight[:, :, ky, kx] > 0)).sum(1)
    row_entry, column_entry = (
        [int(run.entry(tirx.const(i, "int32"))) if size > 1 else 0 for i in range(extent)]
        for run, size, extent in zip((edge.rows, edge.columns), edge.values.shape, geometry.output, strict=False)
    )
    assert max(row_entry) == edge.values.shape[0] - 1
    assert max(column_entry) == edge.values.shape[1] - 1
    constants = edge.values[np.ix_(row_entry, column_entry)]
    np.testing.assert_array_equal(constants - 2 * counts, convolution(x, weight, geometry)[0])


def test_the_border_of_a_padded_3x3_has_3x3_entries(rng: np.random.Generator) -> None:
    geometry = Geometry((32, 32), (3, 3), (1, 1), (1, 1, 1, 1))
    assert bitserial_conv2d.border(signs(rng, 4, 8, 3, 3), Product(geometry)).values.shape == (3, 3, 4)
    assert bitserial_conv2d.border(signs(rng, 4, 8, 3, 3), Product(Geometry((32, 32), (3, 3)))).values.shape == (
        1,
        1,
        4,
    )


def test_filters_that_fill_a_word_never_give_a_bit(rng: np.random.Generator) -> None:
    always = [Step("add", np.full(5, 1e6, np.float32))]
    _, _, most = bitserial_conv2d.bit_threshold(signs(rng, 5, 7, 3, 3), Product(Geometry((4, 4), (3, 3))), always)
    assert most.shape == (1, 1, 32)
    assert (most[..., 5:] < -(1 << 24)).all()


def test_a_layer_too_large_for_float32_is_refused() -> None:
    with pytest.raises(ValueError, match="split the layer"):
        bitserial_conv2d.bit_threshold(np.ones((1, 1 << 24, 1, 1), np.int8), Product(Geometry((1, 1), (1, 1))), [])


# Packing floats --------------------------------------------------------------------------------------------------


@SCHEDULED
@pytest.mark.parametrize("bounds", ["low", "low and high"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (1, 32), (2, 3, 5, 33), (1, 2, 2, 64), (1, 4, 3, 100), (2, 2)])
def test_bitpack(shape: tuple[int, ...], bounds: str, scheduled: bool, rng: np.random.Generator) -> None:
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45], np.float32)

    def values(*of: int) -> np.ndarray:
        usual = rng.integers(-3, 4, of).astype(np.float32)  # so that many are equal to their bound
        return np.where(rng.random(of) < 0.3, rng.choice(special, of), usual)

    x, low, high = values(*shape), values(shape[-1]), values(shape[-1])
    given_bounds = [low] if bounds == "low" else [low, high]
    expected = (x >= low) & (x <= high) if bounds == "low and high" else x >= low
    result = run(bitpack.compute, [x, *given_bounds], scheduled)
    np.testing.assert_array_equal(result[..., 0, :], pack(expected))


@SCHEDULED
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (1, 32), (2, 3, 5, 33), (1, 2, 2, 64), (1, 4, 3, 100)])
def test_planes_of_patterns(shape: tuple[int, ...], scheduled: bool, rng: np.random.Generator) -> None:
    x, planes = rng.integers(0, 256, shape).astype(np.uint8), int(rng.integers(1, 9))
    result = run(lambda t: bitpack.compute_planes(t, planes), [x], scheduled)
    expected = np.stack([pack(x >> p & 1) for p in range(planes)], -2)
    np.testing.assert_array_equal(result, expected)


def quantised(rng: np.random.Generator, formula: Callable[[Any], Any]) -> tuple[np.ndarray, np.ndarray]:
    """Floats around every step of a code, and their patterns."""
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 2.5, 0.5, -0.5]
    steps = np.concatenate([np.arange(-8, 9) / 6, np.arange(-3, 4) / 3, np.arange(513) / 510])
    x = np.concatenate([special, steps, rng.normal(0, 1, 400)]).astype(np.float32)
    return x, run(lambda t: te.compute(t.shape, lambda i: formula(t[i])), [x], scheduled=True)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_quantize_unit(bits: int, rng: np.random.Generator) -> None:
    x, found = quantised(rng, lambda v: quantize.unit(v, bits))
    expected = np.round(np.nan_to_num(x, nan=-1.0).clip(0, 1) * np.float32(2**bits - 1))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_quantize_symmetric(bits: int, rng: np.random.Generator) -> None:
    x, found = quantised(rng, lambda v: quantize.symmetric(v, bits))
    one = np.float32(1)
    expected = np.round((np.nan_to_num(x, nan=-1.0).clip(-1, 1) + one) * np.float32((2**bits - 1) / 2))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_ternary_patterns(threshold: float, rng: np.random.Generator) -> None:
    x, found = quantised(rng, lambda v: quantize.ternary(v, threshold))
    np.testing.assert_array_equal(found, np.where(x >= threshold, 3, np.where(x <= -threshold, 2, 0)))


@pytest.mark.parametrize("descending", [True, False])
def test_bounds_of_a_threshold(descending: bool, rng: np.random.Generator) -> None:
    at = np.array([0.0, -0.0, 1.5, -2.5, np.inf, -np.inf, np.nan, 1e-45] * 2, np.float32)
    flip = np.repeat(np.array([1, -1 if descending else 1], np.int8), 8)
    x = np.concatenate((at, -at, rng.normal(0, 2, 50).astype(np.float32)))[:, None]
    constants = bitpack.constants(Threshold(flip, at))
    assert len(constants) == 1 + descending
    assert all(c.dtype == np.float32 for c in constants)
    bits = (x >= constants[0]) & (x <= constants[1] if descending else True)
    np.testing.assert_array_equal(bits, flip * x >= at)


# Max pooling of bits ---------------------------------------------------------------------------------------------


@SCHEDULED
@pytest.mark.parametrize(
    ("channels", "geometry"),
    [
        (1, Geometry((4, 4), (2, 2), (2, 2))),
        (33, Geometry((7, 5), (3, 3), (2, 2), (1, 1, 1, 1))),
        (64, Geometry((6, 6), (3, 2), (1, 2), (2, 0, 1, 1))),
        (100, Geometry((8, 9), (2, 3), (1, 1), (1, 0, 0, 1), (2, 1))),
        (32, Geometry((5, 6), (5, 6), (5, 6))),
    ],
)
def test_binary_max_pool(channels: int, geometry: Geometry, scheduled: bool, rng: np.random.Generator) -> None:
    """The maximum of signs; their minimum where a channel descends; what is outside never decides."""
    x = np.where(rng.random((2, *geometry.image, channels)) < 0.3, 1, -1)
    x[..., ::3] *= -1
    descends = rng.random(channels) < 0.5
    result = run(lambda *t: binary_max_pool2d.compute(geometry, *t), [words(x), pack(descends)], scheduled)
    expected = np.zeros((2, *geometry.output, channels), np.int64)
    for row, column, taps in windows(geometry):
        window = np.stack([x[:, y, at] for _, _, y, at in taps])
        expected[:, row, column] = np.where(descends, window.min(0), window.max(0))
    assert {-1, 1} == set(expected.ravel().tolist()) or channels == 1
    np.testing.assert_array_equal(result, words(expected))


@SCHEDULED
@pytest.mark.parametrize("channels", [1, 3, 6, 35])
def test_convolution_of_floats(channels: int, scheduled: bool, rng: np.random.Generator) -> None:
    """Of an image as files have it, [N, C, H, W]; integers, whose sums have one value in any order."""
    from tvm import topi

    kernel, strides = rng.integers(1, 6, 2), rng.integers(1, 4, 2)
    pads = rng.integers(0, 4, 4)
    height, width = (int(i) for i in rng.integers(5, 20, 2))
    geometry = Geometry((height, width), tuple(kernel.tolist()), tuple(strides.tolist()), tuple(pads.tolist()))
    x = rng.integers(-9, 10, (2, channels, height, width)).astype(np.float32)
    weights = rng.integers(-9, 10, (int(rng.choice([3, 32, 64, 130])), channels, *kernel)).astype(np.float32)

    def compute(image: Any, weight: Any) -> Any:
        return float_conv2d.compute(geometry, len(weights), topi.transpose(image, [0, 2, 3, 1]), weight)

    result = run(compute, [x, float_conv2d.pack_weight(weights)], scheduled=scheduled)
    padded = np.pad(x, [(0, 0), (0, 0), pads[::2], pads[1::2]])
    windows = np.lib.stride_tricks.sliding_window_view(padded, tuple(kernel), (2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1]]
    np.testing.assert_array_equal(result, np.einsum("ncyxhw,ochw->nyxo", windows, weights))


@pytest.mark.parametrize("scheduled", [False, True])
def test_max_pooling_of_floats(scheduled: bool, rng: np.random.Generator) -> None:
    """Any padding; what lies beside the image never wins, though all values are negative."""
    kernel = (int(rng.integers(2, 5)), int(rng.integers(1, 4)))
    pads = tuple(int(rng.integers(0, kernel[i % 2])) for i in range(4))
    geometry = Geometry((7, 6), kernel, (int(rng.integers(1, 4)), 2), pads)  # type: ignore[arg-type]
    x = -np.abs(rng.normal(size=(2, 7, 6, int(rng.choice([3, 32]))))).astype(np.float32) - 1
    padded = np.pad(x, [(0, 0), pads[::2], pads[1::2], (0, 0)], constant_values=-np.inf)
    views = np.lib.stride_tricks.sliding_window_view(padded, kernel, (1, 2)).max((-2, -1))
    result = run(lambda t: max_pool2d.compute(geometry, t), [x], scheduled=scheduled)
    np.testing.assert_array_equal(result, views[:, :: geometry.strides[0], :: geometry.strides[1]])


@pytest.mark.parametrize(
    ("geometry", "sentence"),
    [
        (Geometry((5, 5), (2, 2), pads=(1, 0, 0, 0), dilations=(2, 2)), "dilations and padding is not supported: pad"),
        (Geometry((5, 5), (2, 2), pads=(2, 0, 0, 0)), r"pads \[2, 0, 0, 0\]: a window lies beside the image"),
    ],
)
def test_max_pooling_that_is_refused(geometry: Geometry, sentence: str) -> None:
    from tvm import te

    with pytest.raises(ValueError, match=sentence):
        max_pool2d.compute(geometry, te.placeholder((1, 5, 5, 8), "float32"))


def drawn_stem(rng: np.random.Generator) -> tuple[Geometry, Geometry, int]:
    """A convolution, a pool of its sums, and rows that strips may have: any strides, pads and, before it, dilations."""

    def pair(low: int, high: int) -> tuple[int, int]:
        return int(rng.integers(low, high)), int(rng.integers(low, high))

    while True:
        conv = Geometry(pair(5, 24), pair(1, 6), pair(1, 3), (*pair(0, 4), *pair(0, 4)), pair(1, 3))
        if min(conv.output) < 4:
            continue
        kernel = pair(1, 5)
        pads = tuple(int(rng.integers(0, kernel[i % 2])) for i in range(4))
        pool = Geometry(conv.output, kernel, pair(1, 4), pads)  # type: ignore[arg-type]
        high = pool.output[0]
        strips = [s for s in range(1, high + 1) if high % s == 0 and s * pool.strides[0] >= max(pads[::2])]
        if min(pool.output) > 0 and strips:
            return conv, pool, int(rng.choice(strips))


def pooled_floats(conv: Geometry, pool: Geometry, rows: int, steps: list[Step]) -> Callable[..., Any]:
    """Of an image, packed weights and the values of ``steps``."""

    def compute(x: Any, weight: Any, *constants: Any) -> Any:
        filters = int(weight.shape[0]) * float_conv2d.FILTERS
        return pooled_conv2d.compute(
            conv,
            pool,
            rows,
            x,
            lambda window, strips: float_conv2d.compute(window, filters, strips, weight),
            lambda value, _row, _column, channel: output_transform.emit(steps, constants, value, channel),
        )

    return compute


@pytest.mark.parametrize("draw", range(6))
@SCHEDULED
def test_convolution_and_pool_in_strips(
    draw: int, scheduled: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sums negative, some with steps behind them; integers, whose sums have one value in any order."""
    monkeypatch.setattr(schedule_cpu, "_MIN_PARALLEL_STEPS", 0)
    conv, pool, rows = drawn_stem(rng)
    filters, channels = int(rng.choice([32, 64])), int(rng.integers(1, 5))
    print(conv, pool, rows, filters, channels)
    x = rng.integers(1, 10, (2, *conv.image, channels)).astype(np.float32)
    weights = -rng.integers(1, 10, (filters, channels, *conv.kernel)).astype(np.float32)
    steps = transform(rng, filters, 100.0) if draw % 2 else []
    arrays = [x, float_conv2d.pack_weight(weights), *(step.value for step in steps)]
    result = run(pooled_floats(conv, pool, rows, steps), arrays, scheduled, threads=1 + draw // 2 % 2)

    sums = apply(steps, convolution(x, weights, conv).astype(np.float32))
    padded = np.pad(sums, [(0, 0), pool.pads[::2], pool.pads[1::2], (0, 0)], constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, pool.kernel, (1, 2)).max((-2, -1))
    np.testing.assert_array_equal(result, windows[:, :: pool.strides[0], :: pool.strides[1]])


def test_pool_in_strips_gives_the_bits_of_two_kernels(rng: np.random.Generator) -> None:
    """NaNs, which win or not by their place in a window, and sums that depend on their order."""
    conv, pool, rows = drawn_stem(rng)
    print(conv, pool, rows)
    x = rng.normal(size=(2, *conv.image, 3)).astype(np.float32)
    x[rng.random(x.shape) < 0.02] = np.nan
    weight = float_conv2d.pack_weight(rng.normal(size=(64, 3, *conv.kernel)).astype(np.float32))
    sums = run(lambda *t: float_conv2d.compute(conv, 64, *t), [x, weight], scheduled=True)
    pooled = run(lambda t: max_pool2d.compute(pool, t), [sums], scheduled=True)
    result = run(pooled_floats(conv, pool, rows, []), [x, weight], scheduled=True)
    np.testing.assert_array_equal(result.view(np.uint32), pooled.view(np.uint32))


STEM = Geometry((224, 224), (7, 7), (2, 2), (3, 3, 3, 3))


@pytest.mark.parametrize(
    ("conv", "pool", "filters", "channels", "rows"),
    [
        (STEM, Geometry((112, 112), (3, 3), (2, 2), (1, 1, 1, 1)), 64, 3, 14),
        (STEM, Geometry((112, 112), (2, 2), (2, 2)), 64, 3, 14),
        (STEM, Geometry((112, 112), (3, 3), (2, 2), (1, 1, 1, 1), (2, 2)), 64, 3, 0),
        (STEM, Geometry((112, 112), (3, 3), (2, 2), (1, 1, 1, 1)), 40, 3, 0),  # parts of a block
        (STEM, Geometry((112, 112), (3, 3), (2, 2), (1, 1, 1, 1)), 64, 8, 0),  # of so many products a pass is little
        (STEM, Geometry((112, 112), (5, 3), (1, 2), (2, 1, 2, 1)), 64, 3, 0),  # too much is summed twice
        (
            Geometry((56, 56), (3, 3), (1, 1), (1, 1, 1, 1)),
            Geometry((56, 56), (2, 2), (2, 2)),
            64,
            3,
            0,
        ),  # stays anyway
    ],
)
def test_where_sums_are_pooled_in_strips(
    conv: Geometry, pool: Geometry, filters: int, channels: int, rows: int
) -> None:
    products = channels * conv.kernel[0] * conv.kernel[1]
    assert pooled_conv2d.strip(pool, filters, float_conv2d.FILTERS, products) == rows


# Search space and targets ------------------------------------------------------------------------------------------


def kernels(rng: np.random.Generator) -> dict[str, tuple[Callable[..., Any], list[np.ndarray], np.ndarray]]:
    """name -> compute, its inputs and what it should give: one kernel of every operator, wide enough for vectors."""
    geometry = Geometry((6, 8), (3, 3), (1, 1), (1, 1, 1, 1))
    x, weight = signs(rng, 1, 6, 8, 64), signs(rng, 64, 64, 3, 3)
    steps = [Step(op, rng.normal(0, 1, 64).astype(np.float32)) for op in ("mul", "add", "mul", "add")]  # type: ignore[arg-type]
    product = Product(geometry)
    edge = bitserial_conv2d.border(weight, product)
    packed, bit_edge, most = bit_weight(weight, product, steps)
    through = apply(steps, convolution(x, weight, geometry).astype(np.float32))
    floats, low = rng.normal(size=(1, 6, 8, 64)).astype(np.float32), rng.normal(size=64).astype(np.float32)
    pool = Geometry((6, 8), (2, 2), (2, 2))
    pooled = x.reshape(1, 3, 2, 4, 2, 64).max((2, 4))
    few, masked = Product(geometry, unsigned(2), TERNARY), drawn(rng, TERNARY, 64, 64, 3, 3)
    codes, few_edge = drawn(rng, unsigned(2), 1, 6, 8, 64), bitserial_conv2d.border(masked, few)
    return {
        "bitserial_conv2d": (
            lambda *t: float_kernel(product, edge, steps, *t),
            [words(x), bitserial_conv2d.pack_weight(weight), *bitserial_conv2d.float_constants(edge, steps)],
            through,
        ),
        "bitserial_conv2d_bits": (
            lambda *t: bit_kernel(product, bit_edge, *t),
            [words(x), packed, most],
            words(np.where(through >= 0, 1, -1)),
        ),
        "bitserial_conv2d_planes": (
            lambda *t: float_kernel(few, few_edge, [], *t),
            [
                words(codes, few.x),
                bitserial_conv2d.pack_weight(masked, few.w),
                *bitserial_conv2d.float_constants(few_edge, []),
            ],
            convolution(codes, masked, geometry).astype(np.float32),
        ),
        "bitpack": (bitpack.compute, [floats, low], words(np.where(floats >= low, 1, -1))),
        "binary_max_pool2d": (
            lambda *t: binary_max_pool2d.compute(pool, *t),
            [words(x), np.zeros(2, np.uint32)],
            words(pooled),
        ),
    }


# The instruction that a target counts bits with, or a step of counting by shifts.
COUNTED = {
    "x86-avx512": r"vpopcntd\t.*zmm",
    "x86_64": r"vpshufb\t",
    "aarch64": r"cnt\tv\d+\.16b",
    "armv7l": r"vcnt\.8\tq\d+",
    "arm-none": r"#0x33333333|#858993459|#13107|vmov\.i8\tq\d, #0x33",
    "wasm32": r"popcnt",
}
CPUS = [name for name in targets.names() if targets.load(name).gpu is None]
KERNELS = ("binary_max_pool2d", "bitpack", "bitserial_conv2d", "bitserial_conv2d_bits", "bitserial_conv2d_planes")


@pytest.mark.parametrize("draw", range(3))
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "bitpack"])
def test_every_schedule_that_tuning_draws_gives_the_same(kernel: str, draw: int, rng: np.random.Generator) -> None:
    compute, arrays, expected = kernels(rng)[kernel]
    mod, garbage = lower(compute, arrays)
    sch = Schedule(mod, seed=int(rng.integers(1, 1 << 30)))
    schedule_cpu.schedule(sch, targets.host(), 1 + draw % 2, sample=True)
    assert sch.trace.decisions
    print(sch.trace)
    np.testing.assert_array_equal(call(build(sch.mod, targets.host(), scheduled=False), arrays, garbage), expected)


def test_only_reductions_are_worth_a_search(rng: np.random.Generator) -> None:
    searched = {name: schedule_cpu.has_reduction(lower(*of[:2])[0]) for name, of in kernels(rng).items()}
    assert searched == {name: name != "bitpack" for name in KERNELS}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CPUS)
def test_every_target_builds_every_kernel(name: str, kernel: str, rng: np.random.Generator) -> None:
    compute, arrays, expected = kernels(rng)[kernel]
    target = targets.load(name)
    mod, garbage = lower(compute, arrays)
    library = build(mod, target)
    assembly = library.inspect_source("asm")
    if kernel.startswith("bitserial"):
        assert re.search(COUNTED.get(name, COUNTED[target.machine]), assembly)
        assert ("zmm" in assembly) == (target.vector_bits == 512)
        contracted = r"\t(vfn?m(add|sub)|v?fn?ml?[as]\b)"
        assert not re.search(contracted, assembly), "a product and a sum were contracted to one rounding"
    if not target.missing_features():
        np.testing.assert_array_equal(call(library, arrays, garbage), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", [n for n in CPUS if targets.load(n).machine in ("aarch64", "armv7l")])
def test_every_kernel_on_every_emulated_core(name: str, kernel: str, rng: np.random.Generator, tmp_path: Path) -> None:
    compute, arrays, expected = kernels(rng)[kernel]
    target = targets.load(name)
    machines.need(target)
    mod, garbage = lower(compute, arrays)
    np.testing.assert_array_equal(machines.call(target, build(mod, target), arrays, garbage, tmp_path), expected)


NEON = [name for name in CPUS if targets.load(name).byte_popcount is not None]


@pytest.mark.slow
@pytest.mark.parametrize("w", WEIGHTS)
@pytest.mark.parametrize("a", ["1a", "ternary a", "2a"])
def test_byte_sums_of_pairs_of_codes(a: str, w: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """On a core and a window that are drawn: strides, dilations, rows of one pixel, tiles of one column."""
    target = targets.load(str(rng.choice(NEON)))
    machines.need(target)
    geometries = [
        Geometry((5, 8), (3, 3), (1, 1), (1, 1, 1, 1)),
        Geometry((9, 15), (3, 3), (2, 2), (1, 1, 1, 1)),
        Geometry((7, 8), (3, 2), (1, 1), (2, 0, 2, 2), (2, 2)),
        Geometry((6, 7), (1, 1), (1, 2)),
        Geometry((7, 1), (5, 1), (1, 1), (2, 0, 2, 0)),
    ]
    geometry = geometries[int(rng.integers(len(geometries)))]
    batch, channels, filters = int(rng.integers(1, 3)), int(rng.integers(1, 100)), 4 * int(rng.integers(1, 13))
    print(target.name, geometry, batch, channels, filters)
    x = drawn(rng, CODES[a], batch, *geometry.image, channels)
    weight = drawn(rng, CODES[w], filters, channels, *geometry.kernel)
    product = Product(geometry, CODES[a], CODES[w])
    steps = transform(rng, filters, 20.0 * CODES[a].largest * CODES[w].largest)
    to = str(rng.choice(["floats", "bits"]))
    check_convolution(x, weight, product, steps, to, scheduled=True, emulated=(target, tmp_path))


@pytest.mark.parametrize("to", ["floats", "bits"])
@pytest.mark.parametrize("name", ["cortex-a53", "cortex-a72", "cortex-a76", "cortex-a7"])
def test_a_window_in_straight_code(name: str, to: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """3x3x64: on 64-bit cores, loops over columns and filters are one, and two columns of a word of bits one tile."""
    target = targets.load(name)
    machines.need(target)
    batch, filters, columns = (int(rng.integers(*of)) for of in ((1, 3), (1, 5), (1, 6)))
    geometry = Geometry((4, 2 * columns), (3, 3), (1, 1), (1, 1, 1, 1))
    print(batch, filters, columns)
    x, weight = signs(rng, batch, *geometry.image, 64), signs(rng, 32 * filters, 64, 3, 3)
    steps = transform(rng, 32 * filters, 24.0)
    check_convolution(x, weight, Product(geometry), steps, to, scheduled=True, emulated=(target, tmp_path))


@pytest.mark.parametrize("channels", [64, 128, 512])
@pytest.mark.parametrize("to", ["floats", "bits"])
@pytest.mark.parametrize("name", ["cortex-a53", "cortex-a72", "cortex-a76"])
def test_byte_sums_do_not_spill(name: str, to: str, channels: int, rng: np.random.Generator) -> None:
    """Tiles of 3x3 windows keep their vectors, 18 words in straight code or a loop over 36 and 144."""
    geometry = Geometry((8, 8), (3, 3), (1, 1), (1, 1, 1, 1))
    product, weight = Product(geometry), signs(rng, 64, channels, 3, 3)
    x = pack(signs(rng, 1, *geometry.image, channels))[..., None, :]
    if to == "bits":
        weights, edge, most = bit_weight(weight, product, [])
        mod, _ = lower(lambda *t: bit_kernel(product, edge, *t), [x, weights, most])
    else:
        edge = bitserial_conv2d.border(weight, product)
        arrays = [x, bitserial_conv2d.pack_weight(weight), *bitserial_conv2d.float_constants(edge, [])]
        mod, _ = lower(lambda *t: float_kernel(product, edge, [], *t), arrays)
    assembly = build(mod, targets.load(name)).inspect_source("asm")
    stored = re.findall(r"\tst[rp]\tq.*\[sp", assembly)
    counted = len(re.findall(r"\tcnt\t", assembly))
    assert counted
    assert len(stored) < counted / 8, stored


@pytest.mark.parametrize("bounds", ["low", "low and high"])
@pytest.mark.parametrize("name", NEON)
def test_bitpack_on_an_emulated_core(name: str, bounds: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """Tails of whole vectors, of a few lanes, and of one; NaN on either side. (32-bit NEON has no subnormals.)"""
    target = targets.load(name)
    machines.need(target)
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32)

    def values(*of: int) -> np.ndarray:
        usual = rng.integers(-3, 4, of).astype(np.float32)
        return np.where(rng.random(of) < 0.3, rng.choice(special, of), usual)

    for channels in {1, 4, 64, 96, 32 + 4 * int(rng.integers(1, 8)), int(rng.integers(1, 130))}:
        shape = (int(rng.integers(1, 3)), int(rng.integers(1, 17)), channels)
        print(shape)
        x, low, high = values(*shape), values(channels), values(channels)
        of_bounds = [low] if bounds == "low" else [low, high]
        result = run(bitpack.compute, [x, *of_bounds], scheduled=True, emulated=(target, tmp_path))
        expected = x >= low if bounds == "low" else (x >= low) & (x <= high)
        np.testing.assert_array_equal(result[..., 0, :], pack(expected))


@pytest.mark.parametrize("channels", [3072, 5248])
@pytest.mark.parametrize("name", ["cortex-a72", "cortex-a76", "cortex-a7"])
def test_byte_sums_beyond_16_bits(name: str, channels: int, rng: np.random.Generator, tmp_path: Path) -> None:
    """5x5 taps that all differ: 76,800 bits; and 131,200, of which a lane of 16 bits would have to hold 65,600."""
    target = targets.load(name)
    machines.need(target)
    geometry = Geometry((5, 6), (5, 5))
    x, weight = signs(rng, 1, 5, 6, channels), signs(rng, 8, channels, 5, 5)
    weight[0] = -x[0, :, :5].transpose(2, 0, 1)
    assert convolution(x, weight, geometry)[0, 0, 0, 0] == -25 * channels
    check_convolution(x, weight, Product(geometry), [], "floats", scheduled=True, emulated=(target, tmp_path))


@pytest.mark.parametrize("kernel", ["bitserial_conv2d", "bitserial_conv2d_bits"])
@pytest.mark.parametrize("name", ["cortex-a53", "cortex-a7"])
def test_schedules_drawn_for_an_emulated_core(name: str, kernel: str, rng: np.random.Generator, tmp_path: Path) -> None:
    compute, arrays, expected = kernels(rng)[kernel]
    target = targets.load(name)
    machines.need(target)
    mod, garbage = lower(compute, arrays)
    sch = Schedule(mod, seed=int(rng.integers(1, 1 << 30)))
    schedule_cpu.schedule(sch, target, 1, sample=True)
    print(sch.trace)
    library = build(sch.mod, target, scheduled=False)
    np.testing.assert_array_equal(machines.call(target, library, arrays, garbage, tmp_path), expected)
