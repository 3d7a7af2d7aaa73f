"""Whole networks on an emulated GPU: compiled, packaged, loaded and verified as on a real one."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_machine
import numpy as np
import pytest
import torch
from networks import randomise
from torch import nn

import targets
from pipeline import artifact, models, quantizers, session
from pipeline.artifact import Emit
from pipeline.export import export
from pipeline.layers import QuantConv2d, QuantLinear
from pipeline.models import Quantize
from pipeline.packaging import compile_network, oracle
from pipeline.stacked import StackedConv2d

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++ (apt-get install g++)"),
]


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_machine.emulate(monkeypatch)


def made(model: nn.Module, shape: tuple[int, ...], folder: Path) -> Path:
    path = folder / "model.onnx"
    export(model.eval(), shape, path)
    return path


def digits(widths: tuple[int, ...] = (32, 64, 64)) -> nn.Module:
    """The network of the demo, with norms that have seen a batch."""
    model: nn.Module = models.build("vgg_small", (1, 8, 8), 10, Quantize(group=16), widths=widths).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 1, 8, 8))
    return model


def assert_verified(path: Path, folder: Path, target: str, emit: Emit = "vm", batch: int = 1) -> Path:
    """Compile, load and compare with ONNX Runtime by `crossbit verify`'s rule."""
    into = folder / f"{target}-{emit}-{batch}"
    compile_network(path, into, targets.load(target), 1, batch, emit=emit, name="net" if emit != "vm" else None)
    verdict = session.verify(into)
    assert verdict.passed, verdict
    return into


@pytest.mark.parametrize("target", ["cuda-sm75", "cuda-sm80", "cuda-sm90", "cuda-sm100"])
def test_digits(target: str, seed: int, tmp_path: Path) -> None:
    folder = assert_verified(made(digits(), (1, 8, 8), tmp_path), tmp_path, target)
    manifest = artifact.read(folder)
    assert targets.load(target).gpu.arch in manifest.gpus  # type: ignore[union-attr]
    assert manifest.kernels >= len(manifest.layers)


@pytest.mark.parametrize("method", [*quantizers.methods(), "stacked"])
def test_a_network_of_every_method(method: str, rng: np.random.Generator, tmp_path: Path) -> None:
    found = quantizers.methods().get(method)
    options: dict[str, Any] = {"weight": found.weight, "activation": found.activation} if found else {}
    stacked = StackedConv2d(40, 48, 3, padding=1, segments=4, bank=32)
    model = nn.Sequential(
        nn.Conv2d(3, 40, 3, padding=1),
        nn.BatchNorm2d(40),
        QuantConv2d(40, 48, 3, padding=1, **options) if found else stacked,
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.MaxPool2d(2),
        QuantConv2d(48, 32, 3, 2, 1, **options),
        nn.BatchNorm2d(32),
        nn.Flatten(),
        QuantLinear(128, 10, **options),
    )
    path = made(randomise(model, rng), (3, 8, 8), tmp_path)
    assert_verified(path, tmp_path, str(rng.choice(["cuda-sm75", "cuda-sm80", "cuda-sm100"])), batch=2)


def test_softmax_and_two_outputs(rng: np.random.Generator, tmp_path: Path) -> None:
    """One of which the other is made of."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(20, 33)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = torch.relu(self.dense(x))
            return torch.softmax(y, dim=1), y

    path = made(Network(), (20,), tmp_path)
    for emit in ("vm", "c-lib"):
        assert_verified(path, tmp_path, "cuda-sm80", emit, batch=3)  # type: ignore[arg-type]


# The C library ---------------------------------------------------------------------------------------------------


class App:
    """What an app does with a library, by ctypes: memory of the device, weights once, runs on them."""

    def __init__(self, folder: Path) -> None:
        self.manifest = artifact.read(folder)
        assert self.manifest.c_library is not None
        self.record = self.manifest.c_library
        self.library = ctypes.CDLL(str(folder / self.manifest.library))
        self.library.test_malloc.restype = self.library.net_strerror.restype = ctypes.c_void_p
        self.library.test_malloc.argtypes = [ctypes.c_size_t]
        self.library.test_free.argtypes = [ctypes.c_void_p]
        header = (folder / "net.h").read_text()
        self.interface = int(header.split("#define NET_INTERFACE 0x")[1][:8], 16)
        self.tensors = [*self.manifest.inputs, *self.manifest.outputs]
        self.memory = [self.library.test_malloc(4 * int(np.prod(t.shape))) for t in self.tensors]
        self.workspace = self.library.test_malloc(self.record.workspace_bytes)
        self.constants = self.library.test_malloc(self.record.constant_bytes)

    def close(self) -> None:
        for memory in (*self.memory, self.workspace, self.constants):
            self.library.test_free(memory)

    def load(self, interface: int | None = None, constants: int | None = -1) -> int:
        given = self.constants if constants == -1 else constants
        return int(self.library.net_load_with(interface or self.interface, ctypes.c_void_p(given), None))

    def run(self, **changed: Any) -> int:
        """net_run_with; ``changed`` replaces arguments."""
        values = {"interface": self.interface, "memory": self.memory, "constants": self.constants}
        values |= {"workspace": self.workspace, "bytes": self.record.workspace_bytes, **changed}
        pointers = [*values["memory"], values["constants"], values["workspace"]]
        status = self.library.net_run_with(
            values["interface"], *map(ctypes.c_void_p, pointers), ctypes.c_size_t(values["bytes"]), None
        )
        return int(status)

    def error(self, status: int) -> str:
        return (ctypes.string_at(self.library.net_strerror(status))).decode()

    def set(self, i: int, array: np.ndarray) -> None:
        ctypes.memmove(self.memory[i], array.ctypes.data, array.nbytes)

    def get(self, i: int) -> np.ndarray:
        out = np.empty(self.tensors[i].shape, np.float32)
        ctypes.memmove(out.ctypes.data, self.memory[i], out.nbytes)
        return out


@pytest.fixture
def app(seed: int, tmp_path: Path) -> Iterator[App]:
    """An app around a C library of the digits' network."""
    path = made(digits((16, 32, 32)), (1, 8, 8), tmp_path)
    app = App(assert_verified(path, tmp_path, "cuda-sm80", "c-lib"))
    yield app
    app.close()


def test_weights_are_loaded_once_and_runs_repeat(app: App, rng: np.random.Generator, tmp_path: Path) -> None:
    assert app.load() == 0
    for _ in range(3):
        x = rng.standard_normal((1, 1, 8, 8), np.float32)
        app.set(0, x)
        assert app.run() == 0
        (expected,) = oracle(tmp_path / "model.onnx").run(None, {"x": x})
        np.testing.assert_allclose(app.get(1), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_mistakes_are_statuses_and_nothing_is_written(app: App) -> None:
    assert app.load() == 0
    before = app.get(1)
    x, y = app.memory
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"interface": app.interface ^ 1}, -5, "header of another library"),
        ({"memory": [None, y]}, -1, "NULL"),
        ({"constants": None}, -1, "NULL"),
        ({"workspace": None}, -1, "NULL"),
        ({"memory": [x + 4, y]}, -2, "not aligned"),
        ({"workspace": app.workspace + 16}, -2, "not aligned"),
        ({"constants": app.constants + 32}, -2, "not aligned"),
        ({"memory": [x, x]}, -3, "overlaps"),
        ({"memory": [x, app.workspace]}, -3, "overlaps"),
        ({"bytes": app.record.workspace_bytes - 1}, -4, "smaller than"),
    ]
    for changed, status, sentence in cases:
        assert app.run(**changed) == status, changed
        assert sentence in app.error(status)
    assert app.load(interface=app.interface ^ 1) == -5
    assert app.load(constants=None) == -1
    np.testing.assert_array_equal(app.get(1), before)
    assert app.error(0) == "done"
    assert app.run() == 0


def test_a_kernel_that_fails_is_a_cuda_error(app: App) -> None:
    """Constants that the app never allocated: on a GPU the stream would report it, the emulator does at once."""
    app.library.test_free(app.constants)
    status = app.run()
    app.constants = None
    assert status > 0
    assert "tensor" in app.error(status)
