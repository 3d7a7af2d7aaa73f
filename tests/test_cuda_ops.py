"""The kernels of GPUs against naive loops, in the emulator of generated CUDA; and their machine code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from cuda_emulator import emulator
from test_ops import CASES, CODES, convolution, drawn, lower, signs, transform, windows, words
from tvm import te, topi

import targets
from pipeline.compiler import default_schedule, finish
from tvm_ops import output_transform, schedule_cuda
from tvm_ops.bitplanes import Code, pack
from tvm_ops.cuda.problem import Problem
from tvm_ops.cuda.tile import Tile, tiles
from tvm_ops.ops import binary_max_pool2d, bitpack, bitserial_gemm, bitweight_conv2d, implicit_gemm, stacked_conv2d
from tvm_ops.ops.bitserial_conv2d import Geometry, Product
from tvm_ops.ops.stacked_conv2d import Stack
from tvm_ops.output_transform import Step, Threshold, apply

GPUS = [name for name in targets.names() if targets.load(name).gpu]
KINDS = ("cuda-sm75", "cuda-sm87", "cuda-sm120")  # fragments that count xor, that count and, none
pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=emulator.missing())


def arch(target: targets.Target) -> str:
    assert target.gpu is not None
    return target.gpu.arch


def kernel(mod: tvm.IRModule, target: targets.Target, tile: Tile | None = None) -> tvm.IRModule:
    """The function ``main`` as a kernel of ``target``, with the rule's tile or another."""
    sch = default_schedule(mod, target, 1)
    if tile is not None:
        block = sch.get_sblock(implicit_gemm.BLOCK)
        sch.unannotate(block, "tile")
        sch.annotate(block, "tile", tile.number)
    return tvm.IRModule({"main": finish(sch.mod["main"], target).with_attr("global_symbol", "main")})


def run(
    compute: Callable[..., Any], arrays: list[np.ndarray], target: targets.Target, tile: Tile | None = None
) -> np.ndarray:
    mod, garbage = lower(compute, arrays)
    library, out = emulator.build(kernel(mod, target, tile), arch(target)), tvm.runtime.tensor(garbage)
    library["main"](*map(tvm.runtime.tensor, arrays), out)
    return out.numpy()


# Bits times bits -------------------------------------------------------------------------------------------------


def bit_gemm(
    product: Product, weight: np.ndarray, pixels: int, steps: list[Step], to: str, target: targets.Target
) -> tuple[Callable[..., Any], list[np.ndarray]]:
    """A kernel and its arrays after the activations."""
    operation = bitserial_gemm.operation(target, pixels)
    if to == "floats":
        gemm = bitserial_gemm.Gemm(product, operation, weight)
        arrays = [gemm.words(), *gemm.float_constants(steps)]
        return lambda *t: bitserial_gemm.compute_float(gemm, steps, *t), arrays
    gemm, _, least = bitserial_gemm.bit_threshold(weight, product, operation, steps)
    return lambda *t: bitserial_gemm.compute_bits(gemm, *t), [gemm.words(), least]


def check_gemm(
    x: np.ndarray,
    weight: np.ndarray,
    product: Product,
    steps: list[Step],
    to: str,
    target: targets.Target,
    tile: Tile | None = None,
) -> None:
    """A kernel of codes [N, H, W, C] and [O, C, KH, KW] against loops."""
    expected = apply(steps, convolution(x, weight, product.geometry).astype(np.float32))
    compute, arrays = bit_gemm(product, weight, expected[..., 0].size, steps, to, target)
    result = run(compute, [words(x, product.x), *arrays], target, tile)
    if to == "floats":
        np.testing.assert_array_equal(result, expected)
    else:
        np.testing.assert_array_equal(result[..., 0, :], pack(expected >= 0))


@pytest.mark.slow
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("case", ["dense batch", "3x3 wide pads", "3x3 dilated", "5x5 beyond the image", None])
def test_signs(case: str | None, target: str, rng: np.random.Generator) -> None:
    case = case or str(rng.choice(list(CASES)))
    batch, channels, filters, geometry = CASES[case]
    batch *= int(rng.choice([1, 3, 16]))
    to = str(rng.choice(["floats", "bits"]))
    print(case, batch, to)
    x, weight = signs(rng, batch, *geometry.image, channels), signs(rng, filters, channels, *geometry.kernel)
    steps = transform(rng, filters, (channels * weight[0, 0].size) ** 0.5)
    check_gemm(x, weight.astype(np.int64), Product(geometry), steps, to, targets.load(target))


def of_codes(
    rng: np.random.Generator, a: Code, w: Code, batch: int, channels: int, filters: int, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray, Product, list[Step]]:
    x = drawn(rng, a, batch, *geometry.image, channels)
    weight = drawn(rng, w, filters, channels, *geometry.kernel)
    return x, weight, Product(geometry, a, w), transform(rng, filters, 20.0 * a.largest * w.largest)


@pytest.mark.slow
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("w", ["1w", "ternary w", "2w"])
def test_pairs_of_codes(w: str, target: str, rng: np.random.Generator) -> None:
    """Padded, strided, on channels that fill no word, with each kind of activations in turn."""
    for a in rng.permutation(["ternary a", "2a", "signed 8a"])[:2]:
        to = str(rng.choice(["floats", "bits"]))
        print(a, w, to)
        check_gemm(*of_codes(rng, CODES[str(a)], CODES[w], *CASES["3x3 batch"]), to, targets.load(target))


@pytest.mark.slow
@pytest.mark.parametrize("target", KINDS)
def test_sums_beyond_16_bits(target: str, rng: np.random.Generator) -> None:
    """5x5x3072 taps that agree, disagree, or nearly so."""
    geometry = Geometry((8, 8), (5, 5))
    x, weight = signs(rng, 1, 8, 8, 3072), signs(rng, 33, 3072, 5, 5).astype(np.int64)
    weight[0] = x[0, :5, :5].transpose(2, 0, 1)
    weight[1] = -weight[0]
    weight[2] = weight[0]
    weight[2, 0, 0, 0] *= -1
    steps = [Step("add", np.resize(np.array([-76800, 76799, -76799], np.float32), 33))]
    for to in ("floats", "bits"):
        check_gemm(x, weight, Product(geometry), steps, to, targets.load(target))


@pytest.mark.slow
@pytest.mark.parametrize("target", KINDS)
def test_every_tile(target: str, rng: np.random.Generator) -> None:
    """All that tuning can draw make the same sums: one of them with several planes, the rest with one."""
    gpu = targets.load(target)
    code, many = CODES["1a"], CODES["2a"]
    for filters, size in ((72, 6), (40, 2)):
        geometry = Geometry((size, size), (3, 3), (1, 1), (1, 1, 1, 1))
        args = of_codes(rng, code, CODES["1w"], 1, 70, filters, geometry)
        compute, arrays = bit_gemm(args[2], args[1], size * size, args[3], "bits", gpu)
        mod, _ = lower(compute, [words(args[0]), *arrays])
        assert gpu.gpu is not None
        drawn_tiles = tiles(Problem(default_schedule(mod, gpu, 1).mod["main"]), gpu.gpu)
        assert [Tile.of(t.number) for t in drawn_tiles] == drawn_tiles
        for i in rng.permutation(len(drawn_tiles))[:3]:
            print(drawn_tiles[i])
            check_gemm(*args, "bits", gpu, drawn_tiles[i])
        split = [t for t in drawn_tiles if t.split > 1][-1:]
        for tile in split:
            several = of_codes(rng, many, CODES["2w"], 1, 40, filters, geometry)
            check_gemm(*several, "floats", gpu, tile)


@pytest.mark.slow
def test_tuning_draws_tiles(rng: np.random.Generator) -> None:
    """A drawn schedule replays from its trace."""
    target = targets.load("cuda-sm80")
    args = of_codes(rng, CODES["1a"], CODES["1w"], 2, 64, 64, Geometry((8, 8), (3, 3)))
    compute, arrays = bit_gemm(args[2], args[1], 72, args[3], "floats", target)
    mod, _ = lower(compute, [words(args[0]), *arrays])
    found = set()
    for seed in range(8):
        sch = tvm.s_tir.Schedule(mod, seed=seed + 1)
        schedule_cuda.schedule(sch, target, sample=True)
        again = tvm.s_tir.Schedule(mod)
        sch.trace.apply_to_schedule(again, remove_postproc=False)
        tvm.ir.assert_structural_equal(sch.mod, again.mod)
        block = sch.get(sch.get_sblock(implicit_gemm.BLOCK))
        found.add(int(block.annotations["tile"]))
    assert len(found) > 1


# Stacked filters, real activations -------------------------------------------------------------------------------


@pytest.mark.slow
def test_stacked_filters(rng: np.random.Generator) -> None:
    target = targets.load("cuda-sm80")
    stack = Stack(signs(rng, 5, 40, 3, 3), rng.integers(0, 5, (33, 2)))
    geometry = Geometry((5, 5), (3, 3), (1, 1), (1, 1, 1, 1))
    weight = stack.bank[stack.indices].reshape(33, 80, 3, 3).astype(np.int64)
    x, steps = signs(rng, 2, 5, 5, 80), transform(rng, 33, 20.0)
    operation = bitserial_gemm.operation(target, 50)
    gemm, flip, least = bitserial_gemm.bit_threshold(weight, Product(geometry), operation, steps)

    def compute(x: Any, bank: Any, stream: Any, flipped: Any, least: Any) -> Any:
        joined = stacked_conv2d.expand_rows(stack, bank, stream, flipped)
        return bitserial_gemm.compute_bits(gemm, x, joined, least)

    parts = np.concatenate([words(x[..., :40]), words(x[..., 40:])], -1)  # every segment in words of its own
    flipped = np.where(flip < 0, 0xFFFFFFFF, 0).astype(np.uint32)
    arrays = [parts, stacked_conv2d.bank_rows(stack), stack.stream(), flipped, least]
    result = run(compute, arrays, target)
    expected = apply(steps, convolution(x, weight, geometry).astype(np.float32))
    np.testing.assert_array_equal(result[..., 0, :], pack(expected >= 0))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["signs", "ternary", "two scales", "2 bits", "floats"])
def test_real_activations(weights: str, rng: np.random.Generator) -> None:
    """Through a transform; multiples of 1/16, whose sums are exact."""
    target = targets.load(str(rng.choice(GPUS)))
    batch, channels, filters, geometry = [(1, 3, 40, Geometry((9, 9), (3, 3), (2, 2), (1, 1, 0, 1))), CASES["dense"]][
        int(rng.integers(2))
    ]
    values = {"signs": [-1, 1], "ternary": [-1, 0, 1], "two scales": [-0.5, 0, 2], "2 bits": [-3, -1, 1, 3]}
    weight = rng.choice(values.get(weights, np.arange(-32, 32) / 16), (filters, channels, *geometry.kernel))
    x = (rng.integers(-64, 65, (batch, *geometry.image, channels)) / 16).astype(np.float32)
    steps = transform(rng, filters, 20.0)
    constants = [step.value for step in steps]
    if weights == "floats":
        rows = implicit_gemm.rows(weight.astype(np.float32))
        result = run(lambda *t: implicit_gemm.compute(geometry, steps, *t), [x, rows, *constants], target)
    else:
        few = bitweight_conv2d.few_bits(weight.astype(np.float32))
        assert few is not None
        packed = implicit_gemm.few_bit_words(few)
        result = run(
            lambda *t: implicit_gemm.compute_few_bits(geometry, few, steps, *t), [x, packed, *constants], target
        )
    sums = np.zeros((*result.shape[:3], filters))
    for row, column, taps in windows(geometry):
        for ky, kx, y, at in taps:
            sums[:, row, column] += x[:, y, at].astype(np.float64) @ weight[:, :, ky, kx].T
    np.testing.assert_array_equal(result, apply(steps, sums.astype(np.float32)))


# Packing, pooling, element-wise ----------------------------------------------------------------------------------


def special(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Floats with zeros of both signs, infinities and NaNs among them."""
    values = rng.normal(0, 1, shape).astype(np.float32)
    odd = rng.choice(np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45], np.float32), shape)
    return np.where(rng.random(shape) < 0.4, odd, values)


@pytest.mark.parametrize("channels", [1, 32, 45, 100])
def test_packing(channels: int, rng: np.random.Generator) -> None:
    target = targets.load(str(rng.choice(GPUS)))
    x = special(rng, int(rng.integers(1, 4)), 3, 5, channels)
    at = special(rng, channels)
    threshold = Threshold(rng.choice(np.array([-1, 1], np.int8), channels), at)
    result = run(bitpack.compute_by_lanes, [x, *bitpack.constants(threshold)], target)
    np.testing.assert_array_equal(result[..., 0, :], pack(threshold.flip * x >= at))


def test_packing_planes(rng: np.random.Generator) -> None:
    target = targets.load(str(rng.choice(GPUS)))
    planes, channels = int(rng.integers(1, 9)), int(rng.integers(1, 80))
    x = rng.integers(0, 1 << planes, (2, 3, 3, channels)).astype(np.uint8)
    result = run(lambda t: bitpack.compute_planes_by_lanes(t, planes), [x], target)
    for plane in range(planes):
        np.testing.assert_array_equal(result[..., plane, :], pack(x >> plane & 1))


def test_max_pooling_of_bits(rng: np.random.Generator) -> None:
    target = targets.load(str(rng.choice(GPUS)))
    geometry = Geometry((7, 6), (3, 2), (2, 2), (1, 0, 1, 1))
    x = rng.integers(0, 1 << 32, (2, 7, 6, 1, 3), dtype=np.uint32)
    invert = rng.integers(0, 1 << 32, 3, dtype=np.uint32)
    result = run(lambda *t: binary_max_pool2d.compute(geometry, *t), [x, invert], target)
    for row, column, taps in windows(geometry):
        union = np.bitwise_or.reduce([x[:, y, at] ^ invert for _, _, y, at in taps])
        np.testing.assert_array_equal(result[:, row, column], union ^ invert)


def test_steps_round_and_keep_nans(rng: np.random.Generator) -> None:
    """A product is rounded before the sum, and a NaN stays one, as on CPUs."""
    target = targets.load(str(rng.choice(GPUS)))
    x, channels = special(rng, 6, 33), 33
    steps = [
        Step(op, special(rng, channels) if op in ("mul", "add") else np.zeros(channels, np.float32))
        for op in ("mul", "add", "max", "mul", "add", "min", "div")
    ]

    def compute(x: Any, *constants: Any) -> Any:
        return te.compute(x.shape, lambda *i: output_transform.emit(steps, constants, x[i], i[-1]), name="transformed")

    result = run(compute, [x, *(step.value for step in steps)], target)
    mod, garbage = lower(compute, [x, *(step.value for step in steps)])
    library = tvm.tirx.build(default_schedule(mod, targets.host(), 1).mod, target=targets.host().tvm_target(1))
    out = tvm.runtime.tensor(garbage)
    library["main"](*map(tvm.runtime.tensor, [x, *(step.value for step in steps)]), out)
    np.testing.assert_array_equal(result, out.numpy())


def test_sums_to_few_outputs(rng: np.random.Generator) -> None:
    """A warp a sum, with what follows, on extents that fill no warp."""
    target = targets.load(str(rng.choice(GPUS)))
    x = rng.integers(-64, 65, (3, 7, 11, 5)).astype(np.float32)
    for extents, axes in (((3, 5), (1, 2)), ((3, 7, 11), (3,))):
        reduced = [te.reduce_axis((0, x.shape[a])) for a in axes]

        def compute(t: Any, reduced: Any = reduced, extents: Any = extents) -> Any:
            ry, *rx = reduced
            at = (lambda n, c: t[n, ry, rx[0], c]) if rx else (lambda n, h, w: t[n, h, w, ry])
            sums = te.compute(extents, lambda *i: te.sum(at(*i), axis=reduced), name="sums")
            return te.compute(extents, lambda *i: sums[i] * 0.5, name="halves")

        np.testing.assert_array_equal(run(compute, [x], target), x.sum(axes) / 2)


def test_softmax(rng: np.random.Generator) -> None:
    target = targets.load(str(rng.choice(GPUS)))
    x = rng.normal(0, 3, (int(rng.integers(1, 5)), int(rng.integers(2, 100)))).astype(np.float32)
    x[0, 0] = rng.choice(np.array([0, np.inf, np.nan], np.float32))
    with np.errstate(all="ignore"):
        e = np.exp(x - x.max(1, keepdims=True))
    np.testing.assert_allclose(run(topi.nn.softmax, [x], target), e / e.sum(1, keepdims=True), rtol=1e-5)


# Machine code ----------------------------------------------------------------------------------------------------


def toolkit(tool: str) -> str:
    """nvcc or cuobjdump: on the path or of NVIDIA's wheels."""
    folders = [str(folder) for path in sys.path for folder in Path(path).glob("nvidia/cu*/bin")]
    found = next((p for p in (shutil.which(tool, path=f) for f in folders) if p), None) or shutil.which(tool)
    if found is None:
        pytest.skip(f"needs {tool}")
    return found


def machine_code(mod: tvm.IRModule, target: targets.Target, folder: Path) -> Counter[str]:
    """How many instructions of each kind the kernels have."""
    import tvm_ffi

    source, binary = folder / "kernel.cu", folder / "kernel.cubin"
    source.write_text(emulator.cuda_source(mod, arch(target)))
    include = [f"-I{path}" for path in tvm_ffi.libinfo.include_paths()]
    options = ["-std=c++17", "-diag-suppress", "174", "-cubin", "-arch", arch(target)]
    subprocess.run([toolkit("nvcc"), *options, *include, "-o", binary, source], check=True)
    listing = subprocess.run([toolkit("cuobjdump"), "-sass", binary], check=True, capture_output=True, text=True)
    return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing.stdout, re.M))


@pytest.mark.slow
@pytest.mark.parametrize("name", GPUS)
def test_instructions(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """The tensor cores' own instruction where there is one, POPC elsewhere; no called routine, nothing spilled."""
    toolkit("nvcc"), toolkit("cuobjdump")
    target = targets.load(name)
    assert target.gpu is not None
    args = of_codes(rng, CODES["1a"], CODES["1w"], 8, 256, 256, Geometry((14, 14), (3, 3), (1, 1), (1, 1, 1, 1)))
    for to in ("floats", "bits"):
        compute, arrays = bit_gemm(
            args[2], args[1], 8 * 14 * 14, [Step("mul", np.full(256, 0.5, np.float32))], to, target
        )
        mod, _ = lower(compute, [words(args[0]), *arrays])
        found = machine_code(kernel(mod, target), target, tmp_path)
        wanted = {"and": "BMMA.168256.AND.POPC", "xor": "BMMA.88128.XOR.POPC", "": "POPC"}[target.gpu.bit_product]
        assert found[wanted] >= 32, found
        assert not [op for op in found if re.match(r"CALL|LDL|STL", op)], found
        assert target.gpu.bit_product == "" or found["POPC"] == 0, found
        assert ("LDGSTS.E.BYPASS.128" in found) == target.gpu.async_copy, found


@pytest.mark.slow
def test_packing_is_a_vote(tmp_path: Path) -> None:
    mod, _ = lower(bitpack.compute_by_lanes, [np.zeros((1, 8, 8, 64), np.float32), np.zeros(64, np.float32)])
    target = targets.load("cuda-sm87")
    found = machine_code(kernel(mod, target), target, tmp_path)
    assert found["VOTE.ANY"] == 8 and found["STG.E"] == 1 and not found["SHFL.BFLY"], found
