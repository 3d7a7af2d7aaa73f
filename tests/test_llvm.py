"""Stack frames of compiled kernels."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from tvm import te

import pipeline.compiler  # noqa: F401 (with it comes our way of calling LLVM)
import targets


def compiled(target: str) -> tvm.runtime.Module:
    """64 sums, then products of them with their mirror image."""
    x, k = te.placeholder((8, 64), "float32", name="x"), te.reduce_axis((0, 8), "k")
    sums = te.compute((64,), lambda i: te.sum(x[k, i], axis=k), name="sums")
    out = te.compute((64,), lambda i: sums[63 - i] * sums[i], name="out")
    function = te.create_prim_func([x, out]).with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target=targets.load(target).tvm_target(1)).mod


@pytest.mark.parametrize(("target", "aligned"), [("x86-avx2", 32), ("x86-avx512bw", 64), ("cortex-a72", 0)])
def test_frames_are_aligned_for_vectors(target: str, aligned: int) -> None:
    """Where vectors are wider than what callers keep aligned."""
    frames = re.findall(r'^attributes #\d+ = .*"target-cpu".*$', compiled(target).inspect_source("ll"), re.M)
    assert frames
    assert all((f"alignstack={aligned}" in frame) == bool(aligned) for frame in frames)
    assert aligned or not any("alignstack" in frame for frame in frames)


def test_what_is_built_so_runs(rng: np.random.Generator) -> None:
    x = rng.normal(size=(8, 64)).astype(np.float32)
    out = tvm.runtime.tensor(np.zeros(64, np.float32))
    compiled("host")["main"](tvm.runtime.tensor(x), out)
    sums = x.sum(0, dtype=np.float64)
    np.testing.assert_allclose(out.numpy(), sums * sums[::-1], rtol=1e-4, atol=1e-4)
