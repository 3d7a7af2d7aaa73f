"""A C library of an artifact, running on this machine: what an app does, from Python."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np

import targets
from pipeline import toolchain
from pipeline.session import Session, exclusive
from pipeline.timer import timer


class LibrarySession(Session):
    """A `Session` of a free-standing library, or of C source, which is compiled first.

    One thread runs it: a pool is the app's, and Python has none to lend.
    """

    def _load(self) -> None:
        self._check_machine()
        library = self.manifest.c_library
        assert library is not None
        folder = self.folder
        if self.manifest.emit == "c-source":
            self._built = tempfile.TemporaryDirectory()  # kept as long as the session
            folder = Path(self._built.name)
            tools = toolchain.find(targets.load(self.manifest.target))
            shutil.copy(self.folder / f"{library.name}.py", folder)
            source, built = str(self.folder / f"{library.name}.c"), str(folder / f"lib{library.name}.so")
            tools.run(*tools.cc, "-std=c99", "-O3", "-shared", "-fPIC", "-o", built, source, "-lm")
        self._configure = lambda *_: None  # TVM's thread pool has no part in this
        self._network = _module(folder / f"{library.name}.py").Network()

    @exclusive
    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._network.run(inputs)

    @exclusive
    def seconds(self, inputs: dict[str, np.ndarray], calls: int) -> float:
        if self.manifest.gpus:
            raise ValueError(
                f"{self.folder}: from Python every run of a GPU's library copies the weights; time it in an app on "
                f"memory of the device, or compile it with --emit vm"
            )
        if self.manifest.threads > 1:
            raise ValueError(
                f"{self.folder}: compiled for {self.manifest.threads} threads, which an app lends and Python cannot; "
                f"time it in an app, or compile it with --threads 1"
            )
        call, _ = self._network.prepare(inputs)
        return timer(call)(calls)

    def kernel_seconds(self, inputs: dict[str, np.ndarray], calls: int) -> dict[str, float]:
        """
        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self.folder}: kernels of a C library cannot be timed one by one; compile with --emit vm for a profile"
        )


def _module(path: Path) -> ModuleType:
    """The wrapper that was generated with the library; not by name, because another network's may have the same."""
    spec = importlib.util.spec_from_file_location(f"crossbit_network_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
