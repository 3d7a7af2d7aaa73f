"""Random networks and the one comparison that matters: torch == ONNX Runtime == compiled code."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.onnx._internal.exporter._registration import ONNXRegistry

import targets
from pipeline import compiler, importer
from pipeline.export import export
from pipeline.packaging import onnxruntime, oracle

# torch reads the source of its 497 translations for every export: half of its time, so here once a process.
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[assignment]


def randomise(model: nn.Module, rng: np.random.Generator) -> nn.Module:
    """Batch norms as training never leaves them: negative, zero and tiny gammas, any mean."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            count = module.num_features
            gamma = rng.choice([-1.0, 0.0, 1e-6, 0.5, 1.0, 2.0], count) * rng.uniform(0.5, 1.5, count)
            if module.affine:
                beta = rng.normal(0, 0.3, count) * rng.integers(0, 2, count)
                module.weight.data = torch.tensor(gamma, dtype=torch.float32)
                module.bias.data = torch.tensor(beta, dtype=torch.float32)
            module.running_mean = torch.tensor(rng.normal(0, 0.5, count), dtype=torch.float32)
            module.running_var = torch.tensor(rng.uniform(0.1, 3, count), dtype=torch.float32)
    return model.eval()


def dyadic(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Multiples of 1/16 with a third of zeros: float sums of them are exact in any order."""
    values = rng.integers(-64, 65, shape) * (rng.random(shape) > 0.33)
    return (values / 16).astype(np.float32)


def outputs(
    model: nn.Module, x: np.ndarray, folder: Path, target: str = "host", threads: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The deployed torch network, ONNX Runtime, and compiled code on ``x``."""
    path = folder / "model.onnx"
    deployed = export(model, x.shape[1:], path)
    with torch.no_grad():
        by_torch = deployed(torch.from_numpy(x)).numpy()
    (by_runtime,) = oracle(path).run(None, {"x": x})
    (by_library,) = compiled(path, [x], target, threads)
    return by_torch, by_runtime, by_library


def compiled(path: Path, inputs: list[np.ndarray], target: str = "host", threads: int = 1) -> list[np.ndarray]:
    """The outputs of an ONNX file, compiled and run in this process."""
    from tvm import cpu, relax, runtime

    chosen = targets.load(target)
    lowered = compiler.lower(importer.load(path, len(inputs[0]), chosen))
    executable, _, _ = compiler.build(lowered, chosen, threads)
    result = relax.VirtualMachine(executable.jit(), cpu())["main"](*map(runtime.tensor, inputs))
    return [r.numpy() for r in ([result] if isinstance(result, runtime.Tensor) else result)]


def assert_optimiser_keeps(model: nn.Module, x: np.ndarray, folder: Path) -> None:
    """ONNX Runtime's optimiser changes no bit of a network without float convolutions."""
    path = folder / "optimised.onnx"
    export(model, x.shape[1:], path)
    as_written, optimised = (runtime.run(None, {"x": x})[0] for runtime in (oracle(path), onnxruntime(path, 1)))
    np.testing.assert_array_equal(as_written, optimised)


def assert_identical(model: nn.Module, x: np.ndarray, folder: Path, **options: object) -> None:
    """All three bit for bit, NaNs included."""
    by_torch, by_runtime, compiled = outputs(model, x, folder, **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(by_torch, by_runtime)
    np.testing.assert_array_equal(by_runtime, compiled)
