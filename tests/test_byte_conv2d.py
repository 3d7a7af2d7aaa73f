"""Convolutions by products of bytes against naive loops, on every x86 target; and which layers get them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from networks import assert_identical, outputs, randomise
from test_ops import build, call, convolution, drawn, drawn_stem, lower, transform
from torch import nn
from torch.nn import functional
from tvm import relax
from tvm.s_tir import Schedule

import targets
from pipeline import compiler, importer, models, work
from pipeline.data import to_float
from pipeline.export import export
from pipeline.layers import QuantConv2d, QuantLinear
from pipeline.models import Quantize
from pipeline.values import ByteSum, Channelwise, Codes, Emitter, MaxPool, Real
from tvm_ops import byte_products, schedule_cpu
from tvm_ops.bitplanes import BINARY, TERNARY, Code, odd, pack, unsigned
from tvm_ops.ops import bitserial_conv2d, byte_conv2d, pooled_conv2d, quantize
from tvm_ops.ops.bitserial_conv2d import Geometry, Product
from tvm_ops.output_transform import Step, apply

TARGETS = [name for name in targets.names() if targets.load(name).byte_product is not None]
ON_TARGETS = pytest.mark.parametrize("name", TARGETS)
# (batch, channels, filters, geometry)
CASES = {
    "dense": (3, 50, 64, Geometry((1, 1), (1, 1))),
    "1x1 of one channel": (1, 1, 16, Geometry((4, 5), (1, 1))),
    "1x1 strided": (2, 5, 48, Geometry((7, 6), (1, 1), (2, 3))),
    "3x3 of one channel": (1, 1, 32, Geometry((8, 8), (3, 3), (1, 1), (1, 1, 1, 1))),
    "3x3": (1, 64, 128, Geometry((6, 8), (3, 3), (1, 1), (1, 1, 1, 1))),
    "3x3 batch": (3, 3, 16, Geometry((5, 7), (3, 3), (2, 1), (1, 0, 2, 1))),
    "3x3 wide pads": (1, 5, 80, Geometry((3, 4), (3, 3), (1, 2), (3, 2, 0, 4))),
    "rows dilated": (1, 3, 32, Geometry((9, 8), (3, 1), (1, 1), (2, 1, 2, 3), (2, 3))),
    "5x5 beyond the image": (1, 3, 64, Geometry((2, 3), (5, 5), (1, 1), (2, 2, 2, 2))),
    "7x7": (1, 3, 64, Geometry((22, 16), (7, 7), (2, 2), (3, 3, 3, 3))),
    "7x5 one column": (2, 1, 32, Geometry((9, 5), (7, 5), (2, 2), (3, 0, 3, 0))),
}
ACTIVATIONS = {"8a": unsigned(8), "signed 8a": odd(8), "5a": unsigned(5)}
WEIGHTS = {"1w": BINARY, "2w": odd(2), "6w": odd(6), "7w": odd(7), "8w": odd(8), "ternary w": TERNARY}


def loaded(name: str) -> targets.Target:
    target = targets.load(name)
    if missing := target.missing_features():
        pytest.skip(f"this CPU lacks {missing}")
    return target


def kernel(
    x: np.ndarray, weight: np.ndarray, product: Product, steps: list[Step], to: str, target: targets.Target
) -> tuple[Callable[..., Any], list[np.ndarray], byte_conv2d.Form]:
    """A kernel of codes [N, H, W, C] and [O, C, KH, KW] to 'floats' or 'bits', what it takes, and how it multiplies."""
    form = byte_conv2d.form(product, len(weight), target.byte_product)
    assert form is not None
    patterns = ((x - product.x.shift) // product.x.ratios[0]).astype(np.uint8)

    def sums(x: Any, w: Any) -> Any:
        return byte_conv2d.sums(x, w, product, form)

    if to == "floats":
        edge = bitserial_conv2d.shifted(weight, product)
        constants = bitserial_conv2d.float_constants(edge, steps)
        arrays = [patterns, byte_conv2d.pack_weight(weight, form), *constants]
        return lambda x, w, *t: bitserial_conv2d.compute_float(product, edge, steps, sums(x, w), *t), arrays, form
    flip, edge, most = bitserial_conv2d.bit_threshold(weight, product, steps, bitserial_conv2d.shifted)
    flipped = weight * flip.reshape(-1, 1, 1, 1)
    whole = np.pad(flipped, [(0, most.shape[-1] - len(flip)), (0, 0), (0, 0), (0, 0)])
    arrays = [patterns, byte_conv2d.pack_weight(whole, form), most]
    return lambda x, w, *t: bitserial_conv2d.compute_bits(product, edge, sums(x, w), *t), arrays, form


def check(
    x: np.ndarray,
    weight: np.ndarray,
    product: Product,
    steps: list[Step],
    to: str,
    target: targets.Target,
    threads: int,
) -> byte_conv2d.Form:
    expected = apply(steps, convolution(x, weight, product.geometry).astype(np.float32))
    compute, arrays, form = kernel(x, weight, product, steps, to, target)
    mod, garbage = lower(compute, arrays)
    found = call(build(mod, target, threads=threads), arrays, garbage)
    np.testing.assert_array_equal(*((found, expected) if to == "floats" else (found[..., 0, :], pack(expected >= 0))))
    return form


@pytest.mark.parametrize("case", CASES)
@ON_TARGETS
def test_convolution(name: str, case: str, rng: np.random.Generator) -> None:
    target, to = loaded(name), str(rng.choice(["floats", "bits"]))
    batch, channels, filters, geometry = CASES[case]
    w = WEIGHTS[str(rng.choice(list(WEIGHTS)))]
    x_codes = [a for a in ACTIVATIONS.values() if Product(geometry, a, w).planes.w * a.bits >= 8]
    a = x_codes[int(rng.integers(len(x_codes)))]
    product = Product(geometry, a, w)
    if product.limit(channels * int(np.prod(geometry.kernel))) >= 1 << 24:
        product = Product(geometry, unsigned(8), BINARY)
    print(product, to)
    x = drawn(rng, product.x, batch, *geometry.image, channels)
    weight = drawn(rng, product.w, filters, channels, *geometry.kernel)
    steps = transform(rng, filters, 20.0 * product.x.largest * product.w.largest)
    check(x, weight, product, steps, to, target, threads=1 + int(rng.integers(2)))


@pytest.mark.parametrize("w", WEIGHTS)
@ON_TARGETS
def test_extremes_neither_saturate_nor_overflow(name: str, w: str, rng: np.random.Generator) -> None:
    """All patterns 255 and all weights of one sign, over as many taps as float32 can sum."""
    target, code = loaded(name), WEIGHTS[w]
    geometry = Geometry((6, 7), (5, 5), (1, 1), (1, 0, 0, 1))
    channels = ((1 << 24) - 1) // (255 * code.largest * 25)
    product = Product(geometry, odd(8), code)
    x, weight = np.full((1, 6, 7, channels), 255), drawn(rng, code, 64, channels, 5, 5)
    weight[0], weight[1] = code.largest, -code.largest
    x[0, :, 6] = -255
    sums = convolution(x, weight, geometry)
    assert sums[0, 1, 1, :2].tolist() == [25 * channels * 255 * code.largest, -25 * channels * 255 * code.largest]
    form = check(x, weight, product, [], "floats", target, threads=1)
    assert target.byte_product is not None
    by_quads = bool(target.byte_product.quads) and code.largest <= 127
    assert form.kind == ("quads" if by_quads else "pairs" if code.largest <= 63 else "words")


@ON_TARGETS
def test_every_schedule_that_tuning_draws_gives_the_same(name: str, rng: np.random.Generator) -> None:
    """And its intrinsic can be found by its name in a record."""
    target = loaded(name)
    batch, channels, filters, geometry = CASES[str(rng.choice(["3x3", "7x7"]))]
    product = Product(geometry, odd(8), BINARY)
    x, weight = (
        drawn(rng, product.x, batch, *geometry.image, channels),
        drawn(rng, BINARY, filters, channels, *geometry.kernel),
    )
    to = str(rng.choice(["floats", "bits"]))
    steps = transform(rng, filters, 5000.0)
    compute, arrays, form = kernel(x, weight, product, steps, to, target)
    expected = apply(steps, convolution(x, weight, geometry).astype(np.float32))
    mod, garbage = lower(compute, arrays)
    sch = Schedule(mod, seed=int(rng.integers(1, 1 << 30)))
    schedule_cpu.schedule(sch, target, 1 + int(rng.integers(2)), sample=True)
    assert sch.trace.decisions
    print(sch.trace)
    found = call(build(sch.mod, target, scheduled=False), arrays, garbage)
    np.testing.assert_array_equal(*((found, expected) if to == "floats" else (found[..., 0, :], pack(expected >= 0))))
    (named,) = set(re.findall(rf"\b{form.kind}_[\d_]+_{target.byte_product.name}\b", str(sch.trace)))  # type: ignore[union-attr]
    numbers = [int(n) for n in re.findall(r"_(\d+)", named)]
    tile = byte_products.Tile(byte_conv2d.Form(form.kind, form.lanes), *numbers)
    assert byte_products.intrinsic(target.byte_product, tile) == named  # type: ignore[arg-type]
    byte_products.register_those_in(named.replace(f"_{numbers[0]}_", "_16_", 1), target.byte_product)  # type: ignore[arg-type]


@ON_TARGETS
def test_a_stem_is_a_few_kilobytes_of_byte_products(name: str, rng: np.random.Generator) -> None:
    """7x7x3 on 224x224: no more vectors on the stack than products; compiled for CPUs that are not here, too."""
    target, geometry = targets.load(name), Geometry((224, 224), (7, 7), (2, 2), (3, 3, 3, 3))
    product = Product(geometry, odd(8), BINARY)
    x, weight = np.zeros((1, 224, 224, 3), np.int64), drawn(rng, BINARY, 64, 3, 7, 7)
    compute, arrays, form = kernel(x, weight, product, [], "floats", target)
    assembly = build(lower(compute, arrays)[0], target).inspect_source("asm")
    instruction = {"quads": "vpdpbusd", "pairs": "vpmaddubsw"}[form.kind]
    register = {8: "ymm", 16: "zmm"}[form.lanes]
    products = len(re.findall(rf"\t{instruction}\t.*%{register}", assembly))
    assert 16 <= products <= 256
    assert len(re.findall(r"\tv\w+\t.*\(%rsp\)", assembly)) < products
    code = [line for line in assembly.splitlines() if re.match(r"\t[a-z]", line)]
    assert len(code) < 4000


@pytest.mark.parametrize(
    ("a", "w", "filters", "geometry", "kind"),
    [
        (odd(8), BINARY, 64, Geometry((8, 8), (3, 3)), "quads"),
        (odd(8), odd(8), 64, Geometry((8, 8), (3, 3)), "words"),
        (unsigned(4), odd(2), 64, Geometry((8, 8), (3, 3)), "quads"),
        (odd(8), BINARY, 64, Geometry((8, 8), (3, 1), dilations=(2, 2)), "quads"),
        (odd(8), BINARY, 64, Geometry((8, 8), (3, 3), dilations=(1, 2)), None),  # taps apart
        (odd(8), BINARY, 24, Geometry((8, 8), (3, 3)), None),  # no whole vectors
        (unsigned(2), odd(2), 64, Geometry((8, 8), (3, 3)), None),  # few planes
        (TERNARY, odd(8), 64, Geometry((8, 8), (3, 3)), None),
    ],
)
def test_which_layers_are_multiplied(a: Code, w: Code, filters: int, geometry: Geometry, kind: str | None) -> None:
    form = byte_conv2d.form(Product(geometry, a, w), filters, targets.load("x86-avx512vnni").byte_product)
    assert (form and form.kind) == kind
    assert byte_conv2d.form(Product(geometry, a, w), filters, None) is None


def stem(
    rng: np.random.Generator, target: targets.Target, conv: Geometry, pool: Geometry, steps: list[Step], w: Code
) -> tuple[tvm.IRModule, list[np.ndarray], list[np.ndarray]]:
    """A lowered function of an image [N, C, H, W] or [N, H, W, C], its inputs, and NumPy's outputs: sums of 8-bit codes
    through ``steps``, pooled, and the words of their sign after a norm."""
    filters, channels, batch = len(steps[0].value), int(rng.choice([1, 3, 5])), int(rng.integers(1, 3))
    product, emitter = Product(conv, odd(8), w), Emitter(relax.BlockBuilder(), target)
    form = byte_conv2d.form(product, filters, target.byte_product)
    assert form is not None
    codes = drawn(rng, product.x, batch, *conv.image, channels)
    codes[rng.random(codes.shape) < 0.3] = rng.choice([-255, 255])
    weights = drawn(rng, w, filters, channels, *conv.kernel)
    weights[0], weights[-1] = w.largest, -w.largest
    image, planes = (codes / 255).astype(np.float32), bool(rng.integers(2))
    image[codes == -255] -= rng.random((codes == -255).sum()).astype(np.float32)
    image[(codes == -255) & (rng.random(codes.shape) < 0.1)] = np.nan
    argument = image.transpose(0, 3, 1, 2) if planes else image
    x = relax.Var("x", relax.TensorType(argument.shape, "float32"))
    norm = [Step("add", rng.normal(0, 1000, filters).astype(np.float32))]
    with emitter.builder.function("main", [x]):
        with emitter.builder.dataflow():
            lying = emitter.op(relax.op.permute_dims(x, [0, 2, 3, 1])) if planes else x
            real = Channelwise(Real(emitter, lying, (batch, channels, *conv.image)))
            of = Codes(emitter, real, product.x, lambda value: quantize.symmetric(value, 8))
            sums = ByteSum(emitter, of, weights, w, conv, (batch, filters, *conv.output), form)
            shape = (batch, filters, *pool.output)
            floats = Channelwise(MaxPool(emitter, Channelwise(sums, tuple(steps)), pool, shape)).real()
            packed = Real(emitter, floats, shape).words(norm)
            result = emitter.builder.emit_output([floats, packed])
        emitter.builder.emit_func_output(result)

    made = apply(steps, convolution(codes, weights, conv).astype(np.float32))
    padded = np.pad(made, [(0, 0), pool.pads[::2], pool.pads[1::2], (0, 0)], constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, pool.kernel, (1, 2)).max((-2, -1))
    expected = windows[:, :: pool.strides[0], :: pool.strides[1]]
    words = pack(apply(norm, expected) >= 0)[..., None, :]
    return compiler.lower(emitter.builder.get()), [np.ascontiguousarray(argument)], [expected, words]


POOLING = ["x86-avx512vnni", "x86-avx512bw"]


@pytest.mark.parametrize("draw", range(4))
@pytest.mark.parametrize("name", POOLING)
def test_sums_pooled_in_strips(name: str, draw: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel of an image to floats and their words; any window, factors of both signs, patterns of 0 and 255."""
    target, filters = loaded(name), int(rng.choice([16, 32, 48, 64]))
    conv, pool, rows = drawn_stem(rng)
    while conv.kernel[1] > 1 and conv.dilations[1] > 1:
        conv, pool, rows = drawn_stem(rng)
    w = [BINARY, odd(2), TERNARY, odd(8)][draw]
    print(conv, pool, rows, filters)
    monkeypatch.setattr(pooled_conv2d, "strip", lambda *_: rows)
    monkeypatch.setattr(schedule_cpu, "_MIN_PARALLEL_STEPS", 0)
    steps = transform(rng, filters, 20.0 * 255 * w.largest)
    mod, inputs, expected = stem(rng, target, conv, pool, steps, w)
    kernels = [each.kernel for each in work.calls(mod)]
    assert "pooled_byte_conv2d" in kernels[0] and len(kernels) == (1 if filters % 32 == 0 else 2)
    executable, *_ = compiler.build(mod, target, 1 + draw % 2)
    found = relax.VirtualMachine(executable.jit(), tvm.cpu())["main"](*map(tvm.runtime.tensor, inputs))
    for result, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(result.numpy(), right)


@pytest.mark.parametrize(
    ("name", "step", "pooled"),
    [
        ("x86-avx512vnni", Step("mul", np.full(64, -2, np.float32)), True),
        ("x86-avx512vnni", Step("mul", np.full(64, np.inf, np.float32)), False),  # 0 would become NaN
        ("x86-avx512vnni", Step("div", np.zeros(64, np.float32)), False),
        ("x86-avx512", Step("max", np.zeros(64, np.float32)), True),
        ("x86-avx2", Step("max", np.zeros(64, np.float32)), False),
    ],
)
def test_which_sums_are_pooled_in_strips(name: str, step: Step, pooled: bool, rng: np.random.Generator) -> None:
    conv, pool = Geometry((224, 224), (3, 3), (2, 2), (1, 1, 1, 1)), Geometry((112, 112), (2, 2), (2, 2))
    with np.errstate(all="ignore"):
        mod, *_ = stem(rng, targets.load(name), conv, pool, [step], BINARY)
    assert any("pooled_byte_conv2d" in each.kernel for each in work.calls(mod)) == pooled


class Images(nn.Module):
    """Two layers of one image, of bytes and of planes; bits, 8-bit codes and floats behind them; a dense layer."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        kernel, stride, group = int(rng.choice([3, 5, 7])), int(rng.integers(1, 3)), int(rng.choice([1, 16]))
        pads = tuple(int(p) for p in rng.integers(0, 4, 4))
        bits = {"weight": "dorefa", "weight_options": {"bits": int(rng.choice([2, 6, 7, 8]))}}
        options: list[dict[str, Any]] = [{"weight": "bwn", "group": group}, bits, {"weight": "twn"}]
        channels, filters = int(rng.choice([1, 3])), 16 * int(rng.integers(1, 5))
        of_images: dict[str, Any] = options[int(rng.integers(3))]
        self.first = QuantConv2d(channels, filters, kernel, stride, pads, activation="pixels", **of_images)  # type: ignore[arg-type]
        self.other = QuantConv2d(channels, filters + 1, kernel, stride, pads, activation="pixels", group=group)  # type: ignore[arg-type]
        self.norm = nn.BatchNorm2d(filters)
        self.second = QuantConv2d(filters, 32, 1, group=4)
        unit = {"activation": "dorefa", "activation_options": {"bits": 8}}
        self.third = QuantConv2d(32, 16, (3, 1), dilation=(2, 1), **unit)  # type: ignore[arg-type]
        self.dense = QuantLinear(16, 32, **unit)  # type: ignore[arg-type]
        self.input_shape = (channels, 19, 14)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, other = self.third(self.second(self.norm(self.first(x)))) / 64, self.other(x)
        y, other = (functional.max_pool2d(of, of.shape[2:]).flatten(1) for of in (y, other))
        return torch.cat([self.dense(y), other], 1)


@pytest.mark.parametrize("draw", range(2))
@ON_TARGETS
def test_networks(name: str, draw: int, rng: np.random.Generator, tmp_path: Path) -> None:
    loaded(name)
    model = Images(rng)
    print(model)
    images = rng.integers(0, 256, (1 + draw, *model.input_shape)).astype(np.uint8)
    x = to_float(torch.from_numpy(images)).numpy()
    assert_identical(randomise(model, rng), x, tmp_path, target=name, threads=1 + draw)
    lowered = compiler.lower(importer.load(tmp_path / "model.onnx", len(x), targets.load(name)))
    kinds = [variable.name_hint for variable in lowered.get_global_vars()]
    assert sum("byte_conv2d" in kind for kind in kinds) >= 3 and any("bitserial_conv2d" in kind for kind in kinds), (
        kinds
    )


@pytest.mark.slow
@ON_TARGETS
def test_the_stem_of_resnet18(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """A 7x7 layer of stride 2, a float pool behind it."""
    loaded(name)
    quantize = Quantize(group=16, first=True)
    model = randomise(models.build("resnet18", (3, 32, 32), 10, quantize, width=16, stem="imagenet"), rng)
    x = to_float(torch.from_numpy(rng.integers(0, 256, (1, 3, 32, 32)).astype(np.uint8))).numpy()
    by_torch, *others = outputs(model, x, tmp_path, target=name)
    for other in others:
        np.testing.assert_allclose(other, by_torch, rtol=0, atol=1e-5 * np.abs(by_torch).max())


def test_cpus_without_products_of_bytes_count_planes(tmp_path: Path) -> None:
    export(QuantConv2d(3, 32, 3, activation="pixels"), (3, 9, 8), tmp_path / "model.onnx")
    for target in (t for t in map(targets.load, targets.names()) if t.gpu is None and t.tvm_runtime):
        lowered = compiler.lower(importer.load(tmp_path / "model.onnx", 1, target))
        kinds = [variable.name_hint for variable in lowered.get_global_vars()]
        assert any("byte_conv2d" in kind for kind in kinds) == (target.byte_product is not None), (target.name, kinds)
